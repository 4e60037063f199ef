"""Intervals against closed forms, scipy, scikit-learn, published examples, a bootstrap, and how often they hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor

from expunge.errors import InputError
from expunge.metrics import (
    Interval,
    Measurement,
    accuracy,
    differs,
    gap_interval,
    mean_interval,
    of_hits,
    of_ranks,
    of_seeds,
    of_values,
    wilson_interval,
)

Floats = NDArray[np.float64]


def bounds(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Shares: Wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # Newcombe, Statistics in Medicine 1998 (17), 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(hits: int, count: int, low: float, high: float) -> None:
    assert bounds(wilson_interval(hits, count)) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None)
def test_wilson_closed_form(count: int, part: float, level: float) -> None:
    hits = round(part * count)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    found = wilson_interval(hits, count, level=level)
    assert found.value == share
    assert bounds(found) == pytest.approx((middle - reach, middle + reach), abs=1e-9)
    assert 0 <= found.low <= share + 1e-12
    assert share - 1e-12 <= found.high <= 1
    other = wilson_interval(count - hits, count, level=level)
    assert bounds(other) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)


def test_wilson_holds_as_often_as_told() -> None:
    """Exactly, by the chance of every count of hits; less often near 0 and 1, where the interval is known to dip."""
    count, shares = 100, np.linspace(0.005, 0.995, 199)
    found = [wilson_interval(hits, count) for hits in range(count + 1)]
    holds = np.array([[one.low <= share <= one.high for one in found] for share in shares])
    chances = stats.binom.pmf(np.arange(count + 1), count, shares[:, None])
    held = (holds * chances).sum(1)
    assert held.mean() == pytest.approx(0.95, abs=0.005)
    assert held[(shares > 0.05) & (shares < 0.95)].min() > 0.92
    assert held.min() > 0.85


def test_a_measured_accuracy_is_a_share() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn((300, 5), generator=generator), torch.randint(0, 5, (300,), generator=generator)
    measured = of_hits(logits, labels)
    hits = round(accuracy_score(labels, logits.argmax(1)) * 300)
    assert measured.count == 300
    assert measured.value == accuracy(logits, labels) == hits / 300
    assert measured.interval == wilson_interval(hits, 300)
    assert of_values(torch.zeros(40)).interval == wilson_interval(0, 40)  # it keeps a width
    assert of_values(torch.ones(1)).interval == wilson_interval(1, 1)


# Means: Student


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (5, 1), (400, 2)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_student_against_scipy(count: int, seed: int, level: float) -> None:
    values = 3 + 2 * drawn(seed, count)
    expected = stats.ttest_1samp(values.numpy(), 0).confidence_interval(level)
    found = mean_interval([values], level=level)
    assert found.value == pytest.approx(values.mean().item())
    assert bounds(found) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert of_values(values).interval == mean_interval([values])


@pytest.mark.parametrize("count", [2, 5, 300])
def test_a_gap_of_means_is_taken_in_pairs(count: int) -> None:
    common = 10 * drawn(0, count)
    one, other = common + drawn(1, count) + 1, common + drawn(2, count)
    expected = stats.ttest_rel(one.numpy(), other.numpy()).confidence_interval(0.95)
    found = gap_interval(of_values(one), of_values(other))
    assert found.value == pytest.approx((one - other).mean().item())
    assert bounds(found) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_pairs_find_what_separate_intervals_miss() -> None:
    one, other = 10 * drawn(0, 200) + 0.5, 10 * drawn(0, 200) + 0.1 * drawn(1, 200)
    first, second = of_values(one), of_values(other)
    assert first.interval.low < second.value < first.interval.high
    assert differs(gap_interval(first, second))


def test_by_hand_of_three_seeds() -> None:
    """Mean 2, standard deviation 1, quantile 4.302653 of two degrees of freedom."""
    reach = 4.302653 / math.sqrt(3)
    assert bounds(of_values(torch.tensor([1.0, 2.0, 3.0])).interval) == pytest.approx((2 - reach, 2 + reach), abs=1e-6)


def test_a_single_value_says_nothing_of_its_uncertainty() -> None:
    assert of_values(torch.tensor([0.4])).interval == Interval(pytest.approx(0.4), -math.inf, math.inf)  # type: ignore[arg-type]
    assert not differs(gap_interval(of_values(torch.tensor([9.0])), of_values(torch.tensor([0.5]))))


# Areas under a curve: DeLong


def delong_variance(members: Floats, others: Floats, *more: Floats) -> float:
    """By the definition, pair by pair: S10 / m + S01 / n (of a second score of the same samples: of the difference)."""

    def components(high: Floats, low: Floats) -> tuple[Floats, Floats]:
        wins = np.array([[1.0 if x > y else 0.5 if x == y else 0.0 for y in low] for x in high])
        return wins.mean(1), wins.mean(0)

    first = components(members, others)
    second = components(more[0], more[1]) if more else tuple(np.zeros_like(part) for part in first)
    total = 0.0
    for one, two in zip(first, second, strict=True):
        matrix = np.cov(one, two)
        total += (matrix[0, 0] + matrix[1, 1] - 2 * matrix[0, 1]) / len(one)
    return float(total)


@pytest.mark.parametrize(("seed", "members", "others"), [(0, 30, 50), (1, 200, 20), (2, 3, 2)])
@pytest.mark.parametrize("decimals", [0, 6])  # 0: many ties
def test_the_area_against_scikit_learn_and_delong(seed: int, members: int, others: int, decimals: int) -> None:
    inside = (drawn(seed, members) + 1).round(decimals=decimals)
    outside = drawn(seed + 10, others).round(decimals=decimals)
    measured = of_ranks(inside, outside)
    truth = [1] * members + [0] * others
    area = roc_auc_score(truth, torch.cat([inside, outside]).numpy())
    assert measured.value == pytest.approx(area, abs=1e-12)
    assert [group.double().mean().item() for group in measured.groups] == pytest.approx([area, area], abs=1e-12)
    quantile = stats.t.ppf(0.975, min(members, others) - 1)
    reach = quantile * math.sqrt(delong_variance(inside.numpy(), outside.numpy()))
    assert bounds(measured.interval) == pytest.approx((area - reach, area + reach), abs=1e-9)


def test_the_area_by_hand() -> None:
    """Members 3 and 1 beat all and half of the others 2 and 0: variances of 1/8, over two each, add up to 1/8."""
    measured = of_ranks(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert [group.tolist() for group in measured.groups] == [[1.0, 0.5], [0.5, 1.0]]
    reach = 12.706205 * math.sqrt(1 / 8)
    assert bounds(mean_interval(measured.groups)) == pytest.approx((0.75 - reach, 0.75 + reach), abs=1e-5)
    assert bounds(measured.interval) == (0.0, 1.0)  # an area is a share


def test_two_seeds_are_not_two_hits() -> None:
    hits, seeds = of_values(torch.ones(2)), of_seeds(torch.ones(2))
    assert hits.interval.low == pytest.approx(0.342, abs=1e-3)
    assert bounds(seeds.interval) == (1.0, 1.0)
    nothing = of_seeds(torch.zeros(2))
    assert bounds(gap_interval(seeds, nothing)) == (1.0, 1.0)
    assert gap_interval(hits, of_values(torch.zeros(2))).low < 1.0


def test_the_area_against_a_bootstrap() -> None:
    inside, outside = (drawn(0, 150) + 1).numpy(), drawn(1, 120).numpy()
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(2000):
        again = rng.choice(inside, len(inside)), rng.choice(outside, len(outside))
        ranks = stats.rankdata(np.concatenate(again))[: len(inside)]  # the area by Mann and Whitney's ranks
        areas.append((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))
    found = of_ranks(torch.from_numpy(inside), torch.from_numpy(outside)).interval
    low, high = np.quantile(areas, [0.025, 0.975])
    assert bounds(found) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_a_gap_of_areas_is_taken_in_pairs() -> None:
    inside, outside = drawn(0, 60) + 1, drawn(1, 40)
    other_inside, other_outside = inside + 0.5 * drawn(2, 60), outside + 0.5 * drawn(3, 40)
    one, other = of_ranks(inside, outside), of_ranks(other_inside, other_outside)
    four = [part.numpy() for part in (inside, outside, other_inside, other_outside)]
    reach = stats.t.ppf(0.975, 39) * math.sqrt(delong_variance(*four))
    gap = one.value - other.value
    found = gap_interval(one, other)
    assert (found.value, *bounds(found)) == pytest.approx((gap, gap - reach, gap + reach), abs=1e-9)
    alone = math.sqrt(delong_variance(four[0], four[1]) + delong_variance(four[2], four[3]))
    assert reach < 0.7 * stats.t.ppf(0.975, 39) * alone


def test_scores_of_the_same_ranks_have_the_same_area() -> None:
    inside, outside = drawn(0, 30), drawn(1, 30)
    one, other = of_ranks(inside, outside), of_ranks(inside.exp(), outside.exp())
    assert one.value == other.value
    assert of_ranks(-inside, -outside).value == pytest.approx(1 - one.value)
    assert not differs(gap_interval(one, other))


# Gaps of shares: Newcombe


def pairs(both: int, only_one: int, only_other: int, neither: int) -> tuple[Measurement, Measurement]:
    one = [1] * (both + only_one) + [0] * (only_other + neither)
    other = [1] * both + [0] * only_one + [1] * only_other + [0] * neither
    return of_values(torch.tensor(one)), of_values(torch.tensor(other))


@pytest.mark.parametrize(
    ("counts", "gap", "low", "high"),
    [  # Newcombe, Statistics in Medicine 1998 (17), 2635-2650, method 10
        ((36, 12, 2, 0), 0.20, 0.0569, 0.3404),
        ((36, 14, 0, 0), 0.28, 0.1528, 0.4167),
        ((0, 0, 0, 30), 0.0, -0.1135, 0.1135),
    ],
)
def test_newcombe_published(counts: tuple[int, int, int, int], gap: float, low: float, high: float) -> None:
    one, other = pairs(*counts)
    found = gap_interval(one, other)
    assert (found.value, *bounds(found)) == pytest.approx((gap, low, high), abs=5e-5)
    turned = gap_interval(other, one)
    assert (turned.value, *bounds(turned)) == pytest.approx((-gap, -high, -low), abs=5e-5)


def test_newcombe_of_shares_that_do_not_agree_adds_squares() -> None:
    """Where chance alone pairs them, the correlation is 0 and the two Wilson intervals are put together."""
    found = gap_interval(*pairs(6, 6, 4, 4))
    one, other = wilson_interval(12, 20), wilson_interval(10, 20)
    low = 0.1 - math.hypot(one.value - one.low, other.high - other.value)
    high = 0.1 + math.hypot(one.high - one.value, other.value - other.low)
    assert (found.value, *bounds(found)) == pytest.approx((0.1, low, high))


@given(*[st.integers(0, 40)] * 4)
@settings(deadline=None, max_examples=60)
def test_newcombe_stays_in_range(both: int, only_one: int, only_other: int, neither: int) -> None:
    if both + only_one + only_other + neither == 0:
        return
    one, other = pairs(both, only_one, only_other, neither)
    found, turned = gap_interval(one, other), gap_interval(other, one)
    assert -1 - 1e-9 <= found.low <= found.value <= found.high <= 1 + 1e-9
    assert found.value == pytest.approx(one.value - other.value)
    assert found.low < found.high
    assert bounds(turned) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_a_model_does_not_differ_from_itself() -> None:
    for values in (torch.zeros(50), torch.ones(50), drawn(0, 50), torch.arange(50) % 2):
        gap = gap_interval(of_values(values), of_values(values))
        assert gap.value == 0
        assert not differs(gap)


def test_a_gap_counts_when_its_interval_excludes_zero() -> None:
    assert differs(Interval(0.2, 0.1, 0.3))
    assert differs(Interval(-0.2, -0.3, -0.1))
    assert not differs(Interval(0.2, -0.1, 0.5))
    assert not differs(Interval(0.2, 0.0, 0.4))
    assert not differs(Interval(0.2, -math.inf, math.inf))
    assert differs(gap_interval(*pairs(0, 1000, 0, 0)))


# How often they hold


def share_held(interval_of: Callable[[np.random.Generator], Interval], truth: float, times: int) -> float:
    rng = np.random.default_rng(0)
    found = [interval_of(rng) for _ in range(times)]
    return sum(one.low <= truth <= one.high for one in found) / times


def two_shares(rng: np.random.Generator, one: float, other: float, common: float, count: int = 100) -> Interval:
    """The gap of two models' hits, decided by a common draw for part of the samples."""
    own, theirs = rng.random((2, count))
    theirs = np.where(rng.random(count) < common, own, theirs)
    return gap_interval(of_values(torch.from_numpy(own < one)), of_values(torch.from_numpy(theirs < other)))


