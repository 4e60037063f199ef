"""Plots of a benchmark as SVG: forget against retain, cost against quality, growth of cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from expunge.bench.scaling import Growth
from expunge.bench.tables import Row, Summary
from expunge.metrics import Interval

COLORS = {"zero-glance": "#0b6e99", "reads forget data": "#c25700", "control": "#767676"}
"""Okabe and Ito's blue and orange, darkened to stand on white, and a grey."""

Writer = Callable[[Path], None]


def forget_against_retain(group: Sequence[Summary], rows: Sequence[Row]) -> Writer:
    """Return a writer of the plot of retain against forget accuracy, the retrained model being the target.

    Args:
        group: summaries of one data set, model and set of classes.
        rows: the tidy table, for the original and the retrained model.
    """
    figure, (axes, close) = _axes("forget accuracy, %", "retain accuracy, %", panels=2)
    here = [row for row in rows if row["status"] == "done" and (row["data"], row["model_spec"]) == _place(group)]
    here = [row for row in here if group[0].forget in ("all", row["forget"])]
    marked: dict[str, tuple[float, float]] = {}
    for role in ("original", "retrained"):
        pairs = [(row[f"{role}_forget_accuracy"], row[f"{role}_retain_accuracy"]) for row in here]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if known:
            x, y = (100 * fmean(values) for values in zip(*known, strict=True))
            marked[role] = (x, y)
    for panel in (axes, close):
        _points(panel, group, "forget_accuracy", "retain_accuracy")
        for role, (x, y) in marked.items():
            panel.scatter([x], [y], marker={"retrained": "*", "original": "X"}[role], s=120, color="black", label=role)
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 103)
    x, y = marked.get("retrained", (0.0, 100.0))
    close.set_xlim(x - 1, x + 15)
    close.set_ylim(max(0.0, y - 10), min(100.5, y + 3))
    close.set_title("near the retrained model, the target", fontsize=9)
    return _writer(figure, axes, group, legend=close)


def cost_against_quality(group: Sequence[Summary]) -> Writer:
    """Return a writer of the plot of tug of war (1: like the retrained model) against seconds."""
    figure, (axes,) = _axes("seconds", "tug of war (1: like the retrained model)")
    axes.set_xscale("log")
    _points(axes, group, "seconds", "tug_of_war", across=False)
    axes.set_ylim(-0.03, 1.03)
    return _writer(figure, axes, group, legend=axes)


def growth(found: Sequence[Growth], cost: str, factor: str) -> Writer:
    """Return a writer of the plot of one cost against one factor, a line a method, both axes logarithmic."""
    figure, (axes,) = _axes(factor.replace("_", " "), cost.replace("_", " "))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for number, one in enumerate(found):
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(one.x, one.y, style, marker=".", label=f"{one.method}: {one.exponent.value:.2f}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, title="exponent", frameon=False)
    return saved(figure)


def _axes(x: str, y: str, *, panels: int = 1) -> tuple[Any, Any]:
    """Return a figure and its panels, side by side, each with the same labels."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(8 + 5 * (panels - 1), 5.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.grid(alpha=0.3)
    return figure, axes


def _points(axes: Any, group: Sequence[Summary], x: str, y: str, *, across: bool = True) -> None:
    """Draw each method as a number with its intervals (`across`: of x too); the legend tells which is which."""
    for number, one in enumerate(group, 1):
        if x not in one.figures or y not in one.figures:
            continue
        right, up = one.figures[x], one.figures[y]
        color = COLORS[one.kind]
        axes.errorbar(
            [right.value],
            [up.value],
            xerr=_reach(right) if across else None,
            yerr=_reach(up),
            fmt="o" if one.variant != "tuned" else "s",
            ms=5,
            color=color,
            elinewidth=0.6,
            alpha=0.8,
            label=f"{number} {one.label}",
        )
        axes.annotate(
            str(number),
            (right.value, up.value),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            annotation_clip=True,
        )


def _reach(interval: Interval) -> list[float] | None:
    """Return half the width of an interval, for an error bar; None where it is unbounded."""
    return [(interval.high - interval.low) / 2] if math.isfinite(interval.high) else None


def _place(group: Sequence[Summary]) -> tuple[str, str]:
    return group[0].data, group[0].model


def _writer(figure: Any, axes: Any, group: Sequence[Summary], *, legend: Any) -> Writer:
    axes.set_title(literal(f"{group[0].data}, {group[0].model}, forget {group[0].forget}"), fontsize=9)
    columns = 1 + len(group) // 24
    legend.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, frameon=False, ncols=columns)
    kinds = "; ".join(f"{kind}: {color}" for kind, color in _words().items())
    figure.supxlabel(f"{kinds}; square: tuned; bars: 95 % interval over seeds", fontsize=7)
    return saved(figure)


def _words() -> dict[str, str]:
    return {"zero-glance": "blue", "reads forget data": "orange", "control": "grey"}


def literal(name: str) -> str:
    """Return a name of somebody's for matplotlib, to whom dollars are the bounds of a formula."""
    return name.replace("$", r"\$")


def saved(figure: Any) -> Writer:
    """Return a writer of a figure as SVG."""
    import matplotlib

    def write(path: Path) -> None:
        # text stays text, and the same numbers give the same file
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "expunge"}):
            figure.savefig(path, format="svg", metadata={"Date": None})

    return write
