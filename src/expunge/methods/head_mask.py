"""The control that only silences the output: forgotten logits are pushed down, everything inside stays.

A measure that looks at answers alone calls it perfect; one that looks inside must call it bad.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.checks import check_split, count_classes, first_image
from expunge.methods.registry import Method
from expunge.schema import Split
from expunge.training import device_of, logits_of


@dataclass(frozen=True, kw_only=True)
class HeadMaskConfig:
    """How far forgotten logits are pushed down."""

    margin: float = 50.0  # subtracted from each, in nats: a probability of at most e^-50 beside an equal logit

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise InputError(f"expected a positive margin, got {self.margin}")


def head_mask(
    model: nn.Module,
    split: Split,
    config: HeadMaskConfig | None = None,
    *,
    seed: int,  # noqa: ARG001
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, with lower logits of `split.forget_classes`. The seed changes nothing.

    Only the bias of the last layer changes, so the weights fit the same architecture.

    Raises:
        InputError: the split is unusable, see `check_split`, or no layer's bias moves the logits alone: the head has no
            bias, is frozen, or something follows it.
    """
    config = config or HeadMaskConfig()
    check_split(model, split, reads=METHOD.reads)
    with (journal or Journal()).phase("mask", steps=None):
        masked = copy.deepcopy(model).eval()
        image = first_image(split).unsqueeze(0).to(device_of(model))
        for bias in reversed(_biases(masked, image, count_classes(model, split))):
            if bias.requires_grad and lower_bias(masked, bias, split.forget_classes, config.margin, image):
                return masked
    raise InputError(
        "cannot mask this model's head: expected a last layer (linear, or a 1x1 convolution before mean pooling) with "
        "a trainable bias for each class, and nothing after it that changes logits"
    )


@torch.no_grad()
def lower_bias(model: nn.Module, bias: Tensor, classes: Sequence[int], margin: float, image: Tensor) -> bool:
    """Lower `bias` of `model` by `margin` at `classes`, in place; where that is not what logits do, undo it.

    Args:
        image: (1, channels, H, W), on which logits are compared.

    Returns:
        Whether the logits of `classes`, and no others, fell by `margin`.
    """
    kept = bias.clone()
    before = logits_of(model(image))
    fall = torch.zeros_like(bias)
    fall[list(classes)] = margin
    bias.sub_(fall)
    if torch.allclose(logits_of(model(image)), before - fall, rtol=0.0, atol=1e-3 * margin):
        return True
    bias.copy_(kept)
    return False


@torch.no_grad()
def _biases(model: nn.Module, image: Tensor, num_classes: int) -> list[Tensor]:
    """Return the biases with one element a class, in the order in which their layers are called."""
    called: list[Tensor] = []

    def note(module: nn.Module, *_: Any) -> None:
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and bias.shape == (num_classes,):
            called.append(bias)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return called


METHOD = Method(
    name="head_mask",
    run=head_mask,
    config=HeadMaskConfig,
    presets={"default": HeadMaskConfig},
    reads=frozenset({"nothing"}),
    source="control",
)
