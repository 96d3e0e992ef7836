"""`verify`: a bundle or a plan against its manifest, and the manifest against a signature of minisign's.

The digest inside a manifest finds accidents: anybody can change a file and make it again. A signature finds forgeries.
`minisign -Sm lfx.json` writes it beside the manifest, which vouches for every other file by its sha256.

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
from lfx.manifest import MANIFEST, Manifest, locate
from lfx.runtime.plan import SUFFIX, PlanManifest, json_path

SIGNATURE_SUFFIX = ".minisig"
# Minisign's own limits are 1,024 bytes for one comment and 8,192 for the other.
_MOST_SIGNATURE_BYTES = 16_384
_MOST_MANIFEST_BYTES = 2**26
_COMMENT, _TRUSTED_COMMENT = "untrusted comment: ", "trusted comment: "
_KEY_BYTES, _SIGNATURE_BYTES = 42, 74  # algorithm (2), key id (8), and the key (32) or the signature (64)
_KEY = re.compile("RW[A-Za-z0-9+/]{54}")  # 42 bytes that begin with the name of the algorithm
_PLAIN, _HASHED = b"Ed", b"ED"  # of the content itself (minisign's older way), or of its BLAKE2b-512


@dataclass(frozen=True)
class Verified:
    """What `verify` has checked.

    Attributes:
        manifest: the JSON file that lists the others.
        files: names of the files that are what it says; of a plan its own name.
        key_id: of the key that signed the manifest, 16 hexadecimal digits as minisign prints them; None where no key
            was given, so that the signature was not looked at.
        trusted_comment: of the signature, which covers it; as it was written, and so not fit for a terminal. None
            where no key was given.
    """

    manifest: Path
    files: tuple[str, ...]
    key_id: str | None = None
    trusted_comment: str | None = None


def verify(path: str | Path, key: str | Path | None = None, signature: str | Path | None = None) -> Verified:
    """Check every file of a bundle, or a plan, against the manifest, and the manifest against a signature.

    The manifest is read once: the signature is checked over these bytes before anything in them is parsed. Files that
    are changed afterwards are not seen, nor is an older bundle that the same key signed: its trusted comment tells.

    Args:
        path: a bundle, or a plan. A plan does not vouch for the bundle beside it, which holds the tokenizer.
        key: minisign's public key: its file, or the line of base64 itself. None checks no signature.
        signature: the file of the signature; default: the manifest's name with .minisig, beside it.
    Raises:
        ArtifactError: a file is missing, changed or not listed, or the key or the signature is broken or another.
        InputError: a signature without a key, or a path that cannot be looked up.
        DependencyError: a key is given, and the extra [verify] is not installed.
    """
    model = file_path(path, "path")
    if key is None and signature is not None:
        raise InputError("a signature is checked with the key of who signed; give the key too")
    is_plan = model.suffix == SUFFIX and not model.is_dir()
    bundle = model if is_plan else _bundle(model)
    manifest_path = json_path(model) if is_plan else bundle / MANIFEST
    missing = f"has no {manifest_path.name}" if model.exists() else "does not exist"
    content = _read(manifest_path, _MOST_MANIFEST_BYTES, f"{model} {missing}; give a bundle or a plan that lfx wrote")
    key_id = comment = None
    if key is not None:
        place = manifest_path.with_name(manifest_path.name + SIGNATURE_SUFFIX)
        signature = file_path(signature, "signature") if signature is not None else place
        key_id, comment = check_signature(content, manifest_path, key, signature)
    if is_plan:
        PlanManifest.parse(content, manifest_path).verify(model)
        return Verified(manifest_path, (model.name,), key_id, comment)
    manifest = Manifest.parse(content, manifest_path)
    manifest.verify(bundle)
    _refuse_unlisted(bundle, manifest)
    return Verified(manifest_path, tuple(manifest.files), key_id, comment)


def _bundle(model: Path) -> Path:
    bundle, _ = locate(model)
    if bundle is None:
        raise ArtifactError(f"{model} has no manifest beside it; give the bundle that lfx export wrote")
    return bundle


def _refuse_unlisted(bundle: Path, manifest: Manifest) -> None:
    """A file that nothing vouches for may still be read: a tokenizer in a bundle that has none, say.

    Names that lfx never reads may be there: hidden ones, as git and the hub have them, pages, licences and signatures.
    """
    listed = {*manifest.files, MANIFEST}
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle)
        is_read = not (
            name.parts[0].startswith(".") or path.suffix in (".md", SIGNATURE_SUFFIX) or path.stem == "LICENSE"
        )
        if name.as_posix() not in listed and is_read and (path.is_symlink() or not path.is_dir()):
            raise ArtifactError(f"{path} is not listed in {MANIFEST}, so nothing says what it is; remove it")


def check_signature(content: bytes, manifest: Path, key: str | Path, place: Path) -> tuple[str, str]:
    """Check a signature of minisign's.

    Args:
        content: what must have been signed, and `manifest`, where it was read.
        key: as `verify` takes it. place: the file of the signature.
    Returns:
        The key's id and the trusted comment.
    Raises:
        ArtifactError: the key or the signature is broken, or they and the content do not belong together.
        DependencyError: the extra [verify] is not installed.
    """
    require("cryptography", "verify")
    algorithm, key_id, public_key = _fields(_key_line(key), _KEY_BYTES, "the key")
    if algorithm != _PLAIN:
        raise ArtifactError(f"the key is of the unknown algorithm {algorithm!r}; give a public key of minisign's")
    line, comment, global_line = _signature_lines(place, manifest)
    algorithm, signing_id, signature = _fields(line, _SIGNATURE_BYTES, f"{place}, line 2,")
    comment_signature = _decode(global_line, len(signature), f"{place}, line 4,")
    if algorithm not in (_PLAIN, _HASHED):
        raise ArtifactError(f"{place} is of the unknown algorithm {algorithm!r}; sign with minisign")
    if signing_id != key_id:
        raise ArtifactError(
            f"{place} was made with the key {_shown_id(signing_id)}, and {_shown_id(key_id)} was given; "
            "give the key of who signed"
        )
    signed = hashlib.blake2b(content).digest() if algorithm == _HASHED else content
    if not _fits(public_key, signature, signed):
        raise ArtifactError(
            f"{place} does not fit {manifest}: one of them was changed, or it signs another file; "
            "get both again from who signed"
        )
    if not _fits(public_key, comment_signature, signature + comment.encode()):
        raise ArtifactError(f"{place} has a trusted comment that was changed; get it again from who signed")
    return _shown_id(key_id), comment


def _fits(public_key: bytes, signature: bytes, content: bytes) -> bool:
    """Whether this key made this Ed25519 signature of this content."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _key_line(key: str | Path) -> str:
    """The base64 of a key that is given as itself, or as a file of a comment and the key."""
    # A line that looks like a key is one, whatever files are in this folder.
    if isinstance(key, str) and _KEY.fullmatch(key):
        return key
    path = file_path(key, "key", ArtifactError)
    text = _read(path, _MOST_SIGNATURE_BYTES, f"the key {path} is no file, and no line of base64 with 56 letters")
    lines = _lines(text, path)
    if len(lines) != 2 or not lines[0].startswith(_COMMENT):
        raise ArtifactError(f"{path} is no public key: give minisign's file of two lines, a comment and the key")
    return lines[1]


