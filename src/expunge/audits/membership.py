"""What an attacker can tell of single images: was this one among those the model was trained on?

Both attacks compare training samples (members) with held-out samples of the same classes, as many of each class on
either side, so that nothing but membership tells the sides apart. One half is chance. Forgotten classes are only gone
where the attack does as well as on a model retrained without them; it does better than chance on retained classes of
every model, so that figure shows whether the attack works at all, and whether unlearning exposed those who stayed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from expunge.audits.core import Audit, AuditData, Context, Found, Subject
from expunge.batches import as_tensor
from expunge.data import Labels, labels_of
from expunge.errors import InputError
from expunge.metrics.uncertainty import Measurement, of_ranks, of_values
from expunge.randomness import seeded
from expunge.schema import Predictions, TrainConfig
from expunge.training import device_of, train

SAMPLES = 1000  # of either side: the interval of an accuracy is then about two points each way
FOLDS = 5
LIMIT = 1e4  # for the loss on a class that a model rules out altogether, which is infinite
OFFLINE_A = 0.3  # of RMIA, what the paper takes for CIFAR-10
REFERENCE = TrainConfig(steps=120, lr=0.005, batch_size=128, schedule="one_cycle")  # half a minute for both, once
REFERENCE_SIZE = 32  # pixels a side that a reference looks at


def told_apart(features: Tensor, sides: Tensor, *, seed: int) -> Tensor:
    """Return whether a logistic regression puts each sample on its side, (N,) bool; each by one not trained on it.

    Stratified cross-validation in `FOLDS` folds; features are standardized by the training folds.

    Args:
        features: (N, D). sides: (N,) 0 or 1, as many of either.

    Raises:
        InputError: there are fewer than two samples of a side.
    """
    folds = min(FOLDS, *torch.bincount(sides, minlength=2).tolist())
    if folds < 2:
        raise InputError("expected at least two samples of either side to tell them apart")
    # imported here, as a second that only an audit shall take
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    attack = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # an attack that did not converge is one all the same
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = cross_val_predict(attack, features.double().numpy(), sides.numpy(), cv=parts)
    return torch.from_numpy(found) == sides


def matched(data: AuditData, *, forget: bool, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Return training and held-out samples, of forgotten or retained classes: as many of each class on either side.

    At most `SAMPLES` a side, drawn by `seed`, the same for every model.

    Raises:
        InputError: no class has samples of both.
    """
    sides = [data.part("train", forget=forget), data.part("test", forget=forget)]
    labels = [labels_of(side) for side in sides]
    classes = np.intersect1d(labels[0], labels[1])
    if len(classes) == 0:
        raise InputError("expected a class with training samples and held-out samples, found none")
    quota = max(1, SAMPLES // len(classes))
    rng = np.random.default_rng(seed)
    chosen: list[list[int]] = [[], []]
    for label in classes:
        count = min(quota, *(int((own == label).sum()) for own in labels))
        for side, own, rows in zip(sides, labels, chosen, strict=True):
            rows += [side.indices[row] for row in rng.permutation(np.flatnonzero(own == label))[:count]]
    members, others = (Subset(side.dataset, sorted(rows)) for side, rows in zip(sides, chosen, strict=True))
    return members, others


def answers_of(subject: Subject, data: AuditData, chosen: Subset[Any]) -> Predictions:
    """Return a model's answers on samples chosen from `data`: of held-out ones, out of those on the whole test set.

    Every report needs the latter anyway, and they are computed once.
    """
    if chosen.dataset is not data.test:
        return subject.answers(chosen)
    whole, rows = subject.answers(data.test), list(chosen.indices)
    return Predictions(whole.logits[rows], whole.labels[rows])


def true_positives(members: Tensor, others: Tensor, *, false_positives: float = 0.01) -> float:
    """Return the share of members whose score is above all but a share of `false_positives` of the others."""
    ordered = others.sort().values
    threshold = ordered[max(0, len(ordered) - 1 - int(false_positives * len(ordered)))]
    return (members > threshold).double().mean().item()


# Population attack


def attack_population(subject: Subject, data: AuditData, context: Context) -> Found:
    """Tell members from held-out samples by the loss, and only the loss: see `POPULATION_MIA`.

    The figure is a balanced accuracy, as both sides are equally many. Folds share training samples, so its interval is
    somewhat narrow: of 150 draws without any leak, 10 % fell outside of it, not 5 %. The attack is a weak one (it asks
    the same of easy and hard samples): that it fails proves little.
    """
    return Found({name: _population(subject, data, context, name == "forget") for name in ("forget", "retain")})


def _population(subject: Subject, data: AuditData, context: Context, forget: bool) -> Measurement:
    answers = [answers_of(subject, data, side) for side in matched(data, forget=forget, seed=context.seed)]
    losses = torch.cat([-_log_probability(side).clamp_min(-LIMIT) for side in answers])
    sides = torch.tensor([1, 0]).repeat_interleave(len(losses) // 2)
    return of_values(told_apart(losses.view(-1, 1), sides, seed=context.seed))


POPULATION_MIA = Audit(
    name="population_mia",
    says="How often a logistic regression on the loss alone tells training samples from held-out ones of the same "
    "classes; one half is chance.",
    source="Yeom et al., arXiv:1709.01604; cross-validated as in the NeurIPS 2023 unlearning challenge",
    needs=("forget train", "forget test", "retain train", "retain test"),
    targets={"forget": "retrained", "retain": "retrained"},
    run=attack_population,
)


# RMIA


class Reference(nn.Module):
    """A small network that learns a data set well enough to tell easy samples from hard ones."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 128)
        blocks = [
            nn.Sequential(nn.Conv2d(given, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())
            for given, width, stride in zip(widths, widths[1:], (2, 2, 1), strict=False)
        ]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        size = (min(images.shape[2], REFERENCE_SIZE), min(images.shape[3], REFERENCE_SIZE))
        answers: Tensor = self.head(self.body(F.adaptive_avg_pool2d(images, size)))
        return answers


@dataclass(frozen=True)
class References:
    """Two networks, each trained on one half of the held-out samples, and the rows of the first half."""

    models: tuple[Subject, Subject]
    first_half: Labels


def ratios(probabilities: Tensor, reference: Tensor, *, a: float = OFFLINE_A) -> Tensor:
    """Return log r(x), where r(x) = p(x) / (((1 + a) p_OUT(x) + 1 - a) / 2), of each sample.

    Args:
        probabilities: (N,) log p of the label, of the model under attack.
        reference: (N,) likewise, of a model that was not trained on the sample.

    Source: Zarifzadeh et al., arXiv:2312.03262, offline RMIA.
    """
    return probabilities - (((1 + a) * reference.exp() + 1 - a) / 2).log()


def attack_rmia(subject: Subject, data: AuditData, context: Context) -> Found:
    """Tell members from held-out samples by how far the model exceeds a reference on each; see `RMIA`.

    Offline RMIA needs models that were not trained on the sample. What is at hand will not do: a model retrained
    without a class gives every image of it a probability near 0, so that p_OUT is the same for all and the class'
    samples are ranked as without a reference; and of retained samples it is a member itself. So the audit trains its
    own: a small network on either half of the held-out images, of all classes. Held-out samples are judged by the one
    of the other half, members by the two in turn: each by a reference that never saw it, and both sides by the same
    mixture, so that one half is what a model gives that learned neither side. On forgotten classes of an original
    (CIFAR-10 ResNet18, {0, 2}) the area is .539 without a reference, .539 with the retrained model for one, and .560
    with these; on retained classes .511 without and .519 with these.

    The score of the paper is the share of population samples z with r(x) / r(z) > 1. With held-out samples for the
    population it is the rank of r(x) among them, so the area under its curve is that of r, and equals the members' mean
    score. Needs no retrained model; costs half a minute for all models together.
    """
    key = ("references", id(data.test), context.seed)
    references = context.original.once(key, data.test, lambda: _references(data, context))
    figures: dict[str, Measurement] = {}
    caught: dict[str, float] = {}
    for name, forget in (("forget", True), ("retain", False)):
        members, others = matched(data, forget=forget, seed=context.seed)
        turns = np.arange(len(members)) % 2 == 0
        known = _scores(subject, data, members, references, turns)
        unknown = _scores(subject, data, others, references, ~np.isin(others.indices, references.first_half))
        figures[name] = of_ranks(known, unknown)
        caught[name] = true_positives(known, unknown)
    return Found(figures, {"true_positives_at_1_percent_false": caught})


def _scores(subject: Subject, data: AuditData, chosen: Subset[Any], references: References, by_first: Any) -> Tensor:
    """Return log r of samples, each against the first reference where `by_first`, else against the second."""
    first, second = (_log_probability(model.answers(chosen)) for model in references.models)
    expected = torch.where(torch.from_numpy(by_first), first, second)
    return ratios(_log_probability(answers_of(subject, data, chosen)), expected)


def _log_probability(answers: Predictions) -> Tensor:
    if bool(answers.logits.isnan().any()):
        raise InputError("the model gives NaN: nothing can be told of its answers")
    return answers.logits.double().log_softmax(1).gather(1, answers.labels.view(-1, 1)).flatten()


def _references(data: AuditData, context: Context) -> References:
    labels = labels_of(data.test)
    order = np.random.default_rng(context.seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class: every other one halves each class
    halves = [np.sort(order[::2]), np.sort(order[1::2])]
    first, second = (_reference(data, half, int(labels.max()) + 1, context) for half in halves)
    return References((first, second), halves[0])


def _reference(data: AuditData, rows: Labels, num_classes: int, context: Context) -> Subject:
    samples: Subset[Any] = Subset(data.test, rows.tolist())
    if len(samples) < 2:
        raise InputError("expected held-out samples to train references on, got fewer than four")
    with seeded(context.seed):
        model = Reference(as_tensor(samples[0][0]).shape[0], num_classes)
    model.to(device_of(context.original.model))
    train(model, samples, REFERENCE, seed=context.seed, preprocessing=context.original.preprocessing)
    return Subject("reference", model, context.original.preprocessing)


RMIA = Audit(
    name="rmia",
    says="How well the model's excess of confidence over a reference that never saw the sample tells training samples "
    "from held-out ones of the same classes, as area under the ROC curve; one half is chance.",
    source="Zarifzadeh et al., arXiv:2312.03262 (offline, a = .3)",
    needs=("forget train", "forget test", "retain train", "retain test"),
    targets={"forget": "retrained", "retain": "retrained"},
    run=attack_rmia,
)
