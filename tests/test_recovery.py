"""Attacks that bring a class back, on models of which it is known whether the class is still inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from sklearn.metrics import roc_curve
from torch import Tensor, nn

from conftest import Tiny, TinyNet, random_images
from expunge.audits.core import Audit, AuditData, Context, Found, Need, Subject
from expunge.audits.inside import Features
from expunge.audits.inside_audits import LINEAR_PROBE, NEAREST_CLASS_MEAN, drawn, training_sample
from expunge.audits.recovery import (
    FEW_SHOT,
    HEAD_ONLY,
    INSIDE_AUDITS,
    PROTOTYPE,
    Head,
    few_images,
    head_of,
    imprinted,
    matched_hits,
    retrained_head,
    with_head,
)
from expunge.audits.relearn import RELEARN, SEEDS
from expunge.data import TensorImages, open_source, stage, with_test_split
from expunge.errors import InputError
from expunge.metrics.uncertainty import differs, gap_interval
from expunge.models import AllCNN
from expunge.schema import Predictions, TrainConfig
from expunge.training import predict, train

CONTEXT_SEED = 0
CAP = 90  # steps of relearning: this network takes longer than the audit waits for those it is meant for


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expunge.audits.relearn.CAP", CAP)
        yield


@pytest.fixture(scope="module")
def data(tiny: Tiny) -> AuditData:
    """120 training images of each digit, 80 of the threes: who cannot tell does not answer three."""
    source, _ = with_test_split(open_source("digits"))
    assert tiny.split.preprocessing is not None
    assert tiny.split.test is not None
    whole = stage(source.train, tiny.split.preprocessing).dataset
    assert isinstance(whole, TensorImages)
    rows = torch.cat([(whole.labels == c).nonzero().flatten()[: 80 if c == 3 else 120] for c in range(10)])
    return AuditData(
        forget_classes=(3,),
        test=tiny.split.test,
        train=TensorImages(whole.images[rows], whole.labels[rows]),
        class_names=source.class_names,
    )


@pytest.fixture(scope="module")
def models(tiny: Tiny, data: AuditData) -> dict[str, nn.Module]:
    """The threes are hidden behind a low bias, were never seen, or cannot be seen: nothing gets through the body."""
    hidden, blind = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model)
    assert isinstance(hidden, TinyNet)
    assert isinstance(blind, TinyNet)
    hidden.answer.bias.data[3] = -50.0
    nn.init.zeros_(blind.get_submodule("body.0").weight)  # type: ignore[arg-type]
    torch.manual_seed(1)
    retrained = TinyNet()
    config = TrainConfig(epochs=6, lr=0.01, batch_size=64, schedule="one_cycle")
    train(retrained, data.part("train", forget=False), config, seed=1, preprocessing=tiny.split.preprocessing)
    return {"original": tiny.model, "hidden": hidden, "retrained": retrained, "blind": blind}


@pytest.fixture(scope="module")
def found(tiny: Tiny, models: dict[str, nn.Module], data: AuditData) -> Callable[[str, Audit], Found]:
    """What each audit finds on each model, computed once."""
    subjects = {role: Subject(role, model, tiny.split.preprocessing) for role, model in models.items()}
    context = Context(original=subjects["original"], seed=CONTEXT_SEED)
    kept: dict[tuple[str, str], Found] = {}

    def run(role: str, audit: Audit) -> Found:
        if (role, audit.name) not in kept:
            kept[role, audit.name] = audit.run(subjects[role], data, context)
        return kept[role, audit.name]

    return run


# Models whose answer is known

COMES_BACK = [
    (LINEAR_PROBE, "head input"),
    (NEAREST_CLASS_MEAN, "head input"),
    (PROTOTYPE, "forget accuracy"),
    (HEAD_ONLY, "forget accuracy"),
    (FEW_SHOT, "1"),
    (FEW_SHOT, "5"),
    (FEW_SHOT, "20"),
]


@pytest.mark.parametrize(("audit", "figure"), COMES_BACK, ids=lambda value: getattr(value, "name", value))
def test_a_hidden_class_comes_back_and_an_unseen_one_does_not(
    tiny: Tiny, found: Callable[[str, Audit], Found], models: dict[str, nn.Module], audit: Audit, figure: str
) -> None:
    assert tiny.accuracy(models["hidden"], forget=True) == 0
    assert tiny.accuracy(models["retrained"], forget=True) == 0
    value = {role: found(role, audit).figures[figure].value for role in models}
    assert value["hidden"] > 0.85
    assert value["blind"] <= 0.1
    assert value["retrained"] > 0.5  # digits that were never seen look like no other: only a comparison says anything


def alike(per_class: int, *, seed: int) -> TensorImages:
    """Four classes, each told by a bright row; the last one is the second with a faint mark, which nothing else has."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4 * per_class) % 4
    images = 0.5 * torch.randn((len(labels), 1, 8, 8), generator=generator)
    for label in range(3):
        images[torch.where(labels == 3, 1, labels) == label, 0, 2 * label] += 1.5
    images[labels == 3, 0, 7] += 0.8
    return TensorImages(images, labels)


