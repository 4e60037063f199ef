"""The sections of the page: each takes a record and returns its tables and charts, or None where it holds none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.report.figures import (
    CORRELATION,
    DECIMAL,
    SHARE,
    SIDES,
    Board,
    Chart,
    Line,
    Row,
    Scale,
    board,
    bounds,
    fitting,
    kind,
    round_up,
    row,
    seconds,
    sentence,
    told,
)
from expunge.schema import TRIAL_WORDS, has_retrained

Part = Mapping[str, Any]

MOST_ROWS = 20
"""Of a figure; further ones are in a table that opens."""


# At the output


def of_metrics(metrics: Part, key: str, name: str | None = None) -> dict[str, Part]:
    """Return one figure, or that of one class, by role, with the bounds that the record holds."""
    found: dict[str, Part] = {}
    for role, side in SIDES.items():
        one = metrics.get(side) or {}
        value = one.get(key) if name is None else (one.get(key) or {}).get(name)
        intervals = one.get("intervals" if name is None else "per_class_intervals") or {}
        low, high = (intervals.get(name or key) or [None, None])[:2]
        found[role] = value if isinstance(value, Mapping) else {"value": value, "low": low, "high": high}
    return found


def compared(record: Part) -> bool:
    """Return whether figures stand beside those of a retrained model, and not of the original."""
    return has_retrained(record["metrics"], record.get("self_checks") or ())


def gaps_of(record: Part) -> tuple[Part, str]:
    """Return gaps to the retrained model, or to the original where there is none, and what they are called."""
    metrics = record["metrics"]
    if compared(record):
        return metrics.get("gaps") or {}, "gap to retrained"
    return metrics.get("gaps_to_original") or {}, "gap to original"


def classes(record: Part) -> Board | None:
    """Accuracy by class: the forgotten first; of many, then those that lost most."""
    metrics, names = record["metrics"], record["classes"]
    notes = dict.fromkeys(names.get("forgotten_before") or (), "forgotten before")
    notes = dict.fromkeys(names["forget"], "forgotten") | notes
    before, after = (metrics[side].get("per_class_accuracy") or {} for side in ("before", "after"))
    others = [name for name in names["all"] if name not in notes]
    if len(names["all"]) > MOST_ROWS:
        others.sort(key=lambda name: (after.get(name) or 0) - (before.get(name) or 0))
    rows = [
        row(name, of_metrics(metrics, "per_class_accuracy", name), note=notes.get(name, ""))
        for name in [*notes, *others]
    ]
    return board("Accuracy on held-out images of each class", rows, SHARE, shown=MOST_ROWS, first="class")


def answers(record: Part) -> Board | None:
    """Which classes images of the forgotten ones are called: of many, the most frequent first."""
    metrics, names = record["metrics"], record["classes"]
    found = {name: of_metrics(metrics, "forget_prediction_distribution", name) for name in names["all"]}
    most = {name: max(one["value"] or 0 for one in by_role.values()) for name, by_role in found.items()}
    called = [name for name in names["all"] if most[name]]
    if len(called) > MOST_ROWS:
        called.sort(key=lambda name: -most[name])
    rows = [
        row(
            name,
            {role: {"value": one["value"]} for role, one in found[name].items()},
            note="forgotten" if name in names["forget"] else "",
        )
        for name in called
    ]
    return board(
        "Share of held-out images of the forgotten classes that are called so",
        rows,
        SHARE,
        shown=MOST_ROWS,
        stems=True,
        first="called",
    )


OUTPUT = (
    ("test_accuracy", "Accuracy on all held-out images", SHARE, ""),
    ("forget_train_accuracy", "Accuracy on training images of forgotten classes", SHARE, "as the retrained model"),
    ("retain_calibration_error", "Calibration error on classes that stay", SHARE, "low"),
    ("forget_prediction_entropy_bits", "Entropy of the classes above, bits", DECIMAL, "as the retrained model"),
    ("zero_retrain_forgetting", "Likeness to a network that learned nothing (ZRF)", DECIMAL, "as the retrained model"),
    ("tug_of_war", "Tug of war, against the retrained model", DECIMAL, "1 is best"),
    ("activation_distance", "Distance of the answers to the retrained model's", DECIMAL, "0 is best"),
    ("prediction_divergence_bits", "Divergence of the classes above from its, bits", DECIMAL, "0 is best"),
)


def output(record: Part) -> Board | None:
    """The other figures of the answers, as numbers."""
    rows = [row(name, of_metrics(record["metrics"], key), scale, note=note) for key, name, scale, note in OUTPUT]
    return board("Figures at the output", rows, None, titled=False)


# Attacks


IN_OTHER_SECTIONS = ("linear_probe", "nearest_class_mean", "relearn", "where_it_looks", "feature_map")
SCALES = {"where_it_looks": CORRELATION, "rmia": DECIMAL, "u_lira": DECIMAL, "forgetting_quality": DECIMAL}
"""Attacks whose figures are no shares of images."""
TARGETS = {"low": "low is good", "high": "high is good", "none": "only told"}
NO_MODELS = ("gap", "gap_to_original", "noise_floor")


def figures_of(record: Part, audit: str) -> Part:
    return ((record.get("audits") or {}).get(audit) or {}).get("figures") or {}


def models(figure: Part) -> dict[str, Part]:
    """Return what of a figure is of a model, by role."""
    return {role: one for role, one in figure.items() if role not in NO_MODELS}


def gap_of(figure: Part, record: Part) -> Part | None:
    return figure.get("gap" if compared(record) else "gap_to_original")


def inside(record: Part) -> list[dict[str, Any]]:
    """The probe and the nearest class mean, from the first block to the input of the head."""
    found = [name for name in ("linear_probe", "nearest_class_mean") if figures_of(record, name)]
    return [one for name in found if (one := attack(record, name, SHARE, first="features"))]


def attacks(record: Part) -> dict[str, Any] | None:
    """The other attacks, each with its table, and why some were not run."""
    boards, skipped = [], []
    for name, found in (record.get("audits") or {}).items():
        if found.get("skipped"):
            skipped.append((words(name), sentence(found["skipped"])))
        elif name not in IN_OTHER_SECTIONS:
            values = [
                one["value"]
                for figure in figures_of(record, name).values()
                for one in models(figure).values()
                if one and one.get("value") is not None
            ]
            boards.append(attack(record, name, SCALES.get(name) or fitting(values)))
    made = [one for one in boards if one]
    return {"boards": made, "skipped": skipped} if made or skipped else None


def attack(record: Part, audit: str, scale: Scale, *, first: str = "figure") -> dict[str, Any] | None:
    """Return one audit's table, with what it says and costs; None where it has no figure."""
    found = record["audits"][audit]
    rows = []
    for name, figure in figures_of(record, audit).items():
        notes = [TARGETS.get((found.get("targets") or {}).get(name) or "", "")]
        if compared(record) and (floor := figure.get("noise_floor")):
            notes.append(f"two retrained models differ by {_gap_told(floor, scale)}")
        shots = f"{name} image{'s' if name != '1' else ''} of each class"
        rows.append(
            row(
                shots if audit == "few_shot" and name.isdigit() else name,
                models(figure),
                scale,
                gap=gap_of(figure, record),
                note="; ".join(filter(None, notes)),
            )
        )
    order: list[str] = next((one["blocks"] for one in (found.get("details") or {}).values() if "blocks" in one), [])
    rows.sort(key=lambda one: (order.index(one.name) if one.name in order else -1, _counted(one.name)))
    made = board(heading(audit), rows, scale, first=first, gap_title=gaps_of(record)[1], titled=False)
    return {"board": made, **about(record, audit)} if made else None


