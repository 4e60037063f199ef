"""Suites: functions from what was asked to a grid of cells. The numbers of a suite stand here and nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from expunge.audits import AUDITS
from expunge.bench.cells import Cell, Original, Tuning, slug
from expunge.bench.series import Base, Contender, Point, grids
from expunge.commands import TRAIN_DEFAULT
from expunge.data import fingerprint, open_source
from expunge.errors import InputError
from expunge.methods import METHODS
from expunge.models import parse_model
from expunge.schema import TrainConfig
from expunge.weights import load_weights
from expunge.workspace import DataOptions, model_text

CONTROLS = ("none", "head_mask", "random_init")
"""Methods that must look bad where they are bad."""

PAPER_METHODS = ("unsir", "retrain", "fine_tune", "neg_grad", "fisher")
"""UNSIR and the baselines that its paper compares it with."""

VIT = "timm:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=4&embed_dim=64&num_heads=2"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a suite is asked for; None or empty: as the suite has it."""

    data: DataOptions | None = None  # of `slice` and `field`: CIFAR-10; of `paper`: the folder of its data sets
    classes: tuple[tuple[str, ...], ...] = ()  # sets of classes to forget; what is named twice counts once
    methods: tuple[str, ...] = ()
    seeds: int | None = None  # training seeds: 0, 1, ...; of `own`: unlearning seeds
    trials: int | None = None  # of tuning, the default settings being the first; 1: no tuning
    audits: tuple[str, ...] = ()  # of expunge.AUDITS, for every cell; in `analyses` of the gold standard alone
    only: tuple[str, ...] = ()  # cells whose id matches one of these patterns
    analysis: tuple[str, ...] = ()  # of `analyses`: only these
    model: str | None = None  # of `own` and `analyses`
    weights: Path | None = None  # of `own`
    epochs: int | None = None  # of the references of `own`; 0: none are trained
    retain_per_class: int | None = None  # of `own` and `analyses`
    train_per_class: int | None = None  # of `field` and `paper`; see `_on_a_slice`

    def __post_init__(self) -> None:
        once = dict.fromkeys(tuple(dict.fromkeys(one)) for one in self.classes)
        object.__setattr__(self, "classes", tuple(once))


@dataclass(frozen=True)
class Suite:
    """A suite, and what a person should know before it runs."""

    make: Callable[[Request], list[Cell]]
    says: str
    needs: tuple[str, ...] = ()  # fields of a request that must be given
    takes: tuple[str, ...] = ("classes", "methods", "seeds", "trials", "audits")  # others that may be


def suite_cells(name: str, request: Request) -> list[Cell]:
    """Return the cells of a suite, in an order that is the same everywhere.

    Raises:
        InputError: there is no such suite, it needs something that is missing, something given means nothing to it, or
            no cell is among those asked for.
    """
    if name not in SUITES:
        raise InputError(f"unknown suite {name!r}: expected one of {', '.join(SUITES)}")
    suite = SUITES[name]
    given = {field for field, value in vars(request).items() if value not in (None, ()) and field != "only"}
    for field in suite.needs:
        if field not in given:
            raise InputError(f"the suite {name} needs {_option(field)}")
    for field in sorted(given - {*suite.needs, *suite.takes}):
        raise InputError(f"{_option(field)} means nothing to the suite {name}")
    unknown = [method for method in request.methods if method not in METHODS]
    if unknown:
        raise InputError(f"unknown method {unknown[0]!r}: expected some of {', '.join(METHODS)}")
    unknown = [audit for audit in request.audits if audit not in AUDITS]
    if unknown:
        raise InputError(f"unknown audit {unknown[0]!r}: expected some of {', '.join(AUDITS)}")
    if request.seeds is not None and request.seeds < 1:
        raise InputError(f"expected --seeds of at least 1, got {request.seeds}")
    if request.trials is not None and request.trials < 1:
        raise InputError(f"expected --trials of at least 1, got {request.trials}")
    if request.train_per_class is not None and request.train_per_class < FIFTH:
        raise InputError(f"expected --train-per-class of at least {FIFTH}, got {request.train_per_class}")
    cells = suite.make(request)
    chosen = [cell for cell in cells if not request.only or any(fnmatchcase(cell.id, one) for one in request.only)]
    if not chosen:
        raise InputError(
            f"no cell of the suite {name} matches --only {','.join(request.only)}: expected a name that --dry-run "
            f"prints, with * for any text, as in {cells[0].id.partition('-')[0]}-*"
        )
    return chosen


def refuse_idle(name: str, options: Sequence[str]) -> None:
    """Refuse options of how data is read where none is given.

    Raises:
        InputError: names the first, unless there is no such suite, or it needs the data.
    """
    if not options or name not in SUITES or "data" in SUITES[name].needs:
        return
    why = "without --data" if "data" in SUITES[name].takes else f"to the suite {name}"
    raise InputError(f"{options[0]} means nothing {why}")


