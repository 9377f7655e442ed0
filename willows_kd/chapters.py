"""Which lines of a book are its chapter headings."""

import re
from itertools import pairwise
from statistics import median
from typing import NamedTuple

EMPHASIS = re.compile(r"(?<!\w)_([^_]+)_(?!\w)")
HEADING = re.compile(
    r"(?:(?P<word>chapter|adventure)\s+)?(?P<number>(?a:[ivxlc]+|\d{1,3}))"
    r"(?P<stop>\s*[.:—–-]+)?(?:(?(stop)\s*|\s+)(?P<title>\S.*))?",
    re.IGNORECASE,
)
SPELT_HEADING = re.compile(
    r"(?P<word>chapter)\s+(?P<number>[a-z-]+)(?:[.:—–-]+\s*(?P<title>\S.*))?"
    r"|the\s+(?P<ordinal>[a-z-]+)\s+chapter",
    re.IGNORECASE,
)
WORDS = ("chapter", "adventure")
LONGEST_HEADING = 100  # characters
SENTENCE_END = re.compile(r"[.,;:!?—-][\"'”’)]*$")
CONTENTS = ("contents", "tableofcontents")  # as `letters` has them


class Heading(NamedTuple):
    """What may be a chapter heading: the piece it is, how it counts, and what it says."""

    at: int  # the index of its piece
    style: str  # "chapter", "adventure", "contents", "digits" or "roman"
    number: int | None  # None if it is spelt out and not the first
    title: str
    is_bare: bool = False  # a number without a title


def find_headings(pieces: list[str]) -> list[Heading]:
    """The chapter headings of a book: those of the style that counts furthest.

    Many a text has several series that look like headings: chapters, the stanzas of a
    song, page numbers. Those that say "Chapter" are believed before mere numbers.
    """
    numbered = [h for at, piece in enumerate(pieces) if (h := read_heading(at, piece))]
    series = [count(numbered, style) for style in dict.fromkeys(h.style for h in numbered)]
    series.append(count(listed_headings(pieces), "contents"))
    series = [without_contents(headings, pieces) for headings in series if len(headings) > 1]
    return max(series, key=worth, default=[])


def worth(headings: list[Heading]) -> tuple[bool, int]:
    """How far a series is to be believed: whether it says "Chapter", and how much it divides."""
    return headings[0].style in WORDS, sum(b.at > a.at + 1 for a, b in pairwise(headings))


def read_heading(at: int, piece: str) -> Heading | None:
    """The heading that a piece may be, or None if it is plain text.

    A heading stands alone in its piece. It says "Chapter", is a bare number, or is a
    number with a title: that is what tells `I. THE RIVER BANK` from a speech that
    begins with the word "I".
    """
    piece = piece.strip()
    if len(piece) > LONGEST_HEADING:
        return None
    line, *below = (part.strip() for part in EMPHASIS.sub(r"\1", piece).split("\n"))
    match = HEADING.fullmatch(line) or SPELT_HEADING.fullmatch(line)
    if below and match and not match["title"]:  # a number with its title on the next line
        line = f"{line.rstrip('.')}. {' '.join(below)}"
        match = HEADING.fullmatch(line) or SPELT_HEADING.fullmatch(line)
    elif below:
        return None
    if not match:
        return None
    title = match["title"]
    if match.re is SPELT_HEADING:
        number = 1 if (match["number"] or match["ordinal"]).lower() in ("one", "first") else None
        return Heading(at, "chapter", number, title or line, not title)
    numeral, word, stop = match["number"], match["word"], match["stop"]
    if not (word or numeral.isdigit() or numeral.isupper()):
        return None
    if title and not (word or (is_title(title) and (stop or numeral != "I"))):
        return None
    number = int(numeral) if numeral.isdigit() else roman(numeral)
    style = word.lower() if word else "digits" if numeral.isdigit() else "roman"
    return Heading(at, style, number, title or line, not title)