def _gap_told(gap: Part, scale: Scale) -> str:
    share = scale.unit == "share"
    value = told(gap.get("value"), "points" if share else scale.unit, signed=True)
    return f"{value}{' points' if share else ''} {bounds(gap, scale.unit, signed=True)}".strip()


def about(record: Part, audit: str) -> dict[str, str]:
    found = record["audits"][audit]
    return {
        "name": heading(audit),
        "says": sentence(found.get("says") or ""),
        "source": sentence(found.get("source") or ""),
        "seconds": seconds(found.get("seconds")),
    }


def _counted(name: str) -> list[tuple[int, str]]:
    """Return a key to sort names by in which 4 comes before 11, and the input of the head last."""
    parts = re.split(r"(\d+)", name)
    counted = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return [(int(name == "head input"), ""), *counted]


def words(name: str) -> str:
    return name.replace("_", " ")


def heading(audit: str) -> str:
    """Return an attack's name as a heading."""
    told = words(audit)
    return re.sub(r"\br?mia\b", lambda found: found[0].upper(), told[0].upper() + told[1:], flags=re.IGNORECASE)


def relearn(record: Part) -> dict[str, Any] | None:
    """The curves, the steps it takes, and the area under the curve."""
    found = (record.get("audits") or {}).get("relearn") or {}
    if found.get("skipped") or not found.get("figures"):
        return None
    details = {role: one for role, one in (found.get("details") or {}).items() if one}
    cap = max([one["cap"] for one in details.values() if one.get("cap")], default=40)
    scale = Scale(high=max(1, cap), unit="count", ticks=tuple(max(1, cap) * part / 4 for part in range(5)))
    title, steps, areas = gaps_of(record)[1], [], []
    for name, figure in found["figures"].items():
        cut = [role for role, one in details.items() if any((one.get("censored") or {}).get(name) or ())]
        if name == "area":
            note = "share of the goal, mean over all steps: more comes back sooner"
            areas.append(row("area under the curve", models(figure), gap=gap_of(figure, record), note=note))
        else:
            steps.append(row(name, models(figure), scale, gap=gap_of(figure, record), beyond=cut))
    boards = (
        board("Steps of training until that share of the original's accuracy is back", steps, scale, gap_title=title),
        board("How much came back, over all steps", areas, SHARE, gap_title=title),
    )
    found_ratios = (found.get("compared") or {}) if compared(record) else {}
    ratios = [f"{name}: {told(one, 'plain')}" for name, one in found_ratios.items() if one is not None]
    return {
        "chart": _curves(details, cap),
        "boards": [one for one in boards if one],
        "ratios": ratios,
        **about(record, "relearn"),
    }


