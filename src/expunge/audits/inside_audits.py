"""Audits of what is still inside: a probe and class means on the features after each block of a model.

Both are read beside the retrained model's: features that never saw a class tell it from others, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Subset

from expunge.audits.core import Audit, AuditData, Context, Found, Subject
from expunge.audits.inside import HEAD_INPUT, Features, linear_probe_hits, nearest_class_mean_hits
from expunge.data import labels_of
from expunge.metrics.uncertainty import of_values

TRAIN_IMAGES = 3000  # that probes train on, all classes together: then one takes half a second, on 512 features
MOST_PER_CLASS = 300  # of them: what ten classes get of 3,000
FEWEST_PER_CLASS = 20  # of them, whatever the total comes to: with fewer a probe measures the draw
HELD_OUT = 1000  # held-out samples a figure is measured on at most: a share of one half is then known to 0.03


def training_sample(data: AuditData, *, seed: int) -> Subset[tuple[object, object]]:
    """Return training samples, as many of each forgotten as of each retained class (all, where there are fewer).

    Raises:
        InputError: there are none of the forgotten classes, or of the retained ones.
    """
    for forget in (True, False):
        data.part("train", forget=forget, most=1)  # says what is missing
    labels = torch.from_numpy(labels_of(data.train))
    classes = [label for label in torch.unique(labels).tolist() if label not in data.forgotten_before]
    per_class = min(MOST_PER_CLASS, max(FEWEST_PER_CLASS, TRAIN_IMAGES // len(classes)))
    rows = [drawn(labels, label, seed=seed)[:per_class] for label in classes]
    assert data.train is not None  # it has a part
    return Subset(data.train, torch.cat(rows).sort().values.tolist())


def drawn(labels: Tensor, label: int, *, seed: int) -> Tensor:
    """Return the positions of a class in `labels` (N,), in a random order that depends on `seed` alone."""
    rows = (labels == label).nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


Hits = Callable[[Features, Features, Sequence[int]], Tensor]


def _after_each_block(hits: Hits, subject: Subject, data: AuditData, context: Context) -> Found:
    held_out = data.part("test", forget=True, most=HELD_OUT, seed=context.seed)
    known = subject.blocks(training_sample(data, seed=context.seed))
    asked = subject.blocks(held_out)
    blocks = {name if name == HEAD_INPUT else f"after {name}": name for name in known}  # in the order they run
    figures = {
        told: of_values(hits(known[name], asked[name], data.forget_classes))
        for told, name in ({HEAD_INPUT: HEAD_INPUT} | blocks).items()
    }
    return Found(figures, {"training_images": len(known[HEAD_INPUT].labels), "blocks": list(blocks)})


LINEAR_PROBE = Audit(
    name="linear_probe",
    says="how many held-out samples of the forgotten classes a linear classifier on the model's features gets right",
    source="Alain and Bengio, arXiv:1610.01644; for unlearning arXiv:2604.08271",
    needs=("forget test", "forget train", "retain train"),
    targets={HEAD_INPUT: "retrained", "after *": "retrained"},
    run=lambda subject, data, context: _after_each_block(linear_probe_hits, subject, data, context),
)

NEAREST_CLASS_MEAN = Audit(
    name="nearest_class_mean",
    says="how many held-out samples of the forgotten classes lie nearest to the mean feature of their class",
    source="Rebuffi et al., arXiv:1611.07725, section 3.1; for unlearning arXiv:2604.08271",
    needs=("forget test", "forget train", "retain train"),
    targets={HEAD_INPUT: "retrained", "after *": "retrained"},
    run=lambda subject, data, context: _after_each_block(nearest_class_mean_hits, subject, data, context),
)
