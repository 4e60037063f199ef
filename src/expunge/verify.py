"""Check a record against what it tells of: `expunge verify`. Each check gives one line; a line is never left out.

What can be checked with the folder alone: that no byte of record and weights changed. With the original weights, the
earlier records and the ledger: where it stands among them. With the data: that the erasure gives these weights again.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expunge.audits import AUDITS
from expunge.commands import RetainOptions, audit_command, erase, measure_again
from expunge.data import decode
from expunge.errors import InputError, first_line
from expunge.evaluation import environment
from expunge.files import json_text
from expunge.journal import Journal
from expunge.ledger import NAME as LEDGER
from expunge.ledger import broken_links, missing_after, read_entries
from expunge.models import parse_model
from expunge.provenance import (
    RECORD,
    SAMPLE,
    SampleHashes,
    code_digests,
    configuration_of,
    content_hash,
    digest,
    file_digest,
    part_digests,
    read_samples,
    sample_hash,
    signed_names,
    tensors_digest,
)
from expunge.report import check_record
from expunge.schema import IMAGES, Preprocessing
from expunge.signing import MEANING, SIGNATURE, sign_folder, signature_problems, signed_by
from expunge.weights import load_weights, weights_file
from expunge.workspace import DataOptions

Content = Mapping[str, Any]

REPLAY_TOLERANCE = 1 / 3
"""How far off a replay elsewhere may be, as a share of how far the erasure moved the weights (L2). Seen: 0.10 to 0.22
with another number of threads or other vector instructions, 0.51 and 0.65 with another seed; see docs/record.md."""
MEASURE_TOLERANCE = 0.02
"""How far a measure may be off elsewhere, absolute and relative: an image more or less of fifty."""
SENTENCES = {"says", "source", "evidence", "diagnosis", "not_tested", "first_line", "scope", "skipped", "needs"}
"""What is told in words, of which nothing is a measure."""
JUMPY = {"confusion", "points"}
"""What is not compared elsewhere: counts of a few images, of which the accuracies tell too, and places on a plane."""
SAME_TOLERANCE = 1e-6
"""The same on the same CPU with the same versions, where trained weights lie otherwise in memory than weights that were
read, so that sums are rounded otherwise."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str  # record, configuration, weights, retain sample, images, chain, ledger, signature, code, replay...
    ok: bool | None  # None: could not be checked, or there is nothing to check
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Where things are, when not where the record says. None: where it says."""

    weights: Path | None = None  # the original's
    data: str | None = None
    retain: str | None = None  # source of the retain sample, where it was not `data`
    model: str | None = None  # also confirms a model string that runs code
    parents: tuple[Path, ...] = ()  # folders with the records of earlier erasures
    ledger: Path | None = None
    device: str | None = None


def verify(
    folder: Path,
    *,
    key: Path | None = None,
    replay: bool = False,
    audit: bool = False,
    image: Path | None = None,
    where: Elsewhere | None = None,
    journal: Journal | None = None,
) -> list[Finding]:
    """Check the record in `folder` and what it vouches for; nothing is written.

    Args:
        key: public key that must have signed it; None: a signature is only reported.
        replay: run the erasure again and compare the weights.
        audit: measure again and compare the measures.
        image: a picture to look for among the hashes of the retain sample.
        where: what lies elsewhere than the record says.

    Raises:
        InputError: there is no record, or what was given cannot be used.
    """
    where, journal = where or Elsewhere(), journal or Journal()
    record, findings = _read(folder)
    if record is None:
        return findings
    try:
        findings += _weights(folder, record, where)
        findings += _sample(folder, record)
        findings += _pictures(folder, record)
        findings += _chain(folder, record, where)
        findings += _ledger(folder, record, where)
        findings += _signature(folder, record, key)
        findings += _code(record)
        if image is not None:
            findings.append(_image(folder, record, image))
        if replay:
            findings += _replay(folder, record, where, journal)
        if audit:
            findings.append(_measures(folder, record, where, journal))
    except (KeyError, TypeError, AttributeError) as error:
        # its own hashes are checked before: whoever made this left parts out and hashed it anew
        findings.append(Finding("record", False, f"{RECORD} lacks a part that expunge writes ({first_line(error)})"))
    return findings


# The record


def _read(folder: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return the record and what its own hashes say; None where it cannot be checked further."""
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"expected the folder that expunge forget or audit wrote to, with a {RECORD}; got {folder}")
    text = path.read_bytes()
    try:
        record = json.loads(text.decode("utf-8"))
        check_record(record)
    except (ValueError, RecursionError) as error:  # InputError is one
        return None, [Finding("record", False, f"{RECORD} was damaged: {first_line(error)}")]
    provenance = record.get("provenance")
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
        found.append(Finding("record", True, f"{RECORD} is as it was written (content {_short(record)})"))
    try:
        same = provenance.get("configuration") == digest(configuration_of(record))
    except (KeyError, AttributeError):
        same = False
    if not same:
        told = "method, settings, classes, seed, model or sample are not those the record was written with"
        found.append(Finding("configuration", False, told))
    return record, found