def _curves(details: Mapping[str, Part], cap: float) -> Chart | None:
    """Return accuracy after each step of training, one line for each seed of each model."""
    curves = [
        (role, f"{role}, seed {number}" if len(one["curves"]) > 1 else role, curve)
        for role, one in details.items()
        for number, curve in enumerate(one.get("curves") or (), 1)
        if isinstance(curve, (list, tuple)) and curve and all(isinstance(value, (int, float)) for value in curve)
    ]
    if not curves:
        return None
    longest = max(len(curve) for _, _, curve in curves)
    last = max(2, round(cap), longest)
    place = Scale(low=1, high=last).place
    goals: Part = next((one["goals"] for one in details.values() if one.get("goals")), {})
    return Chart(
        caption="Accuracy on held-out images of the forgotten classes, while training on all classes",
        says=" ".join(
            f"{name}: {told(curve[0])} after one step, {told(curve[-1])} after {len(curve)}."
            for _, name, curve in curves
        ),
        x_title="optimizer steps",
        x_ticks=[(place(step), str(step)) for step in sorted({1, *(round(last * part / 4) for part in range(1, 5))})],
        y_ticks=SHARE.marks(SHARE.height),
        lines=[
            Line(name, kind(role), [(place(step), SHARE.height(value)) for step, value in enumerate(curve, 1)])
            for role, name, curve in curves
        ],
        legend=[(kind(role), role) for role in dict.fromkeys(role for role, _, _ in curves)],
        head=["step", *(name for _, name, _ in curves)],
        rows=[
            (place(step), [str(step), *(told(curve[step - 1]) if step <= len(curve) else "" for _, _, curve in curves)])
            for step in range(1, longest + 1)
        ],
        guides=[(SHARE.height(goal), name) for name, goal in goals.items() if goal is not None],
        guide_title="share of the original's accuracy",
    )


# Signals of the calibration


def signals(record: Part) -> dict[str, Any] | None:
    """What the calibration read, in the order it was read, and the rates it tried."""
    found = record.get("calibration")
    if not found:
        return None
    read = found.get("signals") or []
    kinds = dict.fromkeys(name for one in read for name in one.get("impressions_called") or {})
    called = {
        f"{name} impressions": [(one.get("impressions_called") or {}).get(name) for one in read] for name in kinds
    }
    called["probability of the classes"] = [one.get("class_probability") for one in read]
    kept = {
        "accuracy": [one.get("retain_accuracy") for one in read],
        "agreement with the original": [one.get("retain_agreement") for one in read],
    }
    apart = [told(one.get("retain_divergence"), "plain") for one in read]
    goal = ((record.get("config") or {}).get("calibration") or {}).get("called")
    charts = (
        _over_reads("Are the classes still called?", read, called, goal),
        _over_reads("Is the rest still there? Held-out retained images", read, kept, None, nats=apart),
    )
    facts = {
        "impair rate": "impair_rate",
        "repair rate": "repair_rate",
        "batches of": "batch_size",
        "rounds": "rounds",
        "held-out retained images": "held_out",
        "retained images that are trained on too": "trained_on",
    }
    return {
        "reached": found.get("reached"),
        "why": sentence(found.get("why") or ""),
        "facts": [
            f"{name} {found[key]:{'.3g' if key.endswith('rate') else 'g'}}"
            for name, key in facts.items()
            if found.get(key) is not None and (found[key] or key != "trained_on")
        ],
        "charts": [chart for chart in charts if chart],
        "trials": [_trial(one) for one in found.get("trials") or ()],
    }


