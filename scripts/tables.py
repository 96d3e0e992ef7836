"""Write the tables and the chart of README and docs from docs/records: `python scripts/tables.py`.

A table is the text between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

from lfx.runtime.batching import TOKEN_BUDGET
from lfx.runtime.bench import plot

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "plugins").glob("*.md")))
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _hardware(row: dict[str, Any]) -> str:
    packages = ("torch", "transformers", "onnxruntime")
    versions = ", ".join(f"{name} {row['versions'][name]}" for name in packages)
    return f"{row['cpu']}, {row['cores']} cores; {versions}; {row['date']}"


def cpu() -> str:
    """Make the table of latency, speed-up and memory against Hugging Face eager."""
    records = record.read("cpu")
    peaks = {(row["seqlen"], row["contender"]): row["peak_bytes"] / 1e9 for row in record.read("memory")}
    rows = []
    for row in records:
        eager, ours = row["contenders"]["huggingface-eager"], row["contenders"]["lfx-onnxruntime"]
        rows.append(
            [
                f"{row['seqlen']:,}",
                f"{row['globals']}",
                _time(eager["median_ms"]),
                _time(ours["median_ms"]),
                f"**{row['speedup']:.2f}**",
                f"{ours['tokens_per_second']:,.0f}",
                f"{row['share_of_product']:.2f}",
                " / ".join(f"{peaks[row['seqlen'], name]:.2f}" for name in row["contenders"]) + " GB",
                f"{row['max_difference']:.1e}",
            ]
        )
    header = ["tokens", "globals", "Hugging Face eager", "lfx", "times as fast", "lfx tokens/s"]
    header += ["share of MatMul's speed", "peak memory, HF / lfx", "largest difference"]
    note = f"\nBase shape, fp32, batch 1, {records[0]['threads']} threads. {_hardware(records[0])}.\n"
    return _rows(header, rows) + note + _growth(records)


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def _growth(records: list[dict[str, Any]]) -> str:
    rows = {(row["seqlen"], row["globals"]): row for row in records}
    if not {(4096, 1), (16384, 1)} <= set(rows):
        return ""
    short, long = rows[4096, 1], rows[16384, 1]
    ours = [row["contenders"]["lfx-onnxruntime"]["median_ms"] for row in (short, long)]
    products = 4 * short["product_flops_per_second"] / long["product_flops_per_second"]
    return (
        f"From 4,096 to 16,384 tokens, four times as many, the time of lfx grows {ours[1] / ours[0]:.2f} times, and "
        f"that of the MatMul beside it {products:.2f} times.\n"
    )


def export() -> str:
    """Make the table of an export's time and memory."""
    rows = [
        [
            f"{row['max_seqlen']:,}",
            f"{row['export_seconds']:.0f} s",
            f"{row['export_peak_memory_bytes'] / 1e9:.2f} GB",
            f"{row['validation_seconds']:.0f} s",
            f"{row['validation_peak_memory_bytes'] / 1e9:.2f} GB",
            f"{row['bundle_bytes'] / 1e6:,.0f} MB",
            f"{max(row['max_abs_error'].values()):.1e}",
        ]
        for row in record.read("export")
    ]
    header = ["longest sequence", "export", "its peak memory", "validation", "its peak memory", "bundle"]
    header.append("largest error against float64")
    return _rows(header, rows)


def sizes() -> str:
    """Make the table of the installed size by extras."""
    records = record.read("sizes")
    rows = [
        [f"`[{','.join(row['extras'])}]`", str(row["packages"]), f"{row['installed_bytes'] / 1e6:,.0f} MB"]
        for row in records
    ]
    return _rows(["extras", "packages", "installed"], rows) + (
        f"\nWithout Python and lfx itself. Linux on x86-64, Python {records[0]['python']}, torch "
        f"{records[0]['versions']['torch']}; {records[0]['date']}.\n"
    )


