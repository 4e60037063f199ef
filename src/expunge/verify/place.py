"""Checks of where a record stands: among earlier records, in the ledger, under a signature, beside the code here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from expunge.errors import InputError
from expunge.files import content_hash
from expunge.ledger import NAME as LEDGER
from expunge.ledger import broken_links, missing_after, read_entries
from expunge.provenance import RECORD, code_digests, signed_names
from expunge.signing import MEANING, SIGNATURE, is_signature, signature_problems, signed_by
from expunge.verify.files import short
from expunge.verify.finding import Content, Elsewhere, Finding
from expunge.weights import UNLEARNED, load_weights


def check_chain(folder: Path, record: Content, where: Elsewhere) -> Iterator[Finding]:
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
        metadata = load_weights(folder / UNLEARNED)[1]
    except InputError:
        return set()
    return set(metadata.forgotten) - set(record["classes"]["forget"])


def check_place(folder: Path, record: Content, where: Elsewhere) -> Iterator[Finding]:
    place = record["provenance"]["ledger"]
    usual = [folder.resolve().parent / LEDGER, folder / LEDGER]  # the second is where expunge demo has it
    found = [path for path in usual if path.is_file()]
    if place is None:
        told = next(filter(None, (_entered(path, folder, record) for path in (where.ledger, *found) if path)), None)
        yield Finding("ledger", False if told else None, f"the run was entered in no ledger{told or ''}")
        return
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
        told = f"{path} is not the ledger the record was entered in ({str(place['id'])[:16]})"
        named = where.ledger is not None
        yield Finding("ledger", False if named else None, told if named else f"{told}: not checked")
        return
    gone = missing_after(entries, record)
    if gone is not None:
        yield Finding("ledger", False, f"{path}: {gone}")
    elif not broken:
        yield Finding("ledger", True, f"entry {place['count']} of {len(entries) - 1} in {path}, an unbroken chain")


def _entered(path: Path, folder: Path, record: Content) -> str | None:
    """Return what to say where a ledger has an entry of this folder and these weights all the same."""
    try:
        entries = read_entries(path)
    except InputError:
        return None
    made = record["provenance"]["weights"]["unlearned"]["tensors"]
    for entry in reversed(entries[1:]):
        name = Path(str(entry.content.get("record"))).name  # a folder may have been moved, with what is around it
        if entry.content.get("unlearned") == made and name == folder.resolve().name:
            return f", says the record, but entry {entry.number} of {path} is of this folder and these weights"
    return None


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
                found.append(f"{gone} (record {short(record)})")
    return found


def lost_records(path: Path, places: Sequence[Path]) -> list[str]:
    """Return a line for each entry of a ledger whose record is no longer where it was written, nor in folders.

    And for each record there of another ledger, in whose place this one may have been put. That breaks no chain: a
    record may have been moved, withheld or replaced by a later run.

    Args:
        places: folders with records, or with folders of records.

    Raises:
        InputError: there is no ledger at `path`, or it cannot be read.
    """
    known, found = _records(places), []
    entries = read_entries(path)
    for record in known.values():
        place = record["provenance"]["ledger"]
        if place is not None and entries and place["id"] != entries[0].hash:
            found.append(f"the record {short(record)} was entered in another ledger ({str(place['id'])[:16]})")
    for entry in entries[1:]:
        made, folder = entry.content.get("content_hash"), entry.content.get("record")
        if (
            not isinstance(made, str)
            or not isinstance(folder, str)
            or made in known
            or made in _records([Path(folder)])
        ):
            continue
        there = Path(folder) / RECORD
        why = "holds another one by now, or was edited" if there.is_file() else "is not there any more"
        found.append(f"the record of entry {entry.number} ({made[:16]}) was not found: {there} {why}")
    return found


def check_signature(folder: Path, record: Content, key: Path | None) -> Iterator[Finding]:
    signer = record["provenance"]["signer"]
    made = signed_by(folder)
    by = f"the key {made[:16]}" if made is not None else "a key that it does not name"
    if key is not None:
        problems = signature_problems(folder, signed_names(record), key)
        for problem in problems:
            yield Finding("signature", False, problem)
        if not problems:
            yield Finding("signature", True, f"signed with the key {str(made)[:16]}. {MEANING}")
    elif (folder / SIGNATURE).is_file():
        if not is_signature(folder):
            yield Finding("signature", False, f"{SIGNATURE} is no signature: it was damaged, or is something else")
        elif signer is not None and made != signer:
            told = f"the record was to be signed with the key {signer[:16]}, the signature is by {by}"
            yield Finding("signature", False, told)
        else:
            yield Finding("signature", None, f"there is one, by {by}: not checked without --key")
    elif signer is not None:
        yield Finding("signature", False, f"the signature was stripped: the record names the key {signer[:16]}")
    else:
        yield Finding("signature", None, "not signed: who recorded this cannot be told")


def check_code(record: Content) -> Iterator[Finding]:
    then, now = record["provenance"]["code"], code_digests()
    if then["source"] == now["source"]:
        yield Finding("code", True, f"made by the code that is installed here, expunge {now['version']}")
        return
    commit = f", commit {then['commit'][:12]}" if then["commit"] else ""
    modified = " with changes" if then["modified"] else ""
    told = f"made by other code than is installed here: expunge {then['version']}{commit}{modified}"
    yield Finding("code", None, f"{told}; here {now['version']}")
