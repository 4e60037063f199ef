"""Plots of odd input: values beyond the axis, many classes, names with dollars, measures that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expunge.bench.analysis_plots import gaps_to_retrained, lines_of_sweep, maps_of_features, shares_of_answers
from expunge.bench.plots import cost_against_quality
from expunge.bench.tables import summarize
from expunge.report.scatter import scatters
from test_bench_tables import row


def drawn(writer: Any, tmp_path: Path) -> str:
    writer(tmp_path / "plot.svg")
    return (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_the_largest_gaps_are_at_the_edge_with_their_values(tmp_path: Path) -> None:
    rows = [
        {"series": series, "measure": measure, "gap": gap}
        for series, gaps in {"unsir": (-2.4, 0.1, 9.0, 1.7), "retrained again": (0.0, 0.0, -1.0, 0.1)}.items()
        for measure, gap in zip(("entropy", "linear_probe", "relearn_steps", "weight_distance"), gaps, strict=True)
    ]
    told = drawn(gaps_to_retrained(rows), tmp_path)
    assert "-2.40" in told
    assert "1.70" in told
    assert "linear probe" in told
    assert "relearn steps" not in told
    assert "0.10<" not in told  # what lies within has its place for a value


def test_the_legend_of_many_classes_is_of_the_forgotten(tmp_path: Path) -> None:
    def rows(count: int) -> list[dict[str, Any]]:
        return [
            {"series": "unsir", "class": f"class {number:03}", "forgotten": number == 7, "x": number, "y": 0.5}
            for number in range(count)
        ]

    many = drawn(maps_of_features(rows(100)), tmp_path)
    assert "class 007 (forgotten)" in many
    assert ">retained<" in many.replace("&gt;", ">")
    assert "class 008" not in many
    assert "class 008" in drawn(maps_of_features(rows(10)), tmp_path)


def test_dollars_in_names_are_no_formula(tmp_path: Path) -> None:
    name = "$x_$ and $y^$"
    rows = [{"series": "unsir", "called": one, "share": 0.5} for one in (name, "b")]
    assert name in drawn(shares_of_answers(rows), tmp_path)
    group = summarize([row("a", 0, 0.9, forget=name)])
    assert name in drawn(cost_against_quality(group), tmp_path)


def test_a_measure_that_is_not_there_is_left_out_of_a_sweep(tmp_path: Path) -> None:
    base = {f"{role}_{name}": None for role in ("original", "retrained") for name in MEASURES}
    rows = [
        base | {"series": "unsir", "lr": lr, "forget_accuracy": 0.0, "retain_accuracy": 0.9, "linear_probe": None}
        for lr in (0.1, 0.2)
    ]
    assert "unsir" in drawn(lines_of_sweep(rows, "lr", "rate"), tmp_path)


MEASURES = ("forget_accuracy", "retain_accuracy", "linear_probe")


def test_the_chart_of_cost_reaches_down_to_what_there_is() -> None:
    def charts(*accuracies: float) -> dict[str, Any]:
        rows = [(at, {"seconds": 2.0 + at, "kind": "zero-glance", **dict.fromkeys(MEASURES, accuracy)})
                for at, accuracy in enumerate(accuracies)]  # fmt: skip
        return {one.caption: one for one in scatters(rows, {"original": None, "retrained": None})}

    low = charts(0.44, 0.3)["Cost against quality"]
    assert (sum(map(len, low.points.values())), low.outside) == (2, 0)
    high = charts(0.95, 0.3)["Cost against quality"]
    assert (sum(map(len, high.points.values())), high.outside) == (1, 1)