@pytest.fixture(scope="module")
def narrow() -> Callable[[str, Audit], Found]:
    """A network with six features: one that never saw the last class has no reason to keep the mark."""
    seen, held_out = alike(100, seed=0), alike(100, seed=1)
    data = AuditData(forget_classes=(3,), test=held_out, train=seen, class_names=("a", "b", "c", "d"))

    def fit(samples: Any) -> nn.Sequential:
        torch.manual_seed(1)
        layers = nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)
        model = nn.Sequential(nn.Flatten(), *layers)
        config = TrainConfig(epochs=30, lr=0.02, batch_size=64, schedule="one_cycle", weight_decay=1e-3)
        train(model, samples, config, seed=1)
        return model

    original = fit(seen)
    hidden = copy.deepcopy(original)
    _, bias = hidden[5].parameters()
    bias.data[3] = -50.0
    models = {"original": original, "hidden": hidden, "retrained": fit(data.part("train", forget=False))}
    subjects = {role: Subject(role, model, None) for role, model in models.items()}
    return lambda role, audit: audit.run(subjects[role], data, Context(original=subjects["original"], seed=0))


@pytest.mark.parametrize(("audit", "figure"), COMES_BACK, ids=lambda value: getattr(value, "name", value))
def test_more_comes_back_of_a_hidden_class_than_of_one_never_seen(
    narrow: Callable[[str, Audit], Found], audit: Audit, figure: str
) -> None:
    hidden, retrained = (narrow(role, audit).figures[figure] for role in ("hidden", "retrained"))
    assert hidden.value > 0.95
    # to the retrained model it is the second class: half of two alike are right, a fifth of one may be called so
    expected = 0.5 if audit in (LINEAR_PROBE, NEAREST_CLASS_MEAN) else 0.2
    assert retrained.value == pytest.approx(expected, abs=0.21 if audit is LINEAR_PROBE else 0.12)
    assert differs(gap_interval(hidden, retrained))


@pytest.mark.parametrize("audit", [LINEAR_PROBE, NEAREST_CLASS_MEAN, PROTOTYPE, HEAD_ONLY, FEW_SHOT])
def test_a_low_bias_hides_nothing_at_all(found: Callable[[str, Audit], Found], audit: Audit) -> None:
    original, hidden = found("original", audit).figures, found("hidden", audit).figures
    assert original.keys() == hidden.keys()
    for name in original:
        assert hidden[name].value == pytest.approx(original[name].value, abs=0.01), name


def test_the_rest_of_the_model_is_still_there_after_an_attack(found: Callable[[str, Audit], Found]) -> None:
    for audit, figure in (
        (PROTOTYPE, "retain accuracy"),
        (HEAD_ONLY, "retain accuracy"),
        (FEW_SHOT, "retain after 20"),
    ):
        assert found("hidden", audit).figures[figure].value > 0.9
        assert found("blind", audit).figures[figure].value < 0.2


