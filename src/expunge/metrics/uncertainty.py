"""Intervals: how far a figure may be off, and whether two figures differ. All are 95 % unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import InputError
from expunge.metrics.accuracy import check_answers

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure between two bounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """A figure, kept as the values it is the mean of, so that its uncertainty and a gap to another can be computed.

    `groups[0]` holds one value a sample (or a seed), and the figure is their mean. An area under a curve is such a mean
    too: of each member's share of non-members below it. Then `groups[1]` holds, for each non-member, the share of
    members above it, whose mean is the same (DeLong, DeLong and Clarke-Pearson, Biometrics 1988).
    """

    groups: tuple[Tensor, ...]  # each (N,) float64
    seeds: bool = False  # the values are of seeds, not of samples: two that are both 1 are not two hits

    def __post_init__(self) -> None:
        if not self.groups or any(group.ndim != 1 or len(group) == 0 for group in self.groups):
            raise InputError("expected at least one value to measure with")
        if not all(bool(torch.isfinite(group).all()) for group in self.groups):
            raise InputError("expected finite values, got NaN or infinite ones: the model gives those")

    @property
    def value(self) -> float:
        return self.groups[0].double().mean().item()

    @property
    def count(self) -> int:
        return len(self.groups[0])

    @property
    def interval(self) -> Interval:
        """Wilson's interval of samples that are hits or none, else Student's (of seeds and samples) or DeLong's."""
        first = self.groups[0].double()
        if self.are_hits:
            return wilson_interval(int(first.sum()), len(first))
        interval = mean_interval(self.groups)
        if len(self.groups) == 1:
            return interval
        return Interval(interval.value, max(0.0, interval.low), min(1.0, interval.high))  # of an area

    @property
    def are_hits(self) -> bool:
        """Whether the values are of samples, and each 0 or 1."""
        first = self.groups[0]
        return not self.seeds and len(self.groups) == 1 and bool(((first == 0) | (first == 1)).all())


def of_values(values: Tensor) -> Measurement:
    """Return the measurement whose figure is the mean of `values` (N,): of samples, or of seeds."""
    return Measurement((values.detach().double().cpu(),))


def of_seeds(values: Tensor) -> Measurement:
    """Return the measurement whose figure is the mean of `values` (N,), one a seed: its interval is Student's."""
    return Measurement((values.detach().double().cpu(),), seeds=True)


def of_hits(logits: Tensor, labels: Tensor) -> Measurement:
    """Return the accuracy of logits (N, C) on labels (N,).

    Raises:
        InputError: shapes do not match, N is 0, or logits are NaN.
    """
    check_answers(logits, labels)
    return of_values(logits.argmax(1) == labels)


def of_ranks(members: Tensor, others: Tensor) -> Measurement:
    """Return the area under the ROC curve of scores that shall be higher for members (M,) than for others (N,).

    Raises:
        InputError: there are no scores of one of them, or one is NaN.
    """
    for scores in (members, others):
        if scores.ndim != 1 or len(scores) == 0 or bool(torch.isnan(scores).any()):
            raise InputError("expected scores (M,) of members and (N,) of others, got none of one of them, or NaN")
    above = (members.double().view(-1, 1) > others.double().view(1, -1)).double()
    above += 0.5 * (members.double().view(-1, 1) == others.double().view(1, -1))
    return Measurement((above.mean(1), above.mean(0)))


def wilson_interval(hits: int, count: int, *, level: float = LEVEL) -> Interval:
    """Return the score interval of a share.

    Source: Wilson, JASA 1927; scipy's `binomtest`.

    Raises:
        InputError: `hits` is not in [0, count], or `count` is 0.
    """
    if not 0 <= hits <= count or count < 1:
        raise InputError(f"expected hits between 0 and a count of at least 1, got {hits} of {count}")
    from scipy import stats  # half a second to import: not before the work begins

    found = stats.binomtest(hits, count).proportion_ci(level, method="wilson")
    return Interval(hits / count, max(0.0, float(found.low)), min(1.0, float(found.high)))


def mean_interval(groups: Sequence[Tensor], *, level: float = LEVEL) -> Interval:
    """Return Student's interval of the mean of the first group; the variances of means of all groups add up.

    Of a single value nothing is known: the bounds are infinite.

    Raises:
        InputError: there is no group, or one has no values or such that are not finite.
    """
    Measurement(tuple(groups))  # checks them
    value = groups[0].double().mean().item()
    if any(len(group) < 2 for group in groups):
        return Interval(value, -math.inf, math.inf)
    variance = sum(group.double().var().item() / len(group) for group in groups)
    from scipy import stats

    reach = float(stats.t.ppf((1 + level) / 2, min(len(group) for group in groups) - 1)) * math.sqrt(variance)
    return Interval(value, value - reach, value + reach)


def gap_interval(measured: Measurement, reference: Measurement) -> Interval:
    """Return how much higher one figure is than another, on the same samples (or seeds) in the same order, as pairs.

    Shares are compared by Newcombe's interval for paired shares (method 10, Statistics in Medicine 1998), which keeps a
    width where both are 0; everything else by the mean of the differences.

    Raises:
        InputError: the two are not of the same samples.
    """
    if [len(group) for group in measured.groups] != [len(group) for group in reference.groups]:
        raise InputError("expected two figures measured on the same samples, their counts differ")
    pairs = list(zip(measured.groups, reference.groups, strict=True))
    if measured.are_hits and reference.are_hits:
        return _newcombe(pairs[0][0].double(), pairs[0][1].double())
    return mean_interval([one.double() - other.double() for one, other in pairs])


def differs(gap: Interval) -> bool:
    """Return whether a gap counts as found: its interval excludes zero."""
    return gap.low > 0 or gap.high < 0


def _newcombe(one: Tensor, other: Tensor) -> Interval:
    count = len(one)
    both, only_one = int((one * other).sum()), int((one * (1 - other)).sum())
    only_other = int(((1 - one) * other).sum())
    neither = count - both - only_one - only_other
    first, second = wilson_interval(both + only_one, count), wilson_interval(both + only_other, count)
    spread = (both + only_one) * (only_other + neither) * (both + only_other) * (only_one + neither)
    crossed: float = both * neither - only_one * only_other
    if crossed > 0:
        crossed = max(0.0, crossed - count / 2)
    agreement = crossed / math.sqrt(spread) if spread > 0 else 0.0
    low_1, high_1 = first.value - first.low, first.high - first.value
    low_2, high_2 = second.value - second.low, second.high - second.value
    gap = first.value - second.value
    low = gap - math.sqrt(max(0.0, low_1**2 - 2 * agreement * low_1 * high_2 + high_2**2))
    high = gap + math.sqrt(max(0.0, high_1**2 - 2 * agreement * high_1 * low_2 + low_2**2))
    return Interval(gap, low, high)
