"""Who is in front, by a stated rule, and only as far as the seeds tell: from means with intervals to places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from expunge.bench.suites import CONTROLS
from expunge.bench.tables import Figure, Row, Summary, column, separated_best, size
from expunge.evaluation import GOAL_FORGET, GOAL_RETAIN_DROP, ROUNDING

Answer = Literal["yes", "no", "unknown"]

RULE = (
    f"In front are those whose mean accuracy on the forgotten classes is at most {100 * GOAL_FORGET:g} % and whose "
    f"mean accuracy on the others is no more than {100 * GOAL_RETAIN_DROP:g} points below the original's, "
    "where that may not answer the forgotten classes either, with more than half left of every other class in every "
    "cell. Among them, "
    "more accuracy on the others is better: a place is one more than the number of those whose whole 95 % interval "
    "lies above one's own, so those that the seeds do not tell apart share it. Controls, those that miss a goal, and "
    "those with fewer seeds than others (their cells failed, or were not run) have no place."
)


def _drop(row: Row) -> float | None:
    before, after = row["original_masked_retain_accuracy"], row["retain_accuracy"]
    return None if before is None or after is None else before - after


FIGURES = (
    Figure("forget_accuracy", "on the forgotten classes", column("forget_accuracy")),
    Figure("retain_accuracy", "on the others", column("retain_accuracy"), "high"),
    Figure("retain_drop", "loss on the others", _drop),
    Figure("tug_of_war", "tug of war", column("tug_of_war")),
    Figure("linear_probe", "linear probe", column("linear_probe")),
    Figure("linear_probe_gap", "probe gap", size("linear_probe_gap")),
    Figure("seconds", "seconds", column("seconds")),
    Figure("flops", "FLOPs", column("flops")),
    Figure("peak_memory_bytes", "peak memory", column("peak_memory_bytes")),
    Figure("unknown", "original does not know the classes", lambda row: float(row["original_knows"] is False)),
    Figure(
        "collapsed", "other classes of which less than half is left", lambda row: float(row["collapsed_classes"] or 0)
    ),
)
"""What the leaderboard tells of each method: shares in [0, 1], seconds, bytes, counts."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A method's place among those run on the same data, model and classes."""

    summary: Summary  # of FIGURES
    gone: Answer  # the mean meets the goal; unknown: no held-out images, or classes that the original did not know
    kept: Answer
    told: bool  # the intervals lie on one side of both goals
    place: int | None = None
    shared: bool = False  # others have the same place
    best: bool = False  # its interval lies wholly above those of all other methods in front


def standings(group: Sequence[Summary]) -> list[Standing]:
    """Return summaries of one data set, model and set of classes in the order of RULE.

    Those that miss a goal come after those with a place, first those that keep too little, and the controls last.
    """
    judged = [_judged(one) for one in group]
    most = max((one.summary.seeds for one in judged), default=0)
    front = [
        one
        for one in judged
        if one.gone == one.kept == "yes" and one.summary.method not in CONTROLS and one.summary.seeds == most
    ]
    first = _first(front)
    placed = [
        replace(
            one,
            place=place,
            shared=[_place(other, front) for other in front].count(place) > 1,
            best=first is not None and one.summary.label == first,
        )
        for one in front
        for place in [_place(one, front)]
    ]
    rest = [one for one in judged if one not in front]
    return sorted(
        [*placed, *rest],
        key=lambda one: (
            one.summary.method in CONTROLS,
            one.place is None,
            one.place or 0,
            one.gone != "yes",
            -_mean(one.summary, "retain_accuracy"),
        ),
    )


def _judged(one: Summary) -> Standing:
    answers: list[Answer] = []
    told = True
    for name, goal in (("forget_accuracy", GOAL_FORGET), ("retain_drop", GOAL_RETAIN_DROP)):
        found = one.figures.get(name)
        answers.append("unknown" if found is None else "yes" if found.value <= goal + ROUNDING else "no")
        told &= found is not None and (found.high <= goal + ROUNDING or found.low > goal + ROUNDING)
    gone, kept = answers
    if gone == "yes" and _mean(one, "unknown") > 0:
        gone = "unknown"
    if kept == "yes" and _mean(one, "collapsed") > 0:
        kept = "no"
    return Standing(summary=one, gone=gone, kept=kept, told=told)


def _place(one: Standing, front: Sequence[Standing]) -> int:
    high = one.summary.figures["retain_accuracy"].high
    return 1 + sum(other.summary.figures["retain_accuracy"].low > high for other in front)


def _first(front: Sequence[Standing]) -> str | None:
    """Return the label of the one that lies beyond all other methods, not beyond its own variants."""
    if not front:
        return None
    ahead = max(front, key=lambda one: _mean(one.summary, "retain_accuracy")).summary
    others = [one.summary for one in front if one.summary is ahead or one.summary.method != ahead.method]
    return separated_best({one.label: one.figures["retain_accuracy"] for one in others}, "high")


def _mean(one: Summary, name: str) -> float:
    return one.figures[name].value if name in one.figures else 0.0
