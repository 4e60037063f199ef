"""A record as a page, as a Markdown summary, or as canonical JSON. Reads the record; computes no measure.

A page, of one run or of a benchmark, is one HTML file that asks for nothing: style, script and figures (inline SVG)
are in it, and a content security policy refuses the rest. What the record does not hold is left out. Everything in it
that came from outside is escaped. reading.py checks a record, figures.py turns numbers into words and places,
sections.py, looks.py and page.py lay out what ../templates show, rerun.py builds the command that does it again;
bench_reading.py, scatter.py and bench_page.py do so for the record of a benchmark.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from expunge.files import canonical_json
from expunge.report.bench_page import bench_page
from expunge.report.bench_reading import check_bench, is_bench, read_bench
from expunge.report.page import card_of, page_of
from expunge.report.reading import EDITED, check_record, read_pictures, read_record, was_edited

__all__ = [
    "EDITED",
    "bench_html",
    "canonical_json",
    "check_bench",
    "check_record",
    "html_report",
    "html_writer",
    "is_bench",
    "markdown_summary",
    "read_bench",
    "read_pictures",
    "read_record",
    "text_writer",
    "was_edited",
]

TEMPLATES = Path(__file__).parents[1] / "templates"


def html_report(record: Mapping[str, Any], pictures: Mapping[str, Any] | None = None) -> str:
    """Return the page of a record that `check_record` lets through: one self-contained HTML file.

    Args:
        pictures: of samples, as `read_pictures` gives them, to be shown; None: no picture that began as an image.
    """
    return _page("report.html.jinja", ("report",), page_of(record, pictures))


def bench_html(record: Mapping[str, Any]) -> str:
    """Return the page of a benchmark's record that `check_bench` lets through: one self-contained HTML file."""
    return _page("bench.html.jinja", ("report", "bench"), bench_page(record))


def _page(template: str, parts: Sequence[str], page: Mapping[str, Any]) -> str:
    """Return a page with its styles and scripts in it, and the policy that allows no other script."""
    style, script = (
        "".join((TEMPLATES / f"{part}.{kind}").read_text(encoding="utf-8") for part in parts) for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(page=page, style=Markup(style), script=Markup(script), script_hash=f"sha256-{digest}")
    )


def markdown_summary(record: Mapping[str, Any]) -> str:
    """Return a summary that can be a model card on a hub: a YAML block of metadata, then Markdown."""
    return _environment().get_template("report.md.jinja").render(page=page_of(record), metadata=card_of(record))


def html_writer(record: Mapping[str, Any], pictures: Mapping[str, Any] | None = None) -> Callable[[Path], None]:
    """Return a writer of the page, for `write_atomically`."""
    return text_writer(html_report(record, pictures))


def text_writer(text: str) -> Callable[[Path], None]:
    """Return a writer of text, for `write_atomically`."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is None or not name.endswith(".md.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown
    environment.filters["yaml"] = _yaml
    return environment


def _markdown(text: Any) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~&#])", r"\\\1", " ".join(str(text).split()))


def _yaml(text: Any) -> str:
    """Return text in double quotes, which YAML reads as JSON does."""
    return json.dumps(str(text), ensure_ascii=True)
