"""The one error class for what a user can cause, and so can put right."""


class InputError(ValueError):
    """Something that was given cannot be used.

    The message is one line: what was wrong, and what would be accepted. The
    command line prints it as it stands; a notebook shows it as the last line.
    """
