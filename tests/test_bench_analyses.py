"""The paper's analyses: requests in sequence, the yardstick, and what each table says, on a network trained fast."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from expunge import cli
from expunge.bench.analyses import TABLES, markdown, runs_of, writers
from expunge.bench.analysis_plots import OTHERS
from expunge.bench.cells import Cell, Original, Reference, folder_of, with_needs
from expunge.bench.lab import WEIGHTS
from expunge.bench.records import read
from expunge.bench.runner import run_cells
from expunge.bench.series import AGAIN, AT_ONCE, GRIDS, RETRAIN, Base, Contender, Point, grids
from expunge.bench.suites import Request, analysis_points, suite_cells
from expunge.bench.tables import COLUMNS, Row, comparable, tidy_rows
from expunge.errors import InputError
from expunge.methods.unsir import UnsirConfig
from expunge.metrics import layer_distances
from expunge.report import html_writer, read_record
from expunge.schema import TrainConfig
from expunge.workspace import DataOptions, open_workspace
from test_bench_runner import NET

NAMES = ("layer_distance", "efficiency", "sequential", "retain_share", "prediction_distribution", "features",
         "gold_standard")  # fmt: skip


@dataclass(frozen=True)
class Done:
    """A folder in which analyses were run, and their points."""

    out: Path
    points: Mapping[str, Sequence[Point]]

    def rows(self, name: str) -> list[Row]:
        return TABLES[name].analyse(runs_of(self.points[name], self.out)).rows


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    root = tmp_path_factory.mktemp("analyses")
    (root / "net.py").write_text(NET)
    original = Original(
        data="digits",
        options=DataOptions(spec="digits"),
        model=f"{root / 'net.py'}:net",
        recipe=TrainConfig(epochs=6, lr=0.01, batch_size=64),
        per_class=60,
    )
    base = Base(
        originals=(original,),
        sets=(("3",), ("8",)),
        retain_per_class=20,
        test_per_class=15,
        others=(Contender("fine_tune", "fine_tune", "default"),),
        audits=("nearest_class_mean",),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expunge.bench.series.SHARES", (0.25, 1.0))  # two are enough to see that it is varied
        points = grids(base, NAMES)
    cells = list({point.cell.id: point.cell for found in points.values() for point in found}.values())
    result = run_cells(cells, root / "out")
    assert (result.failed, result.missing) == ((), ())
    return Done(root / "out", points)


def record_of(done: Done, cell: Cell) -> dict[str, Any]:
    record = read(folder_of(cell, done.out))
    assert record is not None
    return record


def chain(done: Done, series: str) -> list[Cell]:
    return [point.cell for point in done.points["sequential"] if point.series == series]


# Requests in sequence, and models that no method made


def test_a_request_starts_from_what_the_one_before_made(done: Done) -> None:
    first, second = (record_of(done, cell) for cell in chain(done, "unsir"))
    assert second["metrics"]["before"]["per_class_accuracy"] == first["metrics"]["after"]["per_class_accuracy"]
    assert (second["classes"]["forget"], second["classes"]["forgotten_before"]) == (["8"], ["3"])
    read_by_second = second["samples_read"]["method"]
    assert read_by_second["3"] == read_by_second["8"] == 0, "a class that was forgotten was read again"
    # a retrained model without both classes is what it is measured against
    assert second["metrics"]["retrained"]["per_class_accuracy"]["3"] == 0
    assert second["metrics"]["retrained"]["per_class_accuracy"]["8"] == 0
    assert [cell.gone for cell in chain(done, "unsir")] == [("3",), ("3", "8")]


def test_weights_are_kept_for_the_next_request_alone(done: Done) -> None:
    first, second = chain(done, "fine_tune")
    assert (folder_of(first, done.out) / WEIGHTS).exists()
    assert not (folder_of(second, done.out) / WEIGHTS).exists()


def test_a_chain_is_done_in_order_and_once(done: Done) -> None:
    cells = chain(done, "unsir")
    assert [item.id for item in with_needs([cells[1]])][-2:] == [cells[0].id, cells[1].id]
    before = {path: path.stat().st_mtime_ns for path in (done.out / "cells").glob("*/record.json")}
    run_cells(cells, done.out)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_yardstick_is_another_retrained_model(done: Done) -> None:
    (point,) = [one for one in done.points["gold_standard"] if one.series == AGAIN]
    cell, record = point.cell, record_of(done, point.cell)
    assert cell.judged is not None
    assert cell.judged.original.seed == cell.original.seed + 1
    assert record["bench"]["cost"] == {}
    models = [
        open_workspace(cell.original.options, cell.original.model, folder_of(item, done.out) / WEIGHTS, seed=0).model
        for item in (cell.judged, Reference(original=cell.original, forget=cell.forget))
    ]
    assert record["metrics"]["after"]["weight_distance"]["to_retrained"] == layer_distances(*models)
    html_writer(read_record(folder_of(cell, done.out)))(done.out / "page.html")  # it has a page like every cell


def test_ids_tell_chains_and_yardsticks_apart(done: Done) -> None:
    cell = chain(done, "unsir")[0]
    plain = replace(cell, keep=False)
    reference = Reference(original=cell.original, forget=("3",))
    others = [cell, plain, replace(plain, after=plain), replace(plain, after=cell), replace(plain, judged=reference)]
    assert len({one.id for one in others}) == len(others)
    asked = record_of(done, chain(done, "unsir")[1])["item"]["asked"]
    assert asked["after"] == cell.id


# Grids


def test_every_analysis_has_cells_and_a_table() -> None:
    assert set(GRIDS) == set(TABLES)
    points = analysis_points(Request())
    assert set(points) == set(GRIDS)
    assert all(points.values())
    cells = suite_cells("analyses", Request())
    assert len({cell.id for cell in cells}) == len(cells)
    assert {cell.original.data for cell in cells} == {"digits"}
    assert len(suite_cells("analyses", Request(analysis=("penalty",)))) == len(points["penalty"])


def test_data_of_ones_own_and_a_model_of_ones_own() -> None:
    data = DataOptions(spec="somewhere/cifar10")
    small = suite_cells("analyses", Request(data=data))[0]
    assert (small.original.data, small.original.per_class, small.retain_per_class) == ("cifar10", 300, 100)
    whole = suite_cells("analyses", Request(data=data, model="torchvision:resnet18"))[0]
    assert (whole.original.per_class, whole.retain_per_class) == (None, 1000)


def test_a_method_counts_once_however_often_it_is_named() -> None:
    once = analysis_points(Request(methods=("fine_tune",), seeds=1))
    assert analysis_points(Request(methods=("unsir", "fine_tune", "fine_tune"), seeds=1)) == once
    series = {point.series for point in analysis_points(Request(methods=("unsir",), seeds=1))["features"]}
    assert "fine_tune" not in series


def test_a_setting_that_is_the_default_is_the_same_cell() -> None:
    one = Contender("unsir", "unsir", "default", ("noise_lr=0.2",))
    assert one.having(impair__lr=UnsirConfig().impair.lr) is one
    assert one.having(impair__lr=0.01).settings == ("noise_lr=0.2", "impair.lr=0.01")
    assert one.having(noise_lr=0.3).settings == ("noise_lr=0.3",)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(analysis=("magic",)), "unknown analysis 'magic': expected some of layer_distance"),
        (Request(classes=(("3", "8"), ("8",))), "'8' is in two"),
    ],
)
def test_mistakes(request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        suite_cells("analyses", request_)


def test_an_analysis_means_nothing_to_another_suite() -> None:
    with pytest.raises(InputError, match="--analysis means nothing to the suite quick"):
        suite_cells("quick", Request(analysis=("penalty",)))


# What the tables say


def test_layer_distances_are_those_of_the_records(done: Done) -> None:
    rows = done.rows("layer_distance")
    found = {(row["series"], row["to"], row["layer"]): row["relative"] for row in rows}
    assert found["unsir", "original", "total"] > 0
    assert found["retrained", "original", "total"] > 0
    assert found[AGAIN, "retrained", "total"] > found["fine_tune", "retrained", "total"]  # another seed lies further
    dims = {row["layer"]: row["dims"] for row in rows}
    assert (dims["0.weight"], dims["1.weight"], dims["total"]) == (4, 1, None)


def test_cost_is_told_beside_retraining_on_everything(done: Done) -> None:
    rows = {row["series"]: row for row in done.rows("efficiency")}
    assert AGAIN not in rows
    whole = rows[RETRAIN]
    assert whole["samples"] == 9 * 60 * 6  # all retained images, as many epochs as the original's recipe has
    assert whole["flops_of_retraining"] == whole["steps_of_retraining"] == 1
    assert rows["fine_tune"]["flops_of_retraining"] == rows["fine_tune"]["flops"] / whole["flops"]


def test_a_sequence_tells_of_every_class_after_every_request(done: Done) -> None:
    rows = done.rows("sequential")
    found = {(row["series"], row["requests"], row["class"]): row["accuracy"] for row in rows}
    assert len(found) == len(rows)
    second = record_of(done, chain(done, "unsir")[1])["metrics"]["after"]
    assert found["unsir", 2, "3"] == second["per_class_accuracy"]["3"]
    assert found["unsir", 2, OTHERS] == second["retain_accuracy"]
    assert found["original", 0, "8"] > 0.5
    assert found["retrained", 1, "8"] > 0.5, "8 is not forgotten yet"
    assert found["retrained", 2, "8"] == 0
    assert (AT_ONCE, 2, "3") in found
    told = TABLES["sequential"].analyse(runs_of(done.points["sequential"], done.out)).told
    (last,) = [row for row in told if (row["series"], row["requests"]) == ("unsir", 2)]
    assert last["most_left"] == max(found["unsir", 2, "3"], found["unsir", 2, "8"])


def test_a_sweep_has_what_was_varied(done: Done) -> None:
    rows = [row for row in done.rows("retain_share") if row["series"] == "unsir"]
    counts = [row["retain_per_class"] for row in rows]
    assert counts == [5, 20]
    assert [row["retain_samples"] for row in rows] == [9 * count for count in counts]


def test_answers_on_forget_images_add_up(done: Done) -> None:
    shares: dict[str, dict[str, float]] = {}
    for row in done.rows("prediction_distribution"):
        shares.setdefault(row["series"], {})[row["called"]] = row["share"]
    assert set(shares) == {"unsir", "unsir (plain)", "fine_tune", AGAIN, "original", "retrained"}
    assert all(sum(called.values()) == pytest.approx(1) for called in shares.values())
    assert shares["retrained"]["3"] == 0
    assert max(shares["original"], key=shares["original"].__getitem__) == "3"


def test_features_are_points_of_every_model(done: Done) -> None:
    rows = done.rows("features")
    assert {row["series"] for row in rows} == {"unsir", "unsir (plain)", "fine_tune", AGAIN, "original", "retrained"}
    assert {row["class"] for row in rows if row["forgotten"]} == {"3"}
    counts = {name: sum(row["series"] == name for row in rows) for name in ("original", "unsir")}
    assert counts["original"] == counts["unsir"] > 15


def test_every_measure_is_laid_beside_the_retrained_models(done: Done) -> None:
    rows = {(row["measure"], row["series"]): row for row in done.rows("gold_standard")}
    assert rows["forget_accuracy", AGAIN]["gap"] == 0
    assert rows["tug_of_war", AGAIN]["retrained"] == 1
    assert 0 < rows["activation_distance", AGAIN]["gap"] < 1.42
    assert ("nearest_class_mean: head input", "unsir") in rows
    for row in rows.values():
        assert row["gap"] == pytest.approx(row["value"] - row["retrained"])


def test_tables_are_means_with_intervals_over_seeds() -> None:
    rows = [
        {"series": "a", "impair_lr": 0.01, "training_seed": seed, "forget_accuracy": value, "retain_accuracy": None,
         "linear_probe": 0.5, "tug_of_war": 1.0, "steps": 3}
        for seed, value in enumerate((0.1, 0.3))
    ]  # fmt: skip
    text = markdown(rows, TABLES["learning_rate"])
    # 12.706 is Student's quantile for one degree of freedom: 12.706 * 14.14 / sqrt(2)
    assert "| a | 0.01 | 2 | 20.0 ± 127.1 |  | 50.0 ± 0.0 | 1.000 ± 0.000 | 3 ± 0 |" in text


def test_files_of_every_analysis(done: Done, tmp_path: Path) -> None:
    made = writers(done.points, done.out)
    assert {path.relative_to(done.out).as_posix() for path in made} == {
        "analyses.md", *(f"analyses/{name}.{kind}" for name in NAMES for kind in ("csv", "svg"))
    }  # fmt: skip
    for path, write in made.items():
        write(tmp_path / path.name)
    text = (tmp_path / "analyses.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"## {TABLES[name].title}" in text
        with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
            assert len(list(csv.DictReader(file))) == len(done.rows(name))
        drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert ">unsir<" in drawn, name
        if name != "efficiency":
            assert ("retrained" in drawn) or name == "sequential"


def test_what_is_not_done_is_said(done: Done, tmp_path: Path) -> None:
    lost = replace(done.points["retain_share"][0], cell=replace(done.points["retain_share"][0].cell, seed=9))
    writers({"retain_share": [*done.points["retain_share"], lost]}, done.out)[done.out / "analyses.md"](
        tmp_path / "a.md"
    )
    assert "1 of 5 cells are missing or failed." in (tmp_path / "a.md").read_text(encoding="utf-8")


def test_methods_are_laid_side_by_side_only_where_they_are_comparable(done: Done) -> None:
    cells = list({point.cell.id: point.cell for found in done.points.values() for point in found}.values())
    rows = comparable(tidy_rows(cells, done.out))
    assert {(row["method"], row["preset"], row["settings"]) for row in rows} == {
        ("unsir", "default", ""),
        ("fine_tune", "default", ""),
    }
    assert {row["retain_per_class"] for row in rows} == {20}
    assert not any(row["forgotten_before"] for row in rows)
    empty: Row = dict.fromkeys(COLUMNS)
    assert comparable([dict(empty) | {"method": "unsir", "variant": "tuned", "settings": "a=1"}])


# The command


def test_the_command_writes_analyses(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    words = ["bench", "analyses", "--model", f"{tmp_path / 'net.py'}:net", "--out", str(tmp_path / "out")]
    words += ["--analysis", "prediction_distribution", "--seeds", "1", "--methods", "head_mask"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "4 cells: 0 failed" in done.stdout
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"analyses.md", "analyses/prediction_distribution.svg", "results.csv", "report.html"} <= names
    assert "| head_mask | 1 |" in (tmp_path / "out" / "analyses.md").read_text(encoding="utf-8")
