"""How far one model's weights are from another's, layer by layer."""

from __future__ import annotations

import math

import torch
from torch import nn

from expunge.errors import InputError


@torch.no_grad()
def layer_distances(model: nn.Module, reference: nn.Module) -> dict[str, dict[str, float]]:
    """Return for each parameter tensor, and for all together under `total`, the distance to the reference's.

    `l2` is the Euclidean distance, at least 0; `relative` is it divided by the norm of the reference's tensor (the
    distance itself where that is 0). 0: unchanged.

    Raises:
        InputError: the models do not have the same parameters, have none, or one is NaN or infinite.
    """
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    if {name: p.shape for name, p in ours.items()} != {name: p.shape for name, p in theirs.items()}:
        raise InputError("expected two models of the same architecture, their parameters differ in names or shapes")
    if not ours or not all(bool(torch.isfinite(p).all()) for p in (*ours.values(), *theirs.values())):
        raise InputError("expected models with parameters that are finite, got none, NaN or infinite ones")
    squares = {
        name: (
            (parameter.double().cpu() - theirs[name].double().cpu()).square().sum().item(),
            theirs[name].double().cpu().square().sum().item(),
        )
        for name, parameter in ours.items()
    }
    squares["total"] = (sum(d for d, _ in squares.values()), sum(n for _, n in squares.values()))
    return {
        name: {"l2": math.sqrt(d), "relative": math.sqrt(d / n) if n > 0 else math.sqrt(d)}
        for name, (d, n) in squares.items()
    }
