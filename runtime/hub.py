"""Repositories of the Hugging Face hub: `local_path` fetches a bundle, and `push` uploads one.

The files go through huggingface_hub, with its cache, and its settings by environment variables: HF_TOKEN, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lfx
from lfx.checks import file_path, flag, shown
from lfx.errors import ArtifactError, InputError, LfxError, one_line
from lfx.manifest import MANIFEST, Manifest
from lfx.runtime.artifact import check_bundle, unchanged
from lfx.runtime.model_card import CARD, MARK, model_card
from lfx.runtime.signing import read_signature

# A repository's name, and a branch, a tag or a commit after @.
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w.-][\w./-]{0,200}))?", re.ASCII)
_NOT_FOLDERS = (".onnx", ".plan")
_MOST_FILES = 1000
_NO_CACHE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_SIGNATURE = f"{MANIFEST}.minisig"
_KEPT = (CARD, ".gitattributes")  # files of the repository, also if a manifest lists them


def local_path(path: Path) -> Path:
    """Return the path of a model on this machine.

    Args:
        path: a path, which is returned as it is; or, where there is no such path and no folder ORG, a repository of
            the hub: ORG/NAME, or ORG/NAME@REVISION.
    Returns:
        `path`, or the folder of the fetched files. `Engine` checks them against the repository's own manifest.
    Raises:
        ArtifactError: the repository cannot be fetched, or has no bundle.
    """
    match = _REPOSITORY.fullmatch(path.as_posix())
    if match is None or path.suffix in _NOT_FOLDERS or path.exists() or path.parent.exists():
        return path
    return _fetch(match[1], match[2])


def pinned(path: Path, local: Path) -> Path:
    """The repository `path` at the commit that `local_path` fetched to `local`: ORG/NAME@COMMIT."""
    return Path(f"{path.as_posix().partition('@')[0]}@{local.name}")


def _fetch(repository: str, revision: str | None) -> Path:
    """Fetch the files that the manifest of a repository lists, and no others; returns their folder."""
    name = f"{repository}@{revision}" if revision is not None else repository
    with _failing(ArtifactError, f"{name} is no folder here, and cannot be fetched from the hub"):
        from huggingface_hub import hf_hub_download

        def fetch(file: str, at: str | None) -> Path:
            return Path(hf_hub_download(repository, file, revision=at, library_name="lfx"))

        manifest = fetch(MANIFEST, revision)
        folder = manifest.parent  # snapshots/COMMIT
        files = Manifest.read(folder).files
        if len(files) > _MOST_FILES:
            raise ArtifactError(f"{manifest} lists {len(files):,} files; at most {_MOST_FILES:,} are fetched")
        for file in files:
            if re.search(r"(^|/)\.{0,2}(/|$)|[\\:]", file):
                raise ArtifactError(f"{manifest} names {shown(file)}, which is no path inside the repository")
        for file in files:
            fetch(file, folder.name)
        with contextlib.suppress(Exception):  # most bundles are not signed
            fetch(_SIGNATURE, folder.name)
        return folder


def push(
    bundle: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> str:
    """Upload a bundle to a repository of the hub, in one commit, with a model card.

    The same commit deletes the files of the repository's previous bundle that the new one does not have.

    The token is that of huggingface_hub: the environment variable HF_TOKEN, or that of `hf auth login`.

    Args:
        bundle: a bundle, in either layout. Its files are checked, and those that its manifest lists are uploaded.
        repository: ORG/NAME; it is made if it does not exist.
        private: make a new repository private.
        revision: the branch; default: main.
        progress: called with the name of each step.
    Returns:
        The address of the commit.
    Raises:
        ArtifactError: the bundle is broken, or its lfx.json.minisig is no signature.
        InputError: `bundle` is no path, `repository` is no name of a repository, or an option has another type.
        LfxError: the hub refuses, or cannot be reached.
    """
    if not isinstance(repository, str) or (match := _REPOSITORY.fullmatch(repository)) is None or match[2] is not None:
        raise InputError(f"repository is {shown(repository)}; give ORG/NAME")
    if repository.endswith(_NOT_FOLDERS):
        raise InputError(
            f"repository is {shown(repository)}, which lfx opens as a file; give ORG/NAME without that end"
        )
    flag(private, "private")
    if not isinstance(revision, str | None):
        raise InputError(f"revision is {shown(revision)}; give the name of a branch, or leave it out")
    folder = file_path(bundle, "bundle")
    progress("checking the bundle")
    manifest = Manifest.read(folder)
    check_bundle(folder, manifest)
    path = folder / _SIGNATURE  # no digest covers it, and it may be a link
    signature = read_signature(path, folder / MANIFEST) if path.is_file() else None
    card = model_card(manifest, repository).encode(errors="replace")  # the source may be a folder of another encoding
    with _failing(LfxError, f"{repository} cannot be uploaded"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(library_name="lfx", library_version=lfx.__version__)
        progress(f"making the repository {repository}")
        api.create_repo(repository, private=private, exist_ok=True)
        # The hub refuses the commit if there was another one since: huggingface_hub leaves out files that have not
        # changed, so that a commit on top of another bundle's would make a mixture of both.
        parent = api.model_info(repository, revision=revision).sha
        with unchanged(folder, manifest):
            names = [*manifest.files, MANIFEST]
            added = [CommitOperationAdd(name, str((folder / name).resolve())) for name in names]
            if signature is not None:
                names.append(_SIGNATURE)
                added.append(CommitOperationAdd(_SIGNATURE, signature))
            if CARD not in names and _may_write_card(api, repository, revision):
                added.append(CommitOperationAdd(CARD, card))
            stale = [name for name in _earlier_files(api, repository, revision) if name not in names]
            deleted = [
                CommitOperationDelete(name) for name in stale if api.file_exists(repository, name, revision=revision)
            ]
            progress(f"uploading {len(added)} files" + (f", deleting {len(deleted)}" if deleted else ""))
        operations: list[Any] = [*added, *deleted]
        message = f"Bundle of lfx {manifest.signature.lfx_version}: {manifest.signature.architecture}"
        with unchanged(folder, manifest):
            try:
                commit: Any = api.create_commit(
                    repository, operations, commit_message=message, revision=revision, parent_commit=parent
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 412:  # Precondition Failed
                    raise
                raise LfxError(f"{repository} got another commit since this push began; push again") from error
        return str(commit.commit_url)


def _earlier_files(api: Any, repository: str, revision: str | None) -> list[str]:
    """The files of the bundle that the repository holds, as its manifest lists them, and its signature.

    Without a valid manifest nothing counts as a file of a bundle.
    """
    if not api.file_exists(repository, MANIFEST, revision=revision):
        return []
    try:
        earlier = Manifest.read(Path(api.hf_hub_download(repository, MANIFEST, revision=revision)).parent)
    except LfxError:
        return []
    return [name for name in (*earlier.files, _SIGNATURE) if name not in _KEPT]


def _may_write_card(api: Any, repository: str, revision: str | None) -> bool:
    """Whether the repository has no model card, or one that `push` wrote."""
    if not api.file_exists(repository, CARD, revision=revision):
        return True
    path = Path(api.hf_hub_download(repository, CARD, revision=revision))
    return MARK in path.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _failing(error_type: type[LfxError], failure: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into an LfxError; it raises its own errors, its HTTP client's and OSError."""
    try:
        yield
    except LfxError:
        raise
    except Exception as error:
        cure = "check the name, and give the token of a private repository as HF_TOKEN"
        if isinstance(error, OSError) and error.errno in _NO_CACHE:
            cure = "set HF_HOME to a folder with room, which this user may write to"
        raise error_type(f"{failure}: {one_line(error)}; {cure}") from error