def _short(record: Content) -> str:
    return str(record["content_hash"])[:16]


# Weights


def _paths(folder: Path, record: Content, where: Elsewhere) -> list[tuple[str, Path, Mapping[str, str]]]:
    """Return the role of each model, where its weights are said to be, and their hashes."""
    model, hashes = record["model"], record["provenance"]["weights"]
    if record["provenance"]["kind"] == "audit":
        found = [("unlearned", Path(model["unlearned"]), hashes["unlearned"])]
        found.append(("original", where.weights or Path(model["original"]), hashes["original"]))
        pairs = zip(model["retrained"], hashes["retrained"], strict=True)
        return found + [("retrained", Path(path), one) for path, one in pairs]
    found = [("unlearned", folder / "unlearned.safetensors", hashes["unlearned"])]
    found.append(("original", where.weights or Path(model["weights"]), hashes["original"]))
    return found + ([("retrained", Path(model["retrained"]), hashes["retrained"])] if model.get("retrained") else [])


def _weights(folder: Path, record: Content, where: Elsewhere) -> Iterator[Finding]:
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


# The retain sample


def _sample(folder: Path, record: Content) -> Iterator[Finding]:
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
        told = f"{SAMPLE} was changed: its hashes are not those of the sample that was read"
        yield Finding("retain sample", False, told)
    elif file_digest(path) != record["provenance"]["files"][SAMPLE]:
        yield Finding("retain sample", False, f"{SAMPLE} was changed, though its hashes were not")
    else:
        told = f"{SAMPLE} holds the hashes of the {stated['count']:,} images that were read"
        yield Finding("retain sample", True, told)


def _pictures(folder: Path, record: Content) -> Iterator[Finding]:
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


def _image(folder: Path, record: Content, image: Path) -> Finding:
    """Look an image up among the hashes of the retain sample, under every label."""
    if record["provenance"]["retain_sample"] is None:
        raise InputError("an audit has no retain sample to look an image up in")
    if not image.is_file():
        raise InputError(f"no image at {image}")
    samples = read_samples(folder / SAMPLE)
    stated = record["data"]["preprocessing"]
    preprocessing = Preprocessing(size=tuple(stated["size"]), mean=tuple(stated["mean"]), std=tuple(stated["std"]))
    pixels = decode(image, preprocessing, str(image))
    assert pixels is not None  # skip_bad is off
    known = set(samples.hashes)
    names = record["classes"]["all"]
    for label, name in enumerate(names):
        if sample_hash(samples.salt, pixels, label) in known:
            return Finding("image", True, f"{image} was in the retain sample, as {name}")
    told = f"{image} was not in the retain sample, pixel for pixel; cropped or saved anew it would not be found"
    return Finding("image", False, told)


# Where it stands: chain, ledger, signature, code