def peers() -> str:
    """Make the table of the nine cases with each tool."""
    records = record.read("peers")
    by_tool: dict[str, dict[str, Any]] = {}
    for row in records:
        by_tool.setdefault(row["tool"], row)
    rows = []
    for tool, row in by_tool.items():
        version = row["versions"].get(tool.split()[0], "")
        if row.get("error"):
            result = f"export fails: `{row['error'].split(':')[0]}`"
        else:
            crashed = f", {row['crashed']} crash" if row["crashed"] else ""
            result = f"largest difference {row['max_difference']:.1e}{crashed}"
        name = f"**{tool}**" if tool == "lfx" else f"{tool} {version}".rstrip()
        rows.append([name, f"{row['right']} of {row['cases']}", result])
    note = (
        f"\n{records[0]['cases']} cases of length, batch and global tokens on a two-layer random Longformer, right = "
    )
    note += f"within {records[0]['tolerance']:g} of Hugging Face eager fp32. {_hardware(records[0])}.\n"
    return _rows(["tool", "right", "what happened"], rows) + note


def compatibility() -> str:
    """Make the table of other clients of the hub."""
    records = record.read("compatibility")
    rows = []
    for row in records:
        error = str(row.get("error", "")).replace("|", " ").replace("`", "'")
        result = f"no: `{error[:100]}{'…' if len(error) > 100 else ''}`"
        if "error" not in row:
            answer = "yes" if row["is_right"] else "**wrong numbers, no error**"
            result = f"{answer}: {row['output']}, largest difference {row['max_difference']:.1e}"
        rows.append([f"{row['client']} {row['version']}", row["model"], row["how"], result])
    dates = " and ".join(sorted({row["date"] for row in records}))
    note = f"\nTiny models; the difference is that from Engine, or for RoBERTa from ONNX Runtime. {dates}.\n"
    return _rows(["client", "model", "option", "runs"], rows) + note


def documents() -> str:
    """Make the paragraphs about mixed lengths and many threads."""
    lines = []
    for row in record.read("mixed"):
        rates = row["tokens_per_second"]
        lines.append(
            f"{row['documents']} documents of {row['shortest']} to {row['longest']:,} tokens, base shape, "
            f"{row['threads']} threads: {rates['mixed']:.0f} tokens/s. Documents that all have "
            f"{row['uniform_length']:,} tokens, in turns with them: {rates['uniform']:.0f} tokens/s. The median over "
            f"the turns of the first rate divided by the second is {row['mixed_over_uniform']:.2f}. Largest "
            f"difference from running {row['one_by_one']['documents']} of the documents one by one: "
            f"{row['one_by_one']['largest_difference']:.1e}. {_hardware(row)}."
        )
    for row in record.read("soak"):
        resident = [f"{size / 1e6:.0f}" for size in row["resident_bytes"]]
        same = "all bit-identical to a single thread's" if row["bit_identical"] else "NOT all the same"
        lines.append(
            f"{row['threads']} threads on one Engine for {row['minutes']:g} minutes: {row['requests']:,} answers, "
            f"{same}; resident memory after each tenth of the time: {', '.join(resident)} MB. {_hardware(row)}."
        )
    return "\n\n".join(lines) + "\n"


def serve() -> str:
    """Make the table of the load test: the server beside `Engine.run`."""
    return _load_test("serve")


def triton() -> str:
    """Make the table of the load test of Triton, beside `Engine.run`."""
    return _load_test("triton")


