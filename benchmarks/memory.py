"""Peak memory of `expunge forget` as its retain sample grows: the table of docs/scaling.md.

    python benchmarks/memory.py [--images 2000] [--factors 1,10] [--side 224] [--memory 256M] [--kind parquet]

Makes retain samples of so many and ten times as many synthetic images in a temporary folder, forgets a class with each
in a process of its own, and reports that process's peak resident memory. Prints Markdown, or with --json one object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = 10
SHARD = 500  # images a file
NET = """
from torch import nn
def build(num_classes, channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=4), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, num_classes))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="in the smallest retain sample")
    parser.add_argument("--factors", default="1,10", help="how many times as many are in the others")
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--memory", default="256M", help="as of expunge forget")
    parser.add_argument("--kind", choices=("parquet", "tar"), default="parquet")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, options.side)
        rows = [one(root, options, options.images * int(factor)) for factor in options.factors.split(",")]
    print(json.dumps(rows) if options.json else markdown(rows))


def prepare(root: Path, side: int) -> None:
    """Make the data to measure on, and a model trained on it."""
    (root / "net.py").write_text(NET)
    write(root / "data", 20 * CLASSES, side, "parquet", seed=1)
    words = ["train", "--data", str(root / "data"), "--model", f"{root / 'net.py'}:build", "--epochs", "5"]
    measured([*words, "--batch-size", "32", "--out", str(root / "w.safetensors")])


def one(root: Path, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Forget a class with a retain sample of so many images; return what it took."""
    retain = root / f"retain-{count}"
    write(retain, count, options.side, options.kind, seed=2)
    words = ["forget", "--weights", str(root / "w.safetensors"), "--model", f"{root / 'net.py'}:build"]
    words += ["--data", str(root / "data"), "--classes", "3", "--retain", str(retain), "--memory", options.memory]
    words += ["--drop-forgotten", "--preset", "fast", "--no-ledger", "--out", str(root / f"out-{count}")]
    peak, seconds = measured(words)
    record = json.loads((root / f"out-{count}" / "record.json").read_text())
    retained = record["data"]["retain_samples"]
    return {
        "images": retained,
        "dropped": record["data"]["dropped_forgotten"],
        "decoded_bytes": retained * 3 * options.side**2,
        "stored_bytes": sum(path.stat().st_size for path in retain.iterdir()),
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
    }


def measured(words: list[str]) -> tuple[int, float]:
    """Run an `expunge` command; return its peak resident memory in bytes, and its seconds."""
    start = time.perf_counter()
    # this process stays small: what a child had before it became another program counts for it too
    process = subprocess.Popen([sys.executable, "-m", "expunge", *words, "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"expunge {words[0]} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - start


def write(folder: Path, count: int, side: int, kind: str, *, seed: int) -> None:
    """Write shards of JPEG images, each a soft pattern of its class with noise of its own."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(0).integers(40, 216, (CLASSES, 8, 8, 3))

    def images() -> Iterator[tuple[bytes, int]]:
        for number in range(count):
            label = number % CLASSES
            grid = np.clip(means[label] + rng.normal(0, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(grid).resize((side, side), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=90)
            yield buffer.getvalue(), label

    made = images()
    for shard in range(-(-count // SHARD)):
        own = [next(made) for _ in range(min(SHARD, count - shard * SHARD))]
        path = folder / f"train-{shard:05}.{kind}"
        if kind == "parquet":
            table = pa.table({"image": [image for image, _ in own], "label": [label for _, label in own]})
            pq.write_table(table, path, row_group_size=100)
        else:
            with tarfile.open(path, "w") as tar:
                for key, (image, label) in enumerate(own):
                    for ending, content in (("jpg", image), ("cls", str(label).encode())):
                        info = tarfile.TarInfo(f"{key:06}.{ending}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| retained images | decoded, MiB | peak memory, MiB | beside the first | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        growth = row["peak_bytes"] / rows[0]["peak_bytes"] - 1
        lines.append(
            f"| {row['images']:,} | {row['decoded_bytes'] / 2**20:,.0f} | {row['peak_bytes'] / 2**20:,.0f} "
            f"| {growth:+.1%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
