"""What a person sees while a command runs: in a real terminal of 80 columns, and where there is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from expunge import options
from expunge.audits import AUDITS
from expunge.bench.cells import Cell, Original, Tuning
from expunge.bench.runner import leased
from expunge.bench.standing import Standing
from expunge.journal import Journal, Part
from expunge.methods import METHODS
from expunge.schema import Signals
from expunge.terminal import answers
from expunge.terminal.bench import Board
from expunge.terminal.progress import Bars
from expunge.terminal.words import duration, say
from test_bench_runner import tiny_cells
from test_cli import FILE, entry, invoke

COLUMNS, LINES = 80, 24


def in_terminal(arguments: list[str], **env: str) -> str:
    """Run a program in a terminal of its own; return every byte it wrote there, and check that it left with 0."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=plain | {"TERM": "xterm-256color"} | env
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        written += more
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def lines_of(written: str) -> list[str]:
    """Return what was drawn, line by line, without what moves the cursor and sets colours."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written))


def test_training_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FILE)
    words = ["train", "--data", "digits", "--model", f"{tmp_path / 'net.py'}:build", "--epochs", "30"]
    words += ["--out", str(tmp_path / "w.safetensors")]
    written = in_terminal([sys.executable, "-m", "expunge", *words])
    lines = lines_of(written)
    assert max(map(len, lines)) <= COLUMNS
    running = [line for line in lines if line.startswith("train ") and "left" in line]
    assert running, lines
    assert re.search(r"[━╸╺] +\d+/180 +[\d.]+ s left  loss \d+\.\d{3}  accuracy \d+\.\d%", running[-1]), running[-1]
    done = [line for line in lines if re.match(r"train +180 steps +[\d.]+ s  loss", line)]
    assert done, lines
    assert "\x1b[38;" in written or "\x1b[3" in written  # in colours

    (tmp_path / "w.safetensors").unlink()
    asked = in_terminal([sys.executable, "-m", "expunge", *words], NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", asked), "colours, though NO_COLOR was set"
    assert any("left" in line for line in lines_of(asked))


def test_a_terminal_that_cannot_redraw_gets_lines(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FILE)
    words = ["train", "--data", "digits", "--model", f"{tmp_path / 'net.py'}:build", "--epochs", "1"]
    words += ["--out", str(tmp_path / "w.safetensors")]
    written = in_terminal([sys.executable, "-m", "expunge", *words], TERM="dumb")
    assert "\x1b" not in written
    assert re.search(r"^train: 6 steps, [\d.]+ s, loss ", written, re.MULTILINE)


BENCH = """
import sys
from pathlib import Path
from expunge.bench.runner import run_cells
from expunge.bench.standing import Standing
from expunge.terminal.bench import shown
sys.path.insert(0, sys.argv[1])
from test_bench_runner import tiny_cells

if __name__ == "__main__":
    root = Path(sys.argv[2])
    cells = tiny_cells(root, methods=("none", "ssd"))
    if len(sys.argv) > 3:
        (root / "net.py").write_text("def net(num_classes, channels): raise RuntimeError('no network')")
    standing = Standing(cells, root / "out", 2)
    with shown(standing) as tell:
        run_cells(cells, root / "out", jobs=2, told=lambda item, record: tell(standing.finish(item, record)))
