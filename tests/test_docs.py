"""The documents hold: the README's snippet runs, commands and record keys are documented, links lead somewhere."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from conftest import Tiny, TinyNet
from expunge.cli import app
from expunge.config import as_json
from expunge.evaluation import evaluate
from expunge.methods import PRESETS
from expunge.schema import CalibrationReport

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_readme_snippet_runs(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 1
    assert tiny.split.test is not None
    names = {
        "model": tiny.model,
        "retained_images": tiny.split.retain,
        "test_images": tiny.split.test,
    }
    exec(compile(snippets[0], "README.md", "exec"), names)
    printed = capsys.readouterr().out.split()
    before, after = float(printed[0]), float(printed[1])
    assert before > 0.9
    assert after <= 0.01
    assert isinstance(names["unlearned"], TinyNet)


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"expunge {name}" in text


def test_every_record_key_is_documented(tiny: Tiny) -> None:
    text = (ROOT / "docs" / "record.md").read_text(encoding="utf-8")
    record = as_json(evaluate(tiny.model, tiny.model, tiny.split, retrained=tiny.model))
    found = [field.name for field in fields(CalibrationReport)]  # what `record.calibration` holds
    parts = (record, record["metrics"]["after"], record["checks"], record["samples_read"], record["cost"], found)
    for key in [key for part in parts for key in part]:
        if key not in ("goal_forget_accuracy", "goal_retain_drop", "steps", "samples"):
            assert f"`{key}`" in text or f"`{key}." in text, f"{key} is not in docs/record.md"


def test_every_preset_is_documented() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("## Presets")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert list(rows) == list(PRESETS)
    for method, presets in PRESETS.items():
        assert re.findall(r"`(\w+)`", rows[method]) == list(presets), method


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        other = path.parent / target if target else path
        assert other.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(other), f"{path.name} links to {target}#{anchor}"


def anchors(path: Path) -> list[str]:
    """Return what headings are linked by, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_browser_test_is_listed() -> None:
    told = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    for name in ("test_report_browser.py", "test_bench_page.py"):
        source = (ROOT / "tests" / name).read_text(encoding="utf-8")
        for test in re.findall(r"^def (test_\w+)\(\s*browser: Browser", source, re.MULTILINE):
            assert f"`{test}`" in told, f"{test} of {name} is not in docs/report.md"