def _load_test(name: str) -> str:
    if not (record.RECORDS / f"{name}.jsonl").exists():
        return f"No load test is recorded yet: `python -m scripts.bench.{name}`.\n"
    records, rows = record.read(name), []
    for row in records:
        latency, resident = row["latency_ms"], [size / 1e6 for size in row["resident_bytes"]]
        others = {status: count for status, count in row["statuses"].items() if status != "200"}
        rows.append(
            [
                f"{row['clients']}",
                f"{row['answered']:,}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['share_of_engine']:.0%}",
                *(_time(latency[name]) for name in ("p50", "p95", "p99")),
                ", ".join(f"{count:,} with {status}" for status, count in others.items()) or "none",
                f"{row['broken_connections']}",
                f"{row['largest_difference']:.1e}",
                f"{resident[0]:.0f} to {resident[-1]:.0f} MB",
            ]
        )
    first = records[0]
    header = [
        "clients",
        "answers",
        "tokens/s",
        "share of `Engine.run`",
        "median",
        "p95",
        "p99",
        "refused",
        "broken connections",
    ]
    header += ["largest difference from one-by-one runs", "memory, first and last tenth"]
    note = (
        f"\n{first['shape']}, {first['threads']} threads, {first['seconds']:g} s each, {first['documents']} documents "
        f"of {first['shortest']} to {first['longest']:,} tokens, sent repeatedly; `Engine.run` gets all documents in "
        f"one list, before and after the clients. {_hardware(first)}.\n\n"
        f"![Throughput and latency over the number of clients](figures/{name}.png)\n"
    )
    return _rows(header, rows) + note


def backends() -> str:
    """Make a table per CPU: seconds of each contender, and its speed relative to the first."""
    records = record.read("backends")
    return "\n".join(_backends([row for row in records if row["cpu"] == cpu]) for cpu in _cpus(records))


def _cpus(records: list[dict[str, Any]]) -> list[str]:
    """Return the CPUs of the records, the latest measured first."""
    dates = {row["cpu"]: row["date"] for row in sorted(records, key=lambda row: row["date"])}
    return sorted(dates, key=dates.__getitem__, reverse=True)


def _backends(records: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["contender"] for row in records))
    names.sort(key=lambda name: (name.startswith("lfx"), name.rpartition(" ")[2] != "fp32", name))
    by_cell = {(row["batch"], row["seqlen"], row["contender"]): row for row in records}
    rows = []
    for batch, seqlen in sorted({(row["batch"], row["seqlen"]) for row in records}):
        cells = [f"{batch}", f"{seqlen:,}"]
        for name in names:
            row = by_cell.get((batch, seqlen, name))
            cells.append(f"{row['p50_ms'] / 1000:.2f} s, {1 / row['times_the_first']:.2f}" if row else "")
        rows.append(cells)
    rounds = {
        batch: sorted({r["rounds"] for r in records if r["batch"] == batch}) for batch in (r["batch"] for r in records)
    }
    turns = ", ".join(f"{' or '.join(map(str, counts))} at batch {batch}" for batch, counts in rounds.items())
    note = f"\nBase shape, {records[0]['threads']} threads, no global tokens. Seconds, and how many times as fast as "
    note += f"{names[0]} in the same run, not the same for all cells; medians of turns ({turns}). "
    latest = max(records, key=lambda row: row["date"])
    note += f"{_hardware(latest)}, OpenVINO {latest['versions']['openvino']}"
    others = {row["contender"]: row["date"] for row in records if row["date"] != latest["date"]}
    note += "".join(f"; {name}: {date}" for name, date in others.items()) + ".\n"
    return _rows(["batch", "tokens", *names], rows) + note


def blocks() -> str:
    """Make the table of latency by the number of queries in a block."""
    records = record.read("blocks")
    sizes = sorted({row["block"] for row in records})
    times = {(row["backend"], row["block"]): row["p50_ms"] / 1000 for row in records}
    rows = []
    for backend in dict.fromkeys(row["backend"] for row in records):
        rows.append([backend, *(f"{times[backend, size]:.2f} s" for size in sizes)])
    note = f"\nOne sequence of {records[0]['seqlen']:,} tokens, medians of {records[0]['rounds']} turns. "
    note += f"{_hardware(records[0])}.\n"
    return _rows(["queries in a block", *map(str, sizes)], rows) + note


def attention() -> str:
    """Make the table of one layer's attention, as nodes and as one operator."""
    records = record.read("attention")
    rows = [
        [row["contender"], f"{row['p50_ms']:.0f} ms ({row['p5_ms']:.0f} to {row['p95_ms']:.0f})"] for row in records
    ]
    note = f"\nMedian (5th to 95th percentile) of {records[0]['rounds']} turns; {records[0]['seqlen']:,} tokens "
    note += f"of the base shape, {records[0]['threads']} threads. {_hardware(records[0])}.\n"
    return _rows(["attention of one layer", "ONNX Runtime"], rows) + note