def test_relearning_tells_known_from_unknown(found: Callable[[str, Audit], Found]) -> None:
    known, unseen, blind = (found(role, RELEARN) for role in ("original", "retrained", "blind"))
    assert known.figures["steps to 95 %"].value == known.figures["steps to 80 %"].value == 1
    assert known.figures["area"].value == 1
    assert 1 < unseen.figures["steps to 80 %"].value <= unseen.figures["steps to 95 %"].value <= CAP
    assert 0 < unseen.figures["area"].value < 1
    assert blind.figures["steps to 80 %"].value == CAP
    assert blind.figures["area"].value < unseen.figures["area"].value
    assert blind.details["censored"]["steps to 80 %"] == [True] * SEEDS
    assert known.details["censored"] == {"steps to 95 %": [False] * SEEDS, "steps to 80 %": [False] * SEEDS}
    assert [len(curve) for curve in known.details["curves"]] == [1] * SEEDS
    assert [len(curve) for curve in blind.details["curves"]] == [CAP] * SEEDS
    goals, accuracy = known.details["goals"], 0.95 * 37 / 37
    assert goals["95 %"] / 0.95 == pytest.approx(goals["80 %"] / 0.8)
    assert goals["95 %"] <= accuracy


def test_relearn_figures_are_those_of_the_curves(found: Callable[[str, Audit], Found]) -> None:
    result = found("retrained", RELEARN)
    goals, curves = result.details["goals"], result.details["curves"]
    assert len(set(map(tuple, curves))) == SEEDS  # each seed has its own
    for name, goal in goals.items():
        first = [next((n for n, value in enumerate(c, 1) if value >= goal), CAP) for c in curves]
        assert result.figures[f"steps to {name}"].groups[0].tolist() == first
    areas = []
    for curve in curves:
        best = [min(1.0, max(curve[: step + 1]) / goals["95 %"]) for step in range(CAP)]
        areas.append(sum(best) / CAP)
    assert result.figures["area"].groups[0].tolist() == pytest.approx(areas)


def test_an_original_that_knows_nothing_has_nothing_to_come_back(
    tiny: Tiny, models: dict[str, nn.Module], data: AuditData
) -> None:
    ignorant = Subject("original", models["hidden"], tiny.split.preprocessing)
    with pytest.raises(InputError, match="nothing can come back"):
        RELEARN.run(ignorant, data, Context(original=ignorant, seed=0))


# Every audit


def small(data: AuditData) -> AuditData:
    """Thirty training images of a class are enough to see that two runs agree."""
    train_set = data.train
    assert isinstance(train_set, TensorImages)
    rows = torch.cat([(train_set.labels == label).nonzero().flatten()[:30] for label in range(10)])
    return replace(data, train=TensorImages(train_set.images[rows], train_set.labels[rows]))


@pytest.mark.parametrize("audit", INSIDE_AUDITS, ids=lambda audit: audit.name)
def test_audit_contract(
    tiny: Tiny, models: dict[str, nn.Module], data: AuditData, found: Callable[[str, Audit], Found], audit: Audit
) -> None:
    model, few = copy.deepcopy(models["original"]).train().requires_grad_(False), small(data)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    results = []
    for _ in range(2):
        subject = Subject("unlearned", model, tiny.split.preprocessing)
        results.append(audit.run(subject, few, Context(original=subject, seed=5)))
    assert results[0].figures.keys() == results[1].figures.keys()
    assert results[0].details == results[1].details
    for name, figure in results[0].figures.items():
        assert [group.tolist() for group in figure.groups] == [g.tolist() for g in results[1].figures[name].groups]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert audit.says.islower()
    assert "arXiv:" in audit.source
    assert set(audit.needs) <= set(get_args(Need))
    for role in models:
        for name, figure in found(role, audit).figures.items():
            assert audit.target(name) in ("retrained", "none")
            low, high = (1, CAP) if name.startswith("steps") else (0, 1)
            assert bool(((figure.groups[0] >= low) & (figure.groups[0] <= high)).all()), name
            gap_interval(figure, found("retrained", audit).figures[name])  # of the same samples, or seeds


