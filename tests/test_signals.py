"""Impressions and signals, against closed forms on models whose logits are set by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from conftest import Tiny, random_images
from expunge.data import (
    StreamedImages,
    TensorImages,
    draw,
    hold_out,
    normalize,
    open_source,
    stage,
    with_test_split,
    without,
)
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal
from expunge.schema import Split
from expunge.signals import (
    IMPRESSION_STEPS,
    KINDS,
    REFRESH_IMAGES,
    Evidence,
    Impressions,
    Kind,
    gather_evidence,
    learn_impressions,
    read_signals,
    refreshed,
    retained_sample,
)
from test_training import NO_MEMORY, Short


def probabilities(*rows: tuple[float, ...]) -> Tensor:
    """Images (N, C, 1, 1) whose softmax is `rows`: `Flatten` alone is a model that answers them."""
    return torch.tensor(rows).log()[:, :, None, None]


def impressions_of(images: Tensor) -> Impressions:
    count = len(images)
    return Impressions(images, torch.zeros(count).long(), images, torch.full((count,), -1))


def closed() -> Evidence:
    """Forget 0 of four classes, 3 went before; four retained images and three impressions of two kinds."""
    retained = probabilities(
        (0.1, 0.6, 0.2, 0.1),  # right
        (0.6, 0.1, 0.2, 0.1),  # called the forgotten class, else right
        (0.1, 0.6, 0.2, 0.1),  # wrong
        (0.1, 0.1, 0.2, 0.6),  # called the class forgotten before, else right
    )
    answers = torch.tensor([[0.0, 0.9, 0.1, 0.0], [0.0, 0.2, 0.8, 0.0], [0.0, 0.7, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0]])
    return Evidence(
        retained=retained,
        held=4,
        labels=torch.tensor([1, 2, 2, 2]),
        answers=answers,
        impressions={
            "retained": impressions_of(probabilities((0.7, 0.1, 0.1, 0.1), (0.1, 0.7, 0.1, 0.1), (0.4, 0.3, 0.2, 0.1))),
            "noise": impressions_of(probabilities((0.4, 0.5, 0.05, 0.05), (0.1, 0.3, 0.3, 0.3))),
        },
        forget_classes=(0,),
        gone=(0, 3),
        refresh=TensorImages(retained, torch.tensor([1, 2, 2, 2])),
    )


def digits(tiny: Tiny, classes: tuple[int, ...] = (3,), seed: int = 0, per_class: int = 8) -> Evidence:
    training, held_out = hold_out(tiny.split.retain, share=0.1, most=64, seed=seed)
    split = replace(tiny.split, forget_classes=classes, retain=training)
    return gather_evidence(tiny.model, split, held_out, per_class=per_class, seed=seed)


# Impressions


@pytest.mark.parametrize("kind", KINDS)
def test_impressions_are_called_the_class_and_leave_the_model_alone(tiny: Tiny, kind: Kind) -> None:
    split = replace(tiny.split, forget_classes=(3, 7))
    model = copy.deepcopy(tiny.model).train()
    model.get_submodule("body.1").eval()
    modes = [module.training for module in model.modules()]
    before, state, journal = copy.deepcopy(model.state_dict()), torch.get_rng_state(), Journal()
    made = learn_impressions(model, split, 12, kind=kind, seed=4, journal=journal)
    assert made.labels.tolist() == [3] * 12 + [7] * 12
    assert made.images.shape == made.starts.shape == (24, 1, 8, 8)
    with torch.no_grad():
        called = tiny.model.eval()(made.images)
        at_start = tiny.model(made.starts)
    assert (called.argmax(1) == made.labels).double().mean() >= 0.95
    assert (at_start.argmax(1) == made.labels).double().mean() < 0.5
    assert called.softmax(1).gather(1, made.labels[:, None]).mean() > 0.9
    assert [phase.name for phase in journal.phases] == ["impressions"]
    assert journal.phases[0].steps == IMPRESSION_STEPS
    read = sum(journal.phases[0].label_counts.values())
    assert read == {"retained": 24, "blend": 25, "noise": 0}[kind]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_impressions_are_decided_by_the_seed(tiny: Tiny, kind: Kind) -> None:
    first = learn_impressions(tiny.model, tiny.split, 3, kind=kind, seed=1)
    torch.manual_seed(99)
    again = learn_impressions(tiny.model, tiny.split, 3, kind=kind, seed=1)
    other = learn_impressions(tiny.model, tiny.split, 3, kind=kind, seed=2)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.starts, again.starts)
    assert not torch.equal(first.starts, other.starts)


def test_what_impressions_start_from(tiny: Tiny) -> None:
    retain = tiny.split.retain
    assert isinstance(retain, TensorImages)
    known = {tuple(row): int(label) for row, label in zip(
        normalize(retain.images, tiny.split.preprocessing).flatten(1).tolist(), retain.labels, strict=True
    )}  # fmt: skip
    one = learn_impressions(tiny.model, tiny.split, 5, kind="retained", seed=0)
    starts = [tuple(row) for row in one.starts.flatten(1).tolist()]
    assert [known[start] for start in starts] == one.start_labels.tolist()
    assert len(set(starts)) == 5
    blend = learn_impressions(tiny.model, tiny.split, 5, kind="blend", seed=0)
    drawn = retained_sample(retain, 6, tiny.split.preprocessing, torch.Generator().manual_seed(0))
    torch.testing.assert_close(blend.starts, (drawn.images[:5] + drawn.images[1:]) / 2)
    assert blend.start_labels.tolist() == drawn.labels[:5].tolist()
    noise = learn_impressions(tiny.model, tiny.split, 200, kind="noise", seed=0)
    assert noise.start_labels.tolist() == [-1] * 200
    assert abs(noise.starts.mean().item()) < 0.05
    assert abs(noise.starts.std().item() - 1) < 0.05


def test_impressions_of_a_model_that_gives_nan() -> None:
    data = random_images(12)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    split = Split(forget_classes=(0,), retain=data)
    with pytest.raises(DivergedError, match="learned images became nan at step 1"):
        learn_impressions(model, split, 2, seed=0)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (sample for sample in random_images(7))  # type: ignore[attr-defined]


def test_retained_sample() -> None:
    data, generator = random_images(6), torch.Generator().manual_seed(0)
    every = retained_sample(data, 6, None, generator)
    assert sorted(every.images[:, 0, 0, 0].tolist()) == sorted(data.images[:, 0, 0, 0].tolist())
    repeated = retained_sample(data, 14, None, generator)
    assert torch.equal(repeated.images[:6], repeated.images[6:12])
    assert len(retained_sample(data, 14, None, generator, repeat=False)) == 6
    first = retained_sample(Stream(), 3, None, generator)
    assert torch.equal(first.images, random_images(7).images[:3])
    with pytest.raises(InputError, match="expected a retain sample, got an empty one"):
        retained_sample(TensorImages(data.images[:0], data.labels[:0]), 3, None, generator)


# Signals


def test_signals_against_closed_forms() -> None:
    model = nn.Flatten()
    signals = read_signals(model, closed(), phase="impair", step=6)
    assert (signals.phase, signals.step) == ("impair", 6)
    assert signals.retain_accuracy == 0.25
    assert signals.retain_agreement == 1.0  # without the classes that are gone, each answers as the original did
    assert signals.impressions_called == pytest.approx({"retained": 2 / 3, "noise": 0.0})
    assert signals.still_called == pytest.approx(2 / 3)
    assert signals.class_probability == pytest.approx((0.7 + 0.1 + 0.4) / 3)  # above 0.25 on noise, 0.225 on retained
    shares = [(0.9, 0.6), (0.1, 0.2), (0.2, 0.1), (0.8, 0.2), (0.7, 0.6), (0.3, 0.2), (1.0, 0.2)]
    expected = sum(p * math.log(p / q) for p, q in shares) / 4
    assert signals.retain_divergence == pytest.approx(expected, rel=1e-5)


def test_agreement_counts_other_answers() -> None:
    model = nn.Flatten()
    evidence = closed()
    turned = replace(evidence, answers=evidence.answers[:, [0, 2, 1, 3]])
    assert read_signals(model, turned).retain_agreement == 0.0
    half = replace(evidence, answers=torch.cat([evidence.answers[:2], turned.answers[2:]]))
    assert read_signals(model, half).retain_agreement == 0.5


def test_class_probability_is_also_read_on_retained_images() -> None:
    model = nn.Flatten()
    evidence = replace(closed(), impressions={"noise": impressions_of(probabilities((0.01, 0.33, 0.33, 0.33)))})
    assert read_signals(model, evidence).class_probability == pytest.approx((0.1 + 0.6 + 0.1 + 0.1) / 4)


def test_several_classes_are_read_together() -> None:
    model = nn.Flatten()
    evidence = replace(closed(), forget_classes=(0, 1), gone=(0, 1))
    signals = read_signals(model, evidence)
    assert signals.impressions_called["retained"] == 1.0  # one of the two is called 1, which is to go too
    assert signals.class_probability == pytest.approx((0.8 + 0.8 + 0.7) / 3)


def test_evidence_of_the_original(tiny: Tiny) -> None:
    training, held_out = hold_out(tiny.split.retain, share=0.1, most=64, seed=0)
    split = replace(tiny.split, retain=training, forgotten_before=(8,))
    journal = Journal()
    evidence = gather_evidence(tiny.model, split, held_out, per_class=4, seed=5, journal=journal)
    assert len(evidence.retained) == len(evidence.labels) == len(held_out)  # type: ignore[arg-type]
    assert evidence.gone == (3, 8)
    assert not evidence.answers[:, [3, 8]].any()
    torch.testing.assert_close(evidence.answers.sum(1), torch.ones(len(evidence.labels)))
    assert set(evidence.impressions) == set(KINDS)
    assert all(len(made.images) == 4 for made in evidence.impressions.values())
    assert len(evidence.refresh) == REFRESH_IMAGES
    assert [phase.name for phase in journal.phases] == ["impressions", "signals"]  # all kinds in one batch
    with pytest.raises(InputError, match="expected held-out retained images"):
        gather_evidence(tiny.model, split, TensorImages(evidence.retained[:0], evidence.labels[:0]), seed=0)


class Digits(IterableDataset[Any]):
    """Somebody else's stream of retained digits, always in one order."""

    def __init__(self, retain: Any) -> None:
        self.retain = retain

    def __iter__(self) -> Iterator[Any]:
        return (self.retain[index] for index in range(len(self.retain)))