# The suites


def quick(request: Request) -> list[Cell]:
    """All methods on scikit-learn's digits: nothing to download, minutes on two cores."""
    original = Original(
        data="digits",
        options=DataOptions(spec="digits"),
        model="allcnn?width=32",
        recipe=replace(TRAIN_DEFAULT, epochs=12, batch_size=64),
    )
    return _grid(request, [original], sets=(("3",), ("1", "8")), retain_per_class=100, seeds=3, trials=4, small=True)


def slice_of_cifar10(request: Request) -> list[Cell]:
    """All methods on CIFAR-10 with 300 images a class: a quarter of an hour on two cores."""
    original = Original(
        data="cifar10",
        options=_options(request, "cifar10"),
        model="allcnn?width=32",
        recipe=replace(TRAIN_DEFAULT, epochs=20, batch_size=64),
        per_class=300,
    )
    return _grid(
        request,
        [original],
        sets=(("3",),),
        retain_per_class=100,
        test_per_class=100,
        seeds=2,
        trials=1,
        small=True,
    )


def field(request: Request) -> list[Cell]:
    """All methods on CIFAR-10 and ResNet18, each of the ten classes alone."""
    original = _cifar10(request, "torchvision:resnet18")
    return _on_a_slice(
        request, _grid(request, [original], sets=_each(10), retain_per_class=1000, seeds=3, trials=8, small=False)
    )


def paper(request: Request) -> list[Cell]:
    """The experiments of the paper: its four architectures and class sets, its baselines, its rates beside ours.

    Faces are those of Extended Yale B, as VGGFace-100 cannot be had.
    """
    ten = (("0",), ("1", "2"), ("3", "4", "5", "6"), tuple(map(str, range(3, 10))))
    models = ("torchvision:resnet18", "allcnn", "torchvision:mobilenet_v2", VIT)
    variants = ("default", "paper", "notebook")
    shared = {"methods": PAPER_METHODS, "seeds": 3, "trials": 1, "small": False, "unsir_presets": variants}
    cells = _grid(request, [_cifar10(request, model) for model in models], sets=ten, retain_per_class=1000, **shared)  # type: ignore[arg-type]
    hundred = Original(
        data="cifar100",
        options=_fine_labels(_options(request, "cifar100")),
        model="torchvision:resnet18",
        recipe=replace(TRAIN_DEFAULT, epochs=20),
    )
    many = tuple(map(str, range(20)))
    cells += _grid(request, [hundred], sets=(("0",), many, _first(40)), retain_per_class=100, **shared)  # type: ignore[arg-type]
    faces = Original(
        data="yaleb",
        options=_options(request, "yaleb"),
        model="torchvision:resnet18",
        recipe=replace(TRAIN_DEFAULT, epochs=25, batch_size=64),
    )
    cells += _grid(request, [faces], sets=(("12",), _first(10)), retain_per_class=40, **shared)  # type: ignore[arg-type]
    return _on_a_slice(request, cells)


def own(request: Request) -> list[Cell]:
    """All methods on somebody's own weights and data."""
    assert request.data is not None  # it is needed
    assert request.weights is not None
    metadata = load_weights(request.weights)[1]
    model = model_text(request.model, metadata)
    training = metadata.training or {}
    stated = _recipe_of(training)
    recipe = stated or TRAIN_DEFAULT
    if request.epochs:
        recipe = replace(recipe, epochs=request.epochs)
    shown = metadata.preprocessing
    options = replace(  # a reference must answer the same question about the same images
        request.data,
        class_names=request.data.class_names or metadata.class_names or None,
        size=request.data.size or (shown.size if shown else None),
        channels=request.data.channels or (shown.channels if shown else None),
    )
    gone = tuple(dict.fromkeys((*metadata.forgotten, *metadata.never_seen)))
    original = Original(
        data=slug(Path(request.data.spec).name),
        options=options,
        model=model,
        recipe=recipe,
        per_class=training.get("per_class"),  # files of earlier versions do not say it
        augment=None if stated is None else False,  # a recipe says itself whether images are mirrored and shifted
        seed=training.get("seed", 0),
        weights=request.weights,
        gone=gone,
        digest=_digest(request.weights, model, options),
    )
    cells = _grid(
        replace(request, seeds=None),
        [original],
        sets=(),
        retain_per_class=request.retain_per_class,
        seeds=1,
        trials=1,
        small=False,
        reference=request.epochs != 0,
    )
    return [replace(cell, original=original, seed=seed) for cell in cells for seed in range(request.seeds or 2)]


