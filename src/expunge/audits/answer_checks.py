"""Self-checks of how models answer: in evaluation mode, with logits, finite, varied, in scale, statistics fresh."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from expunge.audits.check import (
    INSIDE,
    LAYERS,
    MEMBERS,
    OUTPUT,
    RELEARN,
    UNLEARNED,
    Check,
    inputs,
    listed,
    percent,
    points,
    sides,
)
from expunge.audits.core import AuditData, Subject
from expunge.metrics.uncertainty import Interval, gap_interval, of_values
from expunge.randomness import seeded
from expunge.signals import REFRESH_IMAGES, are_probabilities, refreshed, retained_sample
from expunge.training import evaluating, has_running_statistics, logits_of, predict

PASSES = 48  # images to try evaluation mode on: whether something moves shows on few
CONSTANT = 0.95  # share of one answer above which answers say nothing of the images
FLAT = 1e-3  # highest probability above chance, on average, below which answers are uniform
SCALE = 10.0  # times that logits may be larger or smaller than the original's; retrained ones were within 1.2
SAMPLES = 500  # images to see a change of several points of accuracy on
STALE = 0.05  # accuracy that new running statistics must win to be spoken of


def check_evaluation_mode(subjects: Sequence[Subject], data: AuditData, *, seed: int = 0) -> Check:
    """Return whether every model is in eval mode as it answers, repeats itself, and judges each image alone."""
    faults = [(subject.role, _not_evaluating(subject, data, seed)) for subject in subjects]
    wrong = {role: fault for role, fault in faults if fault is not None}
    seen = [f"the {role} model {fault}" for role, fault in wrong.items()]
    if seen:
        return Check(
            name="evaluation mode",
            ok=False,
            finding="not in evaluation mode",
            sentence=f"{listed(seen)}: figures depend on chance or on company, none of the verdict can be relied on",
            blocks=LAYERS,
            roles=tuple(wrong),
        )
    sentence = "every model answers in evaluation mode, the same twice, and each image whatever others are beside it"
    return Check(name="evaluation mode", ok=True, sentence=sentence)


def check_logits(subjects: Sequence[Subject], data: AuditData) -> Check:
    """Return whether models give logits: probabilities in their place are trained and scored wrongly."""
    wrong = [subject.role for subject in subjects if are_probabilities(subject.answers(data.test).logits)]
    if wrong:
        return Check(
            name="logits",
            ok=False,
            finding="softmax outputs",
            sentence=f"the {listed(wrong)} model gives probabilities, not logits; which class is "
            "answered and what is inside can be judged, but losses are wrong, and with them relearning and membership: "
            "hand it in without its last softmax",
            blocks=(RELEARN, MEMBERS),
            roles=tuple(wrong),
        )
    return Check(name="logits", ok=True, sentence="no model gives probabilities in place of logits")


def check_finite(subjects: Sequence[Subject], data: AuditData) -> Check:
    """Return whether all answers are finite numbers."""
    wrong = [subject.role for subject in subjects if not _finite(subject.answers(data.test).logits)]
    if wrong:
        return Check(
            name="finite answers",
            ok=False,
            finding="broken answers",
            sentence=f"the {listed(wrong)} model gives NaN or infinite logits: it is broken, nothing can be said of it",
            blocks=LAYERS,
            roles=tuple(wrong),
        )
    return Check(name="finite answers", ok=True, sentence="all logits are finite")


def check_constant(original: Subject, unlearned: Subject, data: AuditData, retrained: Sequence[Subject] = ()) -> Check:
    """Return whether the unlearned model answers more than one class: a constant answer forgets every other class.

    Args:
        retrained: models that nothing speaks against: what they answer as often is no fault.
    """
    name = "constant answers"
    answers = unlearned.answers(data.test)
    label, share = _most_frequent(answers.logits.argmax(1))
    if len(data.class_names) - len(data.gone) < 2:
        sentence = (
            f"{percent(share)} of all images are answered with {data.class_names[label]}: where fewer than two classes "
            "stay, a model that forgot the others answers no second one, so that this tells nothing"
        )
        return Check(name=name, ok=None, sentence=sentence)
    others = [_most_frequent(one.answers(data.test).logits.argmax(1))[1] for one in (original, *retrained)]
    usual = max(_most_frequent(answers.labels)[1], *others)
    if share > CONSTANT > usual:
        return Check(
            name=name,
            ok=False,
            finding="constant answer",
            sentence=f"{percent(share)} of all images are answered with {data.class_names[label]}: that the forgotten "
            "classes are not answered says nothing, for no image is recognised",
            doubts=(OUTPUT, MEMBERS),
            roles=UNLEARNED,
        )
    sentence = f"answers vary: the most frequent, {data.class_names[label]}, is given to {percent(share)} of images"
    return Check(name=name, ok=True, sentence=sentence)


def check_scale(original: Subject, unlearned: Subject, data: AuditData) -> Check:
    """Return whether answers are as sure as the original's, up to a factor that training explains."""
    before, after = (_retained_logits(subject, data) for subject in (original, unlearned))
    if before.shape[1] < 2 or not (_finite(before) and _finite(after)):
        sentence = "how sure answers are is not compared: it takes finite logits of two retained classes"
        return Check(name="temperature", ok=None, sentence=sentence)
    factor = _spread(after) / max(_spread(before), 1e-12)
    probabilities = unlearned.answers(data.test).logits.double().softmax(1)
    surest, chance = probabilities.max(1).values.mean().item(), 1 / probabilities.shape[1]
    if surest - chance < FLAT:
        finding = "uniform answers"
        seen = f"the highest probability is {surest:.4f} on average, chance {chance:.4f}"
    elif not 1 / SCALE <= factor <= SCALE:
        finding = "sharpened answers" if factor > 1 else "flattened answers"
        seen = f"logits are {factor:.3g} times as far apart as the original's"
    else:
        sentence = f"logits are as far apart as the original's (a factor of {factor:.2f})"
        return Check(name="temperature", ok=True, sentence=sentence)
    return Check(
        name="temperature",
        ok=False,
        finding=finding,
        sentence=f"{seen}; losses and confidences are out of scale, so that slow relearning and a failed attack on "
        "them show nothing",
        doubts=(RELEARN, MEMBERS),
        roles=UNLEARNED,
    )


