"""Membership attacks: on a network that learned noise by heart, one that never learned, and scores made by hand."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from conftest import TinyNet
from expunge.audits import inversion, membership
from expunge.audits.attacks import ATTACKS
from expunge.audits.core import AuditData, Context, Found, Subject
from expunge.audits.membership import (
    POPULATION_MIA,
    RMIA,
    References,
    answers_of,
    matched,
    ratios,
    told_apart,
    true_positives,
)
from expunge.audits.runner import run_audits
from expunge.data import TensorImages, labels_of
from expunge.errors import InputError
from expunge.schema import TrainConfig
from expunge.training import train

# Pure functions


def test_sides_are_told_apart_as_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = torch.arange(60) % 2
    features = torch.randn((60, 2), generator=generator) * torch.tensor([1.0, 1000.0])
    features[:, 0] += sides
    expected = np.zeros(60, dtype=bool)
    for rest, part in StratifiedKFold(5, shuffle=True, random_state=7).split(features, sides):
        known, asked = features[rest].double().numpy(), features[part].double().numpy()
        mean, deviation = known.mean(0), known.std(0)
        attack = LogisticRegression(max_iter=1000).fit((known - mean) / deviation, sides[rest])
        expected[part] = attack.predict((asked - mean) / deviation) == sides[part].numpy()
    found = told_apart(features, sides, seed=7)
    assert found.tolist() == expected.tolist()
    assert 0.5 < found.double().mean() < 1


def test_only_what_differs_is_told_apart() -> None:
    sides = torch.arange(400) % 2
    noise = torch.randn((400, 1), generator=torch.Generator().manual_seed(0))
    assert told_apart(sides.view(-1, 1) * 9 + noise, sides, seed=0).all()
    assert 0.4 < told_apart(noise, sides, seed=0).double().mean() < 0.6
    assert told_apart(torch.zeros(400, 1), sides, seed=0).double().mean() == 0.5
    with pytest.raises(InputError, match="at least two samples of either side"):
        told_apart(noise[:3], torch.tensor([0, 0, 1]), seed=0)


def test_ratios_are_those_of_the_paper() -> None:
    p, out = torch.tensor([0.9, 0.2, 1e-9]).double(), torch.tensor([0.5, 0.2, 1.0]).double()
    by_hand = p / (0.5 * (1.3 * out + 0.7))
    torch.testing.assert_close(ratios(p.log(), out.log()).exp(), by_hand)
    torch.testing.assert_close(ratios(p.log(), out.log(), a=1.0).exp(), p / out)
    assert ratios(torch.tensor([-math.inf]), torch.tensor([0.0])).item() == -math.inf


def test_a_reference_that_knows_which_samples_are_easy_helps() -> None:
    """Members are a little surer than expected, and samples differ far more in how easy they are."""
    generator = torch.Generator().manual_seed(0)
    out = torch.rand((2, 500), generator=generator).double() * 0.6 + 0.05
    known = ratios(torch.log(out[0] * 1.3), out[0].log())
    unknown = ratios(out[1].log(), out[1].log())
    sides = [1] * 500 + [0] * 500
    blind = roc_auc_score(sides, torch.cat([out[0] * 1.3, out[1]]))
    assert roc_auc_score(sides, torch.cat([known, unknown])) > blind + 0.03


def test_true_positives_at_few_false_ones() -> None:
    others = torch.arange(200.0)
    assert true_positives(torch.tensor([196.5, 197.5, 300.0, 0.0]), others) == 0.5  # two of 200 are above 197
    assert true_positives(torch.tensor([5.0, 5.0]), torch.tensor([5.0, 5.0])) == 0
    assert true_positives(torch.tensor([9.0]), torch.tensor([5.0])) == 1


# Which samples


def data_of(train: TensorImages, test: TensorImages, **given: Any) -> AuditData:
    return AuditData(forget_classes=(0, 1), train=train, test=test, class_names=tuple("abcdef"), **given)


def images_of(counts: dict[int, int]) -> TensorImages:
    labels = torch.tensor([label for label, count in counts.items() for _ in range(count)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return TensorImages(torch.zeros(len(labels), 1, 2, 2), labels)


def test_sides_have_as_many_samples_of_each_class() -> None:
    data = data_of(images_of({0: 30, 1: 5, 2: 40, 3: 9, 4: 50, 5: 7}), images_of({0: 12, 1: 20, 2: 8, 4: 8}))
    members, others = matched(data, forget=True, seed=0)
    assert members.dataset is data.train
    assert others.dataset is data.test
    for side in (members, others):
        assert np.bincount(labels_of(side)).tolist() == [12, 5]
        assert sorted(set(side.indices)) == list(side.indices)
    members, others = matched(replace(data, forgotten_before=(4,)), forget=False, seed=0)
    assert np.bincount(labels_of(members)).tolist() == np.bincount(labels_of(others)).tolist() == [0, 0, 8]
    assert matched(data, forget=True, seed=0)[0].indices == matched(data, forget=True, seed=0)[0].indices
    assert matched(data, forget=True, seed=0)[0].indices != matched(data, forget=True, seed=1)[0].indices


def test_sides_are_no_larger_than_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "SAMPLES", 10)
    data = data_of(images_of({0: 30, 1: 30, 2: 1}), images_of({0: 30, 1: 3, 3: 1}))
    assert [np.bincount(labels_of(side)).tolist() for side in matched(data, forget=True, seed=0)] == [[5, 3], [5, 3]]
    with pytest.raises(InputError, match="expected a class with training samples and held-out samples"):
        matched(data, forget=False, seed=0)


# On networks


@dataclass(frozen=True)
class Trained:
    """Networks that learned noise images with random labels: all of them, those of classes 2 and 3, and none."""

    data: AuditData
    original: Subject
    retrained: Subject
    untrained: Subject
    context: Context


def noise(seed: int) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    return TensorImages(torch.randn((320, 1, 8, 8), generator=generator), torch.arange(320) % 4)


@pytest.fixture(scope="module")
def trained() -> Trained:
    data = data_of(noise(0), noise(1))
    assert isinstance(data.train, TensorImages)
    kept = data.train.labels >= 2
    subjects = []
    config = TrainConfig(epochs=30, lr=0.01, batch_size=64, schedule="one_cycle")
    for images in (data.train, TensorImages(data.train.images[kept], data.train.labels[kept]), None):
        torch.manual_seed(0)
        model = TinyNet(4)
        if images is not None:
            train(model, images, config, seed=0)
        subjects.append(Subject("model", model.eval(), None))
    original, retrained, untrained = subjects
    return Trained(data, original, retrained, untrained, Context(original=original, seed=0))


@pytest.mark.parametrize("audit", [POPULATION_MIA, RMIA], ids=lambda audit: audit.name)
def test_what_was_learned_by_heart_leaks_and_nothing_else_does(audit: Any, trained: Trained) -> None:
    def found(subject: Subject) -> Found:
        result: Found = audit.run(subject, trained.data, trained.context)
        assert result.figures.keys() == {"forget", "retain"}
        for name in result.figures:
            assert audit.target(name) == "retrained"
        return result

    leaks = found(trained.original).figures
    assert leaks["forget"].interval.low > 0.8
    assert leaks["retain"].interval.low > 0.8
    partly = found(trained.retrained).figures
    assert partly["forget"].interval.low < 0.5 < partly["forget"].interval.high
    assert partly["retain"].interval.low > 0.8
    never = found(trained.untrained).figures
    for figure in never.values():
        assert figure.interval.low < 0.5 < figure.interval.high
        assert figure.interval.high - figure.interval.low < 0.2


@pytest.mark.parametrize("audit", [POPULATION_MIA, RMIA], ids=lambda audit: audit.name)
def test_attacks_repeat_and_change_nothing(audit: Any, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "REFERENCE", replace(membership.REFERENCE, steps=12))
    model = copy.deepcopy(trained.original.model).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    context = replace(trained.context, original=Subject("original", model, None))
    one = audit.run(Subject("one", model, None), trained.data, context)
    context = replace(context, original=Subject("original", model, None))  # references are trained anew
    two = audit.run(Subject("two", model, None), trained.data, context)
    for name, figure in one.figures.items():
        for group, other in zip(figure.groups, two.figures[name].groups, strict=True):
            assert torch.equal(group, other)
    assert one.details == two.details
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def references_of(trained: Trained) -> References:
    """Return the references that the attack trained."""
    RMIA.run(trained.original, trained.data, trained.context)
    key = ("references", id(trained.data.test), trained.context.seed)
    found = trained.original.once(key, trained.data.test, lambda: pytest.fail("expected them to be kept"))
    assert isinstance(found, References)
    return found


def test_rmia_is_the_share_of_the_population_below(trained: Trained) -> None:
    """The score of the paper, one sample at a time, with held-out samples for the population."""
    members, others = matched(trained.data, forget=True, seed=0)
    references = references_of(trained)
    models = [copy.deepcopy(one.model).double() for one in (trained.original, *references.models)]

    def r(dataset: Any, index: int, by: int) -> float:
        image, label = dataset[index]
        with torch.no_grad():
            p, out = (float(models[of](image[None].double()).softmax(1)[0, label]) for of in (0, 1 + by))
        return p / (0.5 * (1.3 * out + 0.7))

    first = set(references.first_half.tolist())
    known = [r(members, index, index % 2) for index in range(len(members))]
    unknown = [r(others, index, int(row not in first) ^ 1) for index, row in enumerate(others.indices)]
    scores = [sum(value / z > 1 for z in unknown) / len(unknown) for value in known]
    found = RMIA.run(trained.original, trained.data, trained.context).figures["forget"]
    assert found.groups[0].tolist() == pytest.approx(scores, abs=0.02)  # float32 answers may swap neighbours
    area = roc_auc_score([1] * len(known) + [0] * len(unknown), known + unknown)
    assert found.value == pytest.approx(area, abs=1e-3)


def test_references_halve_each_class(trained: Trained) -> None:
    references = references_of(trained)
    labels = labels_of(trained.data.test)
    assert np.bincount(labels[references.first_half]).tolist() == [40] * 4
    assert len(set(references.first_half.tolist())) == 160
    one, two = (subject.answers(trained.data.test) for subject in references.models)
    first = torch.zeros(320, dtype=torch.bool)
    first[references.first_half] = True
    for answers, own in ((one, first), (two, ~first)):  # each knows its own half by heart, and not the other
        right = answers.logits.argmax(1) == answers.labels
        assert right[own].double().mean() > 0.7
        assert right[~own].double().mean() < 0.45


def test_references_are_trained_once_for_all_models(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    RMIA.run(trained.original, trained.data, trained.context)
    monkeypatch.setattr(membership, "train", lambda *_, **__: pytest.fail("trained again"))
    RMIA.run(trained.untrained, trained.data, trained.context)


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 4), math.nan)


def test_a_model_that_gives_nan_is_refused(trained: Trained) -> None:
    for audit in (POPULATION_MIA, RMIA):
        with pytest.raises(InputError, match="NaN"):
            audit.run(Subject("broken", Broken(), None), trained.data, trained.context)


def test_too_few_held_out_samples_are_refused() -> None:
    data = data_of(images_of({0: 3, 2: 3}), images_of({0: 1, 2: 1}))
    subject = Subject("original", nn.Sequential(nn.Flatten(), nn.Linear(4, 6)), None)
    context = Context(original=subject, seed=0)
    with pytest.raises(InputError, match="at least two samples of either side"):
        POPULATION_MIA.run(subject, data, context)
    with pytest.raises(InputError, match="expected held-out samples to train references on"):
        RMIA.run(subject, data, context)


def test_answers_on_the_test_set_are_computed_once(trained: Trained) -> None:
    subject = Subject("model", trained.original.model, None)
    chosen = trained.data.part("test", forget=True, most=7, seed=1)
    whole = subject.answers(trained.data.test)
    found = answers_of(subject, trained.data, chosen)
    assert torch.equal(found.logits, whole.logits[chosen.indices])
    assert found.labels.tolist() == labels_of(chosen).tolist()
    assert len(subject._kept) == 1
    part = trained.data.part("train", forget=True, most=7, seed=1)
    assert answers_of(subject, trained.data, part).labels.tolist() == labels_of(part).tolist()


def test_all_attacks_run_side_by_side_and_state_their_needs(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "STEPS", 2)
    unlearned = replace(trained.retrained, role="unlearned")
    found = run_audits(ATTACKS, trained.original, unlearned, [], trained.data, seed=0)
    assert list(found) == ["population_mia", "rmia", "neighbour_leakage", "inversion", "where_it_looks"]
    for told in found.values():
        assert told["skipped"] is None
        assert set(told["targets"].values()) <= {"retrained", "none"}
        assert all(figure["unlearned"]["count"] > 0 for figure in told["figures"].values())
    json.dumps(found, allow_nan=False)
    without = run_audits(ATTACKS, trained.original, unlearned, [], replace(trained.data, train=None), seed=0)
    assert [name for name, told in without.items() if told["skipped"]] == ["population_mia", "rmia"]
    assert "training images of the forgotten classes" in without["rmia"]["skipped"]
