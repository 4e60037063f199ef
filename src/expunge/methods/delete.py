"""DELETE: distil from the model itself, its answer on forget samples without the forgotten class. Reads forget samples.

Source: Zhou, Zheng, Mo, Lu, Lin and Zheng, Decoupled Distillation to Erase: A General Unlearning Method for Any
Class-centric Tasks, CVPR 2025, arXiv:2503.23751, and https://github.com/shaaaaron/DELETE.

Departures: of several classes to forget all are masked, not the sample's own alone, so that none is taught another;
and normalization layers keep and use their statistics, which in batches of one class would drift (the authors' option
`disable_bn`, off by default). On the digits of the tests, at the published rate and length, that leaves a retained
accuracy of 0.97, where drifting statistics leave 0.92 and kept ones, with the layers in train mode, 0.85.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.batches import Batch
from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import evaluating_norms, forget_samples
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.signals import retained_answers
from expunge.training import Objective, answer, train


@dataclass(frozen=True, kw_only=True)
class DeleteConfig:
    """Hyper-parameters of DELETE: the authors' for CIFAR-10 and ResNet18.

    Their 20 epochs over 5,000 images are 800 steps; a small forget sample gets fewer, which did on digits (20).
    """

    training: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=20, lr=1e-3, optimizer="sgd", batch_size=128)
    )  # scripts.sh and config/cifar10_resnet18.yaml; momentum 0.9, not Nesterov's
    frozen_norms: bool = True  # False: the authors' default, normalization layers follow the batches of forget samples

    @classmethod
    def published(cls) -> DeleteConfig:
        """The authors' default, drifting statistics included."""
        return cls(frozen_norms=False)


def delete(
    model: nn.Module,
    split: Split,
    config: DeleteConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, taught its own answers without the classes to forget on `split.forget`.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or DeleteConfig()
    check_split(model, split, reads=METHOD.reads)
    unlearned = copy.deepcopy(model)
    with evaluating_norms(unlearned) if config.frozen_norms else nullcontext():
        train(
            unlearned,
            forget_samples(split),
            config.training,
            seed=seed,
            preprocessing=split.preprocessing,
            objective=masked_distillation(copy.deepcopy(model).eval(), split.gone),
            journal=journal,
            phase="forget",
        )
    return unlearned


def masked_distillation(original: nn.Module, gone: Sequence[int]) -> Objective:
    """Return the loss KL(the original's answer without the classes `gone` || the model's answer), in nats, at least 0.

    Source: arXiv:2503.23751. Its mask sets the logits of `gone` to minus infinity.

    Args:
        original: in eval mode.
    """

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            taught = retained_answers(answer(original, batch.images), tuple(gone))
        return F.kl_div(logits.log_softmax(1), taught, reduction="batchmean")

    return objective


METHOD = Method(
    name="delete",
    run=delete,
    config=DeleteConfig,
    presets={"default": DeleteConfig, "published": DeleteConfig.published},
    reads=frozenset({"forget"}),
    source="Zhou et al., CVPR 2025, arXiv:2503.23751",
    # 1e-3 and drifting statistics: the authors' default. No range of rates was published: one step each way
    space={"training.lr": (3e-4, 1e-3, 3e-3), "frozen_norms": (True, False)},
)
