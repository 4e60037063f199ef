from __future__ import annotations

import io
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from expunge import data
from expunge.data import (
    ImageTable,
    StreamedImages,
    TensorImages,
    count_labels,
    decode,
    draw,
    fingerprint,
    hold_out,
    labels_of,
    measure_statistics,
    missing_classes,
    native_channels,
    native_size,
    normalize,
    open_source,
    relabel,
    resolve_classes,
    stage,
    stratified_split,
    with_test_split,
    without,
)
from expunge.errors import InputError
from expunge.schema import Preprocessing
from expunge.workspace import DataOptions, align, open_workspace

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
ANIMALS = ("bird", "cat", "dog", "frog")
GREY8 = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.25,))
RGB4 = Preprocessing(size=(4, 4), mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 0.2))


def png(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    """One colour, whose red channel tells which image it is."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["at once", "by threads"])
def decoded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images here are small, so that no thread would decode them."""
    if request.param == "by threads":
        monkeypatch.setattr("expunge.data.SMALL_BYTES", -1)


def table_of(labels: Sequence[int], *, starts: Sequence[int] | None = None) -> ImageTable:
    return ImageTable(
        labels=np.array(labels, dtype=np.int64),
        read=lambda rows: (png(int(row)) for row in rows),
        name=lambda row: f"image {row}",
        starts=None if starts is None else np.array(starts),
    )


def test_a_folder_that_cannot_be_read_is_no_empty_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = write_folders(tmp_path / "pets", {"cat": 2, "dog": 2}), os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="dog"):
        open_source(str(root))


def test_a_class_name_that_is_not_utf8(tmp_path: Path) -> None:
    write_folders(tmp_path, {"cat": 1, os.fsdecode(b"c\xe4r"): 1})
    with pytest.raises(InputError, match="expected folder names in UTF-8"):
        open_source(str(tmp_path))


def test_a_class_called_train(tmp_path: Path) -> None:
    write_folders(tmp_path, {"bus": 1, "car": 1, "train": 1})
    with pytest.raises(InputError, match="'train' was taken for the train split: rename it, if it is a class"):
        open_source(str(tmp_path))


def test_a_folder_with_letters_of_a_pattern_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "[x]*"
    folder.mkdir()
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 1]}), folder / "train.parquet")
    assert len(open_source(str(folder)).train) == 2


def test_grey_only_where_all_are() -> None:
    def images(*modes: str) -> ImageTable:
        pictures = [Image.new(mode, (4, 4)) for mode in modes]
        return ImageTable(np.zeros(len(modes), dtype=np.int64), lambda rows: (pictures[r] for r in rows), str)

    assert [native_channels(images(*modes)) for modes in (("L", "1"), ("L", "RGB"), ("RGB", "L"))] == [1, 3, 3]


def test_pixels_of_no_known_range_are_named_and_can_be_skipped() -> None:
    image = Image.new("F", (4, 4))
    with pytest.raises(InputError, match=r"got mode 'F' \(dog/0.tiff\): convert it, or pass --skip-bad"):
        decode(image, RGB4, "dog/0.tiff")
    assert decode(image, RGB4, "dog/0.tiff", skip_bad=True) is None