def _trial(trial: Part) -> list[str]:
    rate, outcome = trial.get("rate"), trial.get("outcome") or "–"
    return [
        told(trial.get("round"), "count"),
        "–" if rate is None else f"{rate:.3g}",
        told(trial.get("steps"), "count"),
        TRIAL_WORDS.get(outcome, outcome),
        told(trial.get("still_called")),
        told(trial.get("retain_agreement")),
    ]


def _over_reads(
    caption: str,
    read: Sequence[Part],
    series: Mapping[str, Sequence[float | None]],
    goal: float | None,
    *,
    nats: Sequence[str] | None = None,
) -> Chart | None:
    """Return a chart over the times that signals were read, evenly spaced, with the phases beneath."""
    series = {name: values for name, values in series.items() if any(value is not None for value in values)}
    if not read or not series:
        return None
    place = Scale(low=-0.5, high=len(read) - 0.5).place
    lines = [
        Line(
            name,
            f"tone-{1 + (number - 1) % 4}",
            [(place(at), SHARE.height(value)) for at, value in enumerate(values) if value is not None],
        )
        for number, (name, values) in enumerate(series.items(), 1)
    ]
    rows = []
    for number, one in enumerate(read):
        moment = f"{one.get('phase') or ''} {told(one.get('step'), 'count')}".strip()
        cells = [told(values[number]) for values in series.values()]
        rows.append((place(number), [moment, *cells, *([nats[number]] if nats else [])]))
    bands = _phases(read)
    return Chart(
        caption=caption,
        says=" ".join(
            f"{name}: {told(values[0])} at first, {told(values[-1])} at last." for name, values in series.items()
        ),
        x_title="each time the signals were read",
        x_ticks=[((start + end) / 2, name) for start, end, name in bands if end - start >= 12],
        y_ticks=SHARE.marks(SHARE.height),
        lines=lines,
        legend=[(line.kind, line.name) for line in lines],
        head=["phase and step", *series, *(["divergence from the original, nats"] if nats else [])],
        rows=[*rows],
        guides=[] if goal is None else [(SHARE.height(goal), f"{100 * goal:g} %")],
        guide_title="goal for impressions",
        bands=[(start, end) for start, end, _ in bands],
    )


def _phases(read: Sequence[Part]) -> list[tuple[float, float, str]]:
    """Return where each phase begins and ends, in percent, and its name."""
    found, start = [], 0
    for number, one in enumerate(read, 1):
        if number == len(read) or read[number].get("phase") != one.get("phase"):
            found.append((100 * start / len(read), 100 * number / len(read), one.get("phase") or ""))
            start = number
    return found


# Weights


def weights(record: Part) -> dict[str, Any] | None:
    """How far each weight tensor is from the original's, drawn in the order of the network."""
    metrics = record["metrics"]
    after, retrained = ((metrics.get(side) or {}).get("weight_distance") or {} for side in ("after", "retrained"))
    found = {
        "unlearned from original": after.get("to_original"),
        "retrained from original": retrained.get("to_original"),
        "unlearned from retrained": after.get("to_retrained"),
    }
    columns: dict[str, Part] = {name: tensors for name, tensors in found.items() if tensors}
    names = list(dict.fromkeys(name for tensors in columns.values() for name in tensors if name != "total"))
    if not names:
        return None
    # biases begin near zero, so that their relative distance says little: they are told, not drawn
    drawn = [name for name in names if not name.endswith("bias")] or names

    def relative(column: str, name: str) -> float | None:
        value: float | None = (columns[column].get(name) or {}).get("relative")
        return value

    lines = {column: column.split()[0] for column in columns if column.endswith("original")}
    largest = max([relative(column, name) or 0 for column in lines for name in drawn], default=0)
    top = round_up(max(largest, 0.01))
    scale = Scale(high=top, ticks=tuple(top * part / 4 for part in range(5)))
    place = Scale(low=-0.5, high=len(drawn) - 0.5).place
    aside = dict(zip(lines, (-0.12, 0.12), strict=False))  # beside each other
    rows: list[tuple[float | None, list[str]]] = []
    for name in [*names, "total"]:
        at = place(drawn.index(name)) if name in drawn else None
        rows.append((at, [name, *(told(relative(column, name)) for column in columns)]))
    chart = Chart(
        caption="Distance of each weight tensor from the original's, relative to its norm",
        says=f"{len(drawn)} tensors, from {drawn[0]} to {drawn[-1]}; their numbers are in the table.",
        x_title="weight tensors, from the first layer to the last",
        x_ticks=[],
        y_ticks=scale.marks(scale.height),
        lines=[
            Line(
                column,
                role,
                [
                    (place(number + aside[column]), scale.height(value))
                    for number, name in enumerate(drawn)
                    if (value := relative(column, name)) is not None
                ],
                stems=True,
            )
            for column, role in lines.items()
        ],
        legend=[(role, column) for column, role in lines.items()],
        head=["tensor", *columns],
        rows=rows,
    )
    return {
        "chart": chart,
        "total": [(column, told(relative(column, "total"))) for column in columns],
        "hidden": len(names) - len(drawn),
    }


