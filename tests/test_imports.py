"""Imports go one way, from schema to the command line, and the public names are there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import expunge

PACKAGE = Path(expunge.__file__).parent
LAYERS = (
    {"errors"},
    {"schema"},
    {"journal", "config", "files", "data", "processes", "randomness", "convolutions", "memory", "recompute"},
    {"report", "ledger", "signing"},
    {"sharding", "batches"},
    {"training"},
    {"metrics", "models", "weights", "signals", "pictures"},
    {"audits"},
    {"workspace", "methods", "verdict", "provenance"},
    {"evaluation"},
    {"commands"},
    {"verify", "bench"},
    {"terminal", "options"},
    {"cli"},
    {"__main__"},
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    """Parts of expunge that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("expunge."):
            names.add(part_of(node.module or ""))
        elif isinstance(node, ast.Import):
            names |= {part_of(alias.name) for alias in node.names if alias.name.startswith("expunge.")}
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in LAYER, f"{own} has no layer: give it one"
    for other in imported(path) - {own}:
        assert LAYER[other] < LAYER[own], f"{own} imports {other}"


def test_methods_never_import_metrics() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        assert "metrics" not in imported(path)


def test_the_report_reads_records_and_nothing_else() -> None:
    for path in (PACKAGE / "report").glob("*.py"):
        assert imported(path) <= {"report", "schema", "errors", "config", "files"}, path.name


def test_public_names_are_no_modules() -> None:
    code = """
import expunge, types
for _ in range(2):
    for name in expunge.__all__:
        assert not isinstance(getattr(expunge, name), types.ModuleType), name
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert len(set(expunge.__all__)) == len(expunge.__all__)
    listed = {name for names in expunge._HOMES.values() for name in names}
    assert listed == set(expunge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        expunge.nothing  # noqa: B018


def test_help_starts_without_torch() -> None:
    code = "import expunge.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
