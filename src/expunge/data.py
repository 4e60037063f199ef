"""From a string to labelled images: open a source, draw the retain sample, stage it as uint8 tensors.

Nothing is decoded before it is asked for: labels are read first, rows are chosen by label, and only chosen rows are
decoded. So the images of a class to forget are left alone unless evaluation asks for them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from expunge.errors import InputError, first_line
from expunge.schema import Preprocessing, Sample

Labels = NDArray[np.int64]
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
SHARDS = (".parquet", ".tar")
IMAGE_ENDINGS = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
# what Pillow opens and people keep pictures in; listed, so that another Pillow does not give other data
IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "picture")
TEST_SHARE = 0.2  # of a source without a test split
SPLIT_SEED = 0  # one fixed made split, so that training and forgetting agree on it whatever their seeds
HELD_BYTES = 256 * 2**20  # decoded images in memory: what fits is decoded once, of more so much is held back to shuffle
SHUFFLE_BUFFER = 4096  # and no more images than these
AHEAD_BYTES = 16 * 2**20  # decoded by threads before they are needed,
AHEAD = 256  # and no more images than these
ENCODED_BYTES = 64 * 2**20  # of encoded images read before they are decoded
SMALL_BYTES = 8 * 2**10  # of an encoded image, up to which threads decode no faster


@dataclass(frozen=True)
class ImageTable:
    """Labelled images that are not decoded yet.

    `read(rows)` yields one payload a row, in that order: a PIL image, encoded bytes, or a path. Rows of a source that
    is stored in blocks must ascend within a block, and those of a block must come together.
    """

    labels: Labels
    read: Callable[[Labels], Iterator[Any]]
    name: Callable[[int], str]  # how a message names a row
    starts: Labels | None = None  # first row of each block that is read from its begin (row group, tar); None: of none
    rows: Labels = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # of `read`, one a label

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.labels):
            object.__setattr__(self, "rows", np.arange(len(self.labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, positions: Labels) -> ImageTable:
        """Return the table of these positions only, in ascending order; nothing is read."""
        positions = np.sort(positions)
        return replace(self, labels=self.labels[positions], rows=self.rows[positions])


@dataclass(frozen=True)
class Source:
    """A data set that was opened: class names in label order, a train and a test table."""

    spec: str
    class_names: tuple[str, ...]
    train: ImageTable
    test: ImageTable | None  # None: the source has no such split, see `with_test_split`
    named: bool = True  # False: the source has numbers for labels and no names
    mirror_safe: bool = True  # a mirrored image keeps its class (not so for digits)
    has_columns: bool = False  # label and image are columns with names (parquet, tars, the hub)
    notes: tuple[str, ...] = ()  # sentences a person should read


class TensorImages(Dataset[Sample]):
    """Images held in memory: uint8 or float (N, channels, H, W), labels int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels):
            raise InputError(f"expected one label an image, got {len(images)} images and {len(labels)} labels")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def samples_at(self, index: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the samples at `index`, (N,) int64, in one piece, and that they bear no targets."""
        return self.images[index], self.labels[index], None


class StreamedImages(IterableDataset[Sample]):
    """Images decoded by threads shortly before they are needed; memory does not grow with their number.

    Shuffled anew each epoch: wholly where the source allows it; where it is stored in blocks, their order is, and then
    images through a buffer.

    Args:
        held: bytes of decoded images in that buffer, at most.
    """

    def __init__(
        self,
        table: ImageTable,
        preprocessing: Preprocessing,
        *,
        seed: int = 0,
        shuffle: bool = True,
        skip_bad: bool,
        held: int = HELD_BYTES,
    ) -> None:
        self.table = table
        self.labels = torch.from_numpy(table.labels)
        self.preprocessing = preprocessing
        self.seed = seed
        self.shuffle = shuffle
        self.skip_bad = skip_bad
        self.held = held
        self.epoch = 0
        self.bad: set[int] = set()  # positions that could not be decoded, as far as they were read

    def of(self, positions: Labels, *, shuffle: bool) -> StreamedImages:
        """Return a stream of some of the images, read as this one."""
        return StreamedImages(
            self.table.select(positions), self.preprocessing, seed=self.seed, shuffle=shuffle,
            skip_bad=self.skip_bad, held=self.held,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.table)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Sample]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = np.arange(len(self.table))
        if not self.shuffle:
            return self._decode(order)
        if self.table.starts is None:
            return self._decode(rng.permutation(order))
        block = np.searchsorted(self.table.starts, self.table.rows, side="right") - 1
        turn = rng.permutation(len(self.table.starts))
        stream = self._decode(np.argsort(turn[block], kind="stable"))
        return shuffled(stream, _at_most(SHUFFLE_BUFFER, self.held, self.preprocessing), rng)

    def _decode(self, order: Labels) -> Iterator[Sample]:
        items = zip(order, self.table.read(self.table.rows[order]), strict=True)
        chunk = _at_most(AHEAD, AHEAD_BYTES, self.preprocessing)
        first = _next(items, chunk)
        if _are_small([payload for _, payload in first]):
            decoded = (self._sample(*item) for item in itertools.chain(first, items))
            yield from (sample for sample in decoded if sample is not None)
            return
        with ThreadPoolExecutor() as pool:
            ready: list[Future[Sample | None]] = []
            while True:  # one chunk is decoded while the one before is used
                ahead = [pool.submit(self._sample, *item) for item in first]
                for future in ready:
                    sample = future.result()
                    if sample is not None:
                        yield sample
                if not ahead:
                    return
                ready, first = ahead, _next(items, chunk)

    def _sample(self, position: int, payload: Any) -> Sample | None:
        name = self.table.name(int(self.table.rows[position]))
        image = decode(payload, self.preprocessing, name, skip_bad=self.skip_bad)
        if image is None:
            self.bad.add(position)
            return None
        return image, int(self.table.labels[position])


def _next(items: Iterator[tuple[int, Any]], most: int) -> list[tuple[int, Any]]:
    """Return the next (position, payload) items: so many at most, fewer where they are large before they are decoded.

    One at least, where there is one.
    """
    chunk, held = [], 0
    for item in itertools.islice(items, most):
        chunk.append(item)
        held += len(item[1]) if isinstance(item[1], bytes) else 0
        if held >= ENCODED_BYTES:
            break
    return chunk


def _are_small(payloads: Iterable[Any]) -> bool:
    """Return whether images take less time to decode than threads do to hand them to each other.

    Threads wait for one another's interpreter lock after each: of 32x32 images two decode half as many as one.
    """
    return all(_stored_bytes(payload) <= SMALL_BYTES for payload in payloads)


def _stored_bytes(payload: Any) -> int:
    """Return the bytes that are to be decoded: none of an array or an image that is in memory."""
    if isinstance(payload, bytes):
        return len(payload)
    try:
        return payload.stat().st_size if isinstance(payload, Path) else 0
    except OSError:
        return 0  # decoding says what is wrong with it


def _at_most(images: int, held: int, preprocessing: Preprocessing) -> int:
    """Return how many decoded images are so many and take so many bytes, at most; one at least."""
    return max(1, min(images, held // image_bytes(preprocessing)))


def image_bytes(preprocessing: Preprocessing) -> int:
    """Return the bytes of a decoded image."""
    return preprocessing.channels * preprocessing.size[0] * preprocessing.size[1]


def shuffled(stream: Iterator[Sample], size: int, rng: np.random.Generator) -> Iterator[Sample]:
    """Yield (uint8 image, label) of `stream` in an order shuffled through a buffer of `size` images.

    The buffer is one piece of memory: images that come and go one by one leave holes between those that stay.
    """
    first = next(stream, None)
    if first is None:
        return
    held, labels, count = torch.empty((size, *first[0].shape), dtype=torch.uint8), [0] * size, 0
    for image, label in itertools.chain([first], stream):
        index = count
        if count < size:
            count += 1
        else:
            index = int(rng.integers(size))
            yield held[index].clone(), labels[index]
        held[index], labels[index] = image, label
    for index in rng.permutation(count):
        yield held[index].clone(), labels[index]


# Opening a source


def open_source(
    spec: str,
    *,
    label_column: str | None = None,
    image_column: str | None = None,
) -> Source:
    """Open `digits`, a folder (class sub-folders, parquet or WebDataset tars), files of those kinds named by a path,
    a pattern or a URL, `hf:NAME` or `torchvision:NAME`; decodes nothing.

    Args:
        label_column: which column holds the label, where a source has several.
        image_column: which column holds the image, likewise.

    Raises:
        InputError: the source is not there, has no labels or images, or its columns are ambiguous.
    """
    has_columns = False
    notes: tuple[str, ...] = ()
    if spec == "digits":
        tables, names, named = _open_digits()
    elif spec.startswith("hf:") and "://" not in spec:
        tables, names, named = _open_hub(spec.removeprefix("hf:"), label_column, image_column)
        has_columns = True
    elif spec.startswith("torchvision:"):
        tables, names, named = _open_torchvision(spec.removeprefix("torchvision:"))
    elif found := _find_shards(spec):
        opener = _open_parquet if found.kind == ".parquet" else _open_tars
        tables, names, named = opener(found, label_column, image_column)
        notes = found.notes
        has_columns = True
    elif Path(spec).is_dir():
        tables, names, notes = _open_folders(Path(spec))
        named = True
    else:
        raise InputError(
            f"no data at {spec!r}: expected 'digits', a folder, parquet or tar files (a path, a pattern or a URL), "
            "'hf:NAME' or 'torchvision:NAME'"
        )
    train, test = tables.get("train"), tables.get("test")
    for part, table in tables.items():
        if len(table) == 0:
            raise InputError("; ".join([f"expected images in the {part} split of {spec!r}, found none", *notes]))
        low, high = int(table.labels.min()), int(table.labels.max())
        if low < 0 or high >= len(names):
            raise InputError(f"expected labels 0 to {len(names) - 1} in {spec!r}, found {low if low < 0 else high}")
    if train is None:
        raise InputError(f"expected a train split in {spec!r}, found {', '.join(tables) or 'none'}")
    return Source(
        spec, names, train, test, named=named, mirror_safe=spec != "digits", has_columns=has_columns, notes=notes
    )


def fingerprint(source: Source) -> str:
    """Return what tells data from other data of its name, wherever it lies: a hash of classes, labels, some images."""
    content = hashlib.sha256(repr(source.class_names).encode())
    for table in (source.train, source.test):
        if table is not None:
            content.update(table.labels.tobytes())
            for payload in table.read(_evenly(table, 64).rows):
                stored = payload.read_bytes() if isinstance(payload, Path) else payload
                content.update(stored if isinstance(stored, bytes) else np.asarray(stored).tobytes())
    return content.hexdigest()


def with_test_split(source: Source) -> tuple[Source, ImageTable]:
    """Return the source and its test table; where it has none, a fifth of each class is cut off, always the same."""
    if source.test is not None:
        return source, source.test
    train, test = stratified_split(source.train, TEST_SHARE, seed=SPLIT_SEED)
    return replace(source, train=train, test=test), test


Opened = tuple[dict[str, ImageTable], tuple[str, ...], bool]
"""Tables by split (train, test), class names in label order, and whether the source named them."""


def _open_digits() -> Opened:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    table = ImageTable(
        labels=digits.target.astype(np.int64),
        read=lambda rows: (Image.fromarray(pixels[row]) for row in rows),
        name=lambda row: f"digit {row}",
    )
    return {"train": table}, tuple(str(name) for name in digits.target_names), True


def _open_folders(folder: Path) -> tuple[dict[str, ImageTable], tuple[str, ...], tuple[str, ...]]:
    """Return the tables by split, the class names, and what to say of files that are left out."""
    parts = {
        name: folder / key for name, key in _choose_splits([p.name for p in folder.iterdir() if p.is_dir()]).items()
    }
    if "train" not in parts:
        if _is_split(folder, parts):
            raise InputError(f"expected a train split in {str(folder)!r}, found only {parts['test'].name}")
        parts = {"train": folder}
    names = tuple(
        sorted({p.name for part in parts.values() for p in part.iterdir() if p.is_dir() and not _hidden(p.name)})
    )
    for name in names:
        if not name.isascii() and any(0xD800 <= ord(letter) <= 0xDFFF for letter in name):
            raise InputError(f"expected folder names in UTF-8 in {str(folder)!r}, got {name!r}: rename it")
    if not names and parts["train"] != folder:
        name = parts["train"].name
        raise InputError(
            f"expected one sub-folder of images a class in {str(parts['train'])!r}, found none; {name!r} was taken for "
            "the train split: rename it, if it is a class"
        )
    if not names:
        raise InputError(f"expected one sub-folder of images a class (or parquet files) in {str(folder)!r}, found none")
    tables, others = {}, []
    for part, place in parts.items():
        tables[part], left_out = _folder_table(place, names)
        others += left_out
    return tables, names, _no_images(others)


def _no_images(others: Sequence[Path]) -> tuple[str, ...]:
    """Return what to say of files in class folders that are taken for no images; nothing, where there are none."""
    if not others:
        return ()
    # what follows a dot may be half of a name, and somebody's
    kinds = Counter(
        path.suffix.lower() if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", path.suffix) else "another" for path in others
    )
    shown = ", ".join(kind for kind, _ in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:4])
    files = "file that is no image by its" if len(others) == 1 else "files that are no images by their"
    return (f"left out {len(others):,} {files} ending ({shown}{', ...' if len(kinds) > 4 else ''})",)


def _is_split(folder: Path, parts: Mapping[str, Path]) -> bool:
    """Return whether a folder's one sub-folder is a test split, classes in it, and no class that is called so."""
    inner = [path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name)]
    return len(inner) == 1 and inner == list(parts.values()) and any(path.is_dir() for path in inner[0].iterdir())


