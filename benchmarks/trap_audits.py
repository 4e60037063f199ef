"""Models that look unlearned, or retrained, and are not: what the audit says of each. The table of docs/results.md.

    python benchmarks/trap_audits.py

On digits, the threes forgotten, a small network (tests/traps.py has the builders, the test suite holds what each must
be called). Prints Markdown: the layers of the verdict, what is wrong by name, the self-checks that failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import make_tiny
from expunge.audits import AUDITS
from expunge.audits.check import LAYERS
from test_traps import judge
from traps import TRAPS, digits


def main() -> None:
    scene = digits(make_tiny())
    ground = scene.ground
    models = {name: (trap.unlearned(ground), trap.retrained(ground)) for name, trap in TRAPS.items()}
    models["the retrained model as unlearned (no trap)"] = (ground.retrained, ground.retrained)
    print("| handed in as unlearned | " + " | ".join(layer.replace("_", " ") for layer in LAYERS) + " | named |")
    print("|---" * (len(LAYERS) + 2) + "|")
    for name, (unlearned, retrained) in models.items():
        record = judge(scene, unlearned, retrained, list(AUDITS.values()))
        answers = [record.verdict[layer]["answer"] for layer in LAYERS]
        named = [text.split(":")[0] for text in record.verdict["diagnosis"]]
        failed = [check["finding"] or check["name"] for check in record.self_checks if check["ok"] is False]
        said = "; ".join(dict.fromkeys([*named, *failed])) or "-"
        print(f"| {name} | " + " | ".join(answers) + f" | {said} |", flush=True)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} thread, seed 0")


if __name__ == "__main__":
    main()
