"""l1-sparse: fine-tuning on retained samples with a penalty on the size of all weights, which decays. Zero-glance.

Source: Jia, Liu, Ram, Yao, Liu, Liu, Sharma and Liu, Model Sparsity Can Simplify Machine Unlearning, arXiv:2304.04934.

A weight that no retained sample needs shrinks by about penalty * lr / (1 - momentum) * steps / 2 in all: that must be
as much as weights are large, or nothing is forgotten. So few samples need a higher rate: the preset `small`.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.batches import Batch
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import num_steps, sgd
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import Objective, train


@dataclass(frozen=True, kw_only=True)
class L1SparseConfig:
    """Hyper-parameters of l1-sparse unlearning."""

    # gamma at the start, the weight of the sum of absolute weights; 5e-4 as re-implementations have it. 0.2, of the
    # authors' README, empties a network: 11 % of the retained digits were left
    penalty: float = 5e-4
    training: TrainConfig = field(default_factory=sgd)  # "FT_prune" in the README of OPTML-Group/Unlearn-Sparse

    def __post_init__(self) -> None:
        if not self.penalty >= 0:
            raise InputError(f"expected a penalty of at least 0, got {self.penalty}")

    @classmethod
    def small(cls) -> L1SparseConfig:
        """For about a thousand retained samples, where 10 epochs are a tenth of the steps: ten times the rate."""
        return cls(penalty=1e-3, training=sgd(lr=0.1))


def l1_sparse(
    model: nn.Module,
    split: Split,
    config: L1SparseConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, trained on with `split.retain` and made sparser. Zero-glance.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or L1SparseConfig()
    check_split(model, split, reads=METHOD.reads)
    unlearned = copy.deepcopy(model)
    train(
        unlearned,
        split.retain,
        config.training,
        seed=seed,
        preprocessing=split.preprocessing,
        objective=sparse_loss(unlearned, config.penalty, num_steps(split.retain, config.training)),
        whole_batch=True,
        journal=journal,
        phase="fine-tune",
        refused=split.gone,
    )
    return unlearned


def sparse_loss(model: nn.Module, penalty: float, steps: int) -> Objective:
    """Return cross-entropy plus a penalty on the trainable weights of `model`, which decays to 0 over `steps` calls.

    Source: arXiv:2304.04934, with its linearly decreasing schedule, which the authors' code lowers epoch by epoch.
    """
    calls = itertools.count()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        left = max(0.0, 1 - next(calls) / steps)
        size = torch.stack([weight.abs().sum() for weight in weights]).sum()
        return F.cross_entropy(logits, batch.labels) + penalty * left * size

    return objective


METHOD = Method(
    name="l1_sparse",
    run=l1_sparse,
    config=L1SparseConfig,
    presets={"default": L1SparseConfig, "small": L1SparseConfig.small},
    reads=frozenset({"retain"}),
    source="Jia et al., arXiv:2304.04934",
    # 0.01: README of Unlearn-Sparse; 5e-4: re-implementations. No range was published: up from there, see `small`
    space={"training.lr": (0.01, 0.03, 0.1), "penalty": (1e-4, 5e-4, 1e-3)},
)
