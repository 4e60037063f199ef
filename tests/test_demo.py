"""The demo keeps its promises; it trains twice, so it runs with `make test-all`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "expunge", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Forgotten at the output: yes" in done.stdout
    metrics = json.loads((tmp_path / "demo" / "record.json").read_text())["metrics"]
    assert metrics["before"]["forget_accuracy"] > 0.85
    assert metrics["after"]["forget_accuracy"] <= 0.01
    assert metrics["after"]["retain_accuracy"] >= metrics["before"]["retain_accuracy"] - 0.03
    assert metrics["retrained"]["forget_accuracy"] == 0.0
    names = sorted(path.name for path in (tmp_path / "demo").iterdir())
    weights = [f"{name}.safetensors" for name in ("original", "retrained", "unlearned")]
    assert names == sorted(["record.json", "report.html", "retain_sample.json", "expunge-ledger.sqlite", *weights])
    # run again it replaces what it made, and nothing that was signed
    again = subprocess.run([*command, "--quiet"], check=False, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    (tmp_path / "demo" / "model.sig").write_text("signed")
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (refused.returncode, "is not of an earlier demo: name another --out" in refused.stderr) == (2, True)
