"""The page in Debian's Chromium: drawn, silent, offline, reachable, at the width of a phone and of a desk."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from expunge.report import html_report
from illustrated import illustrated, pictures_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

RECORDS = Path(__file__).parent / "records"
CHROMIUM = shutil.which("chromium")
NAMES = ("demo", "audit", "many", "least", "pictures")
WIDTHS = {"phone": 360, "desk": 1280}
MISSING = next(
    (
        f"{name} is not installed"
        for name, found in (
            ("chromium (Debian's package)", CHROMIUM),
            ("playwright", importlib.util.find_spec("playwright")),
            ("axe-playwright-python", importlib.util.find_spec("axe_playwright_python")),
        )
        if not found
    ),
    None,
)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of stored records, of one with a hundred classes of awkward names, and of one that holds nothing."""
    folder = tmp_path_factory.mktemp("pages")
    records = {name: json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8")) for name in ("demo", "audit")}
    records |= {name: illustrated(record) for name, record in records.items()}
    records["many"] = many(records["audit"])
    records["least"] = {
        "schema_version": 1,
        "method": "unknown",
        "classes": {"forget": ["cat"], "all": ["cat", "dog"]},
        "metrics": {"before": {}, "after": {}},
    }
    for name, record in records.items():
        (folder / f"{name}.html").write_text(html_report(record), encoding="utf-8")
    text = html_report(records["audit"], pictures_of(records["audit"]))
    (folder / "pictures.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in NAMES}


def many(audit: dict[str, Any]) -> dict[str, Any]:
    record = copy.deepcopy(audit)
    names = [f"a class whose name is rather long, number {number}" for number in range(97)]
    names += ["<script>document.title = 'broken'</script>", "'\"><b>", "W" * 80]
    record["classes"] |= {"forget": names[90:], "all": names}
    for side in ("before", "after", "retrained"):
        record["metrics"][side]["per_class_accuracy"] = {name: place / 100 for place, name in enumerate(names)}
        record["metrics"][side]["forget_prediction_distribution"] = dict.fromkeys(names, 0.01)
    return illustrated(record)


@dataclass
class Seen:
    """A page that was opened, and what it asked for and complained of."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def look(browser: Browser, path: Path, width: int = 1280, scheme: Any = "light") -> Seen:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(120_000)  # on a machine that others use too
    seen = Seen(context.new_page())
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("console", lambda message: seen.complaints.append(message.text))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.goto(path.as_uri())
    return seen


def open_all(page: Page) -> None:
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_asked_for_and_nothing_goes_wrong(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    seen = look(browser, pages[name], width)
    open_all(seen.page)
    for plot in seen.page.locator(".plot").all():
        plot.hover()
    seen.page.emulate_media(media="print")
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
    assert [url for url in seen.requests if url.startswith("file:")] == [pages[name].as_uri()]
    assert seen.complaints == []
    assert seen.page.title() != "broken"
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    seen.page.context.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", ["demo", "audit", "many"])
def test_every_figure_is_drawn(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    page = look(browser, pages[name], width).page
    figures = page.locator("[data-figure]:visible")
    assert figures.count() >= 20
    empty = figures.evaluate_all(
        """figures => figures.filter(figure => {
            const box = figure.getBoundingClientRect();
            const marks = [...figure.querySelectorAll('use')].map(mark => mark.getBoundingClientRect());
            const inside = marks.filter(mark => mark.width > 4 && mark.left >= box.left - 8
                && mark.right <= box.right + 8 && mark.top >= box.top - 8 && mark.bottom <= box.bottom + 8);
            const cells = [...figure.querySelectorAll('td[style]')];
            const drawn = figure.matches('.heat')
                ? cells.length && cells.every(cell => getComputedStyle(cell).backgroundColor !== 'rgba(0, 0, 0, 0)')
                : marks.length > 0;
            const dots = [...figure.querySelectorAll('.dots')].map(path => path.getBoundingClientRect());
            const out = dots.filter(dot => dot.width < 4 || dot.left < box.left || dot.right > box.right);
            return box.width < 100 || !drawn || out.length || inside.length < marks.length;
        }).map(figure => figure.textContent.slice(0, 60))"""
    )
    assert empty == []
    lines = page.locator("path.line").evaluate_all(
        "paths => paths.map(path => [path.getTotalLength(), getComputedStyle(path).stroke])"
    )
    assert all(color != "none" for _, color in lines)
    page.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")], ids=WIDTHS)
@pytest.mark.parametrize("name", ["demo", "audit", "least", "pictures"])
def test_axe_finds_nothing(browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    page = look(browser, pages[name], width, scheme).page
    open_all(page)
    home = importlib.util.find_spec("axe_playwright_python")
    assert home is not None
    assert home.origin is not None
    page.evaluate(Path(home.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 15
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found["violations"]] == []
    page.context.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_picture_is_decoded(browser: Browser, pages: dict[str, Path], width: int) -> None:
    page = look(browser, pages["pictures"], width).page
    sizes = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert sizes == [16] * 7
    page.context.close()


def test_numbers_on_tinted_cells_can_be_read(browser: Browser, pages: dict[str, Path]) -> None:
    for scheme in ("light", "dark"):
        page = look(browser, pages["audit"], scheme=scheme).page
        colors = page.locator(".heat td[style]").evaluate_all(
            """cells => {
                const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
                const seen = color => {
                    pen.fillStyle = color;
                    pen.fillRect(0, 0, 1, 1);
                    const parts = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255);
                    const linear = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
                    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
                };
                return cells.map(cell => {
                    const style = getComputedStyle(cell);
                    return [seen(style.color), seen(style.backgroundColor)].sort((one, other) => other - one);
                });
            }"""
        )
        assert len(colors) > 30
        assert min((bright + 0.05) / (dark + 0.05) for bright, dark in colors) > 4.5  # WCAG AA
        page.context.close()


def test_each_role_has_one_colour_everywhere(browser: Browser, pages: dict[str, Path]) -> None:
    for scheme in ("light", "dark"):
        page = look(browser, pages["audit"], scheme=scheme).page
        colors = {
            role: set(
                page.locator(f"use.{role}, line.{role}, path.{role}, svg.mark.{role}").evaluate_all(
                    "marks => marks.map(mark => getComputedStyle(mark).getPropertyValue('--ink').trim())"
                )
            )
            for role in ("original", "unlearned", "retrained")
        }
        assert all(len(found) == 1 for found in colors.values()), colors
        assert len(set.union(*colors.values())) == 3
        page.context.close()


def test_pointing_at_a_chart_tells_its_numbers(browser: Browser, pages: dict[str, Path]) -> None:
    page = look(browser, pages["audit"]).page
    plot = page.locator("#relearn .plot")
    plot.scroll_into_view_if_needed()
    area = plot.locator(".area").bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + 1, area["y"] + 40)
    readout = page.locator(".readout")
    assert readout.is_visible()
    cells = page.locator("#relearn-numbers tbody tr").first.locator("th, td").all_text_contents()
    told = readout.text_content() or ""
    assert told.startswith("step 1")
    assert all(cell in told for cell in cells)
    page.mouse.move(area["x"] + area["width"] + 30, 5)
    assert readout.is_hidden()
    page.context.close()


def test_the_keyboard_reaches_everything(browser: Browser, pages: dict[str, Path]) -> None:
    page = look(browser, pages["demo"]).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the verdict"
    page.keyboard.press("Enter")
    assert page.url.endswith("#verdict")
    first = page.locator("#signals-numbers-1 summary")
    first.focus()
    assert page.locator("#signals-numbers-1 table").is_hidden()
    page.keyboard.press("Enter")
    assert page.locator("#signals-numbers-1 table").is_visible()
    page.locator("#weights-numbers summary").click()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"  # that scrolls
    page.context.close()


def test_on_paper_everything_is_open_and_light(browser: Browser, pages: dict[str, Path]) -> None:
    page = look(browser, pages["audit"], scheme="dark").page
    closed = page.locator("details:not([open])").count()
    assert closed > 3
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == closed
    assert len(page.pdf(format="A4")) > 10_000
    page.context.close()


def test_without_a_script_the_page_is_whole(browser: Browser, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["audit"].as_uri())
    assert page.locator("[data-figure]:visible").count() >= 20
    assert page.locator("#again code").is_visible()
    context.close()


def test_the_policy_stops_what_would_load(browser: Browser, pages: dict[str, Path]) -> None:
    seen = look(browser, pages["demo"])
    stopped: list[tuple[str, str | None]] = []
    seen.page.on("requestfailed", lambda request: stopped.append((request.url, request.failure)))
    seen.page.evaluate(
        """() => {
            document.body.append(Object.assign(new Image(), {src: 'https://example.invalid/x.png'}));
            document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}));
        }"""
    )
    seen.page.wait_for_timeout(200)
    assert stopped == [("https://example.invalid/x.png", "csp")]
    assert seen.page.title() != "1"
    assert len(seen.complaints) >= 2  # the browser says that it refused
    seen.page.context.close()


BROKEN = """heads => heads.filter(head => {
    const range = document.createRange();
    const walker = document.createTreeWalker(head, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        for (const word of walker.currentNode.data.matchAll(/\\S+/g)) {
            range.setStart(walker.currentNode, word.index);
            range.setEnd(walker.currentNode, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) return true;
        }
    }
}).map(head => head.textContent)"""
"""Those of some elements in which a word goes over two lines."""


@pytest.mark.parametrize("name", ["demo", "audit"])
def test_no_word_is_broken_on_a_phone(browser: Browser, pages: dict[str, Path], name: str) -> None:
    page = look(browser, pages[name], 390).page
    open_all(page)
    assert page.locator("thead th:visible").evaluate_all(BROKEN) == []
    page.context.close()
