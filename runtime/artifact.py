"""Opens a bundle or a single ONNX file: checks its files and its signature before a backend reads it.

All backends have the same rule for links. A file that a bundle's manifest lists may be a symbolic link, as in hub
caches, DVC and git-annex: it is resolved once, and the resolved file is both hashed and loaded. Folders inside a bundle
must not be links. The weights of a single ONNX file, which no manifest lists, must be in its own folder. What
the manifest of a bundle around it lists is checked as the bundle's, such as the int8 file in the layout of the hub.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import copyfile

from lfx.checks import file_path, parse_json, shown
from lfx.errors import ArtifactError
from lfx.files import link_or_copy, temporary_folder
from lfx.manifest import MANIFEST, Manifest, locate
from lfx.onnx_file import Header, read_header
from lfx.runtime.text_files import folder_around
from lfx.signature import Decoder, Signature


@dataclass(frozen=True)
class Artifact:
    """A model whose files were checked.

    Attributes:
        path: the ONNX file, links not resolved.
        bundle: folder of the bundle; None for a single ONNX file.
        manifest: the bundle's manifest; None for a single ONNX file.
        signature: the model's signature; equal in the manifest and in the ONNX file.
        files: name of each ONNX file and of each weight file -> its path with links resolved.
        has_attention_nodes: whether the ONNX file calls the attention ops of lfx, for which a backend may have kernels.
    """

    path: Path
    bundle: Path | None
    manifest: Manifest | None
    signature: Signature
    files: dict[str, Path]
    has_attention_nodes: bool

    @contextlib.contextmanager
    def plain_files(self, *, unshared: bool = False) -> Iterator[Path]:
        """Yield the path of the ONNX file, with the other files beside it and none of them a symbolic link.

        If one of them is a symbolic link, all are hard-linked into a private folder, or copied on another file system.
        The folder is removed when the block ends.

        Args:
            unshared: whether the files are for the onnx package, which refuses a second hard link, or for onnx-ir,
                which maps them. Those with one, and those of a file system that refuses the mapping, are copied.
        """
        folder = self.path.absolute().parent
        usable = all(
            not (folder / name).is_symlink() and not (unshared and (file.stat().st_nlink > 1 or not _is_mappable(file)))
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


def _is_mappable(file: Path) -> bool:
    """Whether the file system has shared mappings; 9p and FUSE without a page cache do not."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
            return True
    except ValueError:  # an empty file
        return True
    except OSError:
        return False


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


@contextlib.contextmanager
def unchanged(bundle: Path, manifest: Manifest) -> Iterator[None]:
    """Refuse what a block has made of a bundle's files, if another bundle got the folder's name meanwhile.

    `lfx export` replaces a bundle by one rename of its folder, while others may read it.

    Args:
        manifest: as it was read before the block.
    Raises:
        ArtifactError: the bundle was replaced.
    """
    try:
        yield
    except Exception as error:
        if not _is_current(bundle, manifest):
            raise _replaced(bundle) from error
        raise
    if not _is_current(bundle, manifest):
        raise _replaced(bundle)


def _is_current(bundle: Path, manifest: Manifest) -> bool:
    try:
        return Manifest.read(bundle) == manifest
    except ArtifactError:
        return False


def _replaced(bundle: Path) -> ArtifactError:
    return ArtifactError(f"{bundle} was replaced or changed while it was read; run it again")


def check_bundle(bundle: Path, manifest: Manifest) -> Artifact:
    """`open_artifact` for a bundle whose manifest was already read."""
    with unchanged(bundle, manifest):
        return _check_bundle(bundle, manifest)


def _check_bundle(bundle: Path, manifest: Manifest) -> Artifact:
    listed = manifest.verify(bundle)
    names = [manifest.model_file]
    if manifest.signature.decoder is not None:
        folder = PurePosixPath(manifest.model_file).parent
        names.append(str(folder / _decoder_name(manifest.signature.decoder, bundle / MANIFEST)))
    headers: list[Header] = []
    files: dict[str, Path] = {}
    for name in names:
        if name not in listed:
            raise ArtifactError(f"{bundle / MANIFEST} lists no {name}; export the model again")
        header, of_graph = _listed_files(bundle, name, listed, manifest.signature)
        headers.append(header)
        files |= of_graph
    model, signature = bundle / manifest.model_file, manifest.signature
    return Artifact(model, bundle, manifest, signature, files, headers[0].has_attention_nodes)


