"""A run while it goes on: the running phase redrawn in place in a terminal, one line a phase elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from expunge.terminal.words import duration

if TYPE_CHECKING:
    from expunge.journal import Journal, Meter, Part
    from expunge.schema import Phase

NAME, BAR, COUNT, TIME = 20, 8, 10, 12  # columns: with the loss and the accuracy beside them, 80 hold it


@contextmanager
def shown_journal(quiet: bool) -> Iterator[Journal]:
    """Give a journal that shows its phases on the error stream; a quiet one shows nothing."""
    from expunge.journal import Journal

    console = Console(stderr=True, highlight=False)
    if quiet:
        yield Journal()
    elif redraws(console):
        bars = Bars(console)
        with bars.live:
            yield Journal(bars)
            bars.settle()
    else:
        yield Journal(Lines())


def redraws(console: Console) -> bool:
    """Return whether what is on the screen can be drawn over."""
    return console.is_terminal and not console.is_dumb_terminal


class Lines:
    """One line for each phase that ended: for a file, a pipe, or a terminal that cannot redraw."""

    def begin(self, meter: Meter, name: str, steps: int | None, part: Part | None) -> None:
        """Print nothing yet."""

    def step(self, meter: Meter) -> None:
        """Print nothing yet."""

    def end(self, meter: Meter, phase: Phase | None) -> None:
        """Print what a phase came to."""
        if phase is None:
            return
        told = [f"{phase.steps} steps"] if phase.steps else []
        told += [f"{phase.seconds:.1f} s"]
        told += [words for words in (", ".join(meter.state().split("  ")), phase.signals) if words]
        note = f"; {phase.note}" if phase.note else ""
        typer.echo(f"{phase.name}: {', '.join(told)}{note}", err=True)

    def signals(self, words: str) -> None:
        """Print nothing: those of a phase come with its line, and what came of all of them with the answer."""


@dataclass
class _Row:
    """One phase; or, when they are over, several of one name after each other, or parts of one thing."""

    name: str
    expected: int | None = None  # steps, where known
    part: Part | None = None
    begun: float = field(default_factory=time.monotonic)
    steps: int = 0
    seconds: float = 0.0  # where it is over
    state: str = ""
    note: str = ""


class Bars:
    """The running phase with a bar, its time left and its loss; the signals that were read last; above, what is done.

    What is done is printed once and scrolls away, so that a long run does not outgrow a small terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: dict[int, _Row] = {}
        self._done: _Row | None = None  # not printed yet: the next phase may have the same name
        self._signals = ""
        self._parts_begun = 0.0
        self.live = Live(get_renderable=self._drawn, console=console, refresh_per_second=5)

    def begin(self, meter: Meter, name: str, steps: int | None, part: Part | None) -> None:
        """Show a phase from now on."""
        if part is not None and part.number == 1:
            self._parts_begun = time.monotonic()
        self._running[id(meter)] = _Row(name, steps, part)

    def step(self, meter: Meter) -> None:
        """Keep what a phase has come to; it is drawn with the next refresh."""
        row = self._running[id(meter)]
        row.steps, row.state = meter.steps, meter.state()

    def end(self, meter: Meter, phase: Phase | None) -> None:
        """Take a phase out of what runs; it is printed when one of another name ends."""
        row = self._running.pop(id(meter))
        if phase is None or self._running:  # what went on inside another phase is told with that
            return
        name = row.part.of if row.part is not None else row.name
        if self._done is not None and self._done.name != name:
            self._print_done()
        done = self._done = self._done or _Row(name)
        done.steps, done.seconds = done.steps + phase.steps, done.seconds + phase.seconds
        done.state, done.note = meter.state(), phase.note or done.note

    def signals(self, words: str) -> None:
        """Show signals until others are read."""
        self._signals = words

    def settle(self) -> None:
        """Print what is left to print, and draw nothing any more."""
        self._print_done()
        if self._signals:
            self._console.print(Text(self._signals))
        self._signals = ""

    def _print_done(self) -> None:
        if self._done is not None:
            done, self._done = self._done, None
            self._console.print(_done_row(done))
            if done.note:
                self._console.print(Text(f"  {done.note}"))

    def _drawn(self) -> RenderableType:
        rows: list[RenderableType] = [_done_row(self._done)] if self._done is not None else []
        rows += [self._running_row(row) for row in list(self._running.values())]
        if self._signals:
            rows.append(Text(self._signals, style="cyan", no_wrap=True, overflow="ellipsis"))
        return Group(*rows)

    def _running_row(self, row: _Row) -> Table:
        ran = time.monotonic() - row.begun
        if row.expected:
            left = ran / row.steps * max(0, row.expected - row.steps) if row.steps else None
            bar = Table.grid(padding=0)
            bar.add_column(width=BAR)
            bar.add_column(width=COUNT, justify="right")
            bar.add_row(ProgressBar(row.expected, min(row.steps, row.expected)), f"{row.steps}/{row.expected}")
            return _columns(row.name, bar, f"{duration(left)} left" if left is not None else "", row.state)
        state = self._part(row.part) if row.part is not None else row.state
        return _columns(row.name, "", duration(ran), state)

    def _part(self, part: Part) -> str:
        """Tell how far the whole is, and how long the rest will take if each part takes as long as those before."""
        before, rest = part.number - 1, part.total - part.number + 1
        left = (time.monotonic() - self._parts_begun) / before * rest if before else None
        return f"{part.number} of {part.total}" + (f", about {duration(left)} left" if left is not None else "")


def _done_row(row: _Row) -> Table:
    steps = f"{row.steps} steps" if row.steps else ""
    return _columns(row.name, Text(steps, justify="right"), duration(row.seconds), row.state)


def _columns(name: str, middle: RenderableType, when: str, state: str) -> Table:
    """Return a row: the name, a bar and a count or the steps, a time, and what it has come to."""
    name = name.replace("_", " ")
    wide = len(name) > NAME  # an attack on a model, which counts no steps
    table = Table.grid(padding=0)
    table.add_column(width=NAME + BAR + COUNT if wide else NAME, no_wrap=True, overflow="ellipsis")
    if not wide:
        table.add_column(width=BAR + COUNT)
    table.add_column(width=TIME, justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row(*([name] if wide else [name, middle]), when, f"  {state}")
    return table
