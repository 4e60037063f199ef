"""Unlearning methods: one file each, all called as `method(model, split, config, *, seed) -> model`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from expunge.methods.unsir import UnsirConfig, unsir

METHODS: dict[str, Callable[..., nn.Module]] = {"unsir": unsir}

PRESETS: dict[str, dict[str, Callable[[], Any]]] = {
    "unsir": {
        "default": UnsirConfig,
        "fast": UnsirConfig.fast,
        "paper": UnsirConfig.paper,
        "notebook": UnsirConfig.notebook,
    },
}

__all__ = ["METHODS", "PRESETS", "UnsirConfig", "unsir"]
