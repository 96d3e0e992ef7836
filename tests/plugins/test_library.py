"""The library that pip built: its exports, the kernels' machine code, and that TensorRT accepts it."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from lfx.errors import BuildError
from lfx.runtime.build.launch import _named_library, run_tensorrt
from scripts.bench import kernel_resources, sass
from scripts.bench.kernel_resources import SHARED_KB, resident_blocks
from tests.marks import fast_where

pytestmark = pytest.mark.trt

ARCHITECTURES = {"sm_90", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"}
# Disassembling takes seconds for each architecture: the slow part reads those that are not the H100's.
every_architecture = pytest.mark.parametrize(
    "architecture", fast_where(sorted(ARCHITECTURES), lambda name: name == "sm_90")
)
Code = Callable[[str], dict[tuple[str, str], str]]


@pytest.fixture(scope="session")
def readable(library: Path) -> Path:
    """The library, where there is NVIDIA's disassembler, from the package nvidia-cuda-cuobjdump."""
    if sass.TOOL is None:
        pytest.skip("nvidia-cuda-cuobjdump is not installed")
    return library


@pytest.fixture(scope="session")
def code(readable: Path) -> Code:
    """code(architecture) -> the machine code of each (architecture, kernel)."""
    return functools.cache(functools.partial(sass.machine_code, readable))


