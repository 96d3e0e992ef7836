"""The CPU and the installed packages: for records, and to refuse what this CPU computes wrongly."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Name -> version of each of these packages that is installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def cpu_fields() -> dict[str, str]:
    """The fields of /proc/cpuinfo, by their names there; empty if there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """The CPU of this machine and the vector instructions that decide its speed, for records."""
    fields = cpu_fields()
    flags = [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in fields.get("flags", "").split()]
    return fields.get("model name", platform.processor() or "unknown") + (f" ({', '.join(flags)})" if flags else "")


_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The number of cores that this process may use, which may be fewer than the machine has: at least 1.

    Its affinity (taskset, cpusets) limits them, and the CPU time of its control groups (containers, systemd), which is
    rounded down: threads that exceed it are stopped while others wait for them.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(int(min([cores, *_cpu_quotas()])), 1)


def _cpu_quotas() -> list[float]:
    """The CPU time per time that each control group of this process may take, the groups around it included."""
    quotas = []
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system
        return []
    for line in lines:
        controllers, _, name = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):  # empty: version 2
            continue
        # In a container the name may be the host's; then only the root exists, which is the container's group.
        groups = (PurePosixPath(name), *PurePosixPath(name).parents)
        # The order of the controllers may be another than that in the folder's name; most systems have a link "cpu".
        for top, group in itertools.product({controllers, "cpu"} if controllers else {""}, groups):
            folder = Path(f"{_GROUPS}/{top}{group}")
            with contextlib.suppress(OSError, ValueError):  # no limit is "max", or no file
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if int(quota) > 0:  # -1: no limit
                    quotas.append(int(quota) / int(period))
    return quotas


def int8_overflows() -> bool:
    """Whether 8-bit weights overflow on this CPU: x86 without VNNI adds pairs of int8 products in 16 bits.

    ONNX Runtime and OpenVINO then return wrong outputs without an error. False if the system does not list the CPU's
    instructions.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    flags = cpu_fields().get("flags", "").split()
    return bool(flags) and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags)
