"""A benchmark while it runs: a table redrawn in place in a terminal, one line for each finished item elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from expunge.terminal.answers import show_files
from expunge.terminal.progress import redraws
from expunge.terminal.words import duration, percent

if TYPE_CHECKING:
    from expunge.bench.command import Outcome, Plan
    from expunge.bench.standing import Line, Row, Running, Standing


def show_plan(found: Plan) -> None:
    """Print the cells a benchmark would do, one a line, and how much that is."""
    for cell in found.cells:
        typer.echo(cell.id)
    stale = f", {found.stale} to do again: their presets have other values now" if found.stale else ""
    typer.echo(
        f"{len(found.cells)} cells ({found.done} done, {found.failed} failed{stale}), {found.models} models and "
        f"{found.tunings} searches for settings in all"
    )


def show_bench(outcome: Outcome, out: Path) -> None:
    """Print what a benchmark came to."""
    result = outcome.result
    lost = f", {len(result.missing)} not done (a process died: run it again)" if result.missing else ""
    typer.echo(f"{result.cells} cells: {len(result.failed)} failed{lost}")
    for name in result.failed:
        typer.echo(f"failed: {name} (--retry-failed does it again)")
    show_files(Console(highlight=False), outcome.files, out)


@contextmanager
def shown(standing: Standing) -> Iterator[Callable[[Line], None]]:
    """Show where a benchmark stands, on the error stream; give what is told of each finished item."""
    console = Console(stderr=True, highlight=False)
    if not redraws(console):
        yield lambda line: typer.echo(_line(line), err=True)
        return
    board = Board(standing, console)
    with board.live:
        yield board.tell
        board.close()


def _line(line: Line) -> str:
    wait = f"; about {duration(line.seconds_left)} left" if line.seconds_left is not None else ""
    return f"[{line.number}/{line.total}] {line.item.id}: {_came(line)}; {_seconds(line)}{wait}"


def _seconds(line: Line) -> str:
    return f"{line.record['item']['seconds']:.1f} s"


def _came(line: Line) -> str:
    """Tell what came of a finished item."""
    record, about = line.record, line.record["item"]
    if about["status"] == "failed":
        return f"FAILED: {about['error']['type']}: {about['error']['message']}"
    if about["kind"] == "cell":
        after = record["metrics"]["after"]
        return f"A_f {percent(after['forget_accuracy'])}, A_r {percent(after['retain_accuracy'])}"
    if about["kind"] == "tuning":
        return f"{' '.join(record['settings']) or 'as by default'} ({len(record['trials'])} trials)"
    training = record["training"]
    own = " as its weights state" if (about["asked"] or {}).get("weights") else ""
    return f"test accuracy {percent(training['test_accuracy'])}{own}" if training else "as given"


class Board:
    """A row for each method, with how far it is, what came of its last cell, and what is worked on now."""

    def __init__(self, standing: Standing, console: Console) -> None:
        self._standing, self._console = standing, console
        self._last: Line | None = None
        self._closed = False
        self.live = Live(get_renderable=self._drawn, console=console, refresh_per_second=2)

    def tell(self, line: Line) -> None:
        """Keep what finished last; what failed is printed, to stay."""
        self._last = line
        if line.record["item"]["status"] == "failed":
            self._console.print(Text(f"{line.item.id}: {_came(line)}", style="red"))

    def close(self) -> None:
        """Draw all rows, once more and to stay."""
        self._closed = True

    def _drawn(self) -> RenderableType:
        rows = self._standing.rows()
        chosen = rows if self._closed else _most_telling(rows, self._console.height - 7)
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0), expand=True)
        table.add_column("", no_wrap=True)
        for head in ("done", "failed", "A_f", "A_r"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("" if self._closed else "running now", ratio=1, no_wrap=True, overflow="ellipsis")
        for row in chosen:
            table.add_row(*_cells(row), style="dim" if row.finished == row.total and not row.failed else None)
        more = f"{len(rows) - len(chosen)} rows more. " if len(rows) > len(chosen) else ""
        legend = Text(f"{more}A_f, A_r: accuracy of the last cell on forgotten, retained classes", style="dim")
        return Group(table, legend, *self._foot(rows))

    def _foot(self, rows: Sequence[Row]) -> Iterator[RenderableType]:
        if self._last is not None and not self._closed:
            told = f"last: {self._last.about}: {_came(self._last)}; {_seconds(self._last)}"
            yield Text(told, no_wrap=True, overflow="ellipsis")
        total, done = sum(row.total for row in rows), sum(row.finished for row in rows)
        failed, running = sum(row.failed for row in rows), sum(len(row.running) for row in rows)
        left = self._standing.seconds_left()
        wait = f", about {duration(left)} left" if left is not None else ", time left not known yet"
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total, done, width=16),
            f"{done} of {total} finished, {failed} failed" + (f", {running} running{wait}" if done < total else ""),
        )
        yield bar


def _most_telling(rows: Sequence[Row], height: int) -> list[Row]:
    """Return the rows that fit, in their order: what runs first, then what failed, is half done, is done, waits."""

    def rank(number: int) -> int:
        row = rows[number]
        states = (bool(row.running), row.failed > 0, 0 < row.finished < row.total, row.finished > 0)
        return states.index(True) if True in states else len(states)

    kept: list[int] = []
    for number in sorted(range(len(rows)), key=rank):
        height -= max(1, min(SHOWN, len(rows[number].running)))
        if height >= 0 or not kept:
            kept.append(number)
    return [rows[number] for number in sorted(kept)]


SHOWN = 4  # running items of one row, each on a line


def _cells(row: Row) -> list[str | Text]:
    after = row.last["metrics"]["after"] if row.last is not None else {}
    return [
        Text(row.name.replace("_", " ")),
        f"{row.finished}/{row.total}",
        Text(str(row.failed), style="red") if row.failed else "",
        percent(after["forget_accuracy"]) if after else "",
        percent(after["retain_accuracy"]) if after else "",
        Text("\n".join(_now(row.running))),
    ]


def _now(running: Sequence[Running]) -> list[str]:
    usual = [f", usually {duration(one.usual)}" if one.usual else "" for one in running]
    lines = [f"{one.about}: {duration(one.seconds)}{told}" for one, told in zip(running, usual, strict=True)]
    return lines if len(lines) <= SHOWN else [*lines[: SHOWN - 1], f"and {len(lines) - SHOWN + 1} more"]