@pytest.fixture(scope="session")
def resources(readable: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> REG, STACK, SHARED and LOCAL; shared memory that is asked for at launch not counted."""
    return sass.resources(readable)


def test_the_library_exports_what_is_documented_and_needs_no_tensorrt(library: Path) -> None:
    exported = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    names = {line.split()[2] for line in exported.stdout.splitlines() if line.split()[1] == "T"}
    assert names == {
        "getCreators",
        "setLoggerFinder",
        "lfxBandedAttention",
        "lfxGlobalAttention",
        "lfxGlobalWorkspaceBytes",
    }
    needed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"NEEDED.*(nvinfer|tensorrt|cudart)", needed)
    ctypes.CDLL(str(library))  # loads without a GPU, a driver or TensorRT


@every_architecture
def test_there_is_code_for_every_architecture(
    architecture: str, code: Code, resources: dict[tuple[str, str], dict[str, int]]
) -> None:
    assert {arch for arch, _ in resources} == ARCHITECTURES
    names = {name for _, name in resources}
    assert len(names) == 17 + 5 + 3  # BandedAttention; GlobalAttention; combineParts
    assert set(code(architecture)) == {(architecture, name) for name in names}


def test_there_is_ptx_that_newer_gpus_compile(readable: Path) -> None:
    # PTX of a compute capability runs on that one and all later ones, machine code on later ones of the same major.
    assert set(re.findall(r"sm_\d+", sass.cuobjdump(readable, "--list-ptx"))) == {"sm_100"}


@every_architecture
def test_float16_and_bfloat16_kernels_use_tensor_cores_and_float32_ones_do_not(architecture: str, code: Code) -> None:
    seen = set()
    for (_, name), text in code(architecture).items():
        if "TensorCores" in name:
            instruction = "HMMA.16816.F32.BF16" if "bfloat16" in name else r"HMMA.16816.F32 "
            assert re.search(instruction, text), name
            assert "LDSM" in text, name  # fragments come by ldmatrix
            assert "LDGSTS" in text, name  # tiles come by cp.async
            seen.add(name)
        else:
            assert "HMMA" not in text, name
    assert len(seen) == 16


@every_architecture
def test_the_kernel_for_a_warpgroup_is_empty_but_where_there_are_its_products(
    architecture: str, code: Code, resources: dict[tuple[str, str], dict[str, int]]
) -> None:
    names = [name for _, name in code(architecture) if "Warpgroup" in name]
    assert len(names) == 2
    for name in names:
        products = re.findall(r"HGMMA\.64x(\d+)x16\.F32(\.BF16)?", code(architecture)[architecture, name])
        if architecture == "sm_90":
            # Scores and context of up to 16 global tokens, of more, and of a tile of the band.
            assert sorted(columns for columns, _ in products) == ["16"] * 4 + ["64"] * (1 + 8 + 8)
            assert {bool(is_bf16) for _, is_bf16 in products} == {"bfloat16" in name}
            assert resident_blocks(architecture, resources[architecture, name]["REG"], 128, 41_292) == 4
        else:
            assert products == []


@every_architecture
def test_no_kernel_spills_registers(architecture: str, code: Code) -> None:
    for (_, name), text in code(architecture).items():
        assert not re.search(r"\b(STL|LDL)\b", text), name


def test_no_kernel_has_local_memory_or_a_stack(resources: dict[tuple[str, str], dict[str, int]]) -> None:
    assert len(resources) == len(ARCHITECTURES) * 25
    for key, usage in resources.items():
        assert usage["LOCAL"] == usage["STACK"] == 0, key


@pytest.mark.parametrize(
    ("head_size", "row_tiles", "resident", "others"),
    [
        (32, 1, {"sm_80": 5, "sm_90": 5, "sm_100": 4}, 4),
        (32, 2, {"sm_80": 4, "sm_90": 4, "sm_100": 3}, 3),
        (64, 1, {"sm_80": 3, "sm_90": 4, "sm_100": 4}, 2),
        (64, 2, {"sm_80": 3, "sm_90": 3, "sm_100": 3}, 2),
        (128, 1, {"sm_80": 2, "sm_90": 2, "sm_100": 2}, 1),
        (128, 2, {"sm_80": 1, "sm_90": 2, "sm_100": 2}, 1),
    ],
)
def test_resident_blocks_of_banded_attention_are_those_of_the_readme(
    head_size: int,
    row_tiles: int,
    resident: dict[str, int],
    others: int,
    resources: dict[tuple[str, str], dict[str, int]],
) -> None:
    queries = 64 * row_tiles
    words = 2 * -(-(queries + 2 * 256) // 64)
    shared = 2 * (queries + 4 * 64) * head_size + 4 * (queries + 1 + words)  # queries, keys and values, twice; tables
    for (arch, name), usage in resources.items():
        if re.search(rf"bandedAttentionTensorCores.*Li{head_size}ELi{row_tiles}E", name):
            assert resident_blocks(arch, usage["REG"], 128, shared) == resident.get(arch, others), (arch, name)


def test_two_blocks_of_folded_global_rows_are_resident_on_gpus_with_enough_shared_memory(
    resources: dict[tuple[str, str], dict[str, int]],
) -> None:
    shared = 2 * (16 + 32) * (768 + 8) + 4 * 16 * (32 + 4)  # one head as wide as the base model
    for (arch, name), usage in resources.items():
        if "globalAttentionTensorCores" in name and "Li1024E" in name:
            assert resident_blocks(arch, usage["REG"], 256, shared) >= (1 if SHARED_KB[arch] == 100 else 2), (
                arch,
                name,
            )


KEPT_STEPS = {"sm_80": 2, "sm_90": 3, "sm_100": 1}  # kWIDE_KEPT_STEPS of tensor_core_tiles.cuh; others keep all


@every_architecture
@pytest.mark.parametrize("row_tiles", [1, 2])
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_a_group_has_no_more_products_than_needed_and_each_load_feeds_all_row_tiles(
    head_size: int, row_tiles: int, architecture: str, code: Code
) -> None:
    # Scores and context of 16 queries by 32 keys take products of 16 by 8 by 16; a load is of two operands for all row
    # tiles. A fragment of the queries is loaded once, before the keys or for each group. With two row tiles there is a
    # group of 16 keys too, which loads the fragments again that are not kept. Counted is the code that a warp reaches
    # that has not diverged: for others nvcc repeats some of it.
    seen = 0
    for (_, name), text in code(architecture).items():
        if re.search(rf"bandedAttentionTensorCores.*Li{head_size}ELi{row_tiles}E", name):
            keys, steps = 32 if row_tiles == 1 else 32 + 16, head_size // 16
            kept = {32: steps, 64: KEPT_STEPS.get(architecture, steps), 128: 0}[head_size]
            again = steps - kept if row_tiles == 2 else 0
            products = 2 * (keys // 8) * steps
            blocks = sass.basic_blocks(text).values()
            assert sum(b.count("HMMA") for b in blocks) == products * row_tiles, name
            assert sum(b.count("LDSM") for b in blocks) == products // 2 + (steps + again) * row_tiles, name
            seen += 1
    assert seen == 2


# Part of a kernel's name -> the most registers that it takes on any architecture.
REGISTERS = {
    "bandedAttentionFp32ILi32E": 96,
    "bandedAttentionFp32ILi64E": 128,
    "bandedAttentionFp32ILi128E": 168,
    "globalAttentionTensorCores.*Li128E": 64,
    "globalAttentionTensorCores.*Li1024E": 128,
    "globalAttentionFp32": 168,
    "combineParts": 48,
}


@pytest.mark.parametrize("name", REGISTERS)
def test_the_other_kernels_keep_to_their_registers(name: str, resources: dict[tuple[str, str], dict[str, int]]) -> None:
    used = {key: usage["REG"] for key, usage in resources.items() if re.search(name, key[1])}
    assert {arch for arch, _ in used} == ARCHITECTURES
    assert max(used.values()) <= REGISTERS[name], used


# Architecture, head size and queries of a block -> registers, and instructions of a warp: for a tile without its
# groups, for a group of 32 keys that all its queries see, for another group, once, and for a group of at most 16 global
# tokens, which only blocks of 128 queries have. They were made by nvcc 13.0 and are printed by
# `python -m scripts.bench.kernel_resources --budgets`; another version may add 3 % to the instructions.
BUDGETS = {
    ("sm_80", 32, 128): (123, 140, 235, 343, 684, 134),
    ("sm_80", 32, 64): (88, 132, 122, 193, 516, 0),
    ("sm_80", 64, 128): (168, 149, 304, 412, 1002, 182),
    ("sm_80", 64, 64): (126, 134, 155, 224, 674, 0),
    ("sm_80", 128, 128): (234, 169, 452, 558, 1649, 291),
    ("sm_80", 128, 64): (153, 166, 289, 359, 992, 0),
    ("sm_86", 32, 128): (128, 139, 235, 343, 685, 134),
    ("sm_86", 32, 64): (89, 132, 122, 193, 519, 0),
    ("sm_86", 64, 128): (190, 149, 286, 394, 1004, 164),
    ("sm_86", 64, 64): (127, 134, 155, 224, 678, 0),
    ("sm_86", 128, 128): (237, 169, 452, 558, 1653, 291),
    ("sm_86", 128, 64): (154, 164, 289, 359, 996, 0),
    ("sm_89", 32, 128): (128, 139, 235, 343, 685, 134),
    ("sm_89", 32, 64): (89, 132, 122, 193, 519, 0),
    ("sm_89", 64, 128): (190, 149, 286, 394, 1004, 164),
    ("sm_89", 64, 64): (127, 134, 155, 224, 678, 0),
    ("sm_89", 128, 128): (237, 169, 452, 558, 1653, 291),
    ("sm_89", 128, 64): (154, 164, 289, 359, 996, 0),
    ("sm_90", 32, 128): (124, 149, 235, 343, 766, 134),
    ("sm_90", 32, 64): (86, 134, 124, 194, 563, 0),
    ("sm_90", 64, 128): (167, 158, 292, 398, 1113, 172),
    ("sm_90", 64, 64): (125, 140, 156, 225, 743, 0),
    ("sm_90", 128, 128): (236, 178, 452, 558, 1815, 291),
    ("sm_90", 128, 64): (153, 164, 289, 359, 1088, 0),
    ("sm_100", 32, 128): (147, 165, 200, 347, 763, 81),
    ("sm_100", 32, 64): (107, 124, 114, 176, 575, 0),
    ("sm_100", 64, 128): (165, 172, 255, 401, 1079, 120),
    ("sm_100", 64, 64): (128, 154, 145, 207, 738, 0),
    ("sm_100", 128, 128): (251, 189, 356, 502, 1701, 184),
    ("sm_100", 128, 64): (181, 163, 214, 276, 1070, 0),
    ("sm_120", 32, 128): (144, 165, 234, 381, 775, 97),
    ("sm_120", 32, 64): (106, 124, 130, 192, 583, 0),
    ("sm_120", 64, 128): (203, 174, 303, 450, 1100, 142),
    ("sm_120", 64, 64): (128, 154, 172, 234, 751, 0),
    ("sm_120", 128, 128): (251, 189, 461, 607, 1746, 233),
    ("sm_120", 128, 64): (180, 164, 254, 316, 1094, 0),
}


@every_architecture
def test_the_kernels_of_banded_attention_keep_to_their_budgets(
    architecture: str, code: Code, resources: dict[tuple[str, str], dict[str, int]]
) -> None:
    assert {arch for arch, *_ in BUDGETS} == ARCHITECTURES
    budgets = kernel_resources.budgets(code(architecture), resources)
    expected = {key for key in BUDGETS if key[0] == architecture}
    assert {(row["architecture"], row["head_size"], row["queries"]) for row in budgets} == expected
    for row in budgets:
        registers, *instructions = BUDGETS[row["architecture"], row["head_size"], row["queries"]]
        assert row["local_bytes"] == 0, row
        assert row["registers"] <= registers, row
        for name, limit in zip(("tile", "whole", "group", "once", "few"), instructions, strict=True):
            assert 0.5 * limit < row[name] <= 1.03 * limit or row[name] == limit == 0, (name, limit, row)
        assert row["HMMA"] == row["head_size"] * row["queries"] // 128, row  # scores and context of 32 keys
        assert row["LDGSTS"] == row["head_size"] // 8, row  # a thread's part of 64 keys and values


H100 = {"gpu": "H100 SXM", "queries": 128, "tokens": 4096}


@pytest.fixture(scope="module")
def rows(code: Code, resources: dict[tuple[str, str], dict[str, int]]) -> list[dict[str, Any]]:
    """The rows of `kernel_resources.report` for blocks of 128 queries and 4,096 tokens on an H100."""
    found = kernel_resources.rows_of("sm_90", code("sm_90"), resources)
    return [row for row in found if row.items() >= H100.items()]


def test_no_resource_of_an_h100_takes_more_than_115_us_at_batch_8_and_4096_tokens(rows: list[dict[str, Any]]) -> None:
    (row,) = (row for row in rows if row["batch"] == 8)
    assert max(row["us"].values()) < 115, row["us"]
    assert row["us"].keys() == kernel_resources.UNITS.keys()


def test_one_wave_of_an_h100_takes_all_blocks_at_batch_1_and_4096_tokens(rows: list[dict[str, Any]]) -> None:
    (row,) = (row for row in rows if row["batch"] == 1)
    assert row["waves"] <= 1


@pytest.mark.slow
def test_the_report_has_the_rows_of_all_gpus(readable: Path, rows: list[dict[str, Any]]) -> None:
    report = kernel_resources.report(readable)
    assert [row for row in report if row.items() >= H100.items()] == rows
    assert {row["gpu"] for row in report} == {gpu.name for gpu in kernel_resources.GPUS.values()}


@every_architecture
def test_every_asynchronous_copy_is_of_16_bytes(architecture: str, code: Code) -> None:
    for key, text in code(architecture).items():
        copies = re.findall(r"LDGSTS[.\w]*", text)
        assert all(".128" in copy for copy in copies), (key, set(copies))


def _node_file(folder: Path, op: str, **attributes: Any) -> Path:
    """An ONNX file with one attention node and no function for it."""
    names = ["query", "key", "value", "key_mask", "global_index", "global_context"][: 6 if op.startswith("B") else 4]
    inputs = []
    for name in names:
        integer = name in ("key_mask", "global_index")
        axes = ["b", "g" if name.startswith("global") or (name == "query" and len(names) == 4) else "s"]
        shape = axes if integer else [*axes, 64]
        inputs.append(helper.make_tensor_value_info(name, TensorProto.INT32 if integer else TensorProto.FLOAT, shape))
    output = helper.make_tensor_value_info("context", TensorProto.FLOAT, None)
    node = helper.make_node(
        op, names, ["context"], "attention", domain="lfx", plugin_version="1", plugin_namespace="lfx"
    )
    for name, value in attributes.items():
        node.attribute.append(helper.make_attribute(name, value))
    graph = helper.make_graph([node], "one", inputs, [output])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("lfx", 1)]
    path = folder / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def _build(
    folder: Path, library: Path, op: str, log: Callable[[str], None] = print, **attributes: Any
) -> dict[str, Any]:
    """Builds a plan of the node for batch 2, 40 tokens and 3 slots; returns the result of `run_tensorrt`."""
    names = ["query", "key", "value", "key_mask", "global_index", "global_context"][: 6 if op.startswith("B") else 4]
    shapes = {}
    for name in names:
        rows = 3 if name.startswith("global") or (name == "query" and len(names) == 4) else 40
        shape = (2, rows) if name in ("key_mask", "global_index") else (2, rows, 64)
        shapes[name] = (shape, shape, shape)
    job = {
        "module": "tensorrt_rtx",
        "extra": "rtx",
        "onnx": str(_node_file(folder, op, **attributes)),
        "plan": str(folder / "one.plan"),
        "plugin": str(library),
        "target": "sm89",
        "profiles": [shapes],
        "workspace_bytes": None,
        "optimization_level": None,
        "timing_cache": None,
        "flags": [],
    }
    return run_tensorrt(job, folder, lambda step: None, log)


BANDED = {"num_heads": 2, "window": 8, "dilation": 1, "causal": 0, "scale": 0.0}


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("BandedAttention", BANDED),
        ("BandedAttention", {"num_heads": 1, "window": 0}),
        ("GlobalAttention", {"num_heads": 4}),
    ],
    ids=["all attributes", "defaults", "global"],
)
def test_tensorrt_takes_the_plugin(op: str, attributes: dict[str, Any], library: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert _build(tmp_path, library, op, **attributes)["plugin_layers"] == 1


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("BandedAttention", {"num_heads": 0}, "num_heads 0 is out of range; it must be 1 to 1024"),
        ("BandedAttention", {"num_heads": None}, "num_heads 0 is out of range"),
        ("BandedAttention", {"window": None}, "window -1 is out of range; it must be 0 or more"),
        ("BandedAttention", {"window": -5}, "window -5 is out of range"),
        ("BandedAttention", {"dilation": 0}, "dilation 0 is out of range; it must be 1 or more"),
        ("BandedAttention", {"causal": 2}, "causal 2 is out of range; it must be 0 or 1"),
        ("BandedAttention", {"scale": -1.0}, "scale -1.000000 is out of range"),
        ("BandedAttention", {"num_heads": 3}, "query has width 64; it must be a multiple of num_heads 3"),
        ("BandedAttention", {"num_heads": 16}, "the head size must be a multiple of 8"),
        ("GlobalAttention", {"num_heads": -1}, "num_heads -1 is out of range"),
        ("GlobalAttention", {"scale": float("inf")}, "scale inf is out of range"),
    ],
)
def test_wrong_attributes_are_refused_by_name(
    op: str, change: dict[str, Any], reason: str, library: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    attributes = {**(BANDED if op == "BandedAttention" else {"num_heads": 4}), **change}
    logged: list[str] = []
    given = {name: value for name, value in attributes.items() if value is not None}
    with pytest.raises(BuildError):
        _build(tmp_path, library, op, logged.append, **given)
    assert any(reason in line for line in logged), logged


def test_the_rtx_library_is_found_under_the_name_that_its_parser_opens(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert (Path(_named_library(tmp_path)) / "libtensorrt_rtx.so").exists()


def test_a_file_that_is_no_library_is_a_build_error(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(BuildError):
        _build(tmp_path, tmp_path / "broken.so", "GlobalAttention", num_heads=4)