def scaling(request: Request) -> list[Cell]:
    """How cost grows, on digits: with classes to forget, retained images, and weights of the model."""

    def cells(width: int, classes: int, retain: int) -> list[Cell]:
        original = Original(
            data="digits",
            options=DataOptions(spec="digits"),
            model=f"allcnn?width={width}",
            recipe=replace(TRAIN_DEFAULT, epochs=6, batch_size=64),
        )
        asked = replace(request, methods=request.methods or tuple(m for m in METHODS if m not in CONTROLS))
        return _grid(
            asked,
            [original],
            sets=(_first(classes),),
            retain_per_class=retain,
            seeds=1,
            trials=1,
            small=True,
            reference=False,
        )

    grown = [(24, classes, 60) for classes in (1, 2, 4, 7)]
    grown += [(24, 2, retain) for retain in (30, 60, 90, 120)]
    grown += [(width, 2, 60) for width in (12, 24, 48, 96)]
    return [replace(cell, count_flops=True) for step in dict.fromkeys(grown) for cell in cells(*step)]


def analyses(request: Request) -> list[Cell]:
    """The paper's analyses, on digits or on the data that is given."""
    points = analysis_points(request)
    return list({one.cell.id: one.cell for found in points.values() for one in found}.values())


def analysis_points(request: Request) -> dict[str, list[Point]]:
    """Return the cells of each analysis with their places in it.

    Without data: digits. With data, and no model named: the small network and 300 images a class of `slice`. With a
    model: that one, on all images.
    """
    small = request.model is None or request.data is None
    given = request.data or DataOptions(spec="digits")
    epochs = 12 if request.data is None or not small else 20
    original = Original(
        data="digits" if request.data is None else slug(Path(given.spec).name),
        options=given,
        model=request.model or "allcnn?width=32",
        recipe=replace(TRAIN_DEFAULT, epochs=epochs, batch_size=64) if small else TRAIN_DEFAULT,
        per_class=300 if small and request.data is not None else None,
    )
    base = Base(
        originals=tuple(replace(original, seed=seed) for seed in range(request.seeds or 3)),
        sets=request.classes or (("3",), ("8",), ("1",), ("5",)),
        retain_per_class=request.retain_per_class or (100 if small else 1000),
        test_per_class=100 if original.per_class else None,
        others=tuple(
            Contender(method, method, _preset(method, original, small))
            for method in dict.fromkeys(request.methods or ("fine_tune", "neg_grad", "fisher"))
            if method != "unsir"  # it is there anyway
        ),
        audits=request.audits,
    )
    return grids(base, request.analysis)


BASE = ("classes", "methods", "seeds", "trials", "audits")
SLICED = (*BASE, "train_per_class")

SUITES: Mapping[str, Suite] = {
    "quick": Suite(quick, "all methods on digits, with tuning; no download; five minutes on two cores"),
    "slice": Suite(
        slice_of_cifar10,
        "all methods on 300 images a class of CIFAR-10; a quarter of an hour on two cores",
        ("data",),
        BASE,
    ),
    "field": Suite(field, "all methods, CIFAR-10, ResNet18, ten classes; needs a GPU or days", ("data",), SLICED),
    "paper": Suite(paper, "the paper's models, class sets and baselines; needs a GPU or days", ("data",), SLICED),
    "own": Suite(
        own,
        "all methods on your weights, your data, your classes",
        ("data", "weights", "classes"),
        ("methods", "seeds", "trials", "audits", "model", "epochs", "retain_per_class"),
    ),
    "analyses": Suite(
        analyses,
        "the paper's analyses, each a table and a plot; digits, or your data",
        (),
        ("data", "analysis", "classes", "methods", "seeds", "audits", "model", "retain_per_class"),
    ),
    "scaling": Suite(scaling, "how cost grows with classes, retained images and weights; digits", (), ("methods",)),
}


# What they share


def _grid(
    request: Request,
    originals: Sequence[Original],
    *,
    sets: Sequence[tuple[str, ...]],
    retain_per_class: int | None,
    seeds: int,
    trials: int,
    small: bool,
    methods: Sequence[str] = (),
    test_per_class: int | None = None,
    reference: bool = True,
    unsir_presets: Sequence[str] = ("default", "fast"),
) -> list[Cell]:
    """Return methods x originals x training seeds x sets of classes, each method by default and, with trials, tuned.

    Each training seed is the unlearning seed too: with one for all, a method that starts from fresh weights would give
    one model thrice, and its interval no width. Tuned once for each original's data and model: on its training seed 0
    and the first set of classes. FLOPs are counted there too.
    """
    chosen = tuple(dict.fromkeys(request.methods)) or tuple(methods) or tuple(METHODS)
    trials = request.trials or trials
    wanted = request.classes or tuple(sets)
    cells: list[Cell] = []
    for base in originals:
        for seed in range(request.seeds or seeds):
            original = replace(base, seed=seed)
            for forget in wanted:
                for method in chosen:
                    presets = tuple(unsir_presets) if method == "unsir" else (_preset(method, base, small),)
                    cell = Cell(
                        original=original,
                        forget=forget,
                        method=method,
                        seed=seed,
                        retain_per_class=retain_per_class,
                        test_per_class=test_per_class,
                        reference=reference,
                        audits=request.audits,
                        count_flops=seed == 0 and forget == wanted[0],
                    )
                    cells += [replace(cell, preset=preset) for preset in presets]
                    if trials > 1 and METHODS[method].space:
                        tuning = Tuning(
                            original=base,
                            forget=wanted[0],
                            method=method,
                            preset=presets[0],
                            trials=trials,
                            retain_per_class=retain_per_class,
                        )
                        cells.append(replace(cell, preset=presets[0], tuning=tuning))
    return cells


