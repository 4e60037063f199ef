"""The mathematics of methods, against numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from conftest import Tiny, TinyNet, random_images
from expunge.batches import Batch
from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.bad_teacher import BadTeacherConfig, two_teachers
from expunge.methods.common import (
    batches,
    bears,
    both_samples,
    derived_seed,
    divergence,
    forget_samples,
    fresh_copy,
    num_steps,
    sgd,
)
from expunge.methods.fine_tune import FineTuneConfig, fine_tune
from expunge.methods.head_mask import HeadMaskConfig, head_mask
from expunge.methods.l1_sparse import L1SparseConfig, l1_sparse, sparse_loss
from expunge.methods.neg_grad import NegGradConfig, ascent, neg_grad
from expunge.methods.neg_grad_plus import NegGradPlusConfig, contrast
from expunge.methods.random_labels import RandomLabelsConfig, random_label_loss, random_labels
from expunge.methods.retrain import RetrainConfig, retrain
from expunge.methods.salun import SalunConfig, forget_gradients, most_salient, salun
from expunge.methods.scrub import ScrubConfig, disobey, obey, scrub
from expunge.models import AllCNN
from expunge.schema import Preprocessing, Split, TrainConfig
from expunge.training import predict, train

LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2


class Says(nn.Module):
    """A model that answers the same on every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


class Stream(IterableDataset[Any]):
    """Images as a stream, in an order of their own in each epoch."""

    def __init__(self, images: TensorImages) -> None:
        self.images = images
        self.labels = images.labels
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch))
        return (self.images[int(index)] for index in order)


def batch(*labels: int, classes: int = 2) -> Batch:
    return Batch(torch.zeros(len(labels), 1, 1, classes), torch.tensor(labels), None)


def three_classes(retain: int = 40, forget: int = 20) -> Split:
    """A split of easy images whose class 2 is to be forgotten."""
    images = random_images(120)
    kept, lost = (torch.nonzero((images.labels == 2) == wanted).flatten() for wanted in (False, True))
    return Split(
        forget_classes=(2,),
        retain=TensorImages(images.images[kept[:retain]], images.labels[kept[:retain]]),
        forget=TensorImages(images.images[lost[:forget]], images.labels[lost[:forget]]),
    )


# Losses


def test_divergence_is_kl_in_nats() -> None:
    answers = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(divergence(answers, logits), torch.tensor([expected, 0.0]))
    torch.testing.assert_close(divergence(answers * 2, logits, 2.0), 4 * divergence(answers, logits))


def test_ascent_is_minus_cross_entropy() -> None:
    assert ascent(LOGITS, batch(1, 0)).item() == pytest.approx((math.log(1 / 4) + math.log(1 / 2)) / 2)


def test_contrast_weighs_the_two_means() -> None:
    logits = torch.cat([LOGITS, LOGITS[:1]])
    loss = contrast(0.9, (1,))(logits, batch(0, 0, 1))
    retained = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert loss.item() == pytest.approx(0.9 * retained - 0.1 * -math.log(1 / 4))
    assert contrast(0.9, (1,))(LOGITS, batch(0, 0)).item() == pytest.approx(0.9 * retained)
    assert contrast(0.9, (0,))(LOGITS, batch(0, 0)).item() == pytest.approx(-0.1 * retained)


