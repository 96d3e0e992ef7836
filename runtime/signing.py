"""`verify` checks a bundle or a plan against its manifest, and the manifest against a minisign signature.

The digests in a manifest detect accidental changes only: whoever changes a file on purpose can update its digest too. A
signature of the manifest detects that. `minisign -Sm lfx.json` writes it beside the manifest; the manifest has the
sha256 of every other file, so one signature covers the bundle.

Source: https://jedisct1.github.io/minisign/ (formats of public keys and signatures), RFC 8032 (Ed25519).
"""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from lfx.checks import file_path
from lfx.errors import ArtifactError, InputError, require
from lfx.manifest import MANIFEST, MAX_JSON_BYTES, Manifest, locate, read_limited
from lfx.runtime.artifact import unchanged
from lfx.runtime.plan import SUFFIX, PlanManifest, json_path

SIGNATURE_SUFFIX = ".minisig"
# Minisign limits the untrusted comment to 1,024 bytes and the trusted one to 8,192.
_MAX_SIGNATURE_BYTES = 16_384
_COMMENT, _TRUSTED_COMMENT = "untrusted comment: ", "trusted comment: "
_KEY_BYTES, _SIGNATURE_BYTES = 42, 74  # algorithm (2), key id (8), and the key (32) or the signature (64)
_KEY = re.compile("RW[A-Za-z0-9+/]{54}")  # base64 of 42 bytes that begin with "Ed"
# Names of the algorithm: Ed25519 over the content (minisign's legacy format), or over the content's BLAKE2b-512.
_PLAIN, _HASHED = b"Ed", b"ED"


@dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    Attributes:
        manifest: path of the manifest: lfx.json of a bundle, or the JSON of a plan.
        files: names of the files whose digests were checked; for a plan its own name, and its decoder's.
        key_id: id of the key that signed the manifest, 16 hexadecimal digits as minisign prints them. None if no key
            was given; then no signature was checked.
        trusted_comment: the signature's comment, which the signature covers too. It is not escaped: do not print it to
            a terminal as it is. None if no key was given.
    """

    manifest: Path
    files: tuple[str, ...]
    key_id: str | None = None
    trusted_comment: str | None = None


def verify(path: str | Path, key: str | Path | None = None, signature: str | Path | None = None) -> Verified:
    """Check a bundle or a plan against its manifest and, if a key is given, the manifest against its signature.

    The manifest is read once, and its signature is checked before its content is parsed. `verify` does not detect a
    file that is changed afterwards, nor an older bundle signed with the same key; compare the trusted comment for that.

    Args:
        path: a bundle, or a plan. A plan's manifest does not cover the bundle beside it, which has the tokenizer.
        key: a minisign public key: the path of its file, or its line of base64. Default: no signature is checked.
        signature: path of the signature. Default: the manifest's path with .minisig appended.
    Returns:
        The manifest, the names of the checked files, and the key's id and the trusted comment.
    Raises:
        ArtifactError: a file is missing, changed or not listed; or the key or the signature is broken; or the
            signature was made with another key or for other content.
        InputError: a signature is given without a key, or `path` cannot be looked up.
        DependencyError: a key is given and the extra [verify] is not installed.
    """
    model = file_path(path, "path")
    if key is None and signature is not None:
        raise InputError("a signature is checked with the signer's public key; give the key too")
    is_plan = model.suffix == SUFFIX and not model.is_dir()
    bundle = model if is_plan else _bundle(model)
    manifest_path = json_path(model) if is_plan else bundle / MANIFEST
    missing = f"has no {manifest_path.name}" if model.exists() else "does not exist"
    cure = "give a bundle or a plan that lfx wrote"
    content = _read_file(manifest_path, MAX_JSON_BYTES, f"{model} {missing}; {cure}", cure)
    key_id = comment = None
    if key is not None:
        default = manifest_path.with_name(manifest_path.name + SIGNATURE_SUFFIX)
        signature = file_path(signature, "signature") if signature is not None else default
        key_id, comment = check_signature(content, manifest_path, key, signature)
    if is_plan:
        plan = PlanManifest.parse(content, manifest_path)
        plan.verify(model)
        return Verified(manifest_path, tuple(file.name for file in plan.files(model)), key_id, comment)
    manifest = Manifest.parse(content, manifest_path)
    with unchanged(bundle, manifest):
        manifest.verify(bundle)
        _refuse_unlisted(bundle, manifest)
    return Verified(manifest_path, tuple(manifest.files), key_id, comment)


def _bundle(model: Path) -> Path:
    bundle, _ = locate(model)
    if bundle is None:
        raise ArtifactError(f"{model} has no manifest beside it; give the bundle that lfx export wrote")
    return bundle


def _refuse_unlisted(bundle: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for a file that the manifest does not list and that lfx might read, such as a tokenizer.

    Allowed are names that lfx never reads: hidden files (of git or the hub), Markdown pages, licences and signatures.
    """
    listed = {*manifest.files, MANIFEST}
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle)
        is_read = not (
            any(part.startswith(".") for part in name.parts)
            or path.suffix in (".md", SIGNATURE_SUFFIX)
            or path.stem == "LICENSE"
        )
        if name.as_posix() not in listed and is_read and (path.is_symlink() or not path.is_dir()):
            raise ArtifactError(f"{path} is not listed in {MANIFEST}, so its content cannot be checked; remove it")


