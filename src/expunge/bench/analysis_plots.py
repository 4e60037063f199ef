"""Plots of the paper's analyses as SVG; drawn from the tidy rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from expunge.bench.plots import Writer, literal, saved
from expunge.bench.tables import Row

OTHERS = "others"
"""What nobody asked to forget so far, as a class of the sequence."""

PALETTE = ("#0b6e99", "#c25700", "#2d7d46", "#8a3a8f", "#a6761d", "#555555", "#c0392b", "#1b9aaa")
"""After Okabe and Ito, darkened to stand on white."""

LAST = ("original", "retrained", "retrained again")
"""Models that are no method: drawn in black and grey."""


def lines_of_sweep(rows: Sequence[Row], name: str, label: str) -> Writer:
    """Return a writer of accuracy and probe against what is varied, a line a series, bars from least to most seed.

    Places on the axis are evenly spread: values span decades, and one may be 0.
    """
    figure, panels = _panels(1, 3, width=4.2, height=4.0)
    values = sorted({row[name] for row in rows})
    for panel, (measure, title) in zip(panels[0], MEASURES.items(), strict=True):
        for series, color in _colors(row["series"] for row in rows).items():
            points = [
                (place, found)
                for place, value in enumerate(values)
                if (
                    found := [
                        100 * r[measure]
                        for r in rows
                        if (r["series"], r[name]) == (series, value) and r[measure] is not None
                    ]
                )
            ]
            _line(panel, points, series, color)
        for role, style in (("original", ":"), ("retrained", "--")):
            known = [100 * row[f"{role}_{measure}"] for row in rows if row[f"{role}_{measure}"] is not None]
            if known:
                panel.axhline(fmean(known), color="black", linestyle=style, linewidth=1, label=role)
        panel.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        panel.set_title(title, fontsize=9)
        if measure != "retain_accuracy":  # there small differences matter, elsewhere where it lies between 0 and 100
            panel.set_ylim(-3, 103)
    panels[0][0].set_ylabel("%")
    panels[0][1].set_xlabel(label)
    return _below(figure, panels[0][0])


MEASURES = {
    "forget_accuracy": "forget accuracy",
    "retain_accuracy": "retain accuracy (axis does not begin at 0)",
    "linear_probe": "linear probe on forgotten classes",
}


def distances_by_layer(rows: Sequence[Row]) -> Writer:
    """Return a writer of relative distance by weight tensor, to the original and to the retrained model.

    Tensors of one dimension (biases, scales of normalization layers) are in the rows alone: they hardly move.
    """
    figure, panels = _panels(2, 1, width=9.0, height=3.6)
    weights = list(dict.fromkeys(row["layer"] for row in rows if (row["dims"] or 0) > 1))
    colors = _colors(row["series"] for row in rows)
    for panel, to in zip(panels[:, 0], ("original", "retrained"), strict=True):
        here = [row for row in rows if row["to"] == to]
        for series in dict.fromkeys(row["series"] for row in here):
            points = [
                (place, [r["relative"] for r in here if (r["series"], r["layer"]) == (series, layer)])
                for place, layer in enumerate(weights)
            ]
            _line(panel, points, series, colors[series])
        panel.set_title(f"to the {to} model", fontsize=9)
        panel.set_ylabel("relative distance")
        panel.set_ylim(bottom=0)
        panel.set_xticks(range(len(weights)), weights if to == "retrained" else [], rotation=60, ha="right", fontsize=7)
    return _beside(figure, panels[:, 0])


def bars_of_cost(rows: Sequence[Row]) -> Writer:
    """Return a writer of FLOPs, CPU seconds and steps, each as a share of those of retraining."""
    figure, panels = _panels(1, 3, width=4.0, height=3.4)
    names = list(dict.fromkeys(row["series"] for row in rows))
    for panel, (measure, title) in zip(panels[0], COSTS.items(), strict=True):
        for place, series in enumerate(names):
            found = [row[measure] for row in rows if row["series"] == series and row[measure] is not None]
            if found:
                panel.barh(place, fmean(found), color="#0b6e99" if series.startswith("unsir") else "#999999")
                panel.annotate(f" {fmean(found):.2f}", (fmean(found), place), va="center", fontsize=8)
        panel.axvline(1, color="black", linewidth=1, linestyle="--")
        panel.set_yticks(range(len(names)), names if panel is panels[0][0] else [])
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(title, fontsize=9)
    panels[0][1].set_xlabel("1: retraining by the original's recipe, on all that is retained")
    return saved(figure)


COSTS = {
    "flops_of_retraining": "FLOPs",
    "cpu_seconds_of_retraining": "CPU seconds",
    "steps_of_retraining": "optimizer steps",
}


def forgetting_in_sequence(rows: Sequence[Row]) -> Writer:
    """Return a writer of accuracy by class after each request: a panel a method, a line of it a request."""
    methods = [
        name for name in dict.fromkeys(row["series"] for row in rows) if name not in ("original", "unsir, at once")
    ]
    methods = [name for name in methods if name != "retrained"] + ["retrained"]
    columns = min(3, len(methods))
    figure, panels = _panels(-(-len(methods) // columns), columns, width=4.2, height=2.9)
    classes = list(dict.fromkeys(row["class"] for row in rows))
    for panel, method in zip(panels.flat, methods, strict=False):
        here = [row for row in rows if row["series"] in ("original", method)]
        numbers = sorted({row["requests"] for row in here})
        means = [[_mean_of(here, number, name) for name in classes] for number in numbers]
        _heat(panel, means, [f"after {n}" if n else "before" for n in numbers], classes)
        panel.set_title(method, fontsize=9)
        for number in numbers[1:]:  # the class that this request names
            for row in here:
                if row["asked_at"] == number and row["requests"] == number:
                    place = (classes.index(row["class"]) - 0.5, numbers.index(number) - 0.5)
                    panel.add_patch(_box(place))
    for panel in list(panels.flat)[len(methods) :]:
        panel.set_visible(False)
    figure.supxlabel("accuracy by class, %; framed: the class that the request names", fontsize=8)
    return saved(figure)


def _mean_of(rows: Sequence[Row], number: int, name: str) -> float | None:
    found = [
        row["accuracy"]
        for row in rows
        if (row["requests"], row["class"]) == (number, name) and row["accuracy"] is not None
    ]
    return fmean(found) if found else None


def shares_of_answers(rows: Sequence[Row], *, most: int = 20) -> Writer:
    """Return a writer of which classes forget images are called, a line a model; of many classes, the most called."""
    series = list(dict.fromkeys(row["series"] for row in rows))
    series = [name for name in series if name not in LAST] + [name for name in LAST if name in series]
    shares: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        shares.setdefault((row["series"], row["called"]), []).append(row["share"])
    called = list(dict.fromkeys(row["called"] for row in rows))
    often = {name: max(fmean(shares[one, name]) for one in series) for name in called}
    kept = sorted(called, key=lambda name: -often[name])[:most]
    called = [name for name in called if name in kept]
    figure, panels = _panels(1, 1, width=2.2 + 0.62 * len(called), height=1.0 + 0.42 * len(series))
    _heat(panels[0][0], [[fmean(shares[one, name]) for name in called] for one in series], series, called)
    panels[0][0].set_title("held-out forget images: share that is called each class, %", fontsize=9)
    return saved(figure)


def maps_of_features(rows: Sequence[Row]) -> Writer:
    """Return a writer of maps of features, a panel a model, forgotten classes in black crosses."""
    series = list(dict.fromkeys(row["series"] for row in rows))
    series = (
        [name for name in LAST[:1] if name in series]
        + [n for n in series if n not in LAST]
        + [name for name in LAST[1:] if name in series]
    )
    columns = min(4, len(series))
    figure, panels = _panels(-(-len(series) // columns), columns, width=3.2, height=3.2)
    classes = sorted({row["class"] for row in rows if not row["forgotten"]})
    few = len(classes) <= SHADES  # there are no more colours that can be told apart
    for panel, name in zip(panels.flat, series, strict=False):
        for number, label in enumerate(classes):
            here = [row for row in rows if (row["series"], row["class"]) == (name, label)]
            panel.scatter(
                [r["x"] for r in here], [r["y"] for r in here], s=9, linewidths=0,
                color=_spread(number) if few else "#9bb7c4",
                label=literal(label) if few else "retained" if number == 0 else None,
            )  # fmt: skip
        for label in sorted({row["class"] for row in rows if row["forgotten"]}):
            here = [row for row in rows if (row["series"], row["class"]) == (name, label)]
            panel.scatter(
                [r["x"] for r in here], [r["y"] for r in here], s=22, color="black", marker="x", linewidths=1,
                label=literal(f"{label} (forgotten)"),
            )  # fmt: skip
        panel.set_title(name, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_aspect("equal", adjustable="datalim")
    for panel in list(panels.flat)[len(series) :]:
        panel.set_visible(False)
    return _beside(figure, [panels.flat[min(columns, len(series)) - 1]], of=panels.flat[0])


def gaps_to_retrained(rows: Sequence[Row]) -> Writer:
    """Return a writer of each measure's gap to the retrained model, of the method and of a second retrained model."""
    measures = [name for name in dict.fromkeys(row["measure"] for row in rows) if "steps" not in name]
    figure, panels = _panels(1, 1, width=9.0, height=1.0 + 0.21 * len(measures))
    (panel,) = panels[0]
    for number, (series, color) in enumerate(_colors(row["series"] for row in rows).items()):
        for place, measure in enumerate(measures):
            gaps = [row["gap"] for row in rows if (row["measure"], row["series"]) == (measure, series)]
            if gaps:
                at = place + 0.3 * (number - 0.5)
                mean = fmean(gaps)
                shown = max(-REACH, min(REACH, mean))
                ends = [max(-REACH, min(gaps)), min(REACH, max(gaps))]
                panel.plot(ends if ends[0] <= ends[1] else [shown] * 2, [at, at], color=color, linewidth=1)
                mark = "<" if mean < -REACH else ">" if mean > REACH else "s" if series in LAST else "o"
                panel.plot([shown], [at], mark, color=color, ms=5, label=series if place == 0 else None)
                if shown != mean:
                    side = {"ha": "left", "xytext": (6, 0)} if mean < 0 else {"ha": "right", "xytext": (-6, 0)}
                    panel.annotate(
                        f"{mean:.2f}", (shown, at), textcoords="offset points", va="center", fontsize=7, **side
                    )
    panel.axvline(0, color="black", linewidth=1)
    panel.set_yticks(range(len(measures)), [name.replace("_", " ") for name in measures], fontsize=8)
    panel.set_ylim(len(measures) - 0.3, -0.7)
    told = "a number: beyond the axis; a measure in steps is in the table"
    panel.set_xlabel(f"gap to the retrained model: mean, from least to most seed\n({told})")
    panel.legend(fontsize=8, loc="best")
    return saved(figure)


