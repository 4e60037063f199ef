"""What answers give away, on answers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Tiny
from expunge.audits.core import AuditData, Context, Found, Subject
from expunge.audits.leakage import NEIGHBOUR_LEAKAGE
from expunge.data import TensorImages
from expunge.errors import InputError

CLASSES = 5  # the first is forgotten


class Told(nn.Module):
    """Answers with the channels of the image from a number on: the test writes answers into images."""

    def __init__(self, start: int, scale: float = 1.0) -> None:
        super().__init__()
        self.start = start
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images.flatten(1)[:, self.start : self.start + CLASSES]


def noise(count: int, seed: int) -> Tensor:
    return torch.randn((count, CLASSES), generator=torch.Generator().manual_seed(seed))


def audit(of_forgotten: Tensor, of_retained: Tensor, scale: float = 1.0, **given: Any) -> Found:
    """Run on 200 images of class 0 and 100 of each other; the original sees class 1 next to 3/4 of them, else class 2.

    Args:
        of_forgotten: (200, C) what the model answers on images of class 0.
        of_retained: (400, C) on images of class 1 (the first hundred), 2, 3 and 4.
    """
    labels = torch.cat([torch.zeros(200, dtype=torch.long), torch.arange(1, 5).repeat_interleave(100)])
    original = noise(600, 9) * 0.01
    original[torch.arange(600), labels] += 5
    original[:150, 1] += 2
    original[150:200, 2] += 2
    images = torch.cat([torch.cat([of_forgotten, of_retained]), original], 1).view(600, 2 * CLASSES, 1, 1)
    data = AuditData(forget_classes=(0,), test=TensorImages(images, labels), class_names=tuple("abcde"))
    context = Context(original=Subject("original", Told(CLASSES), None), seed=0)
    return NEIGHBOUR_LEAKAGE.run(Subject("unlearned", Told(0, scale), None), replace(data, **given), context)


def of_class(label: int, count: int, seed: int) -> Tensor:
    answers = noise(count, seed)
    answers[:, label] += 3
    return answers


RETAINED = torch.cat([of_class(label, 100, label) for label in range(1, 5)])
ALIKE = torch.cat([of_class(1, 150, 7), of_class(2, 50, 8)])  # as the neighbours answer


def test_answers_like_the_neighbours_give_nothing_away() -> None:
    found = audit(ALIKE, RETAINED)
    told = found.figures["told apart"]
    assert told.interval.low < 0.5 < told.interval.high
    assert told.count == 300  # 100 next to class 1, of which there are no more, and 50 next to class 2; and as many
    assert found.details["neighbours"] == {"b": 100, "c": 50}


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])  # temperature hides nothing
@pytest.mark.parametrize("how", ["the logit pushed down", "unsure", "surer"])
def test_answers_of_another_kind_give_the_class_away(how: str, scale: float) -> None:
    answers = ALIKE.clone()
    if how == "the logit pushed down":
        answers[:, 0] -= 9
    else:
        answers *= 0.1 if how == "unsure" else 5
    assert audit(answers, RETAINED, scale).figures["told apart"].interval.low > 0.8


def test_a_masked_logit_hides_nothing_else() -> None:
    answers, retained = ALIKE.clone(), RETAINED.clone()
    answers[:, 0] = retained[:, 0] = -math.inf
    masked = audit(answers, retained).figures["told apart"]
    assert masked.interval.low < 0.5 < masked.interval.high
    assert audit(answers * torch.tensor([1, 0.1, 0.1, 0.1, 0.1]), retained).figures["told apart"].interval.low > 0.8


def test_collapse_onto_one_answer_is_counted() -> None:
    answers = torch.zeros(200, CLASSES)
    answers[torch.arange(200), torch.tensor([3] * 100 + [4] * 50 + [1] * 50)] = 1
    found = audit(answers, RETAINED)
    assert found.figures["concentration"].groups[0].tolist() == [1.0] * 100 + [0.0] * 100
    assert found.details["answers"] == {"a": {"b": 0.25, "d": 0.5, "e": 0.25}}
    assert found.details["entropy_bits"] == {"a": 1.5}
    collapsed = torch.eye(CLASSES)[[3] * 200]
    assert audit(collapsed, RETAINED).figures["concentration"].value == 1.0
    assert audit(collapsed, RETAINED).details["entropy_bits"] == {"a": 0.0}
    named = audit(collapsed, RETAINED, class_names=())
    assert named.details["answers"] == {"0": {"3": 1.0}}


def test_each_forgotten_class_has_its_own_most_frequent_answer() -> None:
    answers = torch.eye(CLASSES)[[3] * 200]
    retained = RETAINED.clone()
    retained[:100] = torch.eye(CLASSES)[[2] * 100]  # class 1 is forgotten too and falls onto class 2
    found = audit(answers, retained, forget_classes=(0, 1))
    assert found.figures["concentration"].value == 1.0
    assert found.figures["concentration"].count == 300
    assert found.details["entropy_bits"] == {"a": 0.0, "b": 0.0}
    assert "b" not in found.details["neighbours"]


def test_nothing_to_compare_with_is_refused() -> None:
    with pytest.raises(InputError, match="expected held-out samples of retained classes"):
        audit(ALIKE, RETAINED, forget_classes=(0, 1, 2, 3, 4))
    with pytest.raises(InputError, match="classes that look like the forgotten ones"):
        audit(ALIKE, RETAINED, test=only_class_4_stays())
    with pytest.raises(InputError, match="NaN"):
        audit(ALIKE * math.nan, RETAINED)


def only_class_4_stays() -> TensorImages:
    images = torch.zeros(20, 2 * CLASSES, 1, 1)
    images[:, CLASSES + 1] = 1
    return TensorImages(images, torch.tensor([0] * 10 + [4] * 10))


def test_the_model_itself_decides_nothing_about_samples(tiny: Tiny) -> None:
    """The original is told apart wholly from itself; both run on the same samples, and the same again."""
    assert tiny.split.test is not None
    data = AuditData(forget_classes=(3,), test=tiny.split.test, class_names=tiny.split.class_names)
    original = Subject("original", tiny.model, tiny.split.preprocessing)
    context = Context(original=original, seed=0)
    state = torch.get_rng_state()
    one, two = (NEIGHBOUR_LEAKAGE.run(original, data, context) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.figures["told apart"].interval.low > 0.8
    assert one.figures["concentration"].value > 0.9
    assert one.figures["told apart"].groups[0].tolist() == two.figures["told apart"].groups[0].tolist()
    torch.manual_seed(0)
    other = Subject("other", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), tiny.split.preprocessing)
    found = NEIGHBOUR_LEAKAGE.run(other, data, context)
    assert found.details["neighbours"] == one.details["neighbours"]
    assert {name: figure.count for name, figure in found.figures.items()} == {
        name: figure.count for name, figure in one.figures.items()
    }
