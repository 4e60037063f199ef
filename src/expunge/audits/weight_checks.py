"""Self-checks of where models come from: how the unlearned one was made, and whether a retrained one is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expunge.audits.check import COMPARED, UNLEARNED, Check, inputs, listed, percent, sides
from expunge.audits.core import AuditData, Subject
from expunge.audits.kinship import PERHAPS_SAME_STOCK, SAME_STOCK, STRANGERS, Kinship, kinship
from expunge.metrics.uncertainty import differs, gap_interval, of_values, wilson_interval
from expunge.weights import Metadata

SAME_AS_RETRAINED = "the same as retrained"
THE_ORIGINAL = "the original"
WEIGHTS_UNTOUCHED = "weights untouched"
BODY_UNTOUCHED = "body untouched"
FROZEN_BODY = "frozen body"
POORLY = "poorly trained"

ALMOST_NONE = 0.01  # accuracy of a model that does not know a class
KNOWN = 0.05  # mean probability of their class on forget images, or a guess's, above which a model knows it
POOR = 0.05  # accuracy that a retrained model may lack to the original on retained images


def check_unlearned(
    original: Subject,
    unlearned: Subject,
    retrained: Sequence[Subject],
    data: AuditData,
    *,
    frozen: Subject | None = None,
) -> Check:
    """Return what the weights of the unlearned model say of how it was made; see kinship.py.

    Args:
        frozen: the retrained model, where it has layers of the original that were frozen in both; None: it has none.
    """
    name = "weights of the unlearned model"
    image = inputs(unlearned, data, 1, seed=0)
    for one in retrained:
        same = kinship(unlearned.model, one.model, image)
        if same is not None and same.identical:
            return Check(
                name=name,
                ok=None,
                finding=SAME_AS_RETRAINED,
                sentence=f"the unlearned and the {one.role} model are the same: every gap between them is 0",
            )
    kin = kinship(unlearned.model, original.model, image)
    if kin is None:
        sentence = "the unlearned model has other tensors than the original: how far they moved is not told"
        return Check(name=name, ok=None, sentence=sentence)
    fault = _fault_of_unlearned(kin)
    theirs = kinship(frozen.model, original.model, image) if frozen is not None else None
    if fault is not None and fault[0] == BODY_UNTOUCHED and theirs is not None and {*kin.same} <= {*theirs.same}:
        sentence = (
            f"every weight tensor but {listed(kin.moved)} is the original's, bit for bit, as in the retrained model: "
            "the body was frozen in all of them, and holds no more of the classes than the retrained model's"
        )
        return Check(name=name, ok=None, finding=FROZEN_BODY, sentence=sentence)
    if fault is not None:
        return Check(name=name, ok=False, finding=fault[0], sentence=fault[1], roles=UNLEARNED)
    count = len(kin.moved) + len(kin.same)
    sentence = f"{len(kin.moved)} of {count} weight tensors moved, by {percent(kin.distance)} of their norm (median)"
    return Check(name=name, ok=True, sentence=sentence)


def _fault_of_unlearned(kin: Kinship) -> tuple[str, str] | None:
    """Return what was done to the weights instead of unlearning, and what that means."""
    still = "what the features knew of the classes they still know"
    if kin.identical:
        return THE_ORIGINAL, "the unlearned model is the original, bit for bit: nothing was unlearned"
    if not kin.moved:
        return (
            WEIGHTS_UNTOUCHED,
            f"every weight tensor is the original's, bit for bit, only biases, normalization or its statistics moved; "
            f"{still}",
        )
    if kin.only_head_moved:
        return (
            BODY_UNTOUCHED,
            f"every weight tensor but {listed(kin.moved)} is the original's, bit for bit; {still}",
        )
    if kin.only_head_kept:
        return (
            "body re-initialised",
            "the last layer is the original's, and what is before shares nothing with it; whatever is gone went with "
            "everything else",
        )
    if kin.noise is not None:
        return (
            "noise added to the weights",
            f"all layers moved alike, by Gaussian numbers of {percent(kin.noise)} of their size; that damages all "
            "classes and aims at none",
        )
    return None


def check_retrained(original: Subject, retrained: Subject, data: AuditData, metadata: Metadata | None = None) -> Check:
    """Return whether a model that is taken for retrained was: by its file, its weights and its answers.

    Nothing here proves it; see kinship.py for what weights can tell.

    Args:
        metadata: what its file says of it; None: nothing.
    """
    name = f"{retrained.role} model"
    layers = COMPARED if retrained.role == "retrained" else ()  # of a further one only the noise floor is taken
    claim = _claims(metadata, data)
    kin = kinship(retrained.model, original.model, inputs(retrained, data, 1, seed=0))
    fault = (
        (_fault_of_weights(kin, claim) if kin is not None else None)
        or _fault_of_file(metadata, data)
        or _fault_of_answers(original, retrained, data)
    )
    if fault is not None:
        what = (
            "is trained too little to compare with" if fault[0] == POORLY else "was not retrained without the classes"
        )
        sentence = f"the {name} {what}: {fault[1]}; what is compared with it says nothing"
        return Check(name=name, ok=False, finding=fault[0], sentence=sentence, blocks=layers, roles=(retrained.role,))
    file = "its file says that it never saw the classes" if claim else "no file says how it was trained"
    if kin is None:
        sentence = (
            f"the {name} has other tensors than the original, so that weights cannot tell how it came about; {file}"
        )
        return Check(name=name, ok=True if claim else None, sentence=sentence)
    told = f"its weights lie {percent(kin.distance)} of their norm from the original's (median)"
    if kin.same and claim:
        sentence = (
            f"layers of the {name} are the original's, bit for bit ({listed(kin.same)}): frozen in both, if {file}"
        )
        return Check(name=name, ok=None, finding=FROZEN_BODY, sentence=sentence)
    if kin.distance < PERHAPS_SAME_STOCK and not claim:
        sentence = (
            f"the {name} may have been fine-tuned from the original, and then knows too much to compare with: {told}, "
            f"as after fine-tuning, or as after training from the same initial or pretrained weights; {file}"
        )
        return Check(name=name, ok=None, finding="perhaps fine-tuned", sentence=sentence, doubts=layers)
    start = "different initial weights" if abs(kin.cosine) < STRANGERS else "the same initial or pretrained weights"
    sentence = f"nothing speaks against the {name}: it does not know the classes; {told}, as from {start}; {file}"
    return Check(name=name, ok=True, sentence=sentence)


def _claims(metadata: Metadata | None, data: AuditData) -> bool:
    """Return whether a file says that its model was trained, and without the classes."""
    if metadata is None or metadata.training is None:
        return False
    return {data.class_names[label] for label in data.forget_classes} <= set(metadata.never_seen)


Fault = tuple[str, str]
"""What is wrong in a few words, and in a sentence."""


def _fault_of_file(metadata: Metadata | None, data: AuditData) -> Fault | None:
    if metadata is None:
        return None
    names = [data.class_names[label] for label in data.forget_classes]
    made_to = [name for name in names if name in metadata.forgotten]
    if made_to:
        return "unlearned, not retrained", f"its file says that {listed(made_to)} was unlearned"
    seen = [name for name in names if name not in metadata.never_seen]
    if seen and (metadata.training is not None or metadata.never_seen):
        return "trained on the classes", f"its file says how it was trained, and not that {listed(seen)} was left out"
    return None


def _fault_of_answers(original: Subject, retrained: Subject, data: AuditData) -> Fault | None:
    answers, before = retrained.answers(data.test), original.answers(data.test)
    forget, retain = sides(answers.labels, data)
    hits = answers.logits.argmax(1) == answers.labels
    if forget.any():
        known = wilson_interval(int(hits[forget].sum()), int(forget.sum()))
        if known.low > ALMOST_NONE:
            return "knows the classes", f"{percent(known.value)} of their images are answered rightly"
        own = answers.logits[forget].double().softmax(1).gather(1, answers.labels[forget].view(-1, 1)).mean().item()
        if own > max(KNOWN, 1 / answers.logits.shape[1]):
            return "knows the classes", f"their images get them with a probability of {own:.2f} on average"
    if retain.any():
        masked = before.logits.clone()
        masked[:, data.gone] = -torch.inf
        lacks = gap_interval(of_values(hits[retain]), of_values((masked.argmax(1) == before.labels)[retain]))
        if differs(lacks) and lacks.value < -POOR:
            return (
                POORLY,
                f"of retained images it answers {-100 * lacks.value:.1f} points fewer rightly than the original",
            )
    return None


def _fault_of_weights(kin: Kinship, claim: bool) -> Fault | None:
    same = "the original's, bit for bit"
    if kin.identical:
        return THE_ORIGINAL, f"it is {same}"
    if not kin.moved:
        return "the original with other biases", f"every weight tensor is {same}"
    if kin.only_head_moved and not claim:
        return "the original with a new head", f"every weight tensor but {listed(kin.moved)} is {same}"
    if kin.noise is not None:
        return (
            "the original with noise",
            f"its weights are {same}, but for Gaussian numbers of {percent(kin.noise)} of their size",
        )
    if kin.same and not claim:
        return "some layers of the original", f"{listed(kin.same)} are {same}"
    if kin.distance < SAME_STOCK and not claim:
        return (
            "fine-tuned from the original",
            f"its weights lie {percent(kin.distance)} of their norm from the original's (median), nearer than training "
            "leaves them, unless both began from the same pretrained weights (train it with `expunge train --without`, "
            "so that its file says so)",
        )
    return None
