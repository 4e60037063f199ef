"""The command line: parse, call one public function, print. Heavy imports happen inside a command."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.bench.command import Line, Plan
    from expunge.commands import Outcome, RecordOptions
    from expunge.journal import Journal
    from expunge.schema import Phase, Record
    from expunge.verify import Finding
    from expunge.workspace import DataOptions

app = typer.Typer(
    help="Make a trained classifier forget whole classes, without reading them, and say honestly how well it went.",
    epilog="Exit codes: 0 done · 1 done, but a stated check failed · 2 a mistake in what was given (nothing written).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataText = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SRC",
        help="'digits', a folder (one sub-folder a class, or parquet), hf:NAME or torchvision:NAME.",
        rich_help_panel="Data",
    ),
]
LabelColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Label column, where there are several.", rich_help_panel="Data")
]
ImageColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Image column, where it has no usual name.", rich_help_panel="Data")
]
ClassNames = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="All classes in the order of the model's outputs, where neither weights nor data name them.",
        rich_help_panel="Data",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="N or HxW",
        help="Image size in pixels; else the weights', the zoo's, or the images' own.",
        rich_help_panel="Preprocessing",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Channel means of images in \\[0, 1]; else the weights', the zoo's, or measured.",
        rich_help_panel="Preprocessing",
    ),
]
Std = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Channel standard deviations.", rich_help_panel="Preprocessing")
]
Channels = Annotated[
    int | None,
    typer.Option(min=1, max=3, help="1 (grey) or 3; else as the model takes.", rich_help_panel="Preprocessing"),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Leave out (and count) images that cannot be decoded.", rich_help_panel="Data"),
]
SPEC_HELP = "torchvision:NAME, timm:NAME, hf:NAME, allcnn, or path/to/file.py:function; arguments as ?key=value&..."
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all randomness.")]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps; else a GPU where there is one.")
]
Ledger = Annotated[
    Path | None,
    typer.Option(
        "--ledger",
        metavar="FILE",
        envvar="EXPUNGE_LEDGER",
        help="Where the run is entered; by default expunge-ledger.sqlite beside DIR. See expunge log.",
        rich_help_panel="Record",
    ),
]
NoLedger = Annotated[bool, typer.Option("--no-ledger", help="Enter the run nowhere.", rich_help_panel="Record")]
Sign = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        metavar="KEY",
        help="Sign the record and the weights with this private key (PEM; its password in EXPUNGE_KEY_PASSWORD).",
        rich_help_panel="Record",
    ),
]
IncludeImages = Annotated[
    bool,
    typer.Option(
        "--include-images",
        help="Keep pictures of a few samples (images.json), which may show people, and show them on the page.",
        rich_help_panel="Record",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
RecordOut = Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")] = Path("expunge-demo"),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """See it work: train on scikit-learn's digits, forget the threes, compare with retraining. No network needed."""
    with _user_errors("run the same command again"):
        from expunge.commands import demo_command

        with _journal(quiet) as journal:
            outcome = demo_command(out, seed=seed, journal=journal)
        _finish(outcome, quiet)


