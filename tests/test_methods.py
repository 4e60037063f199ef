"""The contract that every registered method keeps, on real digits."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import Tiny
from expunge.data import TensorImages, draw, open_source, stage, with_test_split
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods import METHODS, PRESETS, Method, UnsirConfig
from expunge.methods.checks import check_split
from expunge.methods.none import METHOD as NONE
from expunge.schema import Split
from pretended_gpu import pretended_gpu


@dataclass(frozen=True)
class Case:
    """What a method must do to the digits: the bounds of its accuracy, on held-out digits, and how it is called."""

    forget: tuple[float, float]  # least and most accuracy on the threes; the original has 0.97
    retain: tuple[float, float]  # on the others; the original has 0.99, a retrained one 0.98
    preset: str = "default"
    seeded: bool = True  # False: the seed changes nothing
    shorter: tuple[tuple[str, int], ...] = ()  # settings beside the preset's, where that takes long


GONE = (0.0, 0.0)
KEPT = (0.96, 1.0)
CASES = {  # a method without a case fails here
    "unsir": Case((0.0, 0.01), (0.94, 1.0)),
    "retrain": Case(GONE, KEPT, "small"),
    "fine_tune": Case((0.7, 0.95), KEPT),  # fails: nothing pushes the class away
    "neg_grad": Case((0.0, 0.35), (0.6, 0.95)),  # what remains is damaged; a little more ascent wrecks it
    "neg_grad_plus": Case((0.0, 0.15), (0.94, 1.0)),
    "random_labels": Case(GONE, KEPT),
    "bad_teacher": Case((0.0, 0.2), (0.94, 1.0)),  # guesses on threes, a tenth of which are right
    "scrub": Case((0.0, 0.2), (0.94, 1.0)),
    "salun": Case(GONE, KEPT),
    "l1_sparse": Case((0.0, 0.05), KEPT, "small"),
    "fisher": Case((0.1, 0.4), (0.95, 1.0), "small"),  # fails: the class keeps a logit of zero, which wins at times
    "ssd": Case((0.0, 0.4), (0.6, 1.0)),  # how much goes hangs on which samples come in one batch
    "boundary_shrink": Case(GONE, (0.95, 1.0), "small"),
    "boundary_expand": Case((0.0, 0.15), (0.88, 1.0), "small"),
    "zero_shot_gkt": Case(
        GONE, (0.5, 0.95), "small", shorter=(("rounds", 40),)
    ),  # a new network, far from the original so early
    "error_min_max": Case(GONE, (0.88, 1.0), "small"),
    "jit": Case((0.0, 0.15), (0.8, 0.97), "small"),
    "delete": Case(GONE, (0.95, 1.0)),
    "svd_class": Case(GONE, KEPT),
    "none": Case((0.9, 1.0), KEPT, seeded=False),
    "head_mask": Case(GONE, KEPT, seeded=False),
    "random_init": Case((0.0, 1.0), (0.0, 0.3)),  # knows nothing: may answer three on everything
}


@pytest.fixture(scope="session")
def threes(tiny: Tiny) -> TensorImages:
    """A hundred training digits of the class to forget, as many as there are of each other class."""
    source, _ = with_test_split(open_source("digits"))
    table = draw(source.train.select(np.flatnonzero(source.train.labels == 3)), per_class=100, seed=0)
    assert tiny.split.preprocessing is not None
    dataset = stage(table, tiny.split.preprocessing).dataset
    assert isinstance(dataset, TensorImages)
    return dataset


@pytest.fixture
def split(tiny: Tiny, threes: TensorImages) -> Split:
    """The digits with all that there is: a method is given its view of it."""
    return replace(tiny.split, forget=threes)


def run(name: str, model: nn.Module, split: Split, *, seed: int = 0, journal: Journal | None = None) -> nn.Module:
    config = replace(PRESETS[name][CASES[name].preset](), **dict(CASES[name].shorter))
    return METHODS[name](model, METHODS[name].view(split), config, seed=seed, journal=journal)


def assert_equal(one: dict[str, Any], other: dict[str, Any], message: str) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), f"{message}: {key}"


@dataclass(frozen=True)
class Result:
    """One run of a method with seed 0."""

    model: nn.Module
    journal: Journal


@pytest.fixture(scope="session")
def results(tiny: Tiny, threes: TensorImages) -> Callable[[str], Result]:
    """Runs of methods with seed 0, each made when it is first asked for."""

    @cache
    def result(name: str) -> Result:
        journal = Journal()
        model = run(name, tiny.model, replace(tiny.split, forget=threes), journal=journal)
        return Result(model, journal)

    return result


@pytest.mark.parametrize("name", METHODS)
def test_model_on_another_device_than_images(name: str, tiny: Tiny, split: Split) -> None:
    case = CASES[name]
    with pretended_gpu() as gpu:
        model = run(name, copy.deepcopy(tiny.model).to(gpu), split)
        assert {part.device for part in model.state_dict().values()} == {gpu}
        assert case.forget[0] <= tiny.accuracy(model, forget=True) <= case.forget[1]
        assert case.retain[0] <= tiny.accuracy(model, forget=False) <= case.retain[1]


@pytest.mark.parametrize("name", METHODS)
def test_method_contract(name: str, tiny: Tiny, split: Split, results: Callable[[str], Result]) -> None:
    case, first = CASES[name], results(name).model
    tiny.model.train()  # the caller's mode is the caller's
    before = copy.deepcopy(tiny.model.state_dict())
    random_state = torch.get_rng_state()
    second = run(name, tiny.model, split)

    assert tiny.model.training
    assert_equal(tiny.model.state_dict(), before, f"{name} changed the caller's model")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny.model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)

    assert second is not tiny.model
    assert not second.training
    assert all(parameter.grad is None for parameter in second.parameters()), "gradients are left over"
    assert all(torch.isfinite(value).all() for value in second.state_dict().values())
    assert_equal(first.state_dict(), second.state_dict(), f"{name} is not deterministic")

    assert tiny.accuracy(tiny.model, forget=True) > 0.9
    assert case.forget[0] <= tiny.accuracy(first, forget=True) <= case.forget[1]
    assert case.retain[0] <= tiny.accuracy(first, forget=False) <= case.retain[1]


@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_stay(name: str, tiny: Tiny, split: Split) -> None:
    original = copy.deepcopy(tiny.model)
    original.get_submodule("body.0").requires_grad_(False)
    original.get_submodule("body.1").requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in original.parameters()]
    changed = run(name, original, split)
    assert [parameter.requires_grad for parameter in original.parameters()] == trainable
    assert [parameter.requires_grad for parameter in changed.parameters()] == trainable
    for parameter, old in zip(changed.parameters(), original.parameters(), strict=True):
        assert old.requires_grad or torch.equal(parameter, old), f"{name} moved a frozen parameter"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_what_it_says(name: str, results: Callable[[str], Result]) -> None:
    phases = results(name).journal.phases
    assert phases
    expected = set()
    if "forget" in METHODS[name].reads:
        expected |= {3}
    if "retain" in METHODS[name].reads:
        expected |= set(range(10)) - {3}
    assert {label for phase in phases for label, count in phase.label_counts.items() if count} == expected


@pytest.mark.parametrize("name", METHODS)
def test_another_seed_gives_another_model(
    name: str, tiny: Tiny, split: Split, results: Callable[[str], Result]
) -> None:
    first, other = results(name).model.state_dict(), run(name, tiny.model, split, seed=1).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first) == CASES[name].seeded


@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_bad_splits(name: str, tiny: Tiny, split: Split) -> None:
    split = METHODS[name].view(split)
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
        "100 samples of the forgotten class '5'": replace(split, forgotten_before=(5,)),
        "expected float images, or uint8 images and a preprocessing": replace(split, preprocessing=None),
        "expected 10 class names": replace(split, class_names=("one", "two")),
    }
    if METHODS[name].zero_glance:
        bad |= {"carries forget samples": replace(split, forget=retain)}
    else:
        bad |= {
            "samples of the classes to forget, none were given: set": replace(split, forget=None),
            "none were given of '3'": replace(split, forget=empty),
            "100 samples of class '0', which is not to be forgotten": replace(split, forget=retain),
        }
    for message, given in bad.items():
        with pytest.raises(InputError, match=message):
            METHODS[name](tiny.model, given, PRESETS[name][CASES[name].preset](), seed=0)


def test_what_is_no_dataset_of_images_and_labels_is_told(tiny: Tiny) -> None:
    split, images = tiny.split.zero_glance(), torch.zeros(20, 1, 8, 8)
    hot = TensorDataset(images, torch.eye(10).repeat(2, 1))
    named: Any = [{"image": images[0], "label": 0}] * 20
    for message, retain in {
        "got a DataLoader: hand in its dataset": DataLoader(split.retain),
        r"expected samples \(image, label\) to retain, got a dict": named,
        r"expected samples \(image, label\) to retain, got a tuple of 3": TensorDataset(images, images, images),
        r"labels that are class indices, got a tensor of \(10,\)": hot,
    }.items():
        with pytest.raises(InputError, match=message):
            check_split(tiny.model, replace(split, retain=retain), reads=("retain",))


def test_models_whose_copies_cannot_be_changed_are_told(tiny: Tiny) -> None:
    split = tiny.split.zero_glance()
    with warnings.catch_warnings(action="ignore"):  # torch calls it deprecated; users have such files
        traced: Any = cast(Any, torch.jit).trace(tiny.model, torch.zeros(1, 1, 8, 8))
    compiled: Any = torch.compile(tiny.model, backend="eager")
    with pytest.raises(InputError, match="TorchScript"):
        check_split(traced, split, reads=("retain",))
    with pytest.raises(InputError, match="not compiled"):
        check_split(compiled, split, reads=("retain",))
    with torch.no_grad(), pytest.raises(InputError, match="gradients"):
        check_split(tiny.model, split, reads=("retain",))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.run.__name__ == name
    assert method.source
    assert PRESETS[name] is method.presets
    assert method.presets["default"]() == method.config()
    for make in method.presets.values():
        assert isinstance(make(), method.config)
    assert method.config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(method.config))


def test_cases_are_of_registered_methods() -> None:
    assert set(CASES) == set(METHODS)
    assert PRESETS["unsir"]["fast"]() == UnsirConfig.fast()


def test_controls_are_what_they_say(tiny: Tiny, results: Callable[[str], Result]) -> None:
    assert_equal(results("none").model.state_dict(), tiny.model.state_dict(), "none changed")
    fresh = results("random_init").model.state_dict()
    moved = [key for key, value in tiny.model.state_dict().items() if not torch.equal(fresh[key], value)]
    assert moved == list(fresh)  # every layer, statistics and counters of BatchNorm and all


def test_a_method_is_given_no_test_samples(split: Split) -> None:
    assert split.test is not None
    for method in METHODS.values():
        view = method.view(split)
        assert view.test is None
        assert (view.forget is None) == method.zero_glance


def test_registry_refuses_what_it_does_not_know() -> None:
    def build(**changes: Any) -> Method:
        return replace(NONE, **changes)

    assert NONE.zero_glance
    assert not build(reads=frozenset({"forget"})).zero_glance
    for reads in (frozenset(), frozenset({"test"}), frozenset({"nothing", "retain"})):
        with pytest.raises(InputError, match="expected reads of"):
            build(reads=reads)
    with pytest.raises(InputError, match="expected a preset called default"):
        build(presets={})


def test_check_split_counts_retained_labels(tiny: Tiny, split: Split) -> None:
    counts = check_split(tiny.model, split, reads={"retain", "forget"})
    assert counts == {label: 100 for label in range(10) if label != 3}
    with pytest.raises(InputError, match="none were given of '5'"):
        check_split(tiny.model, replace(split, forget_classes=(3, 5)), reads={"forget"})