@pytest.mark.parametrize("audit", INSIDE_AUDITS, ids=lambda audit: audit.name)
def test_audits_refuse_without_what_they_need(tiny: Tiny, data: AuditData, audit: Audit) -> None:
    subject = Subject("unlearned", tiny.model, tiny.split.preprocessing)
    context = Context(original=subject, seed=0)
    assert "forget test" in audit.needs
    for need in audit.needs:
        side, of = need.split(" ")
        held = data.test if of == "test" else data.train
        assert isinstance(held, TensorImages)
        left = (held.labels == 3) != (side == "forget")
        other = TensorImages(held.images[left], held.labels[left])
        without = replace(data, test=other) if of == "test" else replace(data, train=other)
        assert not without.has(need)
        kind = ("held-out" if of == "test" else "training", "forgotten" if side == "forget" else "retained")
        with pytest.raises(InputError, match=rf"^expected {kind[0]} samples of {kind[1]} classes$"):
            audit.run(subject, without, context)
    with pytest.raises(InputError, match=r"^expected training samples of forgotten classes$"):
        audit.run(subject, replace(data, train=None), context)


def test_another_seed_draws_other_samples(tiny: Tiny, models: dict[str, nn.Module], data: AuditData) -> None:
    subject = Subject("unlearned", models["retrained"], tiny.split.preprocessing)
    runs = [PROTOTYPE.run(subject, data, Context(original=subject, seed=seed)) for seed in (0, 1)]
    first, second = (run.figures["retain accuracy"].groups[0] for run in runs)
    assert first.tolist() != second.tolist()
    assert {round(5 * value, 9) for value in first.tolist()} <= {0, 1, 2, 3, 4, 5}  # hits of five draws
    assert len(set(first.tolist())) > 2


# Samples


def labelled(*counts: int) -> TensorImages:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return TensorImages(torch.zeros(len(labels), 1, 2, 2), labels)


def audit_data(train_set: TensorImages, *, before: tuple[int, ...] = ()) -> AuditData:
    return AuditData(forget_classes=(0, 2), test=train_set, train=train_set, class_names=(), forgotten_before=before)


def counts(subset: Any) -> dict[int, int]:
    labels = [int(subset[index][1]) for index in range(len(subset))]
    assert len(set(subset.indices)) == len(subset)
    return {label: labels.count(label) for label in sorted(set(labels))}


def test_probes_train_on_as_many_of_each_class() -> None:
    sample = training_sample(audit_data(labelled(500, 400, 50, 301)), seed=0)
    assert counts(sample) == {0: 300, 1: 300, 2: 50, 3: 300}
    assert counts(training_sample(audit_data(labelled(500, 400, 50, 301), before=(3,)), seed=0)).keys() == {0, 1, 2}
    assert set(counts(training_sample(audit_data(labelled(*[80] * 50)), seed=0)).values()) == {60}  # of 3,000
    assert set(counts(training_sample(audit_data(labelled(*[30] * 200)), seed=0)).values()) == {20}
    again, other = (training_sample(audit_data(labelled(500, 400, 50, 301)), seed=seed) for seed in (0, 1))
    assert sample.indices == again.indices
    assert sample.indices != other.indices