def test_a_fingerprint_tells_data_of_one_name_apart(tmp_path: Path) -> None:
    first, same, other, moved = (tmp_path / name for name in "abcd")
    for root in (first, same, other, moved):
        write_folders(root, {"cat": 2, "dog": 2})
    (other / "dog" / "1.png").write_bytes(png(9))
    (moved / "dog" / "1.png").rename(moved / "cat" / "2.png")
    found = [fingerprint(open_source(str(root))) for root in (first, same, other, moved)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def write_folders(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(png(number))
    return root


def write_parquet(path: Path, columns: dict[str, list[Any]], schema: Any = None, group: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=group)


def structs(values: Sequence[int]) -> list[dict[str, Any]]:
    return [{"bytes": png(value), "path": None} for value in values]


def reds(table: ImageTable) -> list[int]:
    """Which images a table reads, by the red channel of the first pixel."""
    staged = stage(table, RGB4).dataset
    assert isinstance(staged, TensorImages)
    return [int(red) for red in staged.images[:, 0, 0, 0]]


# Sources


def test_digits() -> None:
    source = open_source("digits")
    assert source.class_names == tuple("0123456789")
    assert len(source.train) == 1797
    assert source.test is None
    assert not source.mirror_safe
    assert native_size(source.train) == (8, 8)
    assert native_channels(source.train) == 1


def test_folders_with_train_and_test(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"cat": 3, "dog": 2})
    write_folders(tmp_path / "test", {"dog": 1})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.test is not None
    assert source.test.labels.tolist() == [1]
    assert with_test_split(source)[1] is source.test
    assert reds(source.train) == [0, 1, 2, 0, 1]


def test_folders_without_test_lose_a_fifth_of_each_class(tmp_path: Path) -> None:
    write_folders(tmp_path, {"cat": 10, "dog": 5, "one": 1})
    source, test = with_test_split(open_source(str(tmp_path)))
    assert Counter(test.labels.tolist()) == {0: 2, 1: 1}
    assert Counter(source.train.labels.tolist()) == {0: 8, 1: 4, 2: 1}
    again = with_test_split(open_source(str(tmp_path)))[1]
    assert again.rows.tolist() == test.rows.tolist()


def test_images_of_any_usual_ending_are_taken(tmp_path: Path) -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMG_EXTENSIONS) <= set(data.IMAGE_ENDINGS)
    write_folders(tmp_path, {"cat": 2, "dog": 1, "owl": 0})
    Image.new("RGB", (4, 4), (9, 0, 0)).save(tmp_path / "cat" / "3.gif")
    Image.new("RGB", (4, 4), (200, 0, 0)).save(tmp_path / "owl" / "0.JFIF")
    source = open_source(str(tmp_path))
    assert source.train.labels.tolist() == [0, 0, 0, 1, 2]
    assert reds(source.train)[:4] == [0, 1, 9, 0]
    assert source.notes == ()


def test_files_in_class_folders_that_are_no_images_are_counted(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"cat": 1, "dog": 5})
    write_folders(tmp_path / "test", {"cat": 1})
    for name in ("train/cat/a.HEIC", "test/cat/b.heic", "train/dog/Mr. John Smith", "train/dog/.hidden", "train/c.txt"):
        (tmp_path / name).write_text("no image")
    told = "left out 3 files that are no images by their ending (.heic, another)"
    assert open_source(str(tmp_path)).notes == (told,)
    options = DataOptions(spec=str(tmp_path), size=(32, 32))
    assert told in open_workspace(options, "allcnn", None, seed=0, device="cpu").notes
    for path in tmp_path.rglob("train/*/*.png"):
        path.unlink()
    with pytest.raises(InputError, match="found none; left out 3 files"):
        open_source(str(tmp_path))
    assert data._no_images([Path("a.txt")]) == ("left out 1 file that is no image by its ending (.txt)",)


@pytest.mark.parametrize("counts", [{}, {"cat": 0, "dog": 0}])
def test_folder_without_images_is_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    write_folders(tmp_path, counts)
    with pytest.raises(InputError, match=r"expected (one sub-folder|images)"):
        open_source(str(tmp_path))


def test_a_folder_with_a_test_split_alone_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "split" / "test", {"cat": 1, "dog": 1})
    with pytest.raises(InputError, match=r"expected a train split in .*split', found only test"):
        open_source(str(tmp_path / "split"))
    write_folders(tmp_path / "classes", {"test": 1, "dog": 1})  # a class may be called so
    assert open_source(str(tmp_path / "classes")).class_names == ("dog", "test")
    write_folders(tmp_path / "one", {"test": 1})
    assert open_source(str(tmp_path / "one")).class_names == ("test",)


def test_where_nothing_can_be_decoded_it_is_said(tmp_path: Path) -> None:
    write_folders(tmp_path, {"cat": 2, "dog": 1})
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"hello")
    table = open_source(str(tmp_path)).train
    for measure in (lambda: native_size(table), lambda: measure_statistics(table, (4, 4), 3)):
        with pytest.raises(InputError, match="could decode none of the 3 images that were tried, the first being"):
            measure()


def test_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data at"):
        open_source(str(tmp_path / "nothing"))


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    schema = Features({"img": ImageFeature(), "label": ClassLabel(names=list(ANIMALS))}).arrow_schema
    write_parquet(tmp_path / "train-00000-of-00001.parquet", {"img": structs([10, 11, 12]), "label": [3, 0, 2]}, schema)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", {"img": structs([20]), "label": [1]}, schema)
    source = open_source(str(tmp_path))
    assert source.class_names == ANIMALS
    assert source.train.labels.tolist() == [3, 0, 2]
    assert source.test is not None
    assert source.test.labels.tolist() == [1]
    assert reds(source.train) == [10, 11, 12]
    assert reds(source.test) == [20]