"""


def test_a_benchmark_of_two_processes_in_a_terminal(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(BENCH)
    written = in_terminal([sys.executable, str(program), str(Path(__file__).parent), str(tmp_path)])
    lines = lines_of(written)
    assert max(map(len, lines)) <= COLUMNS
    assert any(re.match(r"models +\d/3 .*seed 0.*: [\d.]+ s", line) for line in lines), lines
    assert any("running" in line and "finished" in line for line in lines)
    last = lines[lines.index("A_f, A_r: accuracy of the last cell on forgotten, retained classes") - 4 :]
    end = [line.rstrip() for line in lines[-9:]]
    assert any(re.fullmatch(r"none +2/2 +[\d.]+% +[\d.]+%", line) for line in end), (end, last)
    assert any(re.fullmatch(r"ssd +2/2 +[\d.]+% +[\d.]+%", line) for line in end)
    assert any(line.endswith("7 of 7 finished, 0 failed") for line in end)


def test_a_benchmark_that_fails_in_a_terminal(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(BENCH)
    written = in_terminal([sys.executable, str(program), str(Path(__file__).parent), str(tmp_path), "fail"])
    told = " ".join(" ".join(lines_of(written)).split())
    assert "FAILED: InputError" in told
    assert "no network" in told
    assert "7 of 7 finished, 7 failed" in told


def drawn(board: Board | Bars, height: int = LINES) -> list[str]:
    console = Console(file=StringIO(), width=COLUMNS, height=height, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(board._drawn())
    return captured.get().splitlines()


def record(seconds: float, status: str = "done", kind: str = "cell") -> dict[str, Any]:
    about = {"status": status, "seconds": seconds, "kind": kind, "error": {"type": "ValueError", "message": "no"}}
    return {"item": about, "metrics": {"after": {"forget_accuracy": 0.25, "retain_accuracy": 0.75}}, "training": None}


def console(height: int = LINES) -> Console:
    return Console(file=StringIO(), width=COLUMNS, height=height, force_terminal=True, color_system=None)


def test_the_board_tells_what_runs_and_how_long(tmp_path: Path) -> None:
    cells = tiny_cells(tmp_path, methods=("none", "ssd"))
    tuning = Tuning(
        original=cells[0].original, forget=("3",), method="ssd", preset="default", trials=3, retain_per_class=20
    )
    cells.append(Cell(original=cells[0].original, forget=("3",), method="ssd", tuning=tuning))
    standing = Standing(cells, tmp_path, 1)
    board = Board(standing, console())
    assert any("0 of 9 finished, 0 failed, 0 running, time left not known yet" in line for line in drawn(board))
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / f"{tuning.id}.lock").write_text("")
    for item in standing.items[:3]:
        kind = "original" if isinstance(item, Original) else "cell" if isinstance(item, Cell) else "reference"
        board.tell(standing.finish(item, record(4.0, kind=kind)))
    board.tell(standing.finish(cells[1], record(2.0)))
    lines = drawn(board)
    row = next(line for line in lines if line.startswith("ssd"))
    assert re.search(r"^ssd +1/4 +25\.0% +75\.0% searching settings, 3: [\d.]+ s, usually 6\.0 s", row), row
    assert any("last: ssd, default, 3, seed 0: A_f 25.0%, A_r 75.0%; 2.0 s" in line for line in lines)
    # a reference and a cell of none, one of ssd as the one before, a tuned one, and a search of three runs
    assert any("4 of 9 finished, 0 failed, 1 running, about 18 s left" in line for line in lines), lines
    os.utime(tmp_path / "locks" / f"{tuning.id}.lock", (0, 0))  # whoever had it was killed
    assert leased(tmp_path) == set()
    assert all("searching" not in line for line in drawn(board))


def test_a_low_window_shows_what_runs(tmp_path: Path) -> None:
    cells = tiny_cells(tmp_path, methods=sorted(METHODS))
    standing = Standing(cells, tmp_path, 2)
    (tmp_path / "locks").mkdir()
    for method in ("unsir", "bad_teacher"):
        busy = next(cell for cell in cells if cell.method == method)
        (tmp_path / "locks" / f"{busy.id}.lock").write_text("")
    done = next(cell for cell in cells if cell.method == "jit")
    standing.finish(done, record(1.0, "failed"))
    board = Board(standing, console(12))
    lines = drawn(board, 12)
    assert len(lines) <= 11
    assert {line.split("  ")[0] for line in lines[1:]} >= {"bad teacher", "jit", "unsir"}
    assert any("18 rows more. A_f" in line for line in lines), lines
    board.close()
    assert len(drawn(board)) > len(METHODS)


def test_signals_are_shown_whole() -> None:
    shown = console()
    bars = Bars(shown)
    journal = Journal(bars)
    signals = Signals(
        phase="impair", step=1, impressions_called={"retained": 1.0, "blend": 1.0, "noise": 1.0},
        class_probability=1.0, retain_accuracy=1.0, retain_agreement=1.0, retain_divergence=0.0,
    )  # fmt: skip
    with journal.phase("impair", steps=4) as meter:
        meter.step(loss=1.0, samples=1)
        journal.signal(signals)
        lines = drawn(bars)
    told = "impressions still called: retained 100%, blend 100%, noise 100%; accuracy 100.0%"
    assert lines[-1] == told
    assert len(told) <= COLUMNS
    assert re.match(r"impair +━+ +1/4 +0\.0 s left  loss 1\.000", lines[0]), lines


def test_parts_are_one_row_and_what_is_inside_them_none() -> None:
    shown = console()
    bars = Bars(shown)
    journal = Journal(bars)
    for number, role in enumerate(("original", "unlearned"), 1):
        with journal.phase(f"few_shot {role}", steps=None, part=Part("few_shot", number, 6)):
            with journal.phase("1-shot recovery", steps=2):
                pass
            lines = drawn(bars)
    assert re.match(r"few shot unlearned +0\.0 s  2 of 6, about 0\.0 s left", lines[-1]), lines
    bars.settle()
    assert isinstance(shown.file, StringIO)
    assert re.fullmatch(r"few shot +0\.0 s *\n", shown.file.getvalue())
    assert [phase.name for phase in journal.phases] == [
        "1-shot recovery", "few_shot original", "1-shot recovery", "few_shot unlearned",
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["demo", "train", "forget", "audit", "bench", "report", "verify", "sign", "log"])
def test_help_fits_80_columns(command: str) -> None:
    done = entry([command, "--help"], env={"COLUMNS": "80"})
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= COLUMNS
    own = [line for line in lines if "--help" not in line]
    assert not [line for line in own if "<bool>" in line or "range>" in line], own
    prose = [line for line in lines[3:] if line.startswith(" ")][:-1]
    short = [line for line, after in pairwise(prose) if line.strip() and after.strip()]
    assert all(len(line) > 55 for line in short), short  # no paragraph keeps the line breaks of its docstring


def test_help_names_every_method() -> None:
    assert set(METHODS) == set(re.findall(r"[a-z_0-9]+", options.METHOD_HELP)) - {"or", "to", "compare", "with"}


def test_what_signals_cannot_say_is_said() -> None:
    found: dict[str, Any] = {
        "reached": None, "why": "nothing is known", "trials": [], "rounds": 1, "repair_rate": 0.001, "batch_size": 64,
        "held_out": 0, "trained_on": 36,
    }  # fmt: skip
    told = " ".join(answers._calibrated(found))
    assert "Signals read without forget data: they can say nothing; nothing is known." in told
    assert "signals read on 36 retained images that are trained on too, and on class impressions" in told


def test_help_names_every_attack() -> None:
    assert set(AUDITS) == set(re.findall(r"[a-z_]+", options.AUDIT_HELP.partition("all of ")[2]))


def test_a_sentence_is_broken_between_words_and_whole_in_a_pipe() -> None:
    shown = console()
    say(shown, Text("one two " * 20), indent=2)
    assert isinstance(shown.file, StringIO)
    lines = shown.file.getvalue().splitlines()
    assert len(lines) > 1
    assert all(line.startswith("  ") and set(line.split()) == {"one", "two"} for line in lines)
    piped = Console(file=StringIO(), width=COLUMNS)
    say(piped, Text("one two " * 20), indent=2)
    assert isinstance(piped.file, StringIO)
    assert len(piped.file.getvalue().splitlines()) == 1


def test_a_seed_that_is_none() -> None:
    result = invoke("demo", "--seed", "-1")
    assert result.exit_code == 2
    assert "-1 is not a whole number from 0 to 2**63 - 1" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.04, "0.0 s"), (9.9, "9.9 s"), (9.96, "10 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h")]
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told
