"""The sections that are looked at: confusion as heat maps, the map of features, where a model looks, learned images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.report.figures import CORRELATION, SIDES, told
from expunge.report.sections import attack, figures_of, models

Part = Mapping[str, Any]

FEATURE_MAP = "feature_map"


# Confusion

MOST_DRAWN = 12
"""Rows and columns of a heat map, of which two thirds may be of forgotten classes."""
MOST_MOVES = 12


@dataclass(frozen=True, kw_only=True)
class Heat:
    """What images of each class are called by one model: a table whose cells are tinted by their share of the row."""

    role: str
    columns: list[str]
    rows: list[tuple[str, bool, list[tuple[str, int]]]]  # class, whether forgotten, count and percent of each cell


def confusion(record: Part) -> dict[str, Any] | None:
    """A heat map for each model, and the answers that changed most; of many classes, those that matter."""
    counts = {
        role: one for role, side in SIDES.items() if (one := (record["metrics"].get(side) or {}).get("confusion"))
    }
    if "original" not in counts or "unlearned" not in counts:
        return None
    forget = record["classes"]["forget"]
    kept = [name for name in record["classes"]["all"] if name in counts["unlearned"]]
    moves = _moves(counts)
    if len(record["classes"]["all"]) > MOST_DRAWN:
        first = [name for name in kept if name in forget][: MOST_DRAWN * 2 // 3]
        changed = [name for name in dict.fromkeys(name for name, _, _ in moves) if name not in forget]
        others = dict.fromkeys([*changed, *(name for name in kept if name not in forget)])
        kept = [*first, *[*others][: MOST_DRAWN - len(first)]]
    return {
        "heats": [_heat(role, one, kept, forget, record["classes"]["all"]) for role, one in counts.items()],
        "hidden": len(record["classes"]["all"]) - len(kept),
        "roles": [*counts],
        "moves": moves[:MOST_MOVES],
        "more": len(moves) - MOST_MOVES,
    }


def in_order(roles: Mapping[str, Any]) -> list[str]:
    """Return roles in the order of the page: a record has its keys sorted."""
    return [*(role for role in SIDES if role in roles), *sorted(role for role in roles if role not in SIDES)]


def _heat(role: str, counts: Part, kept: Sequence[str], forget: Sequence[str], names: Sequence[str]) -> Heat:
    columns = [*kept, "others"] if len(kept) < len(names) else [*kept]
    rows = []
    for name in kept:
        row = counts.get(name) or {}
        total = sum(row.values())
        cells = [row.get(called) or 0 for called in kept]
        cells += [total - sum(cells)] if len(kept) < len(names) else []
        tinted = [(told(cell, "count") if cell else "", round(100 * cell / total) if total else 0) for cell in cells]
        rows.append((name, name in forget, tinted))
    return Heat(role=role, columns=columns, rows=rows)


def _moves(counts: Mapping[str, Part]) -> list[tuple[str, str, list[str]]]:
    """Return class, what it is called, and how often by each model, the most changed by unlearning first."""
    before, after = counts["original"], counts["unlearned"]
    found = []
    for name, row in after.items():
        then = before.get(name) or {}
        for called in dict.fromkeys([*then, *(row or {})]):
            change = abs((row or {}).get(called, 0) - then.get(called, 0))
            if change:
                found.append((change, name, called))
    found.sort(key=lambda one: -one[0])
    return [
        (name, called, [told((one.get(name) or {}).get(called, 0), "count") for one in counts.values()])
        for _, name, called in found
    ]


# The map of features

SIDE = 300
"""Of the figure, in units of its own; MARGIN of it stay free at each edge."""
MARGIN = 12
TONES = 4
SHAPES = {
    "tone-1": "M{0} {1}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "tone-2": "M{0} {1}m-3-3h6v6h-6z",
    "tone-3": "M{0} {1}m0-4l4 7h-8z",
    "tone-4": "M{0} {1}m-3-3l6 6m-6 0l6-6",
    "stay": "M{0} {1}m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The places of samples by one model: the marks of each kind as one path."""

    role: str
    says: str
    paths: list[tuple[str, str]]  # kind and path


def feature_map(record: Part) -> dict[str, Any] | None:
    """One panel for each model, with the same marks, and the share of variance that it shows."""
    found = (record.get("audits") or {}).get(FEATURE_MAP) or {}
    details = found.get("details") or {}
    points = {role: details[role]["points"] for role in in_order(details) if (details[role] or {}).get("points")}
    if found.get("skipped") or not points:
        return None
    forget = record["classes"]["forget"]
    seen = [name for name in forget if any(name in by_class for by_class in points.values())]
    kinds = {name: f"tone-{min(number, TONES)}" for number, name in enumerate(seen, 1)}
    middles = {role: [_middle(one, axis) for axis in "xy"] for role, one in points.items()}
    reach = max(half for one in middles.values() for _, half in one)  # one scale for all
    shares = models(figures_of(record, FEATURE_MAP).get("share of variance") or {})
    first = next(iter(points.values()))
    legend = [(f"tone-{number}", name) for number, name in enumerate(seen[:TONES], 1)]
    if len(seen) > TONES:
        legend[-1] = (f"tone-{TONES}", f"{len(seen) - TONES + 1} more forgotten classes")
    counts = {side: sum(len(part["x"]) for name, part in first.items() if (name in forget) == side) for side in (1, 0)}
    return {
        "panels": [
            _panel(role, one, kinds, middles[role], reach or 1, shares.get(role)) for role, one in points.items()
        ],
        "legend": [*legend, ("stay", "classes that stay")],
        "counts": (counts[1], counts[0]),
        "says": found.get("says") or "",
        "source": found.get("source") or "",
    }


