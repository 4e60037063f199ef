"""Convolutions over maps smaller than their window, done as the matrix products that they are.

Where a map has fewer places than the window has taps, most of the window lies on padding: of a 3x3 window over a 1x1
map eight taps of nine are multiplied by nothing, forward and backward, and libraries spend that time. On 32x32 images
a torchvision ResNet18 spends half of a training step there. What is left is one product of matrices a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class TinyMaps(TorchFunctionMode):
    """While active, `torch.nn.functional.conv2d` on a map with no more places than taps is one matrix product.

    The same sums without the terms that are zero: equal up to rounding. Other calls go through as they are, and those
    of one image, for which laying out the weights takes longer than what is saved.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            answer = _as_product(*args, **(kwargs or {}))
            if answer is not None:
                return answer
        return func(*args, **(kwargs or {}))


def _as_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return conv2d of these arguments, (N, out, height, width), or None where it is not to be done here."""
    # checked first, as every convolution of a network comes through here
    if groups != 1 or isinstance(padding, str) or input.ndim != 4 or input.shape[2] * input.shape[3] > MOST_PLACES:
        return None
    if len(input) == 1:
        return None
    rows, columns = (
        _Axis.of(input.shape[axis], weight.shape[axis], *(_on(value, axis) for value in (stride, padding, dilation)))
        for axis in (2, 3)
    )
    if rows is None or columns is None or rows.places * columns.places > weight.shape[2] * weight.shape[3]:
        return None
    taps = [
        [None if y is None or x is None else (y, x) for y in row for x in column]
        for row in rows.taps
        for column in columns.taps
    ]
    met = input[:, :, rows.first : rows.first + rows.places, columns.first : columns.first + columns.places]
    flat = met.permute(0, 2, 3, 1).reshape(len(input), -1)  # a view, where channels come last
    repeated = None if bias is None else bias.repeat(len(taps))
    answer: Tensor = F.linear(flat, _Unrolled.apply(weight, taps), repeated)
    return answer.view(len(input), len(rows.taps), len(columns.taps), -1).permute(0, 3, 1, 2)


MOST_PLACES = 16
"""Places of a map beyond which windows in use have fewer taps, and this module looks no further."""

Taps = list[list[tuple[int, int] | None]]
"""For each place out, for each place in, the tap of the window that joins them."""


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution: which places of the map any window meets, and by which tap."""

    first: int  # place that is met
    places: int  # from it to the last one
    taps: list[list[int | None]]  # for each place out, for each of these

    @staticmethod
    def of(size: int, window: int, stride: int, padding: int, dilation: int) -> _Axis | None:
        """Return the axis, or None where nothing comes out or no place is met."""
        out = (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1
        offsets = [[place - at * stride + padding for place in range(size)] for at in range(out)]
        taps = [
            [o // dilation if 0 <= o < dilation * window and o % dilation == 0 else None for o in row]
            for row in offsets
        ]
        met = [place for place in range(size) if any(row[place] is not None for row in taps)]
        if not met:
            return None
        return _Axis(met[0], met[-1] + 1 - met[0], [row[met[0] : met[-1] + 1] for row in taps])


class _Unrolled(torch.autograd.Function):
    """The matrix (places out * channels out, places in * channels in) by which a window acts on a whole map.

    Its gradient has the weight's own memory layout: optimizers copy one that has not.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, taps: Taps) -> Tensor:
        ctx.shape, ctx.taps = weight.shape, taps
        last = weight.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        out, into = weight.shape[:2]
        matrix = weight.new_empty(len(taps), out, len(taps[0]), into)
        for at, row in enumerate(taps):
            for place, tap in enumerate(row):
                matrix[at, :, place] = 0.0 if tap is None else weight[:, :, tap[0], tap[1]]
        return matrix.view(len(taps) * out, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        out, into = ctx.shape[:2]
        given = gradients[0].view(len(ctx.taps), out, len(ctx.taps[0]), into)
        gradient = given.new_zeros(ctx.shape).contiguous(memory_format=ctx.layout)
        for at, row in enumerate(ctx.taps):
            for place, tap in enumerate(row):
                if tap is not None:
                    gradient[:, :, tap[0], tap[1]] += given[at, :, place]
        return gradient, None


def _on(value: Any, axis: int) -> int:
    """Return what a setting of conv2d, one number or one an axis, says for axis 2 or 3."""
    return int(value) if isinstance(value, int) else int(value[(axis - 2) % len(value)])
