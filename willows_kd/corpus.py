"""Text in, blocks of tokens out: reading a book, splitting it, packing it."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from willows_kd import gutenberg
from willows_kd.chapters import EMPHASIS, find_headings, titles_below
from willows_kd.errors import InputError, is_integer, require, type_name

SAMPLE_STORY = Path(__file__).parent / "assets" / "sample_story.txt"


@dataclass(frozen=True)
class Chapter:
    """One chapter: its place in the book (from 1), its title, its clean text."""

    number: int
    title: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A book as it is learnt from.

    Attributes:
        title: the book's title, or the file's name where it has none.
        provenance: where the text came from, in one line.
        chapters: the chapters in order; a text without chapters is one chapter.
        skipped: empty lines and chapters that were passed over while reading.
    """

    title: str
    provenance: str
    chapters: tuple[Chapter, ...]
    skipped: int = 0

    @property
    def text(self) -> str:
        """All chapters in one string."""
        return "\n\n".join(chapter.text for chapter in self.chapters)


def load_corpus(source: str | os.PathLike | None = None) -> Corpus:
    """Read the book to learn from.

    Args:
        source: the path of a text file; or ``"sample"`` for the story that ships
            with the package; or ``"willows"`` for *The Wind in the Willows* and
            nothing else; or None for the first of these that can be had: the
            file named by ``WILLOWS_KD_CORPUS``, the book from the user's cache,
            the book from Project Gutenberg, the sample story.

    Raises:
        InputError: the file is missing, empty or not text; or the book was asked
            for and cannot be had.
    """
    usable = source is None or (isinstance(source, str | os.PathLike) and str(source))
    require(usable, f"the source is {source!r}; give the path of a text file")
    if source == "sample":
        return read_book(SAMPLE_STORY, provenance="the sample story that ships with willows_kd")
    if source not in (None, "willows"):
        return read_book(source)
    if override := os.environ.get("WILLOWS_KD_CORPUS"):
        return read_book(override, provenance=f"{override} (WILLOWS_KD_CORPUS)")
    try:
        return read_book(gutenberg.fetch_willows(), provenance=gutenberg.PROVENANCE)
    except gutenberg.DownloadError as error:
        if source == "willows":
            raise InputError(
                f"The Wind in the Willows could not be had ({error}); give the path of a "
                "text file of it, or set WILLOWS_KD_CORPUS to one"
            ) from error
        print(f"📖 The Wind in the Willows could not be had ({error}): using the sample story.")
        return load_corpus("sample")


