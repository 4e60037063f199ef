"""An erasure of ImageNet's shape, phase by phase: seconds, images a second, memory. The table of docs/scaling.md.

    python benchmarks/imagenet_shaped.py                                      # small: few steps on random images
    torchrun --nproc-per-node 8 benchmarks/imagenet_shaped.py --data SRC --weights W --models timm:resnet50 \\
        --batch 256 --steps 48 --noise-steps 40 --retain-per-class 50                    # in full, on your data

1,000 classes, 224 x 224. Each phase goes through the package's own functions, and stands beside plain training steps of
the same model on the same images. Of a run on a CPU, images a second are of the process's own CPU time, in one thread,
so that what else runs on the machine does not count. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from expunge import signals
from expunge.data import TensorImages, draw, resolve_classes, stage, without
from expunge.journal import Journal, Meter, Part
from expunge.memory import kept_bytes
from expunge.methods.unsir import UnsirConfig, impair, learn_noise, repair
from expunge.models import build_model, parse_model
from expunge.processes import leave, ranks, wait
from expunge.recompute import recomputed
from expunge.schema import Preprocessing, Split, TrainConfig
from expunge.signals import learn_impressions
from expunge.training import train
from expunge.workspace import DataOptions, open_workspace, pick_device

CLASSES = 1000
IMAGENET = Preprocessing(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", default="timm:resnet50,timm:vit_base_patch16_224")
    parser.add_argument("--data", help="as of expunge forget; without it images are random")
    parser.add_argument("--weights", type=Path, help="with --data")
    parser.add_argument("--classes", default="0,1", help="to forget")
    parser.add_argument("--retain-per-class", type=int, default=50, help="with --data")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of plain training, impair and repair")
    parser.add_argument("--noise-steps", type=int, default=3, help="of noise and impressions")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="fp32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args()
    models = options.models.split(",")
    if len(models) > 1:  # each in a process of its own, whose memory is its own
        for model in models:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--models", model], check=True)  # the last counts
        return
    torch.set_num_threads(1)
    ranks()
    table = measure(models[0], options)
    if ranks().first:
        print(table, flush=True)
    wait()
    if ranks().size > 1:
        leave(0)


def measure(name: str, options: argparse.Namespace) -> str:
    """Run every phase of an erasure once; return what each took."""
    model, split = random_data(name, options) if options.data is None else own_data(name, options)
    journal = Measuring(next(model.parameters()).device)
    forward, kept = flops(model), kept_an_image(model)
    steps = TrainConfig(
        steps=options.steps, lr=1e-4, batch_size=options.batch, precision=options.precision,
        gradient_checkpointing=options.gradient_checkpointing,
    )  # fmt: skip
    config = UnsirConfig(
        noise_images=options.batch, noise_steps=options.noise_steps, impressions=options.batch, calibration=None,
        impair=replace(steps, update_norm_statistics=False), repair=steps,
    )  # fmt: skip
    signals.IMPRESSION_STEPS = options.noise_steps
    plain = copy.deepcopy(model)
    warm = replace(steps, steps=1)  # what the first step of a process pays alone is nobody's
    train(copy.deepcopy(model), split.retain, warm, seed=0, preprocessing=split.preprocessing)
    train(
        plain, split.retain, steps, seed=0, preprocessing=split.preprocessing, journal=journal, phase="plain training"
    )
    del plain
    noise = learn_noise(model, split, config, seed=0, journal=journal)
    each = max(1, options.batch // len(split.forget_classes))
    impressions = learn_impressions(model, split, each, seed=0, precision=options.precision, journal=journal)
    impaired = impair(model, split, noise, config, impressions=impressions, seed=0, journal=journal)
    repair(impaired, split, config, original=model, impressions=impressions, noise=noise, seed=0, journal=journal)
    return markdown(name, model, forward, kept, journal, options)


def random_data(name: str, options: argparse.Namespace) -> tuple[nn.Module, Split]:
    torch.manual_seed(0)
    model = build_model(parse_model(name), num_classes=CLASSES, channels=3).to(pick_device(None)).eval()
    count = 2 * options.batch
    images = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
    forget = resolve_classes([options.classes], [str(label) for label in range(CLASSES)])
    kept = torch.tensor([label for label in range(CLASSES) if label not in forget])
    retain = TensorImages(images, kept[torch.arange(count) % len(kept)])
    return model, Split(forget_classes=forget, retain=retain, preprocessing=IMAGENET)


def own_data(name: str, options: argparse.Namespace) -> tuple[nn.Module, Split]:
    workspace = open_workspace(
        DataOptions(spec=options.data), name, options.weights, leave_out=[options.classes], seed=0, device=None
    )
    table = draw(
        without(workspace.source.train, {*workspace.left_out, *workspace.gone_before}),
        per_class=options.retain_per_class,
        seed=0,
    )
    retain = stage(table, workspace.preprocessing).dataset
    split = Split(forget_classes=workspace.left_out, retain=retain, preprocessing=workspace.preprocessing)
    return workspace.model, split


def flops(model: nn.Module) -> int:
    """Return the floating point operations of a forward pass of one image."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.zeros((1, 3, 224, 224), device=next(model.parameters()).device))
    return counter.get_total_flops()


