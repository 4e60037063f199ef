"""Checks with the folder at hand: record, weights, retain sample, pictures and page are as they were written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expunge.data import decode
from expunge.errors import InputError, first_line
from expunge.files import content_hash, digest, json_text
from expunge.provenance import (
    RECORD,
    SAMPLE,
    code_digests,
    configuration_of,
    file_digest,
    part_digests,
    read_samples,
    sample_hash,
    tensors_digest,
)
from expunge.report import check_record, html_report, read_pictures, was_edited
from expunge.schema import IMAGES, PAGE, READABLE, Preprocessing
from expunge.verify.finding import Content, Elsewhere, Finding
from expunge.weights import UNLEARNED, load_weights, weights_file


def read_record(folder: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return the record and what its own hashes say; None where it cannot be checked further."""
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"expected the folder that expunge forget or audit wrote to, with a {RECORD}; got {folder}")
    text = path.read_bytes()
    try:
        record = json.loads(text.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode()  # half a character has no bytes
        newer = (
            isinstance(record, dict)
            and type(record["schema_version"]) is int
            and record["schema_version"] > READABLE[-1]
        )
        if not newer:
            check_record(record)
    except (KeyError, ValueError, RecursionError) as error:  # InputError is one
        return None, [Finding("record", False, f"{RECORD} was damaged: {first_line(error)}")]
    if newer:
        raise InputError(f"{path} is of a newer version of expunge (schema_version {record['schema_version']})")
    provenance = record.get("provenance")
    if provenance is None and "item" in record and "content_hash" not in record:
        raise InputError(f"{path} is a cell of expunge bench, which seals none: verify what forget or audit wrote")
    if not isinstance(provenance, dict) or not isinstance(record.get("content_hash"), str):
        why = "its hashes were stripped, or it was made by a version that wrote none"
        return None, [Finding("record", False, f"{RECORD} cannot be checked: {why}")]
    stated = provenance.get("parts")
    parts = stated if isinstance(stated, dict) else {}
    now = part_digests(record)
    problems = [f"{name} was edited" for name in now if name in parts and parts[name] != now[name]]
    problems += [f"{name} was added" for name in now if name not in parts]
    problems += [f"{name} is missing" for name in parts if name not in now]
    if not problems and content_hash(record) != record["content_hash"]:
        problems.append("provenance or content_hash was edited")
    if not problems and json_text(record).encode() != text:
        problems.append("its bytes are not as expunge writes them, though its content is")
    found = [Finding("record", False, f"{RECORD}: {problem}") for problem in problems]
    if not found:
        found.append(Finding("record", True, f"{RECORD} is as it was written (content {short(record)})"))
    try:
        same = provenance.get("configuration") == digest(configuration_of(record))
    except (KeyError, TypeError, AttributeError):
        same = False
    if not same:
        told = "method, settings, classes, seed, model or sample are not those the record was written with"
        found.append(Finding("configuration", False, told))
    return record, found


def short(record: Content) -> str:
    return str(record["content_hash"])[:16]


def _paths(folder: Path, record: Content, where: Elsewhere) -> list[tuple[str, Path, Mapping[str, str]]]:
    """Return the role of each model, where its weights are, and their hashes."""
    hashes = record["provenance"]["weights"]
    stated = retrained_of(folder, record)
    return [
        ("unlearned", unlearned_of(folder, record), hashes["unlearned"]),
        ("original", original_of(folder, record, where), hashes["original"]),
        *(("retrained", path, one) for path, one in stated),
    ]


def original_of(folder: Path, record: Content, where: Elsewhere) -> Path:
    """Return where the original weights are."""
    name = "original" if record["provenance"]["kind"] == "audit" else "weights"
    return where.weights or _located(folder, record["model"][name], record["provenance"]["weights"]["original"])


def unlearned_of(folder: Path, record: Content) -> Path:
    """Return where the unlearned weights are: those of an erasure beside its record."""
    if record["provenance"]["kind"] == "audit":
        return _located(folder, record["model"]["unlearned"], record["provenance"]["weights"]["unlearned"])
    return folder / UNLEARNED


def retrained_of(folder: Path, record: Content) -> list[tuple[Path, Mapping[str, str]]]:
    """Return where the weights of each retrained model are, and their hashes."""
    paths, hashes = record["model"].get("retrained"), record["provenance"]["weights"].get("retrained")
    if record["provenance"]["kind"] != "audit":
        paths, hashes = ([paths], [hashes]) if paths else ([], [])
    return [(_located(folder, path, one), one) for path, one in zip(paths, hashes, strict=True)]


def _located(folder: Path, stated: str, hashes: Mapping[str, str]) -> Path:
    """Return where weights are: as the record has it; else, where it was moved, by name in its folder or in the one
    above, if what lies there has their tensors."""
    path = Path(stated)
    if path.exists():
        return path
    for moved in (folder / path.name, folder.resolve().parent / path.name):
        try:
            if tensors_digest(load_weights(moved)[0]) == hashes["tensors"]:
                return moved
        except InputError:  # none there, or no weights
            continue
    return path


def check_weights(folder: Path, record: Content, where: Elsewhere) -> Iterator[Finding]:
    known = record["provenance"]["weights"]
    names = {known[role]["tensors"]: role for role in ("unlearned", "original")}
    for role, path, hashes in _paths(folder, record, where):
        own = path.parent == folder
        try:
            file = weights_file(path)
        except InputError:
            missing = f"{path} is gone" if own else f"the {role} weights are not at {path}: not checked"
            hint = " (name them with --weights)" if role == "original" else ""
            yield Finding("weights", False if own else None, missing + hint)
            continue
        if file_digest(file) == hashes["file"]:
            yield Finding("weights", True, f"{path.name} is the {role} model's, byte for byte")
            continue
        try:
            tensors = tensors_digest(load_weights(path)[0])
        except InputError as error:
            yield Finding("weights", False, f"{path} was damaged: {first_line(error)}")
            continue
        if tensors == hashes["tensors"]:
            told = f"{path} holds the {role} weights, but its bytes were changed (its metadata or form)"
            yield Finding("weights", not own, told)
        elif tensors in names:
            yield Finding("weights", False, f"{path} was swapped: it holds the {names[tensors]} weights")
        else:
            yield Finding("weights", False, f"{path} was changed: it does not hold the {role} weights")


def check_sample(folder: Path, record: Content) -> Iterator[Finding]:
    stated = record["provenance"]["retain_sample"]
    if stated is None:
        return
    path = folder / SAMPLE
    if not path.is_file():
        told = f"{SAMPLE} is not here: who was in the sample cannot be checked"
        yield Finding("retain sample", None, told)
        return
    try:
        found = read_samples(path)
    except InputError as error:
        yield Finding("retain sample", False, str(error))
        return
    if found.fingerprint != stated["fingerprint"] or len(found.hashes) != stated["count"]:
        told = f"{SAMPLE} was changed: its hashes are not those of the sample that was handed over"
        yield Finding("retain sample", False, told)
    elif file_digest(path) != record["provenance"]["files"][SAMPLE]:
        yield Finding("retain sample", False, f"{SAMPLE} was changed, though its hashes were not")
    else:
        told = f"{SAMPLE} holds the hashes of the {stated['count']:,} images that were handed over"
        yield Finding("retain sample", True, told)


def check_pictures(folder: Path, record: Content) -> Iterator[Finding]:
    """Check the pictures beside a record, where they were asked for; a file that is no part of it is named too."""
    stated, path = record["provenance"]["files"].get(IMAGES), folder / IMAGES
    if not path.is_file():
        if stated is not None:
            yield Finding("images", None, f"{IMAGES} is not here: the pictures cannot be checked")
    elif stated is None:
        yield Finding("images", False, f"{IMAGES} was added: the record was made without pictures")
    elif file_digest(path) != stated:
        yield Finding("images", False, f"{IMAGES} was changed: it does not hold the pictures that were kept")
    else:
        yield Finding("images", True, f"{IMAGES} is as it was written")


def check_page(folder: Path, record: Content) -> Iterator[Finding]:
    """Make the page again from the record and compare: no hash covers it."""
    path = folder / PAGE
    if not path.is_file():
        yield Finding("page", None, f"{PAGE} is not here: expunge report makes it")
        return
    try:
        # as expunge report writes it, without the pictures beside the record and with them
        pages, withheld = [html_report(record).encode()], False
        if record["provenance"]["files"].get(IMAGES) is not None:
            try:
                pages.append(html_report(record, read_pictures(folder, record)).encode())
            except InputError:  # gone, or others: check_pictures says so
                withheld = True
    except Exception as error:  # noqa: BLE001 (of any kind: check_record does not look at every part)
        yield Finding("page", False, f"{PAGE} cannot be compared: {RECORD} gives no page ({first_line(error)})")
        return
    if path.read_bytes() in pages:
        yield Finding("page", True, f"{PAGE} is what {RECORD} gives")
    elif was_edited(record):
        yield Finding("page", None, f"{PAGE} was not checked: {RECORD} was edited")
    elif record["provenance"]["code"]["source"] != code_digests()["source"]:
        yield Finding("page", None, f"{PAGE} was not checked: made by other code; expunge report makes it again")
    elif withheld:
        yield Finding("page", None, f"{PAGE} was not checked: it may show pictures, and {IMAGES} does not give them")
    else:
        yield Finding("page", False, f"{PAGE} is not what {RECORD} gives: make it again with expunge report")


def look_up(folder: Path, record: Content, image: Path) -> Finding:
    """Look an image up among the hashes of the retain sample, under every label."""
    if record["provenance"]["retain_sample"] is None:
        raise InputError("an audit has no retain sample to look an image up in")
    if not image.is_file():
        raise InputError(f"no image at {image}")
    samples = read_samples(folder / SAMPLE)
    stated = record["data"]["preprocessing"]
    preprocessing = Preprocessing(size=tuple(stated["size"]), mean=tuple(stated["mean"]), std=tuple(stated["std"]))
    pixels = decode(image, preprocessing, str(image), skip_bad=True)
    if pixels is None:
        raise InputError(f"cannot decode {image}: expected an image, as PNG or JPEG")
    known = set(samples.hashes)
    names = record["classes"]["all"]
    for label, name in enumerate(names):
        if sample_hash(samples.salt, pixels, label) in known:
            return Finding("image", True, f"{image} was in the retain sample, as {name}")
    told = f"{image} was not in the retain sample, pixel for pixel; cropped or saved anew it would not be found"
    return Finding("image", False, told)
