"""Write a file beside its place and rename it there: a reader sees the old file or the new one, never half of it.

And what is written, in one form: JSON, and its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Let each writer fill a temporary file beside its path (folders are made), then rename all of them there.

    Raises:
        OSError: no permission, disk full; every path is then as it was and the temporary files are gone.
    """
    beside: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            beside[path] = Path(name)
            write(Path(name))
            _settle(Path(name))
        for path, temporary in beside.items():
            temporary.replace(path)
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)


def json_writer(content: Any) -> Callable[[Path], None]:
    """Return a writer of `content` as indented JSON; NaN and infinity are refused."""
    text = json_text(content)

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def bytes_writer(content: bytes) -> Callable[[Path], None]:
    """Return a writer of `content` as it is."""

    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def canonical_json(content: Any) -> str:
    """Return `content` in the one way it can be written: keys sorted, no blanks, UTF-8, one line feed at the end.

    Numbers are as Python writes them: the shortest decimal that reads back as the same double. NaN is refused.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text + "\n"


def digest(content: Any) -> str:
    """Return the SHA-256 of bytes, or of the canonical JSON of anything else."""
    return hashlib.sha256(content if isinstance(content, bytes) else canonical_json(content).encode()).hexdigest()


def content_hash(record: Mapping[str, Any]) -> str:
    """Return what `content_hash` of a record should be."""
    return digest({name: part for name, part in record.items() if name != "content_hash"})


def json_text(content: Any) -> str:
    """Return `content` as `json_writer` writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _settle(path: Path) -> None:
    """Bring a file to the disk, with the permissions a new file would have."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