def _chain(folder: Path, record: Content, where: Elsewhere) -> Iterator[Finding]:
    """Follow the links to the records of earlier erasures, as far as they go."""
    provenance = record["provenance"]
    is_audit = provenance["kind"] == "audit"
    model = record["model"]
    start = where.weights or Path(model["unlearned" if is_audit else "weights"])
    places = where.parents or (start if start.is_dir() else start.parent, folder.resolve().parent)
    known = _records(places)
    child, length = record, 0
    while (link := child["provenance"]["parent"]) is not None:
        if link["content_hash"] is None:
            told = "the weights were unlearned before, by a run whose record was not at hand: the chain begins here"
            yield Finding("chain", None, told)
            return
        parent = known.get(link["content_hash"])
        if parent is None:
            listed = ", ".join(map(str, places))
            told = f"the chain is cut: the earlier record {link['content_hash'][:16]} is not in {listed}, or was edited"
            yield Finding("chain", False, f"{told} (name its folder with --parents)")
            return
        made = parent["provenance"]["weights"]["unlearned"]["tensors"]
        from_it = child["provenance"]["weights"]["unlearned" if length == 0 and is_audit else "original"]["tensors"]
        if made != from_it:
            yield Finding("chain", False, f"the earlier record {link['content_hash'][:16]} is of other weights")
            return
        child, length = parent, length + 1
    if is_audit and not length:
        return
    earlier = _forgotten_before(folder, record) if not length else set()
    if earlier:
        listed = ", ".join(sorted(earlier))
        told = (
            f"the chain is cut: the weights say that {listed} was forgotten before, and the record names no earlier one"
        )
        yield Finding("chain", False, told)
    else:
        links = "1 earlier record follows" if length == 1 else f"{length} earlier records follow"
        yield Finding("chain", True, f"{links}, unbroken" if length else "the first erasure of these weights")


def _records(places: Sequence[Path]) -> dict[str, Content]:
    """Return the records in folders, and one folder below, whose content is what their hash says, by that hash."""
    found = {}
    for path in {path for place in places for pattern in (RECORD, f"*/{RECORD}") for path in place.glob(pattern)}:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["content_hash"] == content_hash(record):
                found[record["content_hash"]] = record
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def _forgotten_before(folder: Path, record: Content) -> set[str]:
    """Return the classes that the unlearned weights say they forgot and the record does not name as its own."""
    try:
        metadata = load_weights(folder / "unlearned.safetensors")[1]
    except InputError:
        return set()
    return set(metadata.forgotten) - set(record["classes"]["forget"])


def _ledger(folder: Path, record: Content, where: Elsewhere) -> Iterator[Finding]:
    place = record["provenance"]["ledger"]
    if place is None:
        yield Finding("ledger", None, "the run was entered in no ledger")
        return
    usual = [folder.resolve().parent / LEDGER, folder / LEDGER]  # the second is where expunge demo has it
    found = [path for path in usual if path.is_file()]
    path = where.ledger or next((path for path in found if _begins_with(path, place["id"])), (*found, None)[0])
    if path is None:
        yield Finding("ledger", None, f"no ledger at {usual[0]}: not checked (name it with --ledger)")
        return
    try:
        entries = read_entries(path)
    except InputError as error:
        if where.ledger is not None and not path.is_file():
            raise
        yield Finding("ledger", False, str(error))
        return
    broken = broken_links(entries)
    for line in broken:
        yield Finding("ledger", False, f"{path}: {line}")
    if entries and entries[0].hash != place["id"] and not broken:
        told = f"{path} is not the ledger the record was entered in ({str(place['id'])[:16]}): not checked"
        yield Finding("ledger", None, told)
        return
    gone = missing_after(entries, record)
    if gone is not None:
        yield Finding("ledger", False, f"{path}: {gone}")
    elif not broken:
        yield Finding("ledger", True, f"entry {place['count']} of {len(entries) - 1} in {path}, an unbroken chain")


