"""Write requirements.lock: all packages that `make install` installs, pinned, with their sha256 hashes.

    make lock                                # keeps the locked versions that still satisfy pyproject.toml
    make lock OPTIONS=--upgrade              # upgrades all; or: OPTIONS='--upgrade-package numpy'

Versions and hashes are PyPI's, except torch's on Linux: PyPI's build requires gigabytes of CUDA libraries, so the lock
holds PyTorch's CPU build, which is on PyTorch's own index only. To change the version of torch, copy its hashes from
that index to TORCH_CPU, and its version and requirements to [tool.uv] in pyproject.toml.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
# Extras that are not locked: onnxruntime-gpu of [gpu] and onnxruntime have the same module.
LEFT_OUT = {"gpu"}
TORCH_VERSION = "2.13.0"
# sha256 of the wheels for Linux on x86-64, as https://download.pytorch.org/whl/cpu/torch/ lists them.
TORCH_CPU = {
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ),
    "torch-2.13.0+cpu-cp312-cp312-manylinux_2_28_x86_64.whl": (
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2"
    ),
    "torch-2.13.0+cpu-cp313-cp313-manylinux_2_28_x86_64.whl": (
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6"
    ),
    "torch-2.13.0+cpu-cp314-cp314-manylinux_2_28_x86_64.whl": (
        "d20fa53ee744502fa4c69818a720b05ca0d37abd055d4f6e66cae155114bc691"
    ),
}


def main() -> None:
    """Write the lock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "All options are passed to: uv pip compile"
    _, options = parser.parse_known_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    selected = [f"--extra={name}" for name in extras if name not in LEFT_OUT]
    selected += [f"--group={name}" for name in project["dependency-groups"]]
    command = [sys.executable, "-m", "uv", "--quiet", "pip", "compile", "pyproject.toml", *selected]
    command += ["--universal", "--python-version=3.11", "--generate-hashes", "--custom-compile-command=make lock"]
    status = subprocess.run([*command, f"--output-file={LOCK.name}", *options], cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)
    LOCK.write_text(with_torch_cpu(LOCK.read_text()))


def with_torch_cpu(lock: str) -> str:
    """Replace the torch of the lock by PyTorch's CPU build on Linux; for other systems PyPI has a CPU build."""
    entry = re.search(r"^torch==(\S+) \\\n((?: +--hash=\S+(?: \\)?\n)+)", lock, re.MULTILINE)
    if entry is None or entry[1] != TORCH_VERSION:
        sys.exit(
            f"the lock does not have torch {TORCH_VERSION}, whose hashes are in scripts/lock.py; see its docstring"
        )
    hashes = " \\\n".join(f"    --hash=sha256:{digest}" for digest in TORCH_CPU.values())
    linux = f"torch=={TORCH_VERSION}+cpu ; sys_platform == 'linux' \\\n{hashes}\n"
    others = f"torch=={TORCH_VERSION} ; sys_platform != 'linux' \\\n{entry[2]}"
    return lock[: entry.start()] + linux + others + lock[entry.end() :]


if __name__ == "__main__":
    main()