def check_signature(content: bytes, manifest: Path, key: str | Path, path: Path) -> tuple[str, str]:
    """Check a minisign signature.

    Args:
        content: the signed bytes.
        manifest: path of the file that they were read from, for messages.
        key: as for `verify`.
        path: path of the signature.
    Returns:
        The key's id and the trusted comment.
    Raises:
        ArtifactError: the key or the signature is broken, or the signature was made with another key or for other
            content.
        DependencyError: the extra [verify] is not installed.
    """
    require("cryptography", "verify")
    algorithm, key_id, public_key = _fields(_key_line(key), _KEY_BYTES, "the key")
    if algorithm != _PLAIN:
        raise ArtifactError(f"the key is of the unknown algorithm {algorithm!r}; give a minisign public key")
    line, comment, global_line = _signature_lines(read_signature(path, manifest), path)
    algorithm, signing_id, signature = _fields(line, _SIGNATURE_BYTES, f"{path}, line 2,")
    comment_signature = _decode(global_line, len(signature), f"{path}, line 4,")
    if algorithm not in (_PLAIN, _HASHED):
        raise ArtifactError(f"{path} is of the unknown algorithm {algorithm!r}; sign with minisign")
    if signing_id != key_id:
        raise ArtifactError(
            f"{path} was made with the key {_shown_id(signing_id)}, and {_shown_id(key_id)} was given; "
            "give the signer's key"
        )
    signed = hashlib.blake2b(content).digest() if algorithm == _HASHED else content
    if not _is_signed(public_key, signature, signed):
        raise ArtifactError(
            f"{path} does not fit {manifest}: one of them was changed, or it signs another file; "
            "get both again from the signer"
        )
    if not _is_signed(public_key, comment_signature, signature + comment.encode()):
        raise ArtifactError(f"{path} has a trusted comment that was changed; get it again from the signer")
    return _shown_id(key_id), comment


def _is_signed(public_key: bytes, signature: bytes, content: bytes) -> bool:
    """Whether `signature` is an Ed25519 signature of `content` by the owner of `public_key`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _key_line(key: str | Path) -> str:
    """The base64 of a key, given as that line or as the path of a file with a comment and the line."""
    # A string that looks like a key is read as a key, even if a file has that name.
    if isinstance(key, str) and _KEY.fullmatch(key):
        return key
    path = file_path(key, "key", ArtifactError)
    missing = f"the key {path} is no file, and no line of base64 with 56 characters"
    lines = _lines(_read_file(path, _MAX_SIGNATURE_BYTES, missing, "give a minisign public key"), path)
    if len(lines) != 2 or not lines[0].startswith(_COMMENT):
        raise ArtifactError(f"{path} is no public key: give minisign's file of two lines, a comment and the key")
    return lines[1]


def read_signature(path: Path, manifest: Path) -> bytes:
    """Read a signature file.

    Raises:
        ArtifactError: it cannot be read, or has not the form of a minisign signature. The signature is not checked.
    """
    missing = f"{path} is no file, so there is no signature; sign with: minisign -Sm {manifest}"
    content = _read_file(path, _MAX_SIGNATURE_BYTES, missing, "get it again from the signer")
    _signature_lines(content, path)
    return content


def _signature_lines(content: bytes, path: Path) -> tuple[str, str, str]:
    """The lines of a signature file: the signature, the trusted comment, and the signature of both."""
    lines = _lines(content, path)
    if len(lines) != 4 or not lines[0].startswith(_COMMENT) or not lines[2].startswith(_TRUSTED_COMMENT):
        raise ArtifactError(f"{path} is no minisign signature: it must have four lines, two of them comments")
    return lines[1], lines[2].removeprefix(_TRUSTED_COMMENT), lines[3]


def _lines(content: bytes, path: Path) -> list[str]:
    """Decode a minisign file and split it into lines.

    Raises:
        ArtifactError: the file is not UTF-8, or has control characters other than tabs and line ends.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is no minisign file: {error}") from error
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if any(unicodedata.category(letter) == "Cc" and letter != "\t" for line in lines for letter in line):
        raise ArtifactError(f"{path} has control characters, which minisign never writes; get it again")
    return lines


def _fields(line: str, length: int, name: str) -> tuple[bytes, bytes, bytes]:
    """Decode a line into the algorithm, the key id, and the key or the signature."""
    data = _decode(line, length, name)
    return data[:2], data[2:10], data[10:]


def _decode(line: str, length: int, name: str) -> bytes:
    """Decode a line of base64 with exactly `length` bytes; `name` is what the message calls it."""
    try:
        data = base64.b64decode(line, validate=True)
    except ValueError as error:
        raise ArtifactError(f"{name} is no base64 ({error}); get it again from the signer") from error
    # Python ignores text after the base64 padding and unused bits; encoding again refuses both.
    if len(data) != length or base64.b64encode(data) != line.encode():
        raise ArtifactError(
            f"{name} has {len(data)} bytes of base64 where {length} are expected; get it again from the signer"
        )
    return data


def _shown_id(key_id: bytes) -> str:
    return key_id[::-1].hex().upper()  # little-endian


def _read_file(path: Path, max_bytes: int, missing: str, cure: str) -> bytes:
    """`read_limited`, for a path that may be no file.

    Args:
        missing: the message if the path is no regular file.
    Raises:
        ArtifactError: the path is no regular file, has more than `max_bytes`, or cannot be read.
    """
    try:
        is_file = path.is_file()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; {cure}") from error
    if not is_file:
        raise ArtifactError(missing)
    return read_limited(path, max_bytes, cure)
