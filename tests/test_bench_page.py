"""The page of a benchmark: from its record alone, silent, offline, sorted, filtered; what is no record is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from expunge import cli
from expunge.errors import InputError
from expunge.report import bench_html, check_bench
from test_report_browser import BROKEN, MISSING, WIDTHS, browser, look, open_all

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["browser"]  # a fixture

RECORD = Path(__file__).with_name("bench_quick.json")  # seven methods of a `quick` that was run
in_browser = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


def stored() -> dict[str, Any]:
    """The stored record, one of whose cells has failed with an awkward error."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    columns, rows = record["table"]["columns"], record["table"]["rows"]
    failed = rows[5]
    failed[columns.index("status")] = "failed"
    for name in ("forget_accuracy", "retain_accuracy", "tug_of_war", "linear_probe", "linear_probe_gap"):
        failed[columns.index(name)] = None
    record["cells"] |= {"done": len(rows) - 1, "failed": 1}
    message = "<script>document.title = 'broken'</script>"
    error = {"type": "DivergedError", "message": message, "traceback": "line 1"}
    record["failed"] = [{"id": failed[columns.index("id")], "attempts": 1, **error}]
    return record


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "report.html"
    path.write_text(bench_html(stored()), encoding="utf-8")
    return path


def test_a_failed_cell_is_told_and_what_came_from_outside_is_escaped() -> None:
    text = bench_html(stored())
    assert "71 of 72 cells are done" in text
    assert "DivergedError" in text
    assert "<script>document.title" not in text
    assert bench_html(stored()) == text  # the same record, the same bytes


def test_several_hundred_cells_stay_small() -> None:
    record = stored()
    record["table"]["rows"] *= 12
    assert len(record["table"]["rows"]) > 800
    assert len(bench_html(record).encode()) < 2_000_000


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda record: record.pop("groups"), "expected an object with"),
        (lambda record: record.update(schema_version=99), "expected schema_version"),
        (lambda record: record["table"]["columns"].remove("seconds"), "expected a column seconds"),
        (lambda record: record["table"]["rows"][3].pop(), "row 3"),
        (lambda record: record["groups"][0].update(standings=None), "expected standings"),
    ],
)
def test_what_is_no_record_is_refused(spoil: Callable[[dict[str, Any]], Any], said: str) -> None:
    record = copy.deepcopy(stored())
    spoil(record)
    with pytest.raises(InputError, match=said):
        check_bench(record)


def test_report_makes_the_page_again(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(stored()), encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == bench_html(stored())
    refused = CliRunner().invoke(cli.app, ["report", str(tmp_path), "--format", "md"])
    assert refused.exit_code == 2
    assert "tables.md" in refused.output


def test_a_folder_of_an_older_benchmark_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "run the same expunge bench again" in " ".join(done.output.split())


@in_browser
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")], ids=WIDTHS)
def test_silent_offline_and_accessible(browser: Browser, page_file: Path, width: int, scheme: str) -> None:
    seen = look(browser, page_file, width, scheme)
    open_all(seen.page)
    for plot in seen.page.locator(".plot:visible").all():
        plot.hover()
    assert seen.requests == [page_file.as_uri()]
    assert seen.complaints == []
    assert seen.page.title() != "broken"
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    home = importlib.util.find_spec("axe_playwright_python")
    assert home is not None
    assert home.origin is not None
    seen.page.evaluate(Path(home.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    found = seen.page.evaluate("axe.run()")
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found["violations"]] == []
    seen.page.context.close()


@in_browser
def test_the_table_is_sorted_and_filtered_by_keyboard_too(browser: Browser, page_file: Path) -> None:
    from playwright.sync_api import expect

    page = look(browser, page_file).page
    rows = page.locator("table.cells tbody tr")
    assert rows.count() == 72
    head = page.locator("table.cells thead th", has_text="others")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    column = head.evaluate("head => head.cellIndex")
    told = rows.evaluate_all(f"rows => rows.map(row => Number.parseFloat(row.cells[{column}].textContent))")
    numbers = [value for value in told if value == value]
    assert numbers == sorted(numbers)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("form.filters select").first.select_option("unsir")
    shown = page.locator("table.cells tbody tr:visible")
    assert 0 < shown.count() < 72
    assert set(shown.locator("th").all_text_contents()) == {"unsir"}
    assert f"{shown.count()} of 72 cells" in (page.locator(".count").text_content() or "")
    page.locator("form.filters button").click()
    expect(shown).to_have_count(72)  # filters are emptied after the click
    page.locator("form.filters input").fill("head_mask")
    assert set(page.locator("table.cells tbody tr:visible th").all_text_contents()) == {"head_mask"}
    page.context.close()


@in_browser
def test_each_done_cell_leads_to_its_page_and_a_name_to_its_cells(browser: Browser, page_file: Path) -> None:
    page = look(browser, page_file).page
    links = page.locator("table.cells tbody th a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    pages = [link for link in links if link.startswith("cells/") and link.endswith("/report.html")]
    assert len(pages) == 71
    (failed,) = set(links) - set(pages)
    assert page.locator(failed).text_content()
    page.locator("a[data-method='unsir']:visible").first.click()
    assert set(page.locator("table.cells tbody tr:visible th").all_text_contents()) == {"unsir"}
    page.context.close()


@in_browser
def test_pointing_at_a_chart_tells_the_nearest_cell(browser: Browser, page_file: Path) -> None:
    page = look(browser, page_file).page
    dot = page.locator(".plot:visible .dots use").first
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    readout = page.locator(".readout:visible")
    assert readout.count() == 1
    methods = set(page.locator("table.cells tbody th").all_text_contents())
    assert any(method in (readout.text_content() or "") for method in methods)
    page.context.close()


@in_browser
def test_without_a_script_it_is_a_table(browser: Browser, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("table.cells tbody tr:visible").count() == 72
    assert page.locator("form.filters").is_hidden()
    context.close()


@in_browser
def test_no_word_is_broken_on_a_phone(browser: Browser, page_file: Path) -> None:
    page = look(browser, page_file, 390).page
    assert page.locator("th:visible").evaluate_all(BROKEN) == []
    page.context.close()


@in_browser
def test_several_hundred_cells_stay_quick(browser: Browser, tmp_path: Path) -> None:
    record = stored()
    record["table"]["rows"] *= 6
    path = tmp_path / "page.html"
    path.write_text(bench_html(record), encoding="utf-8")
    page = look(browser, path).page
    timed = """([selector, act]) => {
        const started = performance.now();
        const one = document.querySelector(selector);
        act === 'click' ? one.click() : (one.value = act, one.dispatchEvent(new Event('input', {bubbles: true})));
        document.body.offsetHeight;
        return performance.now() - started;
    }"""
    assert page.evaluate(timed, ["table.cells thead button", "click"]) < 5000  # 500 on a busy machine
    assert page.evaluate(timed, ["form.filters select", "unsir"]) < 5000
    assert page.locator(".count").text_content() == "108 of 432 cells"
    page.context.close()
