"""Build the files of a release in dist/: the sdist, a wheel with the libraries, and one without any.

    python scripts/build_dist.py

Each wheel is built from the sdist and tested: it is installed into a new environment, where `lfx --version` must print
the wheel's version. auditwheel, if it is on the PATH, gives the wheel with libraries the tag of the oldest systems that
have all that the libraries need; PyPI takes no other wheels for Linux.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))

from lfx_build import build_sdist  # noqa: E402  # the folder is not on the path before

DIST = ROOT / "dist"
HEADERS = ROOT / "build" / "headers" / "tensorrt"


def main() -> None:
    """Build the sdist and the wheels, and test the wheels."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    DIST.mkdir(exist_ok=True)
    os.chdir(ROOT)
    sdist = DIST / build_sdist(str(DIST))
    build_wheel(sdist, {"CMAKE_ARGS": shlex.quote(f"-DTensorRT_INCLUDE_DIR={HEADERS}")})
    build_wheel(
        sdist, {"CXX": "no-compiler", "CUDACXX": "no-compiler", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    )
    for wheel in DIST.glob("*-linux_*.whl"):
        name_systems(wheel)
    wheels = sorted(DIST.glob("*.whl"))
    for wheel in wheels:
        try_wheel(wheel)
    print(*(path.name for path in (sdist, *wheels)), sep="\n")


def build_wheel(sdist: Path, environment: dict[str, str]) -> None:
    """Build one wheel; the environment variables decide which libraries it has."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(DIST), str(sdist)], check=True, env={**os.environ, **environment})


def name_systems(wheel: Path) -> None:
    """Replace a wheel for this system by one for all systems that it runs on, if auditwheel is installed."""
    auditwheel = shutil.which("auditwheel")
    if auditwheel is None:
        print(
            f"{wheel.name} is for this system, and PyPI does not take it: auditwheel is not installed", file=sys.stderr
        )
        return
    subprocess.run([auditwheel, "repair", "--wheel-dir", str(DIST), str(wheel)], check=True)
    wheel.unlink()


def try_wheel(wheel: Path) -> None:
    """Install a wheel with its dependencies, and check the version that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        binaries = Path(folder) / "bin"
        pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet", str(wheel)]
        subprocess.run(pip, check=True)
        command = [str(binaries / "lfx"), "--version"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if wheel.name.split("-")[1] not in printed:
            raise SystemExit(f"{wheel.name}: lfx --version prints {printed!r}")


if __name__ == "__main__":
    main()
