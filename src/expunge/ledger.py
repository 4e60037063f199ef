"""The ledger: what was forgotten from which model, when and by which command. Append-only, each entry chained by hash.

One SQLite file, of the standard library: an embedded store whose transactions let two processes write, on every system,
and whose file is whole after a crash. Triggers refuse a change; a file can still be changed behind their back, so each
entry holds the SHA-256 of the one before it, and each record the head it was written after.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from expunge.errors import InputError
from expunge.files import canonical_json

NAME = "expunge-ledger.sqlite"
WAIT_SECONDS = 600.0  # for another process to finish its entry, which takes as long as writing its weights
TABLE = """
CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, hash TEXT NOT NULL, entry TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: its number, the SHA-256 of its text, and the text, which is canonical JSON."""

    number: int
    hash: str
    text: str

    @property
    def content(self) -> dict[str, Any]:
        """What the text says; nothing where it is no JSON object."""
        try:
            found = json.loads(self.text)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def now() -> str:
    """Return the time, UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Transaction:
    """The ledger while nobody else can write to it: its head, and a place for one more entry."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.id = connection.execute("SELECT hash FROM entries WHERE number = 0").fetchone()[0]
        self.count, self.head = connection.execute(
            "SELECT number + 1, hash FROM entries ORDER BY number DESC LIMIT 1"
        ).fetchone()

    @property
    def place(self) -> dict[str, Any]:
        """What a record keeps: which ledger (`id`, the hash of its first line), and its `count` and `head` before."""
        return {"id": self.id, "count": self.count, "head": self.head}

    def append(self, content: Mapping[str, Any]) -> None:
        _insert(self._connection, self.count, self.head, content)


@contextmanager
def writing(path: Path) -> Iterator[Transaction]:
    """Hold the ledger at `path` for one entry, made where there is none; what fails within leaves it as it was.

    Raises:
        InputError: it is no ledger, or another process holds it for more than ten minutes.
    """
    created = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"cannot write the ledger {path}: {error}") from error
    done = False
    try:
        try:
            connection.execute("BEGIN IMMEDIATE")  # from here on one process alone
            for statement in TABLE.strip().splitlines():
                connection.execute(statement)
            if connection.execute("SELECT count(*) FROM entries").fetchone()[0] == 0:
                _insert(connection, 0, "", {"ledger": secrets.token_hex(16), "time": now()})
            transaction = Transaction(connection)
        except (sqlite3.Error, TypeError) as error:
            raise InputError(f"cannot write the ledger {path}: {_why(error)}") from error
        try:
            yield transaction
        except sqlite3.Error as error:
            raise InputError(f"cannot write the ledger {path}: {_why(error)}") from error
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise InputError(f"wrote the record, but not its entry in the ledger {path}: {_why(error)}") from error
        done = True
    finally:
        if not done and connection.in_transaction:
            connection.execute("ROLLBACK")
        connection.close()
        if not done and created and path.is_file() and path.stat().st_size == 0:
            path.unlink()


def check_usable(path: Path) -> None:
    """Find out before the work whether there is a ledger at `path` that can be written to, or nothing.

    Raises:
        InputError: there is something else, or it is read-only.
    """
    if not path.exists():
        return
    read_entries(path)
    try:
        connection = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM entries WHERE 0")  # of nothing: a read-only file only refuses when written
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise InputError(f"cannot write the ledger {path}: {_why(error)}") from error


def read_entries(path: Path) -> list[Entry]:
    """Return every entry in order, as it stands, unchecked.

    Raises:
        InputError: there is no ledger at `path`, or it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"no ledger at {path}: name one with --ledger, or set EXPUNGE_LEDGER")
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=WAIT_SECONDS)
        try:
            rows = connection.execute("SELECT number, hash, entry FROM entries ORDER BY number").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise InputError(f"{path} is no ledger that can be read: {_why(error)}") from error
    return [Entry(int(number), str(found), str(text)) for number, found, text in rows]


def broken_links(entries: list[Entry]) -> list[str]:
    """Return a line for each entry that was edited and each place where one is missing."""
    found = []
    previous, expected = "", 0
    for entry in entries:
        if entry.number != expected:
            last = entry.number - 1
            found.append(f"entry {expected} is missing" if last == expected else f"{expected} to {last} are missing")
        content = entry.content
        if _hash(entry.text) != entry.hash or content.get("number") != entry.number:
            found.append(f"entry {entry.number} was edited: its hash is not that of its text")
        elif content.get("previous") != previous and entry.number == expected:
            found.append(f"entry {entry.number} does not follow the one before it: that one was replaced")
        previous, expected = entry.hash, entry.number + 1
    if not entries:
        found.append("every entry is missing, the first line too")
    return found


def missing_after(entries: list[Entry], record: Mapping[str, Any]) -> str | None:
    """Return what of the ledger `record` was written to is not in `entries`, as a line; None where nothing is missing.

    Args:
        entries: of the ledger the record names.
    """
    place = record["provenance"]["ledger"]
    by_number = {entry.number: entry for entry in entries}
    before = by_number.get(place["count"] - 1)
    if before is None or before.hash != place["head"]:
        return f"entry {place['count'] - 1}, the last when the record was written, is missing or was replaced"
    own = by_number.get(place["count"])
    if own is None or own.content.get("content_hash") != record["content_hash"]:
        return f"entry {place['count']}, of this record, is missing or is of other content"
    return None


def _insert(connection: sqlite3.Connection, number: int, previous: str, content: Mapping[str, Any]) -> None:
    text = canonical_json({**content, "number": number, "previous": previous}).strip()
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, _hash(text), text))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _why(error: Exception) -> str:
    text = str(error)
    return "another process holds it" if "locked" in text else text or type(error).__name__