def _folder_table(folder: Path, names: tuple[str, ...]) -> tuple[ImageTable, list[Path]]:
    """Return the images in class folders, and the files that are none by their ending."""
    present = [
        (path, label)
        for label, name in enumerate(names)
        for path in _files_below(folder / name)
        if not any(map(_hidden, path.relative_to(folder).parts))
    ]
    files = [(path, label) for path, label in present if path.suffix.lower() in IMAGE_ENDINGS]
    others = [path for path, _ in present if path.suffix.lower() not in IMAGE_ENDINGS]
    table = ImageTable(
        labels=np.array([label for _, label in files], dtype=np.int64),
        read=lambda rows: (files[row][0] for row in rows),
        name=lambda row: str(files[row][0]),
    )
    return table, others


def _files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its sub-folders, sorted; none where it is not there.

    Raises:
        OSError: one of them cannot be looked into.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # of two splits one may lack a class
            raise error

    found = os.walk(folder, onerror=refuse)
    return sorted(Path(place) / name for place, _, names in found for name in names)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _choose_splits(names: Sequence[str], *, others: bool = False) -> dict[str, str]:
    """Return which of the splits called `names` is `train` and which is `test` (a validation split, if need be).

    Args:
        others: take the first split for train where none is called so.
    """
    known = {
        "train": ("train", "training"),
        "test": ("test", "testing", "validation", "valid", "val", "dev"),
    }
    found = {
        part: next((name for word in words for name in names if name.lower() == word), None)
        for part, words in known.items()
    }
    if others and found["train"] is None:
        found["train"] = next((name for name in names if name != found["test"]), None)
    return {part: name for part, name in found.items() if name is not None}