def _middle(points: Part, axis: str) -> tuple[float, float]:
    """Return the middle of the places on an axis, and how far they reach from it."""
    values = [value for part in points.values() for value in part[axis]] or [0]
    return (min(values) + max(values)) / 2, (max(values) - min(values)) / 2


def _panel(
    role: str,
    points: Part,
    kinds: Mapping[str, str],
    middles: Sequence[tuple[float, float]],
    reach: float,
    share: Part | None,
) -> Panel:
    drawn: dict[str, list[str]] = {"stay": []}
    middle, unit = SIDE / 2, (SIDE / 2 - MARGIN) / reach
    (left, _), (low, _) = middles
    for name, part in points.items():
        mark = kinds.get(name, "stay")
        for x, y in zip(part["x"], part["y"], strict=False):
            place = (f"{middle + unit * (x - left):.0f}", f"{middle - unit * (y - low):.0f}")
            drawn.setdefault(mark, []).append(SHAPES[mark].format(*place))
    says = f"{told(share['value'])} of the variance of its features" if share and share.get("value") is not None else ""
    return Panel(role=role, says=says, paths=[(mark, "".join(marks)) for mark, marks in drawn.items() if marks])


# Pictures


@dataclass(frozen=True)
class Picture:
    """An image, and what it shows for who cannot see it."""

    source: str  # a data URI
    says: str
    crisp: bool = False  # pixels are shown as squares


PNG = re.compile(r"iVBORw0KGgo[A-Za-z0-9+/]+={0,2}")  # base64 of what begins as a PNG


def _picture(text: str | None, says: str, *, crisp: bool = False) -> Picture | None:
    """Return a picture of a PNG in base64, None of anything else."""
    if not text or not PNG.fullmatch(text):
        return None
    return Picture(f"data:image/png;base64,{text}", says, crisp)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """A table of pictures and words."""

    caption: str
    head: list[str]
    rows: list[list[str | Picture]]


def attention(record: Part) -> dict[str, Any] | None:
    """The shift of attention on both sides, and samples lit by the maps of each model where they may be shown."""
    name = "where_it_looks"
    made = attack(record, name, CORRELATION) if figures_of(record, name) else None
    if made is None:
        return None
    details = (record["audits"][name].get("details") or {}).get("original") or {}
    return {**made, "map": details.get("map"), "gallery": _lit(record["pictures"].get(name) or {})}


def _lit(samples: Part) -> Gallery | None:
    roles = in_order({role: None for one in samples.values() for role in one.get("lit") or {}})
    rows: list[list[str | Picture]] = []
    for name, one in samples.items():
        label = one.get("class") or ""
        shown = f"{name}, map of {label}"
        made = [_picture(one.get("picture"), f"Held-out image {name}")]
        made += [_picture((one.get("lit") or {}).get(role), f"The same, lit by the {role} model") for role in roles]
        rows.append([shown, *(picture or "–" for picture in made)])
    caption = "Samples, lit where they speak for the class"
    return Gallery(caption=caption, head=["sample", "image", *roles], rows=rows) if rows else None


def learned(record: Part) -> dict[str, Any] | None:
    """Noise with its pictures, impressions with theirs where they may be shown, and what both models call them."""
    found, pictures = record.get("learned") or {}, record["pictures"].get("impressions") or {}
    noise: list[list[str | Picture]] = []
    for one in found.get("noise") or ():
        picture = _picture(one.get("picture"), f"Noise learned about {one.get('class')}", crisp=True)
        noise.append([one.get("class") or "", picture or "–", told(one.get("before")), told(one.get("after"))])
    rows: list[list[str | Picture]] = []
    for number, one in enumerate(found.get("impressions") or (), 1):
        shown = pictures.get(str(number)) or {}
        both = [
            _picture(shown.get("start"), f"Retained image of {one.get('start')}") or "–",
            _picture(shown.get("picture"), f"What was made of it: called {one.get('class')}") or "–",
        ]
        shares = [told(one.get("before")), told(one.get("after"))]
        rows.append([one.get("class") or "", one.get("start") or "–", *(both if pictures else []), *shares])
    shares = ["original says it is", "unlearned says it is"]
    galleries = [
        Gallery(caption="Noise, learned from Gaussian noise", head=["class", "noise", *shares], rows=noise),
        Gallery(
            caption="Class impressions, made from retained images",
            head=["class", "made from", *(["start", "impression"] if pictures else []), *shares],
            rows=rows,
        ),
    ]
    kept = [one for one in galleries if one.rows]
    return {"galleries": kept, "hidden": bool(rows) and not pictures} if kept else None
