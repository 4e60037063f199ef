"""Measures against closed forms, against scikit-learn and scipy, and a contract that all of them keep."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import accuracy_score, recall_score
from torch import Tensor, nn

from expunge import metrics
from expunge.errors import InputError
from expunge.metrics import (
    accuracy,
    activation_distances,
    calibration_error,
    divergence_bits,
    entropy_bits,
    layer_distances,
    masked_accuracy,
    per_class_accuracy,
    prediction_distribution,
    tug_of_war,
    zero_retrain_forgetting,
)


@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(2, 12))
def test_accuracy_against_scikit_learn(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((count, classes), generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    predicted = logits.argmax(1).numpy()
    assert accuracy(logits, labels) == pytest.approx(accuracy_score(labels.numpy(), predicted))
    present = np.unique(labels.numpy())
    recalls = recall_score(labels.numpy(), predicted, labels=present, average=None, zero_division=0.0)
    ours = per_class_accuracy(logits, labels)
    assert [ours[label] for label in present] == pytest.approx(list(recalls))
    assert all(ours[label] is None for label in range(classes) if label not in present)


def test_masked_accuracy() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]])
    labels = torch.tensor([1, 2, 0])
    assert accuracy(logits, labels) == pytest.approx(1 / 3)
    assert masked_accuracy(logits, labels, [0]) == pytest.approx(2 / 3)
    assert logits[0, 0] == 3.0
    with pytest.raises(InputError, match="not masked"):
        masked_accuracy(logits, labels, [0, 1, 2])


def test_prediction_distribution_and_entropy() -> None:
    logits = torch.eye(4)[[0, 0, 1, 3]]
    assert prediction_distribution(logits) == [0.5, 0.25, 0.0, 0.25]
    assert entropy_bits([0.5, 0.25, 0.0, 0.25]) == pytest.approx(1.5)
    assert entropy_bits([0.0, 1.0]) == 0.0
    assert entropy_bits([1 / 8] * 8) == pytest.approx(3.0)
    for wrong in ([], [0.5, 0.6], [-0.5, 1.5]):
        with pytest.raises(InputError):
            entropy_bits(wrong)


def test_layer_distances_closed_form() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        one.weight.fill_(1.0)
        other.weight.fill_(3.0)
        one.bias.fill_(1.0)
        other.bias.zero_()
    distances = layer_distances(one, other)
    assert distances["weight"] == pytest.approx({"l2": 4.0, "relative": 4 / 6})
    assert distances["bias"] == pytest.approx({"l2": math.sqrt(2), "relative": math.sqrt(2)})
    assert distances["total"] == pytest.approx({"l2": math.sqrt(18), "relative": math.sqrt(18 / 36)})
    assert layer_distances(one, one)["total"]["l2"] == 0.0
    with pytest.raises(InputError, match="same architecture"):
        layer_distances(one, nn.Linear(2, 3))


@pytest.mark.parametrize("measure", [accuracy, per_class_accuracy, lambda x, y: masked_accuracy(x, y, [0])])
def test_answers_are_checked(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="N >= 1"):
        measure(torch.zeros((0, 3)), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match=r"\(2, 3\) and \(3,\)"):
        measure(torch.zeros((2, 3)), torch.zeros(3, dtype=torch.long))


# Answers beside a reference's


def two_models(seed: int, count: int = 50, classes: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((2, count, classes), generator=generator) * 4
    return logits[0], logits[1]


@pytest.mark.parametrize("seed", range(5))
def test_zero_retrain_forgetting_against_scipy(seed: int) -> None:
    logits, reference = two_models(seed)
    shares, theirs = logits.double().softmax(1).numpy(), reference.double().softmax(1).numpy()
    expected = 1 - jensenshannon(shares, theirs, base=2, axis=1) ** 2
    found = zero_retrain_forgetting(logits, reference)
    assert found.shape == (50,)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert torch.equal(found, zero_retrain_forgetting(reference, logits))


def test_zero_retrain_forgetting_closed_forms() -> None:
    certain, undecided = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[7.0, 7.0]])
    mixed = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)
    assert zero_retrain_forgetting(certain, undecided).item() == pytest.approx(1 - (mixed - 0.5), abs=1e-15)
    assert zero_retrain_forgetting(certain, certain).item() == 1.0
    assert zero_retrain_forgetting(certain, certain.flip(1)).item() == 0.0


def test_classes_that_nobody_answers_with_change_nothing() -> None:
    """An average over samples and classes alike, as in the authors' code, falls with the number of classes."""
    logits, reference = two_models(0)
    wider = [F.pad(given, (0, 30), value=-torch.inf) for given in (logits, reference)]
    for measure in (zero_retrain_forgetting, activation_distances):
        torch.testing.assert_close(measure(*wider), measure(logits, reference), atol=1e-14, rtol=0)