@pytest.mark.parametrize("kind", ["in order, few", "in order", "streamed", "somebody's stream"])
def test_evidence_is_not_what_is_trained_on(tiny: Tiny, kind: str) -> None:
    assert tiny.split.preprocessing is not None
    table, _ = with_test_split(open_source("digits"))
    retain: Any = draw(without(table.train, (3,)), per_class=10 if kind == "in order, few" else 60, seed=0)
    if kind != "streamed":
        retain = stage(retain, tiny.split.preprocessing).dataset
    else:
        retain = StreamedImages(retain, tiny.split.preprocessing, seed=5, skip_bad=False)
    training, held_out = hold_out(Digits(retain) if kind == "somebody's stream" else retain, share=0.1, most=16, seed=0)
    split = replace(tiny.split, retain=training)

    def starts(impressions: Impressions) -> set[tuple[float, ...]]:
        return {tuple(image) for image in impressions.starts.flatten(1).tolist()}

    trained = learn_impressions(tiny.model, split, 96, seed=0)
    read, again, other = (gather_evidence(tiny.model, split, held_out, per_class=8, seed=s) for s in (1, 1, 2))
    for made in ("retained", "blend"):
        assert len(starts(read.impressions[made])) == 8
        assert not starts(read.impressions[made]) & starts(trained)
        assert starts(again.impressions[made]) == starts(read.impressions[made])
        assert starts(other.impressions[made]) != starts(read.impressions[made])