def test_a_few_images_of_each_class() -> None:
    data = audit_data(labelled(*[30] * 6), before=(5,))
    assert counts(few_images(data, 5, seed=0)) == {0: 5, 1: 5, 2: 5, 3: 5, 4: 5}
    one, five = (few_images(data, shots, seed=0) for shots in (1, 5))
    for label in (0, 2):
        assert {i for i in one.indices if i // 30 == label} < {i for i in five.indices if i // 30 == label}
    many = counts(few_images(audit_data(labelled(*[30] * 100)), 2, seed=0))
    assert many[0] == many[2] == 2
    assert sum(many.values()) == 4 + 9 * 4  # nine retained for one forgotten


def test_drawn_rows_are_all_rows_of_a_class() -> None:
    labels = torch.tensor([1, 0, 1, 1, 2, 1])
    assert sorted(drawn(labels, 1, seed=0).tolist()) == [0, 2, 3, 5]
    assert drawn(labels, 7, seed=0).tolist() == []


# A set rate of false calls


def answers(*rows: tuple[float, float, float, int]) -> Predictions:
    return Predictions(torch.tensor([row[:3] for row in rows]), torch.tensor([row[3] for row in rows]))


def test_hits_at_a_set_rate_by_hand() -> None:
    # class 0 is forgotten: a tenth of the retained samples, one of ten, may be called so (0.2 for each of 2)
    leads = torch.arange(10.0)  # of class 0 over class 1, the retained samples' best but for the last sample's
    retain = Predictions(torch.stack([leads, torch.zeros(10), torch.full((10,), -9.0)], 1), torch.tensor([1] * 9 + [2]))
    forget = answers((8.5, 0, -9, 0), (8, 0, -9, 0), (9, 0, -9, 0), (8.5, 0, 1, 0), (1, 0, -9, 0))
    found, stayed = matched_hits(forget, retain, (0,), (1, 2))
    assert found.tolist() == [True, False, True, False, False]  # more than 8 above the best retained logit
    assert stayed.tolist() == [True] * 9 + [False]  # the one that leads by 9 is called 0
    shifted = [Predictions(part.logits + torch.tensor([-50.0, 0, 0]), part.labels) for part in (forget, retain)]
    assert matched_hits(shifted[0], shifted[1], (0,), (1, 2))[0].tolist() == found.tolist()
    assert matched_hits(forget, retain, (0, 2), (1,))[0].tolist() == [True, True, True, True, False]  # four of ten
    same = Predictions(torch.zeros(10, 3), torch.ones(10, dtype=torch.int64))
    assert not matched_hits(same, same, (0,), (1, 2))[0].any()  # what ties is not called so


def test_hits_at_a_set_rate_are_on_the_curve_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, others = (torch.randn((count, 4), generator=generator) for count in (300, 200))
    logits[:, 3] += 1
    labels = torch.arange(200) % 3
    found, stayed = matched_hits(
        Predictions(logits, torch.full((300,), 3)), Predictions(others, labels), (3,), (0, 1, 2)
    )
    lead = torch.cat([logits, others])[:, 3] - torch.cat([logits, others])[:, :3].max(1).values
    false, true, _ = roc_curve(torch.arange(500) < 300, lead, drop_intermediate=False)
    assert found.double().mean().item() == pytest.approx(true[false <= 0.2 / 3].max())
    right = (others[:, :3].argmax(1) == labels)[lead[300:].argsort()[: 200 - int(200 * 0.2 / 3)]]
    assert int(stayed.sum()) == int(right.sum())


# Heads


HEAD = Head("head", torch.tensor([[9.0, 9.0], [2.0, 0.0], [-2.0, 0.0]]), torch.tensor([-50.0, 1.0, 3.0]))


def test_an_imprinted_row_in_closed_form() -> None:
    changed = imprinted(HEAD, {0: torch.tensor([0.5, 7.0])}, torch.tensor([0.5, 2.0]), (1, 2))
    # retained rows: mean (0, 0), both 2 away from it; direction (0, 1); bias: 2 on average, less 2 * (0, 1) @ (0.5, 2)
    assert changed.weight.tolist() == [[0, 2], [2, 0], [-2, 0]]
    assert changed.bias.tolist() == [-2, 1, 3]
    assert HEAD.bias.tolist() == [-50, 1, 3]
    center = changed.logits(torch.tensor([[0.5, 2.0]]))[0]
    assert center[0] == center[1:].mean()


def test_beside_a_single_retained_class_a_row_still_answers() -> None:
    changed = imprinted(HEAD, {0: torch.tensor([0.0, 7.0])}, torch.tensor([0.0, 2.0]), (1,))
    assert changed.weight[0].tolist() == [2, 2]  # the retained row, and as long a step towards the prototype
    assert changed.bias[0] == 1 - 4


def test_what_all_rows_share_does_not_matter() -> None:
    given = {0: torch.tensor([0.5, 7.0])}, torch.tensor([0.5, 2.0]), (1, 2)
    moved = Head("head", HEAD.weight + torch.tensor([3.0, -4.0]), HEAD.bias + 6)
    features = torch.randn((20, 2), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        imprinted(moved, *given).logits(features).softmax(1), imprinted(HEAD, *given).logits(features).softmax(1)
    )


def test_a_head_is_retrained_from_where_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    values = torch.randn((90, 2), generator=generator) + torch.tensor([[0.0, 9.0], [5.0, 0.0], [-5.0, 0.0]])[labels]
    features = Features(values * 100 + 7, labels)  # of any scale
    still = retrained_head(HEAD, features, (0,), (1, 2), seed=0, config=TrainConfig(steps=1, lr=1e-12))
    expected = HEAD.logits(features.values)
    expected[:, 0] += expected.mean(0)[1:].mean() - expected.mean(0)[0]  # levelled at the mean feature
    torch.testing.assert_close(still.logits(features.values), expected, rtol=1e-4, atol=0.05)
    wrong = Head("head", HEAD.weight / 10, HEAD.bias)
    longer = TrainConfig(steps=150, lr=0.05)
    trained = retrained_head(wrong, Features(values, labels), (0,), (1, 2), seed=0, config=longer)
    assert (wrong.logits(values).argmax(1) == labels).double().mean() < 0.7
    assert (trained.logits(values).argmax(1) == labels).double().mean() > 0.97
    scaled = Head("head", wrong.weight / 100, wrong.bias - wrong.weight.sum(1) * 0.07)
    again = retrained_head(scaled, features, (0,), (1, 2), seed=0, config=longer)
    torch.testing.assert_close(again.logits(features.values), trained.logits(values), rtol=1e-3, atol=1e-2)
    dead = Features(torch.cat([features.values, torch.full((90, 1), 3.0)], 1), labels)
    wide = Head("head", torch.cat([HEAD.weight, torch.ones(3, 1)], 1), HEAD.bias)
    assert torch.isfinite(retrained_head(wide, dead, (0,), (1, 2), seed=0).weight).all()


@pytest.mark.parametrize("kind", ["linear", "convolution", "without bias"])
def test_a_model_takes_its_new_head(tiny: Tiny, kind: str) -> None:
    torch.manual_seed(0)
    images = random_images(12, shape=(1, 8, 8))
    model: nn.Module = copy.deepcopy(tiny.model).requires_grad_(False)
    if kind == "convolution":
        model = AllCNN(10, 1)
    if kind == "without bias":
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    subject, before = Subject("unlearned", model, None), copy.deepcopy(model.state_dict())
    head = head_of(subject, images)
    features, logits = subject.features(images).values, subject.answers(images).logits
    torch.testing.assert_close(head.logits(features), logits, atol=1e-4, rtol=1e-4)
    state = torch.get_rng_state()
    changed = with_head(model, Head(head.layer, head.weight.flip(0) + 0.5, head.bias + torch.arange(10)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in changed.parameters())
    expected = features @ (head.weight.flip(0) + 0.5).T + head.bias + torch.arange(10)
    torch.testing.assert_close(predict(changed, images).logits, expected, atol=1e-4, rtol=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Wrapped(nn.Module):
    """A head whose answer is changed before it is given."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.factor * self.model(images)
        return answers


def test_heads_that_are_not_linear_are_refused(tiny: Tiny) -> None:
    images = random_images(12)
    wide = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    maximum = nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    for model, message in (
        (wide, "expected a last layer that is linear in the mean feature, got the convolution '0'"),
        (maximum, "expected logits that are the answer of the last layer '0'"),
        (Wrapped(tiny.model, 2.0), "expected logits that are the answer of the last layer 'model.answer'"),
        (Wrapped(tiny.model, torch.nan), "expected finite logits"),
    ):
        with pytest.raises(InputError, match=message):
            head_of(Subject("unlearned", model, None), images)
    assert head_of(Subject("unlearned", Wrapped(tiny.model, 1.0), None), images).layer == "model.answer"
