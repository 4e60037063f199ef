"""What weights alone tell of how one model came from another: a copy, a new head, fine-tuned, noise, trained anew.

Weights can refute that a model was trained anew; they cannot prove it. Measured medians of the relative distance over
weight tensors (ResNet18 on CIFAR-10, small networks on faces and digits): .03 to .09 after one epoch of fine-tuning at
ordinary rates or less, .06 to .31 after five to twelve epochs; .21 to .59 between two trainings, with and without a
class, from the same initial weights, of which each keeps much; 1.35 and more from different ones. Fine-tuning at ten
times the ordinary rate reaches .4 and more, and cannot be told from these. How normalization layers moved, and what a
model half-way between the two answers, separate no better.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.audits.inside import last_layer
from expunge.errors import InputError

SAME_STOCK = 0.1  # median relative distance below which a model was not trained anew from initial weights
PERHAPS_SAME_STOCK = 0.33  # below which it may have been fine-tuned, or trained anew from the same initial weights
STRANGERS = 0.1  # median cosine below which two models share no initial weights
NOISE_ELEMENTS = 200  # a tensor with fewer says little of how its values are spread
NOISE_TENSORS = 3  # and so do fewer tensors
NOISE_MOST = 1.0  # relative size above which two models differ as if they had nothing in common
NOISE_SPREAD = 1.15  # the largest tensor-wise size of added noise over the smallest; training moves layers unevenly


@dataclass(frozen=True, kw_only=True)
class Kinship:
    """How one model's weights lie to a reference's. Weight tensors are parameters of two and more dimensions."""

    identical: bool  # all parameters and buffers, of any dimension, are equal bit for bit
    same: tuple[str, ...]  # names of weight tensors that are equal bit for bit
    moved: tuple[str, ...]  # names of the others
    head: tuple[str, ...]  # names of those of the last layer that runs
    distance: float  # median over weight tensors outside the head: distance relative to the reference's norm; 0: a copy
    cosine: float  # median over the same of the cosine with the reference's
    noise: float | None  # relative size of what was added, where it looks like Gaussian noise; None: it does not

    @property
    def only_head_moved(self) -> bool:
        """Whether all weights before the last layer are the reference's, and the last layer's are not."""
        return bool(self.moved) and bool(self.same) and set(self.moved) <= set(self.head)

    @property
    def only_head_kept(self) -> bool:
        """Whether the last layer is the reference's, and what is before shares nothing with it."""
        return bool(self.head) and set(self.head) <= set(self.same) and bool(self.moved) and self.cosine < STRANGERS


@torch.no_grad()
def kinship(model: nn.Module, reference: nn.Module, image: Tensor) -> Kinship | None:
    """Return how the weights of `model` lie to those of `reference`; None where their shapes or names differ.

    Args:
        image: model input (1, channels, H, W), to find the last layer with.
    """
    ours, theirs = model.state_dict(), reference.state_dict()
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        return None
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    pairs = {name: (ours[name].double().cpu(), theirs[name].double().cpu()) for name in names}
    same = tuple(name for name, (one, other) in pairs.items() if torch.equal(one, other))
    last = _last(model, image)
    head = tuple(name for name in names if last is not None and name.rpartition(".")[0] == last)
    body = [pairs[name] for name in names if name not in head] or list(pairs.values())
    return Kinship(
        identical=all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours),
        same=same,
        moved=tuple(name for name in names if name not in same),
        head=head,
        distance=statistics.median([_ratio((one - other).norm(), other.norm()) for one, other in body] or [0.0]),
        cosine=statistics.median([_cosine(one, other) for one, other in body] or [1.0]),
        noise=_noise(list(pairs.values())),
    )


def _last(model: nn.Module, image: Tensor) -> str | None:
    try:
        return last_layer(model, image)
    except InputError:
        return None


def _noise(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Return the relative size of Gaussian noise that tells the first of each pair from the second, or None.

    Noise moves all weights alike, absolutely or relative to their layer, and its fourth moment is three squared
    variances. Training does neither.
    """
    large = [(one - other, other) for one, other in pairs if one.numel() >= NOISE_ELEMENTS]
    if len(large) < NOISE_TENSORS or not all(bool(added.any()) for added, _ in large):
        return None
    sizes = [added.square().mean().sqrt().item() for added, _ in large]
    shares = [_ratio(added.norm(), other.norm()) for added, other in large]
    deviations = [_ratio(added.std(), other.std()) for added, other in large]
    even = any(max(kind) <= NOISE_SPREAD * min(kind) for kind in (sizes, shares, deviations))
    share = statistics.median(shares)
    return share if share < NOISE_MOST and even and all(_is_gaussian(added) for added, _ in large) else None


def _is_gaussian(values: Tensor) -> bool:
    """Return whether the kurtosis of `values` is a Gaussian's, within five of its standard errors, sqrt(24 / N)."""
    centred = values.flatten() - values.mean()
    kurtosis = (centred**4).mean().item() / max(centred.square().mean().item() ** 2, 1e-300)
    return bool(abs(kurtosis - 3) <= 0.1 + 5 * math.sqrt(24 / values.numel()))


def _ratio(one: Tensor, other: Tensor) -> float:
    return (one / other).item() if other > 0 else (0.0 if one == 0 else float("inf"))


def _cosine(one: Tensor, other: Tensor) -> float:
    return _ratio((one * other).sum(), one.norm() * other.norm())