def check_statistics(original: Subject, unlearned: Subject, data: AuditData, *, seed: int = 0) -> Check:
    """Return how far normalization statistics moved, and whether the weights know more than they let the model show."""
    name = "normalization statistics"
    moved = _statistics_moved(unlearned.model, original.model)
    if moved is None:
        return Check(name=name, ok=True, sentence="the unlearned model has no running statistics to compare")
    shift = f"by {moved:.2f}" if moved >= 0.01 or moved == 0 else "by less than 0.01"
    moved_by = f"running means moved {shift} standard deviations from the original's"
    drawn = _to_refresh(data, seed) if data.has("retain test") else None
    if drawn is None:
        told = f"too few retained images to measure them anew: whether they are stale is open ({moved_by})"
        return Check(name=name, ok=None, sentence=told)
    shown, held_out = drawn
    generator = torch.Generator().manual_seed(seed)
    images = retained_sample(shown, len(shown), unlearned.preprocessing, generator, repeat=False).images
    anew = refreshed(unlearned.model, images)
    kept = _won(_hits(unlearned, anew, held_out))
    told = f"measured anew on retained images alone ({moved_by}),"
    if not data.has("forget test"):
        return _of_new_statistics(told, kept, None)
    forgotten = data.part("test", forget=True, most=SAMPLES, seed=seed)
    hits = _hits(unlearned, anew, forgotten)
    back = _Comeback(_won(hits))
    if back.won.value > STALE:  # what the original wins as well was never hidden
        images = retained_sample(shown, len(shown), original.preprocessing, generator, repeat=False).images
        own = _hits(original, refreshed(original.model, images), forgotten)
        beyond = gap_interval(*(of_values(new.double() - old.double()) for new, old in (hits, own)))
        back = _Comeback(back.won, _won(own), beyond)
    return _of_new_statistics(told, kept, back)


