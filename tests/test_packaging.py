"""Installation of lfx: the bounds in pyproject.toml, the lowest versions, the lock, and what CI runs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts import lock, sizes

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
DEPENDENCIES = {
    "dependencies": PROJECT["project"]["dependencies"],
    "build-system": PROJECT["build-system"]["requires"],
    "build": PROJECT["dependency-groups"]["build"],
    **EXTRAS,
}
MAKEFILE = (ROOT / "Makefile").read_text()


def requirements(name: str) -> list[Requirement]:
    return [Requirement(text) for text in DEPENDENCIES[name]]


def lowest_pins() -> dict[str, str]:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def lock_entries() -> list[tuple[Requirement, list[str]]]:
    """The requirement and the hashes of each entry of the lock."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    entries = []
    for line in text.replace("\\\n", "").splitlines():
        requirement, *hashes = line.split("--hash=")
        entries.append((Requirement(requirement), [digest.strip() for digest in hashes]))
    return entries


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_every_dependency_has_a_lower_bound_and_the_lowest_set_pins_it(name: str) -> None:
    pins = lowest_pins()
    for requirement in requirements(name):
        assert str(requirement.specifier) == f">={pins[requirement.name]}", requirement


def test_the_lowest_set_pins_nothing_else() -> None:
    assert set(lowest_pins()) == {requirement.name for name in DEPENDENCIES for requirement in requirements(name)}


def test_make_test_lowest_installs_every_extra_but_the_one_that_needs_a_gpu() -> None:
    listed = re.search(r"^EXTRAS := (.*)$", MAKEFILE, re.MULTILINE)
    assert listed is not None
    assert set(listed[1].split(",")) == set(EXTRAS) - {"gpu"}


def test_every_package_that_lfx_imports_is_a_dependency() -> None:
    distributions = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for name in DEPENDENCIES for requirement in requirements(name)}
    for folder in ("src/lfx", "export", "runtime"):
        for file in (ROOT / folder).rglob("*.py"):
            for module in imported(ast.parse(file.read_text())):
                owners = {canonicalize_name(owner) for owner in distributions.get(module, [])}
                assert not owners or owners & (declared | {"longformer-lfx"}), f"{file}: {module}"


def imported(tree: ast.Module) -> set[str]:
    """The top-level modules that a file imports, those inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_every_package_of_the_lock_is_pinned_with_sha256_hashes() -> None:
    for requirement, hashes in lock_entries():
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement


@pytest.mark.parametrize("name", [name for name in DEPENDENCIES if name not in lock.LEFT_OUT])
def test_the_lock_has_every_dependency_within_its_bounds(name: str) -> None:
    """If it fails, run `make lock`."""
    for requirement in requirements(name):
        pins = [pin.specifier for pin, _ in lock_entries() if pin.name == canonicalize_name(requirement.name)]
        assert pins, requirement
        for pin in pins:
            assert Version(str(pin).removeprefix("==")) in requirement.specifier, requirement


def test_every_package_that_the_makefile_names_is_in_the_lock() -> None:
    named = "|".join(re.findall(r"\(call locked(?:_without)?,([^)]+)\)", MAKEFILE)).split("|")
    assert {"pip", "torch", "kernel-lens", "nvidia-pytriton", "uv"} <= set(named)
    assert set(named) <= {requirement.name for requirement, _ in lock_entries()}


def test_the_lock_has_pytorchs_cpu_build_for_linux() -> None:
    pins = {str(pin.marker): (str(pin.specifier), hashes) for pin, hashes in lock_entries() if pin.name == "torch"}
    assert pins['sys_platform == "linux"'] == (
        f"=={lock.TORCH_VERSION}+cpu",
        [f"sha256:{digest}" for digest in lock.TORCH_CPU.values()],
    )
    assert pins['sys_platform != "linux"'][0] == f"=={lock.TORCH_VERSION}"
    assert not {"triton", "nvidia-cublas", "nvidia-cudnn-cu13"} & {pin.name for pin, _ in lock_entries()}


def test_a_lock_with_a_torch_whose_hashes_are_not_known_is_refused() -> None:
    with pytest.raises(SystemExit, match="the lock does not have torch"):
        lock.with_torch_cpu("torch==9.9.9 \\\n    --hash=sha256:00\n    # via longformer-lfx\n")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("fake_machine", "message"),
    [
        ("sys.version_info = (3, 10, 1)", "lfx needs Python 3.11 or later"),
        ("platform.system = lambda: 'Darwin'", "make install is for Linux on x86_64, this is Darwin on"),
        ("platform.machine = lambda: 'riscv64'", "make install is for Linux on x86_64, this is Linux on riscv64"),
    ],
    ids=["old-python", "other-system", "other-machine"],
)
def test_make_says_where_it_cannot_install(fake_machine: str, message: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    code = f"import platform, sys; platform.system = lambda: 'Linux'; {fake_machine}; exec(sys.argv[2])"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{code}" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "lock", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith(message)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_that_there_is_no_such_python() -> None:
    done = subprocess.run(["make", "lock", "PYTHON=no-python"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("no-python was not found; try: make PYTHON=python3.11")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_in_a_folder_with_a_space_in_its_name_installs_and_removes_no_other_folder(tmp_path: Path) -> None:
    clone, other, python = tmp_path / "lfx copy", tmp_path / "lfx", tmp_path / "python"
    for folder in (clone, other):
        folder.mkdir()
    for name in ("CMakeLists.txt", "Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, clone)
    # A Python whose environments have itself, and which installs nothing.
    python.write_text(
        """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
