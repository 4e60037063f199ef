"""Tables and fits of the benchmark, against numbers computed by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from expunge.bench.leaderboard import FIGURES, standings
from expunge.bench.plots import cost_against_quality, forget_against_retain, growth
from expunge.bench.scaling import fit_exponent, growth_table, growths
from expunge.bench.suites import SUITES
from expunge.bench.tables import (
    COLUMNS,
    Row,
    between_retrained,
    csv_writer,
    latex,
    markdown,
    parquet_writer,
    separated_best,
    summarize,
)
from expunge.errors import InputError
from expunge.metrics import Interval


def row(method: str, seed: int, retain: float, **more: Any) -> Row:
    filled: dict[str, Any] = dict.fromkeys(COLUMNS)
    filled |= {
        "id": f"{method}-{seed}", "status": "done", "data": "digits", "model": "net", "model_spec": "net",
        "forget": "3", "num_forget_classes": 1, "method": method, "variant": "default", "preset": "default",
        "settings": "", "reads": "retain", "zero_glance": True, "training_seed": seed, "unlearning_seed": 0,
        "forget_accuracy": 0.0, "retain_accuracy": retain, "forget_gap": 0.0, "retain_gap": retain - 0.98,
        "tug_of_war": 1 - abs(retain - 0.98), "seconds": 2.0, "steps": 10, "device": "cpu", "threads": 1, "torch": "2",
        "original_forget_accuracy": 0.99, "original_retain_accuracy": 0.97,
        "retrained_forget_accuracy": 0.0, "retrained_retain_accuracy": 0.98,
    }  # fmt: skip
    return filled | more


def test_the_loss_on_the_others_is_to_the_original_that_may_not_answer_the_classes_either() -> None:
    (one,) = summarize([row("a", 0, 0.95, original_masked_retain_accuracy=0.99)], FIGURES)
    assert one.figures["retain_drop"].value == pytest.approx(0.04)
    (place,) = standings([one])
    assert (place.gone, place.kept) == ("yes", "no")  # .02 below what it answers when it may answer all


def test_what_the_original_did_not_know_is_not_called_gone_nor_a_collapse_kept() -> None:
    said: list[dict[str, Any]] = [{}, {"original_knows": False}, {"collapsed_classes": 1}]
    for more, answers in zip(said, (("yes", "yes"), ("unknown", "yes"), ("yes", "no")), strict=True):
        rows = [row("a", 0, 0.97, original_masked_retain_accuracy=0.98, **more)]
        rows += [row("a", 1, 0.97, original_masked_retain_accuracy=0.98, original_knows=True, collapsed_classes=0)]
        (place,) = standings(summarize(rows, FIGURES))
        assert (place.gone, place.kept) == answers
        assert place.place == (1 if not more else None)


def test_a_method_with_fewer_seeds_has_no_place() -> None:
    rows = [row(name, seed, 0.97, original_masked_retain_accuracy=0.98) for name in "ab" for seed in range(3)]
    failed = [{**one, "status": "failed"} if one["id"] == "b-2" else one for one in rows]
    places = {one.summary.method: one.place for one in standings(summarize(failed, FIGURES))}
    assert places == {"a": 1, "b": None}


def test_what_one_set_of_classes_alone_has_is_not_that_of_all() -> None:
    rows = [row("a", seed, 0.9, forget=forget) for seed in (0, 1) for forget in "35"]
    rows[0] = {**rows[0], "flops": 7, "peak_memory_bytes": 1}
    rows[1] = {**rows[1], "peak_memory_bytes": 3}
    found = {one.forget: one.figures for one in summarize(rows, FIGURES)}
    assert found["3"]["flops"].value == 7
    assert "flops" not in found["all"]
    assert found["all"]["peak_memory_bytes"].value == 2


def test_mean_and_interval_by_hand() -> None:
    (one,) = summarize([row("a", seed, retain) for seed, retain in enumerate((0.90, 0.92, 0.97))])
    found = one.figures["retain_accuracy"]
    # mean 93, sample deviation sqrt(13) = 3.6056, t(.975, 2) = 4.3027: 4.3027 * 3.6056 / sqrt(3) = 8.957
    assert found.value == pytest.approx(93.0)
    assert found.high - found.value == pytest.approx(8.957, abs=1e-3)
    assert one.seeds == 3
    assert "93.0 ± 9.0" in markdown([one], [])
    assert one.figures["retain_gap"].value == pytest.approx((8 + 6 + 1) / 3)  # distances, not signed


def test_unlearning_seeds_of_one_original_are_averaged_first() -> None:
    rows = [
        row("a", seed, 0.9 + 0.02 * seed, unlearning_seed=unlearning) for seed in (0, 1) for unlearning in (0, 1, 2)
    ]
    (one,) = summarize(rows)
    assert one.seeds == 2
    (alone,) = summarize([row("a", 0, 0.9 + 0.01 * seed, unlearning_seed=seed) for seed in range(3)])
    assert alone.seeds == 3


def test_all_sets_of_classes_together() -> None:
    rows = [row("a", seed, retain, forget=forget) for seed in (0, 1) for forget, retain in (("3", 0.9), ("5", 0.8))]
    found = {one.forget: one for one in summarize([*rows, row("b", 0, 0.9)])}
    assert found["all"].figures["retain_accuracy"].value == pytest.approx(85.0)
    assert {one.method for one in summarize([*rows, row("b", 0, 0.9)]) if one.forget == "all"} == {"a"}
    # a set that few methods were given is no part of what all are compared on
    assert not [one for one in summarize([*rows, row("b", 0, 0.9), row("c", 0, 0.9)]) if one.forget == "all"]


def test_best_is_marked_only_where_intervals_separate() -> None:
    apart = {"a": Interval(1.0, 0.9, 1.1), "b": Interval(2.0, 1.2, 2.8), "c": Interval(9.0, 8.0, 10.0)}
    assert separated_best(apart, "low") == "a"
    assert separated_best(apart, "high") == "c"
    touching = apart | {"b": Interval(2.0, 1.1, 2.9)}
    assert separated_best(touching, "low") is None
    assert separated_best({"a": Interval(1.0, -math.inf, math.inf), "b": Interval(2.0, 2.0, 2.0)}, "low") is None
    assert separated_best({"a": apart["a"]}, "low") is None
    assert separated_best({"a": Interval(0, 0, 0), "b": Interval(0, 0, 0)}, "low") is None


def test_marks_in_the_tables() -> None:
    rows = [row("near", s, 0.979 + s / 1e4) for s in (0, 1, 2)] + [row("far", s, 0.80 + s / 1e4) for s in (0, 1, 2)]
    rows += [row("none", s, 0.98) for s in (0, 1, 2)]  # a control takes no mark
    told = markdown(summarize(rows), rows)
    assert "**0.1 ± 0.0**" in told or "**0.1 ± 0.2**" in told
    assert told.count("**") - told.count("**Bold**") * 2 == 4  # the retain gap and the tug of war, of one method
    assert "| *retrained* |  |  | 0.0 | 98.0 |" in told
    tex = latex(summarize(rows), rows)
    assert r"\textbf{" in tex
    assert r"A\_f \%" in tex
    assert tex.count(r"\toprule") == 1


def test_how_far_retrained_models_lie_apart() -> None:
    accuracies, probes = (0.98, 0.96, 0.95), (0.5, 0.6, None)
    rows = [
        row(
            name, seed, 0.9, retrained_retain_accuracy=accuracies[seed], retrained_linear_probe=probes[seed],
            retrained_test_accuracy=0.5 * accuracies[seed],
        )
        for name in ("unsir", "scrub")
        for seed in range(3)
    ]  # fmt: skip
    found, pairs = between_retrained(rows)
    assert pairs == 3  # whatever the number of methods
    assert found["retain_gap"] == pytest.approx((2 + 3 + 1) / 3)
    assert found["linear_probe_gap"] == pytest.approx(10)
    # as of every method: of the forgotten, of the others, of all that are held out
    assert found["tug_of_war"] == pytest.approx((0.98 * 0.99 + 0.97 * 0.985 + 0.99 * 0.995) / 3)
    assert "| *retrained, another seed* |  | 3 |  |  | 0.0 | 2.0 | 0.970 |  | 10.0 |" in markdown(summarize(rows), rows)
    assert between_retrained(rows[:1]) == ({}, 0)
    other_set = [row("unsir", 1, 0.9, forget="5")]
    assert between_retrained([*rows[:1], *other_set]) == ({}, 0)


def test_a_variant_that_is_the_same_again_does_not_hinder_a_mark() -> None:
    rows = [row("near", s, 0.979 + s / 1e4, variant=v) for s in (0, 1, 2) for v in ("default", "tuned")]
    rows += [row("far", s, 0.80 + s / 1e4) for s in (0, 1, 2)]
    told = markdown(summarize(rows), rows)
    assert told.count("**") - told.count("**Bold**") * 2 == 4


def test_failed_cells_are_listed_and_counted() -> None:
    rows = [row("a", 0, 0.9), row("b", 0, 0.9, status="failed", error="ValueError: no")]
    told = markdown(summarize(rows), rows)
    assert "1 cells done, 1 failed" in told
    assert "- `b-0`: ValueError: no" in told


def test_csv_and_parquet_hold_the_same(tmp_path: Path) -> None:
    rows = [row("a", 0, 0.9), row("b", 1, 0.8)]
    csv_writer(rows)(tmp_path / "t.csv")
    parquet_writer(rows)(tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column_names == list(COLUMNS)
    assert table.to_pylist() == rows
    with (tmp_path / "t.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(one["retain_accuracy"]) for one in read] == [0.9, 0.8]
    assert list(read[0]) == list(COLUMNS)


def test_plots_are_the_same_file_for_the_same_numbers(tmp_path: Path) -> None:
    rows = [row("a", s, 0.9 + s / 100) for s in (0, 1)] + [row("none", 0, 0.98)]
    group = summarize(rows)
    for name in ("1.svg", "2.svg"):
        forget_against_retain(group, rows)(tmp_path / name)
    text = (tmp_path / "1.svg").read_text()
    assert text == (tmp_path / "2.svg").read_text()
    assert "retrained" in text
    cost_against_quality(group)(tmp_path / "3.svg")
    assert "tug of war" in (tmp_path / "3.svg").read_text()


def test_exponents_by_hand() -> None:
    exact = fit_exponent([1, 2, 4, 8], [3, 12, 48, 192])
    assert exact.value == pytest.approx(2.0)
    assert exact.high - exact.low == pytest.approx(0.0, abs=1e-6)
    # logs to base 2: x 0, 1, 2 and y 0, 1, 3: slope 3/2, residual sum 1/6, error sqrt(1/12), t(.975, 1) = 12.706
    found = fit_exponent([1, 2, 4], [1, 2, 8])
    assert found.value == pytest.approx(1.5)
    assert found.high - found.value == pytest.approx(12.7062 * math.sqrt(1 / 12), abs=1e-3)
    assert fit_exponent([1, 2], [1, 2]).high == math.inf
    for x, y in (([1, 1], [1, 2]), ([1, 2], [0, 1]), ([1, 2], [1, 2, 3])):
        with pytest.raises(InputError):
            fit_exponent(x, y)


def test_growth_varies_one_factor_at_a_time(tmp_path: Path) -> None:
    usual = {"num_forget_classes": 2, "retain_per_class": 60, "parameters": 1000, "samples_retain": 5}
    usual |= {"samples_forget": 0, "samples_synthetic": 0, "peak_memory_bytes": 10, "flops": 7}
    rows = [row("a", 0, 0.9, **usual)]
    rows += [row("a", 0, 0.9, **usual | {"num_forget_classes": k, "seconds": 1.0 * k}) for k in (1, 4, 8)]
    rows += [row("a", 0, 0.9, **usual | {"parameters": 1000 * k, "seconds": 2.0 * k**0.5}) for k in (4, 9)]
    found = {(one.factor, one.cost): one for one in growths(rows)}
    assert found["num_forget_classes", "seconds"].x == (1.0, 2.0, 4.0, 8.0)
    assert found["num_forget_classes", "seconds"].exponent.value == pytest.approx(1.0)
    assert found["parameters", "seconds"].exponent.value == pytest.approx(0.5)
    assert found["parameters", "samples"].exponent.value == pytest.approx(0.0)
    assert ("retain_per_class", "seconds") not in found
    faster = [dict(one) | {"variant": "fast", "preset": "fast", "seconds": one["seconds"] / 9} for one in rows]
    apart = [one for one in growths([*rows, *faster]) if (one.factor, one.cost) == ("num_forget_classes", "seconds")]
    assert [one.method for one in apart] == ["a", "a (fast)"]
    assert [one.exponent.value for one in apart] == [pytest.approx(1.0)] * 2
    assert [one.exponent.high - one.exponent.low for one in apart] == [pytest.approx(0.0, abs=1e-9)] * 2
    assert "| a | 1.00 [1.00, 1.00] |" in growth_table(list(found.values()))
    growth([found["parameters", "seconds"]], "seconds", "parameters")(tmp_path / "g.svg")
    assert "a: 0.50" in (tmp_path / "g.svg").read_text()


def test_columns_and_suites_are_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "bench.md").read_text(encoding="utf-8")
    for name in COLUMNS:
        of_a_role = name.removeprefix("original_").removeprefix("retrained_")
        assert f"`{name}`" in text or f"`{of_a_role}`" in text, name
    for name in SUITES:
        assert f"expunge bench {name} " in text, name
