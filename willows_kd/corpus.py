"""Text in, blocks of tokens out: reading a book or a table, splitting it, packing it."""

import codecs
import contextlib
import glob
import io
import os
import re
import urllib.request
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from willows_kd.errors import InputError, require, type_name
from willows_kd.files import atomic_file, cache_folder

SAMPLE_STORY = Path(__file__).parent / "assets" / "sample_story.txt"
WILLOWS = "THE WIND IN THE WILLOWS"
# the titles of their first and last chapters
OWN_BOOKS = {WILLOWS: ("RIVER BANK", "ULYSSES"), "THE KETTLE ON LAMMAS DOWN": ("KETTLE", "MICHAEL")}


@dataclass(frozen=True)
class Corpus:
    """A text as it is learnt from.

    Attributes:
        title: the book's title, or the name of the file or data set.
        provenance: where the text came from, in one line.
        texts: the chapters of the book, or the rows of a table, or one text. Rows of chats
            are dicts with `messages`, or with `prompt` and `completion`.
        skipped: empty lines and rows that were passed over while reading.
    """

    title: str
    provenance: str
    texts: Sequence[str | dict]
    skipped: int = 0

    @property
    def text(self) -> str:
        """All texts in one string; of chats, which get their form from a template, none."""
        return "\n\n".join(text for text in self.texts if isinstance(text, str))


def load_corpus(
    source: str | os.PathLike | None = None,
    text_column: str | None = None,
    encoding: str | None = None,
) -> Corpus:
    """Read the text to learn from.

    Args:
        source: the path of a text file, or of a table (`.csv`, `.tsv`, `.json`, `.jsonl`,
            `.parquet`), each row of which is a text or a chat (`messages`, or `prompt` and
            `completion`); the name of a data set on the hub, `OWNER/NAME`; ``"sample"`` for
            the story that ships with the package; ``"willows"`` for *The Wind in the
            Willows* and nothing else; or None for the first of these that can be had: the
            file named by ``WILLOWS_KD_CORPUS``, the book from the user's cache, the book
            from Project Gutenberg, the sample story.
        text_column: the column of a table that holds the text; by default the one called
            ``"text"``, or the only one of text.
        encoding: the encoding of your file, such as ``"cp1251"``; by default UTF-8, or
            UTF-16 if the file begins with its byte-order mark.

    Raises:
        InputError: the file is missing, empty or not text, or has no such column or
            encoding; or the book was asked for and cannot be had.
    """
    usable = source is None or (isinstance(source, str | os.PathLike) and str(source))
    require(usable, f"the source is {source!r}; give the path of a text file")
    own = {"text_column": text_column, "encoding": encoding}
    for name, value in own.items():
        require(value is None or isinstance(value, str), f"{name} is {value!r}; give a name")
    if source == "sample":
        return read_file(SAMPLE_STORY, provenance="the sample story that ships with willows_kd")
    if source not in (None, "willows"):
        is_table = Path(source).suffix.lower() in READERS or is_hub_name(source)
        return (read_table if is_table else read_file)(source, **own)
    if override := os.environ.get("WILLOWS_KD_CORPUS"):
        corpus = load_corpus(override, **own)
        return replace(corpus, provenance=f"{override} (WILLOWS_KD_CORPUS)")
    try:
        return read_file(fetch_willows(), provenance="Project Gutenberg eBook #289")
    except InputError as error:
        if source == "willows":
            raise InputError(
                f"The Wind in the Willows could not be had ({error}); give the path of a "
                "text file of it, or set WILLOWS_KD_CORPUS to one"
            ) from error
        print(f"📖 The Wind in the Willows could not be had ({error}): using the sample story.")
        return load_corpus("sample")


# -- texts -----------------------------------------------------------------------------

