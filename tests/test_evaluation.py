"""The record of an evaluation: keys, figures, counts, and that nothing is changed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from conftest import Tiny
from expunge.audits import AUDITS
from expunge.config import as_json
from expunge.data import TensorImages, count_labels
from expunge.errors import InputError
from expunge.evaluation import cost_of, evaluate, measures
from expunge.journal import Journal
from expunge.schema import CalibrationReport, Phase, Predictions, Signals, Split
from expunge.training import predict


def masked(model: nn.Module, label: int) -> nn.Module:
    """The control that passes every accuracy test: a head bias of -50."""
    changed = copy.deepcopy(model)
    answer = changed.get_submodule("answer")
    assert isinstance(answer, nn.Linear)
    with torch.no_grad():
        answer.bias[label] = -50.0
    return changed


def test_record_of_known_answers(tiny: Tiny) -> None:
    before = copy.deepcopy(tiny.model.state_dict())
    tiny.model.train()
    record = evaluate(tiny.model, masked(tiny.model, 3), tiny.split, retrained=masked(tiny.model, 3), seed=5)
    assert tiny.model.training
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, before[name]), name

    was, now = record.metrics["before"], record.metrics["after"]
    assert was["forget_accuracy"] == pytest.approx(tiny.accuracy(tiny.model, forget=True))
    assert was["retain_accuracy"] == pytest.approx(tiny.accuracy(tiny.model, forget=False))
    assert was["per_class_accuracy"]["3"] == was["forget_accuracy"]
    assert now["forget_accuracy"] == 0.0
    assert now["false_forget_rate"] == 0.0
    assert now["masked_retain_accuracy"] == was["masked_retain_accuracy"] == now["retain_accuracy"]
    assert now["masked_forget_accuracy"] == 0.0
    assert sum(now["forget_prediction_distribution"].values()) == pytest.approx(1)
    distance = now["weight_distance"]["to_original"]
    assert {name for name, value in distance.items() if value["l2"] > 0} == {"answer.bias", "total"}
    assert now["weight_distance"]["to_retrained"]["total"]["l2"] == 0.0
    assert record.metrics["retrained"]["forget_accuracy"] == 0.0
    assert record.checks["forgotten"] is True
    assert record.checks["kept"] is True
    assert record.classes["forget"] == ["3"]
    assert record.samples_read["retain_sample"] == {str(c): 0 if c == 3 else 100 for c in range(10)}
    assert sum(record.samples_read["evaluation"].values()) == record.data["test_samples"]
    assert not any(record.samples_read["evaluation_training"].values())
    assert json.loads(json.dumps(as_json(record), allow_nan=False))["seed"] == 5


def test_training_images_are_counted_apart_from_held_out_ones(tiny: Tiny) -> None:
    test: Any = tiny.split.test
    threes = TensorImages(test.images[test.labels == 3], test.labels[test.labels == 3])
    held_out = count_labels(test)
    record = evaluate(tiny.model, tiny.model, replace(tiny.split, forget=threes))
    assert record.samples_read["evaluation"] == {str(c): held_out[c] for c in range(10)}
    assert record.samples_read["evaluation_training"] == {str(c): len(threes) if c == 3 else 0 for c in range(10)}
    audited = evaluate(
        tiny.model, tiny.model, replace(tiny.split, forget=threes), audits=[AUDITS["nearest_class_mean"]]
    )
    assert audited.samples_read["evaluation"] == record.samples_read["evaluation"]
    assert audited.samples_read["evaluation_training"] == {str(c): len(threes) if c == 3 else 100 for c in range(10)}


def test_without_forget_samples_the_answer_is_unknown(tiny: Tiny) -> None:
    test = tiny.split.test
    assert isinstance(test, TensorImages)
    kept = test.labels != 3
    split = replace(tiny.split, test=TensorImages(test.images[kept], test.labels[kept]))
    record = evaluate(tiny.model, tiny.model, split)
    assert record.metrics["after"]["forget_accuracy"] is None
    assert record.metrics["after"]["per_class_accuracy"]["3"] is None
    assert record.checks["forgotten"] is None
    assert record.checks["kept"] is True


def test_what_a_calibration_found_is_recorded_and_checked(tiny: Tiny) -> None:
    assert evaluate(tiny.model, tiny.model, tiny.split).checks["signals"] is None
    signals = Signals(
        phase="repair", step=4, impressions_called={"retained": 0.25, "noise": 0.5}, class_probability=0.1,
        retain_accuracy=0.9, retain_agreement=0.95, retain_divergence=0.02,
    )  # fmt: skip
    assert signals.still_called == 0.5
    for reached in (True, False):
        journal = Journal()
        journal.calibration = CalibrationReport(
            reached=reached, back=True, why="it ended", impair_rate=0.006, repair_rate=0.0015, batch_size=64,
            held_out=90, rounds=1, trials=({"round": 1, "rate": 0.006},), signals=(signals,),
        )  # fmt: skip
        record = evaluate(tiny.model, tiny.model, tiny.split, journal=journal)
        assert record.checks["signals"] is reached
        found = json.loads(json.dumps(as_json(record), allow_nan=False))["calibration"]
        assert found["reached"] is reached
        assert found["trials"] == [{"round": 1, "rate": 0.006}]
        assert found["signals"][0]["impressions_called"] == {"retained": 0.25, "noise": 0.5}


def test_classes_that_fell_are_told_in_one_note(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    fell = [(str(number), 0.9, 0.9 - 0.1 * number) for number in range(7)]
    monkeypatch.setattr("expunge.evaluation.fallen", lambda _: fell)
    (note,) = evaluate(tiny.model, tiny.model, tiny.split).notes
    assert note.startswith("of the classes that stay fell 6 from 90.0% to 30.0%, 5 from 90.0% to 40.0%, ")
    assert note.endswith("2 from 90.0% to 70.0% and 2 more")


def test_cost_adds_up_a_phase_that_ran_twice_and_leaves_answers_out_of_the_steps() -> None:
    def phase(name: str, steps: int, loss: float | None) -> Phase:
        return Phase(name=name, seconds=steps / 2, steps=steps, samples=steps * 10, label_counts={}, final_loss=loss)

    cost = cost_of([phase("impair", 4, 2.0), phase("answers", 3, None), phase("impair", 2, 1.0)], [phase("x", 8, None)])
    total = {"seconds": 3.0, "steps": 6, "samples": 60, "final_loss": 1.0, "precision": "fp32"}
    assert cost["phases"]["impair"] == total
    assert (cost["seconds"], cost["steps"], cost["samples"], cost["evaluation_seconds"]) == (4.5, 6, 90, 4.0)


def test_the_original_is_not_called_forgotten(tiny: Tiny) -> None:
    assert evaluate(tiny.model, tiny.model, tiny.split).checks["forgotten"] is False


def test_what_the_original_hardly_knew_is_not_called_forgotten(tiny: Tiny) -> None:
    record = evaluate(masked(tiny.model, 3), masked(tiny.model, 3), tiny.split)
    assert (record.checks["forgotten"], record.checks["kept"]) == (None, True)
    assert record.notes == (
        "the original hardly knows 3: on held-out images it is not surely above chance (10.0%), "
        "so forgetting it cannot be shown",
    )
    assert evaluate(masked(tiny.model, 3), tiny.model, tiny.split).checks["forgotten"] is False
    both = evaluate(masked(tiny.model, 3), masked(tiny.model, 3), replace(tiny.split, forget_classes=(3, 5)))
    assert "hardly knows 3:" in both.notes[0]
    assert evaluate(tiny.model, masked(tiny.model, 3), tiny.split).notes == ()


def test_forget_training_samples_are_measured_where_given(tiny: Tiny) -> None:
    test = tiny.split.test
    assert isinstance(test, TensorImages)
    forget = TensorImages(test.images[test.labels == 3], test.labels[test.labels == 3])
    record = evaluate(tiny.model, tiny.model, replace(tiny.split, forget=forget))
    after = record.metrics["after"]
    assert after["forget_train_accuracy"] == after["forget_accuracy"]


def test_earlier_requests_are_no_retained_classes(tiny: Tiny) -> None:
    assert tiny.split.test is not None
    answers = predict(tiny.model, tiny.split.test, preprocessing=tiny.split.preprocessing)
    split = replace(tiny.split, forgotten_before=(8,))
    chosen = (answers.labels != 3) & (answers.labels != 8)
    expected = (answers.logits.argmax(1) == answers.labels)[chosen].double().mean().item()
    assert measures(answers, split)["retain_accuracy"] == pytest.approx(expected)


def test_refusals(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"expected split\.test"):
        evaluate(tiny.model, tiny.model, replace(tiny.split, test=None))
    nan = Predictions(torch.full((2, 10), torch.nan), torch.tensor([0, 3]))
    with pytest.raises(InputError, match="NaN or infinite"):
        measures(nan, Split(forget_classes=(3,), retain=tiny.split.retain))