def _begins_with(path: Path, ledger: str) -> bool:
    try:
        entries = read_entries(path)
    except InputError:
        return False
    return bool(entries) and entries[0].hash == ledger


def check_ledger(path: Path, places: Sequence[Path]) -> list[str]:
    """Return a line for everything that is wrong with a ledger: in itself, and against records in folders.

    A cut tail leaves a whole chain: only a record that was entered in it, or after it, tells.

    Args:
        places: folders with records, or with folders of records; those of other ledgers are passed over.

    Raises:
        InputError: there is no ledger at `path`, or it cannot be read.
    """
    entries = read_entries(path)
    found = broken_links(entries)
    for record in _records(places).values():
        place = record["provenance"]["ledger"]
        if place is not None and entries and place["id"] == entries[0].hash:
            gone = missing_after(entries, record)
            if gone is not None:
                found.append(f"{gone} (record {_short(record)})")
    return found


def _signature(folder: Path, record: Content, key: Path | None) -> Iterator[Finding]:
    signer = record["provenance"]["signer"]
    made = signed_by(folder)
    if key is not None:
        problems = signature_problems(folder, signed_names(record), key)
        for problem in problems:
            yield Finding("signature", False, problem)
        if not problems:
            yield Finding("signature", True, f"signed with the key {str(made)[:16]}. {MEANING}")
    elif (folder / SIGNATURE).is_file():
        if signer is not None and made != signer:
            told = f"the record was to be signed with the key {signer[:16]}, the signature is by {str(made)[:16]}"
            yield Finding("signature", False, told)
        else:
            yield Finding("signature", None, f"there is one, by the key {str(made)[:16]}: not checked without --key")
    elif signer is not None:
        yield Finding("signature", False, f"the signature was stripped: the record names the key {signer[:16]}")
    else:
        yield Finding("signature", None, "not signed: who recorded this cannot be told")


def sign_record(folder: Path, key: Path, password: str | None = None) -> Path:
    """Sign the record in `folder` and the weights beside it; return the signature's path.

    Raises:
        InputError: the key cannot be used, or record and weights do not match: a signature would vouch for that.
    """
    record, findings = _read(folder)
    if record is not None:
        findings += _weights(folder, record, Elsewhere())
    wrong = [found.sentence for found in findings if found.ok is False]
    if wrong or record is None:
        raise InputError(f"will not sign {folder}: {wrong[0]}")
    return sign_folder(folder, signed_names(record), key, password)


def _code(record: Content) -> Iterator[Finding]:
    then, now = record["provenance"]["code"], code_digests()
    if then["source"] == now["source"]:
        yield Finding("code", True, f"made by the code that is installed here, expunge {now['version']}")
        return
    commit = f", commit {then['commit'][:12]}" if then["commit"] else ""
    modified = " with changes" if then["modified"] else ""
    told = f"made by other code than is installed here: expunge {then['version']}{commit}{modified}"
    yield Finding("code", None, f"{told}; here {now['version']}")


# Doing it again


