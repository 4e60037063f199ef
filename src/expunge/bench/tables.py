"""From records to one tidy table, and from that to tables with intervals; columns are documented in docs/bench.md."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch

from expunge.bench.cells import Cell, folder_of, model_name
from expunge.bench.records import read
from expunge.bench.suites import CONTROLS
from expunge.evaluation import hardly_known
from expunge.methods import METHODS
from expunge.metrics import Interval, mean_interval, tug_of_war
from expunge.verdict import collapsed

Row = Mapping[str, Any]

TEXT, WHOLE, REAL, TRUTH = pa.string(), pa.int64(), pa.float64(), pa.bool_()

COLUMNS: Mapping[str, Any] = {
    "id": TEXT, "status": TEXT, "error": TEXT,
    "data": TEXT, "model": TEXT, "model_spec": TEXT, "parameters": WHOLE,
    "forget": TEXT, "forgotten_before": TEXT, "num_forget_classes": WHOLE, "num_classes": WHOLE,
    "method": TEXT, "variant": TEXT, "preset": TEXT, "settings": TEXT, "zero_glance": TRUTH, "reads": TEXT,
    "training_seed": WHOLE, "unlearning_seed": WHOLE,
    "retain_per_class": WHOLE, "retain_samples": WHOLE, "forget_samples": WHOLE, "test_samples": WHOLE,
    "original_forget_accuracy": REAL, "original_retain_accuracy": REAL, "original_masked_retain_accuracy": REAL,
    "retrained_forget_accuracy": REAL, "retrained_retain_accuracy": REAL, "retrained_test_accuracy": REAL,
    "forget_accuracy": REAL, "retain_accuracy": REAL, "masked_retain_accuracy": REAL, "false_forget_rate": REAL,
    "original_knows": TRUTH, "collapsed_classes": WHOLE,
    "forget_gap": REAL, "retain_gap": REAL, "tug_of_war": REAL, "activation_distance": REAL,
    "zero_retrain_forgetting": REAL, "weight_distance_to_retrained": REAL,
    "original_linear_probe": REAL, "retrained_linear_probe": REAL, "linear_probe": REAL, "linear_probe_gap": REAL,
    "original_nearest_class_mean": REAL, "retrained_nearest_class_mean": REAL, "nearest_class_mean": REAL,
    "seconds": REAL, "cpu_seconds": REAL, "steps": WHOLE,
    "samples_retain": WHOLE, "samples_forget": WHOLE, "samples_synthetic": WHOLE,
    "flops": WHOLE, "peak_memory_bytes": WHOLE, "memory_of": TEXT, "reference_seconds": REAL,
    "tuning_trials": WHOLE, "tuning_seconds": REAL, "tuning_score": REAL, "selected_by": TEXT,
    "device": TEXT, "threads": WHOLE, "torch": TEXT, "expunge": TEXT,
}  # fmt: skip
"""Names and types of the tidy table's columns, one row a cell."""


def tidy_rows(cells: Sequence[Cell], out: Path) -> list[Row]:
    """Return a row for each cell that is done or has failed, in the order of the cells."""
    return [row_of(cell, record, out) for cell in cells if (record := read(folder_of(cell, out))) is not None]


def missing_row(cell: Cell) -> dict[str, Any]:
    """Return the row of a cell that nothing came of yet: what was asked, and None for the rest."""
    original = cell.original
    return dict.fromkeys(COLUMNS) | {
        "id": cell.id,
        "status": "missing",
        "data": original.data,
        "model": model_name(original.model),
        "model_spec": original.model,
        "forget": "+".join(cell.forget),
        "forgotten_before": "+".join(cell.after.gone if cell.after else ()),
        "num_forget_classes": len(cell.forget),
        "method": cell.method,
        "variant": "tuned" if cell.tuning else cell.preset,
        "preset": cell.preset,
        "settings": " ".join(cell.settings),
        "training_seed": original.seed,
        "unlearning_seed": cell.seed,
        "retain_per_class": cell.retain_per_class,
    }


