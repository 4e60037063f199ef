"""What forgetting costs beside the notebook's own procedure: the tables of docs/performance.md.

    python benchmarks/performance.py --weights W.safetensors --out DIR [--data SRC] [--runs 5] [--small]

W: a torchvision ResNet18 for CIFAR-10, made by `expunge train`. Times in processes of their own, and in turn so that
what else the machine does hits all alike: the procedure (benchmarks/notebook_procedure.py), `forget` with the presets
`notebook` (equal work), `default` and `fast`, start-up, one to seven classes, a plain training step, and the machine's
matrix multiplication in fp32. Each is kept as DIR/NAME-RUN.json, so that a run goes on where it was. FLOPs are counted
in runs that are not timed. Prints Markdown: medians over the runs, ratios as medians of the ratios within a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from notebook_procedure import Clock

HERE = Path(__file__).parent
CIFAR10 = HERE.parents[1] / "shared" / "data" / "cifar10"
CLASSES = "0,2"
SETS = ("0", "3,4,5,6,7,8,9")  # the least and the most of the paper
PRESETS = ("notebook", "default", "fast")
PHASES = ("read images", "noise", "impressions", "impair", "answers", "repair", "evaluate")
RETRAINING_EPOCHS = 40
SMALL = {"train": 600, "test": 200}
MATRIX = 2048
STEPS = 12
STEP_KINDS = ("plain", "fp32", "auto")  # a tutorial's loop; ours; ours in the precision that it takes here

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=CIFAR10, help="CIFAR-10 as expunge reads it")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of each process; by default as many as torch takes")
    parser.add_argument("--small", action="store_true", help="a few hundred images and one run: to see that it works")
    parser.add_argument("--work", nargs=2, metavar=("WHAT", "CLASSES"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count-flops", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    runs = 1 if options.small else options.runs
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(options)
    names = plan(options)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(runs):
        for name, measure in names.items():
            if number and "-of-" in name:  # one to seven classes are told apart in one run
                continue
            path = options.out / f"{name}-{number}.json"
            if not path.exists():
                print(f"{name}, run {number + 1} of {runs}", file=sys.stderr, flush=True)
                path.write_text(json.dumps(measure()), encoding="utf-8")
            results[name].append(json.loads(path.read_text(encoding="utf-8")))
    flops = counted(options)
    parts = [whole(results), phases(results, flops), start_up(results), classes(results), steps_alone(results, flops)]
    print("\n\n".join([*parts, retraining(results, flops), machine(results, options)]))


# What is measured


def plan(options: argparse.Namespace) -> dict[str, Callable[[], Result]]:
    """Return what one run measures, by name, in its order."""
    cli = [sys.executable, "-m", "expunge"]
    measures: dict[str, Callable[[], Result]] = {
        "help": lambda: timed([*cli, "--help"]),
        "peak": lambda: worker(options, "peak"),
        "procedure": lambda: procedure(options),
    }
    for kind in STEP_KINDS:
        measures[f"step-{kind}"] = lambda kind=kind: worker(options, "step", kind)  # type: ignore[misc]
    for preset in PRESETS:
        measures[preset] = lambda preset=preset: worker(options, preset, CLASSES)  # type: ignore[misc]
    for preset in ("default", "fast"):
        for labels in SETS:
            name = f"{preset}-of-{labels.count(',') + 1}"
            measures[name] = lambda preset=preset, labels=labels: worker(options, preset, labels)  # type: ignore[misc]
    return measures


def counted(options: argparse.Namespace) -> dict[str, Result]:
    """Return the phases of each variant with their FLOPs, from a run of its own each."""
    found = {}
    for name in ("step-plain", "step-auto", "procedure", *PRESETS):
        path = options.out / f"{name}-flops.json"
        if not path.exists():
            print(f"{name}, counting", file=sys.stderr, flush=True)
            if name == "procedure":
                measured = procedure(options, "--count-flops")
            else:
                what, _, kind = name.partition("-")
                measured = worker(options, what, kind or CLASSES, "--count-flops")
            path.write_text(json.dumps(measured), encoding="utf-8")
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def procedure(options: argparse.Namespace, *more: str) -> Result:
    path = options.out / "result.json"
    command = [sys.executable, str(HERE / "notebook_procedure.py"), "--images", str(options.out / "arrays")]
    command += ["--weights", str(options.weights), "--classes", CLASSES, "--out", str(path), *more]
    return timed(command, path)


def worker(options: argparse.Namespace, what: str, labels: str = "", *more: str) -> Result:
    path = options.out / "result.json"
    data = options.out / "data" if options.small else options.data
    command = [sys.executable, str(HERE / "performance.py"), "--work", what, labels, "--result", str(path)]
    command += ["--weights", str(options.weights), "--out", str(options.out), "--data", str(data), *more]
    return timed(command, path)


def timed(command: Sequence[str], result: Path | None = None) -> Result:
    """Run a process; return what it wrote to `result`, with its wall and CPU seconds and peak resident memory."""
    if result is not None:
        result.unlink(missing_ok=True)
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    found: Result = json.loads(result.read_text(encoding="utf-8")) if result is not None else {}
    if found.get("phases"):
        first = next(phase for phase in found["phases"] if phase["name"] != "read images")
        found |= {"first_step_seconds": first["started"] - start, "first_step_cpu_seconds": first["cpu_started"]}
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return found | {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * scale,
    }


def prepare(options: argparse.Namespace) -> None:
    """Write the images as arrays, for the procedure, which shall not pay for decoding; with --small a few of them."""
    arrays = options.out / "arrays"
    if (arrays / "test-labels.npy").exists():
        return
    import numpy as np

    from expunge.data import TensorImages, draw, open_source, stage, with_test_split
    from expunge.schema import Preprocessing

    plain = Preprocessing(size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    source, test = with_test_split(open_source(str(options.data)))
    arrays.mkdir(exist_ok=True)
    for part, table in {"train": source.train, "test": test}.items():
        if options.small:
            table = draw(table, per_class=SMALL[part] // len(source.class_names), seed=0)
        images = stage(table, plain).dataset
        assert isinstance(images, TensorImages)
        if options.small:
            write_folders(images, source.class_names, options.out / "data" / part)
        np.save(arrays / f"{part}-images.npy", images.images.permute(0, 2, 3, 1).contiguous().numpy())
        np.save(arrays / f"{part}-labels.npy", images.labels.numpy())


def write_folders(images: Any, names: Sequence[str], folder: Path) -> None:
    from PIL import Image

    for number, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        path = folder / names[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


# Inside a process that is measured


def work(options: argparse.Namespace) -> None:
    what, labels = options.work
    flops = None
    if options.count_flops:
        from expunge.bench.cost import FlopCount

        counter = FlopCount()
        counter.__enter__()  # type: ignore[no-untyped-call]
        flops = lambda: counter.total  # noqa: E731
    clock = Clock(flops)
    if what == "peak":
        result = peak(clock)
    else:
        result = step(labels, clock) if what == "step" else ours(what, labels, options, clock)
    if what == "peak":
        options.result.write_text(json.dumps(result), encoding="utf-8")
        return
    options.result.write_text(json.dumps(result | {"phases": clock.phases}), encoding="utf-8")


def ours(preset: str, labels: str, options: argparse.Namespace, clock: Clock) -> Result:
    """Do what `expunge forget` does."""
    from expunge.commands import RetainOptions, forget_command
    from expunge.journal import Journal, Meter, Part
    from expunge.workspace import DataOptions

    class Timed(Journal):
        @contextmanager
        def phase(
            self, name: str, *, steps: int | None, part: Part | None = None, shown: bool = True
        ) -> Iterator[Meter]:
            with clock.phase(name), super().phase(name, steps=steps, part=part, shown=shown) as meter:
                yield meter

    folder = options.out / "result"
    outcome = forget_command(
        DataOptions(spec=str(options.data)), None, options.weights, [labels], folder,
        retain=RetainOptions(per_class=1000), preset=preset, journal=Timed(),
    )  # fmt: skip
    shutil.rmtree(folder)
    record = outcome.record
    after = record.metrics["after"]
    return {
        "forget_accuracy": after["forget_accuracy"],
        "retain_accuracy": after["retain_accuracy"],
        "retain_accuracy_before": record.metrics["before"]["retain_accuracy"],
        "steps": record.cost["steps"],
    }


def peak(clock: Clock) -> Result:
    """Multiply matrices in fp32: the median rate is what this machine can do."""
    import torch

    one, other = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    torch.mm(one, other)
    for _ in range(STEPS):
        with clock.phase("matmul"):
            torch.mm(one, other)
    seconds = statistics.median(phase["seconds"] for phase in clock.phases)
    return {"flops_per_second": 2 * MATRIX**3 / seconds, "threads": torch.get_num_threads(), "torch": torch.__version__}


def step(kind: str, clock: Clock) -> Result:
    """Train a fresh ResNet18 for a few steps of 256 images of noise: what a step of retraining takes."""
    with clock.phase("steps"):
        ends = plain_steps() if kind == "plain" else own_steps(kind)
    return {"step_seconds": statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))}


def plain_steps() -> list[float]:
    """Train as a first tutorial does: contiguous fp32, Adam parameter by parameter. Return when each step ended."""
    import torch
    import torchvision

    model, ends = torchvision.models.resnet18(num_classes=10).train(), [time.perf_counter()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4, foreach=False, fused=False)
    images, labels = torch.randn(256, 3, 32, 32), torch.arange(256) % 10
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ends.append(time.perf_counter())
    return ends


def own_steps(precision: str) -> list[float]:
    """Train as expunge does, in a precision. Return when each step ended."""
    import torch
    import torchvision

    from expunge.data import TensorImages
    from expunge.schema import Preprocessing, TrainConfig
    from expunge.training import train

    images, ends = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8), [time.perf_counter()]
    train(
        torchvision.models.resnet18(num_classes=10),
        TensorImages(images, torch.arange(1024) % 10),
        TrainConfig(
            steps=STEPS, lr=0.01, batch_size=256, weight_decay=1e-4, clip_value=0.1,
            precision=precision,  # type: ignore[arg-type]
        ),
        seed=0,
        preprocessing=Preprocessing(size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3),
        until=lambda _: bool(ends.append(time.perf_counter())),  # type: ignore[func-returns-value]
    )  # fmt: skip
    return ends


# What is told


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def middle(values: Sequence[float], digits: int = 1) -> str:
    """Return the median, with the lowest and highest where there are several."""
    text = f"{statistics.median(values):,.{digits}f}"
    return text if len(values) < 2 else f"{text} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def times(above: Sequence[float], below: Sequence[float]) -> str:
    """Return the median of the ratios within each run."""
    pairs = [a / b for a, b in zip(above, below, strict=True) if b]
    return f"{statistics.median(pairs):.2f}" if pairs else ""


def of(results: Sequence[Result], key: str) -> list[float]:
    return [float(result[key]) for result in results]


def of_phase(results: Sequence[Result], name: str, key: str = "seconds") -> list[float]:
    """Return what a phase took in each run, all its parts together."""
    return [sum(p[key] or 0 for p in one["phases"] if p["name"].startswith(name)) for one in results]


def whole(results: dict[str, list[Result]]) -> str:
    rows = []
    base = results["procedure"]
    for name in ("procedure", *PRESETS):
        found = results[name]
        rows.append([
            name, middle(of(found, "seconds")), middle(of(found, "cpu_seconds")),
            times(of(base, "seconds"), of(found, "seconds")), times(of(base, "cpu_seconds"), of(found, "cpu_seconds")),
            f"{statistics.median(of(found, 'peak_bytes')) / 2**20:,.0f}",
            f"{100 * found[0]['forget_accuracy']:.2f}", f"{100 * found[0]['retain_accuracy']:.2f}",
        ])  # fmt: skip
    head = ["whole process", "wall s", "CPU s", "times faster, wall", "times faster, CPU", "peak MiB", "A_f %", "A_r %"]
    return f"Forget {CLASSES}, end to end\n\n" + table(head, rows)


def phases(results: dict[str, list[Result]], flops: dict[str, Result]) -> str:
    rows = []
    rate = statistics.median(of(results["peak"], "flops_per_second"))
    for phase in PHASES:
        for name in ("procedure", *PRESETS):
            found = of_phase(results[name], phase)
            if not statistics.median(found):
                continue
            work = of_phase([flops[name]], phase, "flops")[0]
            rows.append([
                phase, name, middle(found, 2), middle(of_phase(results[name], phase, "cpu_seconds"), 2),
                "" if name == "procedure" else times(of_phase(results["procedure"], phase), found),
                f"{work / 1e9:,.0f}" if work else "",
                f"{work / statistics.median(found) / rate:.0%}" if work else "",
            ])  # fmt: skip
    head = ["phase", "of", "wall s", "CPU s", "times faster", "GFLOP", "of the peak"]
    return "Phases\n\n" + table(head, rows)


def start_up(results: dict[str, list[Result]]) -> str:
    rows = [["expunge --help", *(middle(of(results["help"], kind), 2) for kind in ("seconds", "cpu_seconds"))]]
    for name in ("default", "fast"):
        wall, worked = (middle(of(results[name], f"first_step_{kind}"), 2) for kind in ("seconds", "cpu_seconds"))
        rows.append([f"forget, {name}, until its first step", wall, worked])
    return "Start-up\n\n" + table(["", "wall s", "CPU s"], rows)


def classes(results: dict[str, list[Result]]) -> str:
    rows = []
    for preset in ("default", "fast"):
        one = results[f"{preset}-of-1"]
        for labels in SETS:
            found = results[f"{preset}-of-{labels.count(',') + 1}"]
            rows.append([
                preset, labels, middle(of(found, "seconds")), times(of(found, "seconds"), of(one, "seconds")),
                str(found[0]["steps"]), f"{100 * found[0]['forget_accuracy']:.2f}",
                f"{100 * found[0]['retain_accuracy']:.2f}", f"{100 * found[0]['retain_accuracy_before']:.2f}",
            ])  # fmt: skip
    head = ["preset", "classes", "wall s", "times one class", "steps", "A_f %", "A_r %", "A_r before %"]
    return "One to seven classes\n\n" + table(head, rows)


def retraining(results: dict[str, list[Result]], flops: dict[str, Result]) -> str:
    """Compare with training 40 epochs on all retained images, as many of our own steps as that takes."""
    images = 40_000
    steps = RETRAINING_EPOCHS * -(-images // 256)
    seconds = [steps * result["step_seconds"] for result in results["step-auto"]]
    step_work = of_phase([flops["step-auto"]], "steps", "flops")[0] / STEPS
    rows = []
    for name in PRESETS:
        work = sum(of_phase([flops[name]], phase, "flops")[0] for phase in PHASES if phase != "evaluate")
        spent = [sum(of_phase([one], phase)[0] for phase in PHASES if phase != "evaluate") for one in results[name]]
        share = statistics.median(a / b for a, b in zip(spent, seconds, strict=True))
        rows.append([name, f"{share:.2%}", f"{work / (steps * step_work):.2%}"])
    told = f"{steps:,} steps of 256 images are {RETRAINING_EPOCHS} epochs of {images:,} images."
    return f"Cost, evaluation apart, against retraining by our own steps\n\n{told}\n\n" + table(
        ["", "time", "FLOPs"], rows
    )


def steps_alone(results: dict[str, list[Result]], flops: dict[str, Result]) -> str:
    """Say how fast a training step is, and which share of the peak that is for the operations of the plain one."""
    plain = of_phase([flops["step-plain"]], "steps", "flops")[0] / STEPS
    done = of_phase([flops["step-auto"]], "steps", "flops")[0] / STEPS
    rate = statistics.median(of(results["peak"], "flops_per_second"))
    rows = []
    for kind in STEP_KINDS:
        found = of(results[f"step-{kind}"], "step_seconds")
        faster = times(of(results["step-plain"], "step_seconds"), found)
        rows.append([kind, middle(found, 3), faster, f"{plain / statistics.median(found) / rate:.0%}"])
    told = f"The plain step asks for {plain / 1e9:.1f} GFLOP, of which {done / 1e9:.1f} are not with zeros."
    head = ["step of 256 images", "wall s", "times faster", "of the fp32 peak, at the plain step's operations"]
    return f"A training step\n\n{told}\n\n" + table(head, rows)


def machine(results: dict[str, list[Result]], options: argparse.Namespace) -> str:
    first = results["peak"][0]
    rates = [rate / 1e9 for rate in of(results["peak"], "flops_per_second")]
    small = " **A trial on a few hundred images: no figure of it means anything.**" if options.small else ""
    return (
        f"{processor()}, {first['threads']} threads, torch {first['torch']}, fp32 matrix multiplication "
        f"{middle(rates, 0)} GFLOP/s; {len(rates)} runs.{small}"
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