def _signature_lines(path: Path, manifest: Path) -> tuple[str, str, str]:
    """The signature, the trusted comment, and the signature of both, of a file."""
    missing = f"{path} is no file, so there is no signature; sign with: minisign -Sm {manifest}"
    lines = _lines(_read(path, _MOST_SIGNATURE_BYTES, missing), path)
    if len(lines) != 4 or not lines[0].startswith(_COMMENT) or not lines[2].startswith(_TRUSTED_COMMENT):
        raise ArtifactError(f"{path} is no signature of minisign's: it must have four lines, two of them comments")
    return lines[1], lines[2].removeprefix(_TRUSTED_COMMENT), lines[3]


def _lines(content: bytes, path: Path) -> list[str]:
    """Raises: ArtifactError: not UTF-8, or control characters other than tabs and the ends of lines."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not of minisign's: {error}") from error
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if any(unicodedata.category(letter) == "Cc" and letter != "\t" for line in lines for letter in line):
        raise ArtifactError(f"{path} has control characters, which minisign writes nowhere; get it again")
    return lines


def _fields(line: str, length: int, what: str) -> tuple[bytes, bytes, bytes]:
    """Algorithm, key id, and the key or the signature."""
    data = _decode(line, length, what)
    return data[:2], data[2:10], data[10:]


def _decode(line: str, length: int, what: str) -> bytes:
    try:
        data = base64.b64decode(line, validate=True)
    except ValueError as error:
        raise ArtifactError(f"{what} is no base64 ({error}); get it again from who signed") from error
    # One text for each value: Python passes over what follows the padding, and over bits that are left.
    if len(data) != length or base64.b64encode(data) != line.encode():
        raise ArtifactError(
            f"{what} has {len(data)} bytes of base64 where {length} belong; get it again from who signed"
        )
    return data


def _shown_id(key_id: bytes) -> str:
    return key_id[::-1].hex().upper()  # little-endian


def _read(path: Path, most_bytes: int, missing: str) -> bytes:
    """Raises: ArtifactError: no plain file, too large, or unreadable."""
    try:
        if not path.is_file():
            raise ArtifactError(missing)
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most_bytes:
        raise ArtifactError(f"{path} has more than {most_bytes:,} bytes, so it is another kind of file")
    return content
