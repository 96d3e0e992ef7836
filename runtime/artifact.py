"""A bundle or a lone ONNX file, checked before anything reads it.

One rule for links, whatever the backend. A file that a bundle's manifest lists may be a symbolic link, as hub caches,
DVC and git-annex have them: it is resolved once, the file that it leads to is hashed, and that file is loaded. Folders
inside a bundle are no links. The weights of a lone ONNX file, which no manifest lists, lie in its own folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lfx.checks import parse_json, shown
from lfx.errors import ArtifactError
from lfx.files import copy, link_or_copy, temporary_folder
from lfx.manifest import MANIFEST, MODEL, Manifest, locate
from lfx.onnx_file import read_header
from lfx.signature import Signature


@dataclass(frozen=True)
class Artifact:
    """A model whose files were checked.

    Attributes:
        path: the ONNX file, as it was asked for.
        bundle: its folder; None for a lone file.
        manifest: of the bundle; None for a lone file.
        signature: of the model; the manifest and the ONNX file say the same.
        files: name of the ONNX file and of each weight file -> the plain file that it stands for.
    """

    path: Path
    bundle: Path | None
    manifest: Manifest | None
    signature: Signature
    files: dict[str, Path]

    @contextlib.contextmanager
    def plain_files(self, *, unshared: bool = False) -> Iterator[Path]:
        """The ONNX file with its weights beside it, none of them a link, for as long as the block runs.

        Links are replaced by a private folder of hard links, or of copies on another file system.

        Args:
            unshared: hard links will not do either; the onnx package refuses them.
        """
        folder = self.path.absolute().parent
        usable = all(
            not (folder / name).is_symlink() and not (unshared and file.stat().st_nlink > 1)
            for name, file in self.files.items()
        )
        if usable:
            yield self.path
            return
        put = copy if unshared else link_or_copy
        with temporary_folder("plain-files") as private:
            for name, file in self.files.items():
                put(file, private / name)
            yield private / self.path.name


def open_artifact(path: Path) -> Artifact:
    """Check a bundle (every file against its digest) or a lone ONNX file.

    Raises:
        ArtifactError: a file is missing, cut, changed, outside the bundle or not listed; or the manifest and the ONNX
            file do not say the same.
    """
    bundle, model = locate(path)
    if bundle is None:
        return _lone(model)
    manifest = Manifest.read(bundle)
    return check_bundle(bundle, manifest)


def check_bundle(bundle: Path, manifest: Manifest) -> Artifact:
    """`open_artifact` for a bundle whose manifest was read."""
    listed = manifest.verify(bundle)
    model = bundle / MODEL
    header = read_header(listed[MODEL])
    for name in header.weights:
        if Path(name).name != name:
            raise ArtifactError(f"{model} has weights in {name!r}, outside its folder; put them beside it")
        if name not in listed:
            raise ArtifactError(f"{model} has weights in {name!r}, which {MANIFEST} does not list; export it again")
    stored = _signature(model, header.metadata)
    if stored != manifest.signature:
        says, holds = manifest.signature.to_dict(), stored.to_dict()
        wrong = next(name for name in says if says[name] != holds[name])
        raise ArtifactError(
            f"{bundle / MANIFEST} says {wrong} {shown(says[wrong])} where {MODEL} says {shown(holds[wrong])}; "
            "export the model again"
        )
    return Artifact(model, bundle, manifest, stored, {name: listed[name] for name in (MODEL, *sorted(header.weights))})


def _lone(model: Path) -> Artifact:
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
