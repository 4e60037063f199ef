"""Where models look: maps whose places are known, and maps computed a second way."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from conftest import Tiny, TinyNet, random_images
from expunge.audits.attention import WHERE_IT_LOOKS, map_layer, maps_of, rank_correlations
from expunge.audits.core import AuditData, Context, Found, Subject
from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.models import build_model, parse_model
from expunge.schema import Preprocessing

# Correlation


def test_correlations_are_those_of_scipy() -> None:
    one = torch.randn((20, 12), generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    other = one + torch.randn((20, 12), generator=torch.Generator().manual_seed(1)).round()
    expected = [float(stats.spearmanr(a, b).statistic) for a, b in zip(one.numpy(), other.numpy(), strict=True)]
    assert rank_correlations(one, other).tolist() == pytest.approx(expected)
    assert rank_correlations(one, one.exp()).tolist() == pytest.approx([1.0] * 20)
    assert rank_correlations(one, -one).tolist() == pytest.approx([-1.0] * 20)
    assert rank_correlations(one, torch.ones(20, 12)).tolist() == [0.0] * 20


# Maps


def test_grad_cam_is_gradients_averaged_over_space_times_maps(tiny: Tiny) -> None:
    model = tiny.model
    assert isinstance(model, TinyNet)
    images = random_images(5).images
    targets = torch.tensor([0, 3, 3, 9, 1])
    layers = list(model.body)
    with torch.no_grad():
        maps = images
        for layer in layers[:6]:
            maps = layer(maps)
    maps.requires_grad_()
    rest = maps
    for layer in layers[6:]:
        rest = layer(rest)
    chosen = model.answer(rest)[torch.arange(5), targets].sum()
    (gradients,) = torch.autograd.grad(chosen, maps)
    by_hand = (gradients.mean((2, 3), keepdim=True) * maps).sum(1).detach()
    assert by_hand.shape == (5, 4, 4)
    assert (by_hand < 0).any()
    torch.testing.assert_close(maps_of(model, images, targets), by_hand, atol=1e-5, rtol=1e-4)


def test_maps_without_layers_are_gradients_of_the_input() -> None:
    torch.manual_seed(0)
    head = nn.Linear(2 * 16 * 16, 3)
    model = nn.Sequential(nn.Flatten(), head)
    images = torch.randn(4, 2, 16, 16)
    targets = torch.tensor([0, 1, 2, 2])
    weights = head.weight.detach()[targets].view(4, 2, 16, 16).abs().amax(1)
    by_hand = weights.view(4, 8, 2, 8, 2).mean((2, 4))
    torch.testing.assert_close(maps_of(model, images, targets), by_hand)


class Plain(nn.Module):
    """An in-place ReLU that is used twice, right behind convolutions, and an answer as transformers give it."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.relu(self.second(self.relu(self.first(images))))
        return Answer(logits=self.head(maps.mean((2, 3))))


class Answer(dict[str, Tensor]):
    @property
    def logits(self) -> Tensor:
        return self["logits"]


def test_activations_in_place_do_not_change_maps() -> None:
    torch.manual_seed(0)
    one = Plain(inplace=True)
    other = Plain(inplace=False)
    other.load_state_dict(one.state_dict())
    images, targets = random_images(4).images, torch.tensor([0, 1, 2, 0])
    assert map_layer(one, images[:1]) == "second"  # the ReLU runs twice
    assert torch.equal(maps_of(one, images, targets), maps_of(other, images, targets))
    assert one.relu.inplace


@pytest.mark.parametrize(
    ("spec", "size", "layer", "places"),
    [
        ("torchvision:resnet18", 32, "layer2", 4),
        ("torchvision:resnet18", 128, "layer4", 4),
        ("timm:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=2&embed_dim=16&num_heads=2", 32, None, 8),
        ("allcnn", 32, "classifier", 8),
    ],
)
def test_the_last_map_that_says_where_is_taken(spec: str, size: int, layer: str | None, places: int) -> None:
    model = build_model(parse_model(spec), num_classes=4, channels=3)
    image = torch.randn(1, 3, size, size)
    assert map_layer(model, image) == layer
    assert maps_of(model, image, torch.tensor([2])).shape == (1, places, places)


def test_a_map_that_pooling_spread_out_is_none() -> None:
    """As in VGG on small images, where 7 x 7 equal places are made of one."""
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 8), nn.AdaptiveAvgPool2d(7), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(4 * 49, 3))
    assert map_layer(model, torch.randn(1, 1, 8, 8)) == "0.0"


# The audit


