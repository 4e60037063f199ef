"""Sign a record and the files it vouches for, in the OpenSSF model-signing format, with a local key and no network.

The signature, `model.sig`, is a Sigstore bundle around an in-toto statement with the SHA-256 of each signed file; any
tool that knows the format checks it too: `model_signing verify key DIR --ignore_unsigned_files ...`. Needs the extra
`expunge[sign]`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge.errors import InputError, first_line

SIGNATURE = "model.sig"
PRIVATE = b"PRIVATE KEY"
"""What every private key in PEM form holds in its first line."""
CURVES = ("secp256r1", "secp384r1", "secp521r1")
NO_BUNDLE = (ValueError, KeyError, TypeError, RecursionError)
"""What reading a file raises that is no bundle."""
MEANING = (
    "A signature says that the holder of the key recorded this. It does not say that the record is right, nor that "
    "nothing of the classes is left in the weights."
)


def key_id(key: Path, password: str | None = None) -> str:
    """Return the SHA-256 of the public part of a key (PEM), private or public, as the signature names it.

    Raises:
        InputError: it is no key on one of the curves P-256, P-384 and P-521, or the password does not open it.
    """
    _library()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    content = _content(key)
    public: Any
    try:
        if PRIVATE in content:
            public = form.load_pem_private_key(content, password.encode() if password else None).public_key()
        else:
            public = form.load_pem_public_key(content)
    except TypeError as error:  # a password is needed, or was given for nothing
        raise InputError(f"cannot open the key {key}: {first_line(error)}") from error
    except Exception as error:  # of a dozen kinds: it is no key
        raise InputError(f"{key} is no key in PEM form that can be opened ({first_line(error)})") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name not in CURVES:
        raise InputError(f"expected a key on the curve P-256, P-384 or P-521 in {key}: see docs/record.md")
    pem = public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _content(key: Path) -> bytes:
    try:
        return key.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the key {key}: {error.strerror or error}") from error


def check_private(key: Path, password: str | None = None) -> str:
    """Return the id of a key that can sign; see `key_id`.

    Raises:
        InputError: it cannot.
    """
    found = key_id(key, password)
    if PRIVATE not in _content(key):
        raise InputError(f"expected the private key to sign with, got a public one: {key}")
    return found


def sign_folder(folder: Path, names: Sequence[str], key: Path, password: str | None = None) -> Path:
    """Sign the files called `names` in `folder`, and write the signature beside them; return its path.

    Raises:
        InputError: the key or a file cannot be used.
    """
    check_private(key, password)
    hashing, signing, _ = _library()
    folder = folder.resolve()  # whose name is in the signature
    others = [path.name for path in folder.iterdir() if path.name not in names]
    config = hashing.Config().set_ignored_paths(paths=others, ignore_git_paths=False)
    try:
        signer = signing.Config().set_hashing_config(config)
        signer.use_elliptic_key_signer(private_key=key, password=password.encode() if password else None)
        beside = folder / f".{SIGNATURE}.new"
        try:
            signer.sign(folder, beside)
            if missing := set(names) - {name for name, _ in _signed(beside)}:
                raise InputError(f"could not sign {', '.join(sorted(missing))} in {folder}")
            beside.replace(folder / SIGNATURE)
        finally:
            beside.unlink(missing_ok=True)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"cannot sign {folder}: {first_line(error)}") from error
    return folder / SIGNATURE


def signature_problems(folder: Path, names: Sequence[str], key: Path) -> list[str]:
    """Return a line for everything that is wrong with the signature of the files called `names`; none: it holds.

    Raises:
        InputError: the key cannot be used.
    """
    _, _, verifying = _library()
    if PRIVATE in _content(key):  # before it is opened, which may take a password
        raise InputError(f"expected the public key to verify with, got the private one: {key}")
    given = key_id(key)
    path = folder / SIGNATURE
    if not path.is_file():
        return [f"there is no {SIGNATURE}: it was stripped, or nobody signed"]
    signer = signed_by(folder)
    if signer is not None and signer != given:
        return [f"signed with another key: {signer[:16]}, not {given[:16]}"]
    config = verifying.Config().use_elliptic_key_verifier(public_key=key).set_ignore_unsigned_files(True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # of the library's warning about old bundles
            config.verify(folder.resolve(), path)
        listed = dict(_signed(path))
    except Exception as error:  # noqa: BLE001 (the library and those under it raise a dozen kinds)
        changed = _changed(folder, path) if "Signature mismatch" in str(error) else []
        return changed or [f"{SIGNATURE} is not what the key signed ({type(error).__name__})"]
    return [f"{name} is not among the signed files" for name in names if name not in listed]


def signed_by(folder: Path) -> str | None:
    """Return the id of the key that a signature says it was made with, unchecked; None where there is no telling."""
    try:
        bundle = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    except (OSError, *NO_BUNDLE):
        return None
    return hint if isinstance(hint, str) else None


def is_signature(folder: Path) -> bool:
    """Return whether the signature's file has the form of one, whoever made it."""
    try:
        _signed(folder / SIGNATURE)
    except (OSError, *NO_BUNDLE):
        return False
    return True


def _signed(path: Path) -> list[tuple[str, str]]:
    """Return name and SHA-256 of each file that a bundle names."""
    bundle = json.loads(path.read_text(encoding="utf-8"))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return [(resource["name"], resource["digest"]) for resource in statement["predicate"]["resources"]]


def _changed(folder: Path, path: Path) -> list[str]:
    """Return a line for each file that is not as it was signed."""
    found = []
    for name, expected in _signed(path):
        file = folder / name
        if not file.is_file():
            found.append(f"{name} was signed and is gone")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            found.append(f"{name} was changed since it was signed")
    return found


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise InputError(f"signatures need: pip install 'expunge[sign]' ({first_line(error)})") from error
    return hashing, signing, verifying
