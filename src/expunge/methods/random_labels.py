"""Random labels: forget samples bear a random other label, shown together with retained samples. Reads both.

Source: the baseline of Golatkar, Achille and Soatto, arXiv:1911.04933. It is also what Graves, Nagisetty and
Ganesh, Amnesiac Machine Learning, arXiv:2010.10981, call "Unlearning" of a class, and what later papers compare with
under the name of amnesiac: the preset of that name has their rates. (Their other method, which takes back the weight
updates of batches with sensitive samples, needs a log of the training and not only its model.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.batches import Batch
from expunge.journal import Journal
from expunge.methods.checks import check_split, count_classes
from expunge.methods.common import bears, both_samples, sgd
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import Objective, train


@dataclass(frozen=True, kw_only=True)
class RandomLabelsConfig:
    """Hyper-parameters of random labels."""

    training: TrainConfig = field(default_factory=sgd)  # "RL" in run.py of OPTML-Group/Unlearn-Sparse

    @classmethod
    def amnesiac(cls) -> RandomLabelsConfig:
        """Graves et al.'s "Unlearning Tester - CIFAR100.ipynb": Adam at its own 0.001, batches of 64, 10 epochs."""
        return cls(training=TrainConfig(epochs=10, lr=0.001, batch_size=64))


def random_labels(
    model: nn.Module,
    split: Split,
    config: RandomLabelsConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, taught random retained labels on `split.forget`.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or RandomLabelsConfig()
    check_split(model, split, reads=METHOD.reads)
    unlearned = copy.deepcopy(model)
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
    return unlearned


def random_label_loss(gone: Sequence[int], num_classes: int) -> Objective:
    """Return the cross-entropy of the labels, those of the classes `gone` replaced by random retained ones.

    Labels are drawn anew for each batch, from torch's random state, as in the code of SalUn for CIFAR-10 (Graves et al.
    draw one an image). Published codes draw from other forgotten classes too, some from the image's own.
    """
    kept = torch.tensor([label for label in range(num_classes) if label not in gone])

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        drawn = kept[torch.randint(len(kept), (len(batch.labels),))].to(logits.device)
        return F.cross_entropy(logits, torch.where(bears(batch.labels, gone), drawn, batch.labels))

    return objective


METHOD = Method(
    name="random_labels",
    run=random_labels,
    config=RandomLabelsConfig,
    presets={"default": RandomLabelsConfig, "amnesiac": RandomLabelsConfig.amnesiac},
    reads=frozenset({"retain", "forget"}),
    source="Golatkar et al., arXiv:1911.04933; Graves et al., arXiv:2010.10981",
    # 3e-4: scripts.sh of DELETE; 0.01: run.py of Unlearn-Sparse; 0.1: README of Unlearn-Saliency
    space={"training.lr": (3e-4, 1e-3, 0.01, 0.1)},
)
