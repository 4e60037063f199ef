"""Suites, tuning, cost and the command of the benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.csv
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from conftest import Tiny
from expunge import cli, commands
from expunge.bench.cells import Original, classes_name, model_name, slug
from expunge.bench.command import bench_command, plan
from expunge.bench.cost import FlopCount, measured, samples_of
from expunge.bench.standing import Standing
from expunge.bench.suites import CONTROLS, SUITES, Request, suite_cells
from expunge.bench.tuning import drawn_settings, score, tune
from expunge.config import override
from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods import METHODS
from expunge.report.rerun import rerun_bench
from expunge.schema import Phase, Split, TrainConfig
from expunge.weights import Metadata, load_weights, save_weights
from expunge.workspace import DataOptions
from test_bench_runner import NET, tiny_cells
from test_cli import write_digits

CIFAR = Request(data=DataOptions(spec="somewhere/cifar10"))


# Suites


def test_quick_has_every_method_by_default_and_tuned_where_there_is_a_range() -> None:
    cells = suite_cells("quick", Request())
    assert {cell.method for cell in cells} == set(METHODS)
    assert {cell.method for cell in cells if cell.tuning} == {name for name, one in METHODS.items() if one.space}
    assert len({cell.original.seed for cell in cells}) >= 2
    assert all(cell.seed == cell.original.seed for cell in cells)  # no draw is shared by the values of an interval
    assert {cell.tuning.trials for cell in cells if cell.tuning} == {4}  # the same for all
    assert all(cell.original.data == "digits" for cell in cells)


@pytest.mark.parametrize("name", [name for name in SUITES if name not in ("own", "paper")])
def test_ids_tell_cells_apart_and_are_folder_names(name: str) -> None:
    cells = suite_cells(name, CIFAR if SUITES[name].needs else Request())
    ids = [cell.id for cell in cells]
    assert len(set(ids)) == len(ids)
    assert all(len(one) < 200 and "/" not in one and " " not in one for one in ids)


def test_the_papers_grid(tmp_path: Path) -> None:
    for name in ("cifar10", "cifar100", "yaleb"):
        (tmp_path / name).mkdir()
    cells = suite_cells("paper", Request(data=DataOptions(spec=str(tmp_path))))
    assert len({cell.id for cell in cells}) == len(cells)
    ten = {cell.forget for cell in cells if cell.original.data == "cifar10"}
    assert ten == {("0",), ("1", "2"), ("3", "4", "5", "6"), ("3", "4", "5", "6", "7", "8", "9")}
    assert len({cell.original.model for cell in cells if cell.original.data == "cifar10"}) == 4
    assert {cell.original.data for cell in cells} == {"cifar10", "cifar100", "yaleb"}


def test_on_a_slice_originals_see_few_images_and_methods_a_fifth_of_them() -> None:
    whole = suite_cells("field", CIFAR)
    asked = replace(CIFAR, train_per_class=50)
    few = suite_cells("field", asked)
    assert [(cell.forget, cell.method, cell.seed) for cell in few] == [(c.forget, c.method, c.seed) for c in whole]
    assert not {cell.id for cell in few} & {cell.id for cell in whole}
    for cell in few:
        assert (cell.original.data, cell.original.per_class, cell.retain_per_class) == ("cifar10-50", 50, 10)
        assert cell.tuning is None or (cell.tuning.original.per_class, cell.tuning.retain_per_class) == (50, 10)
    assert len({cell.original for cell in few}) == 3  # one a training seed: shared by cells and searches
    assert {cell.tuning.original.id for cell in few if cell.tuning} <= {cell.original.id for cell in few}
    assert "--train-per-class 50" in rerun_bench({"suite": "field", "asked": {"train_per_class": 50}})


def test_the_papers_cifar100_is_told_by_its_hundred_classes(tmp_path: Path) -> None:
    features = Features({"img": Image(), "fine_label": ClassLabel(100), "coarse_label": ClassLabel(20)})
    picture = PIL.Image.new("RGB", (4, 4))
    rows = {"img": [picture], "fine_label": [99], "coarse_label": [19]}
    for name in ("cifar10", "cifar100", "yaleb"):
        (tmp_path / name).mkdir()
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "cifar100" / "train.parquet")
    cells = suite_cells("paper", Request(data=DataOptions(spec=str(tmp_path))))
    columns = {(cell.original.data, cell.original.options.label_column) for cell in cells}
    assert columns >= {("cifar10", None), ("cifar100", "fine_label")}


def test_only_some_cells_with_all_else_the_same() -> None:
    cells = suite_cells("quick", Request())
    asked = Request(only=("digits-*-t1-3-unsir-*", "*-scrub-tuned-*"))
    chosen = suite_cells("quick", asked)
    assert {(cell.method, cell.original.seed) for cell in chosen} == {("unsir", 1), *(("scrub", s) for s in range(3))}
    assert [cell for cell in cells if cell in chosen] == chosen
    command = rerun_bench({"suite": "quick", "asked": {"only": list(asked.only)}})
    assert command == "expunge bench quick --only 'digits-*-t1-3-unsir-*,*-scrub-tuned-*' --out again"


def test_ids_are_the_same_in_every_process_and_wherever_the_data_lies() -> None:
    code = "from expunge.bench.suites import *; print(*(c.id for c in suite_cells('quick', Request())))"
    env = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == [cell.id for cell in suite_cells("quick", Request())]
    elsewhere = Request(data=DataOptions(spec="elsewhere/cifar10"))
    assert [c.id for c in suite_cells("field", elsewhere)] == [c.id for c in suite_cells("field", CIFAR)]


def test_an_id_changes_with_what_changes_the_result(tmp_path: Path) -> None:
    cell = tiny_cells(tmp_path)[0]
    changed = [
        replace(cell, seed=1), replace(cell, settings=("a=1",)), replace(cell, retain_per_class=3),
        replace(cell, method="fisher"), replace(cell, forget=("4",)), replace(cell, preset="small"),
        replace(cell, original=replace(cell.original, seed=1)),
        replace(cell, original=replace(cell.original, options=DataOptions(spec="digits", memory=4096))),
    ]  # fmt: skip
    assert len({one.id for one in [cell, *changed]}) == len(changed) + 1
    recipe = replace(cell.original, recipe=TrainConfig(epochs=9))
    assert recipe.id != cell.original.id
    moved = replace(cell.original, model=f"other/{Path(cell.original.model).name}")
    assert moved.id == cell.original.id


def test_what_is_named_twice_counts_once() -> None:
    once, twice = Request(classes=(("3",),)), Request(classes=(("3", "3"), ("3",)))
    assert twice == once
    assert [cell.id for cell in suite_cells("quick", twice)] == [cell.id for cell in suite_cells("quick", once)]


def test_names() -> None:
    assert slug("Great White (shark)") == "great_white_shark"
    assert model_name("timm:vit_tiny_patch16_224?img_size=32") == "vit_tiny_patch16_224"
    assert model_name("allcnn?width=32") == "allcnn"
    assert model_name("some/where/net.py:build") == "net_build"
    assert classes_name(("3", "cat")) == "3+cat"
    assert classes_name([str(number) for number in range(30)]) == "30classes"


@pytest.mark.parametrize(
    ("suite", "request_", "message"),
    [
        ("magic", Request(), "unknown suite 'magic': expected one of quick, slice"),
        ("field", Request(), "the suite field needs --data"),
        ("own", CIFAR, "the suite own needs --weights"),
        ("quick", CIFAR, "--data means nothing to the suite quick"),
        ("quick", Request(methods=("magic",)), "unknown method 'magic'"),
        ("quick", Request(seeds=0), "expected --seeds of at least 1"),
        ("quick", Request(trials=0), "expected --trials of at least 1"),
        ("paper", CIFAR, "expected a folder cifar100"),
        ("slice", replace(CIFAR, train_per_class=50), "--train-per-class means nothing to the suite slice"),
        ("field", replace(CIFAR, train_per_class=4), "expected --train-per-class of at least 5, got 4"),
        ("quick", Request(only=("digit",)), "no cell of the suite quick matches --only digit: .* as in digits-"),
    ],
)
def test_mistakes(suite: str, request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        suite_cells(suite, request_)


def test_mistakes_that_the_data_shows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="class index 12 is out of range"):
        plan("quick", Request(classes=(("12",),)), tmp_path)
    with pytest.raises(InputError, match="no data at"):
        plan("field", Request(data=DataOptions(spec="/no/such/folder")), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        plan("quick", Request(), tmp_path / "file")
    with pytest.raises(InputError, match="--jobs of at least 1"):
        bench_command("quick", Request(), tmp_path, jobs=0)


# Tuning


@pytest.mark.parametrize("name", METHODS)
def test_every_value_of_a_space_is_a_setting(name: str) -> None:
    method = METHODS[name]
    assert not (method.space and name in CONTROLS)
    for make in method.presets.values():
        for settings in drawn_settings(method.space, make(), 1000, seed=0):
            override(make(), settings)


def test_trials_begin_with_the_default_and_are_no_more_than_allowed() -> None:
    method = METHODS["fine_tune"]
    drawn = drawn_settings(method.space, method.config(), 3, seed=0)
    assert drawn[0] == ()
    assert len(set(drawn)) == 3
    assert drawn == drawn_settings(method.space, method.config(), 3, seed=0)
    everything = drawn_settings(method.space, method.config(), 100, seed=0)
    assert ("training.lr=0.01",) not in everything  # the default itself
    assert len(everything) == len(method.space["training.lr"])
    assert drawn_settings({}, method.config(), 5, seed=0) == [()]


def test_score() -> None:
    assert score(0.0, 0.95, 0.9) == 1.0  # better than before is as good as before
    assert score(0.25, 0.8, 0.9) == pytest.approx(0.75 * 0.9)
    assert score(1.0, 1.0, 1.0) == 0.0


@pytest.mark.parametrize("zero_glance", [True, False])
def test_tuning_takes_the_best_trial_and_holds_out_what_it_looks_at(tiny: Tiny, zero_glance: bool) -> None:
    retain, test = tiny.split.retain, tiny.split.test
    assert isinstance(retain, TensorImages)
    assert isinstance(test, TensorImages)
    rows = (test.labels == 3).nonzero().flatten()[:20]
    threes = TensorImages(test.images[rows], test.labels[rows])
    given: list[Split] = []

    def run(model: nn.Module, split: Split, config: Any, *, seed: int, journal: Journal | None) -> nn.Module:
        given.append(split)
        return METHODS["head_mask"].run(model, replace(split, forget=None), None, seed=seed, journal=journal) if (
            config.penalty == 0.001
        ) else model  # fmt: skip

    reads = frozenset({"retain"}) if zero_glance else frozenset({"retain", "forget"})
    method = replace(METHODS["l1_sparse"], run=run, reads=reads, space={"penalty": (0.0005, 0.001, 0.002)})
    split = replace(tiny.split, forget=threes)
    found = tune(method, method.config(), tiny.model, split, trials=5, seed=0)
    assert found.settings == ("penalty=0.001",)
    assert found.score > 0.95
    assert len(found.trials) == 3  # all there are
    assert found.reads_forget is not zero_glance
    assert ("impressions" in found.selected_by) is zero_glance
    for one in given:
        assert one.test is None
        assert len(one.retain) == pytest.approx(0.8 * len(retain), rel=0.05)  # type: ignore[arg-type]
        assert (one.forget is None) is zero_glance
        if one.forget is not None:
            assert len(one.forget) == 16  # type: ignore[arg-type]


# Cost


def test_flops_are_those_of_torch(tiny: Tiny) -> None:
    def step() -> None:
        images = torch.zeros((4, 1, 8, 8))
        tiny.model(images).sum().backward()
        tiny.model.zero_grad()

    with FlopCount() as ours:
        step()
    with FlopCounterMode(display=False) as theirs:
        step()
    assert ours.total == theirs.get_total_flops() > 0


def test_samples_by_kind() -> None:
    phases = [
        Phase(name="a", seconds=1, steps=1, samples=10, label_counts={0: 4, 3: 2}, final_loss=None),
        Phase(name="b", seconds=1, steps=1, samples=5, label_counts={1: 5}, final_loss=None),
    ]
    assert samples_of(phases, (3,)) == (9, 2, 4)


@pytest.mark.parametrize(("name", "steps"), [("ssd", 0), ("fisher", 0), ("neg_grad", 90)])
def test_steps_are_those_of_an_optimizer(tiny: Tiny, name: str, steps: int) -> None:
    test = tiny.split.test
    assert isinstance(test, TensorImages)
    threes = TensorImages(*(part[test.labels == 3] for part in (test.images, test.labels)))
    method = METHODS[name]
    split = method.view(replace(tiny.split, forget=threes))
    _, journal, cost = measured(
        lambda journal: method(tiny.model, split, seed=0, journal=journal), tiny.model, (3,), count_flops=False
    )
    assert cost.steps == steps
    assert sum(phase.steps for phase in journal.phases) > 0


def test_a_method_that_is_not_deterministic_is_found_out(tiny: Tiny) -> None:
    models = iter([tiny.model, METHODS["random_init"](tiny.model, tiny.split.zero_glance(), seed=0)])
    with pytest.raises(RuntimeError, match="not deterministic"):
        measured(lambda _: next(models), tiny.model, (3,), count_flops=True)


def test_memory_is_measured(tiny: Tiny) -> None:
    def run(_: Journal) -> nn.Module:
        torch.ones(30_000_000)  # 120 MB
        return tiny.model

    cost = measured(run, tiny.model, (3,), count_flops=False)[2]
    if cost.peak_memory_bytes is None:
        pytest.skip("this system does not tell")
    assert 100e6 < cost.peak_memory_bytes < 200e6
    assert cost.memory_of == "process"


# The command


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *arguments])


def own(data: str, model: str, weights: Path, out: Path) -> list[str]:
    words = ["own", "--data", data, "--model", model, "--weights", str(weights), "--classes", "3"]
    return [*words, "--out", str(out)]


def test_somebodys_own(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    model, weights, out = f"{tmp_path / 'net.py'}:net", tmp_path / "w.safetensors", tmp_path / "out"
    commands.train_command(DataOptions(spec="digits"), model, weights, config=TrainConfig(epochs=2, batch_size=64))
    words = own("digits", model, weights, out)
    words += ["--methods", "none,head_mask", "--epochs", "1", "--retain-per-class", "20"]

    planned = invoke(*words, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "4 cells (0 done, 0 failed), 2 models and 0 searches for settings in all" in planned.stdout
    assert not out.exists()

    done = invoke(*words)
    assert done.exit_code == 0, done.output
    assert "[6/6]" in done.stderr
    assert "left" in done.stderr
    told = (out / "tables.md").read_text()
    assert "| head_mask | nothing | 2 | 0.0 ± 0.0 |" in told
    assert {path.name for path in out.iterdir()} >= {"results.csv", "results.parquet", "tables.tex", "plots", "cells"}
    records = list((out / "cells").glob("*/record.json"))
    assert len(records) == 4
    before = {path: path.stat().st_mtime_ns for path in records}
    assert invoke(*words, "--quiet").exit_code == 0
    assert json.loads(invoke(*words, "--json").stdout)["cells"]["failed"] == 0
    assert {path: path.stat().st_mtime_ns for path in records} == before
    assert json.loads(records[0].read_text())["metrics"]["retrained"]


def test_references_of_own_weights_lack_what_those_lack(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    model, weights, out = f"{tmp_path / 'net.py'}:net", tmp_path / "w.safetensors", tmp_path / "out"
    recipe = TrainConfig(epochs=3, batch_size=32, lr=0.01, optimizer="adamw")
    commands.train_command(DataOptions(spec="digits"), model, weights, config=recipe, leave_out=["3"])
    words = [*own("digits", model, weights, out)[:-4], "--out", str(out), "--methods", "none", "--seeds", "1"]
    refused = invoke(*words, "--classes", "5,3")
    assert refused.exit_code == 2
    assert "nothing to forget: the weights say that 3 was forgotten before or never seen" in refused.stderr
    assert not out.exists()
    done = invoke(*words, "--classes", "8")
    assert done.exit_code == 0, done.output
    (record,) = (json.loads(path.read_text()) for path in (out / "cells").glob("*/record.json"))
    accuracies = record["metrics"]["retrained"]["per_class_accuracy"]
    assert (accuracies["3"], accuracies["8"]) == (0.0, 0.0)
    assert min(accuracies[name] for name in "012456") > 0.5
    (reference,) = (out / "models").glob("*-without-*/weights.safetensors")
    assert load_weights(reference)[1].never_seen == ("3", "8")


def test_somebodys_own_without_images_of_the_classes(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    model, weights, out = f"{tmp_path / 'net.py'}:net", tmp_path / "w.safetensors", tmp_path / "out"
    commands.train_command(DataOptions(spec="digits"), model, weights, config=TrainConfig(epochs=1, batch_size=64))
    left = write_digits(tmp_path / "left", [label for label in range(10) if label != 3], each=20)
    (left / "0" / "about.txt").write_text("no image")
    words = own(str(left), model, weights, out)
    done = invoke(*words, "--methods", "none,fine_tune,ssd", "--seeds", "1", "--epochs", "1")
    assert done.exit_code == 1, done.output  # of ssd, which reads what is not there
    assert done.stderr.count("FAILED") == 1
    assert "ssd reads images of the classes to forget, and the data has none" in done.stderr
    rows = pyarrow.csv.read_csv(out / "results.csv").to_pylist()
    assert [row["status"] for row in rows] == ["done", "done", "failed"]
    assert rows[0]["retain_accuracy"] > 0
    assert rows[0]["retrained_retain_accuracy"] > 0
    empty = ("forget_accuracy", "linear_probe", "original_linear_probe", "retrained_linear_probe", "linear_probe_gap")
    assert all(rows[0][name] is None for name in empty)
    notes = json.loads((out / "cells" / rows[0]["id"] / "record.json").read_text())["notes"]
    assert any("file that is no image" in note for note in notes), notes
    assert (out / "cells" / rows[0]["id"] / "report.html").exists()


def test_references_of_own_weights_are_trained_as_the_weights_say_they_were(tmp_path: Path) -> None:
    def original(training: dict[str, Any] | None) -> Original:
        save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors", Metadata(model="allcnn", training=training))
        request = Request(
            data=DataOptions(spec="digits"),
            weights=tmp_path / "w.safetensors",
            classes=(("3",),),
            methods=("fine_tune",),
            trials=2,
        )
        cells = suite_cells("own", request)
        assert len({one.original for one in cells} | {one.tuning.original for one in cells if one.tuning}) == 1
        return cells[0].original

    recipe = TrainConfig(epochs=4, flip=False, crop=2)
    stated = original({"config": asdict(recipe), "seed": 5, "per_class": 40})
    assert (stated.recipe, stated.augment, stated.seed, stated.per_class) == (recipe, False, 5, 40)
    older = original({"config": asdict(recipe), "seed": 5})
    assert (older.recipe, older.augment, older.per_class) == (recipe, False, None)
    unknown = original(None)
    assert (unknown.recipe, unknown.augment, unknown.seed) == (commands.TRAIN_DEFAULT, None, 0)


def test_weights_say_how_many_images_of_each_class_they_were_trained_on(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    told = commands.train_command(
        DataOptions(spec="digits"),
        f"{tmp_path / 'net.py'}:net",
        tmp_path / "w.safetensors",
        config=TrainConfig(steps=1),
        per_class=7,
    )
    assert told.training is not None
    assert (told.training["per_class"], told.training["train_samples"]) == (7, 70)


def test_a_failed_cell_leaves_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> nn.Module:
        raise ArithmeticError("no")

    cells = tiny_cells(tmp_path, methods=("none",))[:1]
    monkeypatch.setattr("expunge.bench.command.suite_cells", lambda *_: cells)
    monkeypatch.setitem(METHODS, "none", replace(METHODS["none"], run=fail))
    result = invoke("quick", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "FAILED: ArithmeticError: no" in result.stderr
    assert "--retry-failed" in result.stdout


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of `NET`, which a file beside them builds."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "net.py").write_text(NET)
    commands.train_command(
        DataOptions(spec="digits"), f"{folder / 'net.py'}:net", folder / "w.safetensors",
        config=TrainConfig(epochs=1, batch_size=64),
    )  # fmt: skip
    return folder / "w.safetensors"


def test_code_that_weights_name_is_not_run(tmp_path: Path, weights: Path) -> None:
    words = ["own", "--data", "digits", "--weights", str(weights), "--classes", "3", "--methods", "none"]
    result = invoke(*words, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "whose code would be run: confirm it with --model" in result.stderr


def test_other_data_or_another_model_of_the_same_name_is_another_cell(tmp_path: Path, weights: Path) -> None:
    def ids(data: Path, model: Path) -> set[str]:
        request = Request(
            data=DataOptions(spec=str(data)),
            model=f"{model}:net",
            weights=weights,
            classes=(("3",),),
            methods=("none",),
        )
        return {cell.id for cell in suite_cells("own", request)}

    first, other = (tmp_path / name / "numbers" for name in "ab")
    for folder in (first, other):
        write_digits(folder, (3, 4))
    changed = next(path for path in sorted(other.rglob("*.png")))
    changed.write_bytes(sorted(other.rglob("*.png"))[-1].read_bytes())
    net, edited = weights.with_name("net.py"), tmp_path / "net.py"
    edited.write_text(NET + "# other code\n")
    assert ids(first, net) == ids(first, net)
    assert not ids(first, net) & ids(other, net)
    assert not ids(first, net) & ids(first, edited)


def test_mistakes_are_told_before_the_work(tmp_path: Path, weights: Path) -> None:
    words = ["own", "--data", "digits", "--weights", str(weights), "--methods", "none,none", "--seeds", "1"]
    own, out = ["--model", f"{weights.with_name('net.py')}:net"], tmp_path / "out"
    for more, message in (
        ([*own, "--classes", "3", "--device", "nodev"], "cannot use device 'nodev'"),
        (["--model", "net.py:net", "--classes", "3"], "no model file at 'net.py'"),
        (["--model", "allcnn", "--classes", "3"], "do not fit the model"),
        ([*own, "--classes", "1,8", "--classes", "8,1"], "1,8 and 8,1 are the same classes"),
    ):
        result = invoke(*words, *more, "--out", str(out))
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
        assert not out.exists()
    assert invoke(*words, *own, "--classes", "3", "--out", str(out), "--dry-run").stdout.count("-none-") == 1


def test_files_of_half_a_copy(tmp_path: Path, weights: Path) -> None:
    out = tmp_path / "out"
    words = ["own", "--data", "digits", "--weights", str(weights), "--classes", "3", "--seeds", "1", "--epochs", "1"]
    words += ["--model", f"{weights.with_name('net.py')}:net", "--retain-per-class", "10", "--out", str(out)]
    assert invoke(*words, "--methods", "none").exit_code == 0
    (made,) = out.glob("models/*/weights.safetensors")
    whole, before = made.read_bytes(), {name: value.clone() for name, value in load_weights(made)[0].items()}
    made.write_bytes(whole[:-1])
    assert invoke(*words, "--methods", "none,head_mask").exit_code == 0
    after = load_weights(made)[0]  # trained again
    assert all(torch.equal(after[name], value) for name, value in before.items())
    (record,) = out.glob("cells/*-none-*/record.json")
    record.write_text(record.read_text()[:800])
    result = invoke(*words, "--methods", "none")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"{record} is no whole record" in result.stderr
    record.unlink()
    assert invoke(*words, "--methods", "none").exit_code == 0


def test_a_list_given_twice_adds_to_itself(tmp_path: Path) -> None:
    words = ["quick", "--out", str(tmp_path / "out"), "--dry-run", "--trials", "1"]
    once = invoke(*words, "--methods", "none,head_mask")
    twice = invoke(*words, "--methods", "none", "--methods", "head_mask")
    assert once.exit_code == 0, once.output
    assert twice.stdout == once.stdout != invoke(*words, "--methods", "head_mask").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["magic"], "unknown suite 'magic'"),
        (["own", "--data", "digits", "--classes", "3"], "the suite own needs --weights"),
        (["own", "--data", "digits", "--classes", "3", "--weights", "/no/such"], "no weights file at '/no/such'"),
        (["quick", "--epochs", "3"], "--epochs means nothing to the suite quick"),
        (["quick", "--audits", "magic"], "unknown audit 'magic'"),
        (["quick", "--memory", "1G"], "--memory means nothing to the suite quick"),
        (["scaling", "--label-column", "a"], "--label-column means nothing to the suite scaling"),
        (["analyses", "--skip-bad"], "--skip-bad means nothing without --data"),
        (["field", "--size", "32"], "the suite field needs --data"),
        (["analyses", "--data", "digits", "--image-column", "a"], "--image-column means nothing to 'digits'"),
        (["quick", "--jobs", "0", "--dry-run"], "expected --jobs of at least 1, got 0"),
        (["quick", "--slurm-hours", "-1", "--dry-run"], "expected --slurm-hours above 0 and below 10,000, got -1"),
        (["quick", "--slurm-hours", "inf", "--slurm", "gpu"], "expected --slurm-hours above 0 and below 10,000"),
        (["quick", "--slurm-hours", "2", "--dry-run"], "--slurm-hours means nothing without --slurm PARTITION"),
        (["quick", "--slurm-gpus", "1"], "--slurm-gpus means nothing without --slurm PARTITION"),
        (["quick", "--slurm", "gpu"], "cannot submit to slurm here"),
    ],
)
def test_one_line_for_a_mistake(tmp_path: Path, words: list[str], message: str) -> None:
    result = invoke(*words, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_time_left_is_told(tmp_path: Path) -> None:
    cells = tiny_cells(tmp_path, methods=("none",))
    standing = Standing(cells, tmp_path, 2)
    record = {"item": {"seconds": 4.0, "status": "done"}}
    lines = [standing.finish(item, record) for item in standing.items]
    assert [line.seconds_left for line in lines] == [8.0, 6.0, 4.0, 2.0, 0.0]
    assert [line.about for line in lines[:3]] == [
        "models, seed 0",
        "models, without 3, seed 0",
        "none, default, 3, seed 0",
    ]
