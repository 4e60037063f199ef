"""Numbers as words and as places: rows of a table that are drawn beside their numbers, and charts of lines.

Places are in percent of the axis or of the area, so that a figure fits a phone and a desk without a script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SIDES = {"original": "before", "unlearned": "after", "retrained": "retrained"}
"""The roles, and where the figures of each are under `metrics`."""

Unit = Literal["share", "points", "plain", "count"]
"""A share of images, told in percent; a difference of such; a plain number; a number of things."""


# Words

JOINED = "\N{NO-BREAK SPACE}"


def told(value: float | None, unit: Unit = "share", *, signed: bool = False) -> str:
    """Return a number as a person reads it; a dash where there is none."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    if unit in ("share", "points"):
        return f"{100 * value:{sign}.1f}" + (f"{JOINED}%" if unit == "share" else "")
    if unit == "count":
        return f"{value:{sign},.{0 if value == int(value) else 1}f}"
    return f"{value:{sign}.{2 if abs(value) >= 0.1 or value == 0 else 3}f}"


def bounds(measured: Mapping[str, Any], unit: Unit, *, signed: bool = False) -> str:
    """Return a 95 % interval in brackets; nothing where a bound is not known."""
    low, high = measured.get("low"), measured.get("high")
    if low is None or high is None:
        return ""
    bare: Unit = "points" if unit == "share" else unit
    return f"[{told(low, bare, signed=signed)}, {told(high, bare, signed=signed)}]"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names with commas between; of many the first few, and how many more."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def sentence(text: str) -> str:
    """Return words as a sentence: a capital first, a full stop last, no line break before a percent sign."""
    text = text.strip().replace(" %", f"{JOINED}%")
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}" if text else ""


# Places


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis, and what the numbers on it are."""

    low: float = 0.0
    high: float = 1.0
    unit: Unit = "share"
    ticks: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1)

    def place(self, value: float) -> float:
        """Return where a value lies, in percent of the axis; what is beyond it lies at its end."""
        return round(min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low))), 2)

    def height(self, value: float) -> float:
        """Return where a value lies from the top."""
        return round(100 - self.place(value), 2)

    def marks(self, place: Callable[[float], float] | None = None) -> list[tuple[float, str]]:
        """Return the place and the words of each tick."""
        words = [f"{100 * tick:g} %" if self.unit == "share" else f"{tick:g}" for tick in self.ticks]
        return [((place or self.place)(tick), text) for tick, text in zip(self.ticks, words, strict=True)]


SHARE = Scale()
DECIMAL = Scale(unit="plain")
CORRELATION = Scale(low=-1, unit="plain", ticks=(-1, -0.5, 0, 0.5, 1))


def fitting(values: Sequence[float]) -> Scale:
    """Return shares where all values are in [0, 1], else a scale of plain numbers that holds them."""
    low, high = min([0.0, *values]), max([1.0, *values])
    if (low, high) == (0.0, 1.0):
        return SHARE
    return Scale(low=low, high=high, unit="plain", ticks=(low, (low + high) / 2, high))


def round_up(value: float) -> float:
    """Return the next of 1, 2, 4 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 4) if step * power >= value * 0.9999), 10 * power)


# Tables of figures


@dataclass(frozen=True)
class Mark:
    """One model's figure in a row: what is written, and where it is drawn."""

    text: str
    between: str = ""  # the bounds of its 95 % interval
    at: float | None = None  # percent of the axis
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure on each model."""

    name: str
    marks: Mapping[str, Mark]  # by role
    gap: str = ""
    gap_between: str = ""
    found: bool = False  # the gap's interval excludes zero
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Board:
    """A table of figures, drawn beside the numbers."""

    caption: str
    roles: tuple[str, ...]
    rows: list[Row]
    more: list[Row] = field(default_factory=list)  # not drawn
    ticks: list[tuple[float, str]] = field(default_factory=list)  # none: numbers alone
    stems: bool = False  # draw a line from zero
    first: str = "figure"
    gap_title: str = ""
    titled: bool = True  # the caption is shown; False: a heading says the same


def row(
    name: str,
    measured: Mapping[str, Mapping[str, Any] | None],
    scale: Scale = SHARE,
    *,
    gap: Mapping[str, Any] | None = None,
    note: str = "",
    beyond: Sequence[str] = (),
) -> Row:
    """Return a row of figures: by role `value`, `low`, `high`, any of them null.

    Args:
        beyond: roles whose true value is more than what is told.
    """
    marks = {
        role: _mark(one, scale, more=role in beyond)
        for role, one in measured.items()
        if one and one.get("value") is not None
    }
    unit: Unit = "points" if scale.unit == "share" else scale.unit
    if not gap or gap.get("value") is None:
        return Row(name=name, marks=marks, note=note)
    return Row(
        name=name,
        marks=marks,
        note=note,
        gap=told(gap["value"], unit, signed=True),
        gap_between=bounds(gap, unit, signed=True),
        found=bool(gap.get("found")),
    )


def _mark(measured: Mapping[str, Any], scale: Scale, *, more: bool) -> Mark:
    places = (measured.get(key) for key in ("value", "low", "high"))
    return Mark(
        ("> " if more else "") + told(measured["value"], scale.unit),
        bounds(measured, scale.unit),
        *(None if value is None else scale.place(value) for value in places),
    )


def board(
    caption: str,
    rows: Sequence[Row],
    scale: Scale | None,
    *,
    shown: int | None = None,
    stems: bool = False,
    first: str = "figure",
    gap_title: str = "",
    titled: bool = True,
) -> Board | None:
    """Return the table of those rows that have a figure, None where none has.

    Args:
        scale: of the marks; None: numbers alone.
        shown: rows that are drawn; the others are in a table that opens.
    """
    rows = [one for one in rows if one.marks]
    if not rows:
        return None
    roles = dict.fromkeys(role for one in rows for role in one.marks)
    return Board(
        caption=caption,
        roles=(*(role for role in SIDES if role in roles), *(role for role in roles if role not in SIDES)),
        rows=rows[:shown],
        more=rows[shown:] if shown is not None else [],
        ticks=scale.marks() if scale else [],
        stems=stems,
        first=first,
        gap_title=gap_title if any(one.gap for one in rows) else "",
        titled=titled,
    )


# Charts

MOST_MARKS = 12


@dataclass(frozen=True)
class Line:
    """One series of a chart, its points in percent of the area, from the left and from the top."""

    name: str
    kind: str  # a role, `other`, or tone-1 to tone-4: how it is drawn
    points: list[tuple[float, float]]
    stems: bool = False  # lines from the bottom in place of one through the points

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in self.points)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines, and all their numbers as a table."""

    caption: str
    says: str  # what it shows, for who cannot see it
    x_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    legend: list[tuple[str, str]]  # kind and name
    head: list[str]  # of the table: the step, then what is told of it
    rows: list[tuple[float | None, list[str]]]  # where on the axis, and the cells
    guides: list[tuple[float, str]] = field(default_factory=list)  # lines to reach: place and words
    guide_title: str = ""  # what they are
    bands: list[tuple[float, float]] = field(default_factory=list)  # from, to

    def marked(self, line: Line) -> list[tuple[float, float]]:
        """Return the points that get a mark: where lines are long, the last alone."""
        sparse = max(len(one.points) for one in self.lines) <= MOST_MARKS
        return line.points if line.stems or sparse else line.points[-1:]


def kind(role: str) -> str:
    """Return how a role is drawn: `retrained 2` and further ones as another retrained model."""
    return role if role in SIDES else "other"
