"""Audits on features made by hand, whose answers are known, and on a tiny network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import Tiny, TinyNet, random_images
from expunge.audits import Features, features_of, linear_probe, nearest_class_mean, relearn_steps
from expunge.data import TensorImages
from expunge.errors import InputError


def features(*rows: tuple[float, float, int], times: int = 1) -> Features:
    values = torch.tensor([row[:2] for row in rows], dtype=torch.float32).repeat(times, 1)
    return Features(values, torch.tensor([row[2] for row in rows]).repeat(times))


APART = features((0, 0, 0), (0, 1, 0), (4, 0, 1), (4, 1, 1), (0, 8, 2), (1, 8, 2), times=20)


@pytest.mark.parametrize("audit", [linear_probe, nearest_class_mean])
def test_classes_apart_are_told_from_each_other(audit: object) -> None:
    assert callable(audit)
    test = features((0, 0.5, 0), (4, 0.5, 1), (0.5, 8, 2), (3.9, 0.4, 1))
    for classes in ((0,), (1,), (2,), (0, 1), (0, 1, 2)):
        assert audit(APART, test, classes) == 1.0
    moved = features((0, 0.5, 1), (4, 0.5, 1), (0.5, 8, 1), (4, 0.4, 1))
    assert audit(APART, moved, (1,)) == 0.5  # two of four lie where other classes are


def test_classes_of_the_same_features_are_not() -> None:
    same = features((1, 1, 0), (1, 1, 0), (1, 1, 1), (5, 5, 2), times=20)
    test = features((1, 1, 0), (1, 1, 1))
    assert linear_probe(same, test, (1,)) == 0.0  # the more frequent class wins
    assert linear_probe(same, test, (0,)) == 1.0
    assert nearest_class_mean(same, test, (0, 1)) == 0.5


def test_a_class_around_another_has_the_same_mean() -> None:
    """Means are blind to what no mean tells; a line is, too."""
    around = features((-3, 0, 0), (3, 0, 0), (0, -3, 0), (0, 3, 0), (0, 0.01, 1), (9, 9, 2), times=20)
    assert nearest_class_mean(around, features((3, 0, 0), (-3, -3, 0)), (0,)) == 1.0  # (0, 0) is below (0, 0.01)
    assert nearest_class_mean(around, features((0, 0.01, 1)), (1,)) == 1.0
    assert nearest_class_mean(around, features((0, 3, 0)), (0,)) == 0.0


def test_the_probe_does_not_depend_on_scale_and_offset() -> None:
    test = features((0, 0.5, 0), (2.2, 0.5, 1), (1, 5, 2))
    scale, offset = torch.tensor([1000.0, 0.001]), torch.tensor([-7.0, 5.0])
    turned = [Features(part.values * scale + offset, part.labels) for part in (APART, test)]
    assert linear_probe(turned[0], turned[1], (0, 1, 2)) == linear_probe(APART, test, (0, 1, 2))


def test_probes_refuse() -> None:
    with pytest.raises(InputError, match="expected held-out samples of the forgotten classes, found none"):
        linear_probe(APART, features((0, 0, 0)), (1,))
    with pytest.raises(InputError, match="expected held-out samples of the forgotten classes, found none"):
        nearest_class_mean(APART, features((0, 0, 0)), (1,))
    with pytest.raises(InputError, match="at least two classes"):
        linear_probe(features((0, 0, 0), (1, 1, 0)), features((0, 0, 0)), (0,))


# Features


def test_features_are_the_input_of_the_last_layer(tiny: Tiny) -> None:
    test = tiny.split.test
    assert isinstance(test, TensorImages)
    model = copy.deepcopy(tiny.model).train()
    before = copy.deepcopy(model.state_dict())
    found = features_of(model, test, preprocessing=tiny.split.preprocessing)
    assert found.labels.tolist() == test.labels.tolist()
    assert found.values.shape == (len(test), 128)
    assert isinstance(model, TinyNet)
    assert model.training
    assert model.answer._forward_pre_hooks == {}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.eval()
    assert tiny.split.preprocessing is not None
    images = (test.images.float() / 255 - 0.3) / 0.38
    torch.testing.assert_close(found.values, model.body(images).detach(), atol=1e-5, rtol=1e-4)


def test_features_of_a_convolution_head_are_averaged_over_space() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    data = random_images(9)
    found = features_of(model, data)
    torch.testing.assert_close(found.values, model[:2](data.images).mean((2, 3)).detach())
    early = features_of(model, data, layer="1")
    torch.testing.assert_close(early.values, model[0](data.images).mean((2, 3)).detach())


class Backwards(nn.Module):
    """Its head is defined first, and a spare layer that never runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(64, 4)
        self.spare = nn.Linear(7, 7)

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.head(self.body(images.flatten(1)))
        return answers


def test_the_last_layer_is_the_one_that_runs_last() -> None:
    model, data = Backwards(), random_images(6)
    found = features_of(model, data)
    torch.testing.assert_close(found.values, model.body(data.images.flatten(1)).detach())


def test_features_refuse() -> None:
    data = random_images(6)
    with pytest.raises(InputError, match="no layer 'nothing'"):
        features_of(Backwards(), data, layer="nothing")
    with pytest.raises(InputError, match="'spare' does not run"):
        features_of(Backwards(), data, layer="spare")
    with pytest.raises(InputError, match="no linear or convolution layer"):
        features_of(nn.Flatten(), data)
    with pytest.raises(InputError, match="expected a data set with samples"):
        features_of(Backwards(), TensorImages(data.images[:0], data.labels[:0]))


# Relearning


def test_what_was_not_forgotten_is_there_after_one_step(tiny: Tiny) -> None:
    test = tiny.split.test
    assert isinstance(test, TensorImages)
    threes = TensorImages(test.images[test.labels == 3], test.labels[test.labels == 3])
    before, state = copy.deepcopy(tiny.model.state_dict()), torch.get_rng_state()
    steps = relearn_steps(tiny.model, test, threes, (0.9, 0.5), cap=3, seed=0, preprocessing=tiny.split.preprocessing)
    assert steps == (1, 1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_was_never_known_takes_more_than_a_few_steps(tiny: Tiny) -> None:
    test = tiny.split.test
    assert isinstance(test, TensorImages)
    threes = TensorImages(test.images[test.labels == 3], test.labels[test.labels == 3])
    torch.manual_seed(0)
    untrained = TinyNet()
    given = {"seed": 0, "preprocessing": tiny.split.preprocessing}
    assert relearn_steps(untrained, test, threes, (0.95,), cap=3, **given) == (None,)  # type: ignore[arg-type]
    late, early = relearn_steps(untrained, threes, threes, (0.95, 0.2), cap=60, **given)  # type: ignore[arg-type]
    assert late is not None
    assert early is not None
    assert 1 <= early <= late
    assert 1 < late < 60
    short = relearn_steps(untrained, threes, threes, (0.95, 0.2), cap=late - 1, **given)  # type: ignore[arg-type]
    assert short[0] is None


def test_relearning_refuses_empty_data() -> None:
    data = random_images(6)
    empty = TensorImages(data.images[:0], data.labels[:0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for samples, test in ((empty, data), (data, empty)):
        with pytest.raises(InputError, match="expected a data set with samples"):
            relearn_steps(model, samples, test, (0.5,), seed=0)
