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
from willows_kd.texts import UTF16_MARKS, Corpus

READERS = {
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet"},
    **{".json": "json", ".jsonl": "json", ".ndjson": "json"},
}
CHATS = (["messages"], ["prompt", "completion"])  # columns that make a row a chat
FEWEST_ROWS = 10  # of fewer, no tenth can be held out: they are cut like any text


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


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source looks like `OWNER/NAME` and no path begins so."""
    owner, _, name = str(source).partition("/")
    looks_so = all(re.fullmatch(r"\w[\w.-]*", part) for part in (owner, name))
    is_file = Path(name).suffix in (".txt", ".md", *READERS) or os.path.exists(owner)
    return looks_so and not is_file


def read_table(
    source: str | os.PathLike, text_column: str | None = None, encoding: str | None = None
) -> Corpus:
    """Read a file of rows, or a data set of the hub, into a `Corpus`."""
    from datasets import load_dataset  # slow to import

    path, on_hub = Path(source), is_hub_name(source)
    require(on_hub or path.exists(), f"{path} does not exist; give the path of a file")
    kind = "a file or as a data set of the hub" if on_hub else READERS[path.suffix.lower()]
    try:
        with quiet_datasets():
            if on_hub:
                ask_hub(str(source))
                table = load_dataset(str(source), split="train")
            else:
                files, settings = glob.escape(str(path)), settings_for(path, encoding)
                table = load_dataset(kind, data_files=files, split="train", **settings)
            texts = texts_of(table, text_column, source)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of `datasets`, pandas and pyarrow, which raise many kinds
        reason = one_line(error.__cause__ or error)
        hint = "; if it is not in UTF-8, name its encoding (--encoding)"
        hint = hint if kind in ("csv", "json") else ""
        raise InputError(f"{source} cannot be read as {kind} ({reason}){hint}") from error
    few = len(texts) < FEWEST_ROWS and isinstance(texts[0], str)
    return Corpus(path.stem, str(source), tuple(texts) if few else texts, len(table) - len(texts))


def settings_for(path: Path, encoding: str | None) -> dict:
    """What `datasets` needs to know of a file besides its kind."""
    kind = READERS[path.suffix.lower()]
    with path.open("rb") as file:
        encoding = encoding or ("utf-16" if file.read(2) in UTF16_MARKS else None)
    settings: dict = {"encoding": encoding} if encoding and kind != "parquet" else {}
    if kind == "csv":  # in which a text may be "None" or "NA"
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        settings |= {"sep": separator, "keep_default_na": False}
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
        if column == "messages":
            message = getattr(table.features[column], "feature", None)
            whole = isinstance(message, dict) and {"role", "content"} <= {*message}
            require(whole, f"{source} has messages without a role and a content")
        else:
            for name in chat:
                find_column(table.features, name, source)
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
