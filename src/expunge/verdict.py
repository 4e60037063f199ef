"""From figures to answers: gone at the output, gone inside, resists relearning, indistinguishable, the rest intact.

A pure function of what a record holds. There is no single score: each layer is answered yes, no or unknown, from gaps
to the retrained model, with the figures that decided. A gap is held against a model when its interval excludes zero
*and* it is larger than a stated tolerance; a yes takes an interval narrow enough to exclude what would matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

from expunge.audits.check import (
    COMPARED,
    INSIDE,
    LAYERS,
    MEMBERS,
    OUTPUT,
    RELEARN,
    REST,
    UNLEARNED,
    Check,
    listed,
    percent,
)
from expunge.audits.weight_checks import BODY_UNTOUCHED, FROZEN_BODY, THE_ORIGINAL, WEIGHTS_UNTOUCHED

Answer = Literal["yes", "no", "unknown"]

QUESTIONS = {
    OUTPUT: "gone at the output",
    INSIDE: "gone inside",
    RELEARN: "resists relearning like a retrained model",
    MEMBERS: "indistinguishable under the attacks run",
    REST: "the rest is intact",
}
SCOPE = (
    "This is about the behaviour of these models on these images under the attacks that were run, no more: it is no "
    "proof, legal or mathematical, that nothing of the classes is left."
)
ALWAYS_OPEN = (
    "attacks that are not listed here, and stronger ones than these of their kind",
    "images of other kinds than the test images, and adversarial ones",
    "how the model was made: copies, logs and checkpoints that still hold the classes",
)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a figure may be from the retrained model's, and how sure that must be."""

    gap: float  # the largest that does not matter
    reach: float  # the largest that the interval may leave possible for a yes
    wrong: Literal["higher", "lower", "either"] = "higher"  # side on which a gap counts


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What does not matter. All but steps are shares, in [0, 1].

    Chosen by judgement, not measured. Where two retrained models are given, the gap between them takes the place of a
    smaller tolerance of an audit's figure.
    """

    # one in a hundred is what a model gets by mistaking other classes; a yes takes 36 images without a hit
    output: Tolerance = Tolerance(gap=0.01, reach=0.1)
    # retrained models differ by some points; a gap as small is no trace that an attacker can use
    inside: Tolerance = Tolerance(gap=0.05, reach=0.15)
    # what returns from 1 to 20 images depends on which they are; slower than a retrained model is a trace as well
    few_shot: Tolerance = Tolerance(gap=0.1, reach=0.2, wrong="either")
    # of three seeds an interval is 4.3 standard errors wide each way: it can find a gap, but hardly exclude one
    relearn_area: Tolerance = Tolerance(gap=0.1, reach=0.5, wrong="either")
    relearn_ratio: float = 1.5  # AIN, to either side: steps to an accuracy are known no better than that
    relearn_steps: float = 1.0  # steps apart, below which a ratio of small numbers says nothing
    # an attack that is right 5 points more often than on a retrained model tells next to nothing of one image
    membership: Tolerance = Tolerance(gap=0.05, reach=0.12, wrong="either")
    # which class is answered, and how surely, is expected to vary more between trainings than membership does
    leakage: Tolerance = Tolerance(gap=0.1, reach=0.2, wrong="either")
    # some of it is chance of training; without a retrained model the bound is that of `expunge forget`
    rest: Tolerance = Tolerance(gap=0.02, reach=0.05, wrong="lower")
    rest_to_original: Tolerance = Tolerance(gap=0.03, reach=0.06, wrong="lower")
    # a model that calls so many more retained images a forgotten class than the original did, which mistakes some too,
    # does not recognise it in its own ones
    indiscriminate: float = 0.2
    collapsed: float = 0.5  # share of its accuracy below which a retained class counts as lost


DECIDING = {
    "linear_probe": (INSIDE, "inside"),
    "nearest_class_mean": (INSIDE, "inside"),
    "prototype": (INSIDE, "inside"),
    "head_only": (INSIDE, "inside"),
    "few_shot": (RELEARN, "few_shot"),
    "population_mia": (MEMBERS, "membership"),
    "rmia": (MEMBERS, "membership"),
    "neighbour_leakage": (MEMBERS, "leakage"),
}
"""Audits whose gaps to the retrained model decide: their layer and tolerance. `relearn` is judged by steps as well."""
STRONG = {INSIDE: ("linear_probe",), MEMBERS: ("population_mia", "rmia")}
"""Audits of which one must have been measured for a yes: that a weaker one finds nothing shows little."""
TOLD = {"inversion": INSIDE, "where_it_looks": INSIDE}
"""Audits that are told and decide nothing: the judge of the first shares weights with the judged, and where a model
looks is no knowledge of a class."""
SLOWER = "slower, which is a trace as well"
COSTLY = ("u_lira", "forgetting_quality")


@dataclass(frozen=True)
class Finding:
    """What one figure says to a layer; None: it is told and decides nothing."""

    answer: Answer | None
    sentence: str


def verdict(
    metrics: Mapping[str, Any],
    audits: Mapping[str, Mapping[str, Any]],
    checks: Sequence[Check] = (),
    tolerances: Tolerances | None = None,
) -> dict[str, Any]:
    """Return the answer of each layer with its evidence, what is wrong by name, and what was not tested.

    Keys: the layers, each with `answer` and `evidence` (sentences); `diagnosis` (sentences that begin with the name of
    what is wrong), `not_tested`, `first_line` and `scope`.

    Args:
        metrics: as in a record, with `intervals`, `gaps` (to the retrained model) and `gaps_to_original`.
        audits: what `run_audits` returned.
        checks: what `run_self_checks` returned.
        tolerances: what does not matter; None: the defaults.
    """
    tolerances = tolerances or Tolerances()
    missing = _why_no_reference(metrics, checks)
    judge = _Judge(metrics, audits, checks, tolerances, compared=missing is None)
    found = {
        OUTPUT: [*judge.output()],
        INSIDE: [*judge.inside()],
        RELEARN: [*judge.relearning()],
        MEMBERS: [*judge.gaps(MEMBERS)],
        REST: [*judge.rest()],
    }
    told = {layer: _answer(layer, findings, checks, missing, judge.lacks(layer)) for layer, findings in found.items()}
    return {
        **told,
        "diagnosis": [*judge.diagnosis(told)],
        "not_tested": _not_tested(audits),
        "first_line": _first_line(told, missing),
        "scope": SCOPE,
    }


def remaining(metrics: Mapping[str, Any], reach: float) -> list[tuple[str, float, float]]:
    """Return the forgotten classes, of several, of which more than `reach` is still answered: name, accuracy, its lower
    bound. An accuracy over all of them does not show one that is small, or one of many.

    Args:
        metrics: as in a record: before and after, with `per_class_accuracy` and its intervals.
    """
    before, after = metrics["before"], metrics["after"]
    masked = before.get("masked_per_class_accuracy") or {}
    # where its answer is not allowed nothing of a forgotten class is right
    gone = [name for name, share in before["per_class_accuracy"].items() if share and masked.get(name) == 0]
    shares = {name: after["per_class_accuracy"].get(name) or 0.0 for name in gone}
    if len(gone) < 2:
        return []
    return [(name, share, after["per_class_intervals"][name][0]) for name, share in shares.items() if share > reach]


def _losses(metrics: Mapping[str, Any], to: str) -> Iterator[tuple[str, float, float, float]]:
    """Yield each retained class that both models were seen on: name, accuracy before, after, what it surely lost."""
    base, after = metrics[to], metrics["after"]
    for name, share in metrics["before"]["masked_per_class_accuracy"].items():
        # a class that was answered as a forgotten one is known all the same
        was, now = base["masked_per_class_accuracy"].get(name), after["per_class_accuracy"].get(name)
        bounds = [base["masked_per_class_intervals"].get(name), after["per_class_intervals"].get(name)]
        if share and was is not None and now is not None and None not in bounds:  # 0: it is to go, or never known
            yield name, was, now, bounds[0][0] - bounds[1][1]


def fallen(metrics: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return the retained classes that lost surely more than ten points: name, accuracy before and after."""
    return [(name, was, now) for name, was, now, lost in _losses(metrics, "before") if lost > FELL]


