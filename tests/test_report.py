"""The page of a record: its structure, its words, what it refuses; test_report_browser.py looks at it in a browser."""

from __future__ import annotations

import copy
import json
import re
import shlex
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from conftest import Tiny
from expunge.audits import AUDITS
from expunge.audits.check import LAYERS
from expunge.config import as_json
from expunge.errors import InputError
from expunge.evaluation import evaluate
from expunge.files import json_writer
from expunge.provenance import seal
from expunge.report import canonical_json, check_record, html_report, markdown_summary, read_record, was_edited
from expunge.report.page import SECTIONS, page_of
from expunge.report.reading import LAYERS as REPORT_LAYERS
from expunge.report.rerun import rerun
from expunge.report.sections import inside, summary_rows
from expunge.weights import load_weights
from test_cli import Trained, assert_refused, invoke, trained

__all__ = ["trained"]  # the fixture, for this file too

RECORDS = Path(__file__).parent / "records"
STORED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))}
JOINED = "\N{NO-BREAK SPACE}"


def least() -> dict[str, Any]:
    """Return a record that holds no more than it must."""
    classes = {"forget": ["cat"], "all": ["cat", "dog"]}
    return {"schema_version": 1, "method": "unknown", "classes": classes, "metrics": {"before": {}, "after": {}}}


