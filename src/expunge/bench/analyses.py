"""The paper's analyses: each a function from runs to a table of tidy rows and a plot.

Which cells each needs stands in series.py. `TABLES` says how rows become the table for people: what names a line, and
which columns are means over training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import torch

from expunge.bench.analysis_plots import (
    OTHERS,
    bars_of_cost,
    distances_by_layer,
    forgetting_in_sequence,
    gaps_to_retrained,
    lines_of_sweep,
    maps_of_features,
    shares_of_answers,
)
from expunge.bench.cells import folder_of
from expunge.bench.plots import Writer
from expunge.bench.records import read
from expunge.bench.series import AT_ONCE, RETRAIN, Point
from expunge.bench.tables import Figure, Row, column, row_of, shown
from expunge.metrics import mean_interval
from expunge.report import text_writer


@dataclass(frozen=True)
class Run:
    """A finished cell: its place in the analysis, its record, and its row of the tidy table."""

    point: Point
    record: Mapping[str, Any]
    row: Row

    @property
    def seed(self) -> int:
        return self.point.cell.original.seed

    @property
    def metrics(self) -> Mapping[str, Any]:
        metrics: Mapping[str, Any] = self.record["metrics"]
        return metrics


@dataclass(frozen=True)
class Found:
    """What an analysis found."""

    rows: list[Row]  # tidy, one value of each measure a line
    told: list[Row]  # rows of the table for people, if not all
    plot: Writer


Analysis = Callable[[Sequence[Run]], Found]


def runs_of(points: Iterable[Point], out: Path) -> list[Run]:
    """Return the points whose cells are done."""
    records = ((point, read(folder_of(point.cell, out))) for point in points)
    return [
        Run(point, record, row_of(point.cell, record, out))
        for point, record in records
        if record is not None and record["item"]["status"] == "done"
    ]


# Layer by layer


def layer_distance(runs: Sequence[Run]) -> Found:
    """How far each parameter tensor moved from the original, and how far it is from the retrained model's."""

    def of(run: Run, series: str, to: str, distances: Mapping[str, Mapping[str, float]]) -> list[Row]:
        dims = run.record["bench"]["dims"]
        return [
            {"series": series, "to": to, "layer": name, "dims": dims.get(name), "training_seed": run.seed, **found}
            for name, found in distances.items()
        ]

    rows: list[Row] = []
    for run in runs:
        after = run.metrics["after"]["weight_distance"]
        rows += of(run, run.point.series, "original", after["to_original"])
        rows += of(run, run.point.series, "retrained", after["to_retrained"])
    for run in _one_a_seed(runs):
        rows += of(run, "retrained", "original", run.metrics["retrained"]["weight_distance"]["to_original"])
    return Found(rows, [row for row in rows if row["layer"] == "total"], distances_by_layer(rows))


# Cost


def efficiency(runs: Sequence[Run]) -> Found:
    """Seconds, steps, samples and FLOPs beside those of retraining on all that is retained."""
    names = ("forget_accuracy", "retain_accuracy", "seconds", "cpu_seconds", "steps", "flops", "peak_memory_bytes")
    whole = {run.seed: run.row for run in runs if run.point.series == RETRAIN}
    rows: list[Row] = []
    for run in runs:
        beside = whole.get(run.seed, {})
        rows.append(
            {"series": run.point.series, "training_seed": run.seed}
            | {name: run.row[name] for name in names}
            | {"samples": sum(run.row[f"samples_{kind}"] for kind in ("retain", "forget", "synthetic"))}
            | {
                f"{name}_of_retraining": _ratio(run.row[name], beside.get(name))
                for name in ("cpu_seconds", "flops", "steps")
            }
        )
    return Found(rows, rows, bars_of_cost(rows))


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


# One request after the other