@dataclass(frozen=True)
class _Shards:
    """The files of a source, in order: on this machine, or wherever fsspec reaches."""

    spec: str
    kind: str  # .parquet or .tar
    system: Any  # the fsspec file system that opens them
    parts: Mapping[str, Sequence[str]]  # their paths in it, by split (train, test)
    notes: tuple[str, ...]  # what to say of those that are in neither


def _find_shards(spec: str) -> _Shards | None:
    """Return the parquet files, else the tars, that a folder, a path, a pattern or a URL names; None: there are none.

    Raises:
        InputError: what the URL names cannot be listed.
    """
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(spec)
        pattern = any(letter in root for letter in "*?[") and not system.exists(root)
        paths = sorted(system.glob(root) if pattern else [root] if system.isfile(root) else _below(system, root))
    except Exception as error:  # each cloud's client raises its own kinds
        raise InputError(f"cannot list the data at {spec!r}: {first_line(error)}") from error
    # the folder that was asked for: a split word in it says nothing, for all files are below it
    asked = re.split(r"[*?[]", root)[0] if pattern else root
    if pattern or paths == [root]:
        asked = asked.rpartition("/")[0]
    for kind in SHARDS:
        groups: dict[str, list[str]] = {}
        for path in paths:
            if path.endswith(kind) and not _hidden(path.rpartition("/")[2]):
                groups.setdefault(_split_word(path[len(asked) :]), []).append(path)
        if groups:
            # sorted: files without a split word come first, to be the train split where no file is called so
            chosen = _choose_splits(sorted(groups), others=True)
            others = [path for group, own in groups.items() if group not in chosen.values() for path in own]
            notes = _other_splits([path[len(asked) :].lstrip("/") for path in others])
            return _Shards(spec, kind, system, {part: groups[group] for part, group in chosen.items()}, notes)
    if "://" in spec:
        raise InputError(f"found no parquet or tar files at {spec!r}")
    return None


def _other_splits(others: Sequence[str]) -> tuple[str, ...]:
    """Return what to say of files that are taken for neither split; nothing, where there are none."""
    if not others:
        return ()
    if len(others) == 1:
        return (f"left out 1 file of another split, or of none, by its name: {others[0]!r}",)
    return (f"left out {len(others):,} files of another split, or of none, by their names, {others[0]!r} for one",)