class Page(HTMLParser):
    """What a test asks of a page: its words, its tags with their attributes, and its headings in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "line", "use", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def plain(text: str) -> str:
    return " ".join(text.replace(JOINED, " ").split())


# What it shows


@pytest.mark.parametrize("name", STORED)
def test_numbers_are_those_of_the_record(name: str) -> None:
    record = STORED[name]
    words = plain(Page(html_report(record)).words)
    for side in ("before", "after", "retrained"):
        one = record["metrics"][side]
        values = [one["forget_accuracy"], one["retain_accuracy"], one["false_forget_rate"]]
        values += [*one["per_class_accuracy"].values(), *one["forget_prediction_distribution"].values()]
        assert all(f"{100 * value:.1f} %" in words for value in values)
        low, high = one["intervals"]["retain_accuracy"]
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in words
    for tensor, distance in record["metrics"]["after"]["weight_distance"]["to_original"].items():
        assert f"{tensor}{100 * distance['relative']:.1f} %" in words or f"{tensor} " in words
        assert f"{100 * distance['relative']:.1f} %" in words
    for figures in (audit["figures"] for audit in record["audits"].values()):
        for figure in figures.values():
            assert all(number(figure[role]["value"]) & set(words.split()) for role in ("original", "unlearned"))
    for text in [*((record["verdict"] or {}).get("diagnosis") or ()), *record["notes"]]:
        assert text[1:] in words


def number(value: float) -> set[str]:
    """Return the ways a value may be told: a share, a plain number, a count."""
    return {f"{100 * value:.1f}", f"{value:.2f}", f"{value:.3f}", f"{value:.0f}", f"{value:.1f}"}


def test_the_first_screen_of_an_audit_is_its_verdict() -> None:
    record = STORED["audit"]
    text = html_report(record)
    page = Page(text)
    words = plain(page.words)
    assert words.startswith("Was class 3 forgotten?")
    assert record["verdict"]["first_line"] in words
    for name in LAYERS:
        found = record["verdict"][name]
        assert f"{found['answer']} {REPORT_LAYERS[name]}" in words
        assert all(sentence[1:] in words for sentence in found["evidence"])
    assert "11 attacks were run on expunge-demo/unlearned.safetensors" in words
    positions = [text.index(f'id="{key}"') for key in ("verdict", "classes", "inside", "relearn", "attacks", "again")]
    assert positions == sorted(positions)


def test_the_first_screen_of_an_erasure_says_what_it_does_not_know() -> None:
    record = copy.deepcopy(STORED["demo"])
    words = plain(Page(html_report(record)).words)
    assert "Gone at the output: yes; the rest is intact: yes. What is left inside" in words
    assert "unknown Gone inside" in words
    assert "yes The rest is intact" in words
    assert "Method unsir, preset fast, seed 0. It was handed 900 images of classes that stay" in words
    assert "Repeats counted, it read 6,327 of those and 0 of the classes to forget." in words
    assert f"{record['cost']['steps']} optimizer steps" in words
    before = record["metrics"]["before"] | {"retain_accuracy": 0.5, "masked_retain_accuracy": 0.625}
    record["metrics"]["before"] = before
    for version, known in ((1, "50.0 % by the original;"), (2, "62.5 % by the original where it may not answer")):
        record["schema_version"] = version
        assert known in plain(Page(html_report(record)).words)
    record["calibration"] |= {"reached": None, "held_out": 9, "trained_on": 23}
    record["checks"]["signals"] = None
    silent = plain(Page(html_report(record)).words)
    assert "unknown Gone by signals" in silent
    assert "Signals can say nothing" in silent
    assert "held-out retained images 9, retained images that are trained on too 23" in silent
    record["checks"] |= {"forgotten": False, "kept": None, "signals": False}
    changed = plain(Page(html_report(record)).words)
    assert "no Gone at the output" in changed
    assert "unknown The rest is intact" in changed
    assert "no Gone by signals" in changed
    record["checks"]["forgotten"] = None
    changed = plain(Page(html_report(record)).words)
    assert "unknown Gone at the output" in changed
    assert "the original hardly knew them, so that says nothing" in changed


def test_every_layer_has_a_title() -> None:
    assert tuple(REPORT_LAYERS) == LAYERS


def test_what_the_record_does_not_hold_is_left_out() -> None:
    page = page_of(least())
    assert set(page["sections"]) == {"untested", "settings"}
    words = plain(Page(html_report(least())).words)
    assert "Attacks" not in words
    assert words.startswith("Forgetting class cat")
    assert "There are no held-out images of a forgotten class." in words
    without = copy.deepcopy(STORED["audit"])
    del without["metrics"]["retrained"], without["metrics"]["gaps"]
    without["calibration"], without["audits"]["relearn"]["details"] = None, {}
    text = html_report(without)
    assert "gap to retrained" not in text
    assert "gap to original" in text
    assert set(SECTIONS) - set(page_of(without)["sections"]) == {"signals", "confusion", "map", "learned", "cell"}


def test_null_figures_are_dashes() -> None:
    record = copy.deepcopy(STORED["audit"])
    record["metrics"]["after"] |= {"forget_accuracy": None, "tug_of_war": None, "weight_distance": None}
    record["metrics"]["after"]["per_class_accuracy"]["0"] = None
    record["audits"]["rmia"]["figures"]["forget"]["unlearned"] = {"value": None, "low": None, "high": None}
    record["audits"]["rmia"]["figures"]["forget"]["gap"] = None
    record["self_checks"][0]["ok"] = None
    record["seed"] = None
    check_record(record)
    words = plain(Page(html_report(record)).words)
    assert "–" in words
    assert "cannot be told" in words
    assert "seed none" in words.replace("seednone", "seed none")
    markdown_summary(record)


@pytest.mark.parametrize("empty", [False, True], ids=["null", "empty"])
@pytest.mark.parametrize("key", sorted(set(STORED["audit"]) - {"schema_version", "method", "classes", "metrics"}))
def test_any_part_may_be_missing(key: str, empty: bool) -> None:
    for record in STORED.values():
        changed = record | {key: type(record[key])() if empty and isinstance(record[key], (dict, list)) else None}
        check_record(changed)
        assert html_report(changed).endswith("</html>")
        markdown_summary(changed)


def test_a_second_retrained_model_and_its_noise_floor() -> None:
    record = copy.deepcopy(STORED["audit"])
    figure = record["audits"]["prototype"]["figures"]["forget accuracy"]
    figure["retrained 2"] = figure["retrained"]
    figure["noise_floor"] = {"value": 0.031, "low": -0.02, "high": 0.082, "found": False}
    words = plain(Page(html_report(record)).words)
    assert "retrained 2" in words
    assert "two retrained models differ by +3.1 points [-2.0, +8.2]" in words


def test_nothing_is_compared_with_a_retrained_model_that_was_refused() -> None:
    """The verdict does not use it, so that a star beside a gap to it would mislead."""
    record = copy.deepcopy(STORED["audit"])
    figure = record["audits"]["prototype"]["figures"]["forget accuracy"]
    figure["noise_floor"] = {"value": 0.031, "low": -0.02, "high": 0.082, "found": False}
    assert "gap to retrained" in html_report(record)
    assert "Ratios to the retrained" in html_report(record)
    for check in record["self_checks"]:
        if check["name"] == "retrained model":
            check |= {"ok": False, "finding": "knows the classes"}
    text = html_report(record)
    assert "gap to original" in text
    for gone in ("gap to retrained", "Ratios to the retrained", "two retrained models differ"):
        assert gone not in text
    rows = {row.name: row for row in summary_rows(record, "3")}
    own = record["metrics"]["gaps_to_original"]["retain_accuracy"]
    assert rows["Classes that stay"].gap == f"{100 * own['value']:+.1f}"


def test_figures_that_are_no_shares_get_their_own_scale() -> None:
    record = copy.deepcopy(STORED["audit"])
    record["audits"]["rmia"]["figures"]["forget"]["unlearned"]["value"] = 0.4321
    made = copy.deepcopy(record["audits"]["inversion"])
    for measured in made["figures"]["called by the original"].values():
        measured["value"] = 7.5
    record["audits"]["made up"] = made
    boards = {one["name"]: one["board"] for one in page_of(record)["sections"]["attacks"]["boards"]}
    assert boards["RMIA"].rows[0].marks["unlearned"].text == "0.43"
    assert page_of(record)["sections"]["attention"]["board"].ticks[0] == (0, "-1")
    assert boards["Made up"].ticks[-1] == (100, "7.5")
    assert boards["Made up"].rows[0].marks["unlearned"].at == 100
    assert boards["Prototype"].ticks[-1] == (100, "100 %")


def test_steps_that_were_not_enough_are_more_than() -> None:
    record = copy.deepcopy(STORED["audit"])
    relearn = record["audits"]["relearn"]
    relearn["details"]["unlearned"]["censored"]["steps to 95 %"] = [True, False]
    relearn["figures"]["steps to 95 %"]["unlearned"]["value"] = 40
    board = page_of(record)["sections"]["relearn"]["boards"][0]
    assert board.rows[0].marks["unlearned"].text == "> 40"
    assert board.rows[0].marks["original"].text[0] != ">"


def test_of_many_classes_those_that_matter_are_drawn() -> None:
    record = copy.deepcopy(STORED["demo"])
    names = [f"class {number}" for number in range(100)]
    record["classes"] = {"forget": ["class 40"], "forgotten_before": ["class 7"], "all": names}
    for side, one in record["metrics"].items():
        if side in ("before", "after", "retrained"):
            one["per_class_accuracy"] = dict.fromkeys(names, 0.9)
            one["forget_prediction_distribution"] = dict.fromkeys(names, 0.01)
    record["metrics"]["after"]["per_class_accuracy"]["class 66"] = 0.2
    record["metrics"]["after"]["forget_prediction_distribution"]["class 99"] = 0.5
    made = page_of(record)["sections"]
    assert [row.name for row in made["classes"].rows[:3]] == ["class 40", "class 7", "class 66"]
    assert (len(made["classes"].rows), len(made["classes"].more)) == (20, 80)
    assert made["answers"].rows[0].name == "class 99"
    assert "Forgetting class class 40" in html_report(record)


def test_an_audit_tells_which_classes_are_gone_besides_and_which_training_images_it_read() -> None:
    record = copy.deepcopy(STORED["audit"])
    names = record["classes"]["all"]
    record["classes"]["forgotten_before"] = names[-1:]
    record["samples_read"] = {key: dict.fromkeys(names, 41) for key in ("evaluation", "evaluation_training")}
    check_record(record)
    assert f"Gone besides: {names[-1]}." in page_of(record)["asked"]
    settings = page_of(record)["sections"]["settings"]
    assert (settings["read_head"], settings["read"][0][1:]) == (["evaluation", "evaluation training"], ["41", "41"])


def test_the_page_is_the_same_each_time() -> None:
    for record in STORED.values():
        assert html_report(record) == html_report(json.loads(json.dumps(record)))


# What it must not do


@pytest.mark.parametrize("name", STORED)
def test_nothing_is_fetched(name: str) -> None:
    text = html_report(STORED[name])
    page = Page(text)
    assert len(text.encode()) < 1_000_000
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            target = attributes.get(key)
            assert target is None or target.startswith("#") or (tag, target) == ("link", "data:,"), (tag, target)
    assert not re.search(r"url\(|@import", text)
    assert not {"img", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    policy = next(one["content"] for one in page.of("meta") if one.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;`|*_\n# x"


def test_strings_of_the_record_stay_strings() -> None:
    record = copy.deepcopy(STORED["audit"])
    spoil(record, keep=("answer",))
    check_record(record)
    page = Page(html_report(record))
    calm = Page(html_report(STORED["audit"]))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in calm.tags}
    assert len(page.of("script")) == 1
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert plain(EVIL) in plain(page.words)
    assert "{{ 7 * 7 }}" in page.words
    spoiled = markdown_summary(record)
    assert "<img" not in re.sub(r"\\<", "", spoiled.split("## The command")[0].split("\n---\n", 1)[1])
    assert card_of(spoiled).data.tags == ["image-classification", "machine-unlearning", "expunge"]


def card_of(text: str) -> Any:
    """Return the card as the hub's own library reads it."""
    return ModelCard(text)