def sequential(runs: Sequence[Run]) -> Found:
    """Accuracy on each class of the sequence, and on what nobody asked to forget so far, after each request."""
    asked_at = {
        name: int(run.point.x or 0)
        for run in sorted(runs, key=lambda run: run.point.x or 0)
        if run.point.series != AT_ONCE
        for name in run.record["classes"]["forget"]
    }
    found: dict[tuple[str, int, int], Mapping[str, Any]] = {}  # the retrained model of a request is the same in all
    for run in runs:
        number = int(run.point.x or 0)
        found[run.point.series, number, run.seed] = run.metrics["after"]
        found.setdefault(("retrained", number, run.seed), run.metrics["retrained"])
        if number == 1:
            found.setdefault(("original", 0, run.seed), run.metrics["before"])
    rows: list[Row] = []
    told: list[Row] = []
    for (series, number, seed), metrics in sorted(found.items(), key=lambda one: one[0][0] == "retrained"):
        key = {"series": series, "requests": number, "training_seed": seed}
        each = {name: metrics["per_class_accuracy"][name] for name in asked_at}
        rows += [key | {"class": name, "asked_at": at, "accuracy": each[name]} for name, at in asked_at.items()]
        rows.append(key | {"class": OTHERS, "asked_at": None, "accuracy": metrics["retain_accuracy"]})
        gone = [each[name] for name, at in asked_at.items() if at <= number and each[name] is not None]
        told.append(key | {"most_left": max(gone, default=None), "retain_accuracy": metrics["retain_accuracy"]})
    return Found(rows, told, forgetting_in_sequence(rows))


# What is varied


def learning_rate(runs: Sequence[Run]) -> Found:
    """What the rate of impair does to forgetting and to the rest."""
    return _sweep(runs, "learning rate of impair", "impair_lr")


def retain_share(runs: Sequence[Run]) -> Found:
    """How few retained images are enough."""
    return _sweep(runs, "retained images of each class", "retain_per_class")


def penalty(runs: Sequence[Run]) -> Found:
    """What the size of the noise does: its penalty, on the mean squared pixel."""
    return _sweep(runs, "penalty of the noise", "noise_penalty")


def repeated_repair(runs: Sequence[Run]) -> Found:
    """Whether more repair brings back what was lost, or what was forgotten."""
    return _sweep(runs, "passes (plain) or cycles, at most (default), of repair", "repairs")


def _sweep(runs: Sequence[Run], label: str, name: str) -> Found:
    measures = ("forget_accuracy", "retain_accuracy", "linear_probe")
    kept = (*measures, "tug_of_war", "steps", "seconds", "retain_samples")
    rows: list[Row] = [
        {"series": run.point.series, name: run.point.x, "training_seed": run.seed}
        | {key: run.row[key] for key in kept}
        | {f"{role}_{key}": run.row[f"{role}_{key}"] for role in ("original", "retrained") for key in measures}
        for run in runs
    ]
    return Found(rows, rows, lines_of_sweep(rows, name, label))


# What forget images are called


def prediction_distribution(runs: Sequence[Run]) -> Found:
    """Which classes held-out forget images are called, beside what retrained models call them."""
    found = [(run, run.point.series, run.metrics["after"]) for run in runs]
    for run in _one_a_seed(runs):
        found += [(run, series, run.metrics[role]) for role, series in (("before", "original"), ("retrained",) * 2)]
    rows: list[Row] = []
    told: list[Row] = []
    for run, series, metrics in found:
        key = {"series": series, "training_seed": run.seed}
        shares = metrics["forget_prediction_distribution"]
        rows += [key | {"called": name, "share": share} for name, share in shares.items()]
        told.append(
            key
            | {
                "most_called": max(shares.values()),
                "entropy_bits": metrics["forget_prediction_entropy_bits"],
                "divergence_bits": metrics.get("prediction_divergence_bits"),
            }
        )
    return Found(rows, told, shares_of_answers(rows))


# What features look like


def features(runs: Sequence[Run]) -> Found:
    """Where held-out samples lie before the last layer, on the plane on which each model's features vary most."""
    rows: list[Row] = []
    told: list[Row] = []
    first = min((run.seed for run in runs), default=0)
    one = {run.point.cell.id for run in _one_a_seed(runs)}
    for run in runs:
        series = {"unlearned": run.point.series}
        if run.point.cell.id in one:
            series |= {"original": "original", "retrained": "retrained"}
        audit = run.record["audits"]["feature_map"]
        probes = run.record["bench"]["probes"] or {}
        for role, name in series.items():
            key = {"series": name, "training_seed": run.seed}
            shares = audit["figures"]["share of variance"]
            told.append(key | {"share_of_variance": shares[role]["value"]} | probes.get(PROBED[role], {}))
            if run.seed == first:  # planes of two trainings have nothing to do with each other
                forget = set(run.record["classes"]["forget"])
                rows += [
                    key | {"class": label, "forgotten": label in forget, "x": x, "y": y}
                    for label, places in audit["details"][role]["points"].items()
                    for x, y in zip(places["x"], places["y"], strict=True)
                ]
    return Found(rows, told, maps_of_features(rows))