@pytest.mark.parametrize(("one", "other", "common"), [(0.5, 0.5, 0.5), (0.9, 0.8, 0.7), (0.05, 0.02, 0.0)])
def test_newcombe_holds_as_often_as_told(one: float, other: float, common: float) -> None:
    held = share_held(lambda rng: two_shares(rng, one, other, common), one - other, 400)
    assert 0.93 <= held <= 0.99


def test_equal_models_seldom_differ_and_unequal_ones_mostly_do() -> None:
    rng = np.random.default_rng(1)
    equal = [differs(two_shares(rng, 0.7, 0.7, 0.5)) for _ in range(400)]
    unequal = [differs(two_shares(rng, 0.85, 0.6, 0.5)) for _ in range(100)]
    assert np.mean(equal) <= 0.06
    assert np.mean(unequal) >= 0.95


@pytest.mark.parametrize("count", [3, 30])
def test_student_holds_as_often_as_told(count: int) -> None:
    held = share_held(lambda rng: of_values(torch.from_numpy(rng.normal(2, 3, count))).interval, 2.0, 1000)
    assert 0.93 <= held <= 0.97


def test_delong_holds_as_often_as_told() -> None:
    """Normal scores one apart: the area is the normal distribution function of 1 / sqrt 2."""
    truth = NormalDist().cdf(1 / math.sqrt(2))

    def one(rng: np.random.Generator) -> Interval:
        return of_ranks(torch.from_numpy(rng.normal(1, 1, 60)), torch.from_numpy(rng.normal(0, 1, 80))).interval

    assert 0.93 <= share_held(one, truth, 800) <= 0.97