def test_parquet_image_by_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(77))
    write_parquet(tmp_path / "train.parquet", {"image": [{"bytes": None, "path": "a.png"}], "label": [0]})
    assert reds(open_source(str(tmp_path)).train) == [77]


def test_parquet_plain_integer_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"image": [png(5), png(6)], "label": [2, 0]})
    source = open_source(str(tmp_path))
    assert source.class_names == ("0", "1", "2")
    assert not source.named
    assert reds(source.train) == [5, 6]


@pytest.mark.parametrize(("lowest", "absent"), [(0, None), (1, "class 0 has"), (2, "classes 0 to 1 have")])
def test_labels_that_nothing_names_and_that_do_not_begin_at_0(tmp_path: Path, lowest: int, absent: str | None) -> None:
    write_parquet(tmp_path / "train.parquet", {"image": [png(5), png(6)], "label": [lowest, 4]})
    source, told = align(open_source(str(tmp_path)), None)
    assert source.train.labels.tolist() == [lowest, 4]
    assert len(told) == (absent is not None)
    for note in told:
        assert note.startswith(f"labels run from {lowest} to 4 and are taken as they are, so that {absent} no image")
    named, told = align(source, (*ANIMALS, "owl"))  # images of a class may have been deleted
    assert (named.class_names, named.train.labels.tolist(), told) == ((*ANIMALS, "owl"), [lowest, 4], [])
    hint = ": number them from 0" if lowest else "$"
    with pytest.raises(InputError, match=f"expected labels 0 to 3 for the 4 classes .*, found {lowest} to 4{hint}"):
        align(source, ANIMALS)


def test_parquet_text_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"image": [png(0)] * 3, "label": ["dog", "cat", "dog"]})
    source = open_source(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert source.train.labels.tolist() == [1, 0, 1]


def test_parquet_two_label_columns(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    features = {"img": ImageFeature(), "fine_label": ClassLabel(names=["x", "y", "z"]), "coarse_label": ClassLabel(2)}
    columns: dict[str, list[Any]] = {"img": structs([1, 2]), "fine_label": [2, 0], "coarse_label": [1, 0]}
    write_parquet(tmp_path / "train.parquet", columns, Features(features).arrow_schema)
    with pytest.raises(InputError, match=r"fine_label, coarse_label; choose one with --label-column"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), label_column="fine_label").class_names == ("x", "y", "z")
    assert open_source(str(tmp_path), label_column="coarse_label").train.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"no column 'lable'.*--label-column"):
        open_source(str(tmp_path), label_column="lable")
    with pytest.raises(InputError, match=r"no column 'photo'.*--image-column"):
        open_source(str(tmp_path), label_column="fine_label", image_column="photo")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b""], "kind": [1]}, "found no label column.*--label-column"),
        ({"photo": [b""], "label": [1]}, "found no image column.*--image-column"),
        ({"image": [b""], "label": [0.5]}, "expected integer or text labels"),
        ({"image": [b""], "label": [-1]}, "expected labels 0 to"),
    ],
)
def test_parquet_with_odd_columns(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    write_parquet(tmp_path / "train.parquet", columns)
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path))


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("hello")
    with pytest.raises(InputError, match=r"cannot read .*train\.parquet"):
        open_source(str(tmp_path))


def test_parquet_reads_the_selected_rows_in_order(tmp_path: Path) -> None:
    first, second = list(range(25)), list(range(25, 40))
    write_parquet(tmp_path / "train-0.parquet", {"image": structs(first), "label": [v % 4 for v in first]}, group=4)
    write_parquet(tmp_path / "train-1.parquet", {"image": structs(second), "label": [v % 4 for v in second]}, group=6)
    table = open_source(str(tmp_path)).train
    chosen = table.select(np.array([39, 0, 3, 4, 24, 25, 7]))
    assert chosen.labels.tolist() == [0, 3, 0, 3, 0, 1, 3]
    assert reds(chosen) == [0, 3, 4, 7, 24, 25, 39]
    assert reds(chosen.select(np.array([1, 6]))) == [3, 39]
    assert reds(without(table, [0, 1, 2])) == list(range(3, 40, 4))


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no CIFAR-10 at {CIFAR10}")
def test_cifar10() -> None:
    source = open_source(str(CIFAR10))
    assert len(source.class_names) == 10
    assert source.class_names[:2] == ("airplane", "automobile")
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (50_000, 10_000)
    assert np.bincount(source.train.labels).tolist() == [5000] * 10
    one = stage(source.train.select(np.array([49_999])), Preprocessing(size=(32, 32), mean=(0,) * 3, std=(1,) * 3))
    assert isinstance(one.dataset, TensorImages)
    assert one.dataset.images.shape == (1, 3, 32, 32)


