"""How far a model's confidence is from how often it is right."""

from __future__ import annotations

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

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, equation 3; torchmetrics.

    Args:
        logits: (N, C) with C of at least 2; not probabilities, which would look nearly uniform.
        labels: (N,) int64 in [0, C).

    Raises:
        InputError: shapes do not match, N is 0, logits are NaN, or a label is none of the classes.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # here: its import takes seconds

    check_answers(logits, labels)
    classes = logits.shape[1]
    if classes < 2 or labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(f"expected integer labels of at least 2 classes, below {classes}: as many as logits")
    # Probabilities, as torchmetrics takes logits that all happen to lie in [0, 1] for such.
    shares = probabilities(logits)
    error = multiclass_calibration_error(shares, labels.cpu(), num_classes=classes, n_bins=BINS, norm="l1")
    return min(1.0, error.item())  # a sum of float32, which may pass 1 by a rounding
