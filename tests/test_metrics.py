"""Measures against closed forms and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score
from torch import nn

from expunge.errors import InputError
from expunge.metrics import (
    accuracy,
    entropy_bits,
    layer_distances,
    masked_accuracy,
    per_class_accuracy,
    prediction_distribution,
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