def test_huge_logits_are_measured_as_well() -> None:
    huge = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [3e38, -3e38, 0.0]])
    other = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, -1e4, -1e4], [-3e38, 3e38, 0.0]])
    half = zero_retrain_forgetting(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])).item()
    assert zero_retrain_forgetting(huge, other).tolist() == pytest.approx([1.0, 0.0, half, 0.0], abs=1e-15)
    expected = [0.0, math.sqrt(2), math.sqrt(0.5), math.sqrt(2)]
    assert activation_distances(huge, other).tolist() == pytest.approx(expected, abs=1e-15)


@given(st.integers(0, 10_000), st.floats(-100, 100))
@settings(deadline=None)
def test_an_offset_of_logits_changes_nothing(seed: int, offset: float) -> None:
    logits, reference = two_models(seed, count=4)
    for measure in (zero_retrain_forgetting, activation_distances):
        torch.testing.assert_close(
            measure(logits.double() + offset, reference), measure(logits, reference), atol=1e-12, rtol=0
        )


def test_the_farther_the_answers_the_farther_the_measures() -> None:
    """From the reference's answer to another, step by step."""
    reference, other = torch.tensor([[0.9, 0.05, 0.05]]), torch.tensor([[0.1, 0.8, 0.1]])
    path = torch.cat([reference + t * (other - reference) for t in torch.linspace(0, 1, 11)]).log()
    given = reference.log().expand_as(path)
    assert (zero_retrain_forgetting(path, given).diff() < 0).all()
    assert (activation_distances(path, given).diff() > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_activation_distance_against_numpy(seed: int) -> None:
    logits, reference = two_models(seed)
    raised = [np.exp(given.numpy().astype(np.float64)) for given in (logits, reference)]
    ours, theirs = (each / each.sum(1, keepdims=True) for each in raised)
    expected = [math.sqrt(((a - b) ** 2).sum()) for a, b in zip(ours, theirs, strict=True)]
    assert activation_distances(logits, reference).tolist() == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(deadline=None)
def test_divergence_against_scipy(seed: int, classes: int) -> None:
    one, other = np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), size=2)
    expected = jensenshannon(one, other, base=2) ** 2
    assert divergence_bits(one.tolist(), other.tolist()) == pytest.approx(expected, abs=1e-9)
    assert divergence_bits(other.tolist(), one.tolist()) == divergence_bits(one.tolist(), other.tolist())


def test_divergence_closed_forms() -> None:
    assert divergence_bits([0.5, 0.5, 0.0], [0.5, 0.5, 0.0]) == 0.0
    assert divergence_bits([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.75]) == pytest.approx(1.0, abs=1e-15)
    assert divergence_bits([1.0, 0.0], [0.5, 0.5]) == pytest.approx(1.5 - 0.75 * math.log2(3), abs=1e-15)
    shares = prediction_distribution(torch.eye(4)[[0, 0, 1, 3]])
    assert divergence_bits(shares, shares) == 0.0


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3))
def test_tug_of_war_closed_form(gaps: list[float]) -> None:
    forget, retain, test = gaps
    expected = (1 - abs(forget)) * (1 - abs(retain)) * (1 - abs(test))
    assert tug_of_war(gaps) == pytest.approx(expected, abs=1e-15)
    assert tug_of_war([-gap for gap in gaps]) == tug_of_war(gaps)
    for order in permutations(gaps):
        assert tug_of_war(order) == pytest.approx(expected, abs=1e-15)