def quantizers() -> str:
    """Make the table of the quantizers' errors and latencies."""
    records = record.read("quantizers")
    rows = [
        [row["contender"], f"{row['cosine']:.5f}", f"{row['max_abs_error']:.3f}", f"{row['p50_ms']:.0f} ms"]
        for row in records
    ]
    half, seqlen = records[0]["windows"] // 2, records[0]["seqlen"]
    note = f"\nBase shape, random weights; {half} windows of {seqlen} tokens calibrate, and {half} others are compared "
    note += f"with float32. {_hardware(records[0])}, OpenVINO {records[0]['versions']['openvino']}, "
    note += f"NNCF {records[0]['nncf']}.\n"
    return _rows(["", "cosine", "largest error", "one window"], rows) + note


def profile() -> str:
    """Make a table per CPU: share of each part of the model in the latency, and the upper bound on the speed."""
    records = record.read("profile")
    return "\n".join(_profile([row for row in records if row["cpu"] == cpu]) for cpu in _cpus(records))


def _profile(records: list[dict[str, Any]]) -> str:
    libraries = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    ratios = {
        (r["seqlen"], r["contender"]): 1 / r["times_the_first"]
        for r in record.read("backends")
        if r["batch"] == 1 and r["cpu"] == records[0]["cpu"]
    }
    parts = list(records[0]["shares"])
    rows = []
    for row in records:
        name = f"{libraries[row['backend']]} {row['precision']}"
        ratio = ratios[row["seqlen"], f"lfx, {name}"]
        shares = [f"{row['shares'][part]:.0%}" for part in parts]
        limit = f"{ratio / row['shares']['linear layers']:.2f}"
        rows.append([f"{row['seqlen']:,}", name, *shares, f"{ratio:.2f}", limit])
    note = f"\nOne sequence, {records[0]['threads']} threads; the ratios are of the table above. "
    note += f"{_hardware(records[0])}, "
    note += f"OpenVINO {records[0]['versions']['openvino']}.\n"
    header = ["tokens", "backend", *parts, "times as fast as Hugging Face", "if the linear layers were all"]
    return _rows(header, rows) + note


def long() -> str:
    """Make the table of long sequences: time, memory, and the errors of the rows that are compared."""
    records = record.read("long")
    rows = []
    for row in records:
        errors = []
        for model in ("whole", "one layer"):
            checks = [check for check in row["checks"] if check["model"] == model]
            worst = max(checks, key=lambda check: check["error"] / check["tolerance"])
            counted = sum(check["rows"] for check in checks)
            errors.append(f"{worst['error']:.1e} of {worst['tolerance']:.1e}, {counted} rows")
        memory = f"{row['peak_bytes'] / 1e9:.2f} GB"
        rows.append(
            [f"{row['seqlen']:,}", _time(row["median_ms"]), f"{row['tokens_per_second']:,.0f}", memory, *errors]
        )
    first, last = records[0], records[-1]
    header = ["tokens", "time", "tokens/s", "peak memory", f"parity error, {first['layers']} layers"]
    header.append(f"parity error, one layer with {first['checks'][-1]['globals']} global tokens")
    times = [last[figure] / first[figure] for figure in ("seqlen", "median_ms", "peak_bytes")]
    above = [row["peak_bytes"] - row["open_bytes"] for row in (first, last)]
    note = f"\nBase shape of {first['layers']} layers, fp32, batch 1, without global tokens unless stated, "
    note += f"{first['threads']} threads, medians of {first['rounds']} turns. Parity errors are against float64, each "
    note += f"followed by its tolerance. {_hardware(first)}.\n"
    note += f"From {first['seqlen']:,} to {last['seqlen']:,} tokens, {times[0]:.0f} times as many, the time grows "
    note += f"{times[1]:.2f} times and the peak memory {times[2]:.2f} times (without the memory of the open Engine, "
    note += f"{above[1] / above[0]:.2f} times).\n"
    return _rows(header, rows) + note