# What limits it, and what made it


def untested(record: Part) -> list[str]:
    """What an audit says it left open; of `expunge forget`, what an audit would tell."""
    if record.get("verdict"):
        return list(record["verdict"].get("not_tested") or ())
    known = ["what the features inside still know of the classes", "how fast they are relearned"]
    known.append("what an attacker can tell: whether an image was trained on, which classes are gone")
    return known if record["metrics"].get("retrained") else [*known, "how a model trained without the classes does"]


def doubts(record: Part) -> list[dict[str, str]]:
    """The self-checks, those that did not pass first."""
    tags = {False: ("no", "✕", "warning"), None: ("unknown", "?", "cannot be told"), True: ("yes", "✓", "fine")}
    checks = sorted(record.get("self_checks") or (), key=lambda check: [*tags].index(check.get("ok")))
    return [
        {
            **dict(zip(("answer", "sign", "word"), tags[check.get("ok")], strict=True)),
            "name": check.get("name") or "",
            "finding": check.get("finding") or "",
            "sentence": sentence(check.get("sentence") or ""),
        }
        for check in checks
    ]


def settings(record: Part) -> dict[str, Any]:
    """Every setting as a name and a value, and what was read of each class."""
    read, names = record.get("samples_read") or {}, record["classes"]["all"]
    kinds = ("retain_sample", "method", "evaluation", "evaluation_training")
    columns = [key for key in kinds if any((read.get(key) or {}).values())]
    method = {"method": record["method"], "seed": record.get("seed"), **(record.get("config") or {})}
    if method.get("audits") == []:
        method["audits"] = "all of the default budget"
    tables = {"Method": method} | {
        name.capitalize(): record.get(name) or {} for name in ("model", "data", "environment")
    }
    hashes = {name: part for name, part in (record.get("provenance") or {}).items() if name != "parts"}
    tables["Hashes"] = {"content": record["content_hash"], **hashes} if record.get("content_hash") else hashes
    return {
        "tables": {title: flat(part) for title, part in tables.items() if part},
        "read_head": [words(key) for key in columns],
        "read": [[name, *(told(read[key].get(name), "count") for key in columns)] for name in names] if columns else [],
    }


def flat(part: Part, before: str = "") -> list[tuple[str, str]]:
    """Return settings as names and words; parts within parts have a dot between."""
    rows: list[tuple[str, str]] = []
    for name, value in part.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{before}{name}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            rows += flat({str(number): one for number, one in enumerate(value, 1)}, f"{before}{name}.")
        else:
            rows.append((f"{before}{name}", _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if value is None or value in ([], ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def summary_rows(record: Part, names: str) -> list[Row]:
    """Return what the first screen tells of each model."""
    metrics, gaps = record["metrics"], gaps_of(record)[0]
    told_keys = (
        (f"Forgotten: {names}", "forget_accuracy", "answered rightly"),
        ("Classes that stay", "retain_accuracy", "answered rightly"),
        ("The same, forgotten answers not allowed", "masked_retain_accuracy", ""),
        ("Classes that stay, called forgotten", "false_forget_rate", ""),
    )
    rows = [row(name, of_metrics(metrics, key), gap=gaps.get(key), note=note) for name, key, note in told_keys]
    probe = figures_of(record, "linear_probe").get("head input")
    if probe:
        name = "Forgotten, found inside by a linear probe"
        rows.append(row(name, models(probe), gap=gap_of(probe, record)))
    return rows
