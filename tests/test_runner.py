"""The runner, and the contract that every registered audit keeps, on real digits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from conftest import Tiny
from expunge.audits import AUDITS, Audit, AuditData, Found, Subject, run_audits
from expunge.audits.runner import MISSING
from expunge.errors import InputError
from expunge.metrics import of_values
from traps import Scene, digits


@pytest.fixture(scope="module")
def scene(tiny: Tiny) -> Scene:
    return digits(tiny)


@pytest.mark.parametrize("name", AUDITS)
def test_every_audit_keeps_the_contract(name: str, scene: Scene) -> None:
    audit = AUDITS[name]
    before = copy.deepcopy(scene.ground.original.state_dict())
    random_state = torch.get_rng_state()
    first, second = (
        run_audits([audit], scene.original, scene.subject(scene.ground.original), [scene.retrained], scene.data, seed=0)
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    for key, value in scene.ground.original.state_dict().items():
        assert torch.equal(value, before[key]), key
    found = first[name]
    assert found["skipped"] is None, found["skipped"]
    assert found["figures"]
    assert {k: v for k, v in found.items() if k != "seconds"} == {
        k: v for k, v in second[name].items() if k != "seconds"
    }
    for figure, roles in found["figures"].items():
        assert found["targets"][figure] in ("retrained", "low", "high", "none")
        low, high = (1, 1000) if figure.startswith("steps to") else (-1 if name == "where_it_looks" else 0, 1)
        for role in ("original", "unlearned", "retrained"):
            assert low <= roles[role]["value"] <= high + 1e-9, f"{figure} of {role}: {roles[role]}"
            assert roles[role]["count"] >= 1
        # the original was handed in as unlearned: the same model gives the same figure
        assert roles["gap_to_original"]["value"] == pytest.approx(0, abs=1e-12)
        assert not roles["gap_to_original"]["found"]
        assert roles["gap"]["value"] == pytest.approx(roles["unlearned"]["value"] - roles["retrained"]["value"])


@pytest.mark.parametrize("name", AUDITS)
def test_what_is_missing_is_skipped_with_a_reason(name: str, scene: Scene) -> None:
    audit = AUDITS[name]
    bare = replace(scene.data, train=None)
    found = run_audits([audit], scene.original, scene.subject(scene.ground.retrained), [], bare, seed=0)[name]
    missing = [need for need in audit.needs if need.endswith("train") or need == "retrained"]
    if missing:
        assert all(MISSING[need] in found["skipped"] for need in missing)
        assert found["figures"] == {}
    else:
        assert found["skipped"] is None
        assert all("retrained" not in roles for roles in found["figures"].values())


def test_an_audit_that_cannot_run_on_one_model_says_on_which() -> None:
    def run(subject: Subject, *_: Any) -> Found:
        if subject.role == "retrained":
            raise InputError("its head is of another shape")
        return Found({"one": of_values(torch.ones(3))})

    audit = Audit(name="made up", says="nothing", source="here", needs=(), targets={"one": "low"}, run=run)
    subjects = [Subject(role, nn.Identity(), None) for role in ("original", "unlearned", "retrained")]
    data = AuditData(forget_classes=(0,), test=[], class_names=("a", "b"))  # type: ignore[arg-type]
    found = run_audits([audit], subjects[0], subjects[1], subjects[2:], data, seed=0)["made up"]
    assert found["skipped"] == "cannot run on the retrained model: its head is of another shape"
    assert found["figures"] == {}


def test_gaps_and_the_noise_floor_are_taken_in_pairs() -> None:
    values = {
        "original": [1, 1, 1, 1],
        "unlearned": [1, 0, 0, 0],
        "retrained": [0, 0, 0, 0],
        "retrained 2": [0, 1, 0, 0],
    }

    def run(subject: Subject, *_: Any) -> Found:
        return Found({"hits of it": of_values(torch.tensor(values[subject.role]))}, {"seen": subject.role})

    audit = Audit(name="made up", says="", source="", needs=(), targets={"hits*": "retrained"}, run=run)
    subjects = [Subject(role, nn.Identity(), None) for role in values]
    data = AuditData(forget_classes=(0,), test=[], class_names=("a", "b"))  # type: ignore[arg-type]
    found = run_audits([audit], subjects[0], subjects[1], subjects[2:], data, seed=0)["made up"]
    figure = found["figures"]["hits of it"]
    assert found["targets"] == {"hits of it": "retrained"}
    assert {key: figure[key]["value"] for key in ("gap", "gap_to_original", "noise_floor")} == {
        "gap": 0.25,
        "gap_to_original": -0.75,
        "noise_floor": 0.25,
    }
    assert figure["gap_to_original"]["found"]
    assert not figure["gap"]["found"]
    assert found["details"]["retrained 2"] == {"seen": "retrained 2"}
    with pytest.raises(InputError, match="does not declare"):
        audit.target("steps")


def test_parts_are_drawn_by_seed_and_refused_where_empty(scene: Scene) -> None:
    data = scene.data
    drawn = [data.part("test", forget=True, most=5, seed=seed).indices for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == drawn[0]
    assert {int(data.test[index][1]) for index in drawn[0]} == {3}
    assert 3 not in {int(label) for _, label in data.part("train", forget=False, most=50)}
    gone = replace(data, forgotten_before=(4,))
    assert 4 not in {int(label) for _, label in gone.part("test", forget=False)}
    with pytest.raises(InputError, match="expected training samples of forgotten classes"):
        replace(data, train=None).part("train", forget=True)