@app.command()
def train(
    data: DataText,
    model: Annotated[str, typer.Option(metavar="SPEC", help=SPEC_HELP)],
    out: Annotated[Path, typer.Option(metavar="W.safetensors", help="Where the weights go.")],
    without: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Classes never shown: makes a retrained reference.", rich_help_panel="Data"),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Train on N images of each class only.", rich_help_panel="Data"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.", rich_help_panel="Recipe")] = 12,
    lr: Annotated[float, typer.Option(help="Peak learning rate (AdamW, one cycle).", rich_help_panel="Recipe")] = 0.002,
    batch_size: Annotated[int, typer.Option(min=2, rich_help_panel="Recipe", help="Images a step.")] = 256,
    augment: Annotated[
        bool | None,
        typer.Option(help="Mirror and shift images; by default for all but digits.", rich_help_panel="Recipe"),
    ] = None,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    class_names: ClassNames = None,
    skip_bad: SkipBad = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    channels: Channels = None,
    seed: Seed = 0,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train a classifier: an original, or (--without) its retrained reference.

    Interrupted, it goes on after the last finished epoch when the same command is run again.
    """
    with _user_errors("run the same command again to go on after the last finished epoch", together=True):
        from dataclasses import replace

        from expunge.commands import TRAIN_DEFAULT, train_command

        options = _data_options(data, label_column, image_column, class_names, size, mean, std, channels, skip_bad)
        with _journal(quiet) as journal:
            metadata = train_command(
                options,
                model,
                out,
                config=replace(TRAIN_DEFAULT, epochs=epochs, lr=lr, batch_size=batch_size),
                leave_out=_list(without),
                per_class=per_class,
                augment=augment,
                seed=seed,
                device=device,
                journal=journal,
            )
        if not quiet and _first() and metadata.training is not None:
            never = f", never shown: {', '.join(metadata.never_seen)}" if metadata.never_seen else ""
            Console().print(
                f"Test accuracy {metadata.training['test_accuracy']:.1%} after {epochs} epochs, "
                f"{metadata.training['seconds']:.0f} s{never}\nWrote {out}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


@app.command()
def forget(
    weights: Annotated[
        Path, typer.Option(metavar="W", help="Trained weights: .safetensors, a .pt/.pth state dict, or a hub folder.")
    ],
    data: DataText,
    classes: Annotated[
        list[str], typer.Option(metavar="A,B", help="Classes to forget, by name or index; may be repeated.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where unlearned.safetensors, record.json and report.html go.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="SPEC", help=f"{SPEC_HELP}. Not needed where the weights say it.")
    ] = None,
    retain_per_class: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw N images of each retained class.", rich_help_panel="Retain sample"),
    ] = None,
    retain_share: Annotated[
        float | None,
        typer.Option(metavar="F", help="Or this share of each; by default all.", rich_help_panel="Retain sample"),
    ] = None,
    retain: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Take it from the train images of this source instead of --data. A forgotten class in it is refused.",
            rich_help_panel="Retain sample",
        ),
    ] = None,
    drop_forgotten: Annotated[
        bool,
        typer.Option(
            "--drop-forgotten",
            help="Leave images of a forgotten class in --retain out, unread and counted, instead of refusing them.",
            rich_help_panel="Retain sample",
        ),
    ] = False,
    method: Annotated[str, typer.Option(help="Unlearning method.", rich_help_panel="Method")] = "unsir",
    preset: Annotated[
        str, typer.Option(help="Its settings: default (calibrated), fast, paper, notebook.", rich_help_panel="Method")
    ] = "default",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change one, as impair.lr=0.002; may be repeated.",
            rich_help_panel="Method",
        ),
    ] = None,
    retrained: Annotated[
        Path | None,
        typer.Option(metavar="W", help="Weights of the same model trained without the classes, to compare with."),
    ] = None,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    class_names: ClassNames = None,
    skip_bad: SkipBad = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    channels: Channels = None,
    ledger: Ledger = None,
    no_ledger: NoLedger = False,
    sign: Sign = None,
    include_images: IncludeImages = False,
    seed: Seed = 0,
    device: Device = None,
    as_json: RecordOut = False,
    quiet: Quiet = False,
) -> None:
    """Make a trained classifier forget classes: new weights, a record, and a plain answer.

    The method never reads an image of a class to forget: it learns noise from the model itself, impairs the model with
    it, and repairs it with a retained sample. Held-out images in --data are read afterwards, to measure.
    """
    with _user_errors("nothing was written", together=True):
        from expunge.commands import RetainOptions, forget_command

        options = _data_options(data, label_column, image_column, class_names, size, mean, std, channels, skip_bad)
        with _journal(quiet or as_json) as journal:
            outcome = forget_command(
                options,
                model,
                weights,
                classes,
                out,
                retain=RetainOptions(
                    per_class=retain_per_class, share=retain_share, source=retain, drop_forgotten=drop_forgotten
                ),
                method=method,
                preset=preset,
                settings=settings or (),
                retrained=retrained,
                seed=seed,
                device=device,
                keep=_record_options(out, ledger, no_ledger, sign, include_images),
                journal=journal,
            )
        _finish(outcome, quiet, as_json=as_json)


@app.command()
def audit(
    original: Annotated[Path, typer.Option(metavar="W", help="Weights before.", rich_help_panel="Models")],
    unlearned: Annotated[
        Path, typer.Option(metavar="U", help="Weights after, made by any tool.", rich_help_panel="Models")
    ],
    data: DataText,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where record.json and report.html go.")],
    retrained: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="R",
            help="Weights trained without the classes: the measure of everything. Give two for the noise floor.",
            rich_help_panel="Models",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help=f"{SPEC_HELP}. Not needed where the weights say it.", rich_help_panel="Models"
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="Classes that were to be forgotten; else those that U says it forgot."),
    ] = None,
    audits: Annotated[
        str | None, typer.Option(metavar="A,B", help="Attacks to run, by name; by default all of the default budget.")
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="default|large",
            help="large: judge the method too, by many models that are trained for it. Hours; goes on where it was.",
            rich_help_panel="Budget large",
        ),
    ] = "default",
    members: Annotated[
        int, typer.Option(min=3, metavar="N", help="Models of each kind to train.", rich_help_panel="Budget large")
    ] = 8,
    method: Annotated[str, typer.Option(help="Method that is judged.", rich_help_panel="Budget large")] = "unsir",
    preset: Annotated[str, typer.Option(help="Its preset.", rich_help_panel="Budget large")] = "default",
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the data to train a model.", rich_help_panel="Budget large")
    ] = 12,
    no_training_data: Annotated[
        bool,
        typer.Option(
            "--no-training-data",
            help="No image of --data was trained on: attacks that need such images are skipped.",
            rich_help_panel="Data",
        ),
    ] = False,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    class_names: ClassNames = None,
    skip_bad: SkipBad = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    channels: Channels = None,
    ledger: Ledger = None,
    no_ledger: NoLedger = False,
    sign: Sign = None,
    include_images: IncludeImages = False,
    seed: Seed = 0,
    device: Device = None,
    as_json: RecordOut = False,
    quiet: Quiet = False,
) -> None:
    """Judge an unlearned model: what is gone at the output, what is left inside, how quickly it comes back.

    Every figure stands beside the original's and the retrained model's, with its 95 % interval. Without a retrained
    model much stays unknown, and the answer says so.
    """
    with _user_errors("nothing was written"):
        from dataclasses import replace

        from expunge.commands import TRAIN_DEFAULT, EnsembleOptions, audit_command
        from expunge.errors import InputError

        if budget not in ("default", "large"):
            raise InputError(f"expected --budget default or large, got {budget!r}")
        recipe = replace(TRAIN_DEFAULT, epochs=epochs)
        many = EnsembleOptions(members=members, method=method, preset=preset, recipe=recipe)
        options = _data_options(data, label_column, image_column, class_names, size, mean, std, channels, skip_bad)
        with _journal(quiet or as_json) as journal:
            outcome = audit_command(
                options,
                model,
                original,
                unlearned,
                out,
                classes=classes or (),
                retrained=retrained or (),
                audits=_list(audits),
                training_data=not no_training_data,
                ensembles=many if budget == "large" else None,
                seed=seed,
                device=device,
                keep=_record_options(out, ledger, no_ledger, sign, include_images),
                journal=journal,
            )
        if as_json:
            _print_file(outcome.files)
        elif not quiet:
            _show_audit(outcome)
        verdict = outcome.record.verdict
        if verdict is not None and any(verdict[name]["answer"] == "no" for name in LAYERS):
            raise typer.Exit(1)


@app.command()
def bench(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE",
            help="quick (digits, no download), slice (of CIFAR-10), field, paper, analyses, scaling, own (yours).",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where records, tables and plots go; shared, if you like.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="CIFAR-10 (slice, field), the folder of cifar10, cifar100 and yaleb (paper), yours (own, analyses).",
            rich_help_panel="What",
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B", help="Forget these together; repeated: another set each time.", rich_help_panel="What"
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these methods.", rich_help_panel="What")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Training seeds (own: unlearning seeds).", rich_help_panel="What"),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Runs that each method may spend on finding its settings, besides; 1: none.",
            rich_help_panel="What",
        ),
    ] = None,
    audits: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Attacks of expunge audit, on every cell.", rich_help_panel="What"),
    ] = None,
    analysis: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Only these of the paper's analyses (suite analyses).", rich_help_panel="What"
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="W", help="Your trained weights.", rich_help_panel="Your own (suite own)")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help=f"{SPEC_HELP}. Not needed where the weights say it.",
            rich_help_panel="Your own (suite own)",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="To train the retrained models; by default what the weights say, else 12. 0: train none.",
            rich_help_panel="Your own (suite own)",
        ),
    ] = None,
    retain_per_class: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Retained images of each class; by default all.",
            rich_help_panel="Your own (suite own)",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", help="Processes, or jobs on a cluster.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do failed cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells, and do nothing.")] = False,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="PARTITION", help="Submit to SLURM instead, and leave; needs submitit.", rich_help_panel="Cluster"
        ),
    ] = None,
    slurm_hours: Annotated[
        float, typer.Option(metavar="H", help="Time limit of a job.", rich_help_panel="Cluster")
    ] = 4.0,
    slurm_gpus: Annotated[int, typer.Option(min=0, help="GPUs of a job.", rich_help_panel="Cluster")] = 0,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    class_names: ClassNames = None,
    skip_bad: SkipBad = False,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    channels: Channels = None,
    device: Device = None,
    as_json: RecordOut = False,
    quiet: Quiet = False,
) -> None:
    """Lay methods side by side: each by default and tuned, with intervals, cost, and the distance to retraining.

    Every cell is done once and kept: interrupted or killed, the same command goes on. Several processes and machines
    may run it on one folder. A cell that fails is recorded with its error; the rest goes on, and it leaves with 1.
    """
    with _user_errors("finished cells are kept: run the same command again to go on"):
        from expunge.bench.command import bench_command, plan, submit_command
        from expunge.bench.suites import Request

        options = (
            _data_options(data, label_column, image_column, class_names, size, mean, std, channels, skip_bad)
            if data is not None
            else None
        )
        request = Request(
            data=options,
            classes=tuple(_list(one) for one in classes or ()),
            methods=_list(methods),
            seeds=seeds,
            trials=trials,
            audits=_list(audits),
            analysis=_list(analysis),
            model=model,
            weights=weights,
            epochs=epochs,
            retain_per_class=retain_per_class,
        )
        if dry_run:
            _show_plan(plan(suite, request, out))
            return
        if slurm is not None:
            parameters = {
                "slurm_partition": slurm,
                "timeout_min": max(1, round(60 * slurm_hours)),
                "gpus_per_node": slurm_gpus,
            }
            names = submit_command(suite, request, out, jobs=jobs, parameters=parameters)
            typer.echo(f"Submitted {', '.join(names)}. The same command without --slurm writes the tables.")
            return
        told = None if quiet or as_json else _show_line
        outcome = bench_command(suite, request, out, jobs=jobs, retry_failed=retry_failed, device=device, told=told)
        result = outcome.result
        if as_json:
            _print_file(outcome.files)
        elif not quiet:
            lost = f", {len(result.missing)} not done (a process died: run it again)" if result.missing else ""
            typer.echo(f"{result.cells} cells: {len(result.failed)} failed{lost}")
            for name in result.failed:
                typer.echo(f"failed: {name} (--retry-failed does it again)")
            typer.echo(f"Wrote {', '.join(str(path) for path in outcome.files)}")
        if result.failed or result.missing:
            raise typer.Exit(1)


def _show_plan(found: Plan) -> None:
    for cell in found.cells:
        typer.echo(cell.id)
    typer.echo(
        f"{len(found.cells)} cells ({found.done} done, {found.failed} failed), {found.models} models to train, "
        f"{found.tunings} searches for settings"
    )


def _show_line(line: Line) -> None:
    """Tell of one finished item: what came of it, and how long the rest will take."""
    about = line.record["item"]
    if about["status"] == "failed":
        came = f"FAILED: {about['error']['type']}: {about['error']['message']}"
    elif about["kind"] == "cell":
        after = line.record["metrics"]["after"]
        came = f"A_f {_percent(after['forget_accuracy'])}, A_r {_percent(after['retain_accuracy'])}"
    elif about["kind"] == "tuning":
        came = f"{' '.join(line.record['settings']) or 'as by default'} ({len(line.record['trials'])} trials)"
    else:
        training = line.record["training"]
        came = f"test accuracy {_percent(training['test_accuracy'])}" if training else "as given"
    left = line.seconds_left or 0
    wait = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"
    typer.echo(
        f"[{line.number}/{line.total}] {line.item.id}: {came}; {about['seconds']:.1f} s; about {wait} left", err=True
    )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What expunge forget, audit or bench wrote to.")],
    form: Annotated[
        str, typer.Option("--format", metavar="html|md|json", help="html: DIR/report.html; the others are printed.")
    ] = "html",
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    include_images: Annotated[
        bool, typer.Option("--include-images", help="Show the pictures of samples that were kept with the record.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Make the page of a record again, a Markdown summary (fit for a model card), or its JSON in canonical form."""
    with _user_errors():
        from expunge.errors import InputError
        from expunge.files import write_atomically
        from expunge.report import (
            bench_html,
            canonical_json,
            html_writer,
            is_bench,
            markdown_summary,
            read_bench,
            read_pictures,
            read_record,
            text_writer,
        )

        if form not in ("html", "md", "json"):
            raise InputError(f"expected --format html, md or json, got {form!r}")
        if show and form != "html":
            raise InputError(f"expected --open with --format html, got {form}")
        if include_images and form != "html":
            raise InputError(f"expected --include-images with --format html, got {form}")
        whole = is_bench(folder)
        if whole and (form == "md" or include_images):
            raise InputError(
                "a benchmark has a page and JSON here; its Markdown is in tables.md, and it has no pictures"
            )
        record = read_bench(folder) if whole else read_record(folder)
        if form != "html":
            typer.echo(markdown_summary(record) if form == "md" else canonical_json(record), nl=False)
            return
        page = folder / "report.html"
        pictures = read_pictures(folder, record) if include_images else None
        write_atomically({page: text_writer(bench_html(record)) if whole else html_writer(record, pictures)})
        if not quiet:
            typer.echo(f"Wrote {page}")
        if show:
            _open(page)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What expunge forget or audit wrote to.")],
    key: Annotated[Path | None, typer.Option(metavar="PUB", help="Public key (PEM) that must have signed it.")] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Run the erasure again and compare the weights, bit for bit on a CPU.")
    ] = False,
    audit: Annotated[bool, typer.Option("--audit", help="Measure again and compare every value.")] = False,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Was this image in the retain sample? Pixel for pixel.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="W", help="The original weights.", rich_help_panel="What lies elsewhere now")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SRC", help="The data.", rich_help_panel="What lies elsewhere now")
    ] = None,
    retain: Annotated[
        str | None,
        typer.Option(
            metavar="SRC", help="The retain sample, if it had a source.", rich_help_panel="What lies elsewhere now"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="The model; needed to confirm one whose code would be run.",
            rich_help_panel="What lies elsewhere now",
        ),
    ] = None,
    parents: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Records of earlier erasures, or a folder of such folders; by default those beside W and DIR.",
            rich_help_panel="What lies elsewhere now",
        ),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="EXPUNGE_LEDGER",
            help="The ledger; by default expunge-ledger.sqlite beside DIR.",
            rich_help_panel="What lies elsewhere now",
        ),
    ] = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Check a record: hashes, the chain of earlier erasures, ledger and signature; with --replay the erasure itself.

    Leaves with 1 where something does not match, and says what. What could not be checked is said too.
    """
    with _user_errors():
        from expunge.verify import Elsewhere
        from expunge.verify import verify as check

        where = Elsewhere(
            weights=weights, data=data, retain=retain, model=model, parents=tuple(parents or ()), ledger=ledger,
            device=device,
        )  # fmt: skip
        with _journal(quiet or as_json) as journal:
            findings = check(folder, key=key, replay=replay, audit=audit, image=image, where=where, journal=journal)
        if as_json:
            from dataclasses import asdict

            from expunge.files import json_text

            typer.echo(json_text([asdict(found) for found in findings]), nl=False)
        elif not quiet:
            _show_findings(folder, findings)
        if any(found.ok is False for found in findings):
            raise typer.Exit(1)


def _show_findings(folder: Path, findings: Sequence[Finding]) -> None:
    """Print one line for each check, and what they come to."""
    console = Console(highlight=False, soft_wrap=True)
    words = {True: ("ok", "green"), False: ("NO", "red"), None: ("-", "yellow")}
    for found in findings:
        word, color = words[found.ok]
        console.print(f"[{color}]{word:<3}[/]{_plain(f'{found.check}: {found.sentence}')}")
    wrong = sum(found.ok is False for found in findings)
    unchecked = sum(found.ok is None for found in findings)
    told = "1 check fails" if wrong == 1 else f"{wrong} checks fail" if wrong else "everything that was checked matches"
    console.print(f"{_plain(str(folder))}: {told}{f'; {unchecked} could not be checked (-)' if unchecked else ''}.")


@app.command()
def sign(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What expunge forget or audit wrote to.")],
    key: Annotated[Path, typer.Option(metavar="KEY", help="Private key (PEM; its password in EXPUNGE_KEY_PASSWORD).")],
    quiet: Quiet = False,
) -> None:
    """Sign a record and its weights with a local key, in the OpenSSF model-signing format: DIR/model.sig.

    What does not match its record is not signed. The signature says who recorded this, not that it is right.
    """
    with _user_errors("nothing was signed"):
        from expunge.signing import MEANING
        from expunge.verify import sign_record

        path = sign_record(folder, key, _password())
        if not quiet:
            Console(highlight=False, soft_wrap=True).print(f"Wrote {path}\n{MEANING}", markup=False)


@app.command()
def log(
    ledger: Annotated[
        Path, typer.Option(metavar="FILE", envvar="EXPUNGE_LEDGER", help="The ledger that runs were entered in.")
    ] = Path("expunge-ledger.sqlite"),
    check: Annotated[
        bool, typer.Option("--check", help="Find entries that were edited, removed or cut off; leaves with 1 then.")
    ] = False,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Records to hold the ledger against, or a folder of such folders; by default those beside it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each entry as a line of JSON.")] = False,
) -> None:
    """List what was forgotten from which model, when, by which command, and how it went."""
    with _user_errors():
        from expunge.errors import InputError
        from expunge.ledger import read_entries

        if check:
            from expunge.verify import check_ledger

            problems = check_ledger(ledger, tuple(records) if records else (ledger.absolute().parent,))
            for problem in problems:
                typer.echo(f"{ledger}: {problem}")
            if problems:
                raise typer.Exit(1)
            typer.echo(f"{ledger}: an unbroken chain of {len(read_entries(ledger))} entries")
            return
        if records:
            raise InputError("expected --records with --check")
        entries = read_entries(ledger)
        if as_json:
            for entry in entries:
                typer.echo(entry.text)
        else:
            _show_log([entry.content for entry in entries[1:]])


def _show_log(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print each entry as a few short lines: they must be whole to be of use, on a narrow terminal too."""
    console = Console(highlight=False, soft_wrap=True)
    if not entries:
        console.print("Nothing was entered yet.")
    for entry in entries:
        told = {name: entry.get(name) or "?" for name in LOGGED}  # an edited entry may hold anything
        verdict, classes = entry.get("verdict"), entry.get("classes")
        answers = verdict.items() if isinstance(verdict, dict) else ()
        names = ", ".join(map(str, classes)) if isinstance(classes, list) else "?"
        console.print(f"[bold]{entry.get('number', '?')}  {told['time']}  {_plain(names)}[/]")
        for line in (
            f"{told['command']}, {told['method']}, seed {entry.get('seed')}, {told['model']}",
            f"weights {str(told['original'])[:16]} -> {str(told['unlearned'])[:16]}",
            ", ".join(f"{str(name).replace('_', ' ')}: {_answer(answer)}" for name, answer in answers),
            f"record {str(told['content_hash'])[:16]} in {told['record']}",
            entry.get("again") or "",
        ):
            if line:
                console.print(f"   {line}", markup=False)


