"""SalUn: random labels, taught only to the weights that the loss on forget samples depends on most. Reads both.

Source: Fan, Liu, Zhang, Wong, Wei and Liu, SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency,
arXiv:2310.12508.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.checks import check_split, count_classes
from expunge.methods.common import BATCH, batches, both_samples, forget_samples, sgd
from expunge.methods.random_labels import random_label_loss
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import answer, device_of, train


@dataclass(frozen=True, kw_only=True)
class SalunConfig:
    """Hyper-parameters of SalUn."""

    share: float = 0.5  # of all trainable weights that may move; the paper's threshold is the median gradient
    # epochs as published; a tenth of the 0.1 in the authors' README, as for random labels. From 0.01 to 0.1, and from
    # shares of 0.1 to 0.9, it made no odds on digits
    training: TrainConfig = field(default_factory=lambda: sgd(weight_decay=0.0))

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"expected a share above 0 and at most 1, got {self.share}")
        if self.training.weight_decay != 0:
            raise InputError(
                f"expected a weight_decay of 0, got {self.training.weight_decay}: it would move masked weights too"
            )


def salun(
    model: nn.Module,
    split: Split,
    config: SalunConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, whose most salient weights learned random labels on `split.forget`.

    All other weights are bit for bit those of `model`: masking gradients is enough, as there is no weight decay.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or SalunConfig()
    check_split(model, split, reads=METHOD.reads)
    unlearned = copy.deepcopy(model)
    mask = most_salient(forget_gradients(model, split, journal=journal), config.share)
    hooks = [
        parameter.register_hook(mask[name].mul)  # type: ignore[no-untyped-call]
        for name, parameter in unlearned.named_parameters()
        if name in mask
    ]
    try:
        train(
            unlearned,
            both_samples(split, seed=seed),
            config.training,
            seed=seed,
            preprocessing=split.preprocessing,
            objective=random_label_loss(split.gone, count_classes(model, split)),
            journal=journal,
            phase="forget",
            refused=split.forgotten_before,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return unlearned


def forget_gradients(model: nn.Module, split: Split, *, journal: Journal | None = None) -> dict[str, Tensor]:
    """Return the gradient of the summed cross-entropy on `split.forget` by each trainable parameter, in eval mode.

    Source: arXiv:2310.12508. It is that of the original's weights on all samples; some versions of the authors' code
    step the optimizer between batches.
    """
    frozen = copy.deepcopy(model).eval()
    named = {name: parameter for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    with (journal or Journal()).phase("saliency", steps=None) as meter, torch.enable_grad():
        for batch in batches(forget_samples(split), split.preprocessing, device_of(frozen), size=BATCH):
            loss = F.cross_entropy(answer(frozen, batch.images), batch.labels, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            meter.step(samples=len(batch.labels))
            meter.read(Counter(batch.labels.tolist()))
    return {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in named.items()
    }


def most_salient(gradients: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return masks, 1 for the `share` of all elements whose gradients are largest in size, else 0.

    Source: arXiv:2310.12508, the saliency mask. The threshold is one for all parameters together. (One version of the
    authors' generate_mask.py keeps the smallest.)
    """
    sizes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    chosen = torch.zeros_like(sizes)
    chosen[sizes.topk(max(1, round(share * len(sizes)))).indices] = 1
    parts = torch.split(chosen, [gradient.numel() for gradient in gradients.values()])
    return {name: part.view_as(gradient) for (name, gradient), part in zip(gradients.items(), parts, strict=True)}


METHOD = Method(
    name="salun",
    run=salun,
    config=SalunConfig,
    presets={"default": SalunConfig},
    reads=frozenset({"retain", "forget"}),
    source="Fan et al., arXiv:2310.12508",
    # rates: 0.1 in the README of Unlearn-Saliency, 0.01 a tenth of it; shares: of generate_mask.py there
    space={"training.lr": (0.01, 0.03, 0.1), "share": (0.1, 0.3, 0.5)},
)