def _preset(method: str, original: Original, small: bool) -> str:
    """Return the preset its authors (or, for small data, we) made for such a case; else the default."""
    presets = METHODS[method].presets
    family = original.model.partition(":")[0]
    if small:
        wanted = "small"
    elif "vit" in original.model and family in ("timm", "hf"):
        wanted = "vit"
    else:
        wanted = original.model.rpartition(":")[2]  # resnet18
    return wanted if wanted in presets else "default"


FIFTH = 5
"""On a slice methods are given one image of so many: as in `field` and `paper`, 1,000 of CIFAR-10's 5,000 a class."""


def _on_a_slice(request: Request, cells: list[Cell]) -> list[Cell]:
    """Return the same cells with originals trained on `request.train_per_class` images a class, where it is given.

    Smaller batches and more epochs, so that so few images still train a network. Names and tables say `cifar10-500`.
    """
    count = request.train_per_class
    if count is None:
        return cells

    def smaller(original: Original) -> Original:
        recipe = original.recipe
        steps = replace(recipe, epochs=max(20, recipe.epochs), batch_size=min(128, recipe.batch_size))
        return replace(original, data=f"{original.data}-{count}", per_class=count, recipe=steps)

    def given(retain: int | None) -> int:
        return min(count // FIFTH, retain or count)

    return [
        replace(
            cell,
            original=smaller(cell.original),
            retain_per_class=given(cell.retain_per_class),
            tuning=cell.tuning
            and replace(
                cell.tuning,
                original=smaller(cell.tuning.original),
                retain_per_class=given(cell.tuning.retain_per_class),
            ),
        )
        for cell in cells
    ]


def _cifar10(request: Request, model: str) -> Original:
    return Original(data="cifar10", options=_options(request, "cifar10"), model=model, recipe=TRAIN_DEFAULT)


def _options(request: Request, name: str) -> DataOptions:
    """Return how to read a data set: the source that was given, or its folder `name`."""
    assert request.data is not None  # suites that come here need it
    inside = Path(request.data.spec) / name
    if inside.is_dir():
        return replace(request.data, spec=str(inside))
    if Path(request.data.spec).name != name and name != "cifar10":
        raise InputError(f"expected a folder {name} in {request.data.spec!r}: --data is the folder of the data sets")
    return request.data


def _fine_labels(options: DataOptions) -> DataOptions:
    """Return how to read CIFAR-100 by its hundred classes, where it comes with its twenty coarse ones too."""
    try:
        open_source(options.spec, label_column=options.label_column, image_column=options.image_column)
    except InputError:
        return replace(options, label_column="fine_label")
    return options


def _recipe_of(training: Mapping[str, object]) -> TrainConfig | None:
    """Return the recipe that weights say they were trained by; None where they do not say it."""
    stated = training.get("config")
    if not isinstance(stated, dict):
        return None
    try:
        return TrainConfig(**stated)
    except TypeError:  # of another version
        return None


def _digest(weights: Path, model: str, options: DataOptions) -> str:
    """Return a hash of somebody's own weights, the file that builds their model, and their data."""
    source = open_source(options.spec, label_column=options.label_column, image_column=options.image_column)
    content = hashlib.sha256(_content(weights) + fingerprint(source).encode())
    spec = parse_model(model)
    file = Path(spec.name.rpartition(":")[0])
    if spec.family == "file" and file.is_file():
        content.update(file.read_bytes())
    return content.hexdigest()


def _content(weights: Path) -> bytes:
    """Return the bytes of a weights file, or of all files of a folder in the order of their names."""
    if weights.is_dir():
        return b"".join(path.read_bytes() for path in sorted(weights.iterdir()) if path.is_file())
    return weights.read_bytes()


def _each(count: int) -> tuple[tuple[str, ...], ...]:
    return tuple((str(label),) for label in range(count))


def _first(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")
