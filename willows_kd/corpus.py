"""Text in, blocks of tokens out: reading a book, splitting it, packing it."""

import contextlib
import glob
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch

from willows_kd import gutenberg
from willows_kd.chapters import EMPHASIS, find_headings, titles_below
from willows_kd.errors import InputError, require, type_name

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
        title: the book's title, or the file's name if it has none.
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


def load_corpus(
    source: str | os.PathLike | None = None,
    text_column: str | None = None,
    encoding: str | None = None,
) -> Corpus:
    """Read the text to learn from.

    Args:
        source: the path of a text file, or of a JSON Lines or Parquet file (`.jsonl`,
            `.json`, `.parquet`), each row of which is a text; ``"sample"`` for the story
            that ships with the package; ``"willows"`` for *The Wind in the Willows* and
            nothing else; or None for the first of these that can be had: the file named
            by ``WILLOWS_KD_CORPUS``, the book from the user's cache, the book from
            Project Gutenberg, the sample story.
        text_column: the column that holds the text of a row; by default the one called
            ``"text"``, or the only one of text.
        encoding: the encoding of your file, such as ``"cp1251"``; by default UTF-8 or
            UTF-16, or else cp1252.

    Raises:
        InputError: the file is missing, empty or not text, or has no such column or
            encoding; or the book was asked for and cannot be had.

    Warns:
        UserWarning: the text was probably decoded wrongly, or is as long as a book and has
            no chapter headings.
    """
    usable = source is None or (isinstance(source, str | os.PathLike) and str(source))
    require(usable, f"the source is {source!r}; give the path of a text file")
    own = {"text_column": text_column, "encoding": encoding}
    for name, value in own.items():
        require(value is None or isinstance(value, str), f"{name} is {value!r}; give a name")
    if source == "sample":
        return read_book(SAMPLE_STORY, provenance="the sample story that ships with willows_kd")
    if source not in (None, "willows"):
        return read_book(source, **own)
    if override := os.environ.get("WILLOWS_KD_CORPUS"):
        return read_book(override, f"{override} (WILLOWS_KD_CORPUS)", **own)
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


ROWS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}


def read_book(
    path: str | os.PathLike,
    provenance: str | None = None,
    text_column: str | None = None,
    encoding: str | None = None,
) -> Corpus:
    """Read a file into a `Corpus`: the rows of a table, or the chapters of a text."""
    path = Path(path)
    of_rows = path.suffix.lower() in ROWS
    require(not path.is_dir(), f"{path} is a directory; give a text file")
    require(
        of_rows or text_column is None,
        f"{path} has no columns; text_column is for files of the kinds {', '.join(ROWS)}",
    )
    try:
        with path.open("rb") as file:
            raw = b"" if of_rows else file.read()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a text file") from None
    except (OSError, ValueError) as error:  # the latter if a path holds a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be read ({reason})") from error
    if of_rows:
        return read_rows(path, provenance or str(path), text_column, encoding)
    return parse_book(decode(raw, str(path), encoding), path.stem, provenance or str(path))


