"""Measure the installed size of lfx with its extras, from the packages of this environment.

    python -m scripts.sizes            # writes docs/records/sizes.jsonl

Python and lfx itself do not count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import record

ROOT = Path(__file__).resolve().parent.parent
SELECTIONS = (("cpu",), ("cpu", "serve"), ("openvino",), ("export", "cpu"))


def closure(extras: Iterable[str]) -> set[str]:
    """Return the packages that `pip install 'longformer-lfx[extras]'` brings on this system.

    The requirements of lfx are those of pyproject.toml; those of its dependencies are those of the installed versions.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    unread = [
        Requirement(text) for text in project["dependencies"] + [text for name in extras for text in optional[name]]
    ]
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while unread:
        requirement = unread.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            names.add(name)
            try:
                texts = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            inner = [Requirement(text) for text in texts]
            unread += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
    return names


def installed_bytes(names: Iterable[str]) -> int:
    """Return the size of the installed files of packages; one that is not installed has none."""
    total = 0
    for name in names:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        paths = (Path(str(file.locate())) for file in files)
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total


def main() -> None:
    """Write the record of each selection of extras."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for extras in SELECTIONS:
        names = closure(extras)
        rows.append(
            {
                **record.environment(),
                "extras": list(extras),
                "packages": len(names),
                "installed_bytes": installed_bytes(names),
            }
        )
    print(record.write("sizes", rows))


if __name__ == "__main__":
    main()
