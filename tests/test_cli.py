from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from expunge import cli, commands, data, weights
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal
from expunge.methods import METHODS
from expunge.schema import Split, TrainConfig
from expunge.weights import Metadata, load_weights
from expunge.workspace import DataOptions

FILE = """
from torch import nn

def build(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(256, num_classes),
    )
"""
SETTINGS: tuple[str, ...] = ("noise_per_class=8", "noise_steps=4", "impair.steps=4", "repair.steps=8", "impressions=8")
SETTINGS += ("calibration.evidence=2", "calibration.trials=1", "calibration.rounds=1", "calibration.cycles=1")
FAST = [word for setting in SETTINGS for word in ("--set", setting)]
CLASSES = tuple("0123456789")


class Trained:
    """A model of the digits, its retrained reference, and folders of images to go with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "net.py"
        self.file.write_text(FILE)
        self.model = f"{self.file}:build"
        self.weights = root / "w.safetensors"
        self.retrained = root / "r.safetensors"
        config = TrainConfig(epochs=3, lr=0.01, optimizer="adamw", schedule="one_cycle", batch_size=64)
        options = DataOptions(spec="digits")
        commands.train_command(options, self.model, self.weights, config=config)
        commands.train_command(options, self.model, self.retrained, config=config, leave_out=["3"])

    def arguments(self, out: Path, *more: str, classes: str = "3", source: str = "digits") -> list[str]:
        words = ["forget", "--weights", str(self.weights), "--data", source, "--classes", classes, "--out", str(out)]
        words += ["--model", self.model]
        return [*words, *FAST, *more]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def entry(
    arguments: Sequence[str], env: dict[str, str] | None = None, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expunge", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        preexec_fn=before,
        check=False,
    )


def assert_refused(code: int, stderr: str, message: str, out: Path | None = None) -> None:
    lines = stderr.splitlines()
    assert code == 2, stderr
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert out is None or not out.is_dir() or not list(out.rglob("*")), "something was written"


def refuse(message: str, out: Path | None, *arguments: str) -> None:
    result = invoke(*arguments)
    assert not isinstance(result.exception, Exception), result.exception
    assert_refused(result.exit_code, result.stderr, message, out)


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "record.json").read_text())
    return record


def write_digits(folder: Path, labels: Sequence[int], each: int = 3) -> Path:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in labels:
        (folder / str(label)).mkdir(parents=True)
        for row in np.flatnonzero(digits.target == label)[:each]:
            Image.fromarray((digits.images[row] * 15).astype(np.uint8)).save(folder / str(label) / f"{row}.png")
    return folder


# What goes well


def test_train(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "w.safetensors"
    words = ["train", "--data", "digits", "--model", trained.model, "--epochs", "1", "--without", "3,zero"]
    refuse("cannot leave out all 10 classes", tmp_path, *words[:-1], ",".join(CLASSES), "--out", str(out))
    refuse("expected --out to end in .safetensors", tmp_path, *words[:-2], "--out", str(tmp_path / "w.pt"))
    refuse("unknown class 'zero'", tmp_path, *words, "--out", str(out))
    result = invoke(*words[:-1], "3,0", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert "after 1 epoch," in result.stdout
    assert list(tmp_path.iterdir()) == [out]
    metadata = load_weights(out)[1]
    assert (metadata.model, metadata.never_seen) == (trained.model, ("0", "3"))
    assert metadata.training is not None
    assert metadata.training["config"]["flip"] is False  # a mirrored digit is another
    stuck = invoke(*words[:5], "--epochs", "1", "--lr", "1e-9", "--out", str(tmp_path / "stuck.safetensors"))
    assert "(a guess has 10.0%) after 1 epoch," in stuck.stdout


def test_forget(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    done = entry(trained.arguments(out, "--retrained", str(trained.retrained)))
    assert done.returncode in (0, 1), done.stderr
    assert "Forgotten at the output" in done.stdout
    read = record_of(out)["samples_read"]
    handed, reads = (sum(read[name].values()) for name in ("retain_sample", "method"))
    assert reads != handed  # each image is read several times
    told = f"The method was handed {handed:,} retained images. Repeats counted, it read {reads:,} of retained classes"
    assert f"{told} and 0 of the forgotten ones; measuring read 37 held-out images of those." in done.stdout
    assert "salted hashes of the images it was handed" in done.stdout
    assert {path.name for path in out.iterdir()} >= {"unlearned.safetensors", "record.json"}
    record = record_of(out)
    assert record["classes"]["forget"] == ["3"]
    assert record["samples_read"]["method"]["3"] == 0
    assert min(count for name, count in record["samples_read"]["method"].items() if name != "3") > 0
    assert record["metrics"]["before"]["forget_accuracy"] > 0.5
    assert record["metrics"]["retrained"]["forget_accuracy"] == 0
    assert done.returncode == int(False in [record["checks"][name] for name in ("forgotten", "kept", "signals")])
    metadata = load_weights(out / "unlearned.safetensors")[1]
    assert (metadata.forgotten, metadata.class_names) == (("3",), CLASSES)


def test_a_calibrated_run_tells_what_it_found(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    words = [word for word in trained.arguments(out) if word not in FAST]
    result = invoke(*words, "--set", "calibration.evidence=6", "--set", "repair.steps=150")
    assert result.exit_code in (0, 1), result.stderr
    record = record_of(out)
    found = record["calibration"]
    assert record["checks"]["signals"] is found["reached"]
    assert result.exit_code == int(False in [record["checks"][name] for name in ("forgotten", "kept", "signals")])
    assert record["config"]["calibration"]["evidence"] == 6
    told = " ".join(result.stdout.split())
    assert f"the goal is {'reached' if found['reached'] else 'NOT REACHED'}; {found['why']}." in told
    assert f"signals read on {found['held_out']} held-out" in told
    known = record["metrics"]["before"]["masked_retain_accuracy"]
    change = 100 * (record["metrics"]["after"]["retain_accuracy"] - known)
    assert f"({change:+.1f} points to the original's {100 * known:.1f}% where it may not answer" in told
    for trial in found["trials"]:
        came = {"left": "some left for repair"}.get(trial["outcome"], trial["outcome"])
        assert f"{trial['rate']:.3g} ({came} after {trial['steps']} steps)" in told
    assert "impair: " in result.stderr
    assert "still called: retained" in result.stderr
    assert record["samples_read"]["method"]["3"] == 0


def test_without_a_calibration_no_signals_are_read(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    words = [word for word in trained.arguments(out) if word not in FAST]
    result = invoke(*words, "--preset", "paper", "--set", "noise_steps=2", "--set", "noise_per_class=2")
    assert result.exit_code in (0, 1), result.stderr
    record = record_of(out)
    assert (record["checks"]["signals"], record["calibration"]) == (None, None)
    assert "signals" not in result.stdout
    assert result.exit_code == int(False in (record["checks"]["forgotten"], record["checks"]["kept"]))


def test_a_goal_that_is_not_reached_is_said_and_exits_with_1(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    words = [word for word in trained.arguments(out) if word not in FAST]
    plan = ("called=1e-9", "probability=1e-9", "trials=1", "rounds=1", "cycles=1", "evidence=6")
    settings = [f"calibration.{value}" for value in plan]
    settings += ["impair.steps=2", "impair.lr=1e-7", "repair.steps=2", "repair.lr=1e-7", "noise_steps=2"]
    result = invoke(*words, *[word for setting in settings for word in ("--set", setting)])
    assert result.exit_code == 1, result.stderr
    assert "the goal is NOT REACHED; after 1 round" in " ".join(result.stdout.split())
    record = record_of(out)
    assert record["checks"]["signals"] is False
    assert record["calibration"]["reached"] is False
    assert [trial["outcome"] for trial in record["calibration"]["trials"]] == ["left"]
    assert record["checks"]["forgotten"] is False  # on held-out images too


def test_a_calibrated_request_goes_on_from_an_earlier_one(tmp_path: Path, trained: Trained) -> None:
    first = [word for word in trained.arguments(tmp_path / "a") if word not in FAST]
    assert invoke(*first).exit_code in (0, 1)
    assert record_of(tmp_path / "a")["metrics"]["after"]["forget_accuracy"] <= 0.01
    unlearned = str(tmp_path / "a" / "unlearned.safetensors")
    out = tmp_path / "b"
    again = ["forget", "--weights", unlearned, "--data", "digits", "--classes", "5", "--model", trained.model]
    again += ["--out", str(out)]
    with_threes = str(write_digits(tmp_path / "threes", (0, 1, 2, 3, 4)))
    refuse("has 3 images of a forgotten class (3)", out, *again, "--retain", with_threes)
    assert invoke(*again).exit_code in (0, 1)
    after = record_of(out)["metrics"]["after"]
    assert after["forget_accuracy"] <= 0.01
    assert after["per_class_accuracy"]["3"] <= 0.01
    assert record_of(out)["samples_read"]["method"]["3"] == 0


def test_quiet_prints_nothing_json_the_record_alone_and_the_seed_decides(tmp_path: Path, trained: Trained) -> None:
    for name, option in (("first", "--quiet"), ("second", "--json")):
        result = invoke(*trained.arguments(tmp_path / name, option, "--seed", "4"))
        assert result.exit_code in (0, 1)
        told = (tmp_path / name / "record.json").read_text(encoding="utf-8") if option == "--json" else ""
        assert (result.stdout, result.stderr) == (told, "")
    first, second = (load_weights(tmp_path / name / "unlearned.safetensors")[0] for name in ("first", "second"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_forgetting_goes_on_from_what_was_forgotten(tmp_path: Path, trained: Trained) -> None:
    assert invoke(*trained.arguments(tmp_path / "a")).exit_code in (0, 1)
    unlearned = str(tmp_path / "a" / "unlearned.safetensors")
    again = ["forget", "--weights", unlearned, "--data", "digits", "--classes", "5", "--model", trained.model, *FAST]
    assert invoke(*again, "--out", str(tmp_path / "b")).exit_code in (0, 1)
    record = record_of(tmp_path / "b")
    assert record["classes"]["forgotten_before"] == ["3"]
    assert (record["samples_read"]["method"]["3"], record["samples_read"]["method"]["5"]) == (0, 0)
    assert load_weights(tmp_path / "b" / "unlearned.safetensors")[1].forgotten == ("3", "5")


def test_a_class_that_is_not_known_is_not_called_forgotten(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    again = ["--weights", str(trained.retrained)]  # trained without the threes, and says so
    told = "nothing to forget: the weights say that 3 was forgotten before or never seen"
    refuse(told, out, *trained.arguments(out, *again))
    refuse(told, out, *trained.arguments(out, *again, classes="3,5"))
    assert invoke(*trained.arguments(tmp_path / "five", *again, "--quiet", classes="5")).exit_code in (0, 1)
    told = "nothing to forget: the weights say that 3, 5 were forgotten before or never seen"
    refuse(
        told, out, *trained.arguments(out, "--weights", str(tmp_path / "five" / "unlearned.safetensors"), classes="3,5")
    )

    torch.save(load_weights(trained.retrained)[0], tmp_path / "silent.pt")
    words = [word for word in trained.arguments(out, "--weights", str(tmp_path / "silent.pt")) if word not in FAST]
    done = invoke(*words, "--method", "none")
    assert done.exit_code == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "Forgotten at the output: unknown (0.0%), the original hardly knew it (0.0%)." in told
    assert "Note: the original hardly knows 3: on held-out images it is not surely above chance (10.0%)" in told
    assert record_of(out)["checks"]["forgotten"] is None
    assert "Repeats counted, it read 0 of retained classes and 0 of the forgotten ones;" in told  # by doing nothing
    assert any("the original hardly knows 3" in note for note in record_of(out)["notes"])


def test_where_held_out_images_come_from_is_said(tmp_path: Path, trained: Trained) -> None:
    def told(out: Path, *more: str, classes: str = "3", source: str = "digits") -> tuple[str, bool]:
        words = [word for word in trained.arguments(out, *more, classes=classes, source=source) if word not in FAST]
        done = invoke(*words, "--method", "none")
        assert done.exit_code in (0, 1), done.stderr
        record, note = record_of(out), "the data has no test split: a fifth of each class, always the same, was cut off"
        assert any(note in one for one in record["notes"]) is (f"Note: {note}" in done.stdout)
        return record["data"]["test_from"], note in done.stdout

    assert told(tmp_path / "ours") == ("cut off", False)  # trained by expunge on the same, say the weights,
    unlearned = str(tmp_path / "ours" / "unlearned.safetensors")
    assert told(tmp_path / "later", "--weights", unlearned, classes="5") == ("cut off", False)  # and what came of them
    torch.save(load_weights(trained.weights)[0], tmp_path / "silent.pt")
    assert told(tmp_path / "silent", "--weights", str(tmp_path / "silent.pt")) == ("cut off", True)
    folder = write_digits(tmp_path / "other", range(10), each=6)
    assert told(tmp_path / "other-data", source=str(folder)) == ("cut off", True)
    folder.rename(tmp_path / "train")
    write_digits(tmp_path / "both" / "test", range(10))
    (tmp_path / "train").rename(tmp_path / "both" / "train")
    assert told(tmp_path / "split", source=str(tmp_path / "both")) == ("test split", False)


@pytest.mark.parametrize(("option", "drawn"), [(("--retain-per-class", "20"), 20), (("--retain-share", ".1"), 15)])
def test_forget_samples_are_drawn_as_retained_ones_are(
    tmp_path: Path, trained: Trained, option: tuple[str, str], drawn: int
) -> None:
    words = [word for word in trained.arguments(tmp_path / "out", *option) if word not in FAST]
    assert invoke(*words, "--method", "delete").exit_code in (0, 1)
    assert record_of(tmp_path / "out")["samples_read"]["method"]["3"] == 20 * drawn  # so many passes


def test_dropping_forgotten_images_is_counted(tmp_path: Path, trained: Trained) -> None:
    retain = str(write_digits(tmp_path / "retain", range(10)))
    out = tmp_path / "out"
    refuse("has 3 images of a forgotten class (3)", out, *trained.arguments(out, "--retain", retain))
    result = invoke(*trained.arguments(out, "--retain", retain, "--drop-forgotten"))
    assert result.exit_code in (0, 1), result.stderr
    record = record_of(out)
    assert record["data"]["dropped_forgotten"] == 3
    assert record["data"]["retain_samples"] == 27
    assert record["samples_read"]["method"]["3"] == 0


def test_held_out_images_in_a_retain_sample_are_a_note(tmp_path: Path, trained: Trained) -> None:
    data = write_digits(tmp_path / "data", range(10), each=6)
    shutil.copytree(data, tmp_path / "copy")
    for retain, told in ((tmp_path / "data" / ".." / "data", False), (tmp_path / "copy", True)):
        out = tmp_path / f"out-{told}"
        words = trained.arguments(out, "--retain", f"{retain}/", "--drop-forgotten", "--quiet", source=str(data))
        assert invoke(*words).exit_code in (0, 1)
        found = [note for note in record_of(out)["notes"] if "held-out images are in the retain sample too" in note]
        assert bool(found) == told
        assert record_of(out)["data"]["retain_samples"] == (54 if told else 45)


def test_the_weights_that_are_read_are_not_written_over(tmp_path: Path, trained: Trained) -> None:
    first = tmp_path / "first"
    first.mkdir()
    shutil.copy(trained.weights, first / "unlearned.safetensors")
    words = trained.arguments(first, "--overwrite")
    words[words.index("--weights") + 1] = str(first)
    result = invoke(*words)
    assert result.exit_code == 2
    assert "is what would be written over" in result.stderr
    assert (first / "unlearned.safetensors").read_bytes() == trained.weights.read_bytes()


def test_a_class_without_retained_images_is_a_note(tmp_path: Path, trained: Trained) -> None:
    retain = str(write_digits(tmp_path / "retain", [0, 1, 2, 4, 5, 6, 7, 8]))
    result = invoke(*trained.arguments(tmp_path / "out", "--retain", retain))
    assert result.exit_code in (0, 1), result.stderr
    assert "no retained image of 9" in result.stdout
    assert any("no retained image of 9" in note for note in record_of(tmp_path / "out")["notes"])


def test_bad_images_are_named_or_skipped_and_counted(tmp_path: Path, trained: Trained) -> None:
    retain = write_digits(tmp_path / "retain", [0, 1, 2])
    (retain / "1" / "broken.png").write_bytes(b"hello")
    out = tmp_path / "out"
    refuse("broken.png", out, *trained.arguments(out, "--retain", str(retain)))
    assert invoke(*trained.arguments(out, "--retain", str(retain), "--skip-bad")).exit_code in (0, 1)
    assert record_of(out)["data"]["skipped_bad"] == 1
    assert record_of(out)["data"]["retain_samples"] == 9


def test_images_that_are_streamed(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(*trained.arguments(tmp_path / "staged")).exit_code in (0, 1)
    monkeypatch.setattr(data, "HELD_BYTES", 20_000)
    streamed = invoke(*trained.arguments(tmp_path / "streamed"))
    assert not isinstance(streamed.exception, Exception), streamed.exception
    before = [record_of(tmp_path / name)["metrics"]["before"] for name in ("staged", "streamed")]
    assert before[0] == before[1]


def test_a_bad_image_in_a_stream_is_one_line(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "HELD_BYTES", 100)
    retain = write_digits(tmp_path / "retain", [0, 1, 2])
    (retain / "1" / "broken.png").write_bytes(b"hello")
    out = tmp_path / "out"
    refuse("broken.png", out, *trained.arguments(out, "--retain", str(retain), "--quiet"))


@pytest.mark.parametrize("held", [data.HELD_BYTES, 100])  # in memory, or streamed
def test_a_bad_held_out_image_is_told_before_the_work(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    def run(_: nn.Module, split: Split, *__: Any, **___: Any) -> nn.Module:
        raise ArithmeticError(f"the method began with {split.forget}, {split.test}")

    monkeypatch.setattr(data, "HELD_BYTES", held)
    monkeypatch.setitem(METHODS, "unsir", replace(METHODS["unsir"], run=run))
    for part in ("train", "test"):
        write_digits(tmp_path / "digits" / part, range(10))
    out = tmp_path / "out"
    words = trained.arguments(out, "--quiet", source=str(tmp_path / "digits"))
    assert str(invoke(*words).exception) == "70"  # of the good ones, which it is not handed
    (tmp_path / "digits" / "test" / "3" / "broken.png").write_bytes(b"hello")
    refuse("broken.png", out, *words)


def test_columns_may_be_of_the_retain_sample_alone(tmp_path: Path, trained: Trained) -> None:
    folder = write_digits(tmp_path / "digits", range(10), each=6)
    out, words = tmp_path / "out", ("--label-column", "b", "--quiet")
    refuse("--label-column means nothing to", None, *trained.arguments(out, *words, source=str(folder)))
    path = tmp_path / "retain"
    path.mkdir()
    files = sorted((folder / "1").iterdir())
    pq.write_table(pa.table({"image": [one.read_bytes() for one in files], "b": ["1"] * 6}), path / "train.parquet")
    done = invoke(*trained.arguments(out, *words, "--retain", str(path), source=str(folder)))
    assert done.exit_code in (0, 1), done.stderr
    train = ("train", "--model", trained.model, "--data", str(folder), "--out", str(out / "w.safetensors"))
    refuse("--image-column means nothing to", None, *train, "--image-column", "a")


def test_parquet_with_two_label_columns(tmp_path: Path, trained: Trained) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    columns = {"image": [buffer.getvalue()] * 4, "a": [0, 1, 2, 3], "b": [0] * 4}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "train.parquet")
    out = tmp_path / "out"
    refuse("--label-column", out, *trained.arguments(out, source=str(tmp_path / "data")))


# Mistakes in what was given


def test_nothing_to_train_on_can_be_decoded(tmp_path: Path, trained: Trained) -> None:
    folder = write_digits(tmp_path / "digits", range(3), each=2)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"hello")
    out = tmp_path / "w.safetensors"
    words = ["train", "--data", str(folder), "--model", trained.model, "--out", str(out), "--skip-bad", "--quiet"]
    refuse("could decode none of the 3 images that were tried", None, *words)
    refuse("could decode none of the 3 images that were tried", None, *words, "--size", "8")
    words += ["--size", "8", "--channels", "1", "--mean", "0", "--std", "1"]
    refuse("expected images that can be decoded in", None, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("cat", "unknown class 'cat': expected one of 0, 1, 2"),
        (",".join(CLASSES), "cannot forget all 10 classes"),
        ("", "expected at least one class to forget"),
        ("10", "class index 10 is out of range: expected 0 to 9"),
        ("-1", "class index -1 is out of range"),
    ],
)
def test_classes(tmp_path: Path, trained: Trained, classes: str, message: str) -> None:
    refuse(message, tmp_path / "out", *trained.arguments(tmp_path / "out", classes=classes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--size 0", "expected --size N or HxW in pixels, got '0'"),
        ("--size 8x8x8", "expected --size"),
        ("--size ²", "expected --size"),
        ("--size 4", "the model does not take images of shape (1, 4, 4)"),
        ("--mean 0.5,0.5 --std 1,1", "expected 1 values for --mean and --std, got 2 and 2"),
        ("--mean 0.5", "--mean and --std together"),
        ("--mean a --std 1", "expected --mean as numbers"),
        ("--mean 0.5 --std 0", "positive stds"),
        ("--mean nan --std 1", "finite means"),
        ("--channels 2", "expected --channels 1 or 3"),
        ("--channels 3", "the weights in"),
        ("--retain-per-class 0", "at least one retained image a class, got 0"),
        ("--retain-share 0", "retain share above 0"),
        ("--retain-share 2", "retain share above 0"),
        ("--retain-share 0.5 --retain-per-class 5", "got both"),
        ("--drop-forgotten", "--drop-forgotten means nothing without --retain"),
        ("--label-column x", "--label-column means nothing to 'digits', which has no columns"),
        ("--image-column x", "--image-column means nothing to 'digits', which has no columns"),
        ("--retain /no/such/folder", "no data at '/no/such/folder'"),
        ("--data /no/such/folder", "no data at '/no/such/folder'"),
        ("--weights /no/such/file", "no weights file at '/no/such/file'"),
        ("--retrained /no/such/file", "no weights file at '/no/such/file'"),
        ("--method magic", "unknown method 'magic': expected"),
        ("--preset magic", "unknown preset 'magic': expected one of default, fast, paper, notebook"),
        ("--set impair.lr", "expected name=value"),
        ("--set impair.rate=1", "no setting 'rate'"),
        ("--set impair.lr=fast", "expected a value of type float"),
        ("--set impair.lr=-1", "expected a positive learning rate"),
        ("--set impair.optimizer=magic", "expected one of adam, adamw, sgd in 'impair.optimizer=magic', got 'magic'"),
        ("--set impair.mode=xx", "expected one of train, batch, eval in 'impair.mode=xx', got 'xx'"),
        ("--set impair.clip_value=-1", "expected a clip_value above 0, got -1"),
        ("--set impair.weight_decay=-1", "weight_decay"),
        ("--set impair.crop=8 --quiet", "expected a crop below the image size"),
        ("--set noise_steps=0", "expected noise_steps of at least 1"),
        ("--device magic", "cannot use device 'magic'"),
        ("--model magic", "unknown model 'magic'"),
        ("--model torchvision:magic", "cannot build model"),
        ("--class-names a,b", "the data has classes that the model does not name"),
    ],
)
def test_options(tmp_path: Path, trained: Trained, options: str, message: str) -> None:
    refuse(message, tmp_path / "out", *trained.arguments(tmp_path / "out"), *options.split())


def test_a_seed_beyond_64_bits(tmp_path: Path, trained: Trained) -> None:
    assert invoke(*trained.arguments(tmp_path / "out", "--seed", "9" * 30)).exit_code == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('one\\ntwo')", "RuntimeError: one"),
        ("def build(num_classes): raise RuntimeError('one\\ntwo')", "RuntimeError: one"),
        ("def build(num_classes): raise SystemExit(0)", "SystemExit"),
        ("def other(): pass", "has no function 'build'"),
        ("build = lambda: 3", "got int"),
    ],
)
def test_model_file_that_fails(tmp_path: Path, trained: Trained, code: str, message: str) -> None:
    (tmp_path / "net.py").write_text(code)
    more = ["--model", f"{tmp_path / 'net.py'}:build", "--channels", "1"]
    refuse(message, tmp_path / "out", *trained.arguments(tmp_path / "out", *more))


def test_empty_retain_sample(tmp_path: Path, trained: Trained) -> None:
    retain = str(write_digits(tmp_path / "retain", [3]))
    out = tmp_path / "out"
    more = ["--retain", retain, "--drop-forgotten", "--class-names", ",".join(CLASSES)]
    refuse("expected a retain sample", out, *trained.arguments(out, *more))
    (tmp_path / "empty").mkdir()
    refuse("found none", out, *trained.arguments(out, "--retain", str(tmp_path / "empty")))


def test_nothing_is_left_to_retain(tmp_path: Path, trained: Trained) -> None:
    state, metadata = load_weights(trained.weights)
    path = tmp_path / "w.safetensors"
    save_file(state, path, metadata=_header(metadata))
    out = tmp_path / "out"
    words = ["forget", "--weights", str(path), "--data", "digits", "--classes", "0,1,2,3,4,5", "--out", str(out)]
    refuse("whose code would be run: confirm it with --model", out, *words)
    refuse("expected images of a class to keep", out, *words, "--model", trained.model)


def _header(metadata: Metadata) -> dict[str, str]:
    forgotten = {"model": metadata.model, "class_names": CLASSES, "forgotten": ["6", "7", "8", "9"]}
    return {weights.METADATA_KEY: json.dumps(forgotten)}


def test_retrained_reference_that_saw_the_class(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    refuse("was trained with a class", out, *trained.arguments(out, "--retrained", str(trained.weights)))
    refuse("was trained with a class", out, *trained.arguments(out, "--retrained", str(trained.retrained), classes="4"))


def test_the_original_itself_is_no_retrained_model(tmp_path: Path, trained: Trained) -> None:
    out, same = tmp_path / "out", tmp_path / "same.pt"
    torch.save(dict(load_weights(trained.weights)[0]), same)  # which says nothing of how it was trained
    refuse(
        "holds the original weights: expected a model trained without",
        out,
        *trained.arguments(out, "--retrained", str(same)),
    )


def test_weights_whose_classes_are_in_another_order_are_refused(tmp_path: Path, trained: Trained) -> None:
    out, silent = tmp_path / "out", tmp_path / "silent.pt"
    torch.save(dict(load_weights(trained.weights)[0]), silent)
    words = [silent if word == str(trained.weights) else word for word in trained.arguments(out)]
    turned = ",".join([*CLASSES[1:], CLASSES[0]])
    refuse(
        "less than a guess would: do weights, the order of class names",
        out,
        *map(str, words),
        "--class-names",
        turned,
        "-q",
    )


def test_a_single_class_is_nothing_to_train_on(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "only"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(folder / f"{number}.png")
    out = tmp_path / "w.safetensors"
    refuse(
        "expected two classes at least to train on, found only alone",
        out,
        "train",
        "--data",
        str(folder.parent),
        "--model",
        "allcnn",
        "--out",
        str(out),
    )


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"hello\n", "is not a safetensors file"),
        ("w.pt", b"hello\n", "is not a weights file"),
        ("w.safetensors", b"", "is not a safetensors file"),
        ("w.pt", b"", "is not a weights file"),
        ("w.pt", None, "could run code"),
        ("w.pt", {"0.weight": torch.ones(2)}, "do not fit the model: missing 0.bias"),
    ],
)
def test_weights_files(tmp_path: Path, trained: Trained, name: str, content: Any, message: str) -> None:
    marker = tmp_path / "ran"
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content or Bomb(marker), tmp_path / name)
    more = ["--model", trained.model, "--weights", str(tmp_path / name)]
    refuse(message, tmp_path / "out", *trained.arguments(tmp_path / "out", *more))
    assert not marker.exists()


def test_weights_of_other_classes_and_of_another_architecture(tmp_path: Path, trained: Trained) -> None:
    from expunge.models import AllCNN

    out = tmp_path / "out"
    save_file(AllCNN(7, 1).state_dict(), tmp_path / "seven.safetensors")
    more = ["--model", "allcnn", "--weights", str(tmp_path / "seven.safetensors")]
    refuse("have 7 outputs, the data has 10 classes", out, *trained.arguments(out, *more))
    save_file(AllCNN(10, 1, batch_norm=False).state_dict(), tmp_path / "plain.safetensors")
    more = ["--model", "allcnn", "--weights", str(tmp_path / "plain.safetensors")]
    refuse("missing features", out, *trained.arguments(out, *more))


def test_diverged(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    more = ["--set", "impair.lr=1e38", "--set", "impair.optimizer=sgd", "--set", "calibration.trials=2"]
    more += ["--set", "calibration.plenty=1", "--quiet"]
    refuse("of impair; nothing was kept: lower the learning rate (now 5e+37)", out, *trained.arguments(out, *more))


# Writing


def test_out_below_a_file(tmp_path: Path, trained: Trained) -> None:
    (tmp_path / "file").write_text("old")
    refuse("cannot write", None, *trained.arguments(tmp_path / "file" / "out"))
    refuse("cannot write", None, *trained.arguments(tmp_path / "file"))
    words = ["train", "--data", "digits", "--model", trained.model, "--out"]
    refuse("cannot write", None, *words, str(tmp_path / "file" / "w.safetensors"))
    (tmp_path / "w.safetensors").mkdir()
    refuse("it is a folder", None, *words, str(tmp_path / "w.safetensors"))
    assert (tmp_path / "file").read_text() == "old"


def test_full_disk(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    done = entry(
        trained.arguments(out, "--quiet"), before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    )
    assert_refused(done.returncode, done.stderr, "oo large", out)


def test_full_disk_at_the_record_leaves_what_was_there(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "unlearned.safetensors").write_text("old")

    def fail(_: Any) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        return write

    monkeypatch.setattr(commands, "json_writer", fail)
    refuse("No space left on device", None, *trained.arguments(out, "--quiet", "--overwrite"))
    assert [path.name for path in out.iterdir()] == ["unlearned.safetensors"]
    assert (out / "unlearned.safetensors").read_text() == "old"


@pytest.mark.parametrize(
    "name", ["record.json", "unlearned.safetensors", "report.html", "retain_sample.json", "images.json", "model.sig"]
)
def test_what_an_earlier_run_wrote_is_not_replaced_unasked(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(commands, "open_workspace", lambda *_, **__: pytest.fail("began to work"))
    (tmp_path / name).write_text("old")
    told = f"{tmp_path / name} is there already: name another --out, or pass --overwrite to replace it"
    refuse(told, None, *trained.arguments(tmp_path, "--quiet"))
    if name not in ("unlearned.safetensors", "retain_sample.json"):  # an audit writes neither
        words = ["audit", "--original", str(trained.weights), "--unlearned", str(trained.weights), "--data", "digits"]
        refuse(told, None, *words, "--classes", "3", "--out", str(tmp_path))
    if name == "unlearned.safetensors":
        words = ["train", "--data", "digits", "--model", trained.model, "--out", str(tmp_path / name)]
        refuse(told, None, *words)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "old")]


def test_an_erasure_is_replaced_where_that_is_asked_for(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    assert invoke(*trained.arguments(out)).exit_code in (0, 1)
    before = {path: path.read_bytes() for path in out.iterdir()}
    refuse("is there already", None, *trained.arguments(out, classes="5"))
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert invoke(*trained.arguments(out, "--overwrite", classes="5")).exit_code in (0, 1)
    assert record_of(out)["classes"]["forget"] == ["5"]


def test_training_replaces_weights_only_where_asked_and_goes_on_where_it_was(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "w.safetensors"
    words = ["train", "--data", "digits", "--model", trained.model, "--epochs", "1", "--out", str(out), "--quiet"]
    for more in ((), ("--overwrite",)):  # neither what is begun anew nor what replaces another
        with monkeypatch.context() as patch:
            patch.setattr(commands, "predict", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert invoke(*words, *more).exit_code == 130
        assert out.with_name("w.safetensors.resume").exists()
        assert invoke(*words, *more).exit_code == 0
        assert list(tmp_path.iterdir()) == [out]
        before = out.read_bytes()
        refuse("is there already", None, *words)
        assert out.read_bytes() == before


def test_a_demo_replaces_nothing_but_a_demo(tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "original.safetensors").write_bytes(trained.weights.read_bytes())
    refuse("original.safetensors is not of an earlier demo", None, "demo", "--out", str(out))
    (out / "original.safetensors").unlink()
    assert invoke(*trained.arguments(out)).exit_code in (0, 1)
    before = {path: path.read_bytes() for path in out.iterdir()}
    refuse("record.json is not of an earlier demo", None, "demo", "--out", str(out))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_reference_is_never_resumed_from_a_training_that_saw_the_class(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out, options = tmp_path / "w.safetensors", DataOptions(spec="digits")
    config = TrainConfig(epochs=1, batch_size=64)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "predict", interrupt)
        with pytest.raises(KeyboardInterrupt):
            commands.train_command(options, trained.model, out, config=config)
    with pytest.raises(InputError, match="unfinished training"):
        commands.train_command(options, trained.model, out, config=config, leave_out=["3"])


def test_interrupt_is_one_line(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "unsir", replace(METHODS["unsir"], run=interrupt))
    result = invoke(*trained.arguments(tmp_path / "out", "--quiet"))
    assert result.exit_code == 130
    assert result.stderr == "interrupted: nothing was written\n"
    assert not (tmp_path / "out").exists()


# The program itself


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["train"], ["forget"], ["audit"], ["report"], ["verify"], ["sign"], ["log"]]
)
def test_help(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version() -> None:
    from expunge import __version__

    assert invoke("--version").stdout == f"expunge {__version__}\n"


def test_the_program_starts_without_torch() -> None:
    code = "import sys, expunge.cli; print(sorted({'torch', 'numpy', 'timm', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("expunge")
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does when it has its lines
    try:
        done = subprocess.run(
            [str(program), "bench", "quick", "--out", str(tmp_path / "out"), "--dry-run"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_mistake_through_the_entry_point(tmp_path: Path, trained: Trained) -> None:
    done = entry(trained.arguments(tmp_path / "out", classes="cat"))
    assert_refused(done.returncode, done.stderr, "unknown class 'cat'", tmp_path / "out")
    assert done.stdout == ""


def test_shell_completion() -> None:
    program = Path(sys.executable).with_name("expunge")
    done = subprocess.run(
        [str(program)],
        env=os.environ | {"_EXPUNGE_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "complete -o default -F" in done.stdout
    assert "expunge" in done.stdout


def test_precision_is_of_every_training_and_in_the_record(trained: Trained, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        result = invoke(*trained.arguments(out, "--precision", precision))
        assert result.exit_code in (0, 1), result.output
        record = record_of(out)
        phases = record["cost"]["phases"]
        assert {phases[name]["precision"] for name in ("noise", "impressions", "impair", "repair")} == {precision}
        assert record["config"]["settings"][-2:] == [f"impair.precision={precision}", f"repair.precision={precision}"]
        assert (", bf16." in " ".join(result.output.split())) is (precision == "bf16")
    out = tmp_path / "none"
    refuse("expected precision auto, fp32 or bf16, got 'half'", out, *trained.arguments(out, "--precision", "half"))
    nothing = trained.arguments(out, "--precision", "bf16", "--method", "none")
    refuse("none trains nothing that could be done in bf16", out, *nothing)


def test_a_diverged_training_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    with pytest.raises(DivergedError):
        commands.train_command(
            DataOptions(spec="digits"), "allcnn?width=4", out, per_class=20, config=TrainConfig(epochs=2, lr=1e30)
        )
    assert list(tmp_path.iterdir()) == []


def test_train_says_what_it_went_without(tmp_path: Path) -> None:
    data, journal = write_digits(tmp_path / "data", (3, 4), each=20), Journal()
    (data / "5").mkdir()
    next((data / "4").iterdir()).write_bytes(b"no picture")
    options = DataOptions(spec=str(data), skip_bad=True)
    config = TrainConfig(epochs=1, batch_size=8)
    commands.train_command(options, "allcnn?width=4", tmp_path / "w.safetensors", config=config, journal=journal)
    assert journal.phases[0].note == "no image of 5 to train on; left out 1 images that cannot be decoded"