echo "$CMAKE_ARGS"
"""
    )
    python.chmod(0o755)
    command = ["make", "install", f"PYTHON={python}", "TENSORRT_URL=no-url", "CMAKE_ARGS=-DNAME=1"]
    # Under make, its own variables would make this one report its folder.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == [other, clone, python]
    headers = clone / "build" / "headers" / "tensorrt"
    assert headers.is_symlink()
    assert shlex.split(done.stdout.splitlines()[-2]) == ["-DNAME=1", f"-DTensorRT_INCLUDE_DIR={headers}"]


@pytest.mark.parametrize("name", ["test", "release"])
def test_workflows_run_make_targets_with_pinned_actions_and_may_only_read(name: str) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    runs = [step["run"] for step in steps if step.get("run", "").startswith("make ")]
    assert set(runs) >= ({"make check", "make test", "make test-lowest"} if name == "test" else {"make dist"})
    assert {run.removeprefix("make ") for run in runs} <= targets
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)


def test_the_tests_run_on_each_python_that_the_classifiers_name_and_on_no_older_one() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    options = [step.get("with", {}) for step in workflow["jobs"]["locked"]["steps"]]
    pythons = {option["python-version"] for option in options if "python-version" in option}
    pythons |= {job["python"] for job in workflow["jobs"]["portable"]["strategy"]["matrix"]["include"]}
    language = "Programming Language :: Python :: 3."
    named = {text.rpartition(" ")[2] for text in PROJECT["project"]["classifiers"] if text.startswith(language)}
    assert pythons == named
    oldest = min(named, key=Version)
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_on_windows_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """So pip needs no compiler there, and CMake does not ask for one."""
    spec = importlib.util.spec_from_file_location("lfx_build", ROOT / "build_backend" / "lfx_build.py")
    assert spec is not None
    assert spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    calls: list[tuple[Any, ...]] = []

    def build(*arguments: Any) -> str:
        calls.append(arguments)
        return "lfx.whl"

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(backend, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(backend.backend, "build_wheel", build)
    assert backend.build_wheel("folder", {"verbose": "1"}, "metadata") == "lfx.whl"
    assert calls == [("folder", {"verbose": "1", "wheel.cmake": "false"}, None)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that a wheel is built from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("build_backend", "export", "plugins", "runtime", "src"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "_lib"))
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(
    checkout: Path, wheels: Path, *, cxx: str = "no-compiler", again: bool = False
) -> subprocess.CompletedProcess[str]:
    """Build without a CUDA compiler on the PATH, and by default without a C++ compiler.

    Args:
        again: build in the folder of an earlier build, whose compilers CMake remembers.
    """
    if not again:
        shutil.rmtree(checkout / "build", ignore_errors=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "CXX": cxx}
    environment.pop("CUDACXX", None)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        ".",
    ]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(any(Path(folder, "nvcc").exists() for folder in ("/usr/bin", "/bin")), reason="nvcc is in /usr/bin")
def test_a_wheel_without_libraries_is_pure_python_and_has_both_linked_folders(checkout: Path, tmp_path: Path) -> None:
    done = build_wheel(checkout, tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {
            "lfx/cli/__init__.py",
            "lfx/export/exporter.py",
            "lfx/runtime/engine.py",
            "lfx/runtime/serve/page.html",
        } <= set(archive.namelist())


@pytest.mark.slow
@pytest.mark.skipif(any(Path(folder, "nvcc").exists() for folder in ("/usr/bin", "/bin")), reason="nvcc is in /usr/bin")
def test_a_wheel_that_a_cpp_compiler_built_has_the_custom_ops_and_its_platform(checkout: Path, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "a C++ compiler is needed, as the README says"
    build_wheel(checkout, tmp_path / "without")  # it may have been installed since
    done = build_wheel(checkout, tmp_path / "with", cxx=compiler, again=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "with").iterdir()
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if "/_lib/" in name]
    assert [Path(name).name for name in libraries] in (["liblfx_onnxruntime.so"], ["liblfx_onnxruntime.dylib"])


def test_an_sdist_has_files_in_the_place_of_links(checkout: Path, tmp_path: Path) -> None:
    """Windows cannot unpack links."""
    code = "import sys; sys.path.insert(0, 'build_backend'); import lfx_build; lfx_build.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    (sdist,) = tmp_path.iterdir()
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() for member in archive)
        names = {name.partition("/")[2] for name in archive.getnames()}
        for name in names:  # below a folder of 100 characters, Windows' limit of 260 is not reached
            assert re.fullmatch(r"[\w./-]{1,150}", name, re.ASCII), name
            parts = {part.partition(".")[0].lower() for part in name.split("/")}
            assert not parts & {"con", "prn", "aux", "nul"}, name
        assert len({name.lower() for name in names}) == len(names)
        assert {"src/lfx/export/exporter.py", "src/lfx/runtime/engine.py", "export/exporter.py"} <= names
        root = sdist.name.removesuffix(".tar.gz")
        for name in ("export/exporter.py", "runtime/engine.py"):
            copies = [archive.extractfile(f"{root}/{folder}{name}") for folder in ("", "src/lfx/")]
            contents = [file.read() for file in copies if file is not None]
            assert contents[0] == contents[1] == (checkout / name).read_bytes()


@pytest.mark.parametrize("extras", [("cpu",), ("cpu", "serve")], ids=",".join)
def test_serving_on_the_cpu_brings_no_torch(extras: tuple[str, ...]) -> None:
    installed = sizes.closure(extras)
    assert "onnxruntime" in installed
    assert not {"torch", "transformers", "onnx", "onnxscript", "openvino", "tensorrt"} & installed


@pytest.mark.parametrize("name", ["export", "runtime"])
def test_a_checkout_without_symbolic_links_says_so(name: str, checkout: Path, tmp_path: Path) -> None:
    link = checkout / "src" / "lfx" / name
    target = link.readlink()
    link.unlink()
    link.write_text(str(target))  # as git has it on Windows
    try:
        done = build_wheel(checkout, tmp_path)
    finally:
        link.unlink()
        link.symlink_to(target)
    assert done.returncode != 0
    assert f"{Path('src/lfx') / name} is no folder: this checkout has no symbolic links" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