NO_TEXT = {b"%pdf-": "a PDF", b"<!doctype": "HTML", b"<html": "HTML", b"<?xml": "XML"}
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
STRAY_MARKS = re.compile("[\0\x1a\ufeff]")  # 0x1A ended DOS's files
METADATA = re.compile(
    r"\A---\n(?:[\w-]+:.*\n(?:(?!---\n)[ \t#-].*\n|\n)*)+---\n"
)  # of a Markdown file
START_OF_BOOK = re.compile(r"^\*\*\* ?START OF TH.*$", re.MULTILINE)
END_OF_BOOK = re.compile(r"^\*\*\* ?END OF TH.*$", re.MULTILINE)
HEADING = re.compile(r"^(?:CHAPTER )?(?:[IVX]+|\d+)\. +([^a-z\n]+)$", re.MULTILINE)
FURNITURE = re.compile(
    r"\[Illustration[^\]]*\]|\{\d+\}|\[Pg\s*\d+\]|^[ \t]*(?:[*·•][ \t]*){3,}$", re.MULTILINE
)
EMPHASIS = re.compile(r"(?<!\w)_([^_]+)_(?!\w)")
PARAGRAPH_BREAK = re.compile(r"\n(?:[^\S\n]*\n)+")
LINE_BREAK = re.compile(r"\n")
SURPLUS_BLANK_LINE = re.compile(r"^[^\S\n]*\n(?=[^\S\n]*\n)", re.MULTILINE)
ODD_SPACES = re.compile(r"\s{2,}|[^\S ]")  # all but one plain space
LONGEST_WRAPPED_LINE = 120  # characters: a longer line was never broken by hand


def read_file(path, provenance=None, text_column=None, encoding=None) -> Corpus:
    """Read a text file into a `Corpus`: the book and the sample story by chapter."""
    path = Path(path)
    require(text_column is None, f"{path} has no columns; text_column is for {', '.join(READERS)}")
    provenance = provenance or str(path)
    return parse_text(decode(read_bytes(path), str(path), encoding), path.stem, provenance)


def read_bytes(path: Path) -> bytes:
    """What a file holds."""
    require(not path.is_dir(), f"{path} is a directory; give a text file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a text file") from None
    except (OSError, ValueError) as error:  # the latter if a path holds a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be read ({reason})") from error


def decode(raw: bytes, name: str = "the text", encoding: str | None = None) -> str:
    """Bytes to text with line ends of ``"\\n"``: by an encoding, else UTF-8, or UTF-16 by its mark.

    Raises:
        InputError: the bytes are in another encoding, or those of a PDF or of HTML.
    """
    head = raw[:100].removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"").strip(b"\xff\xfe \r\n\t")
    for begin, kind in NO_TEXT.items():
        is_text = not head.lower().startswith(begin)
        require(is_text, f"{name} is {kind}; save it as plain text first")
    expected = encoding or ("utf-16" if raw[:2] in UTF16_MARKS else "utf-8-sig")
    try:
        text = raw.decode(expected)
    except LookupError:
        raise InputError(f"{encoding!r} is no known encoding; give one such as 'cp1251'") from None
    except ValueError:
        text = "\0"
    controls = sum(c < " " and c not in "\t\n\r\f\v\x1a" for c in text[:100_000])
    require(
        controls * 100 <= min(len(text), 100_000),
        f"{name} is not text in {encoding or 'UTF-8'}; if it is text, name its encoding with "
        "encoding= (--encoding)",
    )
    return STRAY_MARKS.sub("", text).replace("\r\n", "\n").replace("\r", "\n")


def parse_text(raw: str, title: str, provenance: str) -> Corpus:
    """Clean a text; cut the book and the sample story into chapters, leave any other whole.

    The metadata with which a Markdown file may begin are left out, and so are Project
    Gutenberg's front and end matter, and what stands before the book's first chapter.
    """
    raw = strip_licence(METADATA.sub("", raw)).strip("\n")
    skipped = sum(1 for _ in SURPLUS_BLANK_LINE.finditer(raw))
    raw = FURNITURE.sub("", raw)  # under the same name: one copy less of a large text
    found, chapters = chapters_of(raw)
    texts = tuple(map(clean, chapters))
    require(all(texts), f"{provenance} holds no text; give a file with a few paragraphs in it")
    return Corpus(found or title, provenance, texts, skipped)


def strip_licence(text: str) -> str:
    """A text without Project Gutenberg's front and end matter, if it has any."""
    start, end = START_OF_BOOK.search(text), END_OF_BOOK.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


def chapters_of(text: str) -> tuple[str | None, list[str]]:
    """The title and chapters of the book or the sample story; of another text, None and itself."""
    headings = [*HEADING.finditer(text)][-12:]  # a contents page comes before them
    titles = [heading[1] for heading in headings]
    for book, (first, last) in OWN_BOOKS.items():
        if len(titles) == 12 and first in titles[0] and last in titles[-1]:
            ends = [*(heading.start() for heading in headings[1:]), len(text)]
            return book, [text[h.end() : end] for h, end in zip(headings, ends, strict=True)]
    return None, [text]