PROBED = {"original": "before", "unlearned": "after", "retrained": "retrained"}
"""What the benchmark's probes call the models that audits call otherwise."""


# The retrained model as gold standard


def gold_standard(runs: Sequence[Run]) -> Found:
    """Every measure of UNSIR, and of a second retrained model, beside the retrained model's: what is within the noise
    of training cannot be held against a method.
    """
    rows: list[Row] = []
    for run in runs:
        rows += [
            {
                "measure": measure,
                "series": run.point.series,
                "training_seed": run.seed,
                "value": value,
                "retrained": target,
                "gap": value - target,
            }
            for measure, (value, target) in _measured(run).items()
        ]
    order = list(dict.fromkeys(row["measure"] for row in rows))
    return Found(rows, sorted(rows, key=lambda row: order.index(row["measure"])), gaps_to_retrained(rows))


PAIRWISE = {"tug_of_war": 1.0, "activation_distance": 0.0, "prediction_divergence_bits": 0.0}
"""Measures of a pair of models, and what they are of a model and itself."""

OF_ONE = (
    "forget_accuracy", "retain_accuracy", "masked_retain_accuracy", "false_forget_rate", "retain_calibration_error",
    "forget_prediction_entropy_bits", "zero_retrain_forgetting",
)  # fmt: skip
"""Measures of one model."""


def _measured(run: Run) -> dict[str, tuple[float, float]]:
    """Return (of the model judged, of the retrained model) by measure; those that either lacks are left out."""
    after, retrained = run.metrics["after"], run.metrics["retrained"]
    pairs = {name: (_number(after.get(name)), _number(retrained.get(name))) for name in OF_ONE}
    pairs |= {name: (_number(after.get(name)), target) for name, target in PAIRWISE.items()}
    pairs["weight_distance"] = (after["weight_distance"]["to_retrained"]["total"]["relative"], 0.0)
    probes = run.record["bench"]["probes"] or {}
    pairs |= {
        f"probe of the last features, {name}": (found, probes["retrained"][name])
        for name, found in probes.get("after", {}).items()
    }
    for audit, told in run.record["audits"].items():
        for figure, of in told["figures"].items():
            pairs[f"{audit}: {figure}"] = (_number(of.get("unlearned")), _number(of.get("retrained")))
    return {
        name: (value, target) for name, (value, target) in pairs.items() if value is not None and target is not None
    }


def _number(figure: Any) -> float | None:
    """Return a figure's value, whether it stands alone or with its interval."""
    value = figure.get("value") if isinstance(figure, Mapping) else figure
    return None if value is None else float(value)


def _one_a_seed(runs: Sequence[Run]) -> list[Run]:
    """Return one run of each training seed: originals and retrained models are the same in all."""
    return list({run.seed: run for run in reversed(runs)}.values())[::-1]


# Tables


@dataclass(frozen=True)
class Table:
    """How an analysis is told to people."""

    analyse: Analysis
    title: str
    keys: tuple[str, ...]  # columns that name a line
    figures: tuple[Figure, ...]  # columns that are means over training seeds


def _figures(*named: tuple[str, str, float, int]) -> tuple[Figure, ...]:
    return tuple(Figure(name, title, column(name, scale), None, digits) for name, title, scale, digits in named)


ACCURACIES = (("forget_accuracy", "A_f %", 100, 1), ("retain_accuracy", "A_r %", 100, 1))
SWEPT = _figures(
    *ACCURACIES, ("linear_probe", "probe %", 100, 1), ("tug_of_war", "ToW", 1, 3), ("steps", "steps", 1, 0)
)

