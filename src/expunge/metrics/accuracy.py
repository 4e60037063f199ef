"""Accuracy: overall, of each class, and with the forgotten logits masked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from expunge.errors import InputError


def check_answers(logits: Tensor, labels: Tensor) -> None:
    """Raise InputError unless logits are (N, C) and not NaN, labels (N,), and N is at least 1."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise InputError(
            f"expected logits (N, C) and labels (N,) with N >= 1, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if bool(torch.isnan(logits).any()):
        raise InputError("expected logits that are numbers, got NaN: the model gives those")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of samples whose highest logit is their label's, in [0, 1].

    Args:
        logits: (N, C).
        labels: (N,) int64 in [0, C).

    Raises:
        InputError: shapes do not match, or N is 0.
    """
    check_answers(logits, labels)
    return (logits.argmax(1) == labels).double().mean().item()


def confusion_counts(logits: Tensor, labels: Tensor) -> dict[int, Counter[int]]:
    """Return, for each label in order, how many of its samples are called which class; none of the counts is 0.

    Args:
        logits: (N, C).
        labels: (N,) int64 in [0, C).

    Raises:
        InputError: shapes do not match, or N is 0.
    """
    check_answers(logits, labels)
    found: dict[int, Counter[int]] = {label: Counter() for label in torch.unique(labels).tolist()}
    for label, called in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        found[label][called] += 1
    return found


def masked_accuracy(logits: Tensor, labels: Tensor, forget_classes: Sequence[int]) -> float:
    """Return the accuracy with the logits of `forget_classes` set to minus infinity, in [0, 1].

    On retained samples it says how good the model is where nobody asks it for a forgotten class, as a retrained model
    of fewer outputs would be. On forget samples it is 0 by definition.

    Raises:
        InputError: shapes do not match, N is 0, or every class is masked.
    """
    check_answers(logits, labels)
    if len(set(forget_classes)) >= logits.shape[1]:
        raise InputError("expected at least one class that is not masked")
    masked = logits.clone()
    masked[:, list(forget_classes)] = -torch.inf
    return accuracy(masked, labels)


def per_class_accuracy(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Return the accuracy on the samples of each class, in [0, 1]; None for a class without samples.

    Raises:
        InputError: shapes do not match, or N is 0.
    """
    check_answers(logits, labels)
    counts = torch.bincount(labels, minlength=logits.shape[1])
    hits = torch.bincount(labels[logits.argmax(1) == labels], minlength=logits.shape[1])
    return [hit / count if count else None for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)]
