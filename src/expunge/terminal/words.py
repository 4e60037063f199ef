"""Words that several of the answers share."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text


def duration(seconds: float) -> str:
    """Return a time in at most seven characters: 0.4 s, 27 s, 3.5 min, 1.2 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(value: float | None) -> str:
    """Return a share as percent, a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def plain(text: str) -> str:
    """Return text in which rich sees no markup."""
    from rich.markup import escape

    return escape(text)


def say(console: Console, text: str | Text, *, indent: int = 0) -> None:
    """Print a line: broken between words where a person reads it, all lines indented; whole in a file or a pipe.

    Args:
        text: with rich's markup, where it is a string.
    """
    line = Text.from_markup(text) if isinstance(text, str) else text
    if console.is_terminal:
        console.print(Padding(line, (0, 0, 0, indent), expand=False))
    else:
        console.print(Text(" " * indent) + line, soft_wrap=True)