def _below(system: Any, root: str) -> list[str]:
    """Return what may be a shard below a folder."""
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(system, LocalFileSystem):  # whose `find` asks for the size of each of a million pictures
        return [path.as_posix() for path in Path(root).rglob("*") if path.suffix in SHARDS]
    return [path for path in system.find(root) if path.endswith(SHARDS)]


def _open_parquet(found: _Shards, label_column: str | None, image_column: str | None) -> Opened:
    raw: dict[str, list[Labels | list[Any]]] = {part: [] for part in found.parts}
    groups: dict[str, list[_Group]] = {part: [] for part in found.parts}
    columns: tuple[str, str] | None = None
    names: tuple[str, ...] = ()
    path = ""
    try:
        for part, paths in found.parts.items():
            for path in paths:
                with _parquet(found.system, path) as file:
                    if columns is None:
                        columns, names = _columns(file.schema_arrow, label_column, image_column, found.spec)
                    raw[part].append(_values(file.read(columns=[columns[1]]).column(0)))
                    groups[part] += [
                        _Group(path, group, file.metadata.row_group(group).num_rows)
                        for group in range(file.metadata.num_row_groups)
                    ]
    except InputError:
        raise
    except Exception as error:  # as in `_find_shards`
        raise InputError(f"cannot read {path!r}: {first_line(error)}") from error
    assert columns is not None  # there is a file at least
    labels, names, named = _encode(raw, names, columns[1])
    return (
        {
            part: ImageTable(
                labels=labels[part],
                read=_parquet_reader(found.system, groups[part], columns[0]),
                name=lambda row, part=part: f"row {row} of the {part} split of {found.spec}",  # type: ignore[misc]
                starts=_starts([group.rows for group in groups[part]]),
            )
            for part in found.parts
        },
        names,
        named,
    )


@dataclass(frozen=True)
class _Group:
    """One row group of a parquet file."""

    path: str
    number: int
    rows: int


@contextmanager
def _parquet(system: Any, path: str) -> Iterator[Any]:
    import pyarrow.parquet as pq
    from fsspec.implementations.local import LocalFileSystem

    here = isinstance(system, LocalFileSystem)
    # buffered: else a column is read in whole row groups, which other writers make as large as a file
    with nullcontext(path) if here else system.open(path, "rb") as raw, pq.ParquetFile(raw, buffer_size=2**20) as file:
        yield file


def _values(column: Any) -> Labels | list[Any]:
    """Return the values of an Arrow column: integers as an array, others as they are."""
    import pyarrow as pa

    if pa.types.is_integer(column.type) and not column.null_count:
        return np.asarray(column.to_numpy(), dtype=np.int64)
    return list(column.to_pylist())


def _starts(sizes: Sequence[int]) -> Labels:
    """Return the first row of each block."""
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


def _split_word(path: str) -> str:
    """Return the word of a file's path that says its split (as in `test-00000-of-00001.parquet`), or nothing."""
    words = re.split(r"[^a-z]+", path.lower())
    return next(iter(_choose_splits(words).values()), "")


def _columns(
    schema: Any, label_column: str | None, image_column: str | None, where: str
) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Return the image and the label column of an Arrow schema, and the class names where its metadata has them."""
    from datasets import ClassLabel, Features

    present = list(schema.names)
    try:
        features: dict[str, Any] = dict(Features.from_arrow_schema(schema))
    except (ValueError, KeyError, TypeError):  # metadata of another writer: columns still tell their names
        features = {}
    label = _choose(
        label_column,
        LABEL_COLUMNS,
        present,
        "label",
        where,
        {name for name, feature in features.items() if isinstance(feature, ClassLabel)},
    )
    image = _choose(image_column, IMAGE_COLUMNS, present, "image", where, set())
    feature = features.get(label)
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    return (image, label), names


def _choose(
    asked: str | None, usual: Sequence[str], present: Sequence[str], kind: str, where: str, typed: set[str]
) -> str:
    listing = ", ".join(present)
    if asked is not None:
        if asked not in present:
            raise InputError(f"no column {asked!r} in {where!r}: it has {listing}; choose one with --{kind}-column")
        return asked
    found = [name for name in present if name in typed] or [name for name in usual if name in present]
    if len(found) == 1 or (found and not typed):
        return found[0]
    if not found:
        raise InputError(f"found no {kind} column in {where!r}: it has {listing}; name one with --{kind}-column")
    raise InputError(f"several {kind} columns in {where!r}: {', '.join(found)}; choose one with --{kind}-column")


def _encode(
    raw: Mapping[str, Sequence[Labels | list[Any]]], names: tuple[str, ...], column: str
) -> tuple[dict[str, Labels], tuple[str, ...], bool]:
    """Turn the raw labels of each split's files, integers or strings, into int64 labels, class names, and whether those
    are the source's."""
    chunks = [chunk for own in raw.values() for chunk in own]
    if any(not isinstance(chunk, np.ndarray) for chunk in chunks):
        kinds = {
            type(value)
            for chunk in chunks
            for value in (chunk[:1].tolist() if isinstance(chunk, np.ndarray) else chunk)
        }
        if kinds == {str}:
            names = names or tuple(sorted({value for chunk in chunks for value in chunk}))
            index = {name: label for label, name in enumerate(names)}
            return (
                {
                    part: np.array([index[value] for chunk in own for value in chunk], dtype=np.int64)
                    for part, own in raw.items()
                },
                names,
                True,
            )
        if kinds - {int}:
            listed = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise InputError(
                f"expected integer or text labels in column {column!r}, found {listed}; see --label-column"
            )
    labels = {
        part: np.concatenate([np.asarray(chunk, dtype=np.int64) for chunk in own] or [np.empty(0, dtype=np.int64)])
        for part, own in raw.items()
    }
    highest = max((int(own.max()) for own in labels.values() if len(own)), default=-1)
    return labels, names or tuple(str(label) for label in range(highest + 1)), bool(names)