def read_book(path: str | os.PathLike, provenance: str | None = None) -> Corpus:
    """Read a text file into a `Corpus`: decode, clean, find the chapters."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a text file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a text file") from None
    except (OSError, ValueError) as error:  # the latter where a path holds a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be read ({reason})") from error
    return parse_book(decode(raw, str(path)), path.stem, provenance or str(path))


def decode(raw: bytes, name: str = "the text") -> str:
    """Bytes of UTF-8, UTF-16 (each with or without a BOM) or cp1252 to text."""
    nulls = raw[:4096].count(0)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif nulls * 4 > len(raw[:4096]):  # every second byte of Latin text in UTF-16 is 0
        encodings = ["utf-16-le" if raw[1:4096:2].count(0) * 2 > nulls else "utf-16-be"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        controls = sum(c < " " and c not in "\t\n\r\f\v\x1a" for c in text[:100_000])
        if controls * 100 <= min(len(text), 100_000):
            text = text.translate({0: None, 0x1A: None})  # DOS ended files with the latter
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise InputError(f"{name} is not text; give a file of UTF-8, UTF-16 or cp1252 text")


# -- from raw text to chapters ---------------------------------------------------------

FURNITURE = re.compile(
    r"\[Illustration[^\]]*\]|\{\d+\}|\[Pg\s*\d+\]|^[ \t]*(?:[*·•][ \t]*){3,}$", re.MULTILINE
)
PARAGRAPH_BREAK = re.compile(r"\n(?:[^\S\n]*\n)+")
SURPLUS_BLANK_LINE = re.compile(r"^[^\S\n]*\n(?=[^\S\n]*\n)", re.MULTILINE)
FRONT_MATTER_LIMIT = 3_000  # characters: a title page and a table of contents
LENGTH_OF_A_BOOK = 50_000  # characters: a shorter text needs no chapters
LONGEST_WRAPPED_LINE = 120  # characters: a longer line was never broken by hand


def parse_book(raw: str, title: str, provenance: str) -> Corpus:
    """Clean a text and cut it into chapters.

    What stands before the first chapter is dropped if its prose is short (a title
    page, a table of contents) and kept as a chapter of its own if it is long.

    Raises:
        InputError: nothing is left to learn from.

    Warns:
        UserWarning: a text as long as a book has no chapter headings.
    """
    raw = gutenberg.strip_licence(raw).strip("\n")
    skipped = len(SURPLUS_BLANK_LINE.findall(raw))
    raw = FURNITURE.sub("", raw).strip("\n")
    pieces = PARAGRAPH_BREAK.split(raw)
    if len(pieces) == 1:  # no blank line anywhere: each line is a paragraph
        pieces = raw.split("\n")
    headings = find_headings(pieces)
    bounds = [heading.at for heading in headings] + [len(pieces)]
    front = [text for piece in pieces[: bounds[0]] for text in unwrap(piece)]
    sections = []
    for heading, end in zip(headings, bounds[1:], strict=True):
        texts = [text for piece in pieces[heading.at + 1 : end] for text in unwrap(piece)]
        sections.append((heading, texts))
    chapters = titles_below(sections)
    skipped += sum(not texts for _, texts in chapters)
    if not chapters:
        chapters = [(title, front)]
    elif preface := preface_of(front):
        chapters.insert(0, (title, preface))
    elif front:
        title = front[0]
    found = [(name, "\n\n".join(texts)) for name, texts in chapters if texts]
    require(found, f"{provenance} holds no text; give a file with a few paragraphs in it")
    if not headings and len(raw) > LENGTH_OF_A_BOOK:
        message = f"no chapter headings could be made out in {provenance}: it is read as one text"
        warnings.warn(message, stacklevel=2)
    numbered = (Chapter(i, name, text) for i, (name, text) in enumerate(found, start=1))
    return Corpus(title, provenance, tuple(numbered), skipped)


def preface_of(front: list[str]) -> list[str]:
    """What stands before the first chapter, from its first whole sentence on, if that is long."""
    whole = [i for i, text in enumerate(front) if re.search(r"[.!?][\"'”’)]*$", text)]
    if sum(len(front[i]) for i in whole) <= FRONT_MATTER_LIMIT:
        return []
    return front[whole[0] : whole[-1] + 1]


def unwrap(piece: str) -> list[str]:
    """The paragraphs of a piece of text between two blank lines.

    Lines that were broken by hand to fit a page are joined; indented lines (verse)
    keep their breaks; lines too long to have been broken are paragraphs themselves.
    """
    lines = [line for line in piece.replace("\ufeff", "").split("\n") if line.strip()]
    tidy = [EMPHASIS.sub(r"\1", " ".join(line.split())) for line in lines]
    if any(len(line) > LONGEST_WRAPPED_LINE for line in lines):
        return tidy
    verse = len(lines) > 1 and all(line[0].isspace() for line in lines)
    text = ("\n" if verse else " ").join(tidy)
    return [EMPHASIS.sub(r"\1", text)] if text else []


# -- from chapters to splits -----------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The texts to train on, to choose by, and to test on once: parts of chapters."""

    train: list[str]
    validation: list[str]
    test: list[str]