def row_of(cell: Cell, record: Mapping[str, Any], out: Path) -> Row:
    """Return one row of the tidy table; what a failed cell, or one without a reference, does not have is None."""
    about = record["item"]
    row = missing_row(cell) | {
        "status": about["status"],
        "error": f"{about['error']['type']}: {about['error']['message']}" if about["error"] else None,
        "model_spec": about["asked"]["original"]["model"],
    }
    if about["status"] == "failed":
        return row
    bench, after = record["bench"], record["metrics"]["after"]
    before, retrained = record["metrics"]["before"], record["metrics"].get("retrained")
    probes, gaps = bench["probes"], record["metrics"].get("gaps", {})
    row |= {name: record["environment"][name] for name in ("device", "threads", "torch", "expunge")}
    row |= {name: bench["cost"][name] for name in COLUMNS if name in bench["cost"]}
    row |= {name: after[name] for name in ("forget_accuracy", "retain_accuracy")}
    row |= {name: after[name] for name in ("masked_retain_accuracy", "false_forget_rate")}
    row |= {
        f"original_{name}": before[name] for name in ("forget_accuracy", "retain_accuracy", "masked_retain_accuracy")
    }
    row |= {
        "original_knows": before["forget_accuracy"] is not None
        and not hardly_known(before, record["classes"]["forget"]),
        # earlier versions did not record what it is told by
        "collapsed_classes": len(collapsed(record["metrics"])) if "masked_per_class_intervals" in before else None,
    }
    if probes is not None:  # None: the data has no images of the classes
        for name in ("linear_probe", "nearest_class_mean"):
            row |= {name: probes["after"][name], f"original_{name}": probes["before"][name]}
    row |= {
        "parameters": record["model"]["parameters"],
        "num_classes": bench["sizes"]["classes"],
        "num_forget_classes": len(record["classes"]["forget"]),
        "settings": " ".join(record["config"]["settings"]),
        "zero_glance": bench["zero_glance"],
        "reads": "+".join(bench["reads"]),
        **{f"{name}_samples": bench["sizes"][name] for name in ("retain", "forget", "test")},
        "zero_retrain_forgetting": _value(after.get("zero_retrain_forgetting")),
    }
    if retrained is not None:
        row |= {
            f"retrained_{name}": retrained[name] for name in ("forget_accuracy", "retain_accuracy", "test_accuracy")
        }
        row |= {
            "forget_gap": _value(gaps.get("forget_accuracy")),
            "retain_gap": _value(gaps.get("retain_accuracy")),
            "tug_of_war": after["tug_of_war"],
            "activation_distance": _value(after["activation_distance"]),
            "weight_distance_to_retrained": after["weight_distance"]["to_retrained"]["total"]["relative"],
            "reference_seconds": _training_seconds(cell, out),
        }
    if retrained is not None and probes is not None:
        row |= {f"retrained_{name}": probes["retrained"][name] for name in ("linear_probe", "nearest_class_mean")}
        row |= {"linear_probe_gap": probes["after"]["linear_probe"] - probes["retrained"]["linear_probe"]}
    if bench["tuning"] is not None and cell.tuning is not None:
        tuning = read(folder_of(cell.tuning, out))
        row |= {
            "tuning_trials": len(bench["tuning"]["trials"]),
            "tuning_score": bench["tuning"]["score"],
            "selected_by": bench["tuning"]["selected_by"],
            "tuning_seconds": tuning["item"]["seconds"] if tuning else None,
        }
    return row


def _training_seconds(cell: Cell, out: Path) -> float | None:
    """Return how long the training of a cell's reference took."""
    record = read(folder_of(cell.needs[1], out))
    training = (record or {}).get("training")
    return training["seconds"] if training else None