LOGGED = ("time", "command", "method", "model", "original", "unlearned", "content_hash", "record")


def _answer(answer: Any) -> str:
    return (
        "unknown" if answer is None else {True: "yes", False: "no"}[answer] if answer in (True, False) else str(answer)
    )


def _open(page: Path) -> None:
    import webbrowser

    if not webbrowser.open(page.absolute().as_uri()):
        typer.echo(f"found no browser to open {page} with", err=True)
        raise typer.Exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        from expunge import __version__

        typer.echo(f"expunge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    try:
        app()
    except SystemExit as end:
        if _several():
            from expunge.processes import leave

            leave(end.code if isinstance(end.code, int) else 0)
        raise


# Reading options


def _list(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text is not None else ()


def _data_options(
    data: str,
    label_column: str | None,
    image_column: str | None,
    class_names: str | None,
    size: str | None,
    mean: str | None,
    std: str | None,
    channels: int | None,
    skip_bad: bool,
) -> DataOptions:
    from expunge.errors import InputError
    from expunge.workspace import DataOptions

    if channels == 2:
        raise InputError("expected --channels 1 or 3, got 2")
    return DataOptions(
        spec=data,
        label_column=label_column,
        image_column=image_column,
        class_names=_list(class_names) or None,
        size=_size(size),
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        channels=channels,
        skip_bad=skip_bad,
    )


def _record_options(
    out: Path, ledger: Path | None, no_ledger: bool, key: Path | None, include_images: bool
) -> RecordOptions:
    from expunge.commands import RecordOptions
    from expunge.errors import InputError
    from expunge.ledger import NAME

    if ledger is not None and no_ledger and not os.environ.get("EXPUNGE_LEDGER"):
        raise InputError("expected --ledger or --no-ledger, got both")
    usual = out.absolute().parent / NAME
    return RecordOptions(
        ledger=None if no_ledger else ledger or usual, key=key, password=_password(), include_images=include_images
    )


def _password() -> str | None:
    """Return the password of the key to sign with: from the environment, since arguments are seen by everybody."""
    return os.environ.get("EXPUNGE_KEY_PASSWORD") or None


def _size(text: str | None) -> tuple[int, int] | None:
    from expunge.errors import InputError

    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"expected --size N or HxW in pixels, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    from expunge.errors import InputError

    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"expected {option} as numbers with commas between, got {text!r}") from None


# Showing what happens


@contextmanager
def _user_errors(interrupted: str = "", *, together: bool = False) -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 2; an interrupt into one line and 130.

    Args:
        together: several processes may do this command together. The first that fails tells why; the others end.
    """
    errors = Console(stderr=True)
    try:
        if _several():
            from expunge import processes

            if not together:
                processes.refuse_several("this command")
            processes.ranks()  # from here on an error of one is known to all
        yield
        if _several():
            processes.wait()
    except KeyboardInterrupt:
        if _several() and not _tells():
            raise typer.Exit(130) from None
        errors.print(f"interrupted{': ' + interrupted if interrupted else ''}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except typer.Exit:
        if _several():
            processes.wait()
        raise
    except Exception as error:  # noqa: BLE001 (every other one is told apart below)
        if _several() and not _tells():
            raise typer.Exit(LOST) from None
        if _several() and _is_lost(error):
            done = interrupted or "nothing was written"
            errors.print(f"[bold red]error:[/] another process of this run ended: {done}", soft_wrap=True)
            raise typer.Exit(LOST) from None
        line = _one_line(error)
        if line is None:
            traceback.print_exc()
            raise typer.Exit(DEFECT) from None
        errors.print(f"[bold red]error:[/] {_plain(line)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


LOST = 75  # another process of the run ended
DEFECT = 70  # a mistake of ours: its traceback is wanted, and 1 would say "done, but"


def _several() -> bool:
    """Return whether a launcher started more than this process."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _first() -> bool:
    """Return whether this is the process that prints."""
    return not _several() or int(os.environ.get("RANK") or 0) == 0


def _tells() -> bool:
    from expunge.processes import tell_failure

    return tell_failure()


def _is_lost(error: Exception) -> bool:
    from expunge.processes import is_lost_connection

    return is_lost_connection(error)


def _one_line(error: Exception) -> str | None:
    """Return the line to print for a user's mistake, or None for a defect of ours, whose traceback is wanted."""
    from expunge.errors import InputError, first_line

    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or first_line(error)}"
    if "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"{first_line(error)}; lower impair.batch_size and repair.batch_size with --set, or use --device cpu"
    cause = getattr(error, "__cause__", None)
    return str(cause) if isinstance(cause, InputError) else None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def _journal(quiet: bool) -> Iterator[Journal]:
    """Give a journal that shows its phases: live bars in a terminal, one line a phase elsewhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from expunge.journal import Journal

    if quiet or not _first():
        yield Journal()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Journal(report=_report)
        return
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Journal(progress)


def _report(phase: Phase) -> None:
    steps = f"{phase.steps} steps, " if phase.steps else ""
    told = f", {phase.signals}" if phase.signals else ""
    note = f"; {phase.note}" if phase.note else ""
    typer.echo(f"{phase.name}: {steps}{phase.seconds:.1f} s{told}{note}", err=True)


def _finish(outcome: Outcome, quiet: bool, *, as_json: bool = False) -> None:
    """Print the answer; leave with 1 where a stated check failed. Of several processes, the first does."""
    if not _first():
        return
    record = outcome.record
    failed = [name for name in ("forgotten", "kept", "signals") if record.checks[name] is False]
    if as_json:
        _print_file(outcome.files)
    elif not quiet:
        _show(record.metrics, record.classes["forget"], outcome)
    if failed:
        raise typer.Exit(1)


def _print_file(written: Sequence[Path]) -> None:
    """Print the record that is among the files a command wrote, as it is there."""
    path = next(path for path in written if path.name in ("record.json", "bench.json"))
    typer.echo(path.read_text(encoding="utf-8"), nl=False)


def _show(metrics: Mapping[str, Any], forgotten: Sequence[str], outcome: Outcome) -> None:
    from rich.table import Table

    console = Console(highlight=False)
    roles = [role for role in ("before", "after", "retrained") if role in metrics]
    table = Table("accuracy on held-out images", *roles, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    shown = ", ".join(forgotten[:4]) + (f" and {len(forgotten) - 4} more" if len(forgotten) > 4 else "")
    rows = (
        (f"forgotten: {_plain(shown)}", "forget_accuracy"),
        ("retained classes", "retain_accuracy"),
        ("retained, forgotten answers not allowed", "masked_retain_accuracy"),
        ("retained images called a forgotten class", "false_forget_rate"),
    )
    for title, key in rows:
        table.add_row(title, *(_percent(metrics[role][key]) for role in roles))
    console.print()
    console.print(table)
    console.print()
    for sentence in _sentences(outcome):
        console.print(sentence, markup=False)
    console.print(f"Wrote {', '.join(str(path) for path in outcome.files)}", markup=False, soft_wrap=True)


LAYERS = {
    "gone_at_the_output": "Gone at the output",
    "gone_inside": "Gone inside",
    "resists_relearning": "Resists relearning like a retrained model",
    "indistinguishable": "Indistinguishable under the attacks run",
    "rest_intact": "The rest is intact",
}


def _show_audit(outcome: Outcome) -> None:
    """Print the verdict first, then every figure beside the retrained model's, then what limits them."""
    record = outcome.record
    verdict = record.verdict
    assert verdict is not None
    console = Console(highlight=False)
    console.print()
    console.print(verdict["first_line"], markup=False, style="bold")
    colors = {"yes": "green", "no": "red", "unknown": "yellow"}
    for name, title in LAYERS.items():
        layer = verdict[name]
        console.print(f"\n[bold]{title}: [{colors[layer['answer']]}]{layer['answer']}[/][/]")
        _list_out(console, layer["evidence"])
    failed = [check["sentence"] for check in record.self_checks if check["ok"] is False]
    skipped = [f"{name}: {found['skipped']}" for name, found in record.audits.items() if found["skipped"]]
    for title, sentences in (
        ("What is wrong, by name", verdict["diagnosis"]),
        ("Self-checks that failed", failed),
        ("Attacks skipped", skipped),
        ("Not tested", verdict["not_tested"]),
    ):
        if sentences:
            console.print(f"\n[bold]{title}[/]")
            _list_out(console, sentences)
    console.print()
    console.print(_figures(record))
    console.print("The gap is to the retrained model, with its 95 % interval; * where that excludes zero.")
    console.print("Figures of each block are in the record.\n")
    console.print(verdict["scope"], markup=False)
    for note in outcome.notes:
        console.print(f"Note: {note}.", markup=False)
    seconds = sum(found["seconds"] for found in record.audits.values())
    console.print(f"The attacks took {seconds:.0f} s.")
    console.print(f"Wrote {', '.join(str(path) for path in outcome.files)}", markup=False, soft_wrap=True)


