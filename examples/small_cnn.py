"""A network of the user's own: `--model examples/small_cnn.py:small_cnn`."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def small_cnn(num_classes: int, channels: int) -> nn.Module:
    """Four strided convolutions with BatchNorm, for images of 32 to 96 pixels."""

    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())

    widths = (channels, 32, 64, 128, 128)
    blocks = [block(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], num_classes))
