"""Peak memory does not grow with the retain sample."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_ten_times_as_many_images_take_as_much_memory(kind: str) -> None:
    words = ["--images", "3000", "--side", "64", "--memory", "16M", "--kind", kind, "--json"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    assert (small["images"], large["images"]) == (2_700, 27_000)  # without the class to forget
    assert (small["dropped"], large["dropped"]) == (300, 3_000)
    # held at once, the larger sample alone would break this
    assert large["decoded_bytes"] - small["decoded_bytes"] > 0.1 * small["peak_bytes"]
    assert large["peak_bytes"] < 1.1 * small["peak_bytes"]
