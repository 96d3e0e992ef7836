"""`verify`: files against the manifest, and the manifest against a signature in minisign's format."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lfx.cli.inspect import checked_manifest
from lfx.errors import ArtifactError, InputError, LfxError
from lfx.manifest import MANIFEST, MODEL, Manifest
from lfx.runtime import verify
from lfx.runtime.plan import PlanManifest, json_path
from lfx.runtime.profile import Profile, Range
from lfx.runtime.signing import check_signature
from tests.conftest import MakeBundle

COMMENT = "timestamp:1\tfile:lfx.json"
# Made with minisign 0.11; the second signature with -l, in the legacy format.
REAL = Path(__file__).parent / "minisign"


@dataclass(frozen=True)
class Signer:
    """A key pair that signs in minisign's format."""

    key: Ed25519PrivateKey
    key_id: bytes = bytes(range(8))

    def public(self) -> str:
        """The public key as a line of base64."""
        return base64.b64encode(b"Ed" + self.key_id + self.key.public_key().public_bytes_raw()).decode()

    def sign(self, content: bytes, algorithm: bytes = b"ED", comment: str = COMMENT) -> str:
        """The text of a signature file."""
        signature = self.key.sign(hashlib.blake2b(content).digest() if algorithm == b"ED" else content)
        line = base64.b64encode(algorithm + self.key_id + signature).decode()
        both = base64.b64encode(self.key.sign(signature + comment.encode())).decode()
        return f"untrusted comment: mine\n{line}\ntrusted comment: {comment}\n{both}\n"


SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)))
OTHER = Signer(Ed25519PrivateKey.from_private_bytes(bytes([1] * 32)), bytes(8))
# Another key with the id of the first.
NAMESAKE = replace(OTHER, key_id=SIGNER.key_id)
CONTENT = b'{"a": 1}\n'


@pytest.fixture
def signed(bundle: MakeBundle, tmp_path: Path) -> Path:
    """A bundle whose manifest is signed."""
    folder = Path(shutil.copytree(bundle(), tmp_path / "signed"))
    (folder / f"{MANIFEST}.minisig").write_text(SIGNER.sign((folder / MANIFEST).read_bytes()))
    return folder


def test_every_file_of_a_bundle_is_checked_without_a_key(bundle: MakeBundle) -> None:
    result = verify(bundle())
    assert result.manifest == bundle() / MANIFEST
    assert set(result.files) == {path.name for path in bundle().iterdir()} - {MANIFEST}
    assert (result.key_id, result.trusted_comment) == (None, None)
    assert verify(bundle() / MODEL) == result


def test_a_signed_bundle_has_the_key_id_and_the_trusted_comment(signed: Path, tmp_path: Path) -> None:
    result = verify(signed, SIGNER.public())
    assert (result.key_id, result.trusted_comment) == ("0706050403020100", COMMENT)
    (tmp_path / "me.pub").write_text(f"untrusted comment: my key\n{SIGNER.public()}\n")
    assert verify(signed, tmp_path / "me.pub") == verify(str(signed), str(tmp_path / "me.pub")) == result


def test_the_signature_may_have_any_path(signed: Path, tmp_path: Path) -> None:
    elsewhere = (signed / f"{MANIFEST}.minisig").rename(tmp_path / "elsewhere")
    assert verify(signed, SIGNER.public(), elsewhere).key_id is not None
    with pytest.raises(ArtifactError, match=r"minisig is no file.* minisign -Sm .*lfx\.json"):
        verify(signed, SIGNER.public())


def test_a_forged_bundle_with_a_correct_digest_is_refused(signed: Path) -> None:
    with (signed / "config.json").open("a") as file:
        file.write(" ")
    Manifest.read(signed).write(signed)  # lists the signature too, which has no effect
    with pytest.raises(ArtifactError, match="does not fit"):
        verify(signed, SIGNER.public())