def _list_out(console: Console, sentences: Sequence[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for sentence in sentences:
        console.print(Padding(Text(sentence), (0, 0, 0, 2)))


def _figures(record: Record) -> Table:
    """Return the table of figures on each model, with the gap to the retrained one; of each block's, the last alone."""
    from rich.table import Table

    roles = ["original", "unlearned", *(["retrained"] if record.model["retrained"] else [])]
    table = Table("figure", *roles, "gap", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    sides = {"original": "before", "unlearned": "after", "retrained": "retrained"}
    for title, key in (("forget accuracy", "forget_accuracy"), ("retain accuracy", "retain_accuracy")):
        values = [record.metrics[sides[role]][key] for role in roles]
        table.add_row(title, *map(_value, values), _gap(record.metrics.get("gaps", {}).get(key)))
    for name, found in record.audits.items():
        for figure, measured in found["figures"].items():
            if figure.startswith("after "):
                continue
            figure = "" if figure == "head input" else f", {figure}"
            cells = [_value(measured[role]["value"]) if role in measured else "-" for role in roles]
            table.add_row(_plain(f"{name.replace('_', ' ')}{figure}"), *cells, _gap(measured.get("gap")))
    return table


def _gap(gap: Mapping[str, Any] | None) -> str:
    """Return a gap with its interval, and a star where that excludes zero."""
    if gap is None:
        return "-"
    between = f" [{_value(gap['low'])}, {_value(gap['high'])}]" if gap["low"] is not None else ""
    return _plain(f"{_value(gap['value'])}{between}{'*' if gap['found'] else ' '}")


def _value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) > 2 else f"{value:.2f}"


def _sentences(outcome: Outcome) -> Iterator[str]:
    record = outcome.record
    after, before, checks = record.metrics["after"], record.metrics["before"], record.checks
    if checks["forgotten"] is None:
        yield "Forgotten at the output: unknown, the data has no held-out image of a forgotten class."
    else:
        goal = _percent(checks["goal_forget_accuracy"])
        answer = "yes" if checks["forgotten"] else "NO"
        yield f"Forgotten at the output: {answer} ({_percent(after['forget_accuracy'])}; goal: at most {goal})."
    if checks["kept"] is None:
        yield "The rest is kept: unknown, the data has no held-out image of a retained class."
    else:
        change = 100 * (after["retain_accuracy"] - before["retain_accuracy"])
        answer = "yes" if checks["kept"] else "NO"
        goal = f"{-100 * checks['goal_retain_drop']:.0f}"
        yield f"The rest is kept: {answer} ({change:+.1f} points; goal: no worse than {goal})."
    yield from _calibrated(record.calibration)
    yield "Not measured: what the features inside still know, how fast it is relearned, what an attacker can tell."
    read, names = record.samples_read, record.classes["forget"]
    yield (
        f"The method read {record.data['retain_samples']:,} retained images and "
        f"{sum(read['method'][name] for name in names)} of the forgotten classes; "
        f"measuring read {sum(read['evaluation'][name] for name in names):,} held-out images of those."
    )
    cost = record.cost
    phases = ", ".join(f"{name} {phase['seconds']:.1f} s" for name, phase in cost["phases"].items())
    yield f"Took {cost['seconds']:.1f} s ({phases}), {cost['steps']} optimizer steps."
    preprocessing = record.data["preprocessing"]
    height, width = preprocessing["size"]
    yield f"Images: {height}x{width}, mean and std {_source(preprocessing['source'])}."
    yield from (f"Note: {note}." for note in outcome.notes)


def _calibrated(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Tell what a calibration did, in plain sentences."""
    if found is None:
        return
    trials = ", ".join(
        f"{trial['rate']:g} ({trial['outcome']}{f' after {steps} steps' if (steps := trial['steps']) else ''})"
        for trial in found["trials"]
    )
    rounds = "one round" if found["rounds"] == 1 else f"{found['rounds']} rounds"
    yield f"Without forget data, the goal is {'reached' if found['reached'] else 'NOT REACHED'}; {found['why']}."
    yield (
        f"Calibration took {rounds} of impair and repair: impair rates tried {trials}; repair rate "
        f"{found['repair_rate']:g}, batches of {found['batch_size']}; signals read on {found['held_out']} held-out "
        "retained images and on class impressions."
    )


def _source(source: str) -> str:
    words = {"given": "as given", "metadata": "from the weights", "measured": "measured on the data"}
    return words.get(source, f"from {source}'s configuration")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    main()
