"""`expunge bench` as a function: a suite in, a folder of records, tables and plots out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.bench.analyses import writers as analysis_writers
from expunge.bench.cells import Cell, folder_of, with_needs
from expunge.bench.overview import bench_record
from expunge.bench.plots import cost_against_quality, forget_against_retain, growth
from expunge.bench.records import status_of
from expunge.bench.runner import Result, run_cells, submit_cells
from expunge.bench.scaling import FACTORS, growth_table, growths
from expunge.bench.series import Point
from expunge.bench.stale import stale_items
from expunge.bench.standing import Line, Standing
from expunge.bench.suites import Request, analysis_points, suite_cells
from expunge.bench.tables import comparable, csv_writer, latex, markdown, parquet_writer, summarize, tidy_rows
from expunge.commands import check_writable
from expunge.data import open_source, resolve_classes
from expunge.errors import InputError
from expunge.files import json_writer, write_atomically
from expunge.report import bench_html, html_writer, read_record, text_writer
from expunge.workspace import align, open_workspace, pick_device, refuse_idle_columns


@dataclass(frozen=True)
class Outcome:
    """What a benchmark did."""

    result: Result
    files: tuple[Path, ...]
    record: Mapping[str, Any]  # bench.json


@dataclass(frozen=True)
class Plan:
    """What a benchmark would do."""

    cells: tuple[Cell, ...]
    done: int  # cells that are there already
    stale: int  # cells that are there, and are done again: their preset's settings are no longer those
    failed: int
    models: int  # to be trained, originals and references, those that are there among them
    tunings: int  # searches for settings, likewise


Show = Callable[[Standing], AbstractContextManager[Callable[[Line], None]]]


def plan(suite: str, request: Request, out: Path) -> Plan:
    """Return what `bench_command` would do, having checked all that can be checked without doing it.

    Raises:
        InputError: as there.
    """
    cells = suite_cells(suite, request)
    check_writable(out / "results.csv")
    _check_data(cells)
    for own in {cell.original.weights: cell.original for cell in cells if cell.original.weights is not None}.values():
        open_workspace(own.options, own.model, own.weights, seed=0)  # so that a mistake is told before the work
    items = with_needs(cells)
    statuses = [status_of(folder_of(cell, out)) for cell in cells]
    stale = len(stale_items(items, out) & {cell.id for cell in cells})
    kinds = [type(item).__name__ for item in items]
    return Plan(
        tuple(cells),
        statuses.count("done") - stale,
        stale,
        statuses.count("failed"),
        kinds.count("Original") + kinds.count("Reference"),
        kinds.count("Tuning"),
    )


def bench_command(
    suite: str,
    request: Request,
    out: Path,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    device: str | None = None,
    show: Show | None = None,
) -> Outcome:
    """Do what is left of a suite, then write its tables and plots to `out`.

    The same command goes on after an interrupt, and adds to what other processes and machines do in the same folder.

    Args:
        jobs: processes on this machine.
        retry_failed: do failed cells again.
        show: shows where it stands while it runs, and is told of each item that is finished.

    Raises:
        InputError: there is no such suite, or its data or weights cannot be used.
    """
    check_jobs(jobs)
    pick_device(device)
    cells = plan(suite, request, out).cells
    standing = Standing(cells, out, jobs)
    with show(standing) if show is not None else nullcontext(lambda _: None) as tell:
        result = run_cells(
            cells,
            out,
            jobs=jobs,
            retry_failed=retry_failed,
            device=device,
            told=lambda item, record: tell(standing.finish(item, record)),
        )
    record = bench_record(suite, request, cells, out)
    files = write_tables(cells, out, record, analysis_points(request) if suite == "analyses" else {})
    write_pages(record, out, stale_only=True)
    return Outcome(result, files, record)


def submit_command(
    suite: str,
    request: Request,
    out: Path,
    *,
    jobs: int,
    parameters: Mapping[str, Any],
    cluster: str = "slurm",
    retry_failed: bool = False,
    device: str | None = None,
) -> list[str]:
    """Submit `jobs` jobs to a cluster, each running the same suite on the same folder; return the jobs' ids.

    Raises:
        InputError: as `bench_command`, or submitit is not installed, or there is no such cluster here.
    """
    check_jobs(jobs)
    cells = plan(suite, request, out).cells
    try:
        submitted = submit_cells(
            cells, out, jobs=jobs, cluster=cluster, parameters=parameters, retry_failed=retry_failed, device=device
        )
        return [str(job.job_id) for job in submitted]
    except ImportError as error:
        raise InputError("a cluster needs submitit: pip install 'expunge[slurm]'") from error
    except (RuntimeError, FileNotFoundError) as error:  # submitit's, where there is no sbatch
        raise InputError(f"cannot submit to {cluster} here: {error}") from error


def check_jobs(jobs: int) -> None:
    """Refuse a number of processes or jobs that is none.

    Raises:
        InputError: it is below 1.
    """
    if jobs < 1:
        raise InputError(f"expected --jobs of at least 1, got {jobs}")


def write_pages(record: Mapping[str, Any], out: Path, *, stale_only: bool = False) -> None:
    """Write the page of each cell that is done.

    Args:
        record: of the whole benchmark.
        stale_only: leave pages alone that are newer than their record.
    """
    table = record["table"]
    place, status = (table["columns"].index(name) for name in ("id", "status"))
    for row in table["rows"]:
        folder = out / "cells" / row[place]
        page = folder / "report.html"
        if row[status] != "done" or (stale_only and _newer(page, folder / "record.json")):
            continue
        write_atomically({page: html_writer(read_record(folder))})


def _newer(page: Path, record: Path) -> bool:
    return page.exists() and page.stat().st_mtime >= record.stat().st_mtime


def write_tables(
    cells: Sequence[Cell], out: Path, record: Mapping[str, Any], points: Mapping[str, Sequence[Point]]
) -> tuple[Path, ...]:
    """Write the record of the whole, its page, tables and plots of what is done so far; return their paths.

    Args:
        points: of the paper's analyses, by name, where the suite has them.
    """
    rows = tidy_rows(cells, out)
    alike = comparable(rows)
    summaries = summarize(alike)
    writers: dict[Path, Callable[[Path], None]] = {
        out / "report.html": text_writer(bench_html(record)),
        out / "bench.json": json_writer(record),
        out / "results.csv": csv_writer(rows),
        out / "results.parquet": parquet_writer(rows),
        out / "tables.md": text_writer(markdown(summaries, rows)),
        out / "tables.tex": text_writer(latex(summaries, rows)),
    }
    for number, group in enumerate(_first_groups(summaries)):
        if any("forget_accuracy" in one.figures for one in group):
            writers[out / "plots" / f"forget_retain_{number}.svg"] = forget_against_retain(group, alike)
        if any("tug_of_war" in one.figures for one in group):
            writers[out / "plots" / f"cost_quality_{number}.svg"] = cost_against_quality(group)
    found = growths(rows)
    if len({one.factor for one in found}) == len(FACTORS):  # a suite that varies all of them
        writers[out / "scaling.md"] = text_writer(growth_table(found))
        for factor in FACTORS:
            for cost in ("flops", "seconds"):
                here = [one for one in found if (one.factor, one.cost) == (factor, cost)]
                if here:
                    writers[out / "plots" / f"scaling_{factor}_{cost}.svg"] = growth(here, cost, factor)
    if points:
        writers |= analysis_writers(points, out)
    write_atomically(writers)
    return tuple(writers)


def _first_groups(summaries: Sequence[Any]) -> list[list[Any]]:
    """Return, for each data set and model, the summaries of the first set of classes: of all of them, if several."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for one in summaries:
        group = groups.setdefault((one.data, one.model), [])
        if not group or group[0].forget == one.forget:
            group.append(one)
    return list(groups.values())


def _check_data(cells: Sequence[Cell]) -> None:
    """Open each data set once and find the classes in it, so that a mistake is told before the work."""
    for options in {str(cell.original.options): cell.original.options for cell in cells}.values():
        source = open_source(options.spec, label_column=options.label_column, image_column=options.image_column)
        refuse_idle_columns(options, source)
        source, _ = align(source, options.class_names)
        known: dict[frozenset[int], tuple[str, ...]] = {}
        here = [cell for cell in cells if cell.original.options == options]
        names = {name for cell in here for name in cell.original.gone}
        for forget in dict.fromkeys(cell.forget for cell in here):
            labels = frozenset(resolve_classes(forget, source.class_names))
            again = [source.class_names[label] for label in sorted(labels) if source.class_names[label] in names]
            if again:
                which = "were" if len(again) > 1 else "was"
                raise InputError(
                    f"nothing to forget: the weights say that {', '.join(again)} {which} forgotten before or never seen"
                )
            if labels in known:
                both = " and ".join(",".join(one) for one in (known[labels], forget))
                raise InputError(f"{both} are the same classes: give each set once")
            known[labels] = forget