def test_the_manifest_is_not_parsed_before_its_signature_is_checked(signed: Path) -> None:
    (signed / MANIFEST).write_text("no JSON")
    with pytest.raises(ArtifactError, match="does not fit"):
        verify(signed, SIGNER.public())


def test_the_verified_bytes_are_the_bytes_that_are_parsed(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest and a file are replaced right after the signature was checked."""

    def check_and_exchange(*arguments: object) -> tuple[str, str]:
        result = check_signature(*arguments)  # type: ignore[arg-type]
        (signed / "config.json").write_text("{}")
        Manifest.read(signed).write(signed)
        return result

    monkeypatch.setattr("lfx.runtime.signing.check_signature", check_and_exchange)
    with pytest.raises(ArtifactError, match="signed was replaced or changed while it was read"):
        verify(signed, SIGNER.public())


def test_a_bundle_that_is_replaced_while_it_is_verified_is_not_called_changed(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `lfx export` replaces it: with another manifest, and other files."""
    newer = shutil.copytree(signed, tmp_path / "newer")
    (newer / "config.json").write_text("{}")
    Manifest.read(newer).write(newer)
    check = Manifest.verify

    def replace_and_check(manifest: Manifest, bundle: Path) -> dict[str, Path]:
        signed.rename(tmp_path / "older")
        newer.rename(signed)
        return check(manifest, bundle)

    monkeypatch.setattr(Manifest, "verify", replace_and_check)
    for read in (verify, checked_manifest):
        with pytest.raises(ArtifactError, match="signed was replaced or changed while it was read; run it again"):
            read(signed)
        signed.rename(newer)
        (tmp_path / "older").rename(signed)


def test_a_changed_file_of_a_signed_bundle_is_refused(signed: Path) -> None:
    data = bytearray((signed / MODEL).read_bytes())
    data[100] ^= 1
    (signed / MODEL).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx was changed"):
        verify(signed, SIGNER.public())


@pytest.mark.parametrize("name", ["vocab.json", "model.onnx.more", "sub/tokenizer.json", "README.md/config.json"])
def test_a_file_that_the_manifest_does_not_list_is_refused(name: str, signed: Path) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("{}")
    with pytest.raises(ArtifactError, match=r"is not listed in lfx\.json.* remove it"):
        verify(signed, SIGNER.public())


def test_a_link_that_the_manifest_does_not_list_is_refused(signed: Path, tmp_path: Path) -> None:
    (signed / "more").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="more is not listed"):
        verify(signed)


@pytest.mark.parametrize(
    "name", [".gitattributes", ".git/config", "onnx/.DS_Store", "README.md", "LICENSE", "LICENSE.txt", "old.minisig"]
)
def test_a_file_that_lfx_never_reads_is_allowed(name: str, signed: Path) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("x")
    assert verify(signed, SIGNER.public()).key_id is not None


def test_a_plan_is_signed_by_its_json(bundle: MakeBundle, tmp_path: Path) -> None:
    plan = tmp_path / "m.plan"
    plan.write_bytes(b"plan")
    size = Range(1, 1, 8)
    manifest = PlanManifest(
        signature=Manifest.read(bundle()).signature,
        flavor="tensorrt",
        tensorrt_version="10.0",
        target="sm89",
        profiles=(Profile(size, size),),
        plugin_version=None,
        attention_nodes=2,
        plugin_layers=0,
        bundle={"name": "x", "sha256": "0" * 64},
        source={},
        quantization={},
        options={},
        versions={},
        conversion={},
        plan={"sha256": hashlib.sha256(b"plan").hexdigest(), "bytes": 4},
    )
    manifest.write(plan)
    Path(f"{json_path(plan)}.minisig").write_text(SIGNER.sign(json_path(plan).read_bytes()))
    result = verify(plan, SIGNER.public())
    assert (result.manifest, result.files, result.trusted_comment) == (json_path(plan), ("m.plan",), COMMENT)
    plan.write_bytes(b"nalp")
    with pytest.raises(ArtifactError, match="was changed after the build"):
        verify(plan, SIGNER.public())