def _replay(folder: Path, record: Content, where: Elsewhere, journal: Journal) -> Iterator[Finding]:
    """Run the erasure again from the original weights and the same retain data; compare the weights."""
    provenance, data = record["provenance"], record["data"]
    if provenance["kind"] != "forget":
        raise InputError("an audit erases nothing that could be replayed: expected --audit, to measure again")
    original = _original(record, where)
    stated = tensors_digest(load_weights(original)[0])
    if stated != provenance["weights"]["original"]["tensors"]:
        yield Finding("replay", False, f"not run: {original} does not hold the original weights")
        return
    salt = read_samples(folder / SAMPLE).salt if (folder / SAMPLE).is_file() else None
    with _same_threads(record):
        done = erase(
            _data_options(record, where),
            _model(record, where),
            original,
            record["classes"]["forget"],
            retain=RetainOptions(
                per_class=data["retain_per_class"],
                share=data["retain_share"],
                source=where.retain or data["retain_source"],
                drop_forgotten=bool(data["dropped_forgotten"]),
            ),
            method=record["method"],
            preset=record["config"]["preset"],
            settings=record["config"]["settings"],
            seed=record["seed"],
            device=_device(record, where),
            salt=salt,
            journal=journal,
        )
        here = environment(done.unlearned)
    if salt is not None and done.samples.fingerprint != provenance["retain_sample"]["fingerprint"]:
        yield Finding("replay", False, _sample_differs(read_samples(folder / SAMPLE), done.samples))
    made = done.unlearned.state_dict()
    if tensors_digest(made) == provenance["weights"]["unlearned"]["tensors"]:
        yield Finding("replay", True, "the erasure gives the same weights again, bit for bit")
        return
    differing = _surroundings(record, here)
    exact = not differing and here["device"] == "cpu"
    recorded = load_weights(folder / "unlearned.safetensors")[0]
    moved = relative_distance(load_weights(original)[0], recorded)
    share = relative_distance(made, recorded) / moved if moved else math.inf
    told = f"the erasure gives other weights, {share:.2g} of the way that it moved them"
    if exact:
        yield Finding("replay", False, f"{told}; on this CPU, with these versions, it should give the same bits")
        return
    cause = f"; different here, which alone can change bits: {', '.join(differing)}" if differing else ""
    let = f"up to {REPLAY_TOLERANCE:.2g} is let pass where bits may differ"
    yield Finding("replay", share <= REPLAY_TOLERANCE, f"{told} ({let}){cause}")


