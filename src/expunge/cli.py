"""The command line: parse, call one public function, print. Heavy imports happen inside a command."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.text import Text

from expunge.options import (
    AUDIT_HELP,
    METHOD_HELP,
    SPEC_HELP,
    Command,
    DataText,
    Device,
    Fsdp,
    Keeping,
    Overwrite,
    PrecisionText,
    Quiet,
    Reading,
    RecordOut,
    Seed,
    ask_for_shards,
    data_options,
    given_of,
    listed,
    password,
    record_options,
    spread,
)
from expunge.terminal import answers, progress
from expunge.terminal.words import plain, say

if TYPE_CHECKING:
    from expunge.commands import Outcome
    from expunge.schema import Precision

app = typer.Typer(
    help="Make a trained classifier forget whole classes, without reading them, and say honestly how well it went.",
    epilog="Exit codes: 0 done · 1 done, but a stated check failed (of an audit: a layer is answered no, or a "
    "self-check of the unlearned model failed) · 2 a mistake in what was given (nothing written).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(function: Command) -> Command:
    """Register a command; its docstring is its help, each paragraph on one line, since typer keeps breaks in them."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return app.command(help="\n\n".join(" ".join(one.split()) for one in paragraphs))(spread(function))


@_command
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")] = Path("expunge-demo"),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """See it work: train on scikit-learn's digits, forget the threes, compare with retraining. No network needed."""
    with _user_errors("run the same command again"):
        from expunge.commands import demo_command

        with progress.shown_journal(quiet or not _first()) as journal:
            outcome = demo_command(out, seed=seed, journal=journal)
        _finish(outcome, out, quiet)


