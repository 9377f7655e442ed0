"""Compare the chapters that willows_kd finds in a folder of books with `chapters.csv`.

    python recipes/check_chapters.py BOOKS

The table gives, for each book of `books.csv`, how many chapters it has and the titles of
the first and last, as its contents page and headings have them. A book without headings
has none.
"""

import csv
import sys
import warnings
from pathlib import Path

from willows_kd.corpus import read_book

TABLE = Path(__file__).parent / "chapters.csv"


def found_in(path: Path) -> tuple[str, str, str]:
    """How many chapters a book has, and the titles of the first and last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a book without headings counts as such below
        book = read_book(path)
    # a preface, and a text without headings, bear the name of the file
    titles = [chapter.title for chapter in book.chapters if chapter.title != path.stem]
    return str(len(titles)), *(titles[:1] + titles[-1:] or ["", ""])


def main(folder: str) -> int:
    """Print the books that differ from the table and how many are right."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file)][1:]
    right = 0
    for name, *expected in rows:
        found = list(found_in(Path(folder) / name))
        right += found == expected
        if found != expected:
            print(f"{name}\n  expected {expected}\n  found    {found}")
    print(f"{right} of {len(rows)} books as expected")
    return right < len(rows)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
