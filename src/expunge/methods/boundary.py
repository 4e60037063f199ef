"""Boundary unlearning: hand forget samples to their nearest class, or to a new one that is cut off. Reads those.

Source: Chen, Gao, Liu, Peng and Wang, Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the
Decision Boundary, CVPR 2023, arXiv:2303.11570; the authors' code as mirrored in
https://github.com/TY-LEE-KR/Boundary-Unlearning-Code (boundary_unlearning.py, adv_generator.py).

Departures: the nearest class is the likeliest *retained* one of the attacked image. The authors take the likeliest of
all, which is the forgotten one where the attack fails (41 of 100 digits at their bound), and so train on the class
they mean to remove; with that, digits kept 0.46 of the class. And in boundary shrink normalization layers keep and
use their statistics (see `delete`), which forgot a little more; boundary expand lost far more of the rest with it, so
there they follow the batches of forget samples, as in the authors' code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.audits.inside import last_layer
from expunge.batches import Batch
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.checks import check_split, count_classes, first_image
from expunge.methods.common import evaluating_norms, forget_samples
from expunge.methods.registry import Method
from expunge.randomness import seeded
from expunge.schema import Preprocessing, Split, TrainConfig
from expunge.training import Objective, answer, device_of, train


def _sgd(lr: float, steps: int = 790) -> TrainConfig:
    """The authors' 10 epochs over 5,000 images of CIFAR-10 in batches of 64: as many steps for any forget sample.

    Their momentum of 0.9 is not Nesterov's, ours is.
    """
    return TrainConfig(steps=steps, lr=lr, optimizer="sgd", batch_size=64)


@dataclass(frozen=True, kw_only=True)
class BoundaryShrinkConfig:
    """Hyper-parameters of boundary shrink."""

    bound: float = 0.1  # of the attack, in pixels of [0, 1] (of model input without a preprocessing); authors' code
    training: TrainConfig = field(default_factory=lambda: _sgd(1e-5))  # authors' code, for an All-CNN
    frozen_norms: bool = True  # normalization layers keep and use their statistics; authors' code: False

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise InputError(f"expected a positive bound, got {self.bound}")

    @classmethod
    def resnet18(cls) -> BoundaryShrinkConfig:
        """The rate that the authors of DELETE found for CIFAR-10 and ResNet18 (scripts.sh there)."""
        return cls(training=_sgd(5e-5))

    @classmethod
    def small(cls) -> BoundaryShrinkConfig:
        """For about a hundred forget samples: a fifth of the steps, at ten times the rate."""
        return cls(training=_sgd(1e-4, steps=160))


@dataclass(frozen=True, kw_only=True)
class BoundaryExpandConfig:
    """Hyper-parameters of boundary expand.

    The rate lies between the authors' 1e-5 for an All-CNN, at which digits keep 0.2 to 0.4 of the class, and DELETE's
    8e-4 for a ResNet18, at which they lose 0.1 of the rest.
    """

    training: TrainConfig = field(default_factory=lambda: _sgd(3e-4))
    frozen_norms: bool = False  # as in BoundaryShrinkConfig; True lost up to 0.2 more of the rest on digits

    @classmethod
    def published(cls) -> BoundaryExpandConfig:
        """The rate of the authors' code, for an All-CNN."""
        return cls(training=_sgd(1e-5))

    @classmethod
    def resnet18(cls) -> BoundaryExpandConfig:
        """The rate that the authors of DELETE found for CIFAR-10 and ResNet18 (scripts.sh there)."""
        return cls(training=_sgd(8e-4))

    @classmethod
    def small(cls) -> BoundaryExpandConfig:
        """For about a hundred forget samples: a fifth of the steps, which on digits forgot as much."""
        return cls(training=_sgd(3e-4, steps=160))