REACH = 1.5
"""Of the axis of gaps, to both sides: nearly all measures are shares."""


# What they share


def _panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its panels (rows, columns), each `width` x `height` inches."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
    return figure, panels


def _colors(series: Iterable[str]) -> dict[str, str]:
    """Return a color for each series: black and greys for what is no method."""
    names = list(dict.fromkeys(series))
    greys = dict(zip(LAST, ("#999999", "#000000", "#666666"), strict=True))
    methods = [name for name in names if name not in LAST]
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(methods)} | {
        name: greys[name] for name in names if name in LAST
    }


SHADES = 20


def _spread(number: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20"](number)


def _line(panel: Any, points: Sequence[tuple[float, Sequence[float]]], series: str, color: str) -> None:
    """Draw the means of a series, with bars from the least to the most of the seeds."""
    points = [(place, found) for place, found in points if found]
    means = [fmean(found) for _, found in points]
    reach = [
        [mean - min(found) for mean, (_, found) in zip(means, points, strict=True)],
        [max(found) - mean for mean, (_, found) in zip(means, points, strict=True)],
    ]
    panel.errorbar(
        [place for place, _ in points], means, yerr=reach, color=color, marker="s" if series in LAST else "o", ms=4,
        linewidth=1.3, elinewidth=0.7, capsize=2, label=series, linestyle="--" if series in LAST else "-",
    )  # fmt: skip


def _heat(panel: Any, values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draw shares in [0, 1] as shades with their percentages."""
    panel.grid(visible=False)
    shades = [[0.0 if value is None else value for value in line] for line in values]
    panel.imshow(shades, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value is not None:
                panel.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="black")
    turned = 45 if max(map(len, columns)) > 6 else 0
    panel.set_xticks(range(len(columns)), list(map(literal, columns)), fontsize=8, rotation=turned)
    panel.set_yticks(range(len(rows)), list(map(literal, rows)), fontsize=8)


def _box(place: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=1.5)


def _below(figure: Any, panel: Any) -> Writer:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return saved(figure)


def _beside(figure: Any, panels: Iterable[Any], *, of: Any = None) -> Writer:
    """Put one legend beside, of everything that is drawn in `panels` or in `of`."""
    found: dict[str, Any] = {}
    for panel in [of] if of is not None else panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=8, frameon=False)
    return saved(figure)