# What is refused

HOLED = torch.tensor([0.0, torch.nan, 1.0])
THREE = torch.tensor([0.0, 0.5, 1.0])
LOGITS, LABELS = drawn(0, 4, 3), torch.tensor([0, 1, 2, 0])
REFUSED = {
    "values, empty": lambda: of_values(THREE[:0]),
    "values, NaN": lambda: of_values(HOLED),
    "values, infinite": lambda: of_values(THREE / 0),
    "values, a matrix": lambda: of_values(LOGITS),
    "values, a number": lambda: of_values(THREE[0]),
    "no groups": lambda: Measurement(()),
    "hits, empty": lambda: of_hits(LOGITS[:0], LABELS[:0]),
    "hits, NaN": lambda: of_hits(torch.where(LOGITS > 0, torch.nan, LOGITS), LABELS),
    "hits, other counts": lambda: of_hits(LOGITS, LABELS[:3]),
    "hits, one label": lambda: of_hits(LOGITS, LABELS[:1]),
    "ranks, no members": lambda: of_ranks(THREE[:0], THREE),
    "ranks, no others": lambda: of_ranks(THREE, THREE[:0]),
    "ranks, NaN": lambda: of_ranks(THREE, HOLED),
    "ranks, a matrix": lambda: of_ranks(LOGITS, THREE),
    "wilson, more hits than samples": lambda: wilson_interval(3, 2),
    "wilson, negative": lambda: wilson_interval(-1, 2),
    "wilson, empty": lambda: wilson_interval(0, 0),
    "mean, no groups": lambda: mean_interval([]),
    "mean, empty": lambda: mean_interval([THREE[:0]]),
    "mean, NaN": lambda: mean_interval([HOLED]),
    "gap, other counts": lambda: gap_interval(of_values(THREE), of_values(THREE[:2])),
    "gap, other kinds": lambda: gap_interval(of_values(THREE), of_ranks(THREE, THREE)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=list(REFUSED))
def test_measurements_refuse(make: Callable[[], object]) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert "\n" not in str(caught.value)
