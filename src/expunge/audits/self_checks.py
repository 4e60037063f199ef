"""Doubts to be cleared before any verdict: are these the models, the data and the attacks that they are taken for?

Each check ends in a sentence that says what it means for the verdict. None of them is a judgement on forgetting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from expunge.audits.answer_checks import (
    check_constant,
    check_evaluation_mode,
    check_finite,
    check_logits,
    check_scale,
    check_statistics,
)
from expunge.audits.check import COMPARED, INSIDE, LAYERS, MEMBERS, OUTPUT, RELEARN, REST, Check, percent, sides
from expunge.audits.core import AuditData, Subject
from expunge.audits.weight_checks import FROZEN_BODY, check_retrained, check_unlearned
from expunge.batches import as_tensor
from expunge.data import TensorImages
from expunge.metrics.uncertainty import wilson_interval
from expunge.weights import Metadata

__all__ = [
    "LAYERS",
    "Check",
    "check_attacks",
    "check_disjoint",
    "check_held_out",
    "check_original",
    "run_self_checks",
]

HASHED = 60_000  # images of either side, at most, whose bytes are compared: all of CIFAR-10, in half a second
FEW_DUPLICATES = 0.01  # share of held-out images that may be among the training images: they move no figure by a point
MARGIN = 0.1  # accuracy by which a weak attack must beat a strong one to be a warning

WEAK_AND_STRONG = (
    ("nearest_class_mean", "head input", "linear_probe", "head input", INSIDE),
    ("head_only", "forget accuracy", "linear_probe", "head input", INSIDE),
    ("few_shot", "1", "few_shot", "5", RELEARN),
    ("few_shot", "5", "few_shot", "20", RELEARN),
)
"""Audit and figure of a weak attack, those of a strong one, and the layer of the verdict that the strong one decides.

