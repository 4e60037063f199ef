"""The ledger: entries in order, two writers at once, and what was edited, removed or cut off is found."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from expunge import ledger
from expunge.errors import InputError
from expunge.files import canonical_json
from expunge.ledger import Entry, broken_links, read_entries, writing
from test_cli import Trained, invoke, record_of, refuse, trained

__all__ = ["trained"]  # the fixture, for this file too


@pytest.fixture(autouse=True)
def _no_ledger_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPUNGE_LEDGER", raising=False)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    for number in range(4):
        with writing(path) as entry:
            entry.append({"classes": [str(number)]})
    return path


def tamper(path: Path, statement: str, *values: Any) -> None:
    """Change a ledger as somebody with the file can: without its triggers."""
    connection = sqlite3.connect(path)
    connection.executescript("DROP TRIGGER no_update; DROP TRIGGER no_delete;")
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def test_entries_follow_each_other(filled: Path) -> None:
    entries = read_entries(filled)
    assert [entry.number for entry in entries] == [0, 1, 2, 3, 4]
    assert broken_links(entries) == []
    for before, entry in pairwise(entries):
        assert entry.content["previous"] == before.hash
    assert entries[0].content["previous"] == ""
    assert [entry.content.get("classes") for entry in entries[1:]] == [["0"], ["1"], ["2"], ["3"]]


def test_it_is_append_only(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    for statement in ("UPDATE entries SET entry = ''", "DELETE FROM entries WHERE number = 2"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("DELETE FROM entries WHERE number = 2", "entry 2 is missing"),
        ("DELETE FROM entries WHERE number IN (1, 2)", "1 to 2 are missing"),
        ("DELETE FROM entries WHERE number = 0", "entry 0 is missing"),
        ("DELETE FROM entries", "every entry is missing, the first line too"),
        ("UPDATE entries SET entry = replace(entry, '\"1\"', '\"7\"') WHERE number = 2", "entry 2 was edited"),
        ("UPDATE entries SET entry = 'nothing' WHERE number = 2", "entry 2 was edited"),
        ("UPDATE entries SET entry = '[]' WHERE number = 2", "entry 2 was edited"),
        ("UPDATE entries SET number = 9 WHERE number = 4", "4 to 8 are missing"),
    ],
)
def test_what_was_changed_is_named(filled: Path, statement: str, told: str) -> None:
    tamper(filled, statement)
    assert any(line.startswith(told) for line in broken_links(read_entries(filled)))
    result = invoke("log", "--check", "--ledger", str(filled))
    assert result.exit_code == 1
    assert f"{filled}: {told}" in result.stdout
    assert invoke("log", "--ledger", str(filled)).exit_code == 0  # lists what is there, whatever it is


def test_an_entry_edited_and_hashed_anew(filled: Path) -> None:
    entry = read_entries(filled)[2]
    text = canonical_json(entry.content | {"classes": ["7"]}).strip()
    tamper(filled, "UPDATE entries SET entry = ?, hash = ? WHERE number = 2", text, ledger._hash(text))
    assert broken_links(read_entries(filled)) == ["entry 3 does not follow the one before it: that one was replaced"]


def test_what_fails_leaves_it_as_it_was(filled: Path, tmp_path: Path) -> None:
    before = read_entries(filled)

    def interrupted() -> None:
        with writing(filled) as entry:
            entry.append({"classes": ["9"]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_entries(filled) == before
    with pytest.raises(OSError, match="full"), writing(tmp_path / "new.sqlite"):
        raise OSError("full")
    assert not (tmp_path / "new.sqlite").exists()
    with writing(filled) as entry:
        entry.append({"classes": ["9"]})
    assert broken_links(read_entries(filled)) == []


WRITER = """
import sys
from pathlib import Path
from expunge.ledger import writing
for number in range(25):
    with writing(Path(sys.argv[1])) as entry:
        entry.append({"writer": sys.argv[2], "mine": number})
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"  # which is not there yet: both make it
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    entries = read_entries(path)
    assert broken_links(entries) == []
    assert len(entries) == 51
    for name in "ab":
        assert [one.content["mine"] for one in entries if one.content.get("writer") == name] == list(range(25))


