"""Opens a bundle or a single ONNX file: checks its files and its signature before a backend reads it.

All backends have the same rule for links. A file that a bundle's manifest lists may be a symbolic link, as in hub
caches, DVC and git-annex: it is resolved once, and the resolved file is both hashed and loaded. Folders inside a bundle
must not be links. The weights of a single ONNX file, which no manifest lists, must be in its own folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import copyfile

from lfx.checks import parse_json, shown
from lfx.errors import ArtifactError
from lfx.files import link_or_copy, temporary_folder
from lfx.manifest import MANIFEST, Manifest, locate
from lfx.onnx_file import read_header
from lfx.signature import Signature


@dataclass(frozen=True)
class Artifact:
    """A model whose files were checked.

    Attributes:
        path: the ONNX file, links not resolved.
        bundle: folder of the bundle; None for a single ONNX file.
        manifest: the bundle's manifest; None for a single ONNX file.
        signature: the model's signature; equal in the manifest and in the ONNX file.
        files: name of the ONNX file and of each weight file -> its path with links resolved.
    """

    path: Path
    bundle: Path | None
    manifest: Manifest | None
    signature: Signature
    files: dict[str, Path]

    @contextlib.contextmanager
    def plain_files(self, *, unshared: bool = False) -> Iterator[Path]:
        """Yield the path of the ONNX file, with its weights beside it and none of them a symbolic link.

        If one of them is a symbolic link, all are hard-linked into a private folder, or copied on another file system.
        The folder is removed when the block ends.

        Args:
            unshared: whether the files must not have a second hard link either, which the onnx package refuses. Then
                they are copied.
        """
        folder = self.path.absolute().parent
        usable = all(
            not (folder / name).is_symlink() and not (unshared and file.stat().st_nlink > 1)
            for name, file in self.files.items()
        )
        if usable:
            yield self.path
            return
        add_file = copyfile if unshared else link_or_copy
        with temporary_folder("plain-files") as private:
            for name, file in self.files.items():
                add_file(file, private / name)
            yield private / self.path.name


def open_artifact(path: Path) -> Artifact:
    """Open a bundle and check every file against its digest, or open a single ONNX file.

    Raises:
        ArtifactError: a file is missing, truncated, changed, outside the bundle or not listed; or the manifest and the
            ONNX file have different signatures.
    """
    bundle, model = locate(path)
    if bundle is None:
        return _open_single(model)
    manifest = Manifest.read(bundle)
    return check_bundle(bundle, manifest)


def check_bundle(bundle: Path, manifest: Manifest) -> Artifact:
    """`open_artifact` for a bundle whose manifest was already read."""
    listed = manifest.verify(bundle)
    files = _checked_files(bundle, manifest, manifest.model_file, listed)
    decoder = manifest.signature.decoder
    if decoder is not None:
        if decoder.model_file not in listed:
            raise ArtifactError(f"{bundle / MANIFEST} lists no {shown(decoder.model_file)}; export the model again")
        files |= _checked_files(bundle, manifest, decoder.model_file, listed)
    return Artifact(bundle / manifest.model_file, bundle, manifest, manifest.signature, files)


def _checked_files(bundle: Path, manifest: Manifest, file: str, listed: dict[str, Path]) -> dict[str, Path]:
    """Check the signature and the weights of an ONNX file of a bundle.

    Args:
        file: path of the ONNX file in the bundle.
        listed: from `Manifest.verify`.
    Returns:
        Name of the ONNX file and of each weight file -> its path with links resolved.
    Raises:
        ArtifactError: its signature is not the manifest's, or its weights are not listed beside it.
    """
    model, folder = bundle / file, PurePosixPath(file).parent
    header = read_header(listed[file])
    for name in header.weights:
        if Path(name).name != name:
            raise ArtifactError(f"{model} has weights in {name!r}, outside its folder; put them beside it")
        if str(folder / name) not in listed:
            raise ArtifactError(f"{model} has weights in {name!r}, which {MANIFEST} does not list; export it again")
    stored = _signature(model, header.metadata)
    if stored != manifest.signature:
        listed_fields, stored_fields = manifest.signature.to_dict(), stored.to_dict()
        name = next(name for name in listed_fields if listed_fields[name] != stored_fields.get(name))
        raise ArtifactError(
            f"{bundle / MANIFEST} says {name} {shown(listed_fields[name])} where {model.name} says "
            f"{shown(stored_fields.get(name))}; "
            "export the model again"
        )
    return {name: listed[str(folder / name)] for name in (model.name, *sorted(header.weights))}


def _open_single(model: Path) -> Artifact:
    header = read_header(model)
    files = {model.name: model.resolve()}
    for name in sorted(header.weights):
        file = (model.parent / name).resolve()
        if file.parent != model.parent.resolve() or Path(name).name != name:
            raise ArtifactError(f"{model} has weights in {name!r}, outside its folder; put them beside it")
        if not file.is_file():
            raise ArtifactError(f"{model} has weights in {name!r}, and {file} is no file; export the model again")
        files[name] = file
    return Artifact(model, None, None, _signature(model, header.metadata), files)


def _signature(model: Path, metadata: str | None) -> Signature:
    if metadata is None:
        raise ArtifactError(f"{model} was not written by lfx: it carries no lfx metadata; export it with lfx")
    try:
        data = parse_json(metadata)
    except ValueError as error:
        raise ArtifactError(f"{model} has broken lfx metadata ({error}); export it again") from error
    return Signature.from_dict(data)
