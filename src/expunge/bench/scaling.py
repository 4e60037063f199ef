"""How cost grows: exponents of power laws, fitted by least squares on logarithms, with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from expunge.bench.tables import Row
from expunge.errors import InputError
from expunge.metrics import Interval

FACTORS = ("num_forget_classes", "retain_per_class", "parameters")
"""What is varied, one at a time: columns of the tidy table."""

COSTS = ("seconds", "cpu_seconds", "steps", "samples", "flops", "peak_memory_bytes")
"""What is watched: columns of the tidy table, and `samples`, the sum of those of each kind."""


@dataclass(frozen=True)
class Growth:
    """How one cost of one method grows with one factor: cost ~ factor ** exponent."""

    method: str  # with its preset, where that is not the default
    cost: str
    factor: str
    exponent: Interval  # 95 %; unbounded where two points were all
    x: tuple[float, ...]
    y: tuple[float, ...]


def fit_exponent(x: Sequence[float], y: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return the slope of log y over log x with Student's interval (n - 2 degrees of freedom).

    Raises:
        InputError: there are fewer than two different x, or a value is not positive.
    """
    if len(x) != len(y) or len(set(x)) < 2:
        raise InputError(f"expected as many y as x and two different x at least, got {list(x)} and {list(y)}")
    if min(*x, *y) <= 0:
        raise InputError("expected positive values: a power law has no others")
    fit = stats.linregress(np.log(x), np.log(y))
    if len(x) < 3:
        return Interval(float(fit.slope), -math.inf, math.inf)
    reach = float(stats.t.ppf((1 + level) / 2, len(x) - 2)) * float(fit.stderr)
    return Interval(float(fit.slope), float(fit.slope) - reach, float(fit.slope) + reach)


def growths(rows: Sequence[Row]) -> list[Growth]:
    """Return the growth of each cost of each method with each factor that the rows vary.

    For one factor only rows are taken whose other factors have the values that most rows have. A cost that is nowhere
    positive (steps of a method without any) has no growth.
    """
    done = [row for row in rows if row["status"] == "done"]
    usual = {factor: Counter(row[factor] for row in done).most_common(1)[0][0] for factor in FACTORS if done}
    found = []
    for method, variant in dict.fromkeys((row["method"], row["variant"]) for row in done):
        label = method if variant == "default" else f"{method} ({variant})"
        for factor in FACTORS:
            others = [name for name in FACTORS if name != factor]
            varied = [
                row
                for row in done
                if (row["method"], row["variant"]) == (method, variant)
                and row["variant"] == row["preset"]
                and not row["settings"]
                and all(row[name] == usual[name] for name in others)
                and row[factor] is not None
            ]
            for cost in COSTS:
                points = sorted((float(row[factor]), value) for row in varied if (value := _cost(row, cost)))
                if len({x for x, _ in points}) >= 2:
                    x, y = zip(*points, strict=True)
                    found.append(Growth(label, cost, factor, fit_exponent(x, y), x, y))
    return found


def _cost(row: Row, cost: str) -> float | None:
    if cost == "samples":
        counts = [row[f"samples_{kind}"] for kind in ("retain", "forget", "synthetic")]
        return None if None in counts else float(sum(counts))  # None: no method ran
    return None if row[cost] is None else float(row[cost])


def growth_table(found: Sequence[Growth]) -> str:
    """Return the exponents as Markdown: a table a factor, a line a method."""
    parts = ["Cost ~ factor ^ exponent, fitted on logarithms; [95 % interval].\n"]
    for factor in FACTORS:
        here = [one for one in found if one.factor == factor]
        if not here:
            continue
        parts += [f"## {factor.replace('_', ' ')}: {', '.join(f'{x:g}' for x in sorted({*here[0].x}))}\n"]
        parts += [f"| method | {' | '.join(COSTS)} |", f"|{'---|' * (len(COSTS) + 1)}"]
        for method in dict.fromkeys(one.method for one in here):
            cells = [next((_shown(o.exponent) for o in here if (o.method, o.cost) == (method, c)), "") for c in COSTS]
            parts.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _shown(exponent: Interval) -> str:
    if not math.isfinite(exponent.low):
        return f"{exponent.value:.2f}"
    return f"{exponent.value:.2f} [{exponent.low:.2f}, {exponent.high:.2f}]"
