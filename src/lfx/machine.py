"""The machine and its packages, for records and for what a CPU cannot do."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_fields() -> dict[str, str]:
    """What Linux says of the CPU, by /proc/cpuinfo's names; empty where there is no such file."""
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
    """Whether this CPU adds pairs of int8 products in 16 bits, which weights of 8 bits overflow: x86 without VNNI.

    ONNX Runtime and OpenVINO are both wrong there, in silence. False where the system does not say what its CPU has.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    flags = cpu_fields().get("flags", "").split()
    return bool(flags) and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags)