def read_rows(path: Path, provenance: str, text_column: str | None, encoding: str | None) -> Corpus:
    """Read a JSON Lines or Parquet file into a `Corpus`, each row with text a chapter."""
    from datasets import load_dataset  # slow to import

    kind = ROWS[path.suffix.lower()]
    settings = {"encoding": known(encoding)} if encoding and kind == "json" else {}
    try:
        with quiet_progress(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            files = glob.escape(str(path))
            rows = load_dataset(kind, data_files=files, split="train", cache_dir=cache, **settings)
            column = find_column(rows.features, text_column, path)
            texts = [(text or "").replace("\r\n", "\n").strip() for text in rows[column]]
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of `datasets` and `pyarrow`, which raise many kinds
        reason = str(error.__cause__ or error).split("\n")[0] or "it has no rows"
        hint = "; name its encoding (--encoding) if it is not UTF-8" if kind == "json" else ""
        raise InputError(f"{path} cannot be read as {kind} ({reason}){hint}") from error
    full = [(f"Row {row}", text) for row, text in enumerate(texts, start=1) if text]
    require(full, f"{path} holds no text in the column {column!r}")
    chapters = (Chapter(i, title, text) for i, (title, text) in enumerate(full, start=1))
    return Corpus(path.stem, provenance, tuple(chapters), skipped=len(texts) - len(full))


def find_column(features, wanted: str | None, path: Path) -> str:
    """The column of text to learn from: the one asked for, "text", or the only one."""
    texts = [name for name, value in features.items() if str(value.dtype).endswith("string")]
    wanted = wanted or (texts[0] if len(texts) == 1 else "text")
    require(
        wanted in texts,
        f"{path} has no column {wanted!r} of text; its columns are {', '.join(features)}: "
        "name one with text_column (--text_column)",
    )
    return wanted


def known(encoding: str) -> str:
    """An encoding, if Python has it."""
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise InputError(f"{encoding!r} is no known encoding; give one such as 'cp1251'") from None
    return encoding


def decode(raw: bytes, name: str = "the text", encoding: str | None = None) -> str:
    """Bytes to text, by an encoding or else as UTF-8, UTF-16 (with or without a BOM) or cp1252.

    Warns:
        UserWarning: text that was taken for cp1252 hardly looks like it.
    """
    nulls = raw[:4096].count(0)
    if encoding:
        encodings = [known(encoding)]
    elif raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif nulls * 4 > len(raw[:4096]):  # every second byte of Latin text in UTF-16 is 0
        encodings = ["utf-16-le" if raw[1:4096:2].count(0) * 2 > nulls else "utf-16-be"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for candidate in encodings:
        try:
            text = raw.decode(candidate)
        except ValueError:
            continue
        controls = sum(c < " " and c not in "\t\n\r\f\v\x1a" for c in text[:100_000])
        if controls * 100 <= min(len(text), 100_000):
            if candidate == "cp1252" and not encoding and looks_garbled(text):
                message = f"{name}, read as cp1252, hardly looks like text: name its encoding"
                warnings.warn(f"{message} with encoding= (--encoding)", stacklevel=2)
            text = text.translate(dict.fromkeys((0, 0x1A, 0xFEFF)))  # 0x1A ended DOS's files
            return text.replace("\r\n", "\n").replace("\r", "\n")
    expected = encoding or "UTF-8, UTF-16 or cp1252"
    raise InputError(
        f"{name} is not text in {expected}; if it is text, name its encoding with encoding= "
        "(--encoding)"
    )


def looks_garbled(text: str) -> bool:
    """Whether text read as cp1252 is probably in another encoding.

    Cyrillic or Chinese text read so is made of accented letters and signs, which are few in
    any text that cp1252 is for; "â€" is a quotation mark of UTF-8.
    """
    sample = text[:100_000]
    plain = sum(c.isascii() and c.isalpha() for c in sample)
    odd = sum(not c.isascii() and c not in "‘’“”„«»–—…•" for c in sample)
    return odd > max(10, plain / 2) or "â€" in text


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
    lines = [line for line in piece.split("\n") if line.strip()]
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
        train: int64 tensor, to learn from.
        validation: int64 tensor, to choose by.
        test: int64 tensor, to look at once.
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


def pack(corpus: Corpus, tokenizer, block_size: int | None = None) -> Blocks:
    """Tokenize a corpus once and cut each split into blocks of `block_size` tokens.

    The tokenizer's end-of-text token stands between chapters. Every token is kept
    in order, but for the few at a split's end that do not fill a block: their
    number is in `Blocks.remainder`.

    Raises:
        InputError: a split is too short for one block.

    Warns:
        UserWarning: once, if empty lines or chapters were skipped.
    """
    require(
        isinstance(corpus, Corpus), f"corpus is {type_name(corpus)}; give what load_corpus returns"
    )
    require(callable(tokenizer), f"tokenizer is {type_name(tokenizer)}; give that of the teacher")
    if block_size is None:
        block_size = min(tokenizer.model_max_length, 1024)
    whole = "" if isinstance(block_size, Integral) else "a whole number, "
    require(
        not whole and int(block_size) >= 2,
        f"block_size is {block_size!r}; a block needs {whole}at least 2 tokens",
    )
    block_size = int(block_size)
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
    from datasets import Dataset  # slow to import: only where text is tokenized

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
    """No progress bars and log lines of `datasets` for what takes a moment."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