@dataclass(frozen=True)
class _Comeback:
    """How many more forgotten images are answered rightly with new statistics."""

    won: Interval
    own: Interval | None = None  # what new statistics win on the original; None: not looked at, `won` is too small
    beyond: Interval | None = None  # how much more the unlearned model wins than the original, in pairs

    @property
    def hidden(self) -> bool | None:
        """Whether statistics hid them; None where neither that nor its absence is shown."""
        if self.beyond is None or self.beyond.high <= STALE:
            return False
        return True if _matters(self.won) and self.beyond.low > 0 else None

    @property
    def told(self) -> str:
        told = f"{points(self.won)} more images of the forgotten classes"
        if self.own is None or self.beyond is None:
            return told
        return f"{told} (with the original {points(self.own)}: a difference of {points(self.beyond)})"


def _of_new_statistics(told: str, kept: Interval, back: _Comeback | None) -> Check:
    """Return the check that says what new statistics win on retained and on forgotten images."""
    name = "normalization statistics"
    hidden = back.hidden if back is not None else None
    doubts = (OUTPUT, INSIDE) if back is not None and hidden is not False and _matters(back.won) else ()
    returns = f"{back.told} are answered rightly" if back is not None else ""
    if _matters(kept):
        also = {True: f", and {returns}", None: f", and {returns}, which is open" if returns else "", False: ""}[hidden]
        return Check(
            name=name,
            ok=False,
            finding="stale statistics",
            sentence=f"{told} {points(kept)} more retained images are answered rightly{also}: the verdict is on the "
            "model as handed in, part of whose damage is in its statistics",
            doubts=doubts,
            roles=UNLEARNED,
        )
    if hidden:
        return Check(
            name=name,
            ok=False,
            finding="hidden by statistics",
            sentence=f"{told} {returns}: the classes are hidden by statistics, not gone from the weights",
            doubts=doubts,
            roles=UNLEARNED,
        )
    if back is None:
        sentence = f"{told} {points(kept)} more retained images are answered rightly; whether they hide classes is open"
        return Check(name=name, ok=None, sentence=f"{sentence} without held-out images of these")
    if hidden is None:
        return Check(
            name=name,
            ok=None,
            finding="perhaps hidden by statistics" if doubts else "",
            sentence=f"{told} {returns}: whether the classes are hidden by statistics, or gone from the weights, is "
            "open",
            doubts=doubts,
        )
    as_before = f"no more than the {STALE:.0%} that do not matter" if back.own is None else "as with the original"
    sentence = f"{told} {points(kept)} more retained images are answered rightly, and {back.told}, {as_before}: "
    return Check(name=name, ok=True, sentence=f"{sentence}they are not seen to hide anything")


# Parts


def _matters(won: Interval) -> bool:
    return won.low > 0 and won.value > STALE