# Classes


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        (["cat"], (1,)),
        (["dog,cat"], (1, 2)),
        (["frog", "bird", "frog"], (0, 3)),
        ([" dog , 0 "], (0, 2)),
        (["3"], (3,)),
        ([3, "cat"], (1, 3)),
    ],
)
def test_resolve_classes(asked: list[str | int], labels: tuple[int, ...]) -> None:
    assert resolve_classes(asked, ANIMALS) == labels


def test_a_name_wins_over_an_index_and_over_commas() -> None:
    names = ("1", "0", "salt, pepper")
    assert resolve_classes(["1"], names) == (0,)
    assert resolve_classes([1], names) == (1,)
    assert resolve_classes(["salt, pepper"], names) == (2,)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["horse"], "unknown class 'horse': expected one of bird, cat, dog, frog"),
        (["4"], "class index 4 is out of range: expected 0 to 3"),
        ([-1], "class index -1 is out of range"),
        ([], "at least one class"),
        ([""], "at least one class"),
        ([" , "], "at least one class"),
        (["bird,cat,dog,frog"], "cannot forget all 4 classes"),
    ],
)
def test_resolve_classes_refuses(asked: list[str | int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_classes(asked, ANIMALS)
    with pytest.raises(InputError, match=message.replace("forget", "leave out")):
        resolve_classes(asked, ANIMALS, purpose="leave out")


@given(st.sets(st.integers(0, 3), min_size=1, max_size=3), st.data())
def test_however_classes_are_written_they_are_the_same(labels: set[int], choices: st.DataObject) -> None:
    words: list[str] = [choices.draw(st.sampled_from([str(label), ANIMALS[label]])) for label in labels]
    words = choices.draw(st.permutations(words))
    assert resolve_classes(words, ANIMALS) == tuple(sorted(labels))
    assert resolve_classes([",".join(words)], ANIMALS) == tuple(sorted(labels))


# Drawing


def test_stratified_split() -> None:
    table = table_of([0] * 10 + [1] * 20 + [2])
    first, second = stratified_split(table, 0.2, seed=3)
    assert Counter(second.labels.tolist()) == {0: 2, 1: 4}
    assert sorted([*first.rows, *second.rows]) == list(range(31))
    assert stratified_split(table, 0.2, seed=3)[1].rows.tolist() == second.rows.tolist()
    assert stratified_split(table, 0.2, seed=4)[1].rows.tolist() != second.rows.tolist()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 5))
def test_draw_takes_as_many_of_each_class(labels: list[int], per_class: int, seed: int) -> None:
    table = table_of(labels)
    drawn = draw(table, per_class=per_class, seed=seed)
    assert Counter(drawn.labels.tolist()) == {k: min(n, per_class) for k, n in Counter(labels).items()}
    assert drawn.labels.tolist() == [labels[row] for row in drawn.rows]
    assert sorted(set(drawn.rows.tolist())) == drawn.rows.tolist()
    assert draw(table, per_class=per_class, seed=seed).rows.tolist() == drawn.rows.tolist()


def test_draw_by_share_or_everything() -> None:
    table = table_of([0] * 30 + [1] * 10)
    drawn = draw(table, share=0.1, seed=0)
    assert Counter(drawn.labels.tolist()) == {0: 3, 1: 1}
    assert draw(table, share=0.1, seed=1).rows.tolist() != drawn.rows.tolist()
    assert draw(table, seed=0) is table


def test_without_and_relabel_keep_the_images() -> None:
    table = table_of([0, 1, 2, 1, 0])
    rest = without(table, [1])
    assert rest.labels.tolist() == [0, 2, 0]
    assert reds(rest) == [0, 2, 4]
    renamed = relabel(rest, [5, 9, 6])
    assert renamed.labels.tolist() == [5, 6, 5]
    assert reds(renamed) == [0, 2, 4]
    assert len(without(table, [0, 1, 2])) == 0