def _parquet_reader(system: Any, groups: Sequence[_Group], column: str) -> Callable[[Labels], Iterator[Any]]:
    starts = _starts([group.rows for group in groups])

    def read(rows: Labels) -> Iterator[Any]:
        """Yield the payloads of rows, block after block; row groups without a wanted row are not read."""
        from pyarrow.lib import ArrowException

        for path, blocks in itertools.groupby(_by_block(rows, starts), lambda block: groups[block[0]].path):
            try:
                with _parquet(system, path) as file:
                    for number, wanted in blocks:
                        yield from _group_payloads(file, groups[number].number, column, wanted, Path(path).parent)
            except (ArrowException, OSError) as error:
                raise InputError(
                    f"cannot read {path!r}: {first_line(error)} (if it is damaged, fetch it again)"
                ) from error

    return read


def _by_block(rows: Labels, starts: Labels) -> Iterator[tuple[int, Labels]]:
    """Yield the number of each block and which of its rows, counted from its begin, are wanted, in the order given."""
    block = np.searchsorted(starts, rows, side="right") - 1
    ends = [*(np.flatnonzero(np.diff(block)) + 1), len(rows)] if len(rows) else []
    for first, last in itertools.pairwise([0, *ends]):
        number = int(block[first])
        yield number, rows[first:last] - starts[number]


def _group_payloads(file: Any, group: int, column: str, wanted: Labels, folder: Path) -> Iterator[Any]:
    first, position = 0, 0
    for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=[column]):
        stop = position + int(np.searchsorted(wanted[position:], first + len(batch)))
        for value in batch.column(0).take(wanted[position:stop] - first).to_pylist():
            yield _payload(value, folder)
        first, position = first + len(batch), stop
        if position == len(wanted):
            return


def _payload(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):  # the hub's image struct
        return value["bytes"] if value.get("bytes") is not None else folder / str(value.get("path"))
    return folder / value if isinstance(value, str) else value


def _open_tars(found: _Shards, label_column: str | None, image_column: str | None) -> Opened:
    """Open WebDataset tars, where files of one name are a sample: gone through once for labels; nothing is decoded."""
    raw: dict[str, list[Labels | list[Any]]] = {part: [] for part in found.parts}
    columns = None
    for part, paths in found.parts.items():
        for path in paths:
            own: list[Any] = []
            for sample in _tar_samples(found.system, path):
                if columns is None:
                    columns = _tar_columns(sample, label_column, image_column, found.spec)
                own.append(_label_of(sample, columns[1]))
            raw[part].append(own)
    if columns is None:
        raise InputError(f"expected images in the tar files of {found.spec!r}, found none")
    image, label = columns
    labels, names, named = _encode(raw, (), label)
    return (
        {
            part: ImageTable(
                labels=labels[part],
                read=_tar_reader(found.system, paths, _starts([len(own) for own in raw[part]]), image),
                name=lambda row, part=part: f"sample {row} of the {part} split of {found.spec}",  # type: ignore[misc]
                starts=_starts([len(own) for own in raw[part]]),
            )
            for part, paths in found.parts.items()
        },
        names,
        named,
    )


