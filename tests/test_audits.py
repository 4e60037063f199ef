"""Audits on features made by hand, whose answers are known, and on a tiny network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn
from torch.utils.data import Dataset

from conftest import Tiny, TinyNet, random_images
from expunge.audits import Features, features_of, linear_probe, nearest_class_mean, relearn_steps
from expunge.audits.core import AuditData
from expunge.audits.inside import blocks_of, linear_probe_hits, nearest_class_mean_hits
from expunge.audits.relearn import _ordinary_sample, area_under, first_step, relearn_curve
from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.models import AllCNN, build_model, parse_model


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


def blurred(count: int, seed: int) -> Features:
    """Three classes that overlap, in five dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Features(torch.randn((count, 5), generator=generator) + 0.8 * F.one_hot(labels, 5), labels)


def test_hits_are_those_of_scikit_learn() -> None:
    train, test = blurred(300, 0), blurred(200, 1)
    mean, deviation = train.values.numpy().mean(0), train.values.numpy().std(0, ddof=1)
    fitted = LogisticRegression(C=0.01, max_iter=300).fit((train.values.numpy() - mean) / deviation, train.labels)
    centroids = NearestCentroid().fit(train.values.numpy(), train.labels)
    for hits, audit, answers in (
        (linear_probe_hits, linear_probe, fitted.predict((test.values.numpy() - mean) / deviation)),
        (nearest_class_mean_hits, nearest_class_mean, centroids.predict(test.values.numpy())),
    ):
        right = torch.from_numpy(answers) == test.labels
        for classes in ((0,), (1, 2)):
            chosen = torch.isin(test.labels, torch.tensor(classes))
            found = hits(train, test, classes)
            assert found.dtype == torch.bool
            assert found.tolist() == right[chosen].tolist()  # of the samples of these classes, in their order
            assert audit(train, test, classes) == right[chosen].double().mean()
            assert 0 < audit(train, test, classes) < 1


def test_features_that_tell_nothing_have_no_nearest_mean() -> None:
    noise = 1e-7 * torch.randn((60, 4), generator=torch.Generator().manual_seed(0))
    same = Features(torch.full((60, 4), 0.7) + noise, torch.arange(60) % 3)
    assert [nearest_class_mean(same, same, (label,)) for label in (0, 1, 2)] == [0, 0, 0]


def test_probes_refuse_features_that_are_not_finite() -> None:
    values = APART.values.clone()
    values[0, 1] = torch.nan  # of class 0
    for audit in (linear_probe, nearest_class_mean):
        with pytest.raises(InputError, match="expected finite features"):
            audit(Features(values, APART.labels), APART, (0,))
        with pytest.raises(InputError, match="expected finite features"):
            audit(APART, Features(values, APART.labels), (0,))


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


# Blocks


def network(spec: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(parse_model(spec), num_classes=10, channels=3)


VIT = "timm:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=4&embed_dim=64&num_heads=2"
BLOCKS = {
    "torchvision:resnet18": {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512, "head input": 512},
    VIT: {"blocks.0": 64, "blocks.1": 64, "blocks.2": 64, "blocks.3": 64, "head input": 64},
    VIT.replace("depth=4", "depth=2"): {"patch_embed.proj": 64, "blocks.0": 64, "blocks.1": 64, "head input": 64},
    VIT.replace("depth=4", "depth=9"): {**{f"blocks.{n}": 64 for n in (0, 2, 3, 5, 6, 8)}, "head input": 64},
    "torchvision:mobilenet_v2": {
        **{f"features.{n}": width for n, width in ((2, 24), (5, 32), (8, 64), (11, 96), (14, 160), (18, 1280))},
        "head input": 1280,
    },
    "allcnn": {**{f"features.{n}": 96 if n < 10 else 192 for n in (1, 4, 11, 14, 17, 24)}, "head input": 192},
}


@pytest.mark.parametrize("spec", BLOCKS)
def test_blocks_of_known_architectures(spec: str) -> None:
    model, data = network(spec).train(), random_images(3, shape=(3, 32, 32))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = blocks_of(model, data)
    assert {name: part.values.shape[1] for name, part in found.items()} == BLOCKS[spec]
    assert list(found) == list(BLOCKS[spec])  # in the order they run
    assert all(part.values.shape[0] == 3 and part.labels.tolist() == [0, 1, 2] for part in found.values())
    assert torch.equal(found["head input"].values, features_of(model, data).values)
    again = blocks_of(model, data)
    assert all(torch.equal(found[name].values, again[name].values) for name in found)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@torch.no_grad()
def test_features_after_blocks_are_what_the_blocks_give() -> None:
    data = random_images(3, shape=(3, 32, 32))
    resnet: Any = network("torchvision:resnet18").eval()
    second = resnet.layer2(resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(data.images))))))
    found = blocks_of(resnet, data)
    torch.testing.assert_close(found["layer2"].values, second.mean((2, 3)))
    torch.testing.assert_close(found["layer4"].values, found["head input"].values)
    vit: Any = network(VIT).eval()
    tokens = vit.blocks[1](vit.blocks[0](vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(data.images))))))
    assert tokens.shape == (3, 65, 64)
    torch.testing.assert_close(blocks_of(vit, data)["blocks.1"].values, tokens.mean(1))
    flat: Any = AllCNN(10).eval()
    torch.testing.assert_close(blocks_of(flat, data)["features.4"].values, flat.features[:7](data.images).mean((2, 3)))


