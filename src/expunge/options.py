"""Options that several commands take: how they are spelled and explained, and what they become."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_type_hints

import typer

if TYPE_CHECKING:
    from expunge.commands import RecordOptions
    from expunge.workspace import DataOptions


def _seed(value: int) -> int:
    if not 0 <= value < 2**63:
        raise typer.BadParameter(f"{value} is not a whole number from 0 to 2**63 - 1.")
    return value


DataText = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SRC",
        help="'digits', a folder (one sub-folder a class, parquet, or WebDataset tars), such files by a pattern or "
        "a URL (s3://...), hf:NAME or torchvision:NAME.",
        rich_help_panel="Data",
    ),
]
SPEC_HELP = "torchvision:NAME, timm:NAME, hf:NAME, allcnn, or path/to/file.py:function; arguments as ?a=1&b=2"
METHOD_HELP = (
    "unsir; or, to compare with: retrain, fine_tune, neg_grad, neg_grad_plus, random_labels, bad_teacher, scrub, "
    "salun, l1_sparse, fisher, ssd, boundary_shrink, boundary_expand, jit, delete, svd_class, zero_shot_gkt, "
    "error_min_max, none, head_mask, random_init."
)
AUDIT_HELP = (
    "Attacks to run; by default all of "
    "linear_probe, nearest_class_mean, prototype, head_only, few_shot, relearn, population_mia, rmia, "
    "neighbour_leakage, inversion, where_it_looks, feature_map."
)
Seed = Annotated[int, typer.Option(metavar="N", callback=_seed, help="Of all randomness.")]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps; else a GPU where there is one.")
]
PrecisionText = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="Of the sums within the model while it trains: fp32, bf16, or auto, the faster one for model and device.",
    ),
]
Fsdp = Annotated[
    bool,
    typer.Option(
        "--fsdp",
        metavar="",
        help="Of several processes, each holds a share of weights, gradients and optimizer state while training.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", metavar="", help="Replace what lies at --out from an earlier run.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print errors only.")]
RecordOut = Annotated[bool, typer.Option("--json", metavar="", help="Print the record as JSON, and nothing else.")]


@dataclass(frozen=True)
class Reading:
    """How the data is read."""

    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Label column, where there are several.", rich_help_panel="Data")
    ] = None
    image_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Image column, where it has no usual name.", rich_help_panel="Data"),
    ] = None
    class_names: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="All classes in the order of the model's outputs, where neither weights nor data name them.",
            rich_help_panel="Data",
        ),
    ] = None
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            metavar="",
            help="Leave out (and count) images that cannot be decoded.",
            rich_help_panel="Data",
        ),
    ] = False
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Decoded images to hold at once, as 512M or 8G; more are streamed. By default 256M (audit: 1G, "
            "bench: 2G).",
            rich_help_panel="Data",
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N or HxW",
            help="Image size in pixels; else the weights', the zoo's, or the images' own.",
            rich_help_panel="Preprocessing",
        ),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B",
            help="Channel means of images in \\[0, 1]; else the weights', the zoo's, or measured.",
            rich_help_panel="Preprocessing",
        ),
    ] = None
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Channel standard deviations.", rich_help_panel="Preprocessing")
    ] = None
    channels: Annotated[
        int | None,
        typer.Option(
            min=1, max=3, metavar="N", help="1 (grey) or 3; else as the model takes.", rich_help_panel="Preprocessing"
        ),
    ] = None


@dataclass(frozen=True)
class Keeping:
    """What is kept of a run beside its record."""

    ledger: Annotated[
        Path | None,
        typer.Option(
            "--ledger",
            metavar="FILE",
            envvar="EXPUNGE_LEDGER",
            help="Where the run is entered; by default expunge-ledger.sqlite beside DIR. See expunge log.",
            rich_help_panel="Record",
        ),
    ] = None
    no_ledger: Annotated[
        bool, typer.Option("--no-ledger", metavar="", help="Enter the run nowhere.", rich_help_panel="Record")
    ] = False
    sign: Annotated[
        Path | None,
        typer.Option(
            "--sign",
            metavar="KEY",
            help="Sign the record and the weights with this private key (PEM; its password in EXPUNGE_KEY_PASSWORD).",
            rich_help_panel="Record",
        ),
    ] = None
    include_images: Annotated[
        bool,
        typer.Option(
            "--include-images",
            metavar="",
            help="Keep pictures of a few samples (images.json), which may show people, and show them on the page.",
            rich_help_panel="Record",
        ),
    ] = False


Command = TypeVar("Command", bound=Callable[..., None])


def spread(function: Command) -> Command:
    """Return a command in whose signature the fields of `Reading` and `Keeping` stand for a parameter of that type."""
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in (Reading, Keeping)}
    names = {name: [field.name for field in fields(group)] for name, group in groups.items()}

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{one: given.pop(one) for one in names[name]})
        function(**given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            inner = get_type_hints(groups[name], include_extras=True)
            shown = [(field.name, field.default, inner[field.name]) for field in fields(groups[name])]
        else:
            shown = [(name, parameter.default, hints[name])]
        parameters += [
            inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for one, default, annotation in shown
        ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return cast(Command, command)


def ask_for_shards(fsdp: bool) -> None:
    """Have training sharded, where `fsdp`: said as launchers say it, before the processes are joined."""
    if fsdp:
        os.environ["EXPUNGE_FSDP"] = "1"


def listed(*texts: str) -> tuple[str, ...]:
    """Return what lists with commas name, one after the other: an option that is given twice adds to itself."""
    return tuple(part.strip() for text in texts for part in text.split(","))


def given_of(reading: Reading) -> list[str]:
    """Return the options that say how the data is read, as far as they were given."""
    values = {field.name: getattr(reading, field.name) for field in fields(reading)}
    return ["--" + name.replace("_", "-") for name, value in values.items() if value not in (None, False)]


def data_options(data: str, reading: Reading) -> DataOptions:
    from expunge.errors import InputError
    from expunge.workspace import DataOptions

    if reading.channels == 2:
        raise InputError("expected --channels 1 or 3, got 2")
    return DataOptions(
        spec=data,
        label_column=reading.label_column,
        image_column=reading.image_column,
        class_names=None if reading.class_names is None else listed(reading.class_names),
        size=_size(reading.size),
        mean=_numbers(reading.mean, "--mean"),
        std=_numbers(reading.std, "--std"),
        channels=reading.channels,
        skip_bad=reading.skip_bad,
        memory=_bytes(reading.memory),
    )


def record_options(out: Path, keeping: Keeping) -> RecordOptions:
    from expunge.commands import RecordOptions
    from expunge.errors import InputError
    from expunge.ledger import NAME

    if keeping.ledger is not None and keeping.no_ledger and not os.environ.get("EXPUNGE_LEDGER"):
        raise InputError("expected --ledger or --no-ledger, got both")
    usual = out.absolute().parent / NAME
    return RecordOptions(
        ledger=None if keeping.no_ledger else keeping.ledger or usual,
        key=keeping.sign,
        password=password(),
        include_images=keeping.include_images,
    )


def password() -> str | None:
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


def _bytes(text: str | None) -> int | None:
    from expunge.errors import InputError

    if text is None:
        return None
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isdecimal() or int(number) == 0 or unit not in UNITS:
        raise InputError(f"expected --memory as a number of bytes, or with K, M or G, got {text!r}")
    return int(number) * UNITS[unit]


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    from expunge.errors import InputError

    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"expected {option} as numbers with commas between, got {text!r}") from None
