"""Whether `torch.compile` pays: a training step of ResNet18 on 128 images of 32 x 32, as ours runs it and compiled.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py [--steps 6]

Prints wall and CPU seconds of this process of the first step, which compiles (with an empty cache; the compiler is
a process of its own), and of the fastest of the others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.models import build_model, parse_model
from expunge.training import answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    print("| step | first, wall s | CPU s | later, wall s | CPU s |\n|---|---|---|---|---|")
    for name, compiled, half in (
        ("plain, fp32", False, False),
        ("compiled, fp32", True, False),
        ("compiled, bf16", True, True),
        ("ours, fp32", None, False),
        ("ours, bf16", None, True),
    ):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            torch.compiler.reset()
            first, *others = steps(compiled, half, options.steps)
        later = min(others)
        print(f"| {name} | {first[0]:.2f} | {first[1]:.2f} | {later[0]:.3f} | {later[1]:.3f} |", flush=True)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads")


def steps(compiled: bool | None, half: bool, count: int) -> list[tuple[float, float]]:
    """Return wall and CPU seconds of each of `count` steps; `compiled` None: by `expunge.training.answer`."""
    torch.manual_seed(0)
    model = build_model(parse_model("torchvision:resnet18"), num_classes=10, channels=3).train()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))
    ask = asked(model, compiled, half)
    taken = []
    for _ in range(count):
        wall, busy = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(ask(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        taken.append((time.perf_counter() - wall, time.process_time() - busy))
    return taken


def asked(model: nn.Module, compiled: bool | None, half: bool) -> Callable[[Tensor], Tensor]:
    if compiled is None:
        return lambda images: answer(model, images, "bf16" if half else "fp32")
    run = torch.compile(model) if compiled else model

    def ask(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits: Tensor = run(images)
            return logits.float()

    return ask


if __name__ == "__main__":
    main()