def generation() -> str:
    """Make the table of prefill, decoding and memory of text generation against Hugging Face."""
    if not (record.RECORDS / "generation.jsonl").exists():
        return "Not measured yet.\n"
    records = record.read("generation")
    rows = []
    for row in records:
        is_reference = row["times_hugging_face_prefill"] == row["times_hugging_face_decode"] == 1
        rows.append(
            [
                f"{row['seqlen']:,}",
                row["contender"],
                _time(row["prefill_p50_ms"]),
                "" if is_reference else f"**{row['times_hugging_face_prefill']:.2f}**",
                f"{row['decode_tokens_per_second']:,.1f}",
                "" if is_reference else f"**{row['times_hugging_face_decode']:.2f}**",
                f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
            ]
        )
    header = ["tokens", "contender", "prefill", "times as fast", "new tokens/s", "times as fast", "peak memory"]
    first = records[0]
    turns = {row["seqlen"]: row["rounds"] for row in records}
    counts = " and ".join(f"{count} at {seqlen:,} tokens" for seqlen, count in turns.items())
    int8 = " unless the row says int8" if any(row["precision"] == "int8" for row in records) else ""
    note = f"\nled-base-16384's config with random weights, fp32{int8}, batch 1, {first['new_tokens']} new tokens by "
    note += f"greedy search, {first['threads']} threads, medians of turns: {counts}. {_hardware(first)}.\n"
    return _rows(header, rows) + note


def ray() -> str:
    """Make the table and the figure of `lfx map` in a simulated cluster."""
    if not (record.RECORDS / "ray.jsonl").exists():
        return "Not measured yet.\n"
    (row,) = record.read("ray")
    run_seconds = statistics.median(row["run_seconds"])
    rows = [["`lfx run`", f"{run_seconds:.1f} s", f"{row['documents'] / run_seconds:,.0f}", "", ""]]
    for pool in row["pools"]:
        seconds, start = (statistics.median(pool[name]) for name in ("seconds", "start_seconds"))
        same = "the same" if pool["same_rows"] else "NOT the same"
        name = f"`lfx map`, {pool['actors']} actor{'s' * (pool['actors'] > 1)}"
        rate = statistics.median(pool["documents_per_second"])
        rows.append([name, f"{seconds:.1f} s", f"{rate:,.0f}", same, f"{start:.1f} s"])
    killed = row["killed"]
    same = "the same" if killed["same_rows"] else "NOT the same"
    name = f"{killed['actors']} actors, one killed after {killed['killed_at_seconds']:.1f} s"
    rows.append(
        [
            name,
            f"{killed['seconds']:.1f} s",
            f"{killed['documents_per_second']:,.0f}",
            same,
            f"{killed['start_seconds']:.1f} s",
        ]
    )
    largest = max(item["largest_difference"] for item in (*row["pools"], killed))
    note = f"\n{row['documents']:,} documents, {row['tokens']:,} tokens, {row['shape']}, each Engine with "
    note += f"{row['threads']} thread; {row['machines']} simulated machines on one of {row['cores']} cores, medians of "
    note += (
        f"{row['rounds']} turns. The time begins when the first actor has opened the model, documents/s when all have. "
    )
    note += f"Overhead of one actor over `lfx run`: {row['overhead']:.1%}. Largest "
    note += f"difference of an output: {largest:.1e}. {_hardware(row)}, Ray {row['ray']}.\n"
    header = ["", "time", "documents/s", "rows", "start of the first actor"]
    figure = (
        "\n![Documents per second by the number of actors, and progress while an actor is killed](figures/ray.svg)\n"
    )
    return _rows(header, rows) + note + figure


# A cluster's plan: documents of one length, on machines of 16 cores, each with 8 Engines of 2 threads.
PLAN = {"documents": 1_000_000, "lengths": (128, 512, 1024, 4096), "cores": 16, "hours": 24}