def test_random_labels_are_retained_ones() -> None:
    logits = torch.zeros(400, 5, requires_grad=True)
    labels = torch.tensor([1, 3, 2, 1] * 100)  # 1 is to be forgotten, 3 was before
    random_label_loss((1, 3), 5)(logits, Batch(torch.zeros(400, 1, 1, 1), labels, None)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    taught = logits.grad.argmin(1)  # the gradient of cross-entropy is probabilities minus the label
    assert torch.equal(taught[labels == 2], labels[labels == 2])
    drawn = Counter(taught[labels != 2].tolist())
    assert set(drawn) == {0, 2, 4}
    assert min(drawn.values()) > 70  # of 300, a third each


def test_each_teacher_has_its_samples() -> None:
    objective = two_teachers(Says(math.log(3.0), 0.0), Says(0.0, math.log(3.0)), (1,), 1.0)
    uniform = torch.zeros(2, 2)
    one = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert objective(uniform, batch(0, 1)).item() == pytest.approx(one)
    agrees = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    assert objective(agrees, batch(0, 1)).item() == pytest.approx(0.0, abs=1e-6)
    assert objective(agrees, batch(1, 1)).item() == pytest.approx(math.log(3.0) / 2 / 2, rel=1e-5)
    assert objective(agrees[:1], batch(0)).item() == pytest.approx(0.0, abs=1e-6)


def test_scrub_disobeys_and_obeys() -> None:
    teacher = Says(0.0, 0.0)
    distance = divergence(torch.zeros(2, 2), LOGITS, 4.0).mean().item()
    assert distance > 0
    assert disobey(teacher, 4.0)(LOGITS, batch(0, 0)).item() == pytest.approx(-distance)
    config = ScrubConfig(temperature=4.0, distil_weight=0.1, label_weight=2.0)
    cross_entropy = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert obey(teacher, config)(LOGITS, batch(0, 0)).item() == pytest.approx(0.1 * distance + 2.0 * cross_entropy)


def test_the_penalty_decays_to_nothing() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.fill_(100.0)
    model.bias.requires_grad_(False)  # so it is not weighed
    objective = sparse_loss(model, 0.5, steps=4)
    cross_entropy = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    losses = [objective(LOGITS, batch(0, 0)).item() - cross_entropy for _ in range(6)]
    assert losses == pytest.approx([1.5, 1.125, 0.75, 0.375, 0.0, 0.0], abs=1e-6)


# Saliency


def test_most_salient_weights_are_those_of_the_largest_gradients() -> None:
    gradients = {"one": torch.tensor([[1.0, -5.0], [0.0, 2.0]]), "two": torch.tensor([-3.0, 0.5])}
    mask = most_salient(gradients, 0.5)
    assert mask["one"].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert mask["two"].tolist() == [1.0, 0.0]
    tied = most_salient({"one": torch.ones(10)}, 0.3)
    assert tied["one"].sum() == 3


def test_forget_gradients_of_a_linear_model() -> None:
    split = three_classes()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    journal = Journal()
    gradients = forget_gradients(model, split, journal=journal)
    assert isinstance(split.forget, TensorImages)
    flat = split.forget.images.flatten(1)
    error = layer(flat).softmax(1).detach() - torch.eye(3)[split.forget.labels]
    torch.testing.assert_close(gradients["1.weight"], error.T @ flat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients["1.bias"], error.sum(0), rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None
    assert journal.phases[0].label_counts == {2: 20}


def test_salun_moves_salient_weights_alone(tiny: Tiny) -> None:
    split = replace(tiny.split, forget=TensorImages(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.full((8,), 3)))
    config = SalunConfig(share=0.2, training=sgd(epochs=1, weight_decay=0.0))
    model = copy.deepcopy(tiny.model)
    mask = most_salient(forget_gradients(model, split), 0.2)
    moved = salun(model, split, config, seed=0)
    chosen, others = 0, 0
    for name, parameter in moved.named_parameters():
        changed = parameter != model.get_parameter(name)
        assert not changed[mask[name] == 0].any(), f"a masked weight of {name} moved"
        chosen += int(changed.sum())
        others += changed.numel()
        assert not parameter._backward_hooks
    assert 0.15 * others < chosen <= round(0.2 * others)


def test_salun_refuses_what_would_move_masked_weights() -> None:
    with pytest.raises(InputError, match="expected a weight_decay of 0, got"):
        SalunConfig(training=sgd())
    with pytest.raises(InputError, match="expected a share above 0"):
        SalunConfig(share=0.0)


# What is shared


def test_published_recipe() -> None:
    assert sgd() == TrainConfig(epochs=10, lr=0.01, optimizer="sgd", momentum=0.9, weight_decay=5e-4, batch_size=64)
    assert sgd(lr=0.1).lr == 0.1


def test_labels_that_are_gone() -> None:
    split = replace(three_classes(), forgotten_before=(1,))
    assert split.gone == (2, 1)
    assert bears(torch.tensor([0, 1, 2, 2]), (2, 1)).tolist() == [False, True, True, True]
    with pytest.raises(InputError, match="none were given"):
        forget_samples(split.zero_glance())


@pytest.mark.parametrize("size", [1, 3, 4, 8, 9, 10])
@pytest.mark.parametrize("config", [TrainConfig(epochs=2, batch_size=4), TrainConfig(steps=5, batch_size=4)])
def test_steps_are_as_many_as_training_takes(size: int, config: TrainConfig) -> None:
    journal = Journal()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images = random_images(size)
    train(model, images, config, seed=0, journal=journal)
    assert num_steps(images, config) == journal.phases[0].steps
    stream: Dataset[Any] = Stream(images)
    train(model, stream, config, seed=0, journal=journal)
    assert num_steps(stream, config) == journal.phases[1].steps


def test_batches_are_all_samples_in_order() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    preprocessing = Preprocessing(size=(1, 1), mean=(0.0,), std=(1 / 255,))
    parts = list(batches(TensorImages(images, torch.arange(10)), preprocessing, torch.device("cpu"), size=4))
    assert [len(part.labels) for part in parts] == [4, 4, 2]
    torch.testing.assert_close(torch.cat([part.images for part in parts]).flatten(), torch.arange(10.0))
    assert torch.cat([part.labels for part in parts]).tolist() == list(range(10))


@pytest.mark.parametrize("streamed", [(), ("retain",), ("retain", "forget")])
def test_both_samples_are_each_shown_once(streamed: tuple[str, ...]) -> None:
    split = three_classes()
    changed = {name: Stream(getattr(split, name)) for name in streamed}
    both: Any = both_samples(replace(split, **changed), seed=0)  # type: ignore[arg-type]
    assert len(both) == 60
    orders = []
    for epoch in (0, 1):
        if streamed:
            both.set_epoch(epoch)
        samples = [both[index] for index in range(60)] if not streamed else list(both)
        assert Counter(int(label) for _, label in samples) == {0: 20, 1: 20, 2: 20}
        assert len({image.sum().item() for image, _ in samples}) == 60
        orders.append([int(label) for _, label in samples])
    if streamed:
        assert orders[0] != orders[1]
        assert 5 < sum(label == 2 for label in orders[0][:30]) < 15  # spread over the epoch


def test_a_method_runs_on_streams() -> None:
    split = three_classes()
    assert isinstance(split.retain, TensorImages)
    assert isinstance(split.forget, TensorImages)
    model = TinyNet(3)
    train(model, random_images(120), TrainConfig(epochs=3, lr=0.01, batch_size=20), seed=0)
    journal = Journal()
    streamed = replace(split, retain=Stream(split.retain), forget=Stream(split.forget))
    changed = random_labels(model, streamed, RandomLabelsConfig(training=sgd(batch_size=20)), seed=0, journal=journal)
    assert journal.phases[0].label_counts == {0: 200, 1: 200, 2: 200}
    answers = predict(changed, split.forget).logits.argmax(1)
    assert predict(model, split.forget).logits.argmax(1).eq(2).double().mean() > 0.9
    assert answers.eq(2).double().mean() < 0.1


def test_a_fresh_copy_keeps_what_is_frozen() -> None:
    model = TinyNet()
    train(model, random_images(30), TrainConfig(epochs=1, lr=0.1, batch_size=10), seed=0)
    norm = model.body[1]
    norm.requires_grad_(False)
    model.answer.bias.requires_grad_(False)
    old, new = model.state_dict(), fresh_copy(model, seed=0).state_dict()
    stayed = {key for key in old if torch.equal(old[key], new[key])}
    assert stayed == {key for key in old if key.startswith("body.1.")} | {"answer.bias"}
    assert not torch.equal(new["answer.weight"], fresh_copy(model, seed=1).state_dict()["answer.weight"])


def test_parts_of_a_run_have_seeds_of_their_own() -> None:
    seeds = {derived_seed(seed, *parts) for seed in (0, 1) for parts in ((), (0,), (1,), (0, 0), (0, 1), (1, 0))}
    assert len(seeds) == 12
    assert derived_seed(3, 1, 2) == int(np.random.SeedSequence((3, 2, 3)).generate_state(1)[0])  # as it ever was


# Methods


def test_ascent_leaves_statistics_alone(tiny: Tiny) -> None:
    split = replace(tiny.split, forget=TensorImages(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.full((8,), 3)))
    changed = neg_grad(tiny.model, split, NegGradConfig(training=replace(NegGradConfig().training, steps=2)), seed=0)
    for key, value in tiny.model.state_dict().items():
        assert torch.equal(changed.state_dict()[key], value) == ("running" in key or "num_batches" in key), key


def test_scrub_alternates() -> None:
    config = ScrubConfig(rounds=3, forget_rounds=2, forget=sgd(steps=2, batch_size=10), repair=sgd(epochs=1))
    journal = Journal()
    scrub(TinyNet(3), three_classes(), config, seed=0, journal=journal)
    assert [phase.name for phase in journal.phases] == ["forget", "repair", "forget", "repair", "repair"]
    assert [set(phase.label_counts) for phase in journal.phases] == [{2}, {0, 1}, {2}, {0, 1}, {0, 1}]


def test_l1_makes_weights_smaller(tiny: Tiny) -> None:
    split = tiny.split.zero_glance()
    training = sgd(epochs=3, lr=0.1)

    def size(model: nn.Module) -> float:
        return sum(parameter.abs().sum().item() for parameter in model.parameters())

    plain = fine_tune(tiny.model, split, FineTuneConfig(training=training), seed=0)
    none = l1_sparse(tiny.model, split, L1SparseConfig(penalty=0.0, training=training), seed=0)
    sparse = l1_sparse(tiny.model, split, L1SparseConfig(penalty=1e-3, training=training), seed=0)
    assert size(none) == pytest.approx(size(plain), rel=1e-4)  # without a penalty it is fine-tuning
    assert size(sparse) < 0.9 * size(plain)


def test_retraining_starts_from_nothing(tiny: Tiny) -> None:
    split = tiny.split.zero_glance()
    other = TinyNet()  # what the weights were does not matter, only which layers there are
    config = RetrainConfig(training=replace(RetrainConfig().training, steps=2))
    one, two = (retrain(model, split, config, seed=0).state_dict() for model in (tiny.model, other))
    assert all(torch.equal(one[key], two[key]) for key in one)


# The head mask


def masked_logits(model: nn.Module, split: Split, **settings: float) -> tuple[Tensor, Tensor, nn.Module]:
    masked = head_mask(model, split.zero_glance(), HeadMaskConfig(**settings), seed=0)
    return predict(model, split.retain).logits, predict(masked, split.retain).logits, masked


@pytest.mark.parametrize("model", [TinyNet(3), AllCNN(3, 1)], ids=["linear", "convolution"])
def test_head_mask_lowers_the_forgotten_logit(model: nn.Module) -> None:
    before, after, masked = masked_logits(model.eval(), three_classes(), margin=50.0)
    torch.testing.assert_close(after, before - torch.tensor([0.0, 0.0, 50.0]), rtol=0, atol=1e-4)
    old, new = model.state_dict(), masked.state_dict()
    changed = [key for key in old if not torch.equal(old[key], new[key])]
    assert changed in (["answer.bias"], ["classifier.bias"])


def test_head_mask_finds_the_layer_that_is_last() -> None:
    decoy = nn.Linear(64, 3)  # as wide as the head, and called before it
    model = nn.Sequential(nn.Flatten(), decoy, nn.ReLU(), nn.Linear(3, 3))
    before, after, masked = masked_logits(model, three_classes())
    torch.testing.assert_close(after, before - torch.tensor([0.0, 0.0, 50.0]), rtol=0, atol=1e-4)
    assert torch.equal(masked.get_parameter("1.bias"), decoy.bias)


def frozen_head() -> nn.Module:
    model = TinyNet(3)
    model.answer.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU()),
        frozen_head(),
    ],
    ids=["no bias", "softmax", "relu", "frozen"],
)
def test_head_mask_refuses_other_heads(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="cannot mask this model's head"):
        head_mask(model, three_classes().zero_glance(), seed=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (HeadMaskConfig, {"margin": 0.0}, "positive margin"),
        (NegGradPlusConfig, {"beta": 1.0}, "beta between 0 and 1"),
        (BadTeacherConfig, {"temperature": 0.0}, "positive temperature"),
        (ScrubConfig, {"temperature": -1.0}, "positive temperature"),
        (ScrubConfig, {"rounds": 2, "forget_rounds": 3}, "1 to 2 forget_rounds"),
        (L1SparseConfig, {"penalty": -1.0}, "penalty of at least 0"),
    ],
)
def test_configs_refuse_nonsense(config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**settings)
