"""Checks for the exercises of the notebooks: each says what is wrong, or that all is well."""

import textwrap


def not_yet(problem: str) -> bool:
    """Say what is wrong; False."""
    return say(f"not yet: {problem}", False)


def well_done(what: str) -> bool:
    """Say that all is right; True."""
    return say(f"well done: {what}", True)


def say(sentence: str, outcome: bool) -> bool:
    """Print a sentence in lines that a notebook does not break, and hand on the outcome."""
    end = "" if sentence.endswith((".", "?")) else "."
    print(textwrap.fill(sentence + end, 78))
    return outcome
