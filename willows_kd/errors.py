"""The one error class for what a user can cause, and so can put right."""

import numbers


class InputError(ValueError):
    """Something that was given cannot be used.

    The message is one line: what was wrong, and what would be accepted. The
    command line prints it as it stands; a notebook shows it as the last line.
    """


def require(condition: bool, message: str) -> None:
    """Raise an `InputError` with this message where a condition does not hold."""
    if not condition:
        raise InputError(message)


def is_integer(value, least: int = 1) -> bool:
    """Whether a value is a whole number, and at least so much."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def type_name(value) -> str:
    """What a value is, for a message: `a list`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