def spoil(part: Any, keep: tuple[str, ...]) -> None:
    """Put markup into every text below a part, and into the names of classes, tensors, audits and figures."""
    for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
        if isinstance(value, str) and key not in keep:
            part[key] = EVIL + value
        elif isinstance(value, (dict, list)):
            spoil(value, keep)
            free = {"per_class_accuracy", "figures", "config", "impressions_called", "to_original", "phases", "targets"}
            if key in free and isinstance(value, dict):
                part[key] = {EVIL + name: one for name, one in value.items()}


# A file in, a file out


def test_headings_captions_and_landmarks() -> None:
    for record in STORED.values():
        page = Page(html_report(record))
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(second - first <= 1 for first, second in pairwise(levels))
        assert len(page.of("caption")) == len(page.of("table"))
        assert [len(page.of(tag)) for tag in ("main", "header", "footer", "nav")] == [1, 1, 1, 1]
        identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(identifiers) == len(set(identifiers))
        targets = [attributes["href"] for attributes in page.of("a")]
        assert all(target and target[1:] in identifiers for target in targets)


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    json_writer(content)(folder / "record.json")
    return folder


def test_report_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import webbrowser

    opened: list[str] = []

    def remember(url: str) -> bool:
        opened.append(url)
        return True

    monkeypatch.setattr(webbrowser, "open", remember)
    folder = write(tmp_path, STORED["demo"])
    result = invoke("report", str(folder), "--open")
    assert (result.exit_code, result.stdout) == (0, f"Wrote {folder / 'report.html'}\n")
    assert opened == [(folder / "report.html").as_uri()]
    assert (folder / "report.html").read_text(encoding="utf-8") == html_report(STORED["demo"])
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "report.html"]
    assert invoke("report", str(folder), "--quiet").stdout == ""
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    assert invoke("report", str(folder), "--open").exit_code == 1