def _tar_samples(system: Any, path: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of one tar, by the endings of their files (jpg, cls, json); images are not decoded.

    Raises:
        InputError: it cannot be read, or is not in WebDataset format.
    """
    import datasets

    try:
        files = {"train": [system.unstrip_protocol(path)]}
        stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
        yield from stream.decode(enable=False)
    except Exception as error:  # as in `_find_shards`
        raise InputError(f"cannot read {path!r} as a WebDataset: {first_line(error)}") from error


def _tar_columns(
    sample: Mapping[str, Any], label_column: str | None, image_column: str | None, where: str
) -> tuple[str, str]:
    """Return the image and the label column of a sample; what is in a json is called `json.NAME`."""
    present = [name for name in sample if not name.startswith("__")]
    images = [name for name in present if isinstance(sample[name], dict) and set(sample[name]) == {"bytes", "path"}]
    others = [name for name in present if name not in images]
    keys = [f"{name}.{key}" for name in others if isinstance(sample[name], dict) for key in sample[name]]
    usual = ("cls", *(f"json.{name}" for name in LABEL_COLUMNS), "txt")
    label = _choose(label_column, usual, [*present, *keys], "label", where, set())
    return _choose(image_column, (), present, "image", where, set(images)), label


def _label_of(sample: Mapping[str, Any], column: str) -> Any:
    if column in sample:
        return sample[column]
    name, _, key = column.partition(".")
    return (sample.get(name) or {}).get(key)


def _tar_reader(system: Any, paths: Sequence[str], starts: Labels, column: str) -> Callable[[Labels], Iterator[Any]]:
    def read(rows: Labels) -> Iterator[Any]:
        """Yield the payloads of rows, tar after tar, each read up to the last wanted sample."""
        for number, wanted in _by_block(rows, starts):
            samples = _tar_samples(system, paths[number])
            position = 0
            for row in wanted:
                sample = next(itertools.islice(samples, int(row) - position, None), None)
                if sample is None:
                    raise InputError(f"{paths[number]!r} has fewer samples than when it was opened")
                position = int(row) + 1
                yield _payload(sample[column], Path())

    return read


def _open_hub(name: str, label_column: str | None, image_column: str | None) -> Opened:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client raises dozens of kinds: missing, gated, offline
        raise InputError(f"cannot load data set {name!r} from the hub: {first_line(error)}") from error
    chosen = _choose_splits([str(key) for key in loaded], others=True)
    parts = {part: loaded[key] for part, key in chosen.items()}
    first = next(iter(parts.values()))
    (image, label), names = _columns(first.features.arrow_schema, label_column, image_column, f"hf:{name}")
    labels, names, named = _encode({key: [list(part[label])] for key, part in parts.items()}, names, label)
    return (
        {
            key: ImageTable(
                labels=labels[key],
                read=_hub_reader(part.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image),
                name=lambda row, key=key: f"row {row} of the {key} split of hf:{name}",  # type: ignore[misc]
            )
            for key, part in parts.items()
        },
        names,
        named,
    )


def _hub_reader(part: Any, column: str) -> Callable[[Labels], Iterator[Any]]:
    return lambda rows: (_payload(part[int(row)][column], Path()) for row in rows)


def _open_torchvision(name: str) -> Opened:
    import torchvision.datasets

    maker = getattr(torchvision.datasets, name, None)
    if not isinstance(maker, type):
        raise InputError(f"torchvision has no data set {name!r}; see its documentation for the names")
    root = Path(os.environ.get("TORCHVISION_DATA", Path.home() / ".cache" / "torchvision"))
    try:
        with _one_at_a_time(root):
            parts = {"train": maker(root, train=True, download=True), "test": maker(root, train=False, download=True)}
    except TypeError:
        raise InputError(f"torchvision:{name} does not come as labelled train and test images") from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot load torchvision:{name} into {root}: {first_line(error)}") from error
    try:
        labels = {key: np.asarray(part.targets, dtype=np.int64) for key, part in parts.items()}
    except AttributeError:
        raise InputError(f"torchvision:{name} has no class labels (no 'targets')") from None
    stated = getattr(parts["train"], "classes", None)
    names = stated or range(int(labels["train"].max()) + 1)
    return (
        {
            key: ImageTable(
                labels=labels[key],
                read=lambda rows, part=part: (part[int(row)][0] for row in rows),  # type: ignore[misc]
                name=lambda row, key=key: f"image {row} of the {key} split of torchvision:{name}",  # type: ignore[misc]
            )
            for key, part in parts.items()
        },
        tuple(str(class_name) for class_name in names),
        stated is not None,
    )


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Let one process after the other download into a folder: torchvision writes files where others look for them.

    The lock is in the folder, for the one above may not be writable. A folder where it cannot be made may hold the data
    already; if it does not, torchvision says what is wrong.
    """
    lock = FileLock(root / ".expunge.lock")
    with suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()  # does nothing where it is not held


# Classes and samples


def resolve_classes(
    asked: Sequence[str | int], class_names: Sequence[str], *, purpose: str = "forget"
) -> tuple[int, ...]:
    """Return the sorted labels of classes given by name or by index; a name wins over an index.

    Args:
        purpose: what is to be done with them, as a message says it.

    Raises:
        InputError: a class is unknown or out of range, none is given, or all are.
    """
    labels: set[int] = set()
    # where classes are called by numbers that are not their indices, a number can only be a name
    numbered = any(re.fullmatch(r"-?\d+", name) for name in class_names) and list(class_names) != [
        str(label) for label in range(len(class_names))
    ]
    for item in _split_at_commas(asked, class_names):
        text = str(item).strip()
        if isinstance(item, str) and text in class_names:
            labels.add(list(class_names).index(text))
        elif re.fullmatch(r"-?\d+", text) and not (isinstance(item, str) and numbered):
            if not 0 <= int(text) < len(class_names):
                raise InputError(f"class index {text} is out of range: expected 0 to {len(class_names) - 1}")
            labels.add(int(text))
        elif text:
            shown = ", ".join(class_names[:12]) + (", ..." if len(class_names) > 12 else "")
            raise InputError(f"unknown class {text!r}: expected one of {shown}{'' if numbered else ' (or an index)'}")
    if not labels:
        raise InputError(f"expected at least one class to {purpose}, got none")
    if len(labels) == len(class_names):
        raise InputError(f"cannot {purpose} all {len(class_names)} classes: at least one must be retained")
    return tuple(sorted(labels))


def _split_at_commas(asked: Sequence[str | int], class_names: Sequence[str]) -> Iterator[str | int]:
    for item in asked:
        if isinstance(item, str) and item not in class_names:
            yield from item.split(",")
        else:
            yield item


def stratified_split(table: ImageTable, share: float, *, seed: int) -> tuple[ImageTable, ImageTable]:
    """Cut `share` of each class off, at random; a class of one image stays whole in the first part."""
    cut: list[Labels] = []
    for label in np.unique(table.labels):
        rng = np.random.default_rng((seed, int(label)))  # one class's cut does not depend on which others are there
        rows = rng.permutation(np.flatnonzero(table.labels == label))
        cut.append(rows[: max(1, round(share * len(rows)))] if len(rows) > 1 else rows[:0])
    second = np.concatenate(cut)
    return table.select(np.setdiff1d(np.arange(len(table)), second)), table.select(second)


def draw(table: ImageTable, *, per_class: int | None = None, share: float | None = None, seed: int) -> ImageTable:
    """Return a random sample of every class: `per_class` images (all, where fewer), or a share, or everything."""
    if per_class is None and share is None:
        return table
    rng = np.random.default_rng(seed)
    chosen: list[Labels] = []
    for label in np.unique(table.labels):
        rows = rng.permutation(np.flatnonzero(table.labels == label))
        size = per_class if per_class is not None else max(1, round((share or 0) * len(rows)))
        chosen.append(rows[:size])
    return table.select(np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64))


