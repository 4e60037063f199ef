"""What a command answers when it is done: short lines, whole words, the verdict before what it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from expunge.ledger import NAME as LEDGER
from expunge.schema import TRIAL_WORDS, has_retrained
from expunge.terminal.words import duration, percent, plain, say

if TYPE_CHECKING:
    from expunge.commands import Outcome
    from expunge.schema import Record
    from expunge.verify import Finding


def show_forget(outcome: Outcome, out: Path) -> None:
    """Print what an erasure came to: accuracies side by side, then the goals, then what it took."""
    console = Console(highlight=False)
    metrics, forgotten = outcome.record.metrics, outcome.record.classes["forget"]
    roles = [role for role in ("before", "after", "retrained") if role in metrics]
    table = Table("accuracy on held-out images", *roles, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    shown = ", ".join(forgotten[:4]) + (f" and {len(forgotten) - 4} more" if len(forgotten) > 4 else "")
    rows = (
        (f"forgotten: {plain(shown)}", "forget_accuracy"),
        ("retained classes", "retain_accuracy"),
        ("retained, forgotten answers not allowed", "masked_retain_accuracy"),
        ("retained images called a forgotten class", "false_forget_rate"),
    )
    for title, key in rows:
        table.add_row(title, *(percent(metrics[role][key]) for role in roles))
    console.print()
    console.print(table)
    console.print()
    for sentence in _sentences(outcome):
        say(console, sentence)
    show_files(console, outcome.files, out)


FILES = {
    "report.html": "the page; expunge report shows it",
    "record.json": "what was done and measured; expunge verify checks it",
    "unlearned.safetensors": "the new weights",
    "retain_sample.json": "salted hashes of the images it was handed; keep them private",
    "images.json": "pictures of samples: may show people",
    "model.sig": "the signature",
    "bench.json": "the whole of it as JSON",
    "results.csv": "one row a cell; results.parquet the same",
    "results.parquet": "",
    "tables.md": "tables for people; tables.tex the same",
    "tables.tex": "",
    "scaling.md": "how the costs grow",
}
"""What a command writes, in the order it is told, and what for; without a word, beside another."""


def show_files(console: Console, files: Sequence[Path], out: Path) -> None:
    """Print what was written: those in `out` one a line, each with what it is for; plots and the ledger at the end."""
    inside = {path.name for path in files if path.parent.resolve() == out.resolve()}
    say(console, Text(f"\nWrote to {out}:"))
    for name, use in FILES.items():
        if name in inside and use:
            say(console, Text(f"{name:<22} {use}"), indent=2)
    plots = [path for path in files if path.parent.name == "plots"]
    if plots:
        say(console, Text(f"{'plots/':<22} {len(plots)} drawings (SVG)"), indent=2)
    for path in files:
        if path.suffix == ".sqlite":
            here = path.resolve() == Path(LEDGER).resolve()
            say(console, Text(f"Entered in {path} (expunge log{'' if here else f' --ledger {path}'})"))


EVIDENCE = 3  # findings told of each layer: they come sorted, the one that decides first


def show_audit(outcome: Outcome, out: Path) -> None:
    """Print the verdict first, then every figure beside the retrained model's, then what limits them."""
    from expunge.report.reading import LAYERS

    record = outcome.record
    verdict = record.verdict
    assert verdict is not None
    console = Console(highlight=False)
    console.print()
    say(console, Text(verdict["first_line"], style="bold"))
    colors = {"yes": "green", "no": "red", "unknown": "yellow"}
    for name, title in LAYERS.items():
        layer = verdict[name]
        console.print(f"\n[bold]{title}: [{colors[layer['answer']]}]{layer['answer']}[/][/]")
        _list_out(console, layer["evidence"][:EVIDENCE])
        if (more := len(layer["evidence"]) - EVIDENCE) > 0:
            _list_out(console, [f"and {more} more that weigh no heavier: see the page"])
    failed = [check["sentence"] for check in record.self_checks if check["ok"] is False]
    skipped = [f"{name}: {found['skipped']}" for name, found in record.audits.items() if found["skipped"]]
    for title, sentences in (
        ("What is wrong, by name", verdict["diagnosis"]),
        ("Self-checks that failed", failed),
        ("Attacks skipped", skipped),
        ("Not tested", verdict["not_tested"]),
    ):
        if sentences:
            console.print(f"\n[bold]{title}[/]")
            _list_out(console, sentences)
    console.print()
    console.print(_figures(record))
    if has_retrained(record.metrics, record.self_checks):
        say(
            console,
            "The gap is to the retrained model, with its 95 % interval; * where that excludes zero, each figure taken "
            "alone. The verdict corrects for the number of figures that decide a layer.",
        )
    say(console, "Figures of each block are on the page and in the record.\n")
    say(console, Text(verdict["scope"]))
    for note in outcome.notes:
        say(console, Text(f"Note: {note}."))
    seconds = sum(found["seconds"] for found in record.audits.values())
    say(console, f"The attacks took {duration(seconds)}.")
    show_files(console, outcome.files, out)