def test_a_writer_that_dies_leaves_a_whole_ledger(filled: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from expunge.ledger import writing\n"
        "with writing(Path(sys.argv[1])) as entry: entry.append({'half': 1}); os._exit(9)"
    )
    before = read_entries(filled)
    assert subprocess.run([sys.executable, "-c", code, str(filled)], check=False).returncode == 9
    assert read_entries(filled) == before
    with writing(filled) as entry:
        entry.append({"classes": ["9"]})
    assert broken_links(read_entries(filled)) == []


def test_another_process_that_holds_it_too_long(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "WAIT_SECONDS", 0.05)
    with writing(filled), pytest.raises(InputError, match="another process holds it"), writing(filled):
        pass


# Through the commands


def words(trained: Trained, out: Path, *more: str) -> list[str]:
    return [*trained.arguments(out, "--quiet"), "--retain-per-class", "20", *more]


def test_each_run_is_entered_beside_its_folder_and_listed(tmp_path: Path, trained: Trained) -> None:
    for name in ("a", "b"):
        assert invoke(*words(trained, tmp_path / name)).exit_code in (0, 1)
    path = tmp_path / ledger.NAME
    assert len(read_entries(path)) == 3
    listed = invoke("log", "--ledger", str(path)).stdout
    record = record_of(tmp_path / "b")
    for text in (
        "forget: 3",
        "unsir, seed 0",
        f"record {record['content_hash'][:16]} in {tmp_path / 'b'}",
        record["provenance"]["weights"]["original"]["tensors"][:16],
        "forgotten: no",
        "expunge forget --weights",
    ):
        assert text in listed
    lines = [json.loads(line) for line in invoke("log", "--json", "--ledger", str(path)).stdout.splitlines()]
    assert lines[2]["content_hash"] == record["content_hash"]
    assert lines[2]["previous"] == record["provenance"]["ledger"]["head"]
    assert lines[2]["verdict"] == {name: record["checks"][name] for name in ("forgotten", "kept", "signals")}
    checked = invoke("log", "--check", "--ledger", str(path))
    assert (checked.exit_code, "an unbroken chain of 2 entries" in checked.stdout) == (0, True)

    # its last line is cut off: whole in itself, but a record was entered there
    whole = path.read_bytes()
    tamper(path, "DELETE FROM entries WHERE number = 2")
    assert broken_links(read_entries(path)) == []
    for command in (("log", "--check", "--ledger", str(path)), ("verify", str(tmp_path / "b"))):
        result = invoke(*command)
        assert result.exit_code == 1, result.output
        assert "entry 2, of this record, is missing or is of other content" in " ".join(result.stdout.split())
    assert invoke("verify", str(tmp_path / "a")).exit_code == 0  # before the cut

    path.write_bytes(whole)  # a line between is removed
    tamper(path, "DELETE FROM entries WHERE number = 1")
    assert "entry 1 is missing" in invoke("verify", str(tmp_path / "b")).stdout

    path.write_bytes(b"SQLite format 3\0" + bytes(100))
    assert "is no ledger that can be read" in invoke("verify", str(tmp_path / "b")).stdout
    other = tmp_path / "other.sqlite"
    with writing(other) as entry:
        entry.append({})
    told = invoke("verify", str(tmp_path / "b"), "--ledger", str(other))
    assert told.exit_code == 1
    assert "is not the ledger the record was entered in" in told.stdout
    path.unlink()
    other.rename(path)
    told = invoke("verify", str(tmp_path / "b"))
    assert told.exit_code == 0  # nobody said that it should be this one
    assert "is not the ledger the record was entered in" in told.stdout
    assert "was entered in another ledger" in invoke("log", "--check", "--ledger", str(path)).stdout


def test_an_entry_in_brackets_is_shown_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with writing(path) as entry:
        entry.append({"command": "forget[/x]", "classes": ["[red]"], "number": 1})
    told = invoke("log", "--ledger", str(path))
    assert told.exit_code == 0
    assert "forget[/x]: [red]" in told.stdout