def hold_out(dataset: Dataset[Any], *, share: float, most: int, seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return a data set without a random share of each class, and that share: at most `most` images together.

    A class with too few images for the share loses none. Where that holds of all, or the data set is a stream of
    somebody else's, nothing is cut off and the held-out part is a sample of the first, of a stream from around its
    middle on: impressions start from its first images. Where it is `most` that leaves
    less than an image a class, `most` classes at random lose one each.
    """
    labels = labels_of(dataset)
    asked, share = share, min(share, most / max(1, len(labels)))
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    held = np.sort(np.concatenate([part[: int(share * len(part) + 0.5)] for part in parts] or [labels[:0]]))
    if len(held) == 0:
        held = np.array([part[0] for part in parts if int(asked * len(part) + 0.5)], dtype=np.int64)
    held = np.sort(rng.permutation(held)[:most])
    kept = np.setdiff1d(np.arange(len(labels)), held)
    foreign = isinstance(dataset, IterableDataset) and not isinstance(dataset, StreamedImages)
    if foreign or (len(held) == 0 and isinstance(dataset, IterableDataset)):
        start = len(labels) // 4 + int(rng.integers(max(1, len(labels) // 2)))
        later = itertools.chain(itertools.islice(iter(dataset), start, None), itertools.islice(iter(dataset), start))
        some = list(itertools.islice(later, most))
        return dataset, _Chosen(some, np.arange(len(some)))
    if len(held) == 0:
        return dataset, _Chosen(dataset, rng.permutation(len(labels))[:most])
    if isinstance(dataset, StreamedImages):
        training, rest = (dataset.of(rows, shuffle=dataset.shuffle) for rows in (kept, held))
        samples = list(rest)
        return training, _Chosen(samples, np.arange(len(samples)))
    return _Chosen(dataset, kept), _Chosen(dataset, held)


class _Chosen(Subset[Any]):
    """Some samples of a data set, with their labels listed."""

    def __init__(self, dataset: Any, index: Labels) -> None:
        super().__init__(dataset, index.tolist())
        self.labels = labels_of(dataset)[index]


def without(table: ImageTable, labels: Iterable[int]) -> ImageTable:
    """Return the rows of `table` that bear none of `labels`."""
    return table.select(np.flatnonzero(~np.isin(table.labels, list(labels))))


def relabel(table: ImageTable, new_labels: Sequence[int]) -> ImageTable:
    """Return the table with each label l replaced by `new_labels[l]`."""
    return replace(table, labels=np.asarray(new_labels, dtype=np.int64)[table.labels])


# Decoding


def native_size(table: ImageTable, sample: int = 64) -> tuple[int, int] | None:
    """Return the (height, width) that images of the table share, or None where they differ.

    Raises:
        InputError: none of those that were tried can be decoded.
    """
    sizes = set()
    rows = _evenly(table, sample).rows
    for row, payload in zip(rows, table.read(rows), strict=True):
        try:
            sizes.add(_open_image(payload, table.name(int(row))).size)
        except InputError:
            continue
    if not sizes:
        raise InputError(_none_decoded(table, rows))
    if len(sizes) != 1:
        return None
    width, height = sizes.pop()
    return height, width


def _none_decoded(table: ImageTable, rows: Labels) -> str:
    """Return what to say where no image of `rows`, of those of `table`, can be decoded."""
    which = f"the {len(rows):,} images" if len(rows) == len(table) else f"{len(rows):,} of {len(table):,} images"
    return f"could decode none of {which} that were tried, the first being {table.name(int(rows[0]))}"


def _evenly(table: ImageTable, most: int) -> ImageTable:
    return table.select(np.unique(np.linspace(0, len(table) - 1, min(len(table), most)).astype(np.int64)))


GREY = {"1", "L", "I", "I;16", "F"}
"""Modes of Pillow for images of one channel."""


def native_channels(table: ImageTable) -> int:
    """Return 1 where those of 64 images that can be decoded are all grey, else 3."""
    rows = _evenly(table, 64).rows
    modes = set()
    for row, payload in zip(rows, table.read(rows), strict=True):
        try:
            modes.add(_open_image(payload, table.name(int(row))).mode)
        except InputError:
            continue
        if not modes <= GREY:
            return 3
    return 1 if modes else 3


def _open_image(payload: Any, name: str) -> Image.Image:
    try:
        if isinstance(payload, Image.Image):
            return payload
        if isinstance(payload, np.ndarray):
            return Image.fromarray(payload)
        with _of_any_format(payload) as image:  # closes the file; those of formats with frames stay open else
            image.load()
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return image if turn is None else image.transpose(turn)
    except UNDECODABLE as error:
        raise InputError(f"cannot decode {name} ({first_line(error)}); remove it or pass --skip-bad") from error


UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    EOFError,
    struct.error,  # of EXIF that is not as its tags say
    Image.DecompressionBombError,
)
"""What Pillow raises on damaged files."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts an image upright, by its EXIF orientation. (`ImageOps.exif_transpose` writes all tags anew beside that, and
fails on images whose pixels are whole.)"""

USUAL_FORMATS = ("JPEG", "PNG", "WEBP")
"""Tried first: each is known by its first bytes, while Pillow asks half a dozen others to read the file before."""


def _of_any_format(payload: Any) -> Image.Image:
    def file() -> Any:
        return io.BytesIO(payload) if isinstance(payload, bytes) else payload

    try:
        return Image.open(file(), formats=USUAL_FORMATS)
    except UnidentifiedImageError:
        return Image.open(file())


def decode(payload: Any, preprocessing: Preprocessing, name: str, *, skip_bad: bool = False) -> Tensor | None:
    """Return an image as uint8 (channels, H, W), resized on its shorter side and centre-cropped where sizes differ.

    None for an image that cannot be decoded, where `skip_bad`; else InputError, which names it.
    """
    try:
        image = to_8_bits(_open_image(payload, name), name)
    except InputError:
        if skip_bad:
            return None
        raise
    image = image.convert("L" if preprocessing.channels == 1 else "RGB")
    height, width = preprocessing.size
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(resized, Image.Resampling.BILINEAR)
        left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def to_8_bits(image: Image.Image, name: str = "an image") -> Image.Image:
    """Return an image whose pixels are 8 bits deep; 16-bit grey is scaled down.

    Raises:
        InputError: pixels are 32-bit integers or floats, whose range nothing tells.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(
            f"expected images of 8 or 16 bits a channel, got mode {image.mode!r} ({name}): convert it, or pass "
            "--skip-bad"
        )
    return image


