"""Errors that a user can cause and put right, and the words and checks that they share."""

import numbers


class InputError(ValueError):
    """Something that was given cannot be used.

    The message is one line: what is wrong, and what would be accepted. The command line
    prints it as it stands, and so does a notebook.
    """

    def _render_traceback_(self):
        """What IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class WriteError(InputError):
    """A file or directory cannot be written: the disk is full, or access is denied."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C ended a training run after a whole step.

    Attributes:
        history: the rows of the steps that were done; the student is as of the last one.
    """

    def __init__(self, history: list[dict], steps: int):
        """Keep the rows of a run that was to take so many steps."""
        super().__init__(f"stopped after step {len(history)} of {steps}")
        self.history = history


def require(condition: object, message: str) -> None:
    """Raise an `InputError` with this message unless a condition holds."""
    if not condition:
        raise InputError(message)


def is_integer(value, least: int = 1) -> bool:
    """Whether a value is a whole number, NumPy's included, and at least so much."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_whole and value >= least


def type_name(value) -> str:
    """The type of a value, for a message: `a list`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