def test_entries_whose_record_is_gone_or_another_are_named(tmp_path: Path, trained: Trained) -> None:
    for name in ("kept", "gone", "again"):
        assert invoke(*words(trained, tmp_path / name)).exit_code in (0, 1)
    check = ("log", "--check", "--ledger", str(tmp_path / ledger.NAME))
    assert "record of entry" not in invoke(*check).stdout
    entered = [str(entry.content["content_hash"])[:16] for entry in read_entries(tmp_path / ledger.NAME)[1:]]
    (tmp_path / "gone" / "record.json").unlink()
    assert invoke(*words(trained, tmp_path / "again", "--overwrite", "--seed", "1")).exit_code in (0, 1)
    result = invoke(*check)
    chain, *lost = (line.removeprefix(f"{tmp_path / ledger.NAME}: ") for line in result.stdout.splitlines())
    assert (result.exit_code, chain) == (0, "an unbroken chain of 4 entries")
    gone, again = (tmp_path / name / "record.json" for name in ("gone", "again"))
    assert lost == [
        f"the record of entry 2 ({entered[1]}) was not found: {gone} is not there any more",
        f"the record of entry 3 ({entered[2]}) was not found: {again} holds another one by now, or was edited",
    ]
    moved = (tmp_path / "kept").rename(tmp_path / "archive")
    assert len(invoke(*check).stdout.splitlines()) == 3  # found beside the ledger
    elsewhere = moved.rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    assert "the record of entry 1" in invoke(*check).stdout
    assert "the record of entry 1" not in invoke(*check, "--records", str(elsewhere)).stdout


def test_where_it_is_and_that_it_need_not_be(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(*words(trained, tmp_path / "a" / "out", "--no-ledger")).exit_code in (0, 1)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert record_of(tmp_path / "a" / "out")["provenance"]["ledger"] is None
    monkeypatch.setenv("EXPUNGE_LEDGER", str(tmp_path / "mine.sqlite"))
    assert invoke(*words(trained, tmp_path / "a" / "out", "--overwrite")).exit_code in (0, 1)
    assert len(read_entries(tmp_path / "mine.sqlite")) == 2
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert "mine.sqlite" in invoke("log", "--check").stdout


def test_a_ledger_that_cannot_be_used_is_refused_before_the_work(tmp_path: Path, trained: Trained) -> None:
    out, path = tmp_path / "out", tmp_path / "ledger.sqlite"
    path.write_text("a diary")
    refuse("is no ledger that can be read", out, *words(trained, out, "--ledger", str(path)))
    refuse("it is a folder", out, *words(trained, out, "--ledger", str(tmp_path)))
    refuse("got both", out, *words(trained, out, "--ledger", str(path), "--no-ledger"))
    refuse("no ledger at", None, "log", "--ledger", str(tmp_path / "none.sqlite"))
    refuse("is no ledger that can be read", None, "log", "--ledger", str(path))
    refuse("expected --records with --check", None, "log", "--ledger", str(path), "--records", str(tmp_path))


@pytest.fixture
def read_only(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger opened as one that cannot be written to is, by root too."""
    connect = sqlite3.connect

    def opened(path: Any, **options: Any) -> sqlite3.Connection:
        found: sqlite3.Connection = connect(
            path if options.get("uri") else f"file:{path}?mode=ro", **(options | {"uri": True})
        )
        return found

    monkeypatch.setattr(sqlite3, "connect", opened)
    return filled


def test_a_read_only_ledger(read_only: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write the ledger .*readonly"):
        ledger.check_usable(read_only)


def test_an_entry_that_cannot_be_written_leaves_no_files(
    tmp_path: Path, trained: Trained, read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expunge.commands.check_usable", lambda _: None)  # it became so meanwhile
    out = tmp_path / "out"
    refuse("cannot write the ledger", out, *words(trained, out, "--ledger", str(read_only)))


def test_a_copy_elsewhere_is_the_same_ledger(filled: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(filled, tmp_path / "copy.sqlite"))
    assert read_entries(copy) == read_entries(filled)
    assert Entry(1, "", "no json").content == {}