@torch.no_grad()
def test_blocks_of_a_small_network_are_read_after_activation_and_pooling(tiny: Tiny) -> None:
    model: Any = copy.deepcopy(tiny.model).eval()
    data = random_images(5)
    found = blocks_of(model, data)
    assert list(found) == ["body.0", "body.3", "head input"]
    torch.testing.assert_close(found["body.0"].values, model.body[:3](data.images).mean((2, 3)))
    torch.testing.assert_close(found["body.3"].values, model.body[:7](data.images).mean((2, 3)))  # before it is flat
    torch.testing.assert_close(found["head input"].values, model.body(data.images))


def test_a_single_layer_has_its_input_alone() -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), random_images(6)
    found = blocks_of(model, data)
    assert list(found) == ["head input"]
    assert torch.equal(found["head input"].values, data.images.flatten(1))


class Functional(nn.Module):
    """Activations and pooling are functions, not modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.dense, self.head = nn.Linear(24, 7), nn.Linear(7, 3)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = F.max_pool2d(F.relu(self.first(images)), 2)
        return first, F.max_pool2d(F.relu(self.second(first)), 2)

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.head(F.relu(self.dense(self.maps(images)[1].flatten(1))))
        return answers


@torch.no_grad()
def test_activations_that_are_no_modules_are_passed_too() -> None:
    torch.manual_seed(0)
    model, data = Functional(), random_images(5)
    first, second = model.maps(data.images)
    found = blocks_of(model, data)
    assert list(found) == ["first", "second", "dense", "head input"]
    torch.testing.assert_close(found["first"].values, first.mean((2, 3)))
    torch.testing.assert_close(found["second"].values, second.mean((2, 3)))  # though the next layer takes it flat
    torch.testing.assert_close(found["dense"].values, F.relu(model.dense(second.flatten(1))))


class Skip(nn.Module):
    """A branch that a shortcut passes by: what it gives is not all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        changed: Tensor = maps + self.branch(maps)
        return changed


