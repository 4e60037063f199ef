"""The contract that every registered method keeps, on real digits."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from conftest import Tiny
from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods import METHODS, PRESETS, UnsirConfig


@dataclass(frozen=True)
class Case:
    config: Any
    max_forget_accuracy: float
    min_retain_accuracy: float


CASES = {"unsir": Case(UnsirConfig(), 0.01, 0.94)}  # a method without a case fails here


@pytest.mark.parametrize("name", METHODS)
def test_method_contract(name: str, tiny: Tiny) -> None:
    case = CASES[name]
    tiny.model.train()  # the caller's mode is the caller's
    next(iter(tiny.model.parameters())).requires_grad_(False)
    before = copy.deepcopy(tiny.model.state_dict())
    random_state = torch.get_rng_state()
    journal = Journal()
    split = tiny.split.zero_glance()
    first = METHODS[name](tiny.model, split, case.config, seed=0, journal=journal)
    second = METHODS[name](tiny.model, split, case.config, seed=0)

    assert tiny.model.training
    assert [p.requires_grad for p in tiny.model.parameters()] == [False] + [True] * (
        len(list(tiny.model.parameters())) - 1
    )
    next(iter(tiny.model.parameters())).requires_grad_(True)
    for key, value in tiny.model.state_dict().items():
        assert torch.equal(value, before[key]), f"{name} changed the caller's {key}"
    assert torch.equal(torch.get_rng_state(), random_state)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), f"{name} is not deterministic in {key}"
    frozen = next(iter(dict(first.named_parameters())))
    assert torch.equal(first.state_dict()[frozen], before[frozen]), "a frozen parameter moved"
    assert not first.training
    assert all(split.forget_classes[0] not in phase.label_counts for phase in journal.phases)
    assert tiny.accuracy(tiny.model, forget=True) > 0.9
    assert tiny.accuracy(first, forget=True) <= case.max_forget_accuracy
    assert tiny.accuracy(first, forget=False) >= case.min_retain_accuracy


@pytest.mark.parametrize("name", METHODS)
def test_another_seed_gives_another_model(name: str, tiny: Tiny) -> None:
    split = tiny.split.zero_glance()
    models = [METHODS[name](tiny.model, split, CASES[name].config, seed=seed) for seed in (0, 1)]
    states = [model.state_dict() for model in models]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_bad_splits(name: str, tiny: Tiny) -> None:
    split = tiny.split.zero_glance()
    retain = split.retain
    assert isinstance(retain, TensorImages)
    empty = TensorImages(retain.images[:0], retain.labels[:0])
    spoiled = TensorImages(retain.images, torch.where(retain.labels == 4, 3, retain.labels))
    wrong = TensorImages(retain.images, retain.labels + 10)
    bad = {
        "at least one class to forget": replace(split, forget_classes=()),
        "class index 10 is out of range": replace(split, forget_classes=(10,)),
        "cannot forget all 10 classes": replace(split, forget_classes=tuple(range(10))),
        "expected a retain sample, got an empty one": replace(split, retain=empty),
        "100 samples of the forgotten class '3'": replace(split, retain=spoiled),
        "the retain sample has label 10": replace(split, retain=wrong),
        "carries forget samples": replace(split, forget=retain),
        "100 samples of the forgotten class '5'": replace(split, forgotten_before=(5,)),
        "expected float images, or uint8 images and a preprocessing": replace(split, preprocessing=None),
    }
    for message, given in bad.items():
        with pytest.raises(InputError, match=message):
            METHODS[name](tiny.model, given, CASES[name].config, seed=0)


def test_every_method_has_presets() -> None:
    assert set(PRESETS) == set(METHODS)
    assert all("default" in presets for presets in PRESETS.values())
