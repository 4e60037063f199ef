"""Signatures: a right one holds, also for the library's own program; a wrong key and a stripped one are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("model_signing", reason="needs the extra expunge[sign]")

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from expunge import signing
from expunge.signing import SIGNATURE
from test_cli import Trained, invoke, record_of, refuse, trained
from test_verify import edit, flip

__all__ = ["trained"]  # the fixture, for this file too


def write_key(path: Path, password: str | None = None) -> Path:
    """Write a new private key, and its public part beside it as `.pub`."""
    key = ec.generate_private_key(ec.SECP256R1())
    lock = form.BestAvailableEncryption(password.encode()) if password else form.NoEncryption()
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder / "mine.pem")
    write_key(folder / "other.pem")
    write_key(folder / "locked.pem", "open sesame")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, trained: Trained, keys: Path) -> Path:
    out = tmp_path_factory.mktemp("signed") / "out"
    words = trained.arguments(out, "--quiet", "--no-ledger", "--retain-per-class", "20")
    assert invoke(*words, "--sign", str(keys / "mine.pem")).exit_code in (0, 1)
    return out


@pytest.fixture
def signed(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def verified(folder: Path, *more: str) -> tuple[int, list[str]]:
    """Return the exit code, and what is said of the signature."""
    result = invoke("verify", str(folder), "--json", *more)
    found = json.loads(result.stdout)
    return result.exit_code, [one["sentence"] for one in found if one["check"] == "signature"]


def test_the_right_key(signed: Path, keys: Path) -> None:
    code, told = verified(signed, "--key", str(keys / "mine.pub"))
    assert (code, len(told)) == (0, 1)
    assert told[0].startswith(f"signed with the key {record_of(signed)['provenance']['signer'][:16]}")
    assert "does not say that the record is right, nor that nothing of the classes is left" in told[0]
    code, told = verified(signed)
    assert (code, "not checked without --key" in told[0]) == (0, True)


def test_what_anybody_may_add_take_away_or_make_again(signed: Path, keys: Path) -> None:
    (signed / "README.md").write_text("hello")
    (signed / "retain_sample.json").unlink()  # withheld; the record has its hash
    assert invoke("report", str(signed)).exit_code == 0
    assert verified(signed, "--key", str(keys / "mine.pub"))[0] == 0


def test_the_program_of_the_library_agrees(signed: Path, keys: Path) -> None:
    words = [sys.executable, "-m", "model_signing", "verify", "key", str(signed), "--ignore_unsigned_files"]
    words += ["--signature", str(signed / SIGNATURE), "--public_key", str(keys / "mine.pub")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    flip(signed / "unlearned.safetensors", -1)
    assert subprocess.run(words, capture_output=True, check=False).returncode != 0


def test_a_wrong_key(signed: Path, keys: Path) -> None:
    code, told = verified(signed, "--key", str(keys / "other.pub"))
    assert code == 1
    assert told[0].startswith("signed with another key: ")
    path = signed / SIGNATURE  # the name of the key is not signed: naming the other one does not help
    bundle = json.loads(path.read_text())
    bundle["verificationMaterial"]["publicKey"]["hint"] = signing.key_id(keys / "other.pub")
    path.write_text(json.dumps(bundle))
    code, told = verified(signed, "--key", str(keys / "other.pub"))
    assert (code, told) == (1, [f"{SIGNATURE} is not what the key signed (InvalidSignature)"])
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    path.write_text(json.dumps(bundle))
    assert verified(signed, "--key", str(keys / "other.pub"))[0] == 1


def test_a_stripped_signature(signed: Path, keys: Path) -> None:
    (signed / SIGNATURE).unlink()
    code, told = verified(signed, "--key", str(keys / "mine.pub"))
    assert (code, told) == (1, [f"there is no {SIGNATURE}: it was stripped, or nobody signed"])
    code, told = verified(signed)  # expected without a key too, for the record names one
    assert (code, told[0].startswith("the signature was stripped: the record names the key")) == (1, True)


def test_somebody_else_signs_instead(signed: Path, keys: Path) -> None:
    assert invoke("sign", str(signed), "--key", str(keys / "other.pem")).exit_code == 0
    code, told = verified(signed)
    assert (code, "the record was to be signed with the key" in told[0]) == (1, True)
    assert verified(signed, "--key", str(keys / "mine.pub"))[0] == 1


def test_a_record_edited_and_hashed_anew_is_not_what_was_signed(signed: Path, keys: Path) -> None:
    edit(signed, lambda record: record["metrics"]["after"].update(forget_accuracy=0.0), hash_anew=True)
    assert verified(signed)[0] == 0  # whole in itself: without the key nothing tells
    code, told = verified(signed, "--key", str(keys / "mine.pub"))
    assert (code, told) == (1, ["record.json was changed since it was signed"])


def test_a_signature_of_another_folder_does_not_pass(signed: Path, keys: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "record.json").write_text("{}")
    signing.sign_folder(other, ["record.json"], keys / "mine.pem")
    shutil.copy(other / SIGNATURE, signed)
    assert verified(signed, "--key", str(keys / "mine.pub"))[0] == 1
    shutil.copy(signed / "record.json", other)  # the same key signed the record, and not the weights beside it
    signing.sign_folder(other, ["record.json"], keys / "mine.pem")
    shutil.copy(other / SIGNATURE, signed)
    code, told = verified(signed, "--key", str(keys / "mine.pub"))
    assert (code, told) == (1, ["unlearned.safetensors is not among the signed files"])


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff", b'{"dsseEnvelope": {}}'])
def test_a_damaged_signature(signed: Path, keys: Path, content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    code, told = verified(signed, "--key", str(keys / "mine.pub"))
    assert (code, told[0].startswith(f"{SIGNATURE} is not what the key signed")) == (1, True)


def test_what_is_no_signature_is_said_without_a_key(signed: Path) -> None:
    path = signed / SIGNATURE
    bundle = json.loads(path.read_text())
    for content in (b"", b"{", b"[" * 100_000, b'{"dsseEnvelope": {}}', b"\xff"):
        path.write_bytes(content)
        told = [f"{SIGNATURE} is no signature: it was damaged, or is something else"]
        assert verified(signed) == (1, told), content[:20]
    bundle["verificationMaterial"]["publicKey"]["hint"] = None
    path.write_text(json.dumps(bundle))
    code, told = verified(signed)
    assert (code, told[0].endswith(", the signature is by a key that it does not name")) == (1, True)
    edit(signed, lambda record: record["provenance"].update(signer=None), hash_anew=True)
    told = ["there is one, by a key that it does not name: not checked without --key"]
    assert verified(signed) == (0, told)


def test_the_private_key_does_not_verify(signed: Path, keys: Path) -> None:
    for name in ("mine.pem", "locked.pem"):
        told = f"expected the public key to verify with, got the private one: {keys / name}"
        refuse(told, None, "verify", str(signed), "--key", str(keys / name))


def test_a_new_run_does_not_keep_an_old_signature(signed: Path, trained: Trained) -> None:
    words = trained.arguments(signed, "--quiet", "--no-ledger", "--retain-per-class", "20")
    before = (signed / SIGNATURE).read_bytes()
    refuse("is there already", None, *words)
    assert (signed / SIGNATURE).read_bytes() == before
    assert invoke(*words, "--overwrite").exit_code in (0, 1)
    assert not (signed / SIGNATURE).exists()


def test_signing_later_with_a_locked_key(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sign", str(signed), "--key", str(keys / "locked.pem")]
    (signed / SIGNATURE).unlink()
    refuse("cannot open the key", None, *words)
    monkeypatch.setenv("EXPUNGE_KEY_PASSWORD", "open door")
    refuse("is no key in PEM form that can be opened", None, *words)
    monkeypatch.setenv("EXPUNGE_KEY_PASSWORD", "open sesame")
    result = invoke(*words)
    assert (result.exit_code, "A signature says that the holder" in result.stdout) == (0, True)
    assert not (signed / f".{SIGNATURE}.new").exists()
    assert signing.signature_problems(signed, ["record.json", "unlearned.safetensors"], keys / "locked.pub") == []


def test_what_does_not_match_is_not_signed(signed: Path, keys: Path) -> None:
    before = (signed / SIGNATURE).read_bytes()
    flip(signed / "unlearned.safetensors", -1)
    refuse("will not sign", None, "sign", str(signed), "--key", str(keys / "mine.pem"))
    assert (signed / SIGNATURE).read_bytes() == before


@pytest.mark.parametrize("part", ["weights", "files", "kind"])
def test_a_record_that_lacks_a_part_is_not_signed(signed: Path, keys: Path, part: str) -> None:
    def strip(record: dict[str, Any]) -> None:
        if part == "weights":
            record["provenance"]["weights"]["unlearned"] = None
        elif part == "files":
            record["provenance"]["files"] = None
        else:
            del record["provenance"][part]

    edit(signed, strip, hash_anew=True)
    told = f"will not sign {signed}: record.json lacks a part that expunge writes ("
    refuse(told, None, "sign", str(signed), "--key", str(keys / "mine.pem"))


def test_a_key_that_cannot_sign_is_refused_before_the_work(tmp_path: Path, trained: Trained, keys: Path) -> None:
    out = tmp_path / "out"
    edwards = tmp_path / "edwards.pem"
    key = ed25519.Ed25519PrivateKey.generate()
    edwards.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    (tmp_path / "text.pem").write_text("hello")
    for path, message in (
        (keys / "mine.pub", "expected the private key to sign with, got a public one"),
        (edwards, "expected a key on the curve P-256, P-384 or P-521"),
        (tmp_path / "text.pem", "is no key in PEM form"),
        (tmp_path / "none.pem", "cannot read the key"),
    ):
        refuse(message, out, *trained.arguments(out, "--no-ledger", "--sign", str(path)))


def test_without_the_library_it_says_what_to_install(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    refuse("pip install 'expunge[sign]'", None, "verify", str(signed), "--key", str(keys / "mine.pub"))
    assert invoke("verify", str(signed)).exit_code == 0
