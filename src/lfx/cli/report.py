"""The page of `lfx parity --report`: verdict, tables and plots in one self-contained HTML file."""

from __future__ import annotations

import datetime
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lfx import __version__
from lfx.errors import InputError, require
from lfx.files import replacing, why_unwritten
from lfx.parity import HISTOGRAM_EDGES, Report
from lfx.runtime.bench import own_style
from lfx.signature import grouped

# Okabe and Ito's palette, which colour-blind readers can distinguish.
_ARTIFACT, _TORCH, _TOLERANCE = "#0072b2", "#e69f00", "#d55e00"
_STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif }
body { color: #1a1a1a; background: #fff }
h1 { font-size: 1.4rem; margin: .5rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.verdict { padding: .8rem 1rem; border-left: .5rem solid; font-size: 1.1rem }
.pass { border-color: #00703c; background: #eaf6ef } .fail { border-color: #b3261e; background: #fceeed }
.verdict p { margin: .3rem 0 0; font-size: 1rem; overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { background: #f4f4f4 } th:first-child, td:first-child { text-align: left }
td.bad { color: #b3261e; font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 } dt { color: #555 }
dd { margin: 0; overflow-wrap: anywhere } figure { margin: 0 0 1rem }
svg { width: 100%; max-width: 42rem; height: auto }
figcaption, .note { color: #555; font-size: .9rem } summary { cursor: pointer; font-weight: 600 }
"""


def write(path: Path, facts: Mapping[str, str], report: Report, layers: Report | None) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        facts: name -> value of the properties that the page lists; "artifact" is required.
        report: the comparison of the outputs.
        layers: the comparison by layer, or None.
    Raises:
        InputError: the file cannot be written.
        DependencyError: matplotlib is not installed.
    """
    failures = report.failures() + (layers.failures() if layers is not None else [])
    parts = [
        _verdict(report, failures),
        "<h2>Artifact and checkpoint</h2>",
        _facts({**facts, "written by": f"lfx {__version__}, {datetime.date.today():%Y-%m-%d}"}),
        "<h2>Outputs</h2>",
        _outputs(report),
        '<p class="note">Each error is the largest absolute error against the dense float64 reference, over all cases. '
        "The tolerance is twice PyTorch's error in the same precision, plus the rounding band. "
        f"{_int8_note(report)}</p>",
        "<h2>Error over length</h2>",
        _figure(lambda axes: _over_length(axes, report), "Largest error of each case; the line is the tolerance."),
        "<h2>Error histogram</h2>",
        _figure(lambda axes: _histogram(axes, report), "Non-zero errors of all numbers, over all outputs and cases."),
    ]
    if layers is not None:
        parts += ["<h2>Error by layer</h2>", _figure(lambda axes: _by_layer(axes, layers), _first_failure(layers))]
        parts.append(f"<details><summary>Table of the layers</summary>{_outputs(layers)}</details>")
    parts += ["<h2>Cases</h2>", f"<details><summary>All {len(report.rows)}</summary>{_cases(report)}</details>"]
    title = f"Parity of {html.escape(Path(facts['artifact']).name)}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )
    page = page.encode("utf-8", "backslashreplace").decode("utf-8")  # a file name may hold invalid UTF-8
    try:
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(why_unwritten(path, error, "choose another --report")) from error


def _verdict(report: Report, failures: list[str]) -> str:
    name, text = ("fail", "Out of tolerance") if failures else ("pass", "In tolerance")
    reasons = "".join(f"<p>{html.escape(line)}</p>" for line in failures)
    detail = f"{', '.join(map(html.escape, report.outputs))}; {len(report.rows)} cases, {report.precision}"
    return f'<div class="verdict {name}"><strong>{text}</strong>: {detail}.{reasons}</div>'


def _facts(facts: Mapping[str, str]) -> str:
    items = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(items)}</dl>"


class _Bad(str):
    """The text of a table cell that is highlighted as out of tolerance."""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make an HTML table; header and cells are plain text, which is escaped here."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    tag = '<td class="bad">' if isinstance(text, _Bad) else "<td>"
    return f"{tag}{html.escape(text)}</td>"


def _outputs(report: Report) -> str:
    labels = any(result.labels for result in report.outputs.values())
    header = ["output", "error", "PyTorch's error", "tolerance", "largest value", "cosine"]
    rows = []
    for name, result in report.outputs.items():
        error = f"{result.error:.2e}"
        row = [name, error if report.passed(name) else _Bad(error), f"{result.witness_error:.2e}"]
        row += [f"{report.tolerance(name):.2e}", f"{result.magnitude:.3g}", f"{result.cosine():.6f}"]
        rows.append(row + ([f"{result.agreeing} of {result.labels}" if result.labels else ""] if labels else []))
    return _table([*header, *(["labels that agree"] if labels else [])], rows)


def _int8_note(report: Report) -> str:
    if report.precision != "int8":
        return ""
    return (
        "PyTorch in int8 is the model with its linear layers quantized with the same scales: the verdict says whether "
        "the artifact computes the quantized model, and cosine and labels measure the loss from int8."
    )


def _cases(report: Report) -> str:
    header = ["batch", "length", "globals", "padding", *report.outputs]
    rows = []
    for case, errors in report.rows:
        row = [str(case.batch), f"{case.seqlen:,}", case.globals, case.padding]
        for name in report.outputs:
            error = f"{errors[name].error:.2e}"
            row.append(error if errors[name].error <= report.tolerance(name) else _Bad(error))
        rows.append(row)
    return _table(header, rows)


def _figure(draw: Callable[[Any], None], caption: str) -> str:
    """Draw a figure and return it as SVG in an HTML figure; caption and labels are plain text."""
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "text.parse_math": False}
    with own_style(**style) as pyplot:
        figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
        draw(axes)
        axes.grid(visible=True, alpha=0.25)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        output = io.StringIO()
        figure.savefig(output, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    svg = re.sub(r"^.*?(?=<svg)", "", output.getvalue(), count=1, flags=re.DOTALL)
    text = html.escape(caption)
    return f'<figure role="img" aria-label="{text}">{svg}<figcaption>{text}</figcaption></figure>'


def _over_length(axes: Any, report: Report) -> None:
    markers = "osD^vPX*"
    for i, (name, group) in enumerate(grouped(report.outputs).items()):  # the largest errors and smallest tolerance
        lengths = [case.seqlen for case, _ in report.rows]
        marker = markers[i % len(markers)]
        for label, colour, values in (
            ("PyTorch", _TORCH, [max(errors[o].witness_error for o in group) for _, errors in report.rows]),
            ("artifact", _ARTIFACT, [max(errors[o].error for o in group) for _, errors in report.rows]),
        ):
            clamped = np.maximum(values, HISTOGRAM_EDGES[0])  # a log axis has no 0
            axes.scatter(lengths, clamped, s=22, marker=marker, color=colour, alpha=0.7, label=f"{label}, {name}")
        tolerance = min(map(report.tolerance, group))
        axes.axhline(tolerance, color=_TOLERANCE, lw=1.2, ls=("--", "-.", ":")[i % 3], label=f"tolerance, {name}")
    axes.set(xlabel="sequence length, tokens", ylabel="largest absolute error", xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _histogram(axes: Any, report: Report) -> None:
    largest = np.zeros(len(HISTOGRAM_EDGES) - 1)
    for label, colour, attribute in (("PyTorch", _TORCH, "witness_histogram"), ("artifact", _ARTIFACT, "histogram")):
        counts = np.sum([getattr(result, attribute) for result in report.outputs.values()], axis=0)
        largest = np.maximum(largest, counts)
        axes.stairs(counts, HISTOGRAM_EDGES, label=label, color=colour, lw=1.6, fill=label == "PyTorch", alpha=0.75)
    filled, visible = np.flatnonzero(largest), np.flatnonzero(largest > largest.max() / 1000)
    if filled.size:  # from the first bar that is high enough to see, to the largest error
        axes.set_xlim(HISTOGRAM_EDGES[max(visible[0] - 1, 0)], HISTOGRAM_EDGES[min(filled[-1] + 2, len(largest))])
    axes.yaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="absolute error", ylabel="number of values", xscale="log")


def _by_layer(axes: Any, layers: Report) -> None:
    names = list(layers.outputs)
    positions = range(len(names))
    for label, colour, values, line in (
        ("tolerance", _TOLERANCE, [layers.tolerance(name) for name in names], "--"),
        ("PyTorch", _TORCH, [layers.outputs[name].witness_error for name in names], "-"),
        ("artifact", _ARTIFACT, [layers.outputs[name].error for name in names], "-"),
    ):
        clamped = np.maximum(values, HISTOGRAM_EDGES[0])  # a log axis has no 0
        axes.plot(positions, clamped, line, marker="o", markersize=4, color=colour, label=label)
    axes.set_xticks(positions, [name.replace("attention_", "") for name in names])
    for tick in axes.get_xticklabels()[sum(name in layers.depth for name in names) :]:
        tick.set(rotation=30, ha="right")
    axes.set(xlabel="attention layer, then outputs", ylabel="largest absolute error", yscale="log")


def _first_failure(layers: Report) -> str:
    first = layers.first_failure()
    return f"First out of tolerance: {first}." if first else "All layers are in tolerance."
