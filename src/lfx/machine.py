"""The CPU and the installed packages: for records, and to refuse what this CPU computes wrongly."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Name -> version of each of these packages that is installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def usable_cores() -> int:
    """Number of cores that this process may use, which a container, a scheduler or taskset may limit."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def int8_overflows() -> bool:
    """Whether 8-bit weights overflow on this CPU: x86 without VNNI adds pairs of int8 products in 16 bits.

    ONNX Runtime and OpenVINO then return wrong outputs without an error. False if the system does not list the CPU's
    instructions.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    flags = cpu_fields().get("flags", "").split()
    return bool(flags) and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags)