@pytest.mark.parametrize(("name", "comment"), [("signed.json", "release 1, für alle"), ("legacy", None)])
def test_signatures_of_the_real_minisign_are_verified(name: str, comment: str | None) -> None:
    content = (REAL / "signed.json").read_bytes()
    result = check_signature(content, REAL / "signed.json", REAL / "minisign.pub", REAL / f"{name}.minisig")
    assert result == ("81848B69320E3F34", comment or "timestamp:1795546612\tfile:signed.json")
    with pytest.raises(ArtifactError, match="does not fit"):
        check_signature(content + b" ", REAL / "signed.json", REAL / "minisign.pub", REAL / f"{name}.minisig")


def _check(signature: str | bytes, tmp_path: Path, key: str | Path | None = None) -> tuple[str, str]:
    (tmp_path / "s.minisig").write_bytes(signature if isinstance(signature, bytes) else signature.encode())
    return check_signature(CONTENT, Path("m.json"), key or SIGNER.public(), tmp_path / "s.minisig")


def test_both_algorithms_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    for text in (SIGNER.sign(CONTENT), SIGNER.sign(CONTENT, b"Ed"), SIGNER.sign(CONTENT).replace("\n", "\r\n")):
        assert _check(text, tmp_path) == ("0706050403020100", COMMENT)
    assert _check(SIGNER.sign(CONTENT).removesuffix("\n"), tmp_path)[1] == COMMENT


GOOD = SIGNER.sign(CONTENT)
LINES = GOOD.splitlines()


def _with_line(number: int, line: str) -> str:
    return "\n".join([*LINES[:number], line, *LINES[number + 1 :]]) + "\n"