def kernels() -> str:
    """Make the table of lfx's CPU kernels beside the function bodies and Hugging Face eager."""
    records = record.read("kernels")
    names = ("huggingface-eager", "fp32-function", "fp32-fused", "int8-function", "int8-fused")
    rows = []
    for seqlen in sorted({row["seqlen"] for row in records}):
        by_contender = {row["contender"]: row for row in records if row["seqlen"] == seqlen}
        cells = []
        for name in names:
            if (row := by_contender.get(name)) is None:
                cells.append("not measured")
                continue
            attention = "" if row["attention_ms"] is None else f", attention {_time(row['attention_ms'])}"
            cells.append(f"{_time(row['p50_ms'])}{attention}, {row['peak_memory_bytes'] / 1e9:.2f} GB")
        rows.append([f"{seqlen:,}", *cells])
    header = [
        "tokens",
        "Hugging Face eager fp32",
        "fp32, functions",
        "fp32, kernels",
        "int8, functions",
        "int8, kernels",
    ]
    return f"{_hardware(records[0])}\n\n{_rows(header, rows)}"


def torch() -> str:
    """Make the table of a model of transformers before and after `lfx.torch.accelerate`."""
    if not (record.RECORDS / "torch.jsonl").exists():
        return "Not measured yet: `python -m scripts.bench.torch_ops`.\n"
    records = record.read("torch")
    rows = []
    for row in records:
        eager, ours = row["contenders"]["huggingface-eager"], row["contenders"]["lfx-torch"]
        rows.append(
            [
                f"{row['seqlen']:,}",
                _time(eager["median_ms"]),
                _time(ours["median_ms"]),
                f"**{row['speedup']:.2f}**",
                f"{eager['peak_bytes'] / 1e9:.2f} / {ours['peak_bytes'] / 1e9:.2f} GB",
                f"{row['max_difference']:.1e}",
            ]
        )
    header = [
        "tokens",
        "Hugging Face eager",
        "accelerated",
        "times as fast",
        "peak memory of both",
        "largest difference",
    ]
    note = f"\nBase shape, fp32, batch 1, one global token, {records[0]['threads']} threads. {_hardware(records[0])}.\n"
    return _rows(header, rows) + note


def _gpu(row: dict[str, Any]) -> str:
    versions = {"torch": row["torch"], **row["versions"]}
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{row['gpu'].split(',')[0]}, CUDA {row['cuda']}; {names}; {row['date']}"


def _measured(name: str) -> list[dict[str, Any]]:
    """Return the rows of a record of a GPU benchmark without its claims."""
    return [row for row in record.read(name) if "contenders" in row]


def gpu_model() -> str:
    """Make the table of the base model on a GPU."""
    records = sorted((row for row in _measured("gpu_model") if row["batch"] == 1), key=lambda row: int(row["seqlen"]))
    names = ("huggingface", "lfx-calls", "flex", "lfx")
    rows = []
    for row in records:
        times = {name: row["contenders"][name]["median_us"] / 1e3 for name in names}
        error = row["contenders"]["lfx"]["max_error"]
        cells = [f"{times[name]:.2f} ms" for name in names]
        called, in_graph = (times["huggingface"] / times[name] for name in ("lfx-calls", "lfx"))
        cells += [f"{called:.1f}, **{in_graph:.1f}**", f"{error:.1e}, {row['witness_error']:.1e}"]
        rows.append([f"{row['seqlen']:,}", *cells])
    header = [
        "tokens",
        "Hugging Face, called",
        "accelerated, called",
        "FlexAttention, in a CUDA graph",
        "accelerated, in a CUDA graph",
        "times as fast as Hugging Face: called, in a graph",
        "largest error: accelerated, Hugging Face",
    ]
    return f"{_rows(header, rows)}\nBase shape, float16, batch 1, one global token. {_gpu(records[0])}.\n"