class TwoColours(nn.Module):
    """Answers with weighted means of the two colours of an image, so Grad-CAM shows where those colours are."""

    def __init__(self, weights: tuple[tuple[float, float], ...]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            for layer in (self.one, self.two):
                layer.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        self.weights = torch.tensor(weights, dtype=torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.two(self.one(images)).mean((2, 3)) @ self.weights.T
        return answers


def coloured() -> AuditData:
    """Images whose first colour is in the left half and whose second is in the right one."""
    images = torch.rand((40, 2, 8, 8), generator=torch.Generator().manual_seed(0)) + 0.1
    images[:, 0, :, 4:] = 0
    images[:, 1, :, :4] = 0
    images[:, 0] *= 2
    return AuditData(forget_classes=(0,), test=TensorImages(images, torch.arange(40) % 2), class_names=("a", "b"))


LOOKS_LEFT = TwoColours(((1, 0), (1.2, 0)))  # of which the second class is answered


def found_by(model: nn.Module, data: AuditData | None = None, original: nn.Module = LOOKS_LEFT) -> Found:
    context = Context(original=Subject("original", original, None), seed=0)
    return WHERE_IT_LOOKS.run(Subject("unlearned", model, None), data or coloured(), context)


def test_a_model_that_looks_elsewhere_for_one_class_is_seen_to() -> None:
    same = found_by(LOOKS_LEFT).figures
    assert same["forget"].value == pytest.approx(1.0)
    assert same["retain"].value == pytest.approx(1.0)
    assert same["forget"].count == same["retain"].count == 20
    moved = found_by(TwoColours(((0, 1), (1.2, 0)))).figures  # the forgotten class is looked for on the right
    assert moved["forget"].interval.high < -0.5
    assert moved["retain"].value == pytest.approx(1.0)
    turned = found_by(TwoColours(((-1, 0), (-3, 0)))).figures  # speaks against what it spoke for
    assert turned["forget"].value == pytest.approx(-1.0)
    assert turned["retain"].value == pytest.approx(-1.0)


def test_a_model_that_looks_nowhere_counts_as_unlike() -> None:
    blind = found_by(TwoColours(((0, 0), (2, 0)))).figures
    assert blind["forget"].value == 0
    assert blind["retain"].value == pytest.approx(1.0)


def test_maps_of_nan_are_refused() -> None:
    with pytest.raises(InputError, match="the maps of the model are NaN or infinite"):
        found_by(TwoColours(((float("nan"), 0), (2, 0))))


def test_figures_do_not_depend_on_temperature() -> None:
    sharp = found_by(TwoColours(((1000, 0), (1200, 0)))).figures
    assert sharp["forget"].value == pytest.approx(1.0)


def test_the_map_on_retained_samples_is_of_the_originals_answer() -> None:
    original = TwoColours(((1, 0), (0, 0.1)))  # answers class a on every image
    other = TwoColours(((0, 1), (0, 0.1)))
    assert found_by(other, original=original).figures["retain"].interval.high < -0.5
    assert found_by(original, original=original).figures["retain"].value == pytest.approx(1.0)


def test_what_is_compared_is_named(tiny: Tiny) -> None:
    assert tiny.split.test is not None
    data = AuditData(forget_classes=(3,), test=tiny.split.test, class_names=())
    original = Subject("original", tiny.model, tiny.split.preprocessing)
    context = Context(original=original, seed=0)
    found = WHERE_IT_LOOKS.run(original, data, context)
    assert found.details == {"map": "Grad-CAM at body.5"}
    assert found.figures["forget"].value == pytest.approx(1.0)
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InputError, match=r"expected maps of \(4, 4\) places, as the original's, got \(8, 8\)"):
        WHERE_IT_LOOKS.run(Subject("unlearned", flat, tiny.split.preprocessing), data, context)
    of_flat = Subject("original", flat, tiny.split.preprocessing)
    found = WHERE_IT_LOOKS.run(of_flat, data, replace(context, original=of_flat))
    assert found.details == {"map": "gradient of the input"}


def test_maps_repeat_and_change_nothing(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert tiny.split.test is not None
    data = AuditData(forget_classes=(3,), test=tiny.split.test, class_names=())
    found = []
    for _ in range(2):
        context = Context(original=Subject("original", tiny.model, tiny.split.preprocessing), seed=0)
        found.append(WHERE_IT_LOOKS.run(Subject("unlearned", model, tiny.split.preprocessing), data, context).figures)
    for name in ("forget", "retain"):
        assert torch.equal(found[0][name].groups[0], found[1][name].groups[0])
        assert found[0][name].value == pytest.approx(1.0)  # the same weights, in train mode
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for module in model.modules():
        assert not module._forward_hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_each_model_reads_images_as_it_was_trained() -> None:
    """The same network for images normalized otherwise looks at the same places."""
    pixels = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = AuditData(forget_classes=(0,), test=TensorImages(pixels, torch.arange(20) % 2), class_names=())
    given, own = (Preprocessing(size=(8, 8), mean=(mean,), std=(0.25,)) for mean in (0.5, 0.25))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 2))
    shifted = copy.deepcopy(model)
    first = shifted[0]
    assert isinstance(first, nn.Conv2d)
    assert first.bias is not None
    with torch.no_grad():  # x' = x + 1
        first.bias -= first.weight.sum((1, 2, 3))
    context = Context(original=Subject("original", model, given), seed=0)
    right = WHERE_IT_LOOKS.run(Subject("unlearned", shifted, own), data, context)
    wrong = WHERE_IT_LOOKS.run(Subject("unlearned", shifted, given), data, context)
    assert right.figures["forget"].value == pytest.approx(1.0, abs=1e-3)
    assert wrong.figures["forget"].value < 0.99
