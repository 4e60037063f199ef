"""Judge an unlearned model against the original, and against a retrained reference where there is one."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from expunge import __version__
from expunge.data import count_labels
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.metrics import (
    accuracy,
    entropy_bits,
    layer_distances,
    masked_accuracy,
    per_class_accuracy,
    prediction_distribution,
)
from expunge.schema import Phase, Predictions, Preprocessing, Record, Split
from expunge.training import device_of, predict


def evaluate(
    original: nn.Module,
    unlearned: nn.Module,
    split: Split,
    retrained: nn.Module | None = None,
    *,
    retrained_preprocessing: Preprocessing | None = None,
    method: str = "unknown",
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    phases: Sequence[Phase] = (),
    journal: Journal | None = None,
) -> Record:
    """Measure the models on `split.test`, and on `split.forget` where it is given; none of them is changed.

    Accuracies are measured on held-out samples: `forget_accuracy` on those of the forget classes, `retain_accuracy`
    on the others. A figure that no sample was given for is None.

    Args:
        original: the model before.
        unlearned: the model after, made by any method.
        split: with a test set; of the retain sample only labels are read.
        retrained: a model trained without the forget classes.
        retrained_preprocessing: its own, where it differs from `split.preprocessing` in mean and std.
        method: recorded, as are `config` and `seed`.
        phases: of the method's run, for its cost.
        journal: of the method's run, for what its calibration found; evaluation adds its own phases.

    Raises:
        InputError: there is no test set, or the models do not fit each other or the data.
    """
    if split.test is None:
        raise InputError("expected split.test, held-out samples to measure on, got None")
    journal = journal or Journal()
    started = len(journal.phases)
    models = {"before": original, "after": unlearned} | ({"retrained": retrained} if retrained is not None else {})
    metrics: dict[str, Any] = {}
    answers: dict[str, Predictions] = {}
    for role, model in models.items():
        own = retrained_preprocessing if role == "retrained" else None
        preprocessing = own or split.preprocessing
        answers[role] = predict(
            model, split.test, preprocessing=preprocessing, journal=journal, phase=f"evaluate {role}"
        )
        metrics[role] = measures(answers[role], split)
        if split.forget is not None:
            trained_on = predict(
                model, split.forget, preprocessing=preprocessing, journal=journal, phase=f"evaluate {role}"
            )
            metrics[role]["forget_train_accuracy"] = accuracy(trained_on.logits, trained_on.labels)
    metrics["after"]["weight_distance"] = {"to_original": layer_distances(unlearned, original)}
    if retrained is not None:
        metrics["after"]["weight_distance"]["to_retrained"] = layer_distances(unlearned, retrained)
        metrics["retrained"]["weight_distance"] = {"to_original": layer_distances(retrained, original)}
    num_classes = answers["before"].logits.shape[1]
    names = _names(split, num_classes)
    handed = count_labels(split.retain)
    evaluation_phases = journal.phases[started:]
    return Record(
        method=method,
        config=dict(config or {}),
        classes={
            "forget": [names[label] for label in split.forget_classes],
            "forget_labels": list(split.forget_classes),
            "forgotten_before": [names[label] for label in split.forgotten_before],
            "all": list(names),
        },
        seed=seed,
        model={"parameters": sum(parameter.numel() for parameter in unlearned.parameters())},
        data={
            "preprocessing": asdict(split.preprocessing) if split.preprocessing is not None else None,
            "test_samples": len(answers["before"].labels),
            "test_forget_samples": int(_is_forget(answers["before"], split).sum()),
        },
        metrics=metrics,
        cost=cost_of(phases, evaluation_phases),
        samples_read={
            "retain_sample": {name: handed.get(label, 0) for label, name in enumerate(names)},
            "method": _by_name(phases, names),
            "evaluation": _by_name([phase for phase in evaluation_phases if phase.name == "evaluate after"], names),
        },
        environment=environment(unlearned),
        checks=check_outcome(metrics)
        | {"signals": journal.calibration.reached if journal.calibration is not None else None},
        calibration=asdict(journal.calibration) if journal.calibration is not None else None,
    )


def measures(answers: Predictions, split: Split) -> dict[str, Any]:
    """Return what one model's answers on the test set say; keys as documented in docs/record.md."""
    logits, labels = answers.logits, answers.labels
    if split.class_names and len(split.class_names) != logits.shape[1]:
        raise InputError(f"expected {logits.shape[1]} class names, one a logit, got {len(split.class_names)}")
    if not torch.isfinite(logits).all():
        raise InputError("the model gives NaN or infinite logits: it cannot be measured")
    forget = _is_forget(answers, split)
    gone = sorted({*split.forget_classes, *split.forgotten_before})
    others = ~torch.isin(labels, torch.tensor(gone))
    names = _names(split, logits.shape[1])
    kept, lost = bool(others.any()), bool(forget.any())
    masked = logits.clone()
    masked[:, gone] = -torch.inf
    distribution = prediction_distribution(logits[forget]) if lost else None
    return {
        "forget_accuracy": accuracy(logits[forget], labels[forget]) if lost else None,
        "retain_accuracy": accuracy(logits[others], labels[others]) if kept else None,
        "per_class_accuracy": dict(zip(names, per_class_accuracy(logits, labels), strict=True)),
        "masked_forget_accuracy": masked_accuracy(logits[forget], labels[forget], gone) if lost else None,
        "masked_retain_accuracy": masked_accuracy(logits[others], labels[others], gone) if kept else None,
        "masked_per_class_accuracy": dict(zip(names, per_class_accuracy(masked, labels), strict=True)),
        "forget_prediction_distribution": dict(zip(names, distribution, strict=True)) if distribution else None,
        "forget_prediction_entropy_bits": entropy_bits(distribution) if distribution else None,
        "false_forget_rate": _share_called(logits[others], split.forget_classes) if kept else None,
    }


