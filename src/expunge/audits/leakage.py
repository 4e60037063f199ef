"""What an attacker can tell from answers alone: does this image belong to a class that was forgotten?

A model that never knew a class takes its images for those of classes that look alike, as a person would. One that was
made to forget may answer them in a way that gives them away: all with one class, or less surely, or with the logit of
the forgotten class pushed lower than for anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from expunge.audits.core import Audit, AuditData, Context, Found, Subject
from expunge.audits.membership import LIMIT, SAMPLES, answers_of, told_apart
from expunge.data import labels_of
from expunge.errors import InputError
from expunge.metrics.distribution import entropy_bits, prediction_distribution
from expunge.metrics.uncertainty import of_values
from expunge.schema import Predictions

HIGHEST = 10  # probabilities in falling order that the attacker looks at, besides those by class


def attack_neighbours(subject: Subject, data: AuditData, context: Context) -> Found:
    """Tell images of forgotten classes from images of the classes next to them: see `NEIGHBOUR_LEAKAGE`.

    Which class is next to an image is what the original answers with the forgotten classes masked. That is the same for
    every model under audit, so that they are measured on the same images; the model's own choice shows in the details.
    """
    forget = data.part("test", forget=True, most=SAMPLES, seed=context.seed)
    strangers, neighbours = _pairs(forget, data, context)
    answers = [answers_of(subject, data, side) for side in (strangers, neighbours)]
    features = torch.cat([_features(side.logits) for side in answers])
    sides = torch.tensor([1, 0]).repeat_interleave(len(strangers))
    shown = answers_of(subject, data, forget)
    return Found(
        {
            "told apart": of_values(told_apart(features, sides, seed=context.seed)),
            "concentration": of_values(_usual(shown)),
        },
        _details(shown, answers[1].labels, data),
    )


def _pairs(forget: Subset[Any], data: AuditData, context: Context) -> tuple[Subset[Any], Subset[Any]]:
    """Return samples of forgotten classes, and as many of the classes next to them."""
    gone = data.gone
    nearest = answers_of(context.original, data, forget).logits.clone()
    nearest[:, gone] = -torch.inf
    next_to = nearest.argmax(1).numpy()
    retain = data.part("test", forget=False)
    labels = labels_of(retain)
    rng = np.random.default_rng(context.seed)
    rows: tuple[list[int], list[int]] = ([], [])
    for label in np.unique(next_to):
        sides = [rng.permutation(np.flatnonzero(next_to == label)), rng.permutation(np.flatnonzero(labels == label))]
        count = min(map(len, sides))
        for chosen, own, side in zip(rows, (forget, retain), sides, strict=True):
            chosen += [own.indices[row] for row in side[:count]]
    if not rows[0]:
        raise InputError("expected held-out samples of the classes that look like the forgotten ones, found none")
    strangers, neighbours = (Subset(data.test, sorted(chosen)) for chosen in rows)
    return strangers, neighbours


def _features(logits: Tensor) -> Tensor:
    """Return log probabilities (N, C + at most HIGHEST): by class, and the highest ones in falling order."""
    if bool(logits.isnan().any()):
        raise InputError("the model gives NaN: nothing can be told of its answers")
    logs = logits.double().log_softmax(1).clamp_min(-LIMIT)
    return torch.cat([logs, logs.sort(1, descending=True).values[:, :HIGHEST]], 1)


def _usual(shown: Predictions) -> Tensor:
    """Return whether each sample (N,) gets the answer that most samples of its class get."""
    answers = shown.logits.argmax(1)
    usual = torch.zeros_like(answers)
    for label in torch.unique(shown.labels):
        own = shown.labels == label
        usual[own] = answers[own].mode().values
    return answers == usual


def _details(shown: Predictions, neighbours: Tensor, data: AuditData) -> Mapping[str, Any]:
    names = data.class_names or tuple(map(str, range(shown.logits.shape[1])))
    given = {
        names[label]: prediction_distribution(shown.logits[shown.labels == label])
        for label in torch.unique(shown.labels).tolist()
    }
    return {
        "answers": {
            name: {names[number]: share for number, share in enumerate(shares) if share > 0}
            for name, shares in given.items()
        },
        "entropy_bits": {name: entropy_bits(shares) for name, shares in given.items()},
        "neighbours": {names[label]: int((neighbours == label).sum()) for label in torch.unique(neighbours).tolist()},
    }


NEIGHBOUR_LEAKAGE = Audit(
    name="neighbour_leakage",
    says="How often a logistic regression on the answer tells images of forgotten classes from images of the classes "
    "that they resemble (one half is chance), and how many images of a forgotten class get its most frequent answer.",
    source="Ebrahimpour-Boroojeny et al., arXiv:2506.20893 (MIA-NN, with other features and a matched draw)",
    needs=("forget test", "retain test"),
    targets={"told apart": "retrained", "concentration": "retrained"},
    run=attack_neighbours,
)
