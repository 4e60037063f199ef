"""Models that look unlearned, or retrained, and are not: each with the name under which it has to be told apart.

They are built from a trained classifier whose last layer is linear, by any means but unlearning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from conftest import Tiny, TinyNet
from expunge.audits.check import INSIDE, OUTPUT, RELEARN, REST
from expunge.audits.core import AuditData, Subject
from expunge.data import open_source, stage, with_test_split, without
from expunge.randomness import seeded
from expunge.schema import Preprocessing, TrainConfig
from expunge.training import train


@dataclass(frozen=True)
class Ground:
    """What traps are built from."""

    original: nn.Module
    retrained: nn.Module  # without the forgotten classes, honestly
    forget_classes: tuple[int, ...]
    bystander: int  # a retained class
    retain: Dataset[Any]  # training samples of retained classes
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Trap:
    """One way to cheat an audit, or to fail without noticing."""

    unlearned: Callable[[Ground], nn.Module]
    named: str  # the diagnosis that has to be among those given
    no: tuple[str, ...]  # layers of the verdict that have to be answered no
    retrained: Callable[[Ground], nn.Module] = lambda ground: ground.retrained


def head_of(model: nn.Module) -> nn.Linear:
    """Return the last linear layer of a model, in the order of definition."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def head_biased(ground: Ground, label: int | None = None, bias: float = -50.0) -> nn.Module:
    """The forgotten classes are never answered (or one class always is), and nothing else changed."""
    model = copy.deepcopy(ground.original)
    with torch.no_grad():
        head_of(model).bias[list(ground.forget_classes) if label is None else label] += bias
    return model


def logits_swapped(ground: Ground) -> nn.Module:
    """The first forgotten class answers under the name of a retained one, and the other way round."""
    model = copy.deepcopy(ground.original)
    head, one, other = head_of(model), ground.forget_classes[0], ground.bystander
    with torch.no_grad():
        for values in (head.weight, head.bias):
            values[[one, other]] = values[[other, one]]
    return model


def logits_scaled(ground: Ground, factor: float, model: nn.Module | None = None) -> nn.Module:
    """All logits of a model, by default the original, are multiplied: the same answers, nearly uniform or one-hot."""
    scaled = copy.deepcopy(ground.original if model is None else model)
    with torch.no_grad():
        head_of(scaled).weight.mul_(factor)
        head_of(scaled).bias.mul_(factor)
    return scaled


def head_reinitialized(ground: Ground) -> nn.Module:
    """A new last layer on a body that was not touched."""
    model = copy.deepcopy(ground.original)
    with seeded(1):
        head_of(model).reset_parameters()
    return model


def body_reinitialized(ground: Ground) -> nn.Module:
    """The last layer on a body that knows nothing."""
    model = copy.deepcopy(ground.original)
    with seeded(1):
        for module in model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not head_of(model) and reset is not None:
                reset()
    return model


def fine_tuned(ground: Ground, config: TrainConfig | None = None) -> nn.Module:
    """Trained on for one epoch, on retained samples alone."""
    model = copy.deepcopy(ground.original)
    config = config or TrainConfig(lr=0.001, batch_size=64)
    train(model, ground.retain, config, seed=0, preprocessing=ground.preprocessing)
    return model


def noised(ground: Ground, size: float = 0.5) -> nn.Module:
    """Gaussian noise on all parameters, `size` times as large as those of the layer vary."""
    model = copy.deepcopy(ground.original)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
            parameter.add_(size * spread * torch.randn(parameter.shape, generator=generator))
    return model


def new_head_trained(ground: Ground, *, seed: int = 1) -> nn.Module:
    """The original with a new last layer that learned the retained classes: it passes for retrained at the output."""
    model = head_reinitialized(ground)
    model.requires_grad_(False)
    head_of(model).requires_grad_(True)
    # statistics of the body stay too: nothing but the head is to differ
    config = TrainConfig(epochs=4, lr=0.01, batch_size=64, update_norm_statistics=False)
    train(model, ground.retain, config, seed=seed, preprocessing=ground.preprocessing)
    return model.requires_grad_(True)


TRAPS: dict[str, Trap] = {
    "head bias of -50": Trap(head_biased, "weights untouched", (INSIDE,)),
    "logits swapped with another class": Trap(logits_swapped, "logits swapped", (OUTPUT, INSIDE, REST)),
    "temperature 1000": Trap(lambda ground: logits_scaled(ground, 1e-3), "uniform answers", (OUTPUT, INSIDE)),
    "temperature 1/1000": Trap(lambda ground: logits_scaled(ground, 1e3), "sharpened answers", (OUTPUT, INSIDE)),
    "head re-initialised": Trap(head_reinitialized, "body untouched", (INSIDE, REST)),
    "body re-initialised": Trap(body_reinitialized, "body re-initialised", (REST,)),
    "fine-tuned on retained samples": Trap(fine_tuned, "not forgotten", (OUTPUT, INSIDE, RELEARN)),
    "retain collapse": Trap(
        lambda ground: head_biased(ground, ground.bystander, 50.0), "retain collapse", (INSIDE, REST)
    ),
    "the original as unlearned": Trap(lambda ground: ground.original, "the original", (OUTPUT, INSIDE)),
    "noise on the weights": Trap(noised, "noise added to the weights", (REST,)),
    "a retrained model that is the original with a new head": Trap(
        lambda ground: ground.retrained, "the original with a new head", (), new_head_trained
    ),
}
"""By what they do. The retrained model handed in as unlearned is none of them: it has to pass everything."""


RECIPE = TrainConfig(epochs=12, lr=0.01, batch_size=64, schedule="one_cycle", precision="fp32")  # of the fixture `tiny`


@dataclass(frozen=True)
class Scene:
    """Models of digits, one of which never saw a three, and the data to audit them with."""

    ground: Ground
    data: AuditData
    preprocessing: Preprocessing

    def subject(self, model: nn.Module, role: str = "unlearned") -> Subject:
        return Subject(role, model, self.preprocessing)

    @property
    def original(self) -> Subject:
        return self.subject(self.ground.original, "original")

    @property
    def retrained(self) -> Subject:
        return self.subject(self.ground.retrained, "retrained")


def digits(tiny: Tiny) -> Scene:
    """Return the scene of the model `tiny`, with one that was trained by the same recipe and never saw a three."""
    source, _ = with_test_split(open_source("digits"))
    preprocessing, test = tiny.split.preprocessing, tiny.split.test
    assert preprocessing is not None
    assert test is not None
    kept = stage(without(source.train, (3,)), preprocessing).dataset
    torch.manual_seed(0)
    retrained = TinyNet()
    train(retrained, kept, RECIPE, seed=0, preprocessing=preprocessing)
    data = AuditData(
        forget_classes=(3,), test=test, train=stage(source.train, preprocessing).dataset, class_names=source.class_names
    )
    return Scene(Ground(tiny.model, retrained, (3,), 7, kept, preprocessing), data, preprocessing)