# Decoding


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
@pytest.mark.parametrize("preprocessing", [GREY8, RGB4])
def test_stage_gives_uint8_of_the_right_shape(mode: str, preprocessing: Preprocessing) -> None:
    table = ImageTable(
        labels=np.array([1, 0]), read=lambda rows: (Image.new(mode, (13, 9)) for _ in rows), name=lambda row: str(row)
    )
    staged = stage(table, preprocessing)
    assert isinstance(staged.dataset, TensorImages)
    assert staged.dataset.images.dtype == torch.uint8
    assert staged.dataset.images.shape == (2, preprocessing.channels, *preprocessing.size)
    assert staged.dataset.labels.tolist() == [1, 0]
    assert staged.skipped == 0


def test_decode_resizes_the_shorter_side_and_crops_the_centre() -> None:
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 200
    image = decode(Image.fromarray(wide), RGB4, "wide")
    assert image is not None
    assert image.shape == (3, 4, 4)
    assert set(image.flatten().tolist()) == {200}


def truncated(payload: bytes) -> bytes:
    return payload[: len(payload) // 2]


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("payload", [b"", b"hello", truncated(png(3)), None, "/no/such/file.png"])
def test_undecodable_image_is_named_or_skipped_and_counted(payload: Any) -> None:
    payloads = [png(1), payload, png(3)]
    table = ImageTable(
        labels=np.array([0, 1, 2]), read=lambda rows: (payloads[row] for row in rows), name=lambda row: f"photo {row}"
    )
    with pytest.raises(InputError, match=r"cannot decode photo 1 .*--skip-bad"):
        stage(table, RGB4)
    staged = stage(table, RGB4, skip_bad=True)
    assert staged.skipped == 1
    assert isinstance(staged.dataset, TensorImages)
    assert staged.dataset.labels.tolist() == [0, 2]
    assert staged.dataset.images[:, 0, 0, 0].tolist() == [1, 3]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it mends
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damaged_images_raise_input_error_alone(kind: str) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation], tags[ExifTags.Base.Make] = 6, "a camera"
    written = {"exif": tags} if kind in ("PNG", "JPEG", "WEBP") else {}
    Image.fromarray(noise).save(buffer, kind, **written)
    whole = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(400):
        damaged = whole.copy()
        where = rng.integers(0, min(len(damaged), 200), 4)
        damaged[where] = rng.integers(0, 255, 4)
        cut = int(rng.integers(1, len(damaged) + 1))
        decode(damaged.tobytes()[:cut], Preprocessing(size=(8, 8), mean=(0.5,), std=(1.0,)), kind, skip_bad=True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_put_upright(orientation: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8))
    buffer, tags = io.BytesIO(), Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    picture.save(buffer, "PNG", exif=tags)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    image = decode(buffer.getvalue(), RGB4, "photo")
    assert image is not None
    assert torch.equal(image, torch.from_numpy(np.array(upright)).permute(2, 0, 1))
    assert (orientation == 1) == (upright.tobytes() == picture.tobytes())