def test_tug_of_war_by_hand() -> None:
    assert tug_of_war((0.1, -0.2, 0.5)) == pytest.approx(0.36)
    assert tug_of_war((0.1, 0.0, 0.0)) > tug_of_war((0.2, 0.0, 0.0)) > tug_of_war((0.2, -0.01, 0.0))


# Calibration


def by_hand(shares: NDArray[np.float64], labels: NDArray[np.int64], bins: int = 15) -> float:
    """The expected calibration error, as a sum over bins that include their lower bound."""
    confidence, right = shares.max(1), shares.argmax(1) == labels
    total = 0.0
    for low in range(bins):
        inside = (confidence >= low / bins) & (confidence < (low + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return total


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_calibration_error_against_a_sum_over_bins(classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (500,), generator=generator)
    logits = scale * (torch.randn((500, classes), generator=generator) + 2 * F.one_hot(labels, classes))
    expected = by_hand(logits.double().softmax(1).numpy(), labels.numpy())
    assert expected > 0.01
    assert calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_closed_forms() -> None:
    """Ten answers of a confidence of 0.8, of which as many are right as told."""
    logits = torch.tensor([[0.8, 0.1, 0.1]]).log().repeat(10, 1)
    for right, expected in ((8, 0.0), (10, 0.2), (5, 0.3), (0, 0.8)):
        labels = torch.tensor([0] * right + [2] * (10 - right))
        assert calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    two_bins = torch.cat([logits, torch.tensor([[0.0, 0.0, 0.0]]).repeat(30, 1)])
    labels = torch.tensor([0] * 10 + [0] * 10 + [1] * 20)
    assert calibration_error(two_bins, labels) == pytest.approx(0.25 * 0.2, abs=1e-6)  # a third of thirty are right


def test_logits_between_0_and_1_are_not_taken_for_probabilities() -> None:
    logits, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0])
    assert calibration_error(logits, labels) == pytest.approx(1 / (1 + math.e), abs=1e-6)
    assert calibration_error(logits + 5, labels) == pytest.approx(1 / (1 + math.e), abs=1e-6)


def test_a_temperature_shows_in_calibration_and_not_in_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2000,), generator=generator)
    logits = torch.randn((2000, 4), generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()  # as often right as it says
    calm, cold, hot = (calibration_error(logits / temperature, labels) for temperature in (1.0, 0.02, 50.0))
    assert calm < 0.04
    assert cold > 0.3
    assert hot > 0.15
    assert accuracy(logits / 50, labels) == accuracy(logits, labels)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0], [0.0, 1.0]])
def test_calibration_error_refuses_labels_of_no_class(labels: list[float]) -> None:
    with pytest.raises(InputError, match="expected integer labels of at least 2 classes, below 3"):
        calibration_error(torch.zeros(2, 3), torch.tensor(labels))


# A contract of all measures


@dataclass(frozen=True)
class Case:
    """A measure: where it is lowest and highest, arguments in between, and arguments that it must refuse."""

    low: tuple[Any, ...]
    high: tuple[Any, ...]
    ends: tuple[list[float], list[float]]  # what it gives for those, number by number
    some: tuple[Any, ...]
    refused: Mapping[str, tuple[Any, ...]]  # at least: empty, NaN, shapes
    unbounded: bool = False


LABELS = torch.arange(20) % 4
RIGHT = 30.0 * F.one_hot(LABELS, 4)
WRONG = RIGHT.roll(1, 0)
FIRST = LABELS == 0
SOME, OTHERS = two_models(0, count=20, classes=4)
HOLED = SOME.clone()
HOLED[3, 1] = torch.nan
EMPTY = torch.empty(0, 4)