class ChannelsLast(nn.Module):
    """Maps (N, H, W, D), as Swin transformers have them."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 5)

    def forward(self, maps: Tensor) -> Tensor:
        changed: Tensor = self.layer(maps)
        return changed


class Permute(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1)


@torch.no_grad()
def test_what_a_shortcut_passes_by_is_no_block() -> None:
    torch.manual_seed(0)
    data = random_images(5)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Skip(), Skip(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    found = blocks_of(model, data)
    assert list(found) == ["0", "1", "2", "head input"]
    torch.testing.assert_close(found["1"].values, model[:2](data.images).mean((2, 3)))


@torch.no_grad()
def test_channels_may_come_last() -> None:
    torch.manual_seed(0)
    data = random_images(5)
    blocks = [ChannelsLast(1), ChannelsLast(5), ChannelsLast(5)]
    model = nn.Sequential(Permute(), *blocks, nn.Flatten(), nn.Linear(320, 3))
    found = blocks_of(model, data)
    assert list(found) == ["1", "2", "3", "head input"]
    torch.testing.assert_close(found["2"].values, model[:3](data.images).mean((1, 2)))


def test_blocks_of_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    found = blocks_of(model, random_images(3))
    assert len(found) >= 4
    assert all(name.startswith("vit.") for name in list(found)[:-1])
    assert {part.values.shape for part in found.values()} == {(3, 8)}
    assert len({part.values.sum().item() for part in found.values()}) == len(found)


class Counted(Dataset[Any]):
    def __init__(self, images: TensorImages) -> None:
        self.images = images
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        return self.images[index]


def test_blocks_take_one_pass_over_the_data(tiny: Tiny) -> None:
    data = Counted(random_images(300))
    found = blocks_of(tiny.model, data)
    assert data.read == list(range(300))
    assert {len(part.values) for part in found.values()} == {300}


def test_blocks_are_spread_over_depth() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(9)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), *layers, nn.Linear(4, 3))
    data = random_images(3)
    assert list(blocks_of(model, data, most=3)) == ["4", "7", "10", "head input"]
    assert list(blocks_of(model, data, most=1)) == ["10", "head input"]
    assert len(blocks_of(model, data, most=20)) == 10
    with pytest.raises(InputError, match="at least, got most=0"):
        blocks_of(model, data, most=0)


def test_blocks_refuse() -> None:
    data = random_images(6)
    with pytest.raises(InputError, match="no linear or convolution layer"):
        blocks_of(nn.Flatten(), data)
    with pytest.raises(InputError, match="expected a data set with samples"):
        blocks_of(Backwards(), TensorImages(data.images[:0], data.labels[:0]))


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


def test_relearning_needs_images_to_be_relearned() -> None:
    def data(forgotten: int) -> AuditData:
        labels = torch.tensor([0] * forgotten + [1] * 1280)
        images = TensorImages(torch.zeros((len(labels), 1, 2, 2), dtype=torch.uint8), labels)
        return AuditData(forget_classes=(0,), test=images, train=images, class_names=("a", "b"))

    assert len(_ordinary_sample(data(12), 2000, seed=0)) == 1292
    with pytest.raises(
        InputError, match=r"a forgotten class in each batch of 128 on average, .*, got 3 in 1,283 images"
    ):
        _ordinary_sample(data(3), 2000, seed=0)


def test_relearning_refuses_empty_data() -> None:
    data = random_images(6)
    empty = TensorImages(data.images[:0], data.labels[:0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for samples, test in ((empty, data), (data, empty)):
        with pytest.raises(InputError, match="expected a data set with samples"):
            relearn_steps(model, samples, test, (0.5,), seed=0)


def test_steps_are_read_off_the_curve(tiny: Tiny) -> None:
    test = tiny.split.test
    assert isinstance(test, TensorImages)
    threes = TensorImages(test.images[test.labels == 3], test.labels[test.labels == 3])
    torch.manual_seed(0)
    untrained = TinyNet()
    given = {"cap": 12, "seed": 3, "preprocessing": tiny.split.preprocessing}
    whole = relearn_curve(untrained, threes, threes, 2.0, **given)  # type: ignore[arg-type]
    assert len(whole) == 12  # never reached
    goal = sorted(whole)[6]
    short = relearn_curve(untrained, threes, threes, goal, **given)  # type: ignore[arg-type]
    reached = first_step(whole, goal)
    assert reached is not None
    assert short == whole[:reached]  # stops there, and is the same until there
    assert relearn_steps(untrained, threes, threes, (goal, 2.0), **given) == (reached, None)  # type: ignore[arg-type]
    assert area_under(short, goal, 12) == area_under(whole, goal, 12)


def test_frozen_models_relearn_too(tiny: Tiny) -> None:
    test = tiny.split.test
    assert isinstance(test, TensorImages)
    frozen = copy.deepcopy(tiny.model).requires_grad_(False)
    given = {"cap": 2, "seed": 0, "preprocessing": tiny.split.preprocessing}
    assert relearn_curve(frozen, test, test, 2.0, **given) == relearn_curve(tiny.model, test, test, 2.0, **given)  # type: ignore[arg-type]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_the_area_under_a_curve() -> None:
    assert first_step((0.5, 1.0), 0.8) == 2
    assert first_step((0.5, 0.8), 0.8) == 2
    assert first_step((0.5, 0.7), 0.8) is None
    assert area_under((0.4, 1.0), 0.8, 4) == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert area_under((0.4, 0.2, 0.6, 0.0), 0.8, 4) == pytest.approx((0.5 + 0.5 + 0.75 + 0.75) / 4)  # the best so far
    assert area_under((0.9,), 0.8, 7) == 1
    assert area_under((0.0,) * 5, 0.8, 5) == 0
