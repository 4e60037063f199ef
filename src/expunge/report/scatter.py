"""Charts of points: cells of a benchmark by two of their figures, with the models that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.report.figures import SHARE, told

Row = Mapping[str, Any]

MARKS = {"zero-glance": "zero", "reads forget data": "reads", "control": "control"}
"""How each kind of method is drawn: a colour and a shape."""

NEAR = (0.15, 0.10)
"""How far from the retrained model the close view reaches: more accuracy on forgotten classes, less on the others."""

LEAST_LIKE = 0.75
"""Cells less like the retrained model than this are left out of the chart of cost, where some lie above: most do, close
together."""


@dataclass(frozen=True)
class Point:
    """One cell, in percent of the area, from the left and from the top."""

    x: float
    y: float
    number: int  # of the cell in the table


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points by kind of method, and targets by role."""

    caption: str
    says: str  # what it shows, for who cannot see it
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: dict[str, list[Point]]  # by mark
    targets: list[tuple[str, float, float]]  # role and place
    outside: int  # cells that lie beyond the axes


@dataclass(frozen=True, kw_only=True)
class _Axis:
    name: str  # column of the table
    title: str
    low: float
    high: float
    ticks: list[tuple[float, str]]  # values and words
    log: bool = False

    def place(self, value: float) -> float | None:
        """Return where a value lies, in percent; None beyond the ends."""
        if not self.low - SLACK <= value <= self.high + SLACK:
            return None
        low, high, at = (math.log(part) if self.log else part for part in (self.low, self.high, value))
        return round(100 * (at - low) / (high - low), 2)


SLACK = 1e-9


def scatters(rows: Sequence[tuple[int, Row]], roles: Mapping[str, Any]) -> list[Scatter]:
    """Return the charts of one group: all of it, near the retrained model, and cost against quality.

    Args:
        rows: of the table, with their numbers, those of cells that are done.
        roles: figures of the original and of the retrained model, either of them null.
    """
    targets = {role: one for role, one in roles.items() if one}
    found = [_forget_against_retain(rows, targets)]
    retrained = targets.get("retrained") or {}
    if {"forget_accuracy", "retain_accuracy"} <= set(retrained):
        found.append(_near(rows, targets))
    return [one for one in (*found, _cost(rows, retrained)) if one]


def _forget_against_retain(rows: Sequence[tuple[int, Row]], targets: Mapping[str, Any]) -> Scatter | None:
    low, high, ticks = -0.03, 1.03, [(tick, f"{100 * tick:g} %") for tick in SHARE.ticks]
    return _scatter(
        "Forgotten classes against the others",
        _Axis(name="forget_accuracy", title=FORGOTTEN, low=low, high=high, ticks=ticks),
        _Axis(name="retain_accuracy", title=OTHERS, low=low, high=high, ticks=ticks),
        rows,
        targets,
    )


FORGOTTEN = "accuracy on the forgotten classes"
OTHERS = "accuracy on the others"


def _near(rows: Sequence[tuple[int, Row]], targets: Mapping[str, Any]) -> Scatter | None:
    x, y = (targets["retrained"][name] for name in ("forget_accuracy", "retain_accuracy"))
    right, below = NEAR
    bottom, top = max(0.0, y - below), min(1.0, y + 0.03)
    return _scatter(
        "Near the retrained model, the target",
        _Axis(name="forget_accuracy", title=FORGOTTEN, low=x - 0.01, high=x + right, ticks=_shares(x, x + right, 0.05)),
        _Axis(name="retain_accuracy", title=OTHERS, low=bottom, high=top + 0.003, ticks=_shares(bottom, top, 0.02)),
        rows,
        targets,
    )


def _cost(rows: Sequence[tuple[int, Row]], retrained: Mapping[str, Any]) -> Scatter | None:
    """Return likeness to the retrained model over seconds; without such a model, accuracy on the other classes."""
    against = "tug_of_war" if retrained else "retain_accuracy"
    title = "likeness to retraining (tug of war)" if retrained else OTHERS
    spent = [row["seconds"] for _, row in rows if row["seconds"] and row[against] is not None]
    if not spent:
        return None
    target = retrained.get("seconds")
    low, high = min([*spent, target or spent[0]]) / 1.3, max([*spent, target or spent[0]]) * 1.3
    best = max(row[against] for _, row in rows if row["seconds"] and row[against] is not None)
    least = LEAST_LIKE if best > LEAST_LIKE else 0.0
    step = 0.05 if least else 0.2
    ticks = [(tick, f"{tick:g}") for tick in (round(step * number, 2) for number in range(21)) if least <= tick <= 1]
    return _scatter(
        "Cost against quality",
        _Axis(name="seconds", title="seconds", low=low, high=high, ticks=_decades(low, high), log=True),
        _Axis(
            name=against,
            title=title,
            low=least,
            high=1.01,
            ticks=ticks if retrained else _shares(least, 1.0, step),
        ),
        rows,
        {"retrained": {"seconds": target, "tug_of_war": 1.0}} if target else {},
    )


def _scatter(
    caption: str, x: _Axis, y: _Axis, rows: Sequence[tuple[int, Row]], targets: Mapping[str, Any]
) -> Scatter | None:
    points: dict[str, list[Point]] = {}
    outside = 0
    for number, row in rows:
        if row[x.name] is None or row[y.name] is None:
            continue
        right, up = x.place(row[x.name]), y.place(row[y.name])
        if right is None or up is None:
            outside += 1
        else:
            points.setdefault(MARKS.get(row["kind"], "control"), []).append(Point(right, round(100 - up, 2), number))
    if not points:
        return None
    placed = []
    for role, one in targets.items():
        values = one.get(x.name), one.get(y.name)
        if None not in values:
            right, up = x.place(values[0]), y.place(values[1])
            if right is not None and up is not None:
                placed.append((role, right, round(100 - up, 2)))
    drawn = sum(map(len, points.values()))
    return Scatter(
        caption=caption,
        says=f"{drawn} cells by {x.title} and {y.title}; their numbers are in the table of cells.",
        x_title=x.title,
        y_title=y.title,
        x_ticks=_marks(x, lambda at: at),
        y_ticks=_marks(y, lambda at: round(100 - at, 2)),
        points={mark: points[mark] for mark in MARKS.values() if mark in points},
        targets=placed,
        outside=outside,
    )


def _marks(axis: _Axis, turned: Callable[[float], float]) -> list[tuple[float, str]]:
    return [(turned(at), words) for value, words in axis.ticks if (at := axis.place(value)) is not None]


def _shares(low: float, high: float, step: float) -> list[tuple[float, str]]:
    """Return round shares between two, a tick each step."""
    first = math.ceil(low / step - SLACK)
    return [
        (number * step, f"{100 * number * step:g} %") for number in range(first, math.floor(high / step + SLACK) + 1)
    ]


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    """Return powers of ten between two, and where that is few, 2 and 5 times them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = [step * 10.0**power for power in powers for step in steps]
    return [(value, told(value, "count") if value >= 1 else f"{value:g}") for value in values]