def _not_evaluating(subject: Subject, data: AuditData, seed: int) -> str | None:
    """Return what a model does that one in evaluation mode does not, in words."""
    images = inputs(subject, data, PASSES, seed=seed)
    watched = copy.deepcopy(subject.model)
    training: list[str] = []

    def note(module: nn.Module, name: str) -> None:
        if module.training:
            training.append(name or "all of it")

    for name, module in watched.named_modules():
        module.register_forward_pre_hook(lambda module, _, name=name: note(module, name))
    first, second = _pass(watched, images, 1), _pass(watched, images, 2)
    if training:
        return f"answers in training mode ({training[0]})"
    if _differ(first, second):
        return "answers the same images differently each time (dropout that is always on?)"
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = [_pass(watched, images[rows], 1) for rows in torch.split(order, max(2, len(images) // 3))]
    if _differ(first, torch.cat(parts)[order.argsort()]):
        return "answers an image differently with others beside it (normalization by the batch at test time?)"
    return None


@torch.no_grad()
def _pass(model: nn.Module, images: Tensor, seed: int) -> Tensor:
    with evaluating(model), seeded(seed):
        return logits_of(model(images)).float().cpu()


def _differ(one: Tensor, other: Tensor) -> bool:
    """Return whether two passes differ by more than rounding does; NaN is a matter of another check."""
    if len(one) < 2 or not _finite(one):
        return False
    rounding = max(1e-5 * one.abs().max().item(), 1e-3 * one.std(0).mean().item())
    return not bool(((one - other).abs() <= rounding).all())


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _most_frequent(labels: Tensor) -> tuple[int, float]:
    values, counts = torch.unique(labels, return_counts=True)
    return int(values[counts.argmax()]), (counts.max() / counts.sum()).item()


def _retained_logits(subject: Subject, data: AuditData) -> Tensor:
    """Return the logits of retained classes on retained images (on all, where there is none)."""
    answers = subject.answers(data.test)
    _, retain = sides(answers.labels, data)
    columns = [label for label in range(answers.logits.shape[1]) if label not in data.gone]
    return (answers.logits[retain] if retain.any() else answers.logits)[:, columns].double()


def _spread(logits: Tensor) -> float:
    """Return how far the logits of an image are apart: their standard deviation, the median over images."""
    return logits.std(1).median().item()


def _statistics_moved(model: nn.Module, reference: nn.Module) -> float | None:
    """Return how far running means are from the reference's, in its standard deviations: the mean over all channels.

    None without such layers, or where they do not match.
    """
    theirs = dict(reference.named_modules())
    shifts = []
    for name, module in model.named_modules():
        if not has_running_statistics(module):
            continue
        own, other = dict(module.named_buffers()), dict(theirs[name].named_buffers()) if name in theirs else {}
        if (
            not other.keys() >= {"running_mean", "running_var"}
            or other["running_mean"].shape != own["running_mean"].shape
        ):
            return None
        shift = (own["running_mean"] - other["running_mean"].to(own["running_mean"].device)).abs().cpu()
        shifts.append(shift.double() / (other["running_var"].cpu().double() + 1e-5).sqrt())
    return torch.cat(shifts).mean().item() if shifts else None


def _to_refresh(data: AuditData, seed: int) -> tuple[Subset[Any], Subset[Any]] | None:
    """Return retained images to measure statistics on, and others to try them on; None where there are too few."""
    held_out: Any = data.part("test", forget=False, most=2 * SAMPLES, seed=seed)
    rows = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed)).tolist()
    if data.has("retain train"):
        shown: Any = data.part("train", forget=False, most=REFRESH_IMAGES, seed=seed)
    else:  # measured on one half, tried on the other
        shown, rows = Subset(held_out, rows[: len(rows) // 2][:REFRESH_IMAGES]), rows[len(rows) // 2 :]
    return (shown, Subset(held_out, sorted(rows[:SAMPLES]))) if len(shown) > 1 and rows else None


def _hits(subject: Subject, anew: nn.Module, samples: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """Return which samples (N,) a model answers rightly with new statistics, and which with its own."""
    answers = predict(anew, samples, preprocessing=subject.preprocessing, phase="self-check")
    first, second = (one.logits.argmax(1) == one.labels for one in (answers, subject.answers(samples)))
    return first, second


def _won(hits: tuple[Tensor, Tensor]) -> Interval:
    """Return how much more accurate a model is with new statistics, in pairs."""
    return gap_interval(of_values(hits[0]), of_values(hits[1]))