SIGNATURES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "must have four lines"),
    "cut": ("\n".join(LINES[:3]), "must have four lines"),
    "cut in a line": (GOOD[:-10], r"line 4, .*base64"),
    "trailing line": (f"{GOOD}more\n", "must have four lines"),
    "trailing empty line": (f"{GOOD}\n", "must have four lines"),
    "no first comment": (_with_line(0, "mine"), "two of them comments"),
    "no trusted comment": (_with_line(2, "comment: x"), "two of them comments"),
    "not base64": (_with_line(1, "RU*" + LINES[1][3:]), "line 2, is no base64"),
    "not ASCII": (_with_line(1, "RUé" + LINES[1][3:]), "line 2, is no base64"),
    "too short": (_with_line(1, base64.b64encode(b"ED" + bytes(71)).decode()), "73 bytes .* where 74 are expected"),
    "too long": (_with_line(1, base64.b64encode(b"ED" + bytes(73)).decode()), "75 bytes .* where 74 are expected"),
    "data after the padding": (_with_line(1, LINES[1] + "AAAA"), "line 2,"),
    "left-over bits": (_with_line(1, LINES[1][:-2] + chr(ord(LINES[1][-2]) + 1) + "="), "line 2,"),
    "comment's signature too short": (_with_line(3, base64.b64encode(bytes(63)).decode()), "line 4, has 63 bytes"),
    "unknown algorithm": (SIGNER.sign(CONTENT, b"EX"), "unknown algorithm b'EX'"),
    "another key": (OTHER.sign(CONTENT), "made with the key 0000000000000000, and 0706050403020100 was given"),
    "another key with this id": (NAMESAKE.sign(CONTENT), "does not fit m.json"),
    "another file": (SIGNER.sign(CONTENT + b"!"), "does not fit m.json"),
    "hashed said to be plain": (
        _with_line(1, base64.b64encode(b"Ed" + base64.b64decode(LINES[1])[2:]).decode()),
        "fit",
    ),
    "comment changed": (_with_line(2, LINES[2] + "!"), "trusted comment that was changed"),
    "control characters": (SIGNER.sign(CONTENT, comment="\x1b[31mred"), "control characters"),
    "C1 characters": (SIGNER.sign(CONTENT, comment="\x9b31mred"), "control characters"),
    "a line end in the comment": (SIGNER.sign(CONTENT, comment="a\rb"), "control characters"),
    "not UTF-8": (GOOD.encode().replace(b"mine", b"\xff"), "is no minisign file"),
    "UTF-16": (GOOD.encode("utf-16"), "is no minisign file"),
    "huge": (b"x" * 20_000, "more than 16,384 bytes"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_broken_signature_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, message = SIGNATURES[name]
    with pytest.raises(ArtifactError, match=message) as error:
        _check(text, tmp_path)
    assert "\n" not in str(error.value)


def _file(content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "key").write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / "key"

    return write


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


HEAD = "untrusted comment: x\n"
KEYS: dict[str, tuple[Callable[[Path], str | Path], str]] = {
    "no such file": (lambda folder: str(folder / "nowhere"), "is no file, and no line of base64"),
    "a folder": (lambda folder: folder, "is no file"),
    "a pipe": (_pipe, "is no file"),
    "a long name": (lambda folder: "x" * 5000, "cannot be opened"),
    "a line that is too short": (lambda folder: SIGNER.public()[:-1], "is no file, and no line of base64"),
    "the key alone in a file": (_file(SIGNER.public()), "two lines"),
    "empty": (_file(""), "two lines"),
    "more lines": (_file(f"{HEAD}{SIGNER.public()}\n{SIGNER.public()}\n"), "two lines"),
    "a signature": (_file(GOOD), "two lines"),
    "not base64": (_file(f"{HEAD}RW {SIGNER.public()[3:]}"), "the key is no base64"),
    "a secret key": (_file(HEAD + base64.b64encode(b"Ed" + bytes(156)).decode()), "158 bytes .* where 42 are expected"),
    "trailing data": (_file(f"{HEAD}{SIGNER.public()}AAAA"), "45 bytes .* where 42 are expected"),
    "unknown algorithm": (_file(HEAD + base64.b64encode(b"ED" + bytes(40)).decode()), "unknown algorithm b'ED'"),
    "control characters": (_file(f"{HEAD[:-1]}\x07\n{SIGNER.public()}"), "control characters"),
    "huge": (_file(HEAD + "A" * 20_000), "more than 16,384 bytes"),
    "no point of the curve": (lambda folder: base64.b64encode(b"Ed" + bytes(range(8)) + b"\x02" * 32).decode(), "fit"),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_broken_key_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, message = KEYS[name]
    with pytest.raises(ArtifactError, match=message) as error:
        _check(GOOD, tmp_path, make(tmp_path))
    assert "\n" not in str(error.value)


def test_a_key_given_as_text_is_not_read_from_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key = next(k for k in (replace(SIGNER, key_id=bytes([i] * 8)).public() for i in range(1, 99)) if "/" not in k)
    Path(key).write_text(f"untrusted comment: x\n{OTHER.public()}\n")
    with pytest.raises(ArtifactError, match="made with the key 0000000000000000, and"):
        _check(OTHER.sign(CONTENT), tmp_path, key)


@pytest.mark.parametrize(
    ("arguments", "error_type", "message"),
    [
        ((5,), InputError, "path is 5; give a path"),
        (("nowhere",), ArtifactError, "nowhere does not exist"),
        (("nowhere.plan",), ArtifactError, "nowhere.plan does not exist"),
        ((".", None, "x"), InputError, "give the key too"),
        ((".", 5), ArtifactError, "has no lfx.json"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    arguments: tuple[object, ...],
    error_type: type[LfxError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error_type, match=message):
        verify(*arguments)  # type: ignore[arg-type]


def test_a_manifest_of_gigabytes_is_not_read(signed: Path) -> None:
    os.truncate(signed / MANIFEST, 2**33)  # a hole
    with pytest.raises(ArtifactError, match="more than 64,000,000 bytes"):
        verify(signed, SIGNER.public())