TABLES: Mapping[str, Table] = {
    "layer_distance": Table(
        layer_distance,
        "Layer-wise distance (all parameters together; tensor by tensor in the CSV)",
        ("to", "series"),
        _figures(("relative", "relative distance", 1, 3), ("l2", "Euclidean distance", 1, 2)),
    ),
    "efficiency": Table(
        efficiency,
        "Efficiency, beside retraining on all that is retained",
        ("series",),
        _figures(
            *ACCURACIES,
            ("cpu_seconds", "CPU s", 1, 2),
            ("steps", "steps", 1, 0),
            ("samples", "samples", 1, 0),
            ("flops", "GFLOP", 1e-9, 1),
            ("cpu_seconds_of_retraining", "CPU s, of retraining", 1, 2),
            ("flops_of_retraining", "FLOPs, of retraining", 1, 2),
        ),
    ),
    "sequential": Table(
        sequential,
        "Sequential forgetting: the most that is left of any class asked for so far",
        ("series", "requests"),
        _figures(("most_left", "highest A_f so far, %", 100, 1), ("retain_accuracy", "A_r %", 100, 1)),
    ),
    "learning_rate": Table(learning_rate, "Learning rate of impair", ("series", "impair_lr"), SWEPT),
    "retain_share": Table(retain_share, "Share of retain data", ("series", "retain_per_class"), SWEPT),
    "penalty": Table(penalty, "Penalty of the noise", ("series", "noise_penalty"), SWEPT),
    "repeated_repair": Table(repeated_repair, "Repeated repair", ("series", "repairs"), SWEPT),
    "prediction_distribution": Table(
        prediction_distribution,
        "What held-out forget images are called",
        ("series",),
        _figures(
            ("most_called", "share of the most frequent answer, %", 100, 1),
            ("entropy_bits", "entropy, bits", 1, 2),
            ("divergence_bits", "divergence from the retrained model's, bits", 1, 3),
        ),
    ),
    "features": Table(
        features,
        "Features before and after",
        ("series",),
        _figures(
            ("linear_probe", "linear probe %", 100, 1),
            ("nearest_class_mean", "nearest class mean %", 100, 1),
            ("share_of_variance", "variance on the plane, %", 100, 1),
        ),
    ),
    "gold_standard": Table(
        gold_standard,
        "The retrained model as gold standard",
        ("measure", "series"),
        _figures(("value", "value", 1, 3), ("retrained", "retrained", 1, 3), ("gap", "gap", 1, 3)),
    ),
}
"""Every analysis of series.GRIDS."""


def writers(points: Mapping[str, Sequence[Point]], out: Path) -> dict[Path, Callable[[Path], None]]:
    """Return writers of each analysis's tidy rows (CSV), table (Markdown) and plot (SVG), of what is done so far."""
    made: dict[Path, Callable[[Path], None]] = {}
    parts = [EXPLAINED]
    for name, some in points.items():
        runs = runs_of(some, out)
        if not runs:
            continue
        found = TABLES[name].analyse(runs)
        text = f"## {TABLES[name].title}\n\n{markdown(found.told, TABLES[name])}"
        lost = len(some) - len(runs)
        parts.append(text + (f"\n{lost} of {len(some)} cells are missing or failed.\n" if lost else ""))
        made[out / "analyses" / f"{name}.csv"] = rows_writer(found.rows)
        made[out / "analyses" / f"{name}.svg"] = found.plot
    made[out / "analyses.md"] = text_writer("\n".join(parts))
    return made


EXPLAINED = """# The paper's analyses

Mean ± half of the 95 % Student interval over training seeds. A_f, A_r: accuracy on held-out samples of the forgotten
and of the other classes. Tidy rows of each, one value a line, stand in analyses/NAME.csv, plots in analyses/NAME.svg.
"""


def markdown(rows: Sequence[Row], table: Table) -> str:
    """Return rows as Markdown: a line for each value of the keys, means over training seeds with intervals."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in table.keys), []).append(row)
    header = [*(key.replace("_", " ") for key in table.keys), "n", *(figure.title for figure in table.figures)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for key, group in groups.items():
        cells = [*(f"{part:g}" if isinstance(part, float) else str(part) for part in key), str(len(group))]
        for figure in table.figures:
            values = [value for row in group if (value := figure.of(row)) is not None]
            cells.append(shown(mean_interval((torch.tensor(values, dtype=torch.float64),)), figure) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rows_writer(rows: Sequence[Row]) -> Callable[[Path], None]:
    """Return a writer of tidy rows as CSV."""
    table = pa.Table.from_pylist([dict(row) for row in rows])
    return lambda path: pyarrow.csv.write_csv(table, path)
