"""What a model answers when it is shown forgotten classes: a collapse onto one class exposes which it was."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expunge.errors import InputError


def prediction_distribution(logits: Tensor) -> list[float]:
    """Return the share of samples that each class is predicted for; C numbers in [0, 1] that sum to 1.

    Args:
        logits: (N, C).

    Raises:
        InputError: logits are not (N, C) or NaN, or N is 0.
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise InputError(f"expected logits (N, C) with N >= 1, got {tuple(logits.shape)}")
    if bool(torch.isnan(logits).any()):
        raise InputError("expected logits that are numbers, got NaN: the model gives those")
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    shares: list[float] = (counts.double() / len(logits)).tolist()
    return shares


def entropy_bits(distribution: list[float]) -> float:
    """Return the Shannon entropy of a distribution in bits, in [0, log2 C]; 0: all on one class.

    Raises:
        InputError: the numbers are negative or do not sum to 1.
    """
    shares = torch.tensor(distribution, dtype=torch.float64)
    if len(shares) == 0 or bool((shares < 0).any()) or not abs(shares.sum().item() - 1) <= 1e-6:  # NaN is not
        raise InputError("expected shares that are not negative and sum to 1")
    return abs(float(torch.special.entr(shares).sum()) / math.log(2))