def layer(weight: float, size: int = 4) -> nn.Linear:
    made = nn.Linear(size, 1, bias=False)
    nn.init.constant_(made.weight, weight)
    return made


ANSWERS = {
    "empty": (EMPTY, LABELS[:0]),
    "NaN": (HOLED, LABELS),
    "shapes": (SOME, LABELS[:3]),
    "one label": (SOME, LABELS[:1]),
    "one sample": (SOME[0], LABELS[:4]),
}
PAIRS = {
    "empty": (EMPTY, EMPTY),
    "NaN": (HOLED, SOME),
    "NaN in the reference": (SOME, HOLED),
    "infinite": (SOME, torch.where(SOME > 3, torch.inf, SOME)),
    "all masked": (SOME, torch.full_like(SOME, -torch.inf)),
    "shapes": (SOME, SOME[:3]),
    "other classes": (SOME, SOME[:, :3]),
    "one sample": (SOME[0], SOME[0]),
    "no classes": (SOME[:, :0], SOME[:, :0]),
}
CASES = {
    "accuracy": Case(low=(WRONG, LABELS), high=(RIGHT, LABELS), ends=([0], [1]), some=(SOME, LABELS), refused=ANSWERS),
    "masked_accuracy": Case(
        low=(RIGHT[FIRST], LABELS[FIRST], [0]),
        high=(RIGHT[~FIRST], LABELS[~FIRST], [0]),
        ends=([0], [1]),
        some=(SOME, LABELS, [0, 2]),
        refused={name: (*arguments, [0]) for name, arguments in ANSWERS.items()},
    ),
    "per_class_accuracy": Case(
        low=(WRONG, LABELS), high=(RIGHT, LABELS), ends=([0] * 4, [1] * 4), some=(SOME, LABELS), refused=ANSWERS
    ),
    "calibration_error": Case(
        low=(RIGHT, LABELS),
        high=(WRONG, LABELS),
        ends=([0], [1]),
        some=(SOME, LABELS),
        refused=ANSWERS | {"one class": (SOME[:, :1], torch.zeros(20, dtype=torch.long))},
    ),
    "prediction_distribution": Case(
        low=(RIGHT[~FIRST],),
        high=(RIGHT[FIRST],),
        ends=([0, 1 / 3, 1 / 3, 1 / 3], [1, 0, 0, 0]),
        some=(SOME,),
        refused={"empty": (EMPTY,), "NaN": (HOLED,), "shapes": (SOME[0],)},
    ),
    "entropy_bits": Case(
        low=([0.0, 1.0, 0.0, 0.0],),
        high=([0.25] * 4,),
        ends=([0], [2]),
        some=(prediction_distribution(SOME),),
        refused={"empty": ([],), "NaN": ([math.nan, 1.0],), "shapes": ([0.5, 0.6],)},
    ),
    "divergence_bits": Case(
        low=([0.5, 0.5], [0.5, 0.5]),
        high=([1.0, 0.0], [0.0, 1.0]),
        ends=([0], [1]),
        some=(prediction_distribution(SOME), prediction_distribution(OTHERS)),
        refused={
            "empty": ([], []),
            "NaN": ([0.5, 0.5], [math.nan, 1.0]),
            "infinite": ([math.inf, 0.5], [0.5, 0.5]),
            "shapes": ([0.5, 0.5], [0.5, 0.5, 0.0]),
            "sums": ([0.5, 0.5], [0.5, 0.6]),
            "negative": ([1.5, -0.5], [0.5, 0.5]),
        },
    ),
    "zero_retrain_forgetting": Case(
        low=(WRONG, RIGHT), high=(RIGHT, RIGHT), ends=([0] * 20, [1] * 20), some=(SOME, OTHERS), refused=PAIRS
    ),
    "activation_distances": Case(
        low=(RIGHT, RIGHT),
        high=(WRONG, RIGHT),
        ends=([0] * 20, [math.sqrt(2)] * 20),
        some=(SOME, OTHERS),
        refused=PAIRS,
    ),
    "tug_of_war": Case(
        low=([0.0, 0.0, -1.0],),
        high=([0.0, 0.0, 0.0],),
        ends=([0], [1]),
        some=([0.1, -0.2, 0.05],),
        refused={
            "empty": ([],),
            "NaN": ([0.0, math.nan, 0.0],),
            "shapes": ([0.0, 0.0],),
            "above": ([0.0, 0.0, 1.1],),
            "below": ([-1.1, 0.0, 0.0],),
        },
    ),
    "layer_distances": Case(
        low=(layer(1.0), layer(1.0)),
        high=(layer(3.0), layer(1.0)),
        ends=([0] * 4, [4, 2, 4, 2]),  # l2 and relative, of the layer and in total
        some=(layer(0.5), layer(2.0)),
        refused={
            "empty": (nn.ReLU(), nn.ReLU()),
            "NaN": (layer(math.nan), layer(1.0)),
            "shapes": (layer(1.0), layer(1.0, 5)),
        },
        unbounded=True,
    ),
}
INTERVALS = {  # see test_uncertainty.py
    "Interval", "Measurement", "differs", "gap_interval", "mean_interval", "of_hits", "of_ranks", "of_seeds",
    "of_values", "wilson_interval",
}  # fmt: skip
COUNTS = {"confusion_counts"}  # no range: see test_looks.py
EVERY = [pytest.param(getattr(metrics, name), case, id=name) for name, case in CASES.items()]