def _list_out(console: Console, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        say(console, Text(sentence), indent=2)


def _figures(record: Record) -> Table:
    """Return the table of figures on each model, with the gap to the retrained one; of each block's, the last alone."""
    roles = ["original", "unlearned", *(["retrained"] if record.model["retrained"] else [])]
    compared = has_retrained(record.metrics, record.self_checks)
    heads = [*roles, *(["gap"] if compared else [])]
    table = Table("figure", *heads, box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    sides = {"original": "before", "unlearned": "after", "retrained": "retrained"}
    for title, key in (("forget accuracy", "forget_accuracy"), ("retain accuracy", "retain_accuracy")):
        values = [record.metrics[sides[role]][key] for role in roles]
        gap = [_gap(record.metrics["gaps"].get(key))] if compared else []
        table.add_row(title, *_values(values), *gap)
    for name, found in record.audits.items():
        for figure, measured in found["figures"].items():
            if figure.startswith("after "):
                continue
            figure = "" if figure == "head input" else f", {figure}"
            values = [measured[role]["value"] if role in measured else None for role in roles]
            gap = [_gap(measured.get("gap"))] if compared else []
            table.add_row(plain(f"{name.replace('_', ' ')}{figure}"), *_values(values), *gap)
    return table


def _gap(gap: Mapping[str, Any] | None) -> str:
    """Return a gap with its interval, and a star where that excludes zero."""
    if gap is None:
        return "- "
    value, *bounds = _values([gap["value"], gap["low"], gap["high"]])
    between = f" [{', '.join(bounds)}]" if gap["low"] is not None else ""
    return plain(f"{value}{between}{'*' if gap['found'] else ' '}")


def _values(values: Sequence[float | None]) -> list[str]:
    """Return figures of one kind alike: shares with two places, and counts, of which one at least is above 2, whole."""
    places = 0 if any(value is not None and abs(value) > 2 for value in values) else 2
    return ["-" if value is None else f"{value:z.{places}f}" for value in values]


def _sentences(outcome: Outcome) -> Iterator[str]:
    from expunge.audits.check import listed
    from expunge.verdict import collapsed

    record = outcome.record
    after, before, checks = record.metrics["after"], record.metrics["before"], record.checks
    if checks["forgotten"] is None and after["forget_accuracy"] is not None:
        share, known = percent(after["forget_accuracy"]), percent(before["forget_accuracy"])
        yield f"Forgotten at the output: unknown ({share}), the original hardly knew it ({known})."
    elif checks["forgotten"] is None:
        yield "Forgotten at the output: unknown, the data has no held-out image of a forgotten class."
    else:
        goal = percent(checks["goal_forget_accuracy"])
        answer = YES if checks["forgotten"] else NO
        yield f"Forgotten at the output: {answer} ({percent(after['forget_accuracy'])}; goal: at most {goal})."
    if checks["kept"] is None and after["retain_accuracy"] is not None:
        share, known = percent(after["retain_accuracy"]), percent(before["retain_accuracy"])
        yield f"The rest is kept: unknown ({share}), the original answered it no better than a guess ({known})."
    elif checks["kept"] is None:
        yield "The rest is kept: unknown, the data has no held-out image of a retained class."
    else:
        known = before["masked_retain_accuracy"]
        change = 100 * (after["retain_accuracy"] - known)
        answer = YES if checks["kept"] else NO
        goal = f"{-100 * checks['goal_retain_drop']:.0f}"
        yield (
            f"The rest is kept: {answer} ({change:+.1f} points to the original's {percent(known)} where it may not "
            f"answer forgotten classes; goal: no worse than {goal})."
        )
        if lost := collapsed(record.metrics):
            yield f"Less than half is left of the retained class{'es' * (len(lost) > 1)} {listed(lost)}."
    yield from _calibrated(record.calibration)
    yield (
        "Not measured: what the features inside still know, how fast it is relearned, what an attacker can tell. "
        "That takes expunge audit."
    )
    read, names = record.samples_read, record.classes["forget"]
    forgotten = sum(read["method"][name] for name in names)
    retained = sum(read["method"].values()) - forgotten
    yield (
        f"The method was handed {sum(read['retain_sample'].values()):,} retained images. Repeats counted, it read "
        f"{retained:,} of retained classes and {forgotten:,} of the forgotten ones; "
        f"measuring read {sum(read['evaluation'][name] for name in names):,} held-out images of those."
    )
    cost = record.cost
    phases = ", ".join(f"{name} {phase['seconds']:.1f} s" for name, phase in cost["phases"].items())
    parts = f" ({phases})" if phases else ""
    yield f"The method took {cost['seconds']:.1f} s{parts}, {cost['steps']} optimizer steps{_mixed(cost)}."
    preprocessing = record.data["preprocessing"]
    height, width = preprocessing["size"]
    yield f"Images: {height}x{width} pixels; mean and deviation {_source(preprocessing['source'])}."
    yield from (f"Note: {plain(note)}{'' if note.endswith('?') else '.'}" for note in outcome.notes)


YES, NO = "[bold green]yes[/]", "[bold red]NO[/]"


def _calibrated(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Tell what a calibration did, in plain sentences."""
    if found is None:
        return
    trials = ", ".join(
        f"{trial['rate']:.3g} ({came}{f' after {steps} steps' if (steps := trial['steps']) else ''})"
        for trial in found["trials"]
        for came in [TRIAL_WORDS.get(trial["outcome"], trial["outcome"])]
    )
    rounds = "one round" if found["rounds"] == 1 else f"{found['rounds']} rounds"
    if found["reached"] is None:
        yield f"Signals read without forget data: they can say nothing; {plain(found['why'])}."
    else:
        reached = "reached" if found["reached"] else "[bold red]NOT REACHED[/]"
        yield f"Signals read without forget data: the goal is {reached}; {plain(found['why'])}."
    read = [f"{found['held_out']} held-out retained images"] if found["held_out"] else []
    if found["trained_on"]:
        read.append(f"{found['trained_on']} retained images that are trained on too")
    yield (
        f"Calibration took {rounds} of impair and repair: impair rates tried {trials}; repair rate "
        f"{found['repair_rate']:.3g}, batches of {found['batch_size']}; signals read on "
        f"{', '.join(read)}, and on class impressions."
    )


def _mixed(cost: Mapping[str, Any]) -> str:
    return ", bf16" if any(phase.get("precision") == "bf16" for phase in cost["phases"].values()) else ""


def _source(source: str) -> str:
    words = {"given": "as given", "metadata": "from the weights", "measured": "measured on the data"}
    return words.get(source, plain(f"from {source}'s configuration"))


def show_findings(folder: Path, findings: Sequence[Finding]) -> None:
    """Print one line for each check, and what they come to."""
    console = Console(highlight=False)
    words = {True: ("ok", "green"), False: ("NO", "red"), None: ("-", "yellow")}
    for found in findings:
        word, color = words[found.ok]
        sentence = Text(f"{found.check}: {found.sentence}")
        if console.is_terminal:
            line = Table.grid(padding=(0, 1, 0, 0))
            line.add_column(width=2)
            line.add_row(Text(word, style=color), sentence)
            console.print(line)
        else:
            say(console, Text(f"{word:<3}") + sentence)
    wrong = sum(found.ok is False for found in findings)
    unchecked = sum(found.ok is None for found in findings)
    told = "1 check fails" if wrong == 1 else f"{wrong} checks fail" if wrong else "everything that was checked matches"
    say(console, Text(f"{folder}: {told}{f'; {unchecked} could not be checked (-)' if unchecked else ''}."))


def show_log(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print each entry as a few short lines."""
    console = Console(highlight=False)
    if not entries:
        say(console, "Nothing was entered yet.")
    for entry in entries:
        told = {name: entry.get(name) or "?" for name in LOGGED}  # an edited entry may hold anything
        verdict, classes = entry.get("verdict"), entry.get("classes")
        answers = verdict.items() if isinstance(verdict, dict) else ()
        names = ", ".join(map(str, classes)) if isinstance(classes, list) else "?"
        head = f"{entry.get('number', '?')}  {told['time']}  {told['command']}: {names}"
        say(console, Text(head, style="bold"))
        for line in (
            f"{told['method']}, seed {entry.get('seed')}, {told['model']}",
            f"weights {str(told['original'])[:16]} -> {str(told['unlearned'])[:16]}",
            ", ".join(f"{str(name).replace('_', ' ')}: {_answer(answer)}" for name, answer in answers),
            f"record {str(told['content_hash'])[:16]} in {told['record']}",
            f"again: {entry['again']}" if entry.get("again") else "",
        ):
            if line:
                say(console, Text(line), indent=3)


LOGGED = ("time", "command", "method", "model", "original", "unlearned", "content_hash", "record")


def _answer(answer: Any) -> str:
    return (
        "unknown" if answer is None else {True: "yes", False: "no"}[answer] if answer in (True, False) else str(answer)
    )