FELL = 0.1  # a share: what one class of many loses by chance of training is less


def collapsed(metrics: Mapping[str, Any], to: str = "before", least: float = Tolerances.collapsed) -> list[str]:
    """Return the retained classes that kept less than `least` of their accuracy, beyond both intervals.

    Args:
        metrics: as in a record.
        to: the model in them that a class is held against: before or retrained.
    """
    return [name for name, was, now, lost in _losses(metrics, to) if now < least * was and lost > 0]


def failed(told: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an audit speaks against the unlearned model: a layer is answered no, or a self-check of it failed.

    Failed checks of other models, of the data and of attacks make layers unknown: that is no finding against this one.

    Args:
        told: what `verdict` returned.
        checks: as in a record.
    """
    refused = any(check["ok"] is False and set(UNLEARNED) & {*check["roles"]} for check in checks)
    return refused or any(told[layer]["answer"] == "no" for layer in LAYERS)


def _why_no_reference(metrics: Mapping[str, Any], checks: Sequence[Check]) -> str | None:
    """Return why nothing can be compared with a retrained model; None where it can."""
    if not metrics.get("retrained"):
        return "Without a retrained model"
    refused = next((check for check in checks if check.name == "retrained model" and check.ok is False), None)
    return f"The model given as retrained is none ({refused.finding}): without one" if refused else None


def _answer(
    layer: str, findings: Sequence[Finding], checks: Sequence[Check], missing: str | None, lacking: str | None
) -> dict[str, Any]:
    """Return a layer's answer, the worst that was found, or unknown where a self-check forbids it.

    Args:
        lacking: what a yes would have to rest on and was not measured.
    """
    answers = {finding.answer for finding in findings}
    answer: Answer = "no" if "no" in answers else "unknown" if "unknown" in answers or "yes" not in answers else "yes"
    order: list[Answer | None] = ["no", "unknown", "yes", None]
    evidence = [finding.sentence for finding in sorted(findings, key=lambda finding: order.index(finding.answer))]
    if answer == "yes" and lacking is not None:
        answer = "unknown"
        evidence.insert(0, f"a yes would need {lacking}, which was not measured")
    if layer in COMPARED and missing is not None and answer != "no":
        evidence.insert(0, f"{missing} it is not known what such a model gives here")
    for check in checks:
        of_reference = check.name == "retrained model" and check.ok is False  # then nothing was compared with it
        if check.ok is True or of_reference:
            continue
        if layer in check.blocks or (layer in check.doubts and answer == "yes"):
            answer = "unknown"
            evidence.insert(0, check.sentence)
    return {"answer": answer, "evidence": evidence or ["nothing was measured"]}


def _not_tested(audits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    skipped = [f"{name}: {audit['skipped']}" for name, audit in audits.items() if audit.get("skipped")]
    known = (*DECIDING, "relearn", *TOLD, *COSTLY)
    return [*skipped, *(f"{name}: not run" for name in known if name not in audits), *ALWAYS_OPEN]


def _first_line(told: Mapping[str, Mapping[str, Any]], missing: str | None) -> str:
    answers = "; ".join(f"{QUESTIONS[layer]}: {told[layer]['answer']}" for layer in LAYERS)
    if missing is None:
        return f"{answers[0].upper()}{answers[1:]}."
    return f"{missing} only the output and the rest can be judged. {answers[0].upper()}{answers[1:]}."


@dataclass(frozen=True)
class _Judge:
    """All that is judged, and by what."""

    metrics: Mapping[str, Any]
    audits: Mapping[str, Mapping[str, Any]]
    checks: Sequence[Check]
    tolerances: Tolerances
    compared: bool  # there is a retrained model to compare with

    def output(self) -> Iterator[Finding]:
        """Judge forget accuracy, which is to be near the retrained model's, or near none."""
        after = self.metrics["after"]
        if after["forget_accuracy"] is None:
            yield Finding("unknown", "there are no held-out images of the forgotten classes")
            return
        value, (low, high) = after["forget_accuracy"], after["intervals"]["forget_accuracy"]
        reference = self.metrics["retrained"]["forget_accuracy"] if self.compared else 0.0
        tolerance = self.tolerances.output
        limit = max(tolerance.gap, reference + tolerance.gap)
        told = f"forget accuracy is {_with_bounds(value, low, high)}"
        told += f", the retrained model's {percent(reference)}" if self.compared else ""
        told += f", the original's {percent(self.metrics['before']['forget_accuracy'])}"
        if value > limit:
            answer: Answer = "no" if low > limit else "unknown"
            yield Finding(answer, f"{told}: {'above' if low > limit else 'it may be above'} {percent(limit)}")
        elif high > limit - tolerance.gap + tolerance.reach:
            yield Finding("unknown", f"{told}: of so few images as much as {percent(high)} cannot be excluded")
        else:
            yield Finding("yes", f"{told}: at most {percent(limit)}")
        for name, share, low in remaining(self.metrics, self.tolerances.output.reach):
            told = f"of {name} alone {percent(share)} of the images are still answered"
            surely = low > self.tolerances.output.reach
            yield Finding("no" if surely else "unknown", f"{told}, more than {percent(self.tolerances.output.reach)}")
        if swapped := self.swapped():
            yield Finding("no", f"the classes are recognised under another name, that of {listed(swapped)}")

    def inside(self) -> Iterator[Finding]:
        """Judge what probes, means and new heads find before the last layer."""
        yield from self.gaps(INSIDE)
        if self.still_answered(0.5):
            yield Finding("no", "what the model still answers it knows: its own last layer finds the classes")
        untouched = {check.finding for check in self.checks if check.name == "weights of the unlearned model"}
        frozen = self.compared and any(
            check.finding == FROZEN_BODY for check in self.checks if check.name == "retrained model"
        )
        if untouched & {THE_ORIGINAL, BODY_UNTOUCHED, WEIGHTS_UNTOUCHED} and not frozen:
            yield Finding(
                "no",
                "what was learned from images of the classes is still there: the body's weights are the original's",
            )
        for audit, layer in TOLD.items():
            if layer == INSIDE:
                yield from (self.told(audit, name, figure) for name, figure in self.figures(audit))

    def relearning(self) -> Iterator[Finding]:
        """Judge how quickly the classes come back: like in a retrained model, neither faster nor slower."""
        if self.still_answered(0.8):
            left = self.metrics["after"]["forget_accuracy"]
            yield Finding("no", f"nothing is to be relearned: {percent(left)} are answered rightly as it is")
        for name, figure in self.figures("relearn"):
            if name == "area":
                found = self.gap("relearn", name, figure, self.tolerances.relearn_area, comparisons=1)
                slower = found.answer == "no" and figure["gap"]["value"] < 0
                yield replace(found, sentence=f"{found.sentence}: {SLOWER}") if slower else found
            else:
                yield self.speed(name, figure)
        yield from self.gaps(RELEARN)

    def rest(self) -> Iterator[Finding]:
        """Judge accuracy on retained classes: of all of them, and of each."""
        after, before = self.metrics["after"]["retain_accuracy"], self.metrics["before"]
        gap = self.metrics.get("gaps" if self.compared else "gaps_to_original", {}).get("retain_accuracy")
        if after is None or gap is None:
            yield Finding("unknown", "there are no held-out images of retained classes")
            return
        told = f"retained accuracy is {percent(after)}, "
        if self.compared:
            told += f"the retrained model's {percent(self.metrics['retrained']['retain_accuracy'])}"
            yield _judged(told, gap, self.tolerances.rest)
        else:
            # the original may answer forgotten classes, and a model that forgot them is not to profit from that
            masked = before["masked_retain_accuracy"]
            told += f"the original's, when it may not answer forgotten classes, {percent(masked)}"
            yield _judged(told, _shifted(gap, before["retain_accuracy"] - masked), self.tolerances.rest_to_original)
        if lost := self.collapsed():
            yield Finding("no", f"of {listed(lost)} less than half is left")

    def lacks(self, layer: str) -> str | None:
        """Return what has to be measured for a yes of this layer, where it was not; None where it was."""
        strong = STRONG.get(layer, ())
        seen = any("gap" in figure for audit in strong for _, figure in self.figures(audit))
        return None if seen or not strong else " or ".join(strong)

    def gaps(self, layer: str) -> Iterator[Finding]:
        """Judge each figure of the audits that decide a layer by its gap to the retrained model."""
        chosen = [
            (audit, name, figure, getattr(self.tolerances, tolerance))
            for audit, (own, tolerance) in DECIDING.items()
            if own == layer
            for name, figure in self.figures(audit)
        ]
        for audit, name, figure, tolerance in chosen:
            yield self.gap(audit, name, figure, tolerance, comparisons=len(chosen))

    def figures(self, audit: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Return the figures of an audit that have a direction and were measured on the unlearned model."""
        found = self.audits.get(audit, {})
        for name, figure in found.get("figures", {}).items():
            if found.get("targets", {}).get(name) != "none" and "unlearned" in figure:
                yield name, figure

    def gap(
        self, audit: str, name: str, figure: Mapping[str, Any], tolerance: Tolerance, *, comparisons: int
    ) -> Finding:
        if not self.compared or "gap" not in figure:
            return self.told(audit, name, figure)
        floor = abs(figure["noise_floor"]["value"]) if "noise_floor" in figure and self._floor_holds() else 0.0
        if floor > tolerance.gap:  # two retrained models differ more than that
            tolerance = replace(tolerance, gap=floor, reach=tolerance.reach + floor - tolerance.gap)
        same = self._same_as_retrained() and figure["gap"]["value"] == 0
        gap = {"value": 0.0, "low": 0.0, "high": 0.0} if same else figure["gap"]
        return _judged(_figure_told(audit, name, figure, reference=True), gap, tolerance, comparisons=comparisons)

    def told(self, audit: str, name: str, figure: Mapping[str, Any]) -> Finding:
        return Finding(None, _figure_told(audit, name, figure, reference=self.compared))

    def speed(self, name: str, figure: Mapping[str, Any]) -> Finding:
        """Judge steps to an accuracy; of a model that did not come back within the cap they are only a lower bound."""
        details = self.audits["relearn"].get("details", {})
        cut = {
            role: any(details.get(role, {}).get("censored", {}).get(name, ())) for role in ("unlearned", "retrained")
        }
        shown = {
            role: f"{'more than ' if cut.get(role) else ''}{figure[role]['value']:.3g}"
            for role in ("unlearned", *(("retrained",) if self.compared else ()), "original")
            if role in figure
        }
        told = f"relearn ({name}): {', '.join(f'{role} {steps}' for role, steps in shown.items())}"
        if not self.compared or "gap" not in figure:
            return Finding(None, told)
        ratio = figure["unlearned"]["value"] / figure["retrained"]["value"]
        apart = abs(figure["gap"]["value"]) > self.tolerances.relearn_steps
        faster = apart and ratio < 1 / self.tolerances.relearn_ratio and not cut["unlearned"]
        slower = apart and ratio > self.tolerances.relearn_ratio and not cut["retrained"]
        if faster or slower:
            told += f": {'faster' if faster else SLOWER} (AIN {ratio:.2f})"
            return Finding("no" if _excludes_zero(figure["gap"], 1) else "unknown", told)
        if any(cut.values()):
            return Finding(None, f"{told}: AIN is not known, the area decides")
        return Finding("yes", f"{told}: alike (AIN {ratio:.2f})")

    def swapped(self) -> list[str]:
        """Return retained classes that changed places with the forgotten ones: each is answered as the other."""
        shares = self.metrics["after"].get("forget_prediction_distribution") or {}
        lost = self.collapsed()
        taken = sum(shares.get(name, 0.0) for name in lost)
        known = self.metrics["before"]["forget_accuracy"] or 0.0
        called = self.metrics["after"].get("false_forget_rate") or 0.0
        fair = len(lost) / max(1, len(self._retained()))  # the share of retained images that are of these classes
        return lost if lost and known and taken >= 0.8 * known and called >= 0.5 * fair else []

    def still_answered(self, share: float) -> bool:
        """Return whether so large a share of what was known is still answered, and not by calling everything so."""
        before, after = self.metrics["before"]["forget_accuracy"], self.metrics["after"]["forget_accuracy"]
        return bool(before and after is not None and after >= share * before and not self.indiscriminate())

    def indiscriminate(self) -> bool:
        """Return whether retained images are called forgotten classes too, and more of them than by the original."""
        before, after = (self.metrics[role].get("false_forget_rate") or 0.0 for role in ("before", "after"))
        return bool(after > before + self.tolerances.indiscriminate)

    def collapsed(self) -> list[str]:
        """Return the retained classes that collapsed against the reference."""
        return collapsed(self.metrics, "retrained" if self.compared else "before", self.tolerances.collapsed)

    def diagnosis(self, told: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
        """Say by name what is wrong, where it can be told."""
        yield from (
            f"{check.finding}: {check.sentence}" for check in self.checks if check.finding and check.ok is not True
        )
        answers = {layer: told[layer]["answer"] for layer in LAYERS}
        before, after = self.metrics["before"], self.metrics["after"]
        known, left = before["forget_accuracy"] or 0.0, after["forget_accuracy"] or 0.0
        kept = after["retain_accuracy"] or 0.0
        if swapped := self.swapped():
            yield (
                f"logits swapped: images of the forgotten classes are called {listed(swapped)}, and images of "
                f"{listed(swapped)} are called forgotten classes"
            )
        elif lost := self.collapsed():
            yield (
                f"retain collapse: of the retained classes {listed(lost)} less than half is left, and {percent(kept)} "
                "of all retained images are answered rightly"
            )
        if left > self.tolerances.output.gap and self.indiscriminate():
            yield (
                f"indiscriminate answers: {percent(after['false_forget_rate'])} of retained images are called "
                f"forgotten classes, {percent(before.get('false_forget_rate') or 0.0)} by the original: that "
                f"{percent(left)} of images of these are answered rightly shows no knowledge"
            )
        elif answers[OUTPUT] == "no" and left > self.tolerances.output.gap:
            yield (
                f"not forgotten: {percent(left)} of images of the classes are answered rightly, before {percent(known)}"
                + (
                    ""
                    if left >= 0.9 * known
                    else ", as after fine-tuning on retained images, or too little of a method"
                )
            )
        if left <= self.tolerances.output.gap and answers[INSIDE] == "no" and self._probe_as_before():
            yield (
                "head hides the class: it is not answered, but a probe before the last layer finds it as in the "
                "original"
            )
        if any(finding.answer == "no" and SLOWER in finding.sentence for finding in self.relearning()):
            yield "relearns too slowly: a model that never saw the classes is faster, so that they can be told apart"

    def _probe_as_before(self) -> bool:
        """Return whether a probe finds the classes as in the original, and not as well in the retrained model."""
        figure = dict(self.figures("linear_probe")).get("head input", {})
        before, gap = figure.get("gap_to_original"), figure.get("gap")
        if before is None or before["value"] < -self.tolerances.inside.gap:
            return False
        return gap is None or gap["value"] > self.tolerances.inside.gap

    def _retained(self) -> list[str]:
        """Return the classes that stay and that the original knows: masked accuracy is 0 for the others."""
        return [name for name, share in self.metrics["before"]["masked_per_class_accuracy"].items() if share]

    def _same_as_retrained(self) -> bool:
        distances = self.metrics["after"].get("weight_distance", {}).get("to_retrained", {})
        return bool(distances) and distances["total"]["l2"] == 0

    def _floor_holds(self) -> bool:
        """Return whether the second retrained model is one, so that its gap to the first is noise of training."""
        return not any(check.name == "retrained 2 model" and check.ok is False for check in self.checks)


def _judged(told: str, gap: Mapping[str, Any], tolerance: Tolerance, *, comparisons: int = 1) -> Finding:
    """Return what a gap says: no if it is found and beyond the tolerance, yes if nothing beyond `reach` is possible.

    Args:
        comparisons: figures that decide the layer together. Intervals are widened for them (Bonferroni) before one
            of them may say no.
    """
    value = gap["value"]
    low, high = (side * math.inf if bound is None else bound for side, bound in ((-1, gap["low"]), (1, gap["high"])))
    excess, farthest = {
        "higher": (value, high),
        "lower": (-value, -low),
        "either": (abs(value), max(high, -low)),
    }[tolerance.wrong]
    told = f"{told}: {_gap_told(value, low, high)}"
    if excess > tolerance.gap:
        if _excludes_zero(gap, comparisons):
            return Finding("no", f"{told}, more than the {_points(tolerance.gap)} that do not matter")
        if comparisons > 1 and _excludes_zero(gap, 1):
            corrected = f"which is not found after correcting for the {comparisons} figures of this layer"
            return Finding("unknown", f"{told}, {corrected}, and may be chance")
        return Finding("unknown", f"{told}, which may be chance")
    harmless = f"not {tolerance.wrong} by more than" if abs(value) > tolerance.gap else "within"
    told = f"{told}, {harmless} {_points(tolerance.gap)}"
    return (
        Finding("unknown", f"{told}, but not known well enough") if farthest > tolerance.reach else Finding("yes", told)
    )


def _excludes_zero(gap: Mapping[str, Any], comparisons: int) -> bool:
    if gap["low"] is None or gap["high"] is None:
        return False
    wider = _quantile(1 - 0.025 / comparisons, gap.get("seeds")) / _quantile(0.975, gap.get("seeds"))
    value = gap["value"]
    return bool(value - wider * (value - gap["low"]) > 0 or value + wider * (gap["high"] - value) < 0)


def _quantile(probability: float, seeds: int | None) -> float:
    """Return the quantile an interval was made with: Student's where it is of values of so many seeds."""
    if seeds is None:
        return NormalDist().inv_cdf(probability)
    from scipy import stats  # half a second to import

    return float(stats.t.ppf(probability, seeds - 1))


def _shifted(gap: Mapping[str, Any], by: float) -> dict[str, Any]:
    return {key: None if gap[key] is None else gap[key] + by for key in ("value", "low", "high")}


def _figure_told(audit: str, name: str, figure: Mapping[str, Any], *, reference: bool) -> str:
    roles: Iterable[str] = ("unlearned", "retrained", "original") if reference else ("unlearned", "original")
    shown = [
        f"{role} {_with_bounds(figure[role]['value'], figure[role]['low'], figure[role]['high'])}"
        for role in roles
        if role in figure
    ]
    return f"{audit.replace('_', ' ')} ({name}): {', '.join(shown)}"


def _with_bounds(value: float, low: float | None, high: float | None) -> str:
    known = low is not None and high is not None
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]" if known else percent(value)  # type: ignore[operator]


def _gap_told(value: float, low: float, high: float) -> str:
    return f"a gap of {100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