def test_an_edited_record_is_not_shown_without_a_word(tmp_path: Path) -> None:
    told = "This record was edited after it was written"
    record = seal(STORED["demo"])
    folder = write(tmp_path, record)
    assert not was_edited(record)
    for form in ("html", "md", "json"):
        result = invoke("report", str(folder), "--format", form)
        assert (result.exit_code, result.stderr) == (0, ""), form
        assert told not in result.stdout
    assert told not in (folder / "report.html").read_text(encoding="utf-8")
    record["metrics"]["after"]["forget_accuracy"] = 0.0001
    write(tmp_path, record)
    for form in ("html", "md", "json"):
        result = invoke("report", str(folder), "--format", form)
        assert (result.exit_code, result.stderr) == (1, f"{told}: expunge verify {folder} says where\n"), form
        assert (told in result.stdout) is (form == "md")
    assert told in (folder / "report.html").read_text(encoding="utf-8")
    assert not was_edited({name: part for name, part in record.items() if name != "content_hash"})


def test_json_is_the_record_in_one_form(tmp_path: Path) -> None:
    turned = dict(reversed(STORED["demo"].items()))
    texts = [invoke("report", str(write(tmp_path, one)), "--format", "json").stdout for one in (STORED["demo"], turned)]
    assert texts[0] == texts[1] == canonical_json(STORED["demo"])
    assert json.loads(texts[0]) == STORED["demo"]
    assert not (tmp_path / "report.html").exists()