@_command
def train(
    data: DataText,
    model: Annotated[str, typer.Option(metavar="SPEC", help=SPEC_HELP)],
    out: Annotated[Path, typer.Option(metavar="W.safetensors", help="Where the weights go.")],
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="Classes never shown: makes a retrained reference.", rich_help_panel="Data"),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Train on N images of each class only.", rich_help_panel="Data"),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Passes over the data.", rich_help_panel="Recipe")
    ] = 12,
    lr: Annotated[
        float, typer.Option(metavar="RATE", help="Peak learning rate (AdamW, one cycle).", rich_help_panel="Recipe")
    ] = 0.002,
    batch_size: Annotated[int, typer.Option(min=2, metavar="N", rich_help_panel="Recipe", help="Images a step.")] = 256,
    augment: Annotated[
        bool | None,
        typer.Option(
            metavar="", help="Mirror and shift images; by default for all but digits.", rich_help_panel="Recipe"
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            metavar="",
            help="Compute activations anew in the backward pass: less memory, more time, the same weights.",
            rich_help_panel="Recipe",
        ),
    ] = False,
    *,
    reading: Reading,
    seed: Seed = 0,
    device: Device = None,
    precision: PrecisionText = "auto",
    fsdp: Fsdp = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a classifier: an original, or (--without) its retrained reference.

    Interrupted, it goes on after the last finished epoch when the same command is run again. Weights that are there
    already are replaced only with --overwrite.
    """
    ask_for_shards(fsdp)
    with _user_errors("run the same command again to go on after the last finished epoch", together=True):
        from dataclasses import replace

        from expunge.commands import TRAIN_DEFAULT, train_command

        options = data_options(data, reading)
        with progress.shown_journal(quiet or not _first()) as journal:
            metadata = train_command(
                options,
                model,
                out,
                config=replace(
                    TRAIN_DEFAULT,
                    epochs=epochs,
                    lr=lr,
                    batch_size=batch_size,
                    precision=cast("Precision", precision),
                    gradient_checkpointing=gradient_checkpointing,
                ),
                leave_out=listed(*without or ()),
                per_class=per_class,
                augment=augment,
                seed=seed,
                device=device,
                overwrite=overwrite,
                journal=journal,
            )
        if not quiet and _first() and metadata.training is not None:
            never = f", never shown: {', '.join(metadata.never_seen)}" if metadata.never_seen else ""
            guess = 1 / (len(metadata.class_names) - len(metadata.never_seen))
            little = f" (a guess has {guess:.1%})" if metadata.training["test_accuracy"] < 2 * guess else ""
            say(
                Console(highlight=False),
                Text(
                    f"Test accuracy {metadata.training['test_accuracy']:.1%}{little} after "
                    f"{epochs} epoch{'' if epochs == 1 else 's'}, "
                    f"{metadata.training['seconds']:.0f} s{never}\nWrote {out}"
                ),
            )


@_command
def forget(
    weights: Annotated[
        Path,
        typer.Option(
            metavar="W",
            help="Trained weights: .safetensors, a .pt/.pth state dict, or a folder with them.",
        ),
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
            metavar="",
            help="Leave images of a forgotten class in --retain out, unread and counted, instead of refusing them.",
            rich_help_panel="Retain sample",
        ),
    ] = False,
    method: Annotated[str, typer.Option(metavar="NAME", help=METHOD_HELP, rich_help_panel="Method")] = "unsir",
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Its settings: default; of unsir also fast, paper, notebook; of others see docs/methods.md.",
            rich_help_panel="Method",
        ),
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
    *,
    reading: Reading,
    keeping: Keeping,
    seed: Seed = 0,
    device: Device = None,
    precision: PrecisionText = "auto",
    fsdp: Fsdp = False,
    overwrite: Overwrite = False,
    as_json: RecordOut = False,
    quiet: Quiet = False,
) -> None:
    """Make a trained classifier forget classes: new weights, a record, and a plain answer.

    UNSIR, the default method, never reads an image of a class to forget: it learns noise from the model, impairs it
    with that, and repairs it with a retained sample. Held-out images in --data are used afterwards, to measure.
    """
    ask_for_shards(fsdp)
    with _user_errors("nothing was written", together=True):
        from expunge.commands import RetainOptions, forget_command

        options = data_options(data, reading)
        with progress.shown_journal(quiet or as_json or not _first()) as journal:
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
                precision=cast("Precision", precision),
                retrained=retrained,
                seed=seed,
                device=device,
                keep=record_options(out, keeping),
                overwrite=overwrite,
                journal=journal,
            )
        _finish(outcome, out, quiet, as_json=as_json)


@_command
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
        typer.Option(
            metavar="A,B",
            help="Classes that were to be forgotten; else those that U says it forgot. Others that it says it forgot "
            "are not counted as retained.",
        ),
    ] = None,
    audits: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help=AUDIT_HELP),
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
        int | None,
        typer.Option(
            min=3, metavar="N", help="Models of each kind to train; by default 8.", rich_help_panel="Budget large"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Method that is judged; by default unsir.", rich_help_panel="Budget large"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its preset; by default default.", rich_help_panel="Budget large"),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Passes over the data to train a model; by default 12.",
            rich_help_panel="Budget large",
        ),
    ] = None,
    no_training_data: Annotated[
        bool,
        typer.Option(
            "--no-training-data",
            metavar="",
            help="No image of --data was trained on: attacks that need such images are skipped.",
            rich_help_panel="Data",
        ),
    ] = False,
    *,
    reading: Reading,
    keeping: Keeping,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: RecordOut = False,
    quiet: Quiet = False,
) -> None:
    """Judge an unlearned model: what is gone at the output, what is left inside, how quickly it comes back.

    Every figure stands beside the original's and the retrained model's, with its 95 % interval. Without a retrained
    model much stays unknown, and the answer says so.

    Leaves with 1 where a layer is answered no, or a self-check of the unlearned model failed; unknown is no reason to.
    """
    with _user_errors("nothing was written"):
        from dataclasses import replace

        from expunge.commands import TRAIN_DEFAULT, EnsembleOptions, audit_command
        from expunge.errors import InputError
        from expunge.verdict import failed

        if budget not in ("default", "large"):
            raise InputError(f"expected --budget default or large, got {budget!r}")
        for name, value in {"members": members, "method": method, "preset": preset, "epochs": epochs}.items():
            if value is not None and budget != "large":
                raise InputError(f"--{name} means nothing without --budget large")
        recipe = replace(TRAIN_DEFAULT, epochs=epochs or TRAIN_DEFAULT.epochs)
        many = EnsembleOptions(
            members=members or 8, method=method or "unsir", preset=preset or "default", recipe=recipe
        )
        options = data_options(data, reading)
        with progress.shown_journal(quiet or as_json or not _first()) as journal:
            outcome = audit_command(
                options,
                model,
                original,
                unlearned,
                out,
                classes=classes or (),
                retrained=retrained or (),
                audits=listed(*audits or ()),
                training_data=not no_training_data,
                ensembles=many if budget == "large" else None,
                seed=seed,
                device=device,
                keep=record_options(out, keeping),
                overwrite=overwrite,
                journal=journal,
            )
        if as_json:
            _print_file(outcome.files)
        elif not quiet:
            answers.show_audit(outcome, out)
        record = outcome.record
        if record.verdict is not None and failed(record.verdict, record.self_checks):
            raise typer.Exit(1)


@_command
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
        list[str] | None, typer.Option(metavar="A,B", help="Only these methods.", rich_help_panel="What")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Training seeds (own: unlearning seeds).", rich_help_panel="What"),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Runs that each method may spend on a search for its settings, which is laid beside its default; "
            "1: no search.",
            rich_help_panel="What",
        ),
    ] = None,
    audits: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="Attacks of expunge audit, on every cell.", rich_help_panel="What"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="Only cells named so by --dry-run; * is any text: 'cifar10-resnet18-*'.",
            rich_help_panel="What",
        ),
    ] = None,
    analysis: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B", help="Only these of the paper's analyses (suite analyses).", rich_help_panel="What"
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="W", help="Your trained weights (own).", rich_help_panel="Your own (suites own, analyses)"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help=f"{SPEC_HELP}. Not needed where the weights say it.",
            rich_help_panel="Your own (suites own, analyses)",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="To train the retrained models (own); by default what the weights say, else 12. 0: train none.",
            rich_help_panel="Your own (suites own, analyses)",
        ),
    ] = None,
    retain_per_class: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Retained images of each class; by default all (analyses: 100, with --model 1000).",
            rich_help_panel="Your own (suites own, analyses)",
        ),
    ] = None,
    train_per_class: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Train on N images of each class, and give methods a fifth of that (field, paper): hours, not days.",
            rich_help_panel="What",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", help="Processes, or jobs on a cluster.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", metavar="", help="Do failed cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Print the cells, and do nothing.")] = False,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="PARTITION", help="Submit to SLURM instead, and leave; needs submitit.", rich_help_panel="Cluster"
        ),
    ] = None,
    slurm_hours: Annotated[
        float | None, typer.Option(metavar="H", help="Time limit of a job; by default 4.", rich_help_panel="Cluster")
    ] = None,
    slurm_gpus: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="GPUs of a job; by default none.", rich_help_panel="Cluster")
    ] = None,
    *,
    reading: Reading,
    device: Device = None,
    as_json: RecordOut = False,
    quiet: Quiet = False,
) -> None:
    """Lay methods side by side: each by default and tuned, with intervals, cost, and the distance to retraining.

    Every cell is done once and kept: interrupted or killed, the same command goes on. Several processes and machines
    may run it on one folder. A cell that fails is recorded with its error; the rest goes on, and it leaves with 1.
    """
    with _user_errors("finished cells are kept; run the same command again to go on"):
        from expunge.bench.command import bench_command, check_jobs, plan, submit_command
        from expunge.bench.suites import Request, refuse_idle
        from expunge.errors import InputError
        from expunge.terminal import bench as terminal

        check_jobs(jobs)
        if slurm_hours is not None and not 0 < slurm_hours < MOST_HOURS:
            raise InputError(f"expected --slurm-hours above 0 and below {MOST_HOURS:,}, got {slurm_hours:g}")
        for option, value in (("--slurm-hours", slurm_hours), ("--slurm-gpus", slurm_gpus)):
            if value is not None and slurm is None:
                raise InputError(f"{option} means nothing without --slurm PARTITION")
        if data is None:
            refuse_idle(suite, given_of(reading))

        options = data_options(data, reading) if data is not None else None
        request = Request(
            data=options,
            classes=tuple(listed(one) for one in classes or ()),
            methods=listed(*methods or ()),
            seeds=seeds,
            trials=trials,
            audits=listed(*audits or ()),
            only=listed(*only or ()),
            analysis=listed(*analysis or ()),
            model=model,
            weights=weights,
            epochs=epochs,
            retain_per_class=retain_per_class,
            train_per_class=train_per_class,
        )
        if dry_run:
            terminal.show_plan(plan(suite, request, out))
            return
        if slurm is not None:
            parameters = {
                "slurm_partition": slurm,
                "timeout_min": max(1, round(60 * (slurm_hours or 4.0))),
                "gpus_per_node": slurm_gpus or 0,
            }
            names = submit_command(
                suite, request, out, jobs=jobs, parameters=parameters, retry_failed=retry_failed, device=device
            )
            typer.echo(f"Submitted {', '.join(names)}. The same command without --slurm writes the tables.")
            return
        show = None if quiet or as_json else terminal.shown
        outcome = bench_command(suite, request, out, jobs=jobs, retry_failed=retry_failed, device=device, show=show)
        if as_json:
            _print_file(outcome.files)
        elif not quiet:
            terminal.show_bench(outcome, out)
        if outcome.result.failed or outcome.result.missing:
            raise typer.Exit(1)


@_command
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What expunge forget, audit or bench wrote to.")],
    form: Annotated[
        str, typer.Option("--format", metavar="html|md|json", help="html: DIR/report.html; the others are printed.")
    ] = "html",
    show: Annotated[bool, typer.Option("--open", metavar="", help="Open the page in a browser.")] = False,
    include_images: Annotated[
        bool,
        typer.Option(
            "--include-images", metavar="", help="Show the pictures of samples that were kept with the record."
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Make the page of a record again, a Markdown summary (fit for a model card), or its JSON in canonical form.

    Leaves with 1 where the record was edited after it was written, and says so there too.
    """
    with _user_errors():
        from expunge.errors import InputError
        from expunge.files import write_atomically
        from expunge.report import (
            EDITED,
            bench_html,
            canonical_json,
            html_writer,
            is_bench,
            markdown_summary,
            read_bench,
            read_pictures,
            read_record,
            text_writer,
            was_edited,
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
        edited = not whole and was_edited(record)
        if edited:
            say(Console(stderr=True, highlight=False), Text(f"{EDITED}: expunge verify {folder} says where"))
        if form != "html":
            typer.echo(markdown_summary(record) if form == "md" else canonical_json(record), nl=False)
            if edited:
                raise typer.Exit(1)
            return
        page = folder / "report.html"
        pictures = read_pictures(folder, record) if include_images else None
        write_atomically({page: text_writer(bench_html(record)) if whole else html_writer(record, pictures)})
        if not quiet:
            typer.echo(f"Wrote {page}")
        if show:
            _open(page)
        if edited:
            raise typer.Exit(1)


@_command
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What expunge forget or audit wrote to.")],
    key: Annotated[Path | None, typer.Option(metavar="PUB", help="Public key (PEM) that must have signed it.")] = None,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay", metavar="", help="Run the erasure again and compare the weights, bit for bit on a CPU."
        ),
    ] = False,
    audit: Annotated[bool, typer.Option("--audit", metavar="", help="Measure again and compare every value.")] = False,
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
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print the findings as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Check a record: hashes, the chain of earlier erasures, ledger and signature; with --replay the erasure itself.

    Leaves with 1 where something does not match, and says what. What could not be checked is said too.
    """
    with _user_errors():
        from expunge.verify import Elsewhere, StoppedError
        from expunge.verify import verify as check

        where = Elsewhere(
            weights=weights, data=data, retain=retain, model=model, parents=tuple(parents or ()), ledger=ledger,
            device=device,
        )  # fmt: skip
        stopped = None
        try:
            with progress.shown_journal(quiet or as_json or not _first()) as journal:
                findings = check(folder, key=key, replay=replay, audit=audit, image=image, where=where, journal=journal)
        except StoppedError as error:
            findings, stopped = error.findings, error
        if as_json:
            from dataclasses import asdict

            from expunge.files import json_text

            typer.echo(json_text([asdict(found) for found in findings]), nl=False)
        elif not quiet:
            answers.show_findings(folder, findings)
        if stopped is not None:
            raise stopped
        if any(found.ok is False for found in findings):
            raise typer.Exit(1)


@_command
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

        path = sign_record(folder, key, password())
        if not quiet:
            say(Console(highlight=False), Text(f"Wrote {path}\n{MEANING}"))


@_command
def log(
    ledger: Annotated[
        Path, typer.Option(metavar="FILE", envvar="EXPUNGE_LEDGER", help="The ledger that runs were entered in.")
    ] = Path("expunge-ledger.sqlite"),
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            metavar="",
            help="Find entries that were edited, removed or cut off; leaves with 1 then. Names records that are gone.",
        ),
    ] = False,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Records to hold the ledger against, or a folder of such folders; by default those beside it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print each entry as a line of JSON.")] = False,
) -> None:
    """List what was forgotten from which model, when, by which command, and how it went."""
    with _user_errors():
        from expunge.errors import InputError
        from expunge.ledger import read_entries

        if check:
            from expunge.verify import check_ledger, lost_records

            places = tuple(records) if records else (ledger.absolute().parent,)
            problems = check_ledger(ledger, places)
            if not problems:
                typer.echo(f"{ledger}: an unbroken chain of {len(read_entries(ledger)) - 1} entries")
            for line in (*problems, *lost_records(ledger, places)):
                typer.echo(f"{ledger}: {line}")
            if problems:
                raise typer.Exit(1)
            return
        if records:
            raise InputError("expected --records with --check")
        entries = read_entries(ledger)
        if as_json:
            for entry in entries:
                typer.echo(entry.text)
        else:
            answers.show_log([entry.content for entry in entries[1:]])


MOST_HOURS = 10_000  # of a job: more than a year


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
        bool,
        typer.Option("--version", metavar="", help="Print the version and leave.", callback=_version, is_eager=True),
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


# Showing what happens


@contextmanager
def _user_errors(interrupted: str = "", *, together: bool = False) -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 2; an interrupt into one line and 130.

    Args:
        together: several processes may do this command together. The first that fails tells why; the others end.
    """
    errors = Console(stderr=True, highlight=False)
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
        say(errors, f"interrupted{': ' + interrupted if interrupted else ''}")
        raise typer.Exit(130) from None
    except typer.Exit:
        if _several():
            processes.wait()
        raise
    except BrokenPipeError:  # whoever read what is printed has gone, as `head` does: click leaves quietly
        raise
    except Exception as error:  # noqa: BLE001 (every other one is told apart below)
        if _several() and not _tells():
            raise typer.Exit(LOST) from None
        if _several() and _is_lost(error):
            done = interrupted or "nothing was written"
            say(errors, f"[bold red]error:[/] another process of this run ended, or cannot be reached: {done}")
            say(errors, plain(f"({type(error).__name__}: {_first_line(error)})"))
            raise typer.Exit(LOST) from None
        line = _one_line(error)
        if line is None:
            traceback.print_exc()
            raise typer.Exit(DEFECT) from None
        say(errors, f"[bold red]error:[/] {plain(line)}")
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


def _first_line(error: Exception) -> str:
    from expunge.errors import first_line

    return first_line(error)


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


def _finish(outcome: Outcome, out: Path, quiet: bool, *, as_json: bool = False) -> None:
    """Print the answer; leave with 1 where a stated check failed. Of several processes, the first does."""
    if not _first():
        return
    record = outcome.record
    failed = [name for name in ("forgotten", "kept", "signals") if record.checks[name] is False]
    if as_json:
        _print_file(outcome.files)
    elif not quiet:
        answers.show_forget(outcome, out)
    if failed:
        raise typer.Exit(1)


def _print_file(written: Sequence[Path]) -> None:
    """Print the record that is among the files a command wrote, as it is there."""
    path = next(path for path in written if path.name in ("record.json", "bench.json"))
    typer.echo(path.read_text(encoding="utf-8"), nl=False)


if __name__ == "__main__":  # of old, launchers were told to start this module
    main()