A head is trained for some steps, a probe to the end. Other attacks cannot be ranked: those that set a head row may win
forgotten samples at the cost of retained ones, and head and few-shot training see different numbers of images.
"""


def run_self_checks(
    original: Subject,
    unlearned: Subject,
    retrained: Sequence[Subject],
    data: AuditData,
    *,
    metadata: Sequence[Metadata | None] = (),
    audits: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> tuple[Check, ...]:
    """Return what speaks for and against a verdict on these models and data; no model is changed.

    Args:
        metadata: what the files of the retrained models say of themselves, in their order.
        audits: what `run_audits` found, to compare weak attacks with strong ones; None: not run.
        seed: of the images that are drawn where not all are needed.
    """
    subjects = [original, unlearned, *retrained]
    said = [*metadata, *[None] * len(retrained)][: len(retrained)]
    of_retrained = [check_retrained(original, one, data, own) for one, own in zip(retrained, said, strict=True)]
    believed = [one for one, check in zip(retrained, of_retrained, strict=True) if check.ok is not False]
    frozen = retrained[0] if of_retrained and of_retrained[0].finding == FROZEN_BODY else None
    return (
        check_evaluation_mode(subjects, data, seed=seed),
        check_logits(subjects, data),
        check_finite(subjects, data),
        check_constant(original, unlearned, data, believed),
        check_scale(original, unlearned, data),
        check_statistics(original, unlearned, data, seed=seed),
        check_original(original, data),
        check_disjoint(data, seed=seed),
        check_unlearned(original, unlearned, retrained, data, frozen=frozen),
        *of_retrained,
        *(check_attacks(audits) if audits else ()),
    )


def check_original(original: Subject, data: AuditData) -> Check:
    """Return whether the original knows the classes well enough to ask whether they are gone."""
    name = "original knows the classes"
    if not data.has("forget test"):
        sentence = "without held-out images of the forgotten classes it is open whether they were known, or are gone"
        return Check(name=name, ok=None, sentence=sentence, blocks=(OUTPUT, *COMPARED))
    answers = original.answers(data.test)
    forget, retain = sides(answers.labels, data)
    hits = answers.logits.argmax(1) == answers.labels
    known = wilson_interval(int(hits[forget].sum()), int(forget.sum()))
    rest = hits[retain].double().mean().item() if retain.any() else 0.0
    chance = 1 / answers.logits.shape[1]
    needed = max(min(2 * chance, (1 + chance) / 2), 0.5 * rest)  # of two classes no model reaches twice chance
    told = (
        f"the original answers {percent(known.value)} of {int(forget.sum()):,} images of the forgotten classes "
        f"rightly, at least {percent(known.low)}"
    )
    if known.low > needed:
        return Check(name=name, ok=True, sentence=f"{told}, more than the {percent(needed)} it takes to ask for them")
    return Check(
        name=name,
        ok=False,
        finding="original hardly knows the classes",
        sentence=f"{told}, where it takes {percent(needed)}: what it hardly knew, or too few images show, cannot be "
        "seen to be gone, and what comes back says little",
        blocks=COMPARED,
        doubts=(OUTPUT,),
        roles=(original.role,),
    )


def check_disjoint(data: AuditData, *, seed: int = 0) -> Check:
    """Return whether held-out images are among the training images, pixel for pixel."""
    name = "train and test disjoint"
    if data.train is None:
        sentence = "no training images were given: that the model has not seen the test images is taken on trust"
        return Check(name=name, ok=None, sentence=sentence)
    train, test = _digests(data.train, seed), _digests(data.test, seed)
    compared = f"of {len(test):,} test images compared with {len(train):,} training images"
    if {stored for stored, _ in train}.isdisjoint({stored for stored, _ in test}):
        sentence = f"{compared}, none is stored in the same way: whether some are in both cannot be told"
        return Check(name=name, ok=None, sentence=sentence)
    known = set(train)
    both = sum(digest in known for digest in test)
    whole: Any = data.train
    part = 1.0 if isinstance(whole, IterableDataset) else len(train) / max(1, len(whole))
    if both == 0:
        return Check(name=name, ok=True, sentence=f"{compared}, none is in both, pixel for pixel")
    if both <= FEW_DUPLICATES * part * len(test):
        return Check(
            name=name, ok=True, sentence=f"{compared}, {both:,} are in both: too few to move a figure by a point"
        )
    return Check(
        name=name,
        ok=False,
        finding="test images in the training data",
        sentence=f"{compared}, {both:,} ({percent(both / len(test))}) are in both: what is taken for held out is "
        "known, so that probes and relearning find too much and membership is harder to tell than it is",
        blocks=COMPARED,
    )


def check_held_out(doubts: Sequence[str]) -> tuple[Check, ...]:
    """Return a check where held-out images may have been trained on although they are none of `data.train`.

    Args:
        doubts: what `Workspace.held_out_notes` says; empty: there is no such doubt, and no check.
    """
    if not doubts:
        return ()
    sentence = (
        "nothing shows that the weights were not trained on the images that were cut off as held out: if they were, "
        "that an attack on membership fails shows nothing, and classes that stay look more intact than they are"
    )
    return (Check(name="held-out images unseen", ok=None, sentence=sentence, doubts=(MEMBERS, REST)),)


def check_attacks(audits: Mapping[str, Mapping[str, Any]]) -> tuple[Check, ...]:
    """Return a check for each weak attack that did better than a strong one: then the strong one failed to train.

    Args:
        audits: what `run_audits` returned.
    """
    name = "weak attacks against strong ones"
    faults = [*_beaten(audits), *_out_of_order(audits)]
    if not faults:
        return (Check(name=name, ok=True, sentence="no weak attack did better than a strong one"),)
    return tuple(
        Check(
            name=name,
            ok=False,
            finding="a strong attack failed",
            sentence=f"{fault}, so that a yes cannot be trusted",
            doubts=(layer,),
        )
        for layer, fault in faults
    )


# Parts


def _beaten(audits: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for weak, figure, strong, best, layer in WEAK_AND_STRONG:
        reached = audits.get(strong, {}).get("figures", {}).get(best, {})
        for name, found in audits.get(weak, {}).get("figures", {}).items():
            for role in ("unlearned", "retrained"):
                if name == figure and role in found and role in reached and _beats(found[role], reached[role]):
                    yield (
                        layer,
                        f"on the {role} model {weak} ({name}) finds {percent(found[role]['value'])}, {strong} "
                        f"({best}), which is stronger, {percent(reached[role]['value'])}: the strong one failed to "
                        "train",
                    )


def _beats(weak: Mapping[str, Any], strong: Mapping[str, Any]) -> bool:
    if weak["low"] is None or strong["high"] is None:
        return False
    return bool(weak["value"] - strong["value"] > MARGIN and weak["low"] > strong["high"])


def _out_of_order(audits: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    figures = audits.get("relearn", {}).get("figures", {})
    far, near = figures.get("steps to 95 %", {}), figures.get("steps to 80 %", {})
    for role in ("unlearned", "retrained"):
        if role in far and role in near and far[role]["value"] < near[role]["value"]:
            yield (
                RELEARN,
                f"the {role} model relearns to 95 % in {far[role]['value']:g} steps, but to 80 % in "
                f"{near[role]['value']:g}: relearning is not measured rightly",
            )


Digest = tuple[str, bytes]
"""How an image is stored, and a hash of its pixels."""


def _digests(dataset: Dataset[Any], seed: int) -> list[Digest]:
    """Return a digest of each image, or of `HASHED` drawn at random."""
    if isinstance(dataset, IterableDataset):
        return [_digest(as_tensor(sample[0])) for sample, _ in zip(dataset, range(HASHED), strict=False)]
    sized: Any = dataset
    rows = torch.randperm(len(sized), generator=torch.Generator().manual_seed(seed))[:HASHED].tolist()
    read = _reader(dataset)
    return [_digest(read(row)) for row in rows]


def _reader(dataset: Any) -> Callable[[int], Tensor]:
    """Return a function from a row to its image that does no more than that, where a data set is known."""
    if isinstance(dataset, TensorImages):
        return lambda row: dataset.images[row]
    if isinstance(dataset, Subset):
        inner, indices = _reader(dataset.dataset), list(dataset.indices)
        return lambda row: inner(indices[row])
    if isinstance(dataset, ConcatDataset):
        ends, readers = [0, *dataset.cumulative_sizes], [_reader(part) for part in dataset.datasets]

        def read(row: int) -> Tensor:
            part = int(np.searchsorted(ends, row, side="right")) - 1
            return readers[part](row - ends[part])

        return read
    return lambda row: as_tensor(dataset[row][0])


def _digest(image: Tensor) -> Digest:
    pixels = image.contiguous().cpu().numpy().tobytes()
    return f"{image.dtype} {tuple(image.shape)}", hashlib.blake2b(pixels, digest_size=16).digest()