def test_markdown_is_a_model_card(tmp_path: Path) -> None:
    record = copy.deepcopy(STORED["audit"])
    record["model"]["spec"], record["data"]["source"] = "hf:google/vit?x=1", "hf:uoft-cs/cifar10"
    text = invoke("report", str(write(tmp_path, record)), "--format", "md").stdout
    card = card_of(text)
    assert card.data.base_model == "google/vit"
    assert card.data.datasets == ["uoft-cs/cifar10"]
    results = {one.metric_name: one.metric_value for one in card.data.eval_results}
    after = record["metrics"]["after"]
    assert results["Accuracy on classes that stay, held-out"] == pytest.approx(after["retain_accuracy"], abs=1e-6)
    assert results["Accuracy on forgotten classes, held-out"] == pytest.approx(after["forget_accuracy"], abs=1e-6)
    assert "# Was class 3 forgotten?" in card.text
    assert "- **Gone inside: " in card.text
    assert f"    {rerun(record)['command']}" in card.text  # type: ignore[index]
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    small = markdown_summary(least())
    assert small.startswith("---\npipeline_tag")
    assert "model-index" not in small


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    def refused(message: str, *words: str) -> None:
        result = invoke("report", *words)
        assert_refused(result.exit_code, result.stderr, message)

    folder = write(tmp_path / "x", STORED["demo"])
    refused("is no folder", str(tmp_path / "nowhere"))
    refused("is no folder", str(folder / "record.json"))
    refused("expected a record.json in", str(tmp_path))
    refused("expected --format html, md or json, got 'pdf'", str(folder), "--format", "pdf")
    refused("expected --open with --format html, got md", str(folder), "--format", "md", "--open")
    for text in (b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": "\\ud800"}'):
        (folder / "record.json").write_bytes(text)
        refused("is no record: it is not JSON in UTF-8", str(folder))
    (folder / "record.json").unlink()
    (folder / "record.json").mkdir()
    refused("expected a record.json in", str(folder))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 99, "expected schema_version 1 or 2, got 99"),
        ("schema_version", None, "expected schema_version 1 or 2, got None"),
        ("method", None, "expected method, found none"),
        ("metrics", [], "expected an object at metrics"),
        ("metrics.after", None, "expected metrics.after, found none"),
        ("metrics.after.forget_accuracy", "0", "expected a number at metrics.after.forget_accuracy"),
        ("metrics.after.forget_accuracy", True, "expected a number at metrics.after.forget_accuracy"),
        ("metrics.after.forget_accuracy", float("inf"), "expected a finite number at metrics.after.forget_accuracy"),
        ("metrics.after.per_class_accuracy", [1], "expected an object at metrics.after.per_class_accuracy"),
        ("metrics.after.intervals.forget_accuracy", [None, 1], "expected no null in the list at"),
        ("classes.forget", "cat", "expected a list at classes.forget"),
        ("classes.forget", [3], "expected text at classes.forget"),
        ("verdict.gone_inside.answer", "perhaps", "expected yes, no, unknown at verdict.gone_inside.answer"),
        ("audits.rmia.figures.forget.gap.value", "x", "expected a number at audits.rmia.figures.forget.gap.value"),
        ("config.impair", float("nan"), "expected a finite number at config.impair"),
        ("notes", [{}], "expected text at notes"),
    ],
)
def test_what_is_no_record_is_refused(path: str, value: Any, message: str, tmp_path: Path) -> None:
    record = copy.deepcopy(STORED["audit"])
    *parents, key = path.split(".")
    part = record
    for name in parents:
        part = part[name]
    part[key] = value
    tmp_path.joinpath("record.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=re.escape(message)):
        read_record(tmp_path)


def test_a_record_of_a_later_minor_version_is_read(tmp_path: Path) -> None:
    record = copy.deepcopy(STORED["demo"]) | {"signature": {"by": ["somebody", 1, None]}}
    record["metrics"]["after"]["new_measure"] = {"value": 1}
    write(tmp_path, record)
    html_report(read_record(tmp_path))


# From the commands


def test_a_fresh_record_can_be_shown(tiny: Tiny) -> None:
    names = ("linear_probe", "nearest_class_mean", "neighbour_leakage")
    split = tiny.split
    for more in ({}, {"retrained": tiny.model}, {"audits": [AUDITS[name] for name in names]}):
        record = as_json(evaluate(tiny.model, tiny.model, split, **more))
        check_record(json.loads(json.dumps(record)))
        words = plain(Page(html_report(record)).words)
        assert f"{100 * record['metrics']['after']['forget_accuracy']:.1f} %" in words
        assert rerun(record) is None  # no command made it
    assert "Neighbour leakage" in words or "neighbour leakage" in words.lower()


def test_forget_leaves_a_page_and_its_command_does_the_same_again(tmp_path: Path, trained: Trained) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    more = ("--retain-per-class", "30", "--retrained", str(trained.retrained), "--seed", "3", "--size", "8")
    result = invoke(*trained.arguments(out, *more))
    assert result.exit_code in (0, 1), result.stderr
    assert "report.html" in result.stdout
    record = read_record(out)
    assert (out / "report.html").read_text(encoding="utf-8") == html_report(record)
    made = rerun(record)
    assert made is not None
    assert made["note"] == ""
    program, *words = shlex.split(made["command"])
    assert program == "expunge"
    words[words.index("--out") + 1] = str(again)
    assert invoke(*words).exit_code == result.exit_code
    first, second = (load_weights(folder / "unlearned.safetensors")[0] for folder in (out, again))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert rerun(read_record(again)) == made


def test_audit_leaves_a_page_and_its_command_does_the_same_again(tmp_path: Path, trained: Trained) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    given = ["audit", "--original", str(trained.weights), "--unlearned", str(trained.retrained), "--data", "digits"]
    given += ["--model", trained.model, "--classes", "3", "--audits", "nearest_class_mean", "--no-training-data"]
    result = invoke(*given, "--out", str(out))
    assert result.exit_code in (0, 1), result.stderr
    made = rerun(read_record(out))
    assert made is not None
    words = shlex.split(made["command"])[1:]
    words[words.index("--out") + 1] = str(again)
    assert "--no-training-data" in words
    assert invoke(*words).exit_code == result.exit_code
    first, second = (read_record(folder) for folder in (out, again))
    for key in ("metrics", "config", "data", "model", "verdict"):
        assert first[key] == second[key]
    assert "nearest class mean" in (out / "report.html").read_text(encoding="utf-8").lower()


def test_the_command_names_every_option() -> None:
    record = copy.deepcopy(STORED["demo"])
    record["classes"]["forget"] = ["a b", "-c"]
    record["config"] |= {"settings": ["impair.lr=0.1", "defects=head,tail"], "preset": "fast"}
    record["data"] |= {"retain_source": "my data", "dropped_forgotten": 2, "retain_share": 0.5}
    record["data"]["options"] = {
        "label_column": "fine", "image_column": "img", "class_names": ["a b", "-c"], "size": [8, 9],
        "mean": [-0.5], "std": [0.25], "channels": 1, "skip_bad": True,
    }  # fmt: skip
    made = rerun(record)
    assert made is not None
    command = made["command"]
    for part in (
        "--classes 'a b' --classes=-c", "--set impair.lr=0.1 --set defects=head,tail", "--retain 'my data'",
        "--drop-forgotten", "--retain-share 0.5", "--label-column fine", "--image-column img", "--class-names 'a b,-c'",
        "--size 8x9", "--mean=-0.5", "--std 0.25", "--channels 1", "--skip-bad", "--device cpu", "--preset fast",
    ):  # fmt: skip
        assert part in command
    audit = copy.deepcopy(STORED["audit"])
    audit["audits"]["u_lira"] = audit["audits"]["rmia"]
    audit["config"]["ensembles"] = {"members": 5, "method": "unsir", "preset": "fast", "recipe": {"epochs": 2}}
    audit["model"]["retrained"] = ["one", "two"]
    found = rerun(audit)
    assert found is not None
    assert "--retrained one --retrained two" in found["command"]
    assert "--budget large --members 5 --method unsir --preset fast --epochs 2" in found["command"]
    assert "u_lira" not in found["command"]
    del audit["config"]["audits"]
    older = rerun(audit)
    assert older is not None
    assert "may be missing" in older["note"]
    record["environment"]["device"] = "NVIDIA H200"
    other = rerun(record)
    assert other is not None
    assert "--device" not in other["command"]


def test_blocks_stand_in_the_order_they_run() -> None:
    record = copy.deepcopy(STORED["audit"])
    figure = record["audits"]["linear_probe"]["figures"]["head input"]
    names = ["after stem.11", "after stem.4", "after last", "head input"]
    record["audits"]["linear_probe"]["figures"] = dict.fromkeys(sorted(names), figure)
    shown = [row.name for row in inside(record)[0]["board"].rows]
    assert shown == ["after last", "after stem.4", "after stem.11", "head input"]  # by number, where nothing tells
    record["audits"]["linear_probe"]["details"] = {"original": {"blocks": names}}
    assert [row.name for row in inside(record)[0]["board"].rows] == names