@dataclass(frozen=True)
class Cost:
    """What one phase took."""

    name: str
    samples: int
    wall: float  # seconds
    busy: float  # CPU seconds of this process; of a GPU the same as `wall`
    peak: int  # bytes: resident, or allocated on the GPU


class Measuring(Journal):
    """A journal that keeps what each phase took."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.costs: list[Cost] = []

    @contextmanager
    def phase(self, name: str, *, steps: int | None, part: Part | None = None, shown: bool = True) -> Iterator[Meter]:
        reset_peak(self.device)
        wall, busy = time.perf_counter(), time.process_time()
        with super().phase(name, steps=steps, part=part, shown=shown) as meter:
            yield meter
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        if self.device.type == "cuda":
            busy = wall
        self.costs.append(Cost(name, meter.samples, wall, busy, peak(self.device)))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def kept_an_image(model: nn.Module) -> tuple[int, int]:
    """Return what one image more keeps for the backward pass in train mode, and with gradient checkpointing."""
    whole, anew = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    batches = [torch.zeros((count, 3, 224, 224), device=next(model.parameters()).device) for count in (2, 3)]

    def grown(changed: nn.Module) -> int:
        two, three = (kept_bytes(changed, lambda batch=batch: changed(batch)) for batch in batches)  # type: ignore[misc]
        return three - two

    with recomputed(anew):
        return grown(whole), grown(anew)


def markdown(
    name: str, model: nn.Module, forward: int, kept: tuple[int, int], journal: Measuring, options: argparse.Namespace
) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plain = next(cost for cost in journal.costs if cost.name == "plain training")
    speed = plain.samples / plain.busy
    processes = ranks().size
    lines = [
        f"`{name}`: {parameters / 1e6:.1f} M parameters, {forward / 1e9:.1f} GFLOP a forward pass; an image keeps "
        f"{kept[0] / 2**20:.0f} MiB for the backward pass, {kept[1] / 2**20:.0f} with gradient checkpointing. "
        f"Batch {options.batch}, {options.precision}, {processes} process{'es' if processes > 1 else ''}, "
        f"{journal.device}.",
        "",
        "| phase | images | seconds | busy | images a busy second | of plain training | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in journal.costs:
        rate = cost.samples / cost.busy if cost.busy else 0.0
        lines.append(
            f"| {cost.name} | {cost.samples} | {cost.wall:.1f} | {cost.busy:.1f} | {rate:.2f} | {rate / speed:.0%} "
            f"| {cost.peak / 2**20:,.0f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