GOAL_FORGET = 0.01  # highest forget accuracy that counts as gone at the output
GOAL_RETAIN_DROP = 0.03  # highest loss of retained accuracy that counts as kept


def check_outcome(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stated checks and whether they hold: True, False, or None where nothing was given to check with."""
    before, after = metrics["before"], metrics["after"]
    forget, retain, retain_before = after["forget_accuracy"], after["retain_accuracy"], before["retain_accuracy"]
    return {
        "forgotten": None if forget is None else forget <= GOAL_FORGET,
        "kept": None if retain is None or retain_before is None else retain >= retain_before - GOAL_RETAIN_DROP,
        "goal_forget_accuracy": GOAL_FORGET,
        "goal_retain_drop": GOAL_RETAIN_DROP,
    }


def cost_of(method: Sequence[Phase], evaluation: Sequence[Phase]) -> dict[str, Any]:
    """Return seconds, optimizer steps and samples of each phase of the method, their totals, and what judging took."""
    phases: dict[str, dict[str, Any]] = {}
    for phase in method:  # one may run several times
        total = phases.setdefault(phase.name, {"seconds": 0.0, "steps": 0, "samples": 0, "final_loss": None})
        total["seconds"] += phase.seconds
        total["steps"] += phase.steps
        total["samples"] += phase.samples
        total["final_loss"] = phase.final_loss
    return {
        "phases": phases,
        "seconds": sum(phase.seconds for phase in method),
        "steps": sum(phase.steps for phase in method if phase.name != "answers"),
        "samples": sum(phase.samples for phase in method),
        "evaluation_seconds": sum(phase.seconds for phase in evaluation),
    }


def environment(model: nn.Module) -> dict[str, Any]:
    """Return versions and hardware, so that a record says where its numbers come from."""
    device = device_of(model)
    return {
        "expunge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _is_forget(answers: Predictions, split: Split) -> torch.Tensor:
    return torch.isin(answers.labels, torch.tensor(split.forget_classes))


def _share_called(logits: torch.Tensor, classes: Sequence[int]) -> float:
    return torch.isin(logits.argmax(1), torch.tensor(list(classes))).double().mean().item()


def _names(split: Split, num_classes: int) -> tuple[str, ...]:
    return split.class_names or tuple(str(label) for label in range(num_classes))


def _by_name(phases: Sequence[Phase], names: Sequence[str]) -> dict[str, int]:
    return {name: sum(phase.label_counts.get(label, 0) for phase in phases) for label, name in enumerate(names)}