def _value(figure: Mapping[str, Any] | None) -> float | None:
    return None if figure is None else figure["value"]


def csv_writer(rows: Sequence[Row]) -> Callable[[Path], None]:
    """Return a writer of the tidy table as CSV."""
    table = _table(rows)
    return lambda path: pyarrow.csv.write_csv(table, path)


def parquet_writer(rows: Sequence[Row]) -> Callable[[Path], None]:
    """Return a writer of the tidy table as parquet."""
    table = _table(rows)
    return lambda path: pyarrow.parquet.write_table(table, path)


def _table(rows: Sequence[Row]) -> Any:
    return pa.Table.from_pylist(list(rows), schema=pa.schema(list(COLUMNS.items())))


# Means over seeds


@dataclass(frozen=True)
class Figure:
    """A column of the tables for people."""

    name: str  # column of the tidy table
    title: str
    of: Callable[[Row], float | None]
    best: Literal["low", "high"] | None = None  # which way it is marked; None: never
    digits: int = 1


def column(name: str, scale: float = 1.0) -> Callable[[Row], float | None]:
    """Return how to read a column, times `scale`."""
    return lambda row: None if row[name] is None else scale * row[name]


def size(name: str, scale: float = 1.0) -> Callable[[Row], float | None]:
    """Return how to read how far a column is from zero, times `scale`."""
    return lambda row: None if row[name] is None else scale * abs(row[name])


FIGURES = (
    Figure("forget_accuracy", "A_f %", column("forget_accuracy", 100)),
    Figure("retain_accuracy", "A_r %", column("retain_accuracy", 100)),
    Figure("forget_gap", "A_f gap", size("forget_gap", 100), "low"),
    Figure("retain_gap", "A_r gap", size("retain_gap", 100), "low"),
    Figure("tug_of_war", "ToW", column("tug_of_war"), "high", 3),
    Figure("linear_probe", "probe %", column("linear_probe", 100)),
    Figure("linear_probe_gap", "probe gap", size("linear_probe_gap", 100), "low"),
    Figure("seconds", "s", column("seconds")),
    Figure("cpu_seconds", "CPU s", column("cpu_seconds")),
    Figure("steps", "steps", column("steps"), None, 0),
    Figure("flops", "GFLOP", column("flops", 1e-9)),
    Figure("peak_memory_bytes", "MB", column("peak_memory_bytes", 1e-6), None, 0),
)
"""What tables for people show. Gaps are to the retrained model, in points; best is what is nearest to it."""


@dataclass(frozen=True)
class Summary:
    """One method on one data set, model and set of classes: each figure's mean over seeds with its interval."""

    data: str
    model: str
    forget: str  # or "all": the mean over the sets of classes
    method: str
    variant: str
    reads: str
    seeds: int  # values behind each mean
    figures: Mapping[str, Interval]

    @property
    def label(self) -> str:
        return self.method if self.variant == "default" else f"{self.method} ({self.variant})"

    @property
    def kind(self) -> Kind:
        return kind_of(self.method, self.reads)


Kind = Literal["zero-glance", "reads forget data", "control"]