def numbers(found: Any) -> list[float]:
    """The numbers in what a measure takes or gives, one after another."""
    if isinstance(found, nn.Module):
        return [number for parameter in found.parameters() for number in numbers(parameter.detach())]
    if isinstance(found, Tensor):
        return [float(number) for number in found.flatten()]
    if isinstance(found, dict):
        return [number for part in found.values() for number in numbers(part)]
    return [float(number) for number in found] if isinstance(found, list) else [float(found)]


def test_every_measure_has_a_case() -> None:
    assert set(CASES) | INTERVALS | COUNTS == set(metrics.__all__)
    assert metrics.__all__ == sorted(metrics.__all__)
    for case in CASES.values():
        assert {"empty", "NaN", "shapes"} <= set(case.refused)


@pytest.mark.parametrize(("measure", "case"), EVERY)
def test_measures_span_their_range(measure: Callable[..., Any], case: Case) -> None:
    for arguments, expected in zip((case.low, case.high), case.ends, strict=True):
        assert numbers(measure(*arguments)) == pytest.approx(expected, abs=1e-9)
    between = numbers(measure(*case.some))
    assert len(between) == len(case.ends[0])
    assert min(between) >= 0
    assert case.unbounded or max(between) <= max(case.ends[1])
    assert between not in [list(map(float, end)) for end in case.ends]


@pytest.mark.parametrize(("measure", "case"), EVERY)
def test_measures_repeat_and_change_nothing(measure: Callable[..., Any], case: Case) -> None:
    before, state = [numbers(argument) for argument in case.some], torch.get_rng_state()
    first = numbers(measure(*case.some))
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers(measure(*copy.deepcopy(case.some))) == first
    assert [numbers(argument) for argument in case.some] == before


@pytest.mark.parametrize(("measure", "case"), EVERY)
def test_measures_say_their_range_and_that_they_refuse(measure: Callable[..., Any], case: Case) -> None:
    text = inspect.getdoc(measure) or ""
    assert "Raises:\n    InputError" in text
    assert ("at least 0" if case.unbounded else "in [0, ") in text


REFUSALS = [
    pytest.param(getattr(metrics, name), arguments, id=f"{name}, {why}")
    for name, case in CASES.items()
    for why, arguments in case.refused.items()
]


@pytest.mark.parametrize(("measure", "arguments"), REFUSALS)
def test_measures_refuse(measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError) as caught:
        measure(*arguments)
    assert "\n" not in str(caught.value)
