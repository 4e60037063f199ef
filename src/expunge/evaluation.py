"""Judge an unlearned model against the original, and against a retrained reference where there is one."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from expunge import __version__
from expunge.audits.core import Audit, AuditData, Subject
from expunge.audits.runner import as_figure, as_gap, run_audits
from expunge.audits.self_checks import Check, run_self_checks
from expunge.data import count_labels
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.metrics import (
    accuracy,
    activation_distances,
    calibration_error,
    confusion_counts,
    divergence_bits,
    entropy_bits,
    layer_distances,
    masked_accuracy,
    of_values,
    per_class_accuracy,
    prediction_distribution,
    tug_of_war,
    wilson_interval,
    zero_retrain_forgetting,
)
from expunge.models import reinitialized
from expunge.processes import ranks
from expunge.provenance import library_versions
from expunge.schema import Phase, Predictions, Preprocessing, Record, Split
from expunge.training import device_of, predict
from expunge.verdict import Tolerances, collapsed, fallen, remaining, verdict
from expunge.weights import Metadata

ON_TRAINING = ", training images"
"""Of the name of a phase that measures on images that were trained on."""


def evaluate(
    original: nn.Module | Subject,
    unlearned: nn.Module | Subject,
    split: Split,
    retrained: nn.Module | Subject | None = None,
    *,
    unlearned_preprocessing: Preprocessing | None = None,
    retrained_preprocessing: Preprocessing | None = None,
    more_retrained: Sequence[tuple[nn.Module, Preprocessing | None]] = (),
    audits: Sequence[Audit] = (),
    retrained_metadata: Sequence[Metadata | None] = (),
    method: str = "unknown",
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    phases: Sequence[Phase] = (),
    journal: Journal | None = None,
    pictures: dict[str, Any] | None = None,
) -> Record:
    """Measure the models on `split.test`, and on `split.forget` where it is given; none of them is changed.

    Accuracies are measured on held-out samples: `forget_accuracy` on those of the forget classes, `retain_accuracy`
    on the others. A figure that no sample was given for is None.

    Args:
        original: the model before. This one and the next two may be a `Subject`, which has a preprocessing of its own,
            and whose answers are computed once for all evaluations that it is handed to.
        unlearned: the model after, made by any method.
        split: with a test set. Without audits only labels of the retain sample are read; with them it and `forget` are
            the training samples that audits may use.
        retrained: a model trained without the forget classes.
        unlearned_preprocessing: the unlearned model's own, where it differs from `split.preprocessing` in mean and std.
        retrained_preprocessing: the retrained model's.
        more_retrained: further such models, of other training seeds: how far the first two are apart is the noise.
        audits: attacks to run, of `expunge.AUDITS.values()`; with any of them come the self-checks and the verdict.
        retrained_metadata: what the files of the retrained models say of themselves, for the self-checks.
        method: recorded, as are `config` and `seed` (of all randomness of the audits).
        phases: of the method's run, for its cost.
        journal: of the method's run, for what its calibration found; evaluation adds its own phases.
        pictures: to be filled with pictures of samples, as docs/record.md has it; None: none is made.

    Raises:
        InputError: there is no test set, or the models do not fit each other or the data.
    """
    if split.test is None:
        raise InputError("expected split.test, held-out samples to measure on, got None")
    journal = journal or Journal()
    started = len(journal.phases)
    references = [] if retrained is None else [(retrained, retrained_preprocessing), *more_retrained]

    def judged(role: str, model: nn.Module | Subject, own: Preprocessing | None) -> Subject:
        return model if isinstance(model, Subject) else Subject(role, model, own or split.preprocessing, journal)

    first = judged("original", original, None)
    second = judged("unlearned", unlearned, unlearned_preprocessing)
    others = [
        judged(f"retrained {number}" if number > 1 else "retrained", model, own)
        for number, (model, own) in enumerate(references, 1)
    ]
    subjects = {"before": first, "after": second} | ({"retrained": others[0]} if others else {})
    metrics: dict[str, Any] = {}
    for role, subject in subjects.items():
        metrics[role] = measures(
            subject.answers(split.test, phase=f"evaluate {role}"), split, of=f"the {subject.role} model"
        )
        if split.forget is not None:
            seen = subject.answers(split.forget, phase=f"evaluate {role}{ON_TRAINING}")
            metrics[role]["forget_train_accuracy"] = accuracy(seen.logits, seen.labels)
    answers = {role: subject.answers(split.test) for role, subject in subjects.items()}
    _compare(metrics, answers, subjects, split)
    names = _names(split, answers["before"].logits.shape[1])
    _confusions(metrics, answers, names, split)
    found: dict[str, Any] = {}
    checked: tuple[Check, ...] = ()
    if audits:
        data = _audit_data(split, names)
        found = run_audits(audits, first, second, others, data, seed=seed or 0, journal=journal, pictures=pictures)
        checked = run_self_checks(first, second, others, data, metadata=retrained_metadata, audits=found)
    handed = count_labels(split.retain)
    evaluation_phases = journal.phases[started:]
    held_out, trained_on = (
        samples_of([phase for phase in evaluation_phases if phase.name == f"evaluate after{on}"], names)
        for on in ("", ON_TRAINING)
    )
    if audits and split.forget is not None:  # attacks may read all of them
        trained_on = {name: count + handed.get(label, 0) for label, (name, count) in enumerate(trained_on.items())}
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
        model={"parameters": sum(parameter.numel() for parameter in second.model.parameters())},
        data={
            "preprocessing": asdict(split.preprocessing) if split.preprocessing is not None else None,
            "test_samples": len(answers["before"].labels),
            "test_forget_samples": int(_is_forget(answers["before"], split).sum()),
        },
        metrics=metrics,
        cost=cost_of(phases, evaluation_phases),
        samples_read={
            "retain_sample": {name: handed.get(label, 0) for label, name in enumerate(names)},
            "method": samples_of(phases, names),
            "evaluation": held_out,
            "evaluation_training": trained_on,
        },
        environment=environment(second.model),
        checks=check_outcome(metrics)
        | {"signals": journal.calibration.reached if journal.calibration is not None else None},
        calibration=asdict(journal.calibration) if journal.calibration is not None else None,
        audits=found,
        self_checks=tuple(asdict(check) for check in checked),
        verdict=verdict(metrics, found, checked) if audits else None,
        notes=(
            *hardly_known(metrics["before"], [names[label] for label in split.forget_classes]),
            *_too_few(metrics["after"], int(_is_forget(answers["before"], split).sum())),
            *(f"of the classes to forget {name} is still recognised" for name in _surely_remaining(metrics)),
            *_fallen(metrics),
        ),
    )


def _audit_data(split: Split, names: Sequence[str]) -> AuditData:
    """Return what audits may read: training samples only where those of the forget classes are given."""
    if any(isinstance(part, IterableDataset) for part in (split.test, split.forget, split.retain)):
        raise InputError(
            "expected data sets with an order for audits, got a stream: hand in as many samples as fit memory"
        )
    assert split.test is not None
    return AuditData(
        forget_classes=split.forget_classes,
        test=split.test,
        train=ConcatDataset([split.forget, split.retain]) if split.forget is not None else None,
        class_names=tuple(names),
        forgotten_before=split.forgotten_before,
    )


def _compare(
    metrics: dict[str, Any],
    answers: Mapping[str, Predictions],
    subjects: Mapping[str, Subject],
    split: Split,
) -> None:
    """Add to `metrics` the figures that take two models: distances, divergences, gaps with their intervals."""
    labels = answers["before"].labels
    forget = _is_forget(answers["before"], split)
    metrics["after"]["weight_distance"] = {
        "to_original": layer_distances(subjects["after"].model, subjects["before"].model)
    }
    if forget.any():
        _against_ignorance(metrics, answers, subjects, split, forget)
    sides = {"forget_accuracy": forget, "retain_accuracy": _is_retained(labels, split)}
    hits = {role: (one.logits.argmax(1) == labels) for role, one in answers.items()}
    for key, reference in {"gaps": "retrained", "gaps_to_original": "before"}.items():
        if reference in answers:
            metrics[key] = {
                name: as_gap(of_values(hits["after"][side]), of_values(hits[reference][side]))
                for name, side in sides.items()
                if side.any()
            }
    if "retrained" not in answers:
        return
    metrics["after"]["weight_distance"]["to_retrained"] = layer_distances(
        subjects["after"].model, subjects["retrained"].model
    )
    metrics["retrained"]["weight_distance"] = {
        "to_original": layer_distances(subjects["retrained"].model, subjects["before"].model)
    }
    own, theirs = answers["after"].logits, answers["retrained"].logits
    shares = [metrics[role]["forget_prediction_distribution"] for role in ("after", "retrained")]
    gaps = [gap["value"] for gap in metrics["gaps"].values()]
    everything = (own.argmax(1) == labels).double().mean() - (theirs.argmax(1) == labels).double().mean()
    metrics["after"] |= {
        "tug_of_war": tug_of_war([*gaps, everything.item()]) if len(gaps) == 2 else None,
        "activation_distance": as_figure(of_values(activation_distances(own[forget], theirs[forget])))
        if forget.any()
        else None,
        "prediction_divergence_bits": divergence_bits(*(list(share.values()) for share in shares))
        if all(shares)
        else None,
    }


def _against_ignorance(
    metrics: dict[str, Any],
    answers: Mapping[str, Predictions],
    subjects: Mapping[str, Subject],
    split: Split,
    forget: torch.Tensor,
) -> None:
    """Add ZRF: how near each model's answers on forget samples are to those of a network that learned nothing."""
    assert split.test is not None
    samples: Any = split.test
    streamed = isinstance(samples, IterableDataset)  # read in its order or not at all
    if not streamed:
        samples = Subset(samples, forget.nonzero().flatten().tolist())
    ignorant = reinitialized(subjects["before"].model, seed=0)
    random = predict(ignorant, samples, preprocessing=split.preprocessing, phase="evaluate ignorance").logits
    random = random[forget] if streamed else random
    for role, one in answers.items():
        metrics[role]["zero_retrain_forgetting"] = as_figure(
            of_values(zero_retrain_forgetting(one.logits[forget], random))
        )