def clean(text: str) -> str:
    """A text without hand-made line ends, a blank line between its paragraphs."""
    tidy, between = io.StringIO(), ""  # not a list: the paragraphs of 20 MB take as much again
    for piece in pieces_of(text.strip("\n")):
        for paragraph in unwrap(piece):
            tidy.write(between + paragraph)
            between = "\n\n"
    return tidy.getvalue()


def pieces_of(text: str) -> Iterator[str]:
    """What stands between blank lines; if there are none, each line."""
    separator = PARAGRAPH_BREAK if PARAGRAPH_BREAK.search(text) else LINE_BREAK
    start = 0
    for gap in separator.finditer(text):
        yield text[start : gap.start()]
        start = gap.end()
    yield text[start:]


def unwrap(piece: str) -> list[str]:
    """The paragraphs of a piece of text between two blank lines.

    Lines that were broken by hand to fit a page are joined; indented lines (verse)
    keep their breaks; lines too long to have been broken are paragraphs themselves.
    """
    lines = [line for line in piece.split("\n") if line.strip()]
    tidy = [EMPHASIS.sub(r"\1", ODD_SPACES.sub(" ", line.strip())) for line in lines]
    if any(len(line) > LONGEST_WRAPPED_LINE for line in lines):
        return tidy
    verse = len(lines) > 1 and all(line[0].isspace() for line in lines)
    text = ("\n" if verse else " ").join(tidy)
    return [EMPHASIS.sub(r"\1", text)] if text else []


# -- the book's download ---------------------------------------------------------------

URLS = (
    "https://www.gutenberg.org/cache/epub/289/pg289.txt",
    "https://gutenberg.pglaf.org/2/8/289/289-0.txt",
)
TIMEOUT = 10  # seconds without an answer
SIZE_LIMIT = 2_000_000  # bytes; the book has a third of a million
CHAPTER_LENGTHS = range(10_000, 60_000)  # characters that a chapter of this book may have


def fetch_willows() -> Path:
    """The path of the book in the user's cache, downloaded if it is not there yet.

    Raises:
        InputError: no address gave the book. The cache is then as it was.
    """
    path = cache_folder() / "wind_in_the_willows.txt"
    if os.path.exists(path):  # not path.exists(): it raises if a folder is locked
        return path
    problems = []
    for url in URLS:
        try:
            text = download_book(url)
        except (OSError, HTTPException, ValueError) as error:
            problems.append(" ".join(str(getattr(error, "reason", None) or error).split()))
            continue
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return path
    raise InputError("; ".join(dict.fromkeys(problems)))