def listed_headings(pieces: list[str]) -> list[Heading]:
    """The pieces that repeat a line of the contents page, numbered by their place in it.

    Lines that are indented below others (the songs of a story) do not count.
    """
    plain = [letters(piece) if len(piece) <= LONGEST_HEADING else "" for piece in pieces]
    lines = [(at, line) for at, piece in enumerate(pieces) for line in piece.split("\n")]
    lines = [(at, line) for at, line in lines if line.strip()]
    begin = next((i for i, (_, line) in enumerate(lines, 1) if letters(line) in CONTENTS), None)
    page, first = lines[begin] if begin and begin < len(lines) else (0, "")
    # the page ends where its first line comes again, as the first heading
    end = next((at for at in range(page + 1, len(pieces)) if plain[at] == letters(first)), 0)
    below = set(plain[end:]) - {""}
    entries = [line for at, line in lines[begin:] if at < end and letters(line) in below]
    depths = [len(line) - len(line.lstrip()) for line in entries]
    top = [line for line, d in zip(entries, depths, strict=True) if d <= min(depths) + 1]
    places = {letters(line): place for place, line in reversed(list(enumerate(top, start=1)))}
    return [
        Heading(at, "contents", places[plain[at]], " ".join(pieces[at].split()))
        for at in range(end, len(pieces))
        if plain[at] in places
    ]


def count(candidates: list[Heading], style: str) -> list[Heading]:
    """The headings of one style that count on, each from the one before.

    A number may be missing or printed twice, and every part of a book may begin again
    at 1. Those that say "Chapter" are all taken, whatever they count. A title in another
    style is taken if it carries on the count.
    """
    kept: list[Heading] = []
    last = 0
    for i, heading in enumerate(candidates):
        number = heading.number or last + 1
        soon = candidates[i + 1 : i + 50] if number == 1 else []
        follows = (h.number for h in soon if h.style == style and h.number in (2, last + 1))
        begins_again = next(follows, None) == 2
        misprinted = number == last > 1 and letters(heading.title) != letters(kept[-1].title)
        if heading.style != style:
            counts_on = kept and number == last + 1 and not heading.is_bare
        elif style in WORDS:
            counts_on = True
        else:
            counts_on = last < number <= last + 3 or begins_again or misprinted
        if counts_on:
            kept.append(heading)
            last = number
    return kept


def without_contents(headings: list[Heading], pieces: list[str]) -> list[Heading]:
    """The headings less those of a contents page, which have hardly any text below them."""
    ends = [heading.at for heading in headings[1:]] + [len(pieces)]
    runs: list[list[tuple[Heading, int]]] = []
    for heading, end in zip(headings, ends, strict=True):
        if heading.number == 1 or not runs:
            runs.append([])
        runs[-1].append((heading, sum(map(len, pieces[heading.at + 1 : end]))))
    typical = [median(length for _, length in run) for run in runs]
    least = max(typical, default=0) / 10
    kept = [run for run, size in zip(runs, typical, strict=True) if size >= least]
    return [heading for run in kept for heading, _ in run]


def titles_below(sections: list[tuple[Heading, list[str]]]) -> list[tuple[str, list[str]]]:
    """Titles and texts; the title is the first paragraph if most bare numbers have one there."""
    bare = [texts for heading, texts in sections if heading.is_bare]
    titled = sum(bool(texts) and is_title(texts[0]) for texts in bare)
    chapters = []
    for heading, texts in sections:
        below = heading.is_bare and titled * 4 >= len(bare) * 3 and texts
        if below and len(texts[0]) <= LONGEST_HEADING:
            chapters.append((texts[0], texts[1:]))
        else:
            chapters.append((heading.title, texts))
    return chapters


def is_title(text: str) -> bool:
    """Whether a line is in capitals, or most of its words begin with one and it just ends."""
    words = [word.strip("\"'“‘(") for word in text.split()]
    capitals = sum(word[:1].isupper() for word in words)
    short = len(text) <= LONGEST_HEADING and "\n" not in text
    return short and (
        text.isupper() or (capitals * 2 >= len(words) and not SENTENCE_END.search(text))
    )


def letters(text: str) -> str:
    """A line by which to compare it: without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", text).casefold()


def roman(numeral: str) -> int:
    """The value of a Roman numeral."""
    values = [{"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}[c] for c in numeral.lower()]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))
