"""Check a record against what it tells of: `expunge verify`. Each check gives one line; a line is never left out.

What can be checked with the folder alone: that no byte of record and weights changed. With the original weights, the
earlier records and the ledger: where it stands among them. With the data: that the erasure gives these weights again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expunge.errors import InputError, first_line
from expunge.journal import Journal
from expunge.provenance import RECORD, signed_names
from expunge.signing import sign_folder
from expunge.verify.again import check_measures, replay_erasure
from expunge.verify.files import check_page, check_pictures, check_sample, check_weights, look_up, read_record
from expunge.verify.finding import Elsewhere, Finding, StoppedError
from expunge.verify.place import check_chain, check_code, check_ledger, check_place, check_signature, lost_records

__all__ = ["Elsewhere", "Finding", "StoppedError", "check_ledger", "lost_records", "sign_record", "verify"]


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
        InputError: there is no record, or what was given cannot be used; a StoppedError where other checks were made.
    """
    where, journal = where or Elsewhere(), journal or Journal()
    record, findings = read_record(folder)
    if record is None:
        return findings
    try:
        with _lacking(findings):
            findings += check_weights(folder, record, where)
            findings += check_sample(folder, record)
            findings += check_pictures(folder, record)
            findings += check_page(folder, record)
            findings += check_chain(folder, record, where)
            findings += check_place(folder, record, where)
            findings += check_signature(folder, record, key)
            findings += check_code(record)
            if image is not None:
                findings.append(look_up(folder, record, image))
            if replay:
                findings += replay_erasure(folder, record, where, journal)
            if audit:
                findings.append(check_measures(folder, record, where, journal))
    except InputError as error:
        raise StoppedError(str(error), findings) from error
    return findings


@contextmanager
def _lacking(findings: list[Finding]) -> Iterator[None]:
    """Make a finding of what is raised where a record lacks a part, or has another thing in its place."""
    try:
        yield
    except InputError:  # a ValueError too
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # its own hashes are checked before: whoever made this left parts out and hashed it anew
        findings.append(Finding("record", False, f"{RECORD} lacks a part that expunge writes ({first_line(error)})"))


def sign_record(folder: Path, key: Path, password: str | None = None) -> Path:
    """Sign the record in `folder` and the weights beside it; return the signature's path.

    Raises:
        InputError: the key cannot be used, or record and weights do not match: a signature would vouch for that.
    """
    record, findings = read_record(folder)
    names: list[str] = []
    if record is not None:
        with _lacking(findings):
            findings += check_weights(folder, record, Elsewhere())
            names = signed_names(record)
    wrong = [found.sentence for found in findings if found.ok is False]
    if wrong:
        raise InputError(f"will not sign {folder}: {wrong[0]}")
    return sign_folder(folder, names, key, password)