def test_signals_of_the_original_and_of_an_unlearned_model(tiny: Tiny, forgotten: tuple[nn.Module, Journal]) -> None:
    evidence = digits(tiny, seed=7, per_class=20)  # other evidence than the method read
    tiny.model.train()
    before, state = copy.deepcopy(tiny.model.state_dict()), torch.get_rng_state()
    original = read_signals(tiny.model, evidence)
    assert tiny.model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert min(original.impressions_called.values()) >= 0.95
    assert original.class_probability > 0.9
    assert original.retain_accuracy > 0.95
    assert original.retain_agreement == 1.0
    unlearned = read_signals(forgotten[0], evidence)
    assert unlearned.still_called <= 0.05
    assert unlearned.class_probability <= 0.1
    assert unlearned.retain_accuracy > 0.9
    assert unlearned.retain_divergence > original.retain_divergence >= 0


def test_signals_are_of_the_output_alone(tiny: Tiny) -> None:
    """A head bias of -50 forgets nothing inside, and signals call it gone: they are no audit."""
    masked = copy.deepcopy(tiny.model)
    answer = masked.get_submodule("answer")
    assert isinstance(answer, nn.Linear)
    with torch.no_grad():
        answer.bias[3] -= 50
    signals = read_signals(masked, digits(tiny))
    assert signals.still_called == 0.0
    assert signals.class_probability < 1e-6
    assert signals.retain_agreement == 1.0
    assert signals.retain_divergence == pytest.approx(0, abs=1e-6)


