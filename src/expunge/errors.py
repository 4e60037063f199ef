"""What is raised for a caller's mistake: one line that says what was expected, what came, and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Something the caller gave cannot be used."""


class DivergedError(InputError):
    """A loss became NaN or infinite; nothing was kept."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, for ours to quote."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