def boundary_shrink(
    model: nn.Module,
    split: Split,
    config: BoundaryShrinkConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, trained to call each sample of `split.forget` its nearest retained class.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or BoundaryShrinkConfig()
    check_split(model, split, reads=SHRINK.reads)
    original = copy.deepcopy(model).eval().requires_grad_(False)
    closed, preprocessing, bound = split.gone, split.preprocessing, config.bound

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        nearest = nearest_class(original, batch.images, batch.labels, closed, bound=bound, preprocessing=preprocessing)
        return F.cross_entropy(logits, nearest)

    return _trained(copy.deepcopy(model), split, config.training, objective, config.frozen_norms, seed, journal)


def boundary_expand(
    model: nn.Module,
    split: Split,
    config: BoundaryExpandConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, trained to call `split.forget` a further class, which is then cut off.

    Raises:
        InputError: the split is unusable, see `check_split`, or the logits are not what the last layer gives.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or BoundaryExpandConfig()
    check_split(model, split, reads=EXPAND.reads)
    shadow, image = count_classes(model, split), first_image(split).unsqueeze(0).to(device_of(model))
    widened = copy.deepcopy(model)
    name = last_layer(widened, image)
    with seeded(seed):
        wide = Widened(widened.get_submodule(name))
    _replace(widened, name, wide)
    _check_widened(widened, image, shadow)

    def objective(logits: Tensor, _: Batch) -> Tensor:
        return F.cross_entropy(logits, torch.full((len(logits),), shadow, device=logits.device))

    unlearned = _trained(widened, split, config.training, objective, config.frozen_norms, seed, journal)
    _replace(unlearned, name, wide.head)
    return unlearned


def nearest_class(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    closed: Sequence[int],
    *,
    bound: float,
    preprocessing: Preprocessing | None = None,
) -> Tensor:
    """Return (N,) the class, none of `closed`, that `model` finds likeliest on each image after an attack.

    The attack is one step of the fast gradient sign method, away from the image's own label.

    Args:
        model: in eval mode; it is not changed.
        images: (N, channels, H, W), model input.
        labels: (N,) int64.
        bound: how far each pixel moves, in [0, 1]; with a preprocessing it stays in that range.
    """
    with torch.enable_grad():
        moving = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(answer(model, moving), labels), moving)
    with torch.no_grad():
        if preprocessing is None:
            attacked = images + bound * gradient.sign()
        else:
            mean, std = (
                torch.tensor(values, device=images.device).view(1, -1, 1, 1)
                for values in (preprocessing.mean, preprocessing.std)
            )
            attacked = ((images * std + mean + bound * gradient.sign()).clamp(0.0, 1.0) - mean) / std
        logits = answer(model, attacked).clone()
        logits[:, list(closed)] = -torch.inf
        return logits.argmax(1)


class Widened(nn.Module):
    """A last layer with one more output, the shadow class, whose weights are drawn from torch's random state."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.shadow: nn.Conv2d | nn.Linear
        if isinstance(head, nn.Conv2d):
            shape = (head.kernel_size, head.stride, head.padding, head.dilation)
            self.shadow = nn.Conv2d(head.in_channels, 1, *shape)  # type: ignore[arg-type]
        elif isinstance(head, nn.Linear):
            self.shadow = nn.Linear(head.in_features, 1)
        else:
            raise InputError(f"expected a linear or convolution layer to widen, got {type(head).__name__}")
        fan = head.weight[0].numel() + (1 + len(head.weight)) * head.weight[0, 0].numel()
        nn.init.normal_(self.shadow.weight, std=(2 / fan) ** 0.5)  # Glorot and Bengio, of the wider layer
        if self.shadow.bias is not None:
            nn.init.zeros_(self.shadow.bias)
        self.shadow.to(head.weight.device)

    def forward(self, values: Tensor) -> Tensor:
        axis = 1 if isinstance(self.head, nn.Conv2d) else -1
        return torch.cat([self.head(values), self.shadow(values)], axis)


def _trained(
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    objective: Objective,
    frozen_norms: bool,
    seed: int,
    journal: Journal | None,
) -> nn.Module:
    """Train `model` in place on the forget samples; return it, in eval mode."""
    with evaluating_norms(model) if frozen_norms else nullcontext():
        train(
            model,
            forget_samples(split),
            config,
            seed=seed,
            preprocessing=split.preprocessing,
            objective=objective,
            journal=journal,
            phase="forget",
        )
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


@torch.no_grad()
def _check_widened(model: nn.Module, image: Tensor, shadow: int) -> None:
    width: object = None
    try:
        width = answer(copy.deepcopy(model).eval(), image).shape[1]
    except RuntimeError as error:  # something after the last layer takes the number of classes for granted
        width = error
    if width != shadow + 1:
        raise InputError(f"cannot add a class to this model: expected {shadow + 1} logits from a wider last layer")


SHRINK = Method(
    name="boundary_shrink",
    run=boundary_shrink,
    config=BoundaryShrinkConfig,
    presets={
        "default": BoundaryShrinkConfig,
        "resnet18": BoundaryShrinkConfig.resnet18,
        "small": BoundaryShrinkConfig.small,
    },
    reads=frozenset({"forget"}),
    source="Chen et al., CVPR 2023, arXiv:2303.11570",
    # 1e-5: authors' code; 5e-5: scripts.sh of DELETE; 1e-4: `small`
    space={"training.lr": (1e-5, 5e-5, 1e-4)},
)

EXPAND = Method(
    name="boundary_expand",
    run=boundary_expand,
    config=BoundaryExpandConfig,
    presets={
        "default": BoundaryExpandConfig,
        "published": BoundaryExpandConfig.published,
        "resnet18": BoundaryExpandConfig.resnet18,
        "small": BoundaryExpandConfig.small,
    },
    reads=frozenset({"forget"}),
    source="Chen et al., CVPR 2023, arXiv:2303.11570",
    # 1e-5: authors' code; 8e-4: scripts.sh of DELETE; and between
    space={"training.lr": (1e-5, 1e-4, 3e-4, 8e-4)},
)

METHODS = (SHRINK, EXPAND)
