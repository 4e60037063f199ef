"""Images learned from a model, shown to the model that knows the class."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from conftest import Tiny, TinyNet
from expunge.audits import inversion
from expunge.audits.core import AuditData, Context, Found, Subject
from expunge.audits.inversion import IMAGES, INVERSION
from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.schema import Preprocessing


def audit(tiny: Tiny, model: nn.Module, preprocessing: Preprocessing | None = None) -> Found:
    assert tiny.split.test is not None
    data = AuditData(forget_classes=(3,), test=tiny.split.test, class_names=tiny.split.class_names)
    original = Subject("original", tiny.model, tiny.split.preprocessing)
    subject = Subject("unlearned", model, preprocessing or tiny.split.preprocessing)
    return INVERSION.run(subject, data, Context(original=original, seed=0))


def values(found: Found) -> tuple[float, float]:
    return found.figures["called by the original"].value, found.figures["probability of the original"].value


def test_a_model_that_knows_the_class_gives_it_away(tiny: Tiny) -> None:
    found = audit(tiny, tiny.model)
    assert found.figures["called by the original"].count == IMAGES
    assert values(found)[0] == 1.0
    assert values(found)[1] > 0.9
    assert found.details["called_by_the_model_itself"] == 1.0


def test_a_masked_head_hides_nothing(tiny: Tiny) -> None:
    masked = copy.deepcopy(tiny.model)
    assert isinstance(masked, TinyNet)
    with torch.no_grad():
        masked.answer.bias[3] -= 50
    found = audit(tiny, masked)
    assert found.details["called_by_the_model_itself"] < 0.1
    assert values(found)[0] > 0.9


def test_a_model_that_never_learned_gives_nothing_away(tiny: Tiny) -> None:
    torch.manual_seed(0)
    found = audit(tiny, TinyNet())
    assert found.details["called_by_the_model_itself"] > 0.9  # it was brought to call them so
    assert values(found)[0] < 0.3
    assert values(found)[1] < 0.3


def test_the_figures_are_what_the_original_answers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, drawn = inversion._draw, torch.empty(0)

    def kept(subject: Subject, starts: Tensor, labels: Tensor, context: Context) -> Tensor:
        nonlocal drawn
        drawn = draw(subject, starts, labels, context)
        return drawn

    monkeypatch.setattr(inversion, "_draw", kept)
    torch.manual_seed(0)
    found = audit(tiny, TinyNet())
    with torch.no_grad():
        probabilities = tiny.model(drawn).double().softmax(1)
    assert found.figures["called by the original"].groups[0].tolist() == (probabilities.argmax(1) == 3).tolist()
    seen = found.figures["probability of the original"].groups[0]
    torch.testing.assert_close(seen.float(), probabilities[:, 3].float())


class Shifted(nn.Module):
    """The same network for images that were normalized otherwise."""

    def __init__(self, model: nn.Module, given: Preprocessing, own: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.scale, self.offset = own.std[0] / given.std[0], (own.mean[0] - given.mean[0]) / given.std[0]

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.model(images * self.scale + self.offset)
        return answers


def test_models_of_other_preprocessing_see_the_same_pictures(tiny: Tiny) -> None:
    given = tiny.split.preprocessing
    assert given is not None
    own = replace(given, mean=(0.5,), std=(0.2,))
    masked = copy.deepcopy(tiny.model)
    found = audit(tiny, Shifted(masked, given, own), own)
    assert values(found)[0] == 1.0
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    there = inversion._between(images, given, own)
    torch.testing.assert_close(there * 0.2 + 0.5, images * 0.38 + 0.3)
    torch.testing.assert_close(inversion._between(there, own, given), images)
    assert torch.equal(inversion._between(images, None, own), images)
    starts = [audit_starts(tiny, given), audit_starts(tiny, own)]
    torch.testing.assert_close(starts[0] * 0.38 + 0.3, starts[1] * 0.2 + 0.5)


def audit_starts(tiny: Tiny, own: Preprocessing) -> Tensor:
    """Return what a model of some preprocessing starts from."""
    assert tiny.split.test is not None
    data = AuditData(forget_classes=(3,), test=tiny.split.test, class_names=())
    context = Context(original=Subject("original", tiny.model, tiny.split.preprocessing), seed=0)
    return inversion._between(inversion._starts(data, context, 8), tiny.split.preprocessing, own)


def test_images_start_from_noise_and_from_blends_of_retained_ones() -> None:
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 4, 4)
    data = AuditData(
        forget_classes=(0,), test=TensorImages(images, torch.tensor([0] * 5 + [1] * 5)), class_names=("a", "b")
    )
    context = Context(original=Subject("original", nn.Flatten(), None), seed=0)
    starts = inversion._starts(data, context, 8)
    flat = starts.flatten(1)
    assert (flat.std(1)[:4] > 0.3).all()  # noise
    assert (flat.std(1)[4:] == 0).all()  # means of two constant images
    assert ((flat[4:, 0] >= 5) & (flat[4:, 0] <= 9)).all()  # none of the forgotten class
    assert torch.equal(starts, inversion._starts(data, context, 8))


def test_inversion_repeats_and_changes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "STEPS", 4)
    model = copy.deepcopy(tiny.model).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    one, two = audit(tiny, model), audit(tiny, model)
    for name in one.figures:
        assert torch.equal(one.figures[name].groups[0], two.figures[name].groups[0])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_each_forgotten_class_gets_images(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "STEPS", 1)
    assert tiny.split.test is not None
    original = Subject("original", tiny.model, tiny.split.preprocessing)
    asked: list[Tensor] = []
    draw = inversion._draw

    def noted(subject: Subject, starts: Tensor, labels: Tensor, context: Context) -> Tensor:
        asked.append(labels)
        return draw(subject, starts, labels, context)

    monkeypatch.setattr(inversion, "_draw", noted)
    for forget in ((3, 5, 7), (8,)):
        data = AuditData(forget_classes=forget, test=tiny.split.test, class_names=())
        INVERSION.run(original, data, Context(original=original, seed=0))
    assert torch.bincount(asked[0]).tolist() == [0, 0, 0, 11, 0, 11, 0, 10]
    assert asked[1].tolist() == [8] * IMAGES


def test_a_model_that_gives_nan_is_refused(tiny: Tiny) -> None:
    broken = copy.deepcopy(tiny.model)
    assert isinstance(broken, TinyNet)
    with torch.no_grad():
        broken.answer.bias[0] = math.nan
    with pytest.raises(InputError, match="the model gives NaN"):
        audit(tiny, broken)
