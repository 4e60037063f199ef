from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from expunge.config import as_json, override
from expunge.errors import InputError
from expunge.methods import UnsirConfig
from expunge.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Part:
    lr: float = 0.1
    epochs: int = 1
    optimizer: str = "adam"
    clip: float | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError("expected epochs of at least 1")


@dataclass(frozen=True, kw_only=True)
class Whole:
    steps: int = 3
    part: Part = field(default_factory=Part)
    defects: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=7", Whole(steps=7)),
        (" steps = 7 ", Whole(steps=7)),
        ("part.lr=1e-3", Whole(part=Part(lr=0.001))),
        ("part.lr=2", Whole(part=Part(lr=2.0))),
        ("part.optimizer=sgd", Whole(part=Part(optimizer="sgd"))),
        ("part.clip=0.5", Whole(part=Part(clip=0.5))),
        ("part.clip=none", Whole()),
        ("part.flip=true", Whole(part=Part(flip=True))),
        ("defects=b,a", Whole(defects=frozenset("ab"))),
        ("defects=", Whole()),
    ],
)
def test_override(assignment: str, expected: Whole) -> None:
    config = Whole()
    changed = override(config, [assignment])
    assert changed == expected
    assert type(changed.part.lr) is float
    assert config == Whole()


def test_override_in_order() -> None:
    assert override(Whole(), ["steps=1", "part.lr=3", "steps=2"]) == Whole(steps=2, part=Part(lr=3.0))
    assert override(Whole(), []) == Whole()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "expected name=value, got 'steps'"),
        ("stepz=1", "no setting 'stepz'.*expected one of steps, part, defects"),
        ("part.rate=1", "no setting 'rate'.*expected one of lr, epochs"),
        ("steps.lr=1", "'steps' .* has no parts"),
        ("part=1", "has parts: expected one of part.lr"),
        ("=1", "no setting ''"),
        ("steps=many", "expected a value of type int"),
        ("steps=1.5", "expected a value of type int"),
        ("steps=true", "expected a value of type int"),
        ("part.lr=fast", "expected a value of type float"),
        ("part.lr=none", "expected a value of type float"),
        ("part.flip=1", "expected a value of type bool"),
        ("part.clip=much", "expected a value of type float"),
        ("part.clip=true", "expected a value of type float"),
        ("part.lr={[]: 1}", "expected a value of type float"),
        ("part.epochs=0", "expected epochs of at least 1"),
    ],
)
def test_override_refuses(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(Whole(), [assignment])


def test_as_json() -> None:
    shown: dict[str, Any] = as_json({"whole": Whole(defects=frozenset("ba")), 3: (1, None)})
    part = {"lr": 0.1, "epochs": 1, "optimizer": "adam", "clip": None, "flip": False}
    assert shown == {"whole": {"steps": 3, "part": part, "defects": ["a", "b"]}, "3": [1, None]}
    assert json.loads(json.dumps(shown)) == shown


def test_a_part_that_may_be_none_can_be_switched_off() -> None:
    assert override(UnsirConfig(), ["calibration=none"]).calibration is None
    with pytest.raises(InputError, match="has parts"):
        override(UnsirConfig(), ["impair=none"])


def test_a_word_is_one_of_those_that_are_allowed() -> None:
    assert override(UnsirConfig(), ["impair.mode=batch"]).impair.mode == "batch"
    with pytest.raises(InputError, match="expected one of train, batch, eval in"):
        override(UnsirConfig(), ["impair.mode=xx"])
    with pytest.raises(InputError, match="expected mode train, batch, eval, got 'xx'"):
        TrainConfig(mode="xx")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_clip_value_is_positive(value: float) -> None:
    with pytest.raises(InputError, match="expected a clip_value above 0"):
        TrainConfig(clip_value=value)
