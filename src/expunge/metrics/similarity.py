"""How near a model's answers are to those of a reference: a retrained model, or one that learned nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from expunge.errors import InputError
from expunge.metrics.distribution import entropy_bits


def probabilities(logits: Tensor) -> Tensor:
    """Return the softmax of logits (N, C), in float64 on the CPU. A logit of minus infinity is a class masked out.

    Raises:
        InputError: logits are not (N, C) with N and C of at least 1, or give no probabilities.
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise InputError(f"expected logits (N, C) with N and C >= 1, got {tuple(logits.shape)}")
    shares = logits.detach().cpu().double().softmax(1)
    if not bool(torch.isfinite(shares).all()):
        raise InputError("expected logits that softmax can take, got NaN or infinite ones: the model gives those")
    return shares


def zero_retrain_forgetting(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Return ZRF of each sample, 1 - JS(model, reference) in bits: (N,) float64 in [0, 1]; the figure is their mean.

    1: the model answers as the reference does, 0: never. With a network that learned nothing for the reference, high
    means uninformed; but a model retrained without a class has opinions on its images, so its value is the target.

    Source: Chundawat et al., Can Bad Teaching Induce Forgetting?, arXiv:2205.08096. The authors' code averages over
    samples and classes alike and takes the other direction of KL; here JS is a sample's, as in the paper.

    Args:
        logits: (N, C), of the model, on forget samples.
        reference_logits: (N, C), of a randomly initialized network in eval mode, on the same samples.

    Raises:
        InputError: shapes differ, N is 0, or logits are NaN.
    """
    ours, theirs = _both(logits, reference_logits)
    nats = _entropy((ours + theirs) / 2) - (_entropy(ours) + _entropy(theirs)) / 2
    return (1 - nats / math.log(2)).clamp(0, 1)


def activation_distances(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Return the Euclidean distance between the softmax answers of two models on each sample: (N,) in [0, sqrt 2].

    0: the same answer; sqrt 2: both certain, of different classes. Low is good where the reference is a retrained
    model; two models retrained with different seeds are not at 0 either.

    Source: activation distance in Chundawat et al., arXiv:2205.08096, and in the authors' code.

    Args:
        logits: (N, C), of the model, on forget samples.
        reference_logits: (N, C), of the retrained model, on the same samples.

    Raises:
        InputError: shapes differ, N is 0, or logits are NaN.
    """
    ours, theirs = _both(logits, reference_logits)
    distances: Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    return distances


def divergence_bits(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the Jensen-Shannon divergence of two distributions over the same classes in bits, in [0, 1].

    0: the same, 1: no class in common. Of the predictions on forget samples, low is good where the other is a retrained
    model's; it depends on how often each class is predicted, not on which sample is called what.

    Source: Lin, Divergence measures based on the Shannon entropy, IEEE Transactions on Information Theory 1991.

    Args:
        one: shares as from `prediction_distribution`.
        other: likewise, as many.

    Raises:
        InputError: the counts differ, or numbers are negative, NaN or do not sum to 1.
    """
    if len(one) != len(other):
        raise InputError(f"expected two distributions over the same classes, got {len(one)} and {len(other)} shares")
    if not all(map(math.isfinite, (*one, *other))):
        raise InputError("expected shares that are not negative and sum to 1, got NaN or infinite ones")
    apart = (entropy_bits(list(one)) + entropy_bits(list(other))) / 2
    together = entropy_bits([(a + b) / 2 for a, b in zip(one, other, strict=True)])
    return min(1.0, max(0.0, together - apart))


def tug_of_war(gaps: Sequence[float]) -> float:
    """Return ToW, the product of 1 - |gap| over forget, retain and test accuracy, in [0, 1]; high is good.

    1: all three accuracies are the retrained model's. A difference in either direction costs, and one that is off by
    everything makes it 0.

    Source: Zhao et al., What makes unlearning hard and what to do about it, arXiv:2406.01257. There the forget and
    retain accuracies are on training samples.

    Args:
        gaps: accuracy minus the retrained model's, each in [-1, 1], on forget, retain and test samples.

    Raises:
        InputError: there are not three gaps, or one is NaN or outside [-1, 1].
    """
    if len(gaps) != 3 or not all(abs(gap) <= 1 for gap in gaps):  # NaN is not
        raise InputError(f"expected gaps in [-1, 1] of forget, retain and test accuracy, got {list(gaps)}")
    return math.prod(1 - abs(gap) for gap in gaps)


def _both(logits: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape != reference_logits.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(reference_logits.shape)}"
        raise InputError(f"expected logits of two models for the same samples and classes, got {shapes}")
    return probabilities(logits), probabilities(reference_logits)


def _entropy(shares: Tensor) -> Tensor:
    """Return the entropy in nats of each row; `entr` is 0 at 0."""
    nats: Tensor = torch.special.entr(shares).sum(1)
    return nats
