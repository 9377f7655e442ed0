"""Rows of a file or of a data set of the hub, each a text or a chat, read by `datasets`."""

import contextlib
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from willows_kd.errors import InputError, one_line, require
from willows_kd.sources.chats import tokenize_chats
from willows_kd.texts import UTF16_MARKS, Corpus

READERS = {
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet"},
    **{".json": "json", ".jsonl": "json", ".ndjson": "json"},
}
CHATS = (["messages"], ["prompt", "completion"])  # columns that make a row a chat


@dataclass(frozen=True)
class Rows(Sequence):
    """Rows of a `datasets.Dataset`, read from the disk one by one; a slice of them is Rows."""

    table: Any

    def __len__(self):
        return len(self.table)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return Rows(self.table.select(range(len(self))[at]))
        row = self.table[at]
        return row.get("text", row)


def is_table(source: str | os.PathLike) -> bool:
    """Whether a source is a file of rows, or looks like `OWNER/NAME` and is no path."""
    named_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.txt)(?<!\.md)", str(source))
    on_hub = bool(named_so) and not Path(source).exists()
    return on_hub or Path(source).suffix.lower() in READERS


def read_table(
    source: str | os.PathLike, text_column: str | None = None, encoding: str | None = None
) -> Corpus:
    """Read a file of rows, or a data set of the hub, into a `Corpus`."""
    path = Path(source)
    kind = READERS.get(path.suffix.lower())
    try:
        with quiet_datasets():
            table = load_file(path, kind, encoding) if kind else load_from_hub(str(source))
            texts = texts_of(table, text_column, source)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of `datasets`, pandas and pyarrow, which raise many kinds
        cause = error.__cause__ or error
        hint = "; name its encoding (--encoding)" if isinstance(cause, UnicodeError) else ""
        kind = kind or "a file or as a data set of the hub"
        raise InputError(f"{source} cannot be read as {kind} ({one_line(cause)}){hint}") from error
    chats = tokenize_chats if isinstance(texts[0], dict) else None
    skipped = len(table) - len(texts)
    return Corpus(path.stem, str(source), texts, skipped, in_rows=True, tokenize=chats)


def load_file(path: Path, kind: str, encoding: str | None):
    """The rows of a file, which is in UTF-8 unless it is marked or named otherwise."""
    import datasets  # slow to import

    with path.open("rb") as file:
        encoding = encoding or ("utf-16" if file.read(2) in UTF16_MARKS else None)
    settings: dict = {"encoding": encoding} if encoding and kind != "parquet" else {}
    if kind == "csv":  # in which a text may be "None" or "NA"
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        settings |= {"sep": separator, "keep_default_na": False}
    files = glob.escape(str(path))
    return datasets.load_dataset(kind, data_files=files, split="train", **settings)


def load_from_hub(name: str):
    """The rows of a data set; fails at once where `load_dataset` tries for half a minute."""
    import datasets
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    return datasets.load_dataset(name, split="train")


def texts_of(table, text_column: str | None, source) -> Rows:
    """The texts or chats of a table, less the rows that have none."""
    chat = next((chat for chat in CHATS if {*chat} <= {*table.column_names}), None)
    if chat and text_column is None:
        column = chat[-1]
        if column == "completion":
            find_column(table.features, column, source)
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

    hidden, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()
