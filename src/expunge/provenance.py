"""What ties a record to what it tells of: SHA-256 of weights, code, configuration, retain sample, and of itself.

Every hash is written as 64 hexadecimal digits. What `expunge verify` makes of them is in verify/; what they do not
say is in docs/record.md.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge import __version__
from expunge.data import Staged, StreamedImages
from expunge.errors import InputError
from expunge.files import canonical_json, content_hash, digest
from expunge.schema import IMAGES, Sample
from expunge.weights import load_weights, untied, weights_file

PACKAGE = Path(__file__).parent
RECORD, SAMPLE = "record.json", "retain_sample.json"
UNSEALED = ("provenance", "content_hash")
"""Parts of a record that `provenance.parts` does not hash, since they hold it."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Weights


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state's tensors, whatever file holds them.

    Over the names in sorted order: a line of canonical JSON [name, dtype, shape], then the elements, little-endian and
    in row-major order. Tied tensors count once, under the first of their names.
    """
    total = hashlib.sha256()
    for name, value in sorted(untied(state).items()):
        total.update(canonical_json([name, str(value.dtype).removeprefix("torch."), list(value.shape)]).encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data if len(flat) else b"")
    return total.hexdigest()


def weights_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a weights file's bytes (`file`) and of what it holds (`tensors`).

    Raises:
        InputError: it is no weights file.
    """
    return {"file": file_digest(weights_file(path)), "tensors": tensors_digest(load_weights(path)[0])}


# Code and surroundings


def code_digests() -> dict[str, Any]:
    """Return which code runs: `version`, `source` (a hash over the package's files), and of a git checkout `commit`.

    `commit` is None outside of a checkout; `modified` says whether files of the package differ from that commit.
    """
    files = sorted(
        path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix in (".py", ".jinja", ".css", ".js")
    )
    source = {path.relative_to(PACKAGE).as_posix(): file_digest(path) for path in files}
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", "__init__.py") else None
    modified = bool(_git("status", "--porcelain", "--", ".")) if commit else None
    return {"version": __version__, "source": digest(source), "commit": commit, "modified": modified}


def _git(*words: str) -> str | None:
    """Return what a git command about the package's folder says; None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


LIBRARIES = ("torchvision", "timm", "accelerate", "numpy", "pillow", "safetensors", "scikit-learn")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries beside torch that numbers and weights come out of."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# The retain sample


@dataclass(frozen=True)
class SampleHashes:
    """A keyed hash of each retained image, in sorted order, so that nothing tells which came first."""

    salt: str  # 64 hexadecimal digits, drawn for this record
    hashes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 over the hashes: which images were in the sample, in one value."""
        return digest([self.salt, *self.hashes])

    def as_json(self) -> dict[str, Any]:
        return {"algorithm": ALGORITHM, "salt": self.salt, "hashes": list(self.hashes)}


ALGORITHM = "HMAC-SHA256, key: salt; message: canonical JSON [label, channels, height, width], then uint8 pixels"


def new_salt() -> str:
    """Return a salt that nobody can guess: the one thing here that no seed decides."""
    return secrets.token_hex(32)


def sample_hash(salt: str, image: Tensor, label: int) -> str:
    """Return the keyed hash of an image (uint8, channels x height x width, as the method reads it) and its label."""
    message = canonical_json([int(label), *image.shape]).encode() + image.contiguous().numpy().tobytes()
    return hmac.digest(bytes.fromhex(salt), message, "sha256").hex()


def hash_samples(staged: Staged, *, salt: str) -> tuple[SampleHashes, Staged]:
    """Hash every image of a staged table; one that is streamed is decoded once more for it.

    Returns:
        The hashes, and what was staged, without images of a stream that turned out not to be decodable.
    """
    dataset = staged.dataset
    samples: Iterable[Sample]
    if isinstance(dataset, StreamedImages):
        samples = in_order = dataset.of(np.arange(len(dataset)), shuffle=False)
    else:
        samples = zip(dataset.images, dataset.labels.tolist(), strict=True)
    hashes = SampleHashes(salt, tuple(sorted(sample_hash(salt, image, int(label)) for image, label in samples)))
    if isinstance(dataset, StreamedImages) and in_order.bad:
        good = np.setdiff1d(np.arange(len(dataset)), sorted(in_order.bad))
        return hashes, Staged(dataset.of(good, shuffle=dataset.shuffle), staged.skipped + len(in_order.bad))
    return hashes, staged


def read_samples(path: Path) -> SampleHashes:
    """Read a `retain_sample.json`.

    Raises:
        InputError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = SampleHashes(str(content["salt"]), tuple(map(str, content["hashes"])))
        bytes.fromhex(found.salt)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no list of retain hashes ({type(error).__name__})") from error
    return found


# The chain of erasures


def parent_of(weights: Path, tensors: str, forgotten: Sequence[str]) -> dict[str, Any] | None:
    """Return the link to the record of the erasure that made `weights`; None where they were never unlearned.

    The record is looked for beside the weights. Where there is none, or it is of other weights, the link says so: its
    `content_hash` is None.

    Args:
        tensors: of the weights, as `tensors_digest` has it.
        forgotten: classes that the weights say were unlearned.
    """
    path = (weights if weights.is_dir() else weights.parent) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made = record["provenance"]["weights"]["unlearned"]["tensors"]
        if made == tensors and record["provenance"]["kind"] == "forget":
            return {"content_hash": record["content_hash"], "tensors": tensors}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"content_hash": None, "tensors": tensors} if forgotten else None


# The record itself


def configuration_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was asked for, but not where it lay: method, settings, classes, seed, model, sample, images."""
    data = record["data"]
    kept = ("retain_per_class", "retain_share", "retain_samples", "preprocessing", "options")
    return {
        **{name: record[name] for name in ("method", "config", "classes", "seed")},
        "model": record["model"].get("spec"),
        "data": {name: data.get(name) for name in kept},
    }


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the hashes over its own parts and, as `content_hash`, over all of it.

    `content_hash` is the SHA-256 of the canonical JSON of everything but itself.
    """
    # as it will be read back: tuples are lists then, and keys text
    content: dict[str, Any] = json.loads(canonical_json({k: v for k, v in record.items() if k != "content_hash"}))
    content["provenance"] = dict(content.get("provenance") or {}) | {
        "configuration": digest(configuration_of(content)),
        "parts": part_digests(content),
    }
    return content | {"content_hash": content_hash(content)}


def part_digests(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each part of a record, so that an edited one can be named."""
    return {name: digest(part) for name, part in sorted(record.items()) if name not in UNSEALED}


def signed_names(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the files beside a record that its signature covers: the record and the weights.

    The retain hashes and pictures are left to the record, which holds their hash, so that they can be withheld.
    """
    return [RECORD, *sorted(set(record["provenance"]["files"]) - {SAMPLE, IMAGES})]