def download_book(url: str) -> str:
    """The book behind an address, bounded in size and without its licence."""
    request = urllib.request.Request(url, headers={"User-Agent": "willows_kd"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        require(answer.url.startswith("https://"), "redirected to an address that is not https")
        raw = answer.read(SIZE_LIMIT + 1)
    require(len(raw) <= SIZE_LIMIT, f"more than {SIZE_LIMIT} bytes")
    text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    whole = bool(END_OF_BOOK.search(text))
    text = re.sub(r"\n{3,}", "\n\n", strip_licence(text)).strip("\n") + "\n"
    title, chapters = chapters_of(text)
    whole = whole and title == WILLOWS and all(len(c) in CHAPTER_LENGTHS for c in chapters)
    require(whole, "what arrived is not the twelve chapters of the book")
    return text


# -- tables ----------------------------------------------------------------------------

READERS = {
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet"},
    **{".json": "json", ".jsonl": "json", ".ndjson": "json"},
}
CHATS = (["messages"], ["prompt", "completion"])  # columns that make a row a chat
FEWEST_ROWS = 10  # of fewer, no tenth can be held out: they are cut like any text


@dataclass(frozen=True)
class Rows(Sequence):
    """Rows of a `datasets.Dataset`, read from the disk one by one; a slice of them is Rows."""

    table: object

    def __len__(self):
        return len(self.table)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return Rows(self.table.select(range(len(self))[at]))
        row = self.table[at]
        return row.get("text", row)


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source looks like `OWNER/NAME` and no path begins so."""
    owner, _, name = str(source).partition("/")
    looks_so = all(re.fullmatch(r"\w[\w.-]*", part) for part in (owner, name))
    is_file = Path(name).suffix in (".txt", ".md", *READERS) or os.path.exists(owner)
    return looks_so and not is_file


def read_table(source: str | os.PathLike, text_column=None, encoding=None) -> Corpus:
    """Read a file of rows, or a data set of the hub, into a `Corpus`."""
    from datasets import load_dataset  # slow to import

    path = Path(source)
    kind = READERS.get(path.suffix.lower(), "a file or as a data set of the hub")
    require(is_hub_name(source) or path.exists(), f"{path} does not exist; give the path of a file")
    try:
        with quiet_datasets():
            if is_hub_name(source):
                ask_hub(str(source))
                table = load_dataset(source, split="train")
            else:
                settings = settings_for(path, encoding)
                files = glob.escape(str(path))
                table = load_dataset(kind, data_files=files, split="train", **settings)
            texts = texts_of(table, text_column, source)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of `datasets`, pandas and pyarrow, which raise many kinds
        reason = str(error.__cause__ or error).strip().split("\n")[0] or "it has no rows"
        hint = "; if it is not in UTF-8, name its encoding (--encoding)"
        hint = hint if kind in ("csv", "json") else ""
        raise InputError(f"{source} cannot be read as {kind} ({reason}){hint}") from error
    skipped = len(table) - len(texts)
    few = len(texts) < FEWEST_ROWS and isinstance(texts[0], str)
    return Corpus(path.stem, str(source), tuple(texts) if few else texts, skipped)


def settings_for(path: Path, encoding: str | None) -> dict:
    """What `datasets` needs to know of a file besides its kind."""
    kind = READERS[path.suffix.lower()]
    with path.open("rb") as file:
        encoding = encoding or ("utf-16" if file.read(2) in UTF16_MARKS else None)
    settings: dict = {"encoding": encoding} if encoding and kind != "parquet" else {}
    if kind == "csv":
        settings["sep"] = "\t" if path.suffix.lower() == ".tsv" else ","
        settings["keep_default_na"] = False  # a text may be "None" or "NA"
    return settings


def ask_hub(name: str) -> None:
    """Fail at once if the hub cannot be reached, where `load_dataset` tries for half a minute."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)


def texts_of(table, text_column: str | None, source) -> Rows:
    """The texts or chats of a table, less the rows that have none."""
    chat = next((chat for chat in CHATS if {*chat} <= {*table.column_names}), None)
    if chat and text_column is None:
        column = chat[-1]
        check_chat(table.features, source)
        full = table.select_columns(chat).filter(bool, input_columns=column)
    else:
        column = find_column(table.features, text_column, source)
        full = table.map(
            lambda text: {"text": (text or "").replace("\r\n", "\n").strip()},
            input_columns=column,
            remove_columns=table.column_names,
        ).filter(bool, input_columns="text")
    require(len(full), f"{source} holds no text in the column {column!r}")
    return Rows(full)


def check_chat(features, source) -> None:
    """Refuse messages without roles, and prompts that are no text."""
    if "messages" in features:
        message = getattr(features["messages"], "feature", None)
        whole = isinstance(message, dict) and {"role", "content"} <= {*message}
        require(whole, f"{source} has messages without a role and a content")
    else:
        for name in ("prompt", "completion"):
            find_column(features, name, source)


def find_column(features, wanted: str | None, source) -> str:
    """The column of text to learn from: the one asked for, "text", or the only one."""
    texts = [
        n for n, kind in features.items() if str(getattr(kind, "dtype", "")).endswith("string")
    ]
    wanted = wanted or (texts[0] if len(texts) == 1 else "text")
    require(
        wanted in texts,
        f"{source} has no column {wanted!r} of text; its columns are {', '.join(features)}: "
        "name one with text_column (--text_column)",
    )
    only = len(features) == 1 and re.search("[;\t|]", wanted)
    require(not only, f"{source} has one column, {wanted!r}; put commas between its columns")
    return wanted


@contextlib.contextmanager
def quiet_datasets():
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


# -- splits ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The texts to train on, to choose by, and to test on once."""

    train: Sequence[str | dict]
    validation: Sequence[str | dict]
    test: Sequence[str | dict]


def split(corpus: Corpus) -> Splits:
    """Hold out the end of a text, never shuffled lines.

    *The Wind in the Willows*: chapters I-X train, XI validates, XII tests. Any other text:
    the last tenth tests and the tenth before validates, cut where a paragraph ends, or, in
    one longer than a tenth of the text, a word. A table is cut between rows.
    """
    texts = corpus.texts
    if corpus.title == WILLOWS and len(texts) == 12:
        return Splits(list(texts[:10]), list(texts[10:11]), list(texts[11:]))
    if isinstance(texts, Rows):
        tenth = max(1, len(texts) // 10)
        first, second = max(0, len(texts) - 2 * tenth), len(texts) - tenth
        return Splits(texts[:first], texts[first:second], texts[second:])
    begin, end = (0, 0), (len(texts), 0)
    validation, test = (place_of(texts, share) for share in (0.8, 0.9))
    bounds = [(begin, validation), (validation, test), (test, end)]
    return Splits(*(between(texts, first, last) for first, last in bounds))


def place_of(texts: Sequence, share: float) -> tuple[int, int]:
    """Where a share of the text ends: the number of a text, and of a character in it."""
    total = sum(map(len, texts))
    left = share * total
    number = 0
    while left > len(texts[number]):
        left -= len(texts[number])
        number += 1
    text = texts[number]
    at = int(left)
    start = text.rfind("\n\n", 0, at + 2)
    start = 0 if start < 0 else start + 2
    end = text.find("\n\n", at)
    end = len(text) if end < 0 else end
    if end - start > total / 10:
        spaces = text.rfind(" ", start, at + 1), text.rfind("\n", start, at + 1)
        return number, max(spaces) if max(spaces) > start else at
    return number, start if at - start <= end - at else end


def between(texts: Sequence, first: tuple[int, int], last: tuple[int, int]) -> list[str]:
    """What stands between two places."""
    found = []
    for number in range(first[0], min(last[0] + 1, len(texts))):
        start = first[1] if number == first[0] else 0
        end = last[1] if number == last[0] else None
        found.append(texts[number][start:end].strip())
    return [text for text in found if text]


# -- blocks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """A corpus as tensors of token ids, each of shape (blocks, block_size).

    Attributes:
        train: int64 tensor, to learn from.
        validation: int64 tensor, to choose by.
        test: int64 tensor, to look at once.
        remainder: for each split, the tokens at its end that fill no block.
        masks: for a split of chats, a bool tensor of its shape, True where a token is part
            of an answer: only these are targets. Without an entry, all tokens are.
        first_token: the token that begins every block, of a tokenizer that begins every
            text so; else None.
    """

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    remainder: dict[str, int]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    first_token: int | None = None

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.train.shape[1]


def pack(corpus: Corpus, tokenizer, block_size: int | None = None) -> Blocks:
    """Tokenize a corpus once and cut each split into blocks of `block_size` tokens.

    Texts follow each other in a block, the tokenizer's end-of-text token between them, so
    that a row of a table sees its neighbours. Every token is kept in order, but for the few
    at a split's end that do not fill a block: their number is in `Blocks.remainder`. A chat
    has blocks of its own, filled up with tokens that are no targets; the targets are the
    tokens of its answers. If the tokenizer begins a text with a certain token, as Llama's
    and Gemma's do, every block begins with it.

    Args:
        corpus: what `load_corpus` returns.
        tokenizer: the teacher's.
        block_size: at least 2; by default the model's positions, at most 1,024.

    Raises:
        InputError: a split is too short for one block; or there are chats with `messages`,
            and the tokenizer has no chat template or one that cannot be used.

    Warns:
        UserWarning: once, if empty lines or rows were skipped.
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
    if corpus.skipped:
        warnings.warn(f"skipped {corpus.skipped} empty lines or rows", stacklevel=2)
    first = first_token(tokenizer)
    width = int(block_size) - (first is not None)  # tokens of the text in a block
    tensors, masks, remainder = {}, {}, {}
    for name, texts in vars(split(corpus)).items():
        if texts and isinstance(texts[0], dict):
            tokens, is_answer = tokenize_chats(texts, tokenizer, width)
            masks[name] = in_blocks(is_answer, width, None if first is None else 0)
        else:
            tokens = tokenize(texts, tokenizer)
        if len(tokens) < width:
            raise InputError(
                f"{corpus.provenance} is too short: its {name} part holds {len(tokens)} tokens, "
                f"less than one block of {block_size}; give a longer text or a smaller block size"
            )
        remainder[name] = len(tokens) % width
        tensors[name] = in_blocks(tokens, width, first)
    return Blocks(**tensors, remainder=remainder, masks=masks, first_token=first)


LONGEST_PIECE = 100_000  # characters: a tokenizer's memory grows with the longest


def first_token(tokenizer) -> int | None:
    """The token that a tokenizer puts before each text; None if it puts none."""
    ids, plain = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    return ids[0] if ids[:1] != plain[:1] else None


def in_blocks(tokens: torch.Tensor, width: int, first: int | None) -> torch.Tensor:
    """A row of tokens cut into blocks of so many, each with the first token before it."""
    blocks = tokens[: len(tokens) // width * width].view(-1, width)
    return blocks if first is None else torch.nn.functional.pad(blocks, (1, 0), value=first)


def tokenize(texts: Iterable[str], tokenizer) -> torch.Tensor:
    """The token ids of some texts in a row, an end-of-text token between them, shape (tokens,)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = array("q")  # int64, of a quarter of the memory that a list takes
    for text in texts:
        for piece in cut(text, LONGEST_PIECE):
            tokens.extend(encode(piece, tokenizer))
        tokens.extend(end)
    return torch.from_numpy(np.asarray(tokens)[: len(tokens) - len(end)])


def encode(text: str, tokenizer) -> list[int]:
    """The token ids of a text and nothing before or after them."""
    # verbose=False: a text longer than the model's context is what we are here to cut
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def tokenize_chats(
    rows: Iterable[dict], tokenizer, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids of some chats and which of them are answers, each of shape (tokens,).

    Every chat is filled up to a multiple of `width` tokens, with end-of-text tokens that
    are no answers.
    """
    end, first = tokenizer.eos_token_id or 0, first_token(tokenizer)
    tokens, is_answer = array("q"), array("b")
    for row in rows:
        begin = len(tokens)
        for text, answers in turns_of(row, tokenizer):
            ids = encode(text, tokenizer)
            if len(tokens) == begin and ids[:1] == [first]:  # a template's own
                ids = ids[1:]
            tokens.extend(ids)
            is_answer.extend([answers] * len(ids))
        more = -len(tokens) % width
        tokens.extend([end] * more)
        is_answer.extend([False] * more)
    return torch.from_numpy(np.asarray(tokens)), torch.from_numpy(np.asarray(is_answer)) > 0


def turns_of(row: dict, tokenizer) -> list[tuple[str, bool]]:
    """A chat in pieces, each with whether it is an answer; an answer ends with its end mark."""
    if "messages" not in row:
        return [
            (row["prompt"] or "", False),
            (row["completion"] + (tokenizer.eos_token or ""), True),
        ]
    require(
        tokenizer.chat_template is not None,
        "the tokenizer has no chat template, which rows with messages need; take that of a model "
        "for chats, or give rows with prompt and completion",
    )
    # a table has every key in every row
    messages = [{k: v for k, v in m.items() if v is not None} for m in row["messages"]]
    pieces, seen = [], ""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = form(messages[:number], tokenizer, add_generation_prompt=True)
            answered = form(messages[: number + 1], tokenizer).rstrip()
            require(
                asked.startswith(seen) and answered.startswith(asked),
                "the tokenizer's chat template writes a chat otherwise once it is answered; give "
                "rows with prompt and completion",
            )
            pieces += [(asked[len(seen) :], False), (answered[len(asked) :], True)]
            seen = answered
    require(pieces, "a row of messages has no answer, a message of the role 'assistant'")
    return pieces


def form(messages: list[dict], tokenizer, **settings) -> str:
    """Messages as one text, by the tokenizer's chat template."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except Exception as error:  # what a template raises is its author's choice
        reason = " ".join(str(error).split())
        raise InputError(f"the tokenizer's chat template refuses a row: {reason}") from error


def cut(text: str, longest: int) -> Iterator[str]:
    """A text in pieces of so many characters at most.

    Each piece begins with white space where there is any, as the words of a byte-level
    BPE do, so that its tokens are those of the whole.
    """
    start = 0
    while len(text) - start > longest:
        begin, end = start + 1, start + longest
        at = max(text.rfind(" ", begin, end), text.rfind("\n", begin, end))
        while at > begin and text[at - 1].isspace():
            at -= 1
        end = at if at >= begin else end
        yield text[start:end]
        start = end
    yield text[start:]