@pytest.mark.parametrize("streamed", [False, True])
def test_encoded_images_are_read_as_they_are_needed(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos are large before they are decoded and small afterwards: the first bounds how many are read ahead."""
    monkeypatch.setattr(data, "ENCODED_BYTES", 5 * len(png(0)))
    monkeypatch.setattr(data, "SMALL_BYTES", 0)
    read, most, done = 0, 0, 0

    def payloads(rows: Any) -> Iterator[bytes]:
        nonlocal read, most
        for row in rows:
            read += 1
            most = max(most, read - done)
            yield png(int(row))

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal done
        done += 1
        return decode(*given, **more)

    monkeypatch.setattr(data, "decode", counted)
    table = ImageTable(np.zeros(60, dtype=np.int64), payloads, str)
    if streamed:
        assert len(list(StreamedImages(table, RGB4, shuffle=False, skip_bad=False))) == 60
    else:
        assert len(stage(table, RGB4).dataset) == 60
    assert most <= (10 if streamed else 5)  # a stream decodes one chunk while it reads the next


def test_measure_statistics() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 6, 6, 3), dtype=np.uint8)
    pixels[..., 1] //= 3
    table = ImageTable(
        labels=np.zeros(50, dtype=np.int64), read=lambda rows: (pixels[row] for row in rows), name=lambda row: str(row)
    )
    measured = measure_statistics(table, (6, 6), 3)
    assert measured.source == "measured"
    np.testing.assert_allclose(measured.mean, (pixels / 255).mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(measured.std, (pixels / 255).std((0, 1, 2)), atol=1e-4)


def test_measure_statistics_of_one_colour_has_a_positive_std() -> None:
    assert min(measure_statistics(table_of([0]), (4, 4), 3).std) > 0


def test_normalize() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.5) / 0.25, (0.2 - 0.4) / 0.5, (1 - 0.3) / 0.2]
    assert normalize(images, RGB4).flatten().tolist() == pytest.approx(expected)
    assert images.flatten().tolist() == [0, 51, 255]
    ready = torch.randn(2, 3, 4, 4)
    assert normalize(ready, RGB4) is ready
    with pytest.raises(InputError, match="preprocessing"):
        normalize(images, None)
    with pytest.raises(InputError, match="expected images of 1 channels, got 3"):
        normalize(images, GREY8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (), "std": ()}, "for each channel"),
        ({"std": (1.0,)}, "for each channel"),
        ({"std": (1.0, 0.0, 1.0)}, "positive stds"),
        ({"mean": (0.5, float("nan"), 0.5)}, "finite means"),
        ({"size": (0, 8)}, "at least 1 pixel"),
    ],
)
def test_preprocessing_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing(**{"size": (8, 8), "mean": (0.5,) * 3, "std": (1.0,) * 3} | fields)


# Streams


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("starts", [None, [0, 20, 33]])
def test_stream_gives_each_sample_once_an_epoch(starts: list[int] | None) -> None:
    labels = [row % 3 for row in range(41)]
    staged = stage(table_of(labels, starts=starts), RGB4, seed=5, held=8 * 48)  # eight images of 3 x 4 x 4
    stream = staged.dataset
    assert isinstance(stream, StreamedImages)
    assert len(stream) == 41
    loader: DataLoader[Any] = DataLoader(stream, batch_size=None)

    def epoch(number: int) -> list[int]:
        stream.set_epoch(number)
        samples = [(int(image[0, 0, 0]), int(label)) for image, label in loader]
        assert sorted(samples) == list(enumerate(labels))
        return [red for red, _ in samples]

    first, second = epoch(0), epoch(1)
    assert first != second
    assert first != list(range(41))
    assert epoch(0) == first


@pytest.mark.usefixtures("decoded")
def test_stream_unshuffled_keeps_the_order() -> None:
    stream = StreamedImages(table_of([0] * 9), RGB4, shuffle=False, skip_bad=False)
    assert [int(image[0, 0, 0]) for image, _ in stream] == list(range(9))


@pytest.mark.usefixtures("decoded")
def test_stream_skips_or_names_a_bad_image() -> None:
    payloads = [png(1), b"hello", png(3)]
    table = ImageTable(
        labels=np.array([0, 1, 2]), read=lambda rows: (payloads[row] for row in rows), name=lambda row: f"photo {row}"
    )
    assert [label for _, label in StreamedImages(table, RGB4, shuffle=False, skip_bad=True)] == [0, 2]
    with pytest.raises(InputError, match="cannot decode photo 1"):
        list(StreamedImages(table, RGB4, skip_bad=False))


# Counting


class Unlisted(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError(index)
        return torch.zeros(1, 2, 2), (2, 0, 2, 2)[index]


def test_count_labels() -> None:
    images = TensorImages(torch.zeros(3, 1, 2, 2), torch.tensor([4, 1, 4]))
    assert count_labels(images) == {1: 1, 4: 2}
    assert count_labels(Unlisted()) == {0: 1, 2: 3}
    assert missing_classes({0: 1, 2: 3, 3: 0}, range(4), ANIMALS) == ["cat", "frog"]


def test_count_labels_of_a_stream_decodes_nothing() -> None:
    def read(rows: Any) -> Any:
        raise AssertionError(f"decoded {rows}")

    table = ImageTable(labels=np.array([1, 1, 0]), read=read, name=str)
    assert count_labels(StreamedImages(table, RGB4, skip_bad=False)) == {0: 1, 1: 2}


def test_images_and_labels_must_be_as_many() -> None:
    with pytest.raises(InputError, match="got 3 images and 2 labels"):
        TensorImages(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1]))


def test_hub_data_set(tmp_path: Path) -> None:
    for part, values in (("train", [10, 20, 30]), ("test", [40])):
        columns: dict[str, list[Any]] = {"img": structs(values), "label": ["cat", "dog", "cat"][: len(values)]}
        write_parquet(tmp_path / "data" / f"{part}-00000-of-00001.parquet", columns)
    source = open_source(f"hf:{tmp_path}")  # datasets takes a local folder as it takes a name on the hub
    assert source.class_names == ("cat", "dog")
    assert reds(source.train.select(np.array([0, 2]))) == [10, 30]
    assert source.test is not None
    assert source.test.labels.tolist() == [0]


def test_torchvision_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path))

    class Small:  # what CIFAR10, MNIST and their kin have in common, without the download
        classes = ("cat", "dog")

        def __init__(self, _root: Path, *, train: bool, download: bool) -> None:
            assert download
            self.values = [10, 20, 30] if train else [40]
            self.targets = [0, 1, 0][: len(self.values)]

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.open(io.BytesIO(png(self.values[index]))), self.targets[index]

    monkeypatch.setattr(torchvision.datasets, "Small", Small, raising=False)
    source = open_source("torchvision:Small")
    assert source.class_names == ("cat", "dog")
    assert reds(source.train) == [10, 20, 30]
    with pytest.raises(InputError, match="torchvision has no data set 'Nothing'"):
        open_source("torchvision:Nothing")


def test_torchvision_downloads_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    class Slow:
        inside = most = 0
        targets = (0, 1)

        def __init__(self, _root: Path, **_options: bool) -> None:
            Slow.inside += 1
            Slow.most = max(Slow.most, Slow.inside)
            time.sleep(0.05)
            Slow.inside -= 1

    monkeypatch.setattr(torchvision.datasets, "Slow", Slow, raising=False)
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path / "not" / "there"))
    with ThreadPoolExecutor(3) as threads:  # a lock of one of them keeps the others out as it does other processes
        sources = list(threads.map(open_source, ["torchvision:Slow"] * 3))
    assert [len(source.train) for source in sources] == [2, 2, 2]
    assert Slow.most == 1
    # where no lock can be made, as on a disk that is read only, data that is there is still opened
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path / "file"))
    assert len(open_source("torchvision:Slow").train) == 2


def test_a_failed_torchvision_download_is_told_and_lets_others_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    class Broken:
        def __init__(self, _root: Path, **_options: bool) -> None:
            raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets, "Broken", Broken, raising=False)
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path))
    for _ in range(2):
        with pytest.raises(InputError, match=r"cannot load torchvision:Broken into .*: File not found or corrupted"):
            open_source("torchvision:Broken")


# Holding out


def flat(labels: Sequence[int]) -> TensorImages:
    """Images whose every pixel is their number."""
    count = len(labels)
    pixels = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return TensorImages(pixels, torch.tensor(labels))


def pixels_of(dataset: Dataset[Any]) -> list[float]:
    return [float(dataset[index][0].flatten()[0]) for index in range(len(dataset))]  # type: ignore[arg-type]


def test_hold_out_is_stratified_and_disjoint() -> None:
    whole = flat([0] * 40 + [1] * 20 + [2] * 10)
    kept, held = hold_out(whole, share=0.2, most=100, seed=0)
    assert count_labels(held) == {0: 8, 1: 4, 2: 2}
    assert count_labels(kept) == {0: 32, 1: 16, 2: 8}
    assert sorted(pixels_of(kept) + pixels_of(held)) == list(range(70))
    labels = [int(held[index][1]) for index in range(14)]
    assert labels == [int(whole.labels[int(pixel)]) for pixel in pixels_of(held)]
    again = hold_out(whole, share=0.2, most=100, seed=0)
    assert pixels_of(again[1]) == pixels_of(held)
    assert pixels_of(hold_out(whole, share=0.2, most=100, seed=1)[1]) != pixels_of(held)


def test_hold_out_takes_no_more_than_asked_for() -> None:
    kept, held = hold_out(flat([0, 1] * 100), share=0.5, most=20, seed=0)
    assert count_labels(held) == {0: 10, 1: 10}
    assert count_labels(kept) == {0: 90, 1: 90}


def test_hold_out_takes_no_more_than_asked_for_of_many_classes() -> None:
    _, held = hold_out(flat(list(range(8)) * 6), share=0.1, most=4, seed=0)
    assert len(pixels_of(held)) <= 4


@pytest.mark.parametrize("streamed", [False, True])
def test_hold_out_of_more_classes_than_images_asked_for(streamed: bool) -> None:
    labels = [*list(range(20)) * 10, *range(20, 30)]  # those of one image each are too small for the share
    whole = StreamedImages(table_of(labels), RGB4, skip_bad=False) if streamed else flat(labels)
    kept, held = hold_out(whole, share=0.1, most=8, seed=0)
    counts = count_labels(held)
    assert list(counts.values()) == [1] * 8
    assert max(counts) < 20
    assert not {int(image[0, 0, 0]) for image, _ in kept} & {int(pixel) for pixel in pixels_of(held)}  # type: ignore[attr-defined]
    assert len(kept) == len(labels) - 8  # type: ignore[arg-type]
    assert count_labels(hold_out(whole, share=0.1, most=8, seed=1)[1]) != counts
    assert len(hold_out(whole, share=0.04, most=8, seed=0)[0]) == len(labels)  # type: ignore[arg-type]  # too small all


def test_a_class_too_small_to_share_loses_none() -> None:
    kept, held = hold_out(flat([0] * 50 + [1] * 4 + [2]), share=0.1, most=100, seed=0)
    assert count_labels(held) == {0: 5}
    assert count_labels(kept) == {0: 45, 1: 4, 2: 1}


def test_where_every_class_is_small_nothing_is_cut_off() -> None:
    whole = flat([0, 0, 0, 1, 1, 1, 2])
    kept, held = hold_out(whole, share=0.1, most=5, seed=0)
    assert kept is whole
    assert len(set(pixels_of(held))) == 5
    assert set(pixels_of(held)) <= set(range(7))


def test_hold_out_of_a_stream_of_ours() -> None:
    stream = StreamedImages(table_of([0] * 20 + [1] * 10), RGB4, seed=3, skip_bad=False)
    kept, held = hold_out(stream, share=0.2, most=100, seed=0)
    assert isinstance(kept, StreamedImages)
    assert count_labels(kept) == {0: 16, 1: 8}
    assert count_labels(held) == {0: 4, 1: 2}
    trained = {int(image[0, 0, 0]) for image, _ in kept}
    assert len(trained) == 24
    assert trained | {int(pixel) for pixel in pixels_of(held)} == set(range(30))
    assert kept.seed == 3


def test_hold_out_of_a_small_stream_of_ours() -> None:
    stream = StreamedImages(table_of([0, 0, 0, 1, 1]), RGB4, skip_bad=False)
    kept, held = hold_out(stream, share=0.1, most=4, seed=0)
    assert kept is stream
    assert len(set(pixels_of(held))) == 4


class Foreign(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (sample for sample in flat([0, 1, 2, 0]))  # type: ignore[attr-defined]


def test_hold_out_of_somebody_elses_stream() -> None:
    stream = Foreign()
    kept, held = hold_out(stream, share=0.1, most=3, seed=0)
    assert kept is stream
    assert pixels_of(held) == [2, 3, 0]  # from around its middle on: impressions start from the first ones
    assert count_labels(held) == {0: 2, 2: 1}


def test_labels_that_a_data_set_lists_are_those_its_samples_bear() -> None:
    class Foreign(Dataset[Any]):
        def __init__(self, **listed: Any) -> None:
            self.__dict__.update(listed)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            reads.append(index)
            return torch.zeros(1), (index + 1) % 4

    for listed in (
        {"labels": ["zero", "one", "two", "three"]},  # names of classes
        {"labels": range(10)},  # classes
        {"targets": [0, 1, 2, 3]},  # before target_transform
        {"targets": None},
        {"labels": [[1], [2], [3], [0]]},
        {},
    ):
        reads: list[int] = []
        assert labels_of(Foreign(**listed)).tolist() == [1, 2, 3, 0], listed
        assert set(reads) == {0, 1, 2, 3}
    reads = []
    assert labels_of(Foreign(targets=torch.tensor([1, 2, 3, 0]))).tolist() == [1, 2, 3, 0]
    assert set(reads) == {0, 2, 3}  # some, to see


def test_a_parquet_file_that_is_damaged_in_its_middle_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    images = [bytes([row % 251]) * 2000 for row in range(200)]
    pq.write_table(pa.table({"image": images, "label": [row % 2 for row in range(200)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[4:middle] = bytes(255 - byte for byte in content[4:middle])
    path.write_bytes(content)
    table = open_source(str(path)).train  # labels are whole
    with pytest.raises(InputError, match=r"cannot read '.*train\.parquet': .* \(if it is damaged, fetch it again\)"):
        list(table.read(np.arange(200)))
