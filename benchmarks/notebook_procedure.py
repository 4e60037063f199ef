"""The procedure of the authors' notebook (arXiv:2111.08947) on CIFAR-10 and ResNet18, to time ours against.

    python benchmarks/notebook_procedure.py --images DIR --weights W.safetensors --classes 0,2 --out RESULT.json

Written anew from what is known of it (docs/research/defaults.md has its defects), so that it does the work that one who
runs the notebook waits for: every image of both splits becomes a normalized float tensor in a Python list; noise is
learned class by class, the network in train mode and its weights' gradients computed and left; twenty rounds of noise
and the first thousand images of each retained class are trained on, then those images alone; after each of the two
passes the whole test set is answered. Contiguous fp32, no compiled code. `benchmarks/performance.py` runs it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BATCH = 256
RETAINED = 1000  # of each class, the first ones
NOISE_STEPS = (5, 8)  # epochs and steps an epoch
NOISE_ROUNDS = 20  # times that noise is added to the list

Images = list[tuple[Any, int]]


class Clock:
    """Wall and CPU seconds of each phase of a process; `flops` is asked before and after, where given."""

    def __init__(self, flops: Any = None) -> None:
        self.phases: list[dict[str, Any]] = []
        self.flops = flops

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        counted = self.flops() if self.flops else 0
        start, worked = time.monotonic(), time.process_time()
        yield
        self.phases.append(
            {
                "name": name,
                "started": start,
                "cpu_started": worked,
                "seconds": time.monotonic() - start,
                "cpu_seconds": time.process_time() - worked,
                "flops": self.flops() - counted if self.flops else None,
            }
        )


class Pictures:
    """Images in an array (N, H, W, 3), given out one by one as torchvision's CIFAR10 gives them."""

    def __init__(self, folder: Path, part: str, preprocessing: dict[str, Any]) -> None:
        import numpy as np
        from torchvision import transforms

        self.pixels = np.load(folder / f"{part}-images.npy")
        self.labels = np.load(folder / f"{part}-labels.npy").tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(preprocessing["mean"], preprocessing["std"])]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="arrays that performance.py has made of the data")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--classes", required=True, help="labels to forget")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count-flops", action="store_true")
    options = parser.parse_args()
    forget = [int(label) for label in options.classes.split(",")]
    if options.count_flops:
        from expunge.bench.cost import FlopCount

        with FlopCount() as counter:
            result = run(options, forget, Clock(lambda: counter.total))
    else:
        result = run(options, forget, Clock())
    options.out.write_text(json.dumps(result), encoding="utf-8")


def run(options: argparse.Namespace, forget: list[int], clock: Clock) -> dict[str, Any]:
    import torch
    import torchvision
    from safetensors import safe_open

    torch.manual_seed(options.seed)
    with safe_open(options.weights, "pt") as file:
        preprocessing = json.loads(file.metadata()["expunge"])["preprocessing"]
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    model = torchvision.models.resnet18(num_classes=state["fc.bias"].shape[0])
    model.load_state_dict(state)

    with clock.phase("read images"):
        train = by_class(Pictures(options.images, "train", preprocessing))
        test = by_class(Pictures(options.images, "test", preprocessing))
        held = {
            "forget": [sample for label, samples in test.items() if label in forget for sample in samples],
            "retain": [sample for label, samples in test.items() if label not in forget for sample in samples],
        }
        retained = [sample for label in train if label not in forget for sample in train[label][:RETAINED]]
    with clock.phase("noise"):
        noise = {label: learn_noise(model, label) for label in forget}
    with clock.phase("impair"):
        shown: Images = []
        for label in forget:
            for _ in range(NOISE_ROUNDS):
                images = noise[label]
                # as many images as an image has channels, and all of them called 0: the notebook's own slips
                shown.extend((images[index].detach(), 0) for index in range(images[0].size(0)))
        train_pass(model, shown + retained, lr=0.02)
    with clock.phase("evaluate"):
        evaluate(model, held)
    with clock.phase("repair"):
        train_pass(model, retained, lr=0.01)
    with clock.phase("evaluate"):
        after = evaluate(model, held)
    return {"phases": clock.phases, "forget_accuracy": after["forget"], "retain_accuracy": after["retain"]}


def by_class(pictures: Pictures) -> dict[int, Images]:
    """Return every image as a tensor in the list of its class."""
    lists: dict[int, Images] = {label: [] for label in sorted(set(pictures.labels))}
    for index in range(len(pictures)):
        image, label = pictures[index]
        lists[label].append((image, label))
    return lists


def learn_noise(model: Any, label: int) -> Any:
    import torch
    import torch.nn.functional as F

    model.train()
    images = torch.randn(BATCH, 3, 32, 32).requires_grad_()
    labels = torch.full((BATCH,), label)
    optimizer = torch.optim.Adam([images], lr=0.1)
    epochs, steps = NOISE_STEPS
    for _ in range(epochs):
        total = []
        for _ in range(steps):
            loss = -F.cross_entropy(model(images), labels) + 0.1 * images.square().sum(dim=(1, 2, 3)).mean()
            optimizer.zero_grad()  # of the images; what the weights get is left where it is
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total.append(loss.item())
    return images


def train_pass(model: Any, samples: Images, *, lr: float) -> None:
    """Train one epoch; what gradients the weights had before reach the first step."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    losses, hits = 0.0, 0
    for images, labels in DataLoader(samples, batch_size=BATCH, shuffle=True):  # type: ignore[arg-type]
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses += loss.item() * len(images)
        hits += int((logits.argmax(1) == labels).sum().item())


def evaluate(model: Any, held: dict[str, Images]) -> dict[str, float]:
    """Return the accuracy on each set, of all its samples (the notebook's mean of batch means is not kept)."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    model.eval()
    found = {}
    with torch.no_grad():
        for name, samples in held.items():
            hits, loss = 0, 0.0
            for images, labels in DataLoader(samples, batch_size=BATCH):  # type: ignore[arg-type]
                logits = model(images)
                loss += F.cross_entropy(logits, labels).item()
                hits += int((logits.argmax(1) == labels).sum().item())
            found[name] = hits / len(samples)
    return found


if __name__ == "__main__":
    main()