def gpu_summary() -> str:
    """Make the README's sentence on the base model on a GPU."""
    records = {row["seqlen"]: row for row in _measured("gpu_model") if row["batch"] == 1}
    rows = [records[seqlen]["contenders"] for seqlen in (4096, 16384)]
    times = " and ".join(f"{row['lfx']['median_us'] / 1e3:.1f} ms" for row in rows)
    called, captured = (
        " and ".join(f"{row['huggingface']['median_us'] / row[name]['median_us']:.1f}" for row in rows)
        for name in ("lfx-calls", "lfx")
    )
    gpu = records[4096]["gpu"].split(",")[0]
    return (
        f"On a GPU ({gpu}, float16) the accelerated PyTorch model takes {times} at 4,096 and 16,384 tokens in a\n"
        f"CUDA graph, {captured} times as fast as Hugging Face's, which no graph can capture. Called as that is, it\n"
        f"is {called} times as fast.\n"
    )


def gpu_kernels() -> str:
    """Make the table of BandedAttention beside PyTorch's attentions, in float16."""
    records = [row for row in _measured("gpu_kernels") if row["precision"] == "fp16"]
    records.sort(key=lambda row: (-row["batch"], row["heads"], row["seqlen"]))
    others = ("flex", "flex-64", "sdpa", "huggingface")
    rows = []
    for row in records:
        results = row["contenders"]
        case = [f"{row['batch']} · {row['heads']}", f"{row['seqlen']:,}"]
        ratios = [f"{results[n]['times_slower']:.2f}" if "times_slower" in results[n] else "-" for n in others]
        figures = [f"{results['lfx']['median_us']:,.0f}", f"{row['rates']['tflops']:.0f}"]
        rows.append([*case, *figures, f"{100 * row['rates']['band_of_matmul']:.0f} %", *ratios])
    header = ["batch · heads", "tokens", "µs", "useful TFLOP/s", "of a dense product's rate"]
    header += ["FlexAttention", "FlexAttention, blocks of 64", "SDPA, dense mask", "Hugging Face's chunks, called"]
    return f"{_rows(header, rows)}\nThe last four: their time divided by that of lfx. {_gpu(records[0])}.\n"


def gpu_claims() -> str:
    """Make the table of what was claimed of the kernels and of the base model on a GPU, and what was measured."""
    words = {True: "yes", False: "no", None: "not measured"}
    records = {name: record.read(name) for name in ("gpu_kernels", "gpu_model")}
    claims = [row for rows in records.values() for row in rows if "claim" in row]
    rows = [[row["claim"], words[row["holds"]], row["figure"]] for row in claims]
    return f"{_rows(['claim', 'holds', 'measured'], rows)}\n{_gpu(records['gpu_kernels'][0])}.\n"


def plan() -> str:
    """Make the table that plans a cluster from the records of one Engine, with its arithmetic."""
    rates = {row["seqlen"]: row["contenders"]["lfx-onnxruntime"]["tokens_per_second"] for row in record.read("cpu")}
    peaks = {r["seqlen"]: r["peak_bytes"] for r in record.read("memory") if r["contender"] == "lfx-onnxruntime"}
    peak = peaks[TOKEN_BUDGET]
    threads = record.read("cpu")[0]["threads"]
    overhead = _overhead()
    engines = PLAN["cores"] // threads
    rows = []
    for length in PLAN["lengths"]:
        per_day = rates[length] * 3600 * PLAN["hours"] / (1 + overhead)  # tokens of one Engine
        needed, day = f"{PLAN['documents'] * length / 1e6:,.0f} million", f"{per_day / 1e6:,.1f} million"
        machines = PLAN["documents"] * length / (per_day * engines)
        division = f"{needed} / ({day} · {engines}) = {machines:.1f}, so {math.ceil(machines):,}"
        rows.append([f"{length:,}", f"{rates[length]:,.0f}", day, f"{per_day / length:,.0f}", division])
    header = ["tokens of a document", "tokens/s of an Engine", "tokens a day", "documents a day", "machines"]
    day, gigabytes = 3600 * PLAN["hours"], peak / 1e9
    note = f"\n{PLAN['documents']:,} documents a day on machines of {PLAN['cores']} cores, each with {engines} actors "
    note += f"of {threads} CPUs. Tokens a day: tokens/s · {day:,} s / {1 + overhead:.2f}, for an overhead of "
    note += f"{overhead:.0%}. Memory of a machine: {engines} · {gigabytes:.2f} GB = {engines * gigabytes:.1f} GB, from "
    note += f"the peak of one Engine with {TOKEN_BUDGET:,} tokens, the largest batch that it makes of documents. "
    note += f"{_hardware(record.read('cpu')[0])}.\n"
    return _rows(header, rows) + note