def _listed_files(
    bundle: Path, name: str, listed: dict[str, Path], signature: Signature
) -> tuple[Header, dict[str, Path]]:
    """Check the signature and the weights of an ONNX file of a bundle.

    Args:
        name: path of the ONNX file in the bundle.
        listed: from `Manifest.verify`.
        signature: the manifest's.
    Returns:
        Its header; and the name of the ONNX file and of each weight file -> its path with links resolved.
    """
    model, folder = bundle / name, PurePosixPath(name).parent
    header = read_header(listed[name])
    for weights in header.weights:
        if Path(weights).name != weights:
            raise ArtifactError(f"{model} has weights in {weights!r}, outside its folder; put them beside it")
        if str(folder / weights) not in listed:
            raise ArtifactError(f"{model} has weights in {weights!r}, which {MANIFEST} does not list; export it again")
    _check_equal(signature, bundle / MANIFEST, _signature(model, header.metadata), model)
    return header, {file: listed[str(folder / file)] for file in (model.name, *sorted(header.weights))}


def _decoder_name(decoder: Decoder, source: Path) -> str:
    """Name of the decoder's ONNX file, which is in the encoder's folder."""
    name = decoder.model_file
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise ArtifactError(f"{source} names the decoder's graph {shown(name)}, which is no file name; export it again")
    return name


def _check_equal(expected: Signature, source: Path, stored: Signature, model: Path) -> None:
    """Raise ArtifactError if an ONNX file has another signature than the file `source`."""
    if stored == expected:
        return
    expected_fields, stored_fields = expected.to_dict(), stored.to_dict()
    name = next(name for name in expected_fields if expected_fields[name] != stored_fields.get(name))
    raise ArtifactError(
        f"{source} says {name} {shown(expected_fields[name])} where {model.name} says "
        f"{shown(stored_fields.get(name))}; export the model again"
    )


def _open_single(model: Path) -> Artifact:
    header, files = _single_files(model)
    signature = _signature(model, header.metadata)
    if signature.decoder is not None:
        path = model.with_name(_decoder_name(signature.decoder, model))
        decoder = file_path(path, "the path of the decoder's graph", ArtifactError)
        if decoder.name == model.name:
            raise ArtifactError(f"{model} is a decoder's graph, which needs the encoder's; open the bundle instead")
        if not decoder.is_file():
            raise ArtifactError(
                f"{model} needs the decoder's graph {decoder}, which is no file; export the model again"
            )
        decoder_header, decoder_files = _single_files(decoder)
        _check_equal(signature, model, _signature(decoder, decoder_header.metadata), decoder)
        files |= decoder_files
    return Artifact(model, None, None, signature, files, header.has_attention_nodes)


def _single_files(model: Path) -> tuple[Header, dict[str, Path]]:
    """Read an ONNX file outside `locate`'s bundles; returns its header, and name -> path of it and its weights."""
    header = read_header(model)
    listed = _verified_around(model, (model.name, *header.weights))
    files = {model.name: listed.get(model.name, model.resolve())}
    for name in sorted(header.weights):
        path = file_path(model.parent / name, f"the path of the weights of {model.name}", ArtifactError)
        file = listed.get(name, Path(os.path.realpath(path)))
        if Path(name).name != name or (name not in listed and file.parent != model.parent.resolve()):
            raise ArtifactError(f"{model} has weights in {name!r}, outside its folder; put them beside it")
        if not file.is_file():
            raise ArtifactError(f"{model} has weights in {name!r}, and {file} is no file; export the model again")
        files[name] = file
    return header, files


def _verified_around(model: Path, names: Iterable[str]) -> dict[str, Path]:
    """Check the files of an ONNX file's folder which the manifest of a bundle around it lists.

    Returns:
        Name of each of them -> its path with links resolved.
    """
    bundle = folder_around(model)
    if not os.path.lexists(bundle / MANIFEST):
        return {}
    manifest, folder = Manifest.read(bundle), Path(os.path.realpath(model.parent)).relative_to(bundle)
    paths = {(folder / name).as_posix(): name for name in names}
    verified = manifest.verify(bundle, paths)
    return {paths[path]: file for path, file in verified.items()}


def _signature(model: Path, metadata: str | None) -> Signature:
    if metadata is None:
        raise ArtifactError(f"{model} was not written by lfx: it carries no lfx metadata; export it with lfx")
    try:
        data = parse_json(metadata)
    except ValueError as error:
        raise ArtifactError(f"{model} has broken lfx metadata ({error}); export it again") from error
    return Signature.from_dict(data)