CONFUSION_CLASSES = 20
"""Up to so many classes each row of the confusion is kept; of more, those of forgotten classes and as many others."""


def _confusions(
    metrics: dict[str, Any], answers: Mapping[str, Predictions], names: Sequence[str], split: Split
) -> None:
    """Add what held-out samples of each class are called, as counts by name, none of them 0.

    Of many classes: rows of the forgotten ones, and of those of whose samples most are called otherwise than before.
    """
    counts = {role: confusion_counts(one.logits, one.labels) for role, one in answers.items()}
    before, after = counts["before"], counts["after"]
    rows = [label for label in before if label < len(names)]
    if len(names) > CONFUSION_CLASSES:
        others = [label for label in rows if label not in split.forget_classes]
        others.sort(key=lambda label: (after[label] & before[label]).total() / before[label].total())
        rows = [*(label for label in split.forget_classes if label in before), *others[:CONFUSION_CLASSES]]
    for role, found in counts.items():
        metrics[role]["confusion"] = {
            names[row]: {names[called]: count for called, count in sorted(found[row].items())} for row in rows
        }


def measures(answers: Predictions, split: Split, *, of: str = "the model") -> dict[str, Any]:
    """Return what one model's answers on the test set say; keys as documented in docs/record.md."""
    logits, labels = answers.logits, answers.labels
    if split.class_names and len(split.class_names) != logits.shape[1]:
        raise InputError(f"expected {logits.shape[1]} class names, one a logit, got {len(split.class_names)}")
    if not torch.isfinite(logits).all():
        raise InputError(f"{of} gives NaN or infinite logits: it cannot be measured")
    forget = _is_forget(answers, split)
    gone = sorted(set(split.gone))
    others = _is_retained(labels, split)
    names = _names(split, logits.shape[1])
    kept, lost = bool(others.any()), bool(forget.any())
    masked = logits.clone()
    masked[:, gone] = -torch.inf
    distribution = prediction_distribution(logits[forget]) if lost else None
    hits = logits.argmax(1) == labels
    sides = {"test_accuracy": torch.ones_like(forget), "forget_accuracy": forget, "retain_accuracy": others}
    return {
        "test_accuracy": accuracy(logits, labels),
        "forget_accuracy": accuracy(logits[forget], labels[forget]) if lost else None,
        "retain_accuracy": accuracy(logits[others], labels[others]) if kept else None,
        "per_class_accuracy": dict(zip(names, per_class_accuracy(logits, labels), strict=True)),
        "masked_forget_accuracy": masked_accuracy(logits[forget], labels[forget], gone) if lost else None,
        "masked_retain_accuracy": masked_accuracy(logits[others], labels[others], gone) if kept else None,
        "masked_per_class_accuracy": dict(zip(names, per_class_accuracy(masked, labels), strict=True)),
        "forget_prediction_distribution": dict(zip(names, distribution, strict=True)) if distribution else None,
        "forget_prediction_entropy_bits": entropy_bits(distribution) if distribution else None,
        "false_forget_rate": _share_called(logits[others], split.forget_classes) if kept else None,
        "retain_calibration_error": calibration_error(logits[others], labels[others]) if kept else None,
        "intervals": {name: _wilson(hits[side]) for name, side in sides.items()},
        "per_class_intervals": {name: _wilson(hits[labels == label]) for label, name in enumerate(names)},
        "masked_per_class_intervals": {
            name: _wilson((masked.argmax(1) == labels)[labels == label]) for label, name in enumerate(names)
        },
    }


