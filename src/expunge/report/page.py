"""What the templates show: the first screen, the sections in their order, and the metadata of a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.report import looks, sections
from expunge.report.bench_page import cell_facts
from expunge.report.figures import board, listed, seconds, sentence, told
from expunge.report.reading import EDITED, LAYERS, was_edited
from expunge.report.rerun import rerun

Part = Mapping[str, Any]

SECTIONS = {
    "classes": ("Accuracy, class by class", sections.classes),
    "confusion": ("What is called what", looks.confusion),
    "answers": ("What images of the forgotten classes are called", sections.answers),
    "output": ("More figures at the output", sections.output),
    "inside": ("Inside, block by block", sections.inside),
    "map": ("Map of features", looks.feature_map),
    "attention": ("Where the model looks", looks.attention),
    "relearn": ("Coming back: relearning", sections.relearn),
    "attacks": ("Attacks", sections.attacks),
    "signals": ("Signals while it was forgotten", sections.signals),
    "learned": ("Images that were learned to forget with", looks.learned),
    "weights": ("How far the weights moved", sections.weights),
    "cell": ("In the benchmark", cell_facts),
    "untested": ("What was not tested", sections.untested),
    "doubts": ("Self-checks", sections.doubts),
    "settings": ("Configuration and environment", sections.settings),
    "again": ("How to run it again", rerun),
}
ANSWERS = {True: "yes", False: "no", None: "unknown"}


@dataclass(frozen=True)
class Layer:
    """One layer of the verdict."""

    title: str
    answer: str  # yes, no or unknown
    evidence: Sequence[str]


def page_of(record: Part, pictures: Part | None = None) -> dict[str, Any]:
    """Return all that the templates show, as words, tables and places; empty: left out.

    Args:
        pictures: of samples, to be shown; None: none.
    """
    edited = was_edited(record)
    record = {**record, "pictures": pictures or {}}
    verdict = record.get("verdict") or {}
    forget = record["classes"]["forget"]
    found = {key: (title, make(record)) for key, (title, make) in SECTIONS.items()}
    caption = "Before, after, and retrained from scratch"
    return {
        "edited": EDITED if edited else None,
        "audited": bool(verdict),
        "compared": sections.compared(record),
        "title": _title(forget, audited=bool(verdict)),
        "model": (record.get("model") or {}).get("spec"),
        "cell": (record.get("item") or {}).get("id"),
        "first_line": verdict.get("first_line") or _first_line(record),
        "layers": _audited(verdict) if verdict else _checked(record),
        "asked": _asked(record),
        "done": _judged(record) if verdict else _forgot(record),
        "cost": _cost(record.get("cost") or {}, record.get("environment") or {}),
        "summary": board(
            caption if record["metrics"].get("retrained") else "Before and after",
            sections.summary_rows(record, listed(forget, 2)),
            None,
            first="on held-out images",
            gap_title=sections.gaps_of(record)[1],
        ),
        "diagnosis": [sentence(one) for one in verdict.get("diagnosis") or ()],
        "notes": [sentence(note) for note in record.get("notes") or ()],
        "scope": verdict.get("scope"),
        "titles": {key: title for key, (title, content) in found.items() if content},
        "sections": {key: content for key, (_, content) in found.items() if content},
        "version": (record.get("environment") or {}).get("expunge"),
        "schema_version": record["schema_version"],
    }


def _title(forget: Sequence[str], *, audited: bool) -> str:
    several = len(forget) != 1
    shown = next((text for most in (4, 2) if len(text := listed(forget, most)) <= 60), listed(forget, 1))
    names = f"class{'es' if several else ''} {shown}"
    if audited:
        return f"{'Were' if several else 'Was'} {names} forgotten?"
    return f"Forgetting {names}"


def _asked(record: Part) -> str:
    names, model, data = (record.get(part) or {} for part in ("classes", "model", "data"))
    what = f"{listed(names['forget'], 12)} ({len(names['forget'])} of {len(names['all'])} classes)"
    size = f" ({model['parameters']:,} parameters)" if model.get("parameters") else ""
    lines = [
        f"{'Judge whether a model forgot' if record.get('verdict') else 'Forget'} {what}.",
        f"Model {model['spec']}{size}." if model.get("spec") else "",
        f"Data {data['source']}." if data.get("source") else "",
    ]
    if names.get("forgotten_before"):
        by = "Gone besides" if record.get("verdict") else "Forgotten by earlier requests"
        lines.append(f"{by}: {listed(names['forgotten_before'], 12)}.")
    return " ".join(filter(None, lines))


def _forgot(record: Part) -> str:
    data, read = record.get("data") or {}, (record.get("samples_read") or {}).get("method") or {}
    preset = (record.get("config") or {}).get("preset")
    lines = [f"Method {record['method']}{f', preset {preset}' if preset else ''}{_seed(record)}."]
    if data.get("retain_samples") is not None:
        seen = sum(read.get(name) or 0 for name in record["classes"]["forget"])
        kept = sum(count or 0 for count in read.values()) - seen
        lines.append(f"It was handed {data['retain_samples']:,} images of classes that stay.")
        lines.append(f"Repeats counted, it read {kept:,} of those and {seen:,} of the classes to forget.")
    return " ".join([*lines, _measured(data)]).strip()


def _judged(record: Part) -> str:
    model = record.get("model") or {}
    audits = (record.get("audits") or {}).items()
    ran = sum(not found.get("skipped") for name, found in audits if name != looks.FEATURE_MAP)
    beside = "the original and a retrained model" if record["metrics"].get("retrained") else "the original"
    made = record["method"].removeprefix("audit of ")
    lines = [
        f"{ran} attacks were run on {model.get('unlearned') or 'the unlearned model'}, beside {beside}{_seed(record)}.",
        f"It was made by {made}." if made not in ("", "unknown") else "",
        _measured(record.get("data") or {}),
    ]
    return " ".join(filter(None, lines))


def _seed(record: Part) -> str:
    return "" if record.get("seed") is None else f", seed {record['seed']}"


def _measured(data: Part) -> str:
    tested, forgotten = data.get("test_samples"), data.get("test_forget_samples")
    if tested is None:
        return ""
    part = "" if forgotten is None else f", {forgotten:,} of them of forgotten classes"
    return f"Measured on {tested:,} held-out images{part}."


def _first_line(record: Part) -> str:
    """Return the answer where no attack was run, in the words of the checks."""
    checks = record.get("checks") or {}
    return (
        f"Gone at the output: {ANSWERS[checks.get('forgotten')]}; the rest is intact: {ANSWERS[checks.get('kept')]}. "
        "What is left inside, how fast it comes back and what an attacker can tell was not measured."
    )


def _audited(verdict: Part) -> list[Layer]:
    return [
        Layer(title, one.get("answer") or "unknown", [sentence(text) for text in one.get("evidence") or ()])
        for name, title in LAYERS.items()
        if (one := verdict.get(name))
    ]


def _checked(record: Part) -> list[Layer]:
    """Return the same layers where no attack was run: the stated checks answer the first and the last."""
    checks, why = record.get("checks") or {}, (record.get("calibration") or {}).get("why")
    outer = {
        "gone_at_the_output": Layer(LAYERS["gone_at_the_output"], ANSWERS[checks.get("forgotten")], [_gone(record)]),
        "rest_intact": Layer(LAYERS["rest_intact"], ANSWERS[checks.get("kept")], [_kept(record)]),
    }
    unknown = ["Not measured here: expunge audit does."]
    layers = [outer.get(name) or Layer(title, "unknown", unknown) for name, title in LAYERS.items()]
    if record.get("calibration") or checks.get("signals") is not None:
        title = "Gone by signals that need no image of it"
        layers.insert(1, Layer(title, ANSWERS[checks.get("signals")], [sentence(why)] if why else []))
    return layers


def _gone(record: Part) -> str:
    share, goal = record["metrics"]["after"].get("forget_accuracy"), _goal(record, "goal_forget_accuracy")
    if share is None:
        return "There are no held-out images of a forgotten class."
    aim = "" if goal is None else f"; the goal is at most {told(goal)}"
    if (record.get("checks") or {}).get("forgotten") is None:
        aim += "; the original hardly knew them, so that says nothing"
    return f"{told(share)} of images of the forgotten classes are answered rightly{aim}."


def _kept(record: Part) -> str:
    own = record["schema_version"] == 1  # it was held against the original as it answers
    before = record["metrics"]["before"].get("retain_accuracy" if own else "masked_retain_accuracy")
    after = record["metrics"]["after"].get("retain_accuracy")
    if before is None or after is None:
        return "There are no held-out images of a retained class."
    goal = _goal(record, "goal_retain_drop")
    aim = "" if goal is None else f"; the goal is no more than {told(goal, 'points')} points less"
    by = "by the original" if own else "by the original where it may not answer forgotten classes"
    return f"{told(after)} of images of classes that stay are answered rightly, {told(before)} {by}{aim}."


def _goal(record: Part, name: str) -> float | None:
    goal: float | None = (record.get("checks") or {}).get(name)
    return goal


def _cost(cost: Part, environment: Part) -> dict[str, Any]:
    phases = [
        [name, seconds(one.get("seconds")), told(one.get("steps"), "count"), told(one.get("samples"), "count")]
        for name, one in (cost.get("phases") or {}).items()
    ]
    lines = []
    if phases:
        steps, images = (told(cost.get(key), "count") for key in ("steps", "samples"))
        lines.append(f"Forgetting took {seconds(cost.get('seconds'))}, {steps} optimizer steps on {images} images.")
        mixed = [name for name, one in cost["phases"].items() if one.get("precision") == "bf16"]
        if mixed:
            lines.append(f"Sums in bf16, weights in fp32: {', '.join(mixed)}.")
    if cost.get("evaluation_seconds"):
        lines.append(f"Measuring took {seconds(cost['evaluation_seconds'])}.")
    if environment.get("device"):
        lines.append(f"On {environment['device']}.")
    return {"line": " ".join(lines), "phases": phases}


def card_of(record: Part) -> dict[str, Any]:
    """Return what a hub's model card says of the unlearned model in its YAML block."""
    spec, source = (record.get(part) or {} for part in ("model", "data"))
    name, data = spec.get("spec") or "", source.get("source") or ""
    accuracies = {
        "Accuracy on classes that stay": "retain_accuracy",
        "Accuracy on forgotten classes": "forget_accuracy",
    }
    values = {title: record["metrics"]["after"].get(key) for title, key in accuracies.items()}
    made = [] if record.get("verdict") else [record["method"]]
    return {
        "name": name or "unlearned model",
        "library": {"timm": "timm", "hf": "transformers"}.get(name.partition(":")[0]),
        "base_model": name.removeprefix("hf:").partition("?")[0] if name.startswith("hf:") else None,
        "dataset": data.removeprefix("hf:") if data.startswith("hf:") else None,
        "dataset_name": data.removeprefix("hf:") or "unknown",
        "tags": ["image-classification", "machine-unlearning", "expunge", *made],
        "results": [(f"{title}, held-out", value) for title, value in values.items() if value is not None],
    }
