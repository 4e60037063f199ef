"""What the page of a benchmark shows: the summary in words, leaderboards, charts, and the table of cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from expunge.report.figures import Mark, Scale, bounds, listed, seconds, told
from expunge.report.rerun import rerun_bench
from expunge.report.scatter import MARKS, Scatter, scatters
from expunge.report.sections import flat

Part = Mapping[str, Any]

KINDS = {
    "zero-glance": "reads no image of the classes",
    "reads forget data": "reads images of the classes",
    "control": "control",
}


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One row of a leaderboard."""

    place: str
    label: str
    method: str
    variant: str
    mark: str
    kind: str
    note: str
    best: bool
    drawn: Mark  # accuracy on the other classes
    beyond: str  # where it lies left of the axis: in words
    cells: list[tuple[str, str]]  # figure and its interval


@dataclass(frozen=True, kw_only=True)
class Group:
    """One data set, model and set of classes."""

    key: str
    title: str
    forget: str
    data: str  # names of the data set and of the model, as the table of cells has them
    model: str
    says: list[str]
    ranks: list[Rank]
    roles: list[tuple[str, list[str]]]  # the original and the retrained model, and their figures
    ticks: list[tuple[float, str]]
    target: float | None  # where the retrained model's accuracy lies
    charts: list[Scatter]
    first: bool  # of its data set and model


