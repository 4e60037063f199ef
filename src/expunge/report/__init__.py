"""A record as a page, as a Markdown summary, or as canonical JSON. Reads the record; computes no measure.

The page is one HTML file that asks for nothing: style, script and figures (inline SVG) are in it, and a content
security policy refuses the rest. What the record does not hold is left out. Everything in it that came from outside is
escaped. reading.py checks a record, figures.py turns numbers into words and places, sections.py and page.py lay out
what ../templates show, rerun.py builds the command that does it again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from expunge.files import canonical_json
from expunge.report.page import card_of, page_of
from expunge.report.reading import check_record, read_pictures, read_record

__all__ = [
    "canonical_json",
    "check_record",
    "html_report",
    "html_writer",
    "markdown_summary",
    "read_pictures",
    "read_record",
]

TEMPLATES = Path(__file__).parents[1] / "templates"


def html_report(record: Mapping[str, Any], pictures: Mapping[str, Any] | None = None) -> str:
    """Return the page of a record that `check_record` lets through: one self-contained HTML file.

    Args:
        pictures: of samples, as `read_pictures` gives them, to be shown; None: no picture that began as an image.
    """
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _environment().get_template("report.html.jinja")
    return template.render(
        page=page_of(record, pictures), style=Markup(style), script=Markup(script), script_hash=f"sha256-{digest}"
    )


def markdown_summary(record: Mapping[str, Any]) -> str:
    """Return a summary that can be a model card on a hub: a YAML block of metadata, then Markdown."""
    return _environment().get_template("report.md.jinja").render(page=page_of(record), metadata=card_of(record))


def html_writer(record: Mapping[str, Any], pictures: Mapping[str, Any] | None = None) -> Callable[[Path], None]:
    """Return a writer of the page, for `write_atomically`."""
    text = html_report(record, pictures)

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
