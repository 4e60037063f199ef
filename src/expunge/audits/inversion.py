"""Model inversion: can an image of a forgotten class still be drawn out of the model?

Images are learned until the model under audit calls them a forgotten class, and shown to the original model, which
knows the class. The original stands in for a person who looks. It shares weights with a model that was unlearned from
it, so what fools the one may fool the other too; and of its own images it is judge in its own cause. An independent
model that knows the class would judge better, and is rarely at hand.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.audits.core import Audit, AuditData, Context, Found, Subject
from expunge.metrics.uncertainty import of_values
from expunge.randomness import seeded
from expunge.schema import Preprocessing
from expunge.signals import descend, retained_sample
from expunge.training import device_of, evaluating, logits_of

IMAGES = 32  # of all forgotten classes together, in turn; half start from noise, half from blends of retained images
STEPS = 40  # Adam steps, as for the impressions of signals.py
RATE = 0.05


def attack_inversion(subject: Subject, data: AuditData, context: Context) -> Found:
    """Draw images of forgotten classes out of a model and show them to the original: see `INVERSION`.

    Every model starts from the same images. The details tell whether the model itself was brought to call the images
    the class: where it was not, a low figure says little.
    """
    labels = torch.tensor(data.forget_classes).repeat(IMAGES)[: max(IMAGES, len(data.forget_classes))]
    starts = _starts(data, context, len(labels))
    own, judge = subject.preprocessing, context.original.preprocessing
    drawn = _draw(subject, _between(starts, judge, own), labels, context)
    rows = torch.arange(len(labels))
    seen = _probabilities(context.original, _between(drawn, own, judge))
    itself = _probabilities(subject, drawn)
    return Found(
        {
            "called by the original": of_values(seen.argmax(1) == labels),
            "probability of the original": of_values(seen[rows, labels]),
        },
        {"called_by_the_model_itself": (itself.argmax(1) == labels).double().mean().item()},
    )


def _starts(data: AuditData, context: Context, count: int) -> Tensor:
    """Return input of the original model, (count, channels, H, W): noise, and blends of held-out images."""
    generator = torch.Generator().manual_seed(context.seed)
    retain = data.part("test", forget=False)
    pairs = retained_sample(retain, 2 * count, context.original.preprocessing, generator).images
    starts = (pairs[:count] + pairs[count:]) / 2
    starts[: count // 2] = torch.randn((count // 2, *starts.shape[1:]), generator=generator)
    return starts


def _draw(subject: Subject, starts: Tensor, labels: Tensor, context: Context) -> Tensor:
    frozen = copy.deepcopy(subject.model).eval().requires_grad_(False)
    with context.journal.phase("inversion", steps=STEPS) as meter, seeded(context.seed):
        return descend(
            frozen,
            starts,
            labels,
            lambda logits, targets, _: F.cross_entropy(logits, targets),
            lr=RATE,
            steps=STEPS,
            precision="fp32",
            meter=meter,
        )


def _between(images: Tensor, given: Preprocessing | None, wanted: Preprocessing | None) -> Tensor:
    """Return the input of one model as that of another, which may have been trained with other mean and std."""
    if given is None or wanted is None:
        return images
    mean, std, new_mean, new_std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (given.mean, given.std, wanted.mean, wanted.std)
    )
    return (images * std + mean - new_mean) / new_std


@torch.no_grad()
def _probabilities(subject: Subject, images: Tensor) -> Tensor:
    with evaluating(subject.model), seeded(0):
        return logits_of(subject.model(images.to(device_of(subject.model)))).cpu().double().softmax(1)


INVERSION = Audit(
    name="inversion",
    says="How many images that were learned until the model calls them a forgotten class the original model takes for "
    "it (of its own images it is its own judge), and with what probability.",
    source="Fredrikson et al., CCS 2015; Yin et al., DeepInversion, arXiv:1912.08795",
    needs=("forget test", "retain test"),
    targets={"called by the original": "retrained", "probability of the original": "retrained"},
    run=attack_inversion,
)
