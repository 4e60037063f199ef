"""How far a model's confidence is from how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.errors import InputError
from expunge.metrics.accuracy import check_answers
from expunge.metrics.similarity import probabilities

BINS = 15  # as in the paper


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error, in [0, 1]; low is good.

    It is the mean, over samples sorted into 15 bins by their highest probability, of how far mean probability and
    accuracy of a bin lie apart. Bins include their lower bound, and probabilities that are 1 in float32 have one of
    their own.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, equation 3.

    Args:
        logits: (N, C) with C of at least 2; not probabilities, which would look nearly uniform.
        labels: (N,) int64 in [0, C).

    Raises:
        InputError: shapes do not match, N is 0, logits are NaN, or a label is none of the classes.
    """
    check_answers(logits, labels)
    classes = logits.shape[1]
    if classes < 2 or labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(f"expected integer labels of at least 2 classes, below {classes}: as many as logits")
    confidence, answers = probabilities(logits).float().max(1)
    right = (answers == labels.cpu()).double()
    place = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1), right=True)
    # of each bin, how much more was claimed than came true: its two means, times its share of the samples
    over = torch.zeros(BINS + 2, dtype=torch.double).index_add_(0, place, confidence.double() - right)
    return over.abs().sum().item() / len(labels)