def bench_page(record: Part) -> dict[str, Any]:
    """Return all that the template shows of a benchmark that `check_bench` lets through."""
    table = record["table"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    seen: set[tuple[str, str]] = set()
    groups = []
    for number, group in enumerate(record["groups"], 1):
        place = (group["data"], group["model"])
        groups.append(_group(group, number, rows, first=place not in seen))
        seen.add(place)
    methods = _counted(len({row["method"] for row in rows}), "method")
    return {
        "title": f"Benchmark {record['suite']}: {methods} side by side",
        "suite": record["suite"],
        "lead": _lead(record["cells"]),
        "facts": _facts(record, rows),
        "groups": groups,
        "kinds": [(mark, KINDS[kind]) for kind, mark in MARKS.items() if any(row["kind"] == kind for row in rows)],
        "rule": record.get("rule") or "",
        "targets": {role for group in groups for chart in group.charts for role, _, _ in chart.targets},
        **_table(rows),
        "failed": record.get("failed") or [],
        "missing": [row["id"] for row in rows if row["status"] == "missing"],
        "settings": {f"Machine {number}": flat(one) for number, one in enumerate(record.get("machines") or (), 1)},
        "command": rerun_bench(record),
        "versions": sorted({one["expunge"] for one in record.get("machines") or () if one.get("expunge")}),
        "schema_version": record["schema_version"],
    }


# In words


def _lead(cells: Part) -> str:
    planned, done = cells.get("planned") or 0, cells.get("done") or 0
    lines = [
        f"{done:,} of {_counted(planned, 'cell')} {'is' if done == 1 else 'are'} done: each is one run of one method."
    ]
    failed, missing = cells.get("failed") or 0, cells.get("missing") or 0
    if failed:
        lines.append(f"{failed:,} failed, with the error below.")
    if missing:
        lines.append(f"{missing:,} {'is' if missing == 1 else 'are'} not there yet.")
    return " ".join(lines if failed or missing else [*lines, "None failed, none is missing."])


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _facts(record: Part, rows: Sequence[Part]) -> list[tuple[str, str]]:
    """Return what was run, on what, and what it took."""
    values = {name: list(dict.fromkeys(row[name] for row in rows)) for name in COLUMNS_OF_FACTS}
    tuned = sum(row["variant"] == "tuned" for row in rows)
    ran = [
        f"{_counted(len(values['method']), 'method')} on {listed(values['data'])} with {listed(values['model_spec'])}",
        f"forgetting {'; '.join(values['forget'][:12])}{' and more' if len(values['forget']) > 12 else ''}",
        _counted(len(values["training_seed"]), "training seed"),
        f"{tuned:,} of the cells with settings that were searched for" if tuned else "",
    ]
    machines = [
        f"{one.get('device') or 'unknown'}, {_counted(one.get('threads') or 0, 'thread')}, {one.get('platform') or ''}"
        for one in record.get("machines") or ()
    ]
    versions = [
        f"expunge {one.get('expunge')}, torch {one.get('torch')}, Python {one.get('python')}"
        for one in record.get("machines") or ()
    ]
    work = record.get("work_seconds") or {}
    took = [f"{seconds(work[name])} {words}" for name, words in WORK.items() if work.get(name)]
    told_facts = {
        "Suite": f"{record['suite']}: {record.get('says') or ''}",
        "Ran": "; ".join(filter(None, ran)),
        "On": "; ".join(dict.fromkeys(machines)) if machines else "",
        "With": "; ".join(dict.fromkeys(versions)) if versions else "",
        "Took": f"{', '.join(took)}, all processes together" if took else "",
    }
    return [(name, text) for name, text in told_facts.items() if text]


COLUMNS_OF_FACTS = ("method", "data", "model_spec", "forget", "training_seed")
WORK = {"models": "to train models", "tuning": "to search for settings", "cells": "for the cells"}


# Leaderboards


def _group(group: Part, number: int, rows: Sequence[Part], *, first: bool) -> Group:
    sets = group.get("sets") or [group["forget"]]
    together = group["forget"] == "all" and len(sets) > 1
    what = f"{'; '.join(sets[:4])}{' and more' if len(sets) > 4 else ''} (mean)" if together else group["forget"]
    cells = set(group.get("cells") or ())  # records of older versions do not name them
    here = [
        (at, row)
        for at, row in enumerate(rows)
        if row["status"] == "done"
        and (row["data"], row["model_spec"]) == (group["data"], group["model"])
        and (together or row["forget"] == group["forget"])
        and (not cells or row["id"] in cells)
    ]
    roles = group.get("roles") or {}
    standings = group["standings"]
    scale = _scale(standings, roles)
    retrained = (roles.get("retrained") or {}).get("retain_accuracy")
    return Group(
        key=f"board-{number}",
        title=f"{group['data']}, {group['model']}, forgetting {what}",
        forget="" if together else group["forget"],
        data=group["data"],
        model=here[0][1]["model"] if here else "",
        says=_findings(standings),
        ranks=[_rank(one, scale) for one in standings],
        roles=[(role, _role(one)) for role, one in roles.items() if one],
        ticks=scale.marks(),
        target=None if retrained is None else scale.place(retrained),
        charts=scatters(here, roles),
        first=first,
    )


def _findings(standings: Sequence[Part]) -> list[str]:
    """Return who is in front, who of those that read no image of the classes, and what misses the goals."""
    methods = [one for one in standings if one["kind"] != "control"]
    front = [one for one in methods if one.get("place") is not None]
    if not front:
        return ["No method empties the classes and keeps the rest."] if methods else []
    count = _counted(len(methods), "method")
    lines = [f"{len(front)} of {count} (variants counted) empty the classes and keep the rest."]
    ahead = [one for one in front if one["place"] == 1]
    best = next((one for one in front if one.get("best")), None)
    if best is not None:
        lines.append(f"Best on the other classes, apart from all other methods: {_named(best)}.")
    else:
        lines.append(
            f"Most accuracy on the other classes: {_named(ahead[0])}"
            + (
                f"; {len(ahead) - 1} more share its place, as the seeds do not tell them apart."
                if len(ahead) > 1
                else "."
            )
        )
    blind = [one for one in front if one["kind"] == "zero-glance"]
    if blind:
        lines.append(f"Of those that read no image of the classes: {_named(max(blind, key=_kept))}.")
    elif any(one["kind"] == "zero-glance" for one in methods):
        lines.append("None of those that read no image of the classes does.")
    return lines


def _kept(one: Part) -> float:
    return (one["figures"].get("retain_accuracy") or {}).get("value") or 0.0


def _named(one: Part) -> str:
    found = one["figures"].get("retain_accuracy") or {}
    return f"{one['label']}, {told(found.get('value'))} {bounds(_cut(found, 1.0), 'share')}".strip()


def _scale(standings: Sequence[Part], roles: Part) -> Scale:
    """Return an axis on which those in front can be told apart; what lies left of it is told in words."""
    found = [one["figures"].get("retain_accuracy") or {} for one in standings if one.get("place") is not None]
    values = [part[key] for part in found for key in ("value", "low") if part.get(key) is not None]
    values += [one["retain_accuracy"] for one in roles.values() if one and one.get("retain_accuracy") is not None]
    least = max(0.0, min([0.95, *values]))
    low = int(20 * least) / 20
    return Scale(low=low, ticks=(low, (1 + low) / 2, 1))


def _rank(one: Part, scale: Scale) -> Rank:
    figures = one["figures"]
    kept = figures.get("retain_accuracy") or {}
    value = kept.get("value")
    inside = value is not None and value >= scale.low
    places = [None if kept.get(name) is None or not inside else scale.place(kept[name]) for name in ("low", "high")]
    missed = [
        words for name, words in (("gone", "still called"), ("kept", "the rest is lost")) if one.get(name) == "no"
    ]
    notes = [*(["control"] if one["kind"] == "control" else []), *missed]
    if one.get("told") is False and one.get("seeds", 0) > 1:
        notes.append("within the interval of a goal")
    if one.get("seeds") == 1:
        notes.append("one seed")
    return Rank(
        place="–" if one.get("place") is None else f"{one['place']}{'=' if one.get('shared') else ''}",
        label=one["label"],
        method=one["method"],
        variant=one.get("variant") or "",
        mark=MARKS[one["kind"]],
        kind=KINDS[one["kind"]],
        note="; ".join(notes),
        best=bool(one.get("best")),
        drawn=Mark(told(value), "", scale.place(value) if value is not None and inside else None, *places),
        beyond="" if inside or value is None else f"‹ {told(value)}",
        cells=[
            (told(found.get("value"), unit), bounds(_cut(found, most), unit))
            for name, unit, most in RANKED
            for found in [figures.get(name) or {}]
        ],
    )


RANKED: tuple[tuple[str, Any, float], ...] = (
    ("retain_accuracy", "share", 1.0),
    ("forget_accuracy", "share", 1.0),
    ("linear_probe_gap", "points", 1.0),
    ("tug_of_war", "plain", 1.0),
    ("seconds", "plain", math.inf),
)
"""Figures of a leaderboard, how they are told, and the most that each can be; none can be below 0."""


def _cut(found: Part, most: float) -> Part:
    """Return an interval without what the figure cannot be: Student's knows no ends."""
    return {
        name: None if (value := found.get(name)) is None else min(most, max(0.0, value)) for name in ("low", "high")
    }


def _role(one: Part) -> list[str]:
    told_figures = [told(one.get(name)) for name in ("retain_accuracy", "forget_accuracy")]
    return [*told_figures, "–", "–", told(one.get("seconds"), "plain") if one.get("seconds") is not None else "–"]


# The table of cells

FILTERS = {
    "method": "method",
    "variant": "settings",
    "kind": "reads",
    "data": "data",
    "model": "model",
    "forget": "forgotten",
    "status": "status",
}
"""Columns to filter by, and their titles."""


def _table(rows: Sequence[Part]) -> dict[str, Any]:
    """Return head, rows and filters of the table of cells; columns that say the same in all rows are left out."""
    words = {name: [_word(row, name) for row in rows] for name in FILTERS}
    shown = [name for name, values in words.items() if name == "method" or len(set(values)) > 1]
    lines = [
        {
            "number": number,
            "link": _link(row),
            "words": [(name, words[name][number]) for name in shown],
            "numbers": [
                f"{scale * row[name]:.{digits}f}" if row[name] is not None else "–" for name, scale, digits in CELL
            ],
        }
        for number, row in enumerate(rows)
    ]
    constant = [f"{title} {words[name][0]}" for name, title in FILTERS.items() if rows and name not in shown]
    return {
        "filters": [(name, FILTERS[name], [*Counter(words[name])]) for name in shown],
        "head": [FILTERS[name] for name in shown],
        "numbers": TITLES,
        "rows": lines,
        "constant": f"In all of them: {', '.join(constant)}." if constant else "",
    }


def _word(row: Part, name: str) -> str:
    if name == "kind":
        return KIND_WORDS[row["kind"]] if row["kind"] else "unknown"
    return str(row[name])


KIND_WORDS = {
    "zero-glance": "no image of the classes",
    "reads forget data": "images of the classes",
    "control": "control",
}

CELL: tuple[tuple[str, float, int], ...] = (
    ("training_seed", 1, 0),
    ("unlearning_seed", 1, 0),
    ("retain_accuracy", 100, 1),
    ("forget_accuracy", 100, 1),
    ("linear_probe_gap", 100, 1),
    ("tug_of_war", 1, 3),
    ("seconds", 1, 2),
    ("flops", 1e-9, 1),
)
"""Columns of numbers, what they are multiplied with, and decimals."""
TITLES = ("training seed", "seed", "others, %", "forgotten, %", "probe gap", "tug of war", "seconds", "GFLOP")


def _link(row: Part) -> str:
    """Return where a cell's own page is, or what is told of its failure; nothing for one that is not there."""
    if row["status"] == "done":
        return f"cells/{quote(row['id'])}/report.html"
    return f"#failed-{quote(row['id'])}" if row["status"] == "failed" else ""


# A cell's own page


def cell_facts(record: Part) -> list[tuple[str, str]]:
    """Return what the record of a cell holds beyond that of an erasure; nothing of one that is no cell."""
    bench, asked = record.get("bench") or {}, (record.get("item") or {}).get("asked") or {}
    original, tuning = asked.get("original") or {}, bench.get("tuning") or {}
    parts: dict[str, Part] = {
        "": {
            name: original.get(key) for name, key in (("data", "data"), ("model", "model"), ("training seed", "seed"))
        },
        "images.": bench.get("sizes") or {},
        "cost.": bench.get("cost") or {},
        **{f"probes.{role}.": found for role, found in (bench.get("probes") or {}).items()},
        "tuning.": {name: tuning.get(name) for name in ("settings", "score", "selected_by")} if tuning else {},
    }
    if not original and not bench:
        return []
    return [row for before, part in parts.items() for row in flat(part, before)]