# Statistics measured anew


def test_refreshed_measures_the_statistics_of_the_images_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    model.train()
    model.get_buffer("0.running_mean").fill_(7.0)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn((64, 2, 6, 6)) * 2 + 1
    copied = refreshed(model, images)
    assert not any(module.training for module in copied.modules())
    found = copied.state_dict()
    torch.testing.assert_close(found["0.running_mean"], images.mean((0, 2, 3)))
    torch.testing.assert_close(found["0.running_var"], images.transpose(0, 1).flatten(1).var(1))
    maps = model[2]((images - images.mean((0, 2, 3), keepdim=True)) / (
        images.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()).detach()  # fmt: skip  # dropout is off, normalization is by the batch
    torch.testing.assert_close(found["3.running_mean"], maps.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model[0].momentum == 0.1


def test_refreshed_takes_the_mean_over_batches() -> None:
    images = torch.randn((512, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    copied = refreshed(nn.Sequential(nn.BatchNorm2d(1)), images)
    torch.testing.assert_close(copied.state_dict()["0.running_mean"], images.mean((0, 2, 3)))


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cpu", "cuda"])
def test_refreshed_takes_smaller_batches_where_memory_runs_short(error: BaseException) -> None:
    images = torch.arange(8.0).view(8, 1, 1, 1)
    copied = refreshed(Short(nn.Sequential(nn.BatchNorm2d(1)), 4, error), images)
    assert copied.get_buffer("model.0.running_mean").item() == 3.5
    assert copied.get_buffer("model.0.running_var").item() == pytest.approx(5 / 3)  # of 0 to 3, and of 4 to 7
    with pytest.raises(RuntimeError, match="memory"):
        refreshed(Short(nn.Sequential(nn.BatchNorm2d(1)), 1, error), images)


def test_refreshed_is_the_model_itself_without_running_statistics() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.LayerNorm(3))
    assert refreshed(model, torch.zeros((2, 1, 8, 8))) is model
    unkept = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False))
    assert refreshed(unkept, torch.zeros((2, 1, 8, 8))) is unkept


@pytest.mark.parametrize("count", [1, 257])
def test_refreshed_with_one_image_left_over(count: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert not refreshed(model, torch.randn((count, 1, 2, 2))).training


def test_refreshed_leaves_instance_norm_as_it_is() -> None:
    images = torch.randn((64, 2, 6, 6), generator=torch.Generator().manual_seed(0)) + 3
    layer = nn.InstanceNorm2d(2, track_running_stats=True)
    layer(images)
    copied = refreshed(nn.Sequential(layer, nn.BatchNorm2d(2)), images)
    assert layer.running_mean is not None
    torch.testing.assert_close(copied.state_dict()["0.running_mean"], layer.running_mean)


def test_signals_can_be_read_with_fresh_statistics(tiny: Tiny) -> None:
    evidence = digits(tiny)
    spoiled = copy.deepcopy(tiny.model)
    for layer in spoiled.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            layer.running_mean += 5.0
    before = copy.deepcopy(spoiled.state_dict())
    assert read_signals(spoiled, evidence).retain_agreement < 0.5
    assert read_signals(spoiled, evidence, refresh=True).retain_agreement > 0.95
    for name, value in spoiled.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_journal_shows_signals_beside_the_phase() -> None:
    model = nn.Flatten()
    journal = Journal()
    signals = read_signals(model, closed())
    with journal.phase("impair", steps=1):
        journal.signal(signals)
    journal.signal(signals)  # outside of any phase too
    with journal.phase("repair", steps=1):
        pass
    assert journal.signals == [signals, signals]
    assert journal.phases[0].signals == "impressions still called: retained 67%, noise 0%; accuracy 25.0%"
    assert journal.phases[1].signals == ""


def test_samples_may_carry_more_than_image_and_label(tiny: Tiny) -> None:
    retain = tiny.split.retain
    triples = [(*retain[index], "a path") for index in range(20)]
    split = replace(tiny.split.zero_glance(), retain=triples)  # type: ignore[arg-type]
    evidence = gather_evidence(tiny.model, split, triples, per_class=2, seed=0)  # type: ignore[arg-type]
    assert evidence.held == 20