def split(corpus: Corpus) -> Splits:
    """Hold out text by chapter, never by shuffled lines.

    *The Wind in the Willows*: chapters I-X train, XI validates, XII tests. Any
    other text: the last tenth tests and the tenth before validates, cut where a
    paragraph ends, or, in one longer than a tenth of the text, a word.
    """
    texts = [chapter.text for chapter in corpus.chapters]
    if is_willows(corpus):
        return Splits(texts[:-2], texts[-2:-1], texts[-1:])
    total = sum(map(len, texts))
    parts: list[dict[int, list[str]]] = [{}, {}, {}]
    seen = 0
    for chapter, text in enumerate(texts):
        for between, piece in pieces(text, longest=total // 10 + 1):
            middle = seen + len(piece) / 2
            part = parts[0 if middle < 0.8 * total else 1 if middle < 0.9 * total else 2]
            part.setdefault(chapter, []).extend([between, piece])
            seen += len(between) + len(piece)
    return Splits(*(["".join(found[1:]) for found in part.values()] for part in parts))


def pieces(text: str, longest: int) -> Iterator[tuple[str, str]]:
    """What stands before each paragraph, and the paragraph; one that is too long, in several."""
    for i, paragraph in enumerate(text.split("\n\n")):
        for j, piece in enumerate(cut(paragraph, longest)):
            if j and piece[0].isspace():
                yield piece[0], piece[1:]
            else:
                yield "" if j or not i else "\n\n", piece


def is_willows(corpus: Corpus) -> bool:
    """Whether this is the book itself, whoever made the copy."""
    titles = [chapter.title.upper() for chapter in corpus.chapters]
    if len(titles) not in (12, 13):  # the thirteenth is somebody's preface
        return False
    return "RIVER BANK" in titles[-12] and "ULYSSES" in titles[-1]


# -- from splits to blocks of tokens ---------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """A corpus as tensors of token ids, each of shape (blocks, block_size).

    Attributes:
        train, validation, test: int64 tensors.
        remainder: for each split, the tokens at its end that fill no block.
    """

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    remainder: dict[str, int]

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.train.shape[1]


def pack(corpus: Corpus, tokenizer, block_size: int = 128) -> Blocks:
    """Tokenise a corpus once and cut each split into blocks of `block_size` tokens.

    The tokeniser's end-of-text token stands between chapters. Every token is kept
    in order, but for the few at a split's end that do not fill a block: their
    number is in `Blocks.remainder`.

    Raises:
        InputError: a split is too short for one block.

    Warns:
        UserWarning: once, where empty lines or chapters were skipped.
    """
    require(
        isinstance(corpus, Corpus), f"corpus is {type_name(corpus)}; give what load_corpus returns"
    )
    require(callable(tokenizer), f"tokenizer is {type_name(tokenizer)}; give that of the teacher")
    whole = "a whole number, " if not isinstance(block_size, int) else ""
    require(
        is_integer(block_size, 2),
        f"block_size is {block_size!r}; a block needs {whole}at least 2 tokens",
    )
    if corpus.skipped:
        warnings.warn(f"skipped {corpus.skipped} empty lines or chapters", stacklevel=2)
    tensors, remainder = {}, {}
    for name, texts in vars(split(corpus)).items():
        tokens = tokenize(texts, tokenizer)
        if len(tokens) < block_size:
            raise InputError(
                f"{corpus.provenance} is too short: its {name} part holds {len(tokens)} tokens, "
                f"less than one block of {block_size}; give a longer text or a smaller block size"
            )
        remainder[name] = len(tokens) % block_size
        tensors[name] = tokens[: len(tokens) - remainder[name]].view(-1, block_size)
    return Blocks(**tensors, remainder=remainder)


LONGEST_PIECE = 100_000  # characters: a tokenizer's memory grows with the longest


def tokenize(texts: list[str], tokenizer) -> torch.Tensor:
    """The token ids of some texts in a row, an end-of-text token between them, shape (tokens,)."""
    if not texts:
        return torch.empty(0, dtype=torch.long)
    from datasets import Dataset  # slow to import: only where text is tokenised

    def ids_of(batch):
        # verbose=False: a text longer than the model's context is what we are here to cut
        encoded = tokenizer(batch["text"], add_special_tokens=False, verbose=False)
        return {"ids": encoded["input_ids"]}

    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    cuts = [cut(text, LONGEST_PIECE) for text in texts]
    begins = [i == 0 for found in cuts for i in range(len(found))]
    with quiet_progress():
        rows = Dataset.from_dict({"text": [piece for found in cuts for piece in found]})
        rows = rows.map(ids_of, batched=True, batch_size=16, remove_columns="text")
    tokens = []
    for row, begins_text in zip(rows.with_format("numpy"), begins, strict=True):
        tokens += [torch.tensor(between if begins_text else [], dtype=torch.long)]
        tokens += [torch.from_numpy(row["ids"].astype("int64"))]
    return torch.cat(tokens)[len(between) :]


def cut(text: str, longest: int) -> list[str]:
    """A text in pieces of so many characters at most.

    Each piece begins with white space where there is any, as the words of a byte-level
    BPE do, so that its tokens are those of the whole.
    """
    starts = [0]
    while len(text) - starts[-1] > longest:
        begin, end = starts[-1] + 1, starts[-1] + longest
        at = max(text.rfind(" ", begin, end), text.rfind("\n", begin, end))
        while at > begin and text[at - 1].isspace():
            at -= 1
        starts.append(at if at >= begin else end)
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


@contextlib.contextmanager
def quiet_progress():
    """No progress bars of `datasets` for what takes a moment."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