def relative_distance(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """Return the L2 distance of two states over the norm of the second, of floating-point tensors alone.

    Infinite where a tensor of the second is missing in the first, or has another shape.
    """
    squares, norm = 0.0, 0.0
    for name, theirs in second.items():
        ours = first.get(name)
        if ours is None or ours.shape != theirs.shape:
            return math.inf
        if theirs.is_floating_point():
            squares += (ours.detach().cpu().double() - theirs.double()).square().sum().item()
            norm += theirs.double().square().sum().item()
    return math.sqrt(squares / norm) if norm else math.inf


def _sample_differs(then: SampleHashes, now: SampleHashes) -> str:
    before, after = Counter(then.hashes), Counter(now.hashes)
    gone, new = (before - after).total(), (after - before).total()
    return f"the retain sample is another than was read: {gone:,} images of {len(then.hashes):,} gone, {new:,} new"


def _measures(folder: Path, record: Content, where: Elsewhere, journal: Journal) -> Finding:
    """Measure again and compare every number that was measured."""
    model, is_audit = record["model"], record["provenance"]["kind"] == "audit"
    data, spec, original = _data_options(record, where), _model(record, where), _original(record, where)
    device = _device(record, where)
    with _same_threads(record):
        if is_audit:
            if record["config"].get("ensembles"):
                raise InputError("an audit with --budget large is not measured again: it trains many models for hours")
            with tempfile.TemporaryDirectory() as scratch:
                again = audit_command(
                    data, spec, original, Path(model["unlearned"]), Path(scratch),
                    classes=record["classes"]["forget"], retrained=[Path(path) for path in model["retrained"]],
                    audits=[name for name in record["audits"] if name in AUDITS],
                    training_data=record["config"]["training_data"], seed=record["seed"], device=device,
                    journal=journal,
                ).record  # fmt: skip
        else:
            again = measure_again(
                data, spec, original, folder / "unlearned.safetensors", record["classes"]["forget"],
                retrained=Path(model["retrained"]) if model["retrained"] else None, seed=record["seed"], device=device,
                journal=journal,
            )  # fmt: skip
    differing = _surroundings(record, again.environment)
    exact = not differing and again.environment["device"] == "cpu"
    same_code = record["provenance"]["code"]["source"] == code_digests()["source"]
    then = {name: record[name] for name in ("metrics", "audits", "verdict")}
    now = json.loads(json.dumps({"metrics": again.metrics, "audits": again.audits, "verdict": again.verdict}))
    comparison = Comparison(SAME_TOLERANCE if exact else MEASURE_TOLERANCE, words=exact and same_code)
    comparison.compare(then, now)
    changed, lacking = list(dict.fromkeys(comparison.changed)), comparison.lacking
    if same_code:  # it would have written them
        changed, lacking = changed + lacking, []
    without = f"; the record lacks what is measured by now: {_listed(lacking)}" if lacking else ""
    cause = f"{without}; different here: {', '.join(differing)}" if differing else without
    if not changed:
        told = f"{comparison.count:,} values measured again, as recorded to {comparison.tolerance:g}"
        return Finding("measures", True, f"{told}{cause}")
    return Finding("measures", False, f"measured again, other than recorded: {_listed(changed)}{cause}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass
class Comparison:
    """Compares what was measured with what is measured now, value by value."""

    tolerance: float  # absolute and relative
    words: bool  # compare sentences too; they quote numbers, and other code says them otherwise
    changed: list[str] = field(default_factory=list)  # names of values that differ
    lacking: list[str] = field(default_factory=list)  # names of what is measured now and was not then
    count: int = 0  # values that were compared

    def compare(self, then: Any, now: Any, path: str = "") -> None:
        """Compare a part; but no `seconds`, and elsewhere nothing that an image called otherwise moves by much."""
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            skipped = {"seconds"} | (JUMPY if self.tolerance >= MEASURE_TOLERANCE else set())
            skipped |= set() if self.words else SENTENCES
            for name in sorted({*then, *now} - skipped):
                inner = f"{path}.{name}".removeprefix(".")
                if name in then:
                    self.compare(then[name], now.get(name), inner)
                else:
                    self.lacking.append(inner)
        elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
            for old, new in zip(then, now, strict=True):
                self.compare(old, new, path)
        else:
            self.count += 1
            numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (then, now))
            close = numbers and math.isclose(then, now, rel_tol=self.tolerance, abs_tol=self.tolerance)
            if not close and then != now:
                self.changed.append(path)


# What the record says of how to do it


def _original(record: Content, where: Elsewhere) -> Path:
    model = record["model"]
    path = where.weights or Path(model["original" if record["provenance"]["kind"] == "audit" else "weights"])
    try:
        weights_file(path)
    except InputError as error:
        raise InputError(f"{error}: name the original weights with --weights") from error
    return path


def _model(record: Content, where: Elsewhere) -> str:
    """Return the model string; one that would run code is refused until the caller says it too."""
    text = str(record["model"]["spec"])
    if where.model is not None:
        return where.model
    if parse_model(text).family == "file" or "trust_remote_code" in text:
        raise InputError(f"the record names model {text!r}, whose code would be run: confirm it with --model")
    return text


def _device(record: Content, where: Elsewhere) -> str | None:
    return where.device or ("cpu" if record["environment"]["device"] == "cpu" else None)


def _data_options(record: Content, where: Elsewhere) -> DataOptions:
    options = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record["data"]["options"].items()
    }
    return DataOptions(**options | {"spec": where.data or record["data"]["source"]})


@contextmanager
def _same_threads(record: Content) -> Iterator[None]:
    """Compute with as many threads as the record did: their number decides the order of sums, and so their bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(record["environment"]["threads"])))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _surroundings(record: Content, here: Content) -> list[str]:
    """Return what differs between where the record was made and here, as far as it decides bits."""
    then = record["environment"]
    found = [f"{name} {then.get(name)} -> {here[name]}" for name in ("torch", "device", "threads", "cpu", "platform")
             if then.get(name) != here[name]]  # fmt: skip
    libraries = then.get("libraries") or {}
    for name, version in here["libraries"].items():
        if libraries.get(name) != version:
            found.append(f"{name} {libraries.get(name)} -> {version}")
    return found