@dataclass(frozen=True)
class Staged:
    """A table made ready for a model."""

    dataset: TensorImages | StreamedImages
    skipped: int  # images that could not be decoded when it was staged

    @property
    def num_bad(self) -> int:
        """How many images could not be decoded and were left out; of a stream, as far as it was read."""
        return self.skipped + (len(self.dataset.bad) if isinstance(self.dataset, StreamedImages) else 0)


def stage(
    table: ImageTable,
    preprocessing: Preprocessing,
    *,
    skip_bad: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    held: int | None = None,
) -> Staged:
    """Decode a small table into one uint8 tensor; give a large one back as a stream.

    Args:
        shuffle: whether a stream is shuffled each epoch; a tensor is shuffled by its loader.
        held: bytes of decoded images to hold in memory, at most; None: HELD_BYTES. A stated number rather than what is
            free: a stream is shuffled otherwise than a tensor, and another machine shall give the same result.
    """
    height, width = preprocessing.size
    held = HELD_BYTES if held is None else held
    if len(table) * image_bytes(preprocessing) > held:
        return Staged(StreamedImages(table, preprocessing, seed=seed, shuffle=shuffle, skip_bad=skip_bad, held=held), 0)
    images = torch.empty((len(table), preprocessing.channels, height, width), dtype=torch.uint8)
    kept = torch.ones(len(table), dtype=torch.bool)

    def fill(items: list[tuple[int, Any]]) -> None:
        for index, payload in items:
            image = decode(payload, preprocessing, table.name(int(table.rows[index])), skip_bad=skip_bad)
            if image is None:
                kept[index] = False
            else:
                images[index] = image

    with ThreadPoolExecutor() as pool:
        payloads = enumerate(table.read(table.rows))
        while chunk := _next(payloads, 4096):
            if _are_small(payload for _, payload in chunk[:64]):
                fill(chunk)
            else:
                list(pool.map(fill, ([item] for item in chunk)))
    labels = torch.from_numpy(table.labels.copy())
    skipped = int((~kept).sum())
    if skipped:
        images, labels = images[kept], labels[kept]
    return Staged(TensorImages(images, labels), skipped)


def measure_statistics(table: ImageTable, size: tuple[int, int], channels: int) -> Preprocessing:
    """Return preprocessing whose mean and std are those of up to 2,000 images of `table`, evenly spaced."""
    plain = Preprocessing(size=size, mean=(0.0,) * channels, std=(1.0,) * channels, source="measured")
    sample = _evenly(table, _at_most(2000, HELD_BYTES, plain))
    staged = stage(sample, plain, skip_bad=True).dataset
    if len(sample) and len(staged) == 0:
        raise InputError(_none_decoded(table, sample.rows))
    if not isinstance(staged, TensorImages) or len(staged) == 0:
        raise InputError("cannot measure mean and std on these images; give them with --mean and --std")
    counts = torch.stack([torch.bincount(c.flatten().long(), minlength=256) for c in staged.images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    variance = (counts * (values - mean.unsqueeze(1)).square()).sum(1) / counts.sum(1)
    std = variance.sqrt().clamp_min(1e-3)
    return replace(plain, mean=tuple(round(m, 4) for m in mean.tolist()), std=tuple(round(s, 4) for s in std.tolist()))


def normalize(images: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    """Return model input, float32: uint8 images scaled to [0, 1] and normalized; float images as they are.

    Raises:
        InputError: images are integers other than uint8, or uint8 without a preprocessing of their channels.
    """
    if images.is_floating_point():
        return images.float()
    if preprocessing is None or images.dtype != torch.uint8:
        alone = " alone" if preprocessing is None else ""
        raise InputError(
            f"expected float images, or uint8 images and a preprocessing; got {images.dtype} images{alone}"
        )
    if images.shape[1] != preprocessing.channels:
        raise InputError(
            f"expected images of {preprocessing.channels} channels, got {images.shape[1]}; see Preprocessing"
        )
    mean = torch.tensor(preprocessing.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(1, -1, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


def count_labels(dataset: Dataset[Any]) -> dict[int, int]:
    """Return how many samples bear each label; images are decoded only where a data set does not list its labels."""
    values, counts = np.unique(labels_of(dataset), return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def size_of(dataset: Any) -> int:
    """Return how many samples there are; images are decoded only where a data set gives no length and no labels."""
    return len(dataset) if hasattr(dataset, "__len__") else len(labels_of(dataset))


def labels_of(dataset: Any) -> Labels:
    """Return the label of each sample; images are decoded only where a data set does not list its labels.

    What somebody else's data set calls `labels` or `targets` need not be what its samples bear: it may be names, or
    labels before `target_transform`. It is taken where a few samples say so.
    """
    listed = getattr(dataset, "labels", None)
    if listed is None:
        listed = getattr(dataset, "targets", None)
    if listed is not None and not _are_labels(listed, dataset):
        listed = None
    if listed is None and isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if listed is None and isinstance(dataset, ConcatDataset):
        return np.concatenate([labels_of(part) for part in dataset.datasets])
    if listed is None:
        listed = [int(sample[1]) for sample in DataLoader(dataset, batch_size=None)]
    return np.asarray(listed, dtype=np.int64)


def _are_labels(listed: Any, dataset: Any) -> bool:
    """Return whether a list is of the labels that the samples of a data set bear, as far as three of them show."""
    if type(dataset).__module__.partition(".")[0] == __package__:
        return True
    try:
        labels = np.asarray(listed)
    except (TypeError, ValueError):
        return False
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return False
    if isinstance(dataset, IterableDataset):
        return False
    size = len(dataset)
    return len(labels) == size and all(
        int(dataset[place][1]) == labels[place] for place in {0, size // 2, size - 1} if 0 <= place < size
    )


def missing_classes(counts: Mapping[int, int], expected: Iterable[int], class_names: Sequence[str]) -> list[str]:
    """Return the names of the classes of `expected` without a sample in `counts`."""
    return [class_names[label] for label in expected if not counts.get(label)]
