"""Stored records with the parts that are drawn: confusion, map of features, learned images; and pictures."""

from __future__ import annotations

import copy
from typing import Any

import torch

from expunge.pictures import as_png


def picture(seed: int, side: int = 16) -> str:
    """Return coloured noise as PNG in base64."""
    generator = torch.Generator().manual_seed(seed)
    return as_png(torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8))


def illustrated(record: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a record with made-up figures of the kinds that older ones lack."""
    made = copy.deepcopy(record)
    names, forget = made["classes"]["all"], made["classes"]["forget"]
    for side in ("before", "after", "retrained"):
        rows = {name: {name: 30, names[(number + 1) % len(names)]: 6} for number, name in enumerate(names)}
        if side != "before":
            rows |= {name: {other: 3 for other in names if other not in forget} for name in forget}
        made["metrics"][side]["confusion"] = rows
    generator = torch.Generator().manual_seed(0)
    points = {
        role: {
            name: {
                "x": torch.randn(12, generator=generator).tolist(),
                "y": torch.randn(12, generator=generator).tolist(),
            }
            for name in names
        }
        for role in ("original", "retrained", "unlearned")  # as a record has them: sorted
    }
    share = {role: {"value": 0.4, "low": 0.35, "high": 0.45, "count": 24} for role in points}
    if made.get("audits"):
        made["audits"]["feature_map"] = {
            "says": "where samples lie",
            "source": "Pearson",
            "skipped": None,
            "seconds": 0.1,
            "targets": {"share of variance": "none"},
            "figures": {"share of variance": share},
            "details": {role: {"points": one} for role, one in points.items()},
        }
    shares = {"before": 0.991, "after": 0.004}
    made["learned"] = {
        "noise": [{"class": name, "picture": picture(1), **shares} for name in forget[:8]],
        "impressions": [{"class": name, "start": names[0], **shares} for name in forget[:8]],
    }
    return made


def pictures_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what `images.json` would hold beside an illustrated record."""
    lit = {role: picture(seed) for seed, role in enumerate(("original", "retrained", "unlearned"), 2)}
    return {
        "impressions": {
            str(number): {"start": picture(8), "picture": picture(9)}
            for number in range(1, len(record["learned"]["impressions"]) + 1)
        },
        "where_it_looks": {"forget 1": {"class": record["classes"]["forget"][0], "picture": picture(5), "lit": lit}},
    }
