"""Large inputs: many parquet files or WebDataset tars, in a folder, by a pattern, or at a URL."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from expunge import data
from expunge.data import ImageTable, StreamedImages, draw, open_source, stage, without
from expunge.errors import InputError
from expunge.schema import Preprocessing
from test_cli import Trained, invoke, record_of, refuse, trained

__all__ = ["trained"]

GREY = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
EACH = 20  # samples a shard
Encoded = list[tuple[bytes, int]]


def png(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int = 60, classes: int = 10) -> Encoded:
    """Images whose grey tells their number."""
    return [(png(number), number * 7 % classes) for number in range(count)]


def digits(labels: Sequence[int], each: int = 12) -> Encoded:
    from sklearn.datasets import load_digits

    found = load_digits()
    made = []
    for label in labels:
        for row in np.flatnonzero(found.target == label)[:each]:
            buffer = io.BytesIO()
            Image.fromarray((found.images[row] * 15).astype(np.uint8)).save(buffer, "PNG")
            made.append((buffer.getvalue(), label))
    return [made[index] for index in np.random.default_rng(0).permutation(len(made))]


def write_parquet(root: str, content: Encoded, part: str = "train") -> None:
    """Write shards of EACH samples, in row groups of 8."""
    system, folder = fsspec.core.url_to_fs(root)
    system.makedirs(folder, exist_ok=True)
    for number, first in enumerate(range(0, len(content), EACH)):
        own = content[first : first + EACH]
        table = pa.table({"image": [image for image, _ in own], "label": [label for _, label in own]})
        with system.open(f"{folder}/{part}-{number:05}.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=8)


def write_tars(root: str, content: Encoded, part: str = "train", *, as_json: bool = False) -> None:
    system, folder = fsspec.core.url_to_fs(root)
    system.makedirs(folder, exist_ok=True)
    for number, first in enumerate(range(0, len(content), EACH)):
        with system.open(f"{folder}/{part}-{number:05}.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for key, (image, label) in enumerate(content[first : first + EACH], first):
                add(tar, f"{key:06}.png", image)
                if as_json:
                    add(tar, f"{key:06}.json", json.dumps({"label": label, "from": "a camera"}).encode())
                else:
                    add(tar, f"{key:06}.cls", str(label).encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


WRITERS = {"parquet": write_parquet, "tar": write_tars}


@pytest.fixture
def bucket() -> Iterator[str]:
    """A file system that is no folder of this machine, as a bucket is none."""
    yield "memory://bucket/data"
    fsspec.filesystem("memory").store.clear()


def greys(table: ImageTable) -> list[int]:
    return [int(image[0, 0, 0]) for image, _ in StreamedImages(table, GREY, shuffle=False, skip_bad=False)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("where", ["folder", "pattern", "url", "file url"])
def test_every_way_to_name_shards_gives_the_same(kind: str, where: str, tmp_path: Path, bucket: str) -> None:
    root = {"url": bucket, "file url": f"file://{tmp_path}/shards"}.get(where, str(tmp_path / "shards"))
    WRITERS[kind](root, samples())
    source = open_source(f"{root}/train-*.{kind}" if where == "pattern" else root)
    assert source.train.labels.tolist() == [label for _, label in samples()]
    assert greys(source.train) == list(range(60))
    chosen = without(source.train, (0, 1, 2))
    assert greys(chosen) == [number for number, (_, label) in enumerate(samples()) if label > 2]
    assert Counter(draw(chosen, per_class=2, seed=0).labels.tolist()) == dict.fromkeys(range(3, 10), 2)
    assert source.class_names == tuple("0123456789")
    assert not source.named


def test_one_shard_by_its_name(tmp_path: Path) -> None:
    write_tars(str(tmp_path), samples())
    assert greys(open_source(str(tmp_path / "train-00001.tar")).train) == list(range(20, 40))


@pytest.mark.parametrize("kind", WRITERS)
def test_splits_are_told_by_the_names_of_files(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](str(tmp_path), samples(40))
    WRITERS[kind](str(tmp_path), samples(10), "val")
    source = open_source(str(tmp_path))
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (40, 10)


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
@pytest.mark.parametrize("pattern", ["", "/*/*.parquet", "/**/*.parquet", "/[tv]*/*.parquet"])
@pytest.mark.parametrize("in_bucket", [False, True])
def test_splits_are_told_by_the_folders_below_a_pattern(
    held_out: str, pattern: str, in_bucket: bool, tmp_path: Path, bucket: str
) -> None:
    root = f"{bucket if in_bucket else tmp_path}/train-and-test"  # which says nothing
    write_parquet(f"{root}/train", samples(40), "part")
    write_parquet(f"{root}/{held_out}", samples(10), "part")
    source = open_source(root + pattern)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (40, 10)
    assert source.notes == ()


@pytest.mark.parametrize("pattern", ["train/*.parquet", "val/*.parquet", "val/part-0000[0-9].parquet"])
def test_folders_before_the_first_wildcard_say_no_split(pattern: str, tmp_path: Path) -> None:
    write_parquet(str(tmp_path / "train"), samples(40), "part")
    write_parquet(str(tmp_path / "val"), samples(10), "part")
    source = open_source(str(tmp_path / pattern))
    assert len(source.train) == (40 if pattern.startswith("train") else 10)
    assert source.test is None


@pytest.mark.parametrize("pattern", ["", "/*.parquet"])
def test_files_of_no_split_beside_those_of_one_are_told(pattern: str, tmp_path: Path) -> None:
    write_parquet(str(tmp_path), samples(40))
    write_parquet(str(tmp_path), samples(10), "extra")
    source = open_source(f"{tmp_path}{pattern}")
    assert (len(source.train), source.test) == (40, None)
    assert source.notes == ("left out 1 file of another split, or of none, by its name: 'extra-00000.parquet'",)
    write_parquet(str(tmp_path), samples(10), "test")
    write_parquet(str(tmp_path), samples(10), "val")
    (told,) = open_source(f"{tmp_path}{pattern}").notes
    assert told == "left out 2 files of another split, or of none, by their names, 'extra-00000.parquet' for one"


def test_files_of_no_split_are_the_train_split_before_any_held_out_ones(tmp_path: Path) -> None:
    write_parquet(str(tmp_path), samples(10), "a-val")
    write_parquet(str(tmp_path), samples(40), "part")
    write_parquet(str(tmp_path), samples(20), "test")
    source = open_source(str(tmp_path))
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (40, 20)
    assert source.notes == ("left out 1 file of another split, or of none, by its name: 'a-val-00000.parquet'",)


def test_labels_in_a_json_and_as_text(tmp_path: Path) -> None:
    write_tars(str(tmp_path / "json"), samples(), as_json=True)
    source = open_source(str(tmp_path / "json"))
    assert source.train.labels.tolist() == [label for _, label in samples()]
    assert open_source(str(tmp_path / "json"), label_column="json.from").class_names == ("a camera",)
    with tarfile.open(tmp_path / "text.tar", "w") as tar:
        for key, (image, label) in enumerate(samples(12, 2)):
            add(tar, f"{key}.png", image)
            add(tar, f"{key}.txt", ["cat", "dog"][label].encode())
    named = open_source(str(tmp_path / "text.tar"))
    assert (named.class_names, named.named) == (("cat", "dog"), True)
    assert named.train.labels.tolist() == [label for _, label in samples(12, 2)]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_stream_mixes_shards_anew_each_epoch(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](str(tmp_path), samples(100))
    stream = stage(open_source(str(tmp_path)).train, GREY, seed=3, held=10 * 64).dataset  # ten images are held back
    assert isinstance(stream, StreamedImages)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append([int(image[0, 0, 0]) for image, _ in stream])
        assert sorted(epochs[-1]) == list(range(100))
    assert epochs[0] == epochs[2] != epochs[1]
    # the first images do not all come from the first shard, in one epoch of two at least
    assert max(max(order[:10]) for order in epochs) > 30


def test_only_row_groups_with_a_chosen_row_are_read(bucket: str) -> None:
    write_parquet(bucket, [(bytes([number]) * 20_000, number % 10) for number in range(60)])
    table = open_source(bucket).train
    system = fsspec.filesystem("memory")
    served: list[int] = []
    file = system.store["/bucket/data/train-00002.parquet"]
    read = file.read

    def counting(*size: int) -> bytes:
        got: bytes = read(*size)
        served.append(len(got))
        return got

    file.read = counting
    payloads = list(table.read(np.array([3, 41])))
    assert [payload[0] for payload in payloads] == [3, 41]
    assert 0 < sum(served) < 250_000  # one of its three row groups is 160 kB; the file is 400 kB


def one_tar(folder: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(folder / "train.tar", "w") as tar:
        for name, content in files.items():
            add(tar, name, content)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "as a WebDataset|expected images in the tar files"),
        ({"0.cls": b"1"}, "found no image column"),
        ({"0.png": png(1)}, "found no label column .* it has png"),
        ({"0.png": png(1), "0.cls": b"dog"}, "cannot read .* as a WebDataset: invalid literal"),
        ({"0.png": png(1), "0.jpg": png(1), "0.cls": b"1"}, "several image columns .* choose one with --image-column"),
        ({"0.png": png(1), "1.cls": b"1"}, "cannot read .* don't share the same prefix|WebDataset format"),
        ({"0.png": png(1), "0.json": b'{"label": null}'}, "expected integer or text labels .* found NoneType"),
        ({"0.png": png(1), "0.cls": b"-1"}, "expected labels 0 to .* found -1"),
    ],
)
def test_tars_that_cannot_be_used(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as raised:
        open_source(str(one_tar(tmp_path, files)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("memory://nowhere", "found no parquet or tar files at 'memory://nowhere'"),
        ("nonsense://bucket/x", "cannot list the data at 'nonsense://bucket/x': Protocol not known"),
        ("nowhere/*.tar", "no data at"),
    ],
)
def test_places_without_data(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(spec)


def test_a_tar_that_lost_samples_since(tmp_path: Path) -> None:
    write_tars(str(tmp_path), samples(20))
    table = open_source(str(tmp_path)).train
    write_tars(str(tmp_path), samples(10))
    with pytest.raises(InputError, match="fewer samples than when it was opened"):
        greys(table)


# The command


@pytest.mark.parametrize("kind", WRITERS)
def test_forget_with_a_retain_stream_from_a_bucket(
    kind: str, tmp_path: Path, trained: Trained, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[kind](bucket, digits([0, 1, 2, 3, 4]))
    held = ["--memory", "1K"]  # of the 48 images of 64 bytes, 16
    words = trained.arguments(tmp_path / "out", "--retain", bucket, *held, "--no-ledger")
    refuse("has 12 images of a forgotten class (3)", tmp_path / "out", *words)
    decoded: list[int] = []
    sample = data.StreamedImages._sample

    def counting(stream: data.StreamedImages, position: int, payload: Any) -> Any:
        decoded.append(position)
        return sample(stream, position, payload)

    monkeypatch.setattr(data.StreamedImages, "_sample", counting)
    done = invoke(*words, "--drop-forgotten")
    assert done.exit_code in (0, 1), done.stderr
    record = record_of(tmp_path / "out")
    assert record["data"]["dropped_forgotten"] == 12
    assert record["data"]["retain_samples"] == 48
    assert record["data"]["options"]["memory"] == 1024
    assert record["samples_read"]["retain_sample"] == {
        str(label): 12 if label in (0, 1, 2, 4) else 0 for label in range(10)
    }
    assert record["samples_read"]["method"].get("3", 0) == 0
    assert len(decoded) > 48  # they were decoded as they were needed
    hashes = json.loads((tmp_path / "out/retain_sample.json").read_text())["hashes"]
    assert len(hashes) == len(set(hashes)) == 48


@pytest.mark.parametrize("memory", ["much", "1.5G", "-1", "2T", ""])
def test_memory_is_a_number_of_bytes(memory: str, tmp_path: Path, trained: Trained) -> None:
    words = trained.arguments(tmp_path / "out", f"--memory={memory}")
    refuse("expected --memory as a number of bytes", tmp_path / "out", *words)