def kind_of(method: str, reads: str) -> Kind:
    """Return what a method is told apart by: controls stand aside, whatever they read."""
    if method in CONTROLS:
        return "control"
    return "reads forget data" if "forget" in reads.split("+") else "zero-glance"


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Return rows of methods as a preset or a search has them, for tables that lay methods side by side.

    Left out are settings by hand, requests after others, models that no method made, and, for each data set and model,
    retain samples of another size than most have.
    """
    plain = [
        row
        for row in rows
        if row["method"] in METHODS
        and not row["forgotten_before"]
        and (row["variant"] == "tuned" or not row["settings"])
    ]
    sizes: dict[tuple[str, str], Counter[int | None]] = {}
    for row in plain:
        sizes.setdefault((row["data"], row["model_spec"]), Counter())[row["retain_per_class"]] += 1
    usual = {place: counts.most_common(1)[0][0] for place, counts in sizes.items()}
    return [row for row in plain if row["retain_per_class"] == usual[row["data"], row["model_spec"]]]


def summarize(rows: Iterable[Row], figures: Sequence[Figure] = FIGURES) -> list[Summary]:
    """Return means of `figures` with 95 % Student intervals over seeds.

    One value is of one training seed: cells that share it share an original, and are no independent draws, so they are
    averaged first. Where there is one training seed only, a value is of one unlearning seed. Where several sets of
    classes were forgotten, by half of the methods or more, there is a summary "all", of the seeds for which no set is
    missing.
    """
    done = [row for row in rows if row["status"] == "done"]
    summaries: list[Summary] = []
    for data, model in dict.fromkeys((row["data"], row["model_spec"]) for row in done):
        here = [row for row in done if (row["data"], row["model_spec"]) == (data, model)]
        sets = list(dict.fromkeys(row["forget"] for row in here))
        methods = dict.fromkeys((row["method"], row["variant"]) for row in here)
        has = {one: {row["forget"] for row in here if (row["method"], row["variant"]) == one} for one in methods}
        # a set that few have been given is an analysis of those
        usual = len(sets) > 1 and 2 * sum(len(given) == len(sets) for given in has.values()) >= len(methods)
        for method, variant in methods:
            own = [row for row in here if (row["method"], row["variant"]) == (method, variant)]
            groups = {name: [row for row in own if row["forget"] == name] for name in sets}
            if usual and all(groups.values()):
                groups = {"all": own} | groups
            for name, group in groups.items():
                if group:
                    summaries.append(_summary(group, name, len(sets) if name == "all" else 1, figures))
    return sorted(summaries, key=lambda one: (one.data, one.model, one.forget != "all", one.forget))


def _summary(rows: Sequence[Row], forget: str, num_sets: int, asked: Sequence[Figure]) -> Summary:
    first = rows[0]
    unit = "training_seed" if len({row["training_seed"] for row in rows}) > 1 else "unlearning_seed"
    by_seed: dict[int, list[Row]] = {}
    for row in rows:
        by_seed.setdefault(row[unit], []).append(row)
    whole = [group for group in by_seed.values() if len({row["forget"] for row in group}) == num_sets]
    figures: dict[str, Interval] = {}
    for figure in asked:
        found = [[value for row in group if (value := figure.of(row)) is not None] for group in whole]
        # what was measured of one set alone is not that of all
        values = [fmean(each) for each in found if each and (num_sets == 1 or len(each) >= num_sets)]
        if values:
            figures[figure.name] = mean_interval((torch.tensor(values, dtype=torch.float64),))
    return Summary(
        first["data"],
        first["model_spec"],
        forget,
        first["method"],
        first["variant"],
        first["reads"],
        len(whole),
        figures,
    )


def separated_best(intervals: Mapping[str, Interval], best: Literal["low", "high"]) -> str | None:
    """Return the one whose interval lies wholly beyond all others'; None where none does, or where it is alone.

    An interval of one seed is unbounded, so nothing is best by one seed.
    """
    if len(intervals) < 2:
        return None
    sign = 1 if best == "high" else -1
    first = max(intervals, key=lambda name: sign * intervals[name].value)
    own = intervals[first]
    edge = own.low if best == "high" else -own.high
    others = [one.high if best == "high" else -one.low for name, one in intervals.items() if name != first]
    return first if all(edge > other for other in others) else None


# Tables for people


def markdown(summaries: Sequence[Summary], rows: Sequence[Row]) -> str:
    """Return all tables as Markdown, with what failed and what tuning found."""
    parts = [_explained(rows)]
    for (data, model, forget), group in _grouped(summaries).items():
        header = ["method", "reads", "n", *(figure.title for figure in FIGURES)]
        lines = [
            f"## {data}, {model}, forget {forget}\n",
            f"| {' | '.join(header)} |",
            f"|{'---|' * len(header)}",
            *(f"| {' | '.join(cells)} |" for cells in _targets(rows, data, model, forget)),
        ]
        marks = _marks(group)
        for one in _ranked(group):
            cells = [
                f"**{text}**" if marks[figure.name] == one.label else text
                for figure in FIGURES
                for text in [_shown(one, figure)]
            ]
            lines.append(f"| {' | '.join([one.label, one.reads, str(one.seeds), *cells])} |")
        parts.append("\n".join(lines))
    tuned = dict.fromkeys(
        (row["data"], row["model"], row["method"], row["settings"] or "as by default", row["selected_by"])
        for row in rows
        if row["variant"] == "tuned" and row["status"] == "done"
    )
    if tuned:
        told = [
            f"- {method} ({data}, {model}): {settings}; by {looked}" for data, model, method, settings, looked in tuned
        ]
        parts.append("\n".join(["## What tuning chose\n", *told]))
    failed = [f"- `{row['id']}`: {row['error']}" for row in rows if row["status"] == "failed"]
    if failed:
        parts.append("\n".join(["## Failed\n", *failed]))
    return "\n\n".join(parts) + "\n"


def latex(summaries: Sequence[Summary], rows: Sequence[Row]) -> str:
    """Return all tables as LaTeX, for the package booktabs."""
    parts = []
    for (data, model, forget), group in _grouped(summaries).items():
        header = ["method", "reads", "n", *(figure.title for figure in FIGURES)]
        lines = [
            f"% {data}, {model}, forget {forget}",
            rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}",
            r"\toprule",
            " & ".join(map(_escaped, header)) + r" \\",
            r"\midrule",
            *(" & ".join(map(_escaped, cells)) + r" \\" for cells in _targets(rows, data, model, forget)),
            r"\midrule",
        ]
        marks = _marks(group)
        for one in _ranked(group):
            cells = [
                rf"\textbf{{{text}}}" if marks[figure.name] == one.label else text
                for figure in FIGURES
                for text in [_escaped(_shown(one, figure))]
            ]
            lines.append(" & ".join([_escaped(one.label), _escaped(one.reads), str(one.seeds), *cells]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _explained(rows: Sequence[Row]) -> str:
    """Say what the tables show, and on what they were measured."""
    done = [row for row in rows if row["status"] == "done"]
    where = {(row["device"], row["threads"], row["torch"]) for row in done}
    machines = "; ".join(f"{device}, {threads} threads, torch {version}" for device, threads, version in sorted(where))
    seeds = len({row["training_seed"] for row in rows})
    return (
        f"{len(done)} cells done, {len(rows) - len(done)} failed, {seeds} training seeds. Measured on: {machines}.\n\n"
        "Mean ± half of the 95 % Student interval over n seeds. A_f, A_r: accuracy on held-out samples of the "
        "forgotten and of the other classes. Gaps: distance to the model retrained without the classes, in points. "
        "ToW: tug of war, 1 is like the retrained one. Probe: accuracy of a linear probe of the last features on the "
        "forgotten classes. Retrained, another seed: how far models retrained by two training seeds lie apart (n: "
        "pairs); by less no method is told from them. **Bold**: nearest to the retrained model, where the interval "
        "overlaps no other method's (controls stand aside)."
    )


def _targets(rows: Sequence[Row], data: str, model: str, forget: str) -> list[list[str]]:
    """Return the rows of the original and of the retrained model, means over what the cells saw of them."""
    here = [
        row
        for row in comparable(rows)  # what others start from is no original of theirs
        if (row["data"], row["model_spec"], row["status"]) == (data, model, "done") and forget in ("all", row["forget"])
    ]
    lines = []
    for role in ("original", "retrained"):
        cells = []
        for figure in FIGURES:
            column = "reference_seconds" if (role, figure.name) == ("retrained", "seconds") else f"{role}_{figure.name}"
            values = [row[column] for row in here if row.get(column) is not None]
            scale = 1 if figure.name == "seconds" else 100
            cells.append(f"{scale * fmean(values):.{figure.digits}f}" if values else "")
        if any(cells):
            lines.append([f"*{role}*", "", "", *cells])
    apart, pairs = between_retrained(here)
    if pairs:
        shown_here = [f"{apart[f.name]:.{f.digits}f}" if f.name in apart else "" for f in FIGURES]
        lines.append(["*retrained, another seed*", "", str(pairs), *shown_here])
    return lines


def between_retrained(rows: Sequence[Row]) -> tuple[dict[str, float], int]:
    """Return how far models retrained by different training seeds lie apart, and of how many pairs that is the mean.

    No method can be told from retraining by less. Gaps are in points, as in FIGURES; empty where there is one seed.
    """
    columns = {
        "forget_gap": "forget_accuracy",
        "retain_gap": "retain_accuracy",
        "test_gap": "test_accuracy",
        "linear_probe_gap": "linear_probe",
    }
    models = {
        (row["forget"], row["training_seed"]): row for row in rows if row["retrained_retain_accuracy"] is not None
    }
    pairs = [
        (models[one], models[other]) for one in models for other in models if one[0] == other[0] and one[1] < other[1]
    ]
    found: dict[str, list[float]] = {}
    for one, other in pairs:
        gaps = {
            name: abs(one[f"retrained_{column}"] - other[f"retrained_{column}"])
            for name, column in columns.items()
            if None not in (one[f"retrained_{column}"], other[f"retrained_{column}"])
        }
        for name, gap in gaps.items():
            found.setdefault(name, []).append(100 * gap)
        factors = [gaps[name] for name in ("forget_gap", "retain_gap", "test_gap") if name in gaps]
        if len(factors) == 3:  # as in every method's
            found.setdefault("tug_of_war", []).append(tug_of_war(factors))
    return {name: fmean(values) for name, values in found.items()}, len(pairs)


def _grouped(summaries: Sequence[Summary]) -> dict[tuple[str, str, str], list[Summary]]:
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for one in summaries:
        groups.setdefault((one.data, one.model, one.forget), []).append(one)
    return groups


def _ranked(group: Sequence[Summary]) -> list[Summary]:
    """Return methods by tug of war, the best first, then the controls."""

    def key(one: Summary) -> tuple[bool, float]:
        found = one.figures.get("tug_of_war")
        return one.method in CONTROLS, -(found.value if found else -math.inf)

    return sorted(group, key=key)


def _marks(group: Sequence[Summary]) -> dict[str, str | None]:
    """Return for each figure the label of the method to mark: beyond all other methods, not beyond its own variants."""
    marks: dict[str, str | None] = {}
    for figure in FIGURES:
        rivals = [one for one in group if one.method not in CONTROLS and figure.name in one.figures]
        if figure.best is None or not rivals:
            marks[figure.name] = None
            continue
        ranked = sorted(rivals, key=lambda one: one.figures[figure.name].value)
        first = ranked[-1 if figure.best == "high" else 0]
        others = [one for one in rivals if one is first or one.method != first.method]
        marks[figure.name] = separated_best({one.label: one.figures[figure.name] for one in others}, figure.best)
    return marks


def _shown(one: Summary, figure: Figure) -> str:
    found = one.figures.get(figure.name)
    return "" if found is None else shown(found, figure)


def shown(found: Interval, figure: Figure) -> str:
    """Return mean ± half width; the mean alone where one seed tells no width."""
    text = f"{found.value:.{figure.digits}f}"
    if not math.isfinite(found.high):
        return text
    return f"{text} ± {(found.high - found.low) / 2:.{figure.digits}f}"


def _escaped(text: str) -> str:
    for plain, tex in (("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$"), ("*", "")):
        text = text.replace(plain, tex)
    return text