GOAL_FORGET = 0.01  # highest forget accuracy that counts as gone at the output
ROUNDING = 1e-9  # of a difference of shares
GOAL_RETAIN_DROP = 0.03  # highest loss of retained accuracy that counts as kept. A model that may no longer answer
# forgotten classes gains by that alone, so it is held against the original that may not answer them either


def check_outcome(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stated checks and whether they hold: True, False, or None where nothing was given to check with.

    What the original did not answer above chance cannot be seen to be forgotten, or kept: None too. The rest is not
    kept where less than half is left of one of its classes.
    """
    before, after = metrics["before"], metrics["after"]
    forget, retain, known = after["forget_accuracy"], after["retain_accuracy"], before["masked_retain_accuracy"]
    reached = None if forget is None else forget <= GOAL_FORGET and not _surely_remaining(metrics)
    unknown = _at_chance(before["intervals"]["forget_accuracy"], len(before["per_class_accuracy"]))
    rest = None  # unknown: nothing to see it on, or the original does not know it
    if retain is not None and not _at_chance(before["intervals"]["retain_accuracy"], len(before["per_class_accuracy"])):
        rest = retain >= known - GOAL_RETAIN_DROP - ROUNDING and not collapsed(metrics)
    return {
        "forgotten": None if reached and unknown else reached,
        "kept": rest,
        "goal_forget_accuracy": GOAL_FORGET,
        "goal_retain_drop": GOAL_RETAIN_DROP,
    }


def _fallen(metrics: Mapping[str, Any]) -> list[str]:
    """Return a note on the retained classes that surely fell by ten points, the worst first, if any."""
    found = sorted(fallen(metrics), key=lambda one: one[2] - one[1])
    told = [f"{name} from {was:.1%} to {now:.1%}" for name, was, now in found[:FEW]]
    more = f" and {len(found) - FEW} more" if len(found) > FEW else ""
    return [f"of the classes that stay fell {', '.join(told)}{more}"] if found else []


FEW = 5  # of many


def _surely_remaining(metrics: Mapping[str, Any]) -> list[str]:
    """Return the forgotten classes, of several, that are surely still recognised, whatever the accuracy of all is."""
    reach = Tolerances().output.reach
    return [name for name, _, low in remaining(metrics, reach) if low > reach]


def _at_chance(bounds: Sequence[float] | None, num_classes: int) -> bool:
    """Return whether an accuracy with these bounds may be no more than chance."""
    return bounds is not None and bounds[0] <= 1 / num_classes


def _too_few(after: Mapping[str, Any], count: int) -> list[str]:
    """Return a note where so few held-out images show a class as gone that much of it may be left."""
    if after["forget_accuracy"] is None or after["forget_accuracy"] > GOAL_FORGET:
        return []
    most = after["intervals"]["forget_accuracy"][1]
    told = f"gone on {count} held-out image{'s' * (count > 1)}: of so few, as much as {most:.1%} cannot be excluded"
    return [told] if most > Tolerances().output.reach else []


def hardly_known(before: Mapping[str, Any], forget: Sequence[str]) -> list[str]:
    """Return notes on what the original does not answer above chance: classes to forget, by name, and the rest."""
    count = len(before["per_class_accuracy"])
    unknown = [name for name in forget if _at_chance(before["per_class_intervals"][name], count)]
    if not unknown and _at_chance(before["intervals"]["forget_accuracy"], count):
        unknown = list(forget)
    what = "it" if len(unknown) == 1 else "them"
    told = (
        f"the original hardly knows {', '.join(unknown)}: on held-out images it is not surely above chance "
        f"({1 / count:.1%}), so forgetting {what} cannot be shown"
    )
    notes = [told] if unknown else []
    if before["retain_accuracy"] is not None and _at_chance(before["intervals"]["retain_accuracy"], count):
        notes.append(
            f"the original answers {before['retain_accuracy']:.1%} of retained images rightly, not surely more than a "
            "guess: do weights, the order of class names, and --mean, --std and --size belong to this data?"
        )
    return notes


def optimizer_steps(phases: Sequence[Phase]) -> int:
    """Return the steps of the phases that step down a loss; those of others are batches, or images, that were read."""
    return sum(phase.steps for phase in phases if phase.final_loss is not None)


def cost_of(method: Sequence[Phase], evaluation: Sequence[Phase]) -> dict[str, Any]:
    """Return seconds, optimizer steps and samples of each phase of the method, their totals, and what judging took."""
    phases: dict[str, dict[str, Any]] = {}
    for phase in method:  # one may run several times
        total = phases.setdefault(phase.name, {"seconds": 0.0, "steps": 0, "samples": 0, "final_loss": None})
        total["seconds"] += phase.seconds
        total["steps"] += phase.steps
        total["samples"] += phase.samples
        total["final_loss"] = phase.final_loss
        total["precision"] = phase.precision
    return {
        "phases": phases,
        "seconds": sum(phase.seconds for phase in method),
        "steps": optimizer_steps(method),
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
        "processes": ranks().size,
        "cpu": torch.backends.cpu.get_cpu_capability(),  # its vector instructions, which decide how sums are rounded
        "libraries": library_versions(),
    }


def _is_forget(answers: Predictions, split: Split) -> torch.Tensor:
    return torch.isin(answers.labels, torch.tensor(split.forget_classes))


def _is_retained(labels: torch.Tensor, split: Split) -> torch.Tensor:
    return ~torch.isin(labels, torch.tensor(split.gone))


def _wilson(hits: torch.Tensor) -> list[float] | None:
    """Return the bounds of an accuracy, 95 %; None without samples."""
    if len(hits) == 0:
        return None
    interval = wilson_interval(int(hits.sum()), len(hits))
    return [interval.low, interval.high]


def _share_called(logits: torch.Tensor, classes: Sequence[int]) -> float:
    return torch.isin(logits.argmax(1), torch.tensor(list(classes))).double().mean().item()


def _names(split: Split, num_classes: int) -> tuple[str, ...]:
    return split.class_names or tuple(str(label) for label in range(num_classes))


def samples_of(phases: Sequence[Phase], names: Sequence[str]) -> dict[str, int]:
    """Return how many real samples of each class phases read, by name."""
    return {name: sum(phase.label_counts.get(label, 0) for phase in phases) for label, name in enumerate(names)}