def _overhead() -> float:
    """The measured overhead of a pool of one actor, at least 0; the allowed one if it is not measured yet."""
    if not (record.RECORDS / "ray.jsonl").exists():
        return 0.15
    return max(float(record.read("ray")[0]["overhead"]), 0.0)


def support() -> str:
    """Make the tables of model classes and features: exported, compared in each backend, built."""
    records = record.read("support")
    tables = []
    for group in dict.fromkeys(row["group"] for row in records):
        rows = [[row["name"], *_support(row)] for row in records if row["group"] == group]
        header = [group, "exported", "parity error", "ONNX Runtime", "OpenVINO"]
        tables.append(_rows([*header, "TensorRT from the function", "TensorRT from the plugin"], rows))
    plan = next(row["plugin"] for row in records if row.get("plugin", {}).get("ok"))
    note = f"\n{_hardware(records[0])}, OpenVINO {records[0]['versions']['openvino']}, {plan['flavor']} for "
    note += f"{plan['target']}.\n"
    return "\n".join(tables) + note


def _support(row: dict[str, Any]) -> list[str]:
    """Make the cells of one model class or feature."""
    if not row["exported"]["ok"]:
        return [_reason(row["exported"]), *[""] * 5]
    compared = [row[backend] for backend in ("onnxruntime", "openvino") if row[backend]["ok"]]
    worst = max(compared, key=lambda cell: cell["error"] / cell["tolerance"], default=None)
    cells = ["yes", f"{worst['error']:.1e} of {worst['tolerance']:.1e}" if worst else ""]
    for backend in ("onnxruntime", "openvino"):
        cells.append(f"{row[backend]['cases']} cases" if row[backend]["ok"] else _reason(row[backend]))
    cells.append("built" if row["function"]["ok"] else _reason(row["function"]))
    counts = "built, {plugin_layers} of {attention_nodes} attention nodes are plugin layers"
    cells.append(counts.format_map(row["plugin"]) if row["plugin"]["ok"] else _reason(row["plugin"]))
    return cells


def _reason(cell: dict[str, Any]) -> str:
    return "no: " + cell["reason"].replace("|", "\\|")


def chart() -> None:
    """Plot tokens per second over length, for all contenders on the latest measured CPU, and the load test."""
    records = record.read("backends")
    plot([row for row in records if row["cpu"] == _cpus(records)[0]], ROOT / "docs" / "figures" / "throughput.png")
    import figures

    for name, label in (("serve", "lfx serve"), ("triton", "Triton")):
        if (record.RECORDS / f"{name}.jsonl").exists():
            figures.load_test(record.read(name), label, ROOT / "docs" / "figures" / f"{name}.png")


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu,
    "kernels": kernels,
    "export": export,
    "sizes": sizes,
    "peers": peers,
    "compatibility": compatibility,
    "documents": documents,
    "serve": serve,
    "triton": triton,
    "backends": backends,
    "blocks": blocks,
    "attention": attention,
    "quantizers": quantizers,
    "profile": profile,
    "long": long,
    "generation": generation,
    "ray": ray,
    "torch": torch,
    "gpu_model": gpu_model,
    "gpu_summary": gpu_summary,
    "gpu_kernels": gpu_kernels,
    "gpu_claims": gpu_claims,
    "plan": plan,
    "support": support,
}


def main() -> int:
    """Write the tables and the chart, or check the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a table differs from the records"
    )
    check = parser.parse_args().check
    if not check:
        chart()
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        updated = _BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)
        if updated != text:
            stale.append(page.name)
            if not check:
                page.write_text(updated, encoding="utf-8")
    if check and stale:
        print(f"tables differ from the records in {', '.join(stale)}; run: python scripts/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
