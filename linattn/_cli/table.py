"""The tables of `compare`, and the same numbers as data."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

from linattn._cli.compare import Result, Row
from linattn._cli.info import THREAD_VARIABLES, versions

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "-"
WIDTH = 100  # of the tables where the output is no terminal


def times(x: float, yardstick: float) -> str:
    """x as a multiple of the yardstick."""
    if yardstick <= 0:
        return NOTHING
    ratio = x / yardstick
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def title(result: Result) -> str:
    """What was compared, in one line."""
    q, k, v = result.inputs[:3]
    layer = "" if result.inputs.layer is None else f", layer {result.inputs.layer}"
    n_queries, n_keys, channels = q.shape[-2], k.shape[-2], q.shape[-1]
    tokens = f"{n_queries} tokens" if n_queries == n_keys else f"{n_queries} queries, {n_keys} keys"
    width = f"{channels} channels" if channels == v.shape[-1] else f"{channels} and {v.shape[-1]} channels"
    causal = "causal" if result.causal else "not causal"
    return f"{result.inputs.file}{layer}: {result.inputs.heads}, {tokens}, {width}; {causal}, float32"


def show(result: Result, console: Console) -> None:
    """Print what the comparison found."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    softmax = result.softmax
    console.print(title(result), style="bold", highlight=False, markup=False, soft_wrap=True)

    cost = Table(title="Cost", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    cost.add_column("mechanism", no_wrap=True)
    cost.add_column("backend")
    for heading in ("forward\nms", "ratio", "backward\nms", "ratio", "memory\nMB", "ratio"):
        cost.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        cost.add_row(
            Text(row.name),
            row.room,
            f"{row.forward_ms:.2f}",
            times(row.forward_ms, softmax.forward_ms),
            f"{row.backward_ms:.2f}",
            times(row.backward_ms, softmax.backward_ms),
            f"{row.peak / 1e6:.2f}",
            times(row.peak, softmax.peak),
            style="dim" if row is softmax else "",
        )
    console.print(cost)

    meaning = Table(
        title="What it computes, and how well",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    meaning.add_column("mechanism", no_wrap=True)
    for heading in ("output", "weights", "entropy", "error", "gradients"):
        meaning.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        seen = row.reading
        meaning.add_row(
            Text(row.name),
            f"{seen.output_distance:.3f}",
            f"{seen.weights_distance:.3f}",
            f"{seen.entropy:.2f}",
            f"{seen.forward_error:.1e}",
            f"{row.gradient_error:.1e}",
            style="dim" if row is softmax else "",
        )
    flat = result.uniform
    meaning.add_row(
        "uniform weights",
        f"{flat.output_distance:.3f}",
        f"{flat.weights_distance:.3f}",
        f"{flat.entropy:.2f}",
        NOTHING,
        NOTHING,
        style="dim italic",
    )
    console.print(meaning)
    legend = Table(box=None, show_header=False, pad_edge=False, width=min(console.width, WIDTH))
    legend.add_column(no_wrap=True, style="bold")
    legend.add_column()
    for heading, text in footnotes(result):
        legend.add_row(heading, Text(text))
    console.print(legend)


def footnotes(result: Result) -> list[tuple[str, str]]:
    """What each column means, and what else there is to know."""
    inputs, n_queries = result.inputs, result.inputs.q.shape[-2]
    rounds, uniform = len(result.softmax.forward), result.uniform.entropy
    lines = [
        ("forward, backward", f"median of {rounds} rounds over all mechanisms in turn, compiled beforehand"),
        ("memory", "peak of one forward and backward beyond q, k, v and d_out, results included"),
        ("ratio", "to exact softmax, in the column to its left"),
        ("output, weights", "|difference from exact softmax's| / |exact softmax's|; returning zeros has 1"),
        ("entropy", f"mean over the rows of weights, in bits: 0 is one key, {uniform:.2f} uniform over the visible"),
        ("error", "of the float32 output, relative, against the definition in float64"),
        ("gradients", "the worst relative error of d_q, d_k and d_v in float32, against float64"),
    ]
    if result.rows_read < n_queries:
        rows = f"{result.rows_read} evenly spaced rows of {n_queries}"
        lines.append(("", f"weights, entropy and error are read from {rows}"))
    if inputs.dtype != "float32":
        lines.append(("", f"the file's {inputs.dtype} numbers are taken as float32"))
    if len(inputs.layers) > 1:
        lines.append(("", f"layers in this file: {', '.join(map(str, inputs.layers))}; see --layer"))
    return lines + [("", note) for note in result.notes]


def as_data(result: Result, lengths: dict[str, Any] | None) -> dict[str, Any]:
    """Everything, for `--json`; what is not a finite number is null."""
    q, k, v = result.inputs[:3]
    data = {
        "file": result.inputs.file,
        "layer": result.inputs.layer,
        "shape": {"q": list(q.shape), "k": list(k.shape), "v": list(v.shape)},
        "causal": result.causal,
        "dtype": "float32",
        "dtype_of_file": result.inputs.dtype,
        "rows_read": result.rows_read,
        "mechanisms": [_row(row, result.softmax) for row in result.rows],
        "uniform": {
            "output_distance": result.uniform.output_distance,
            "weights_distance": result.uniform.weights_distance,
            "entropy_bits": result.uniform.entropy,
        },
        "notes": result.notes,
        "versions": versions(),
        "machine": platform.machine(),
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
    }
    if lengths is not None:
        data["time_against_length"] = lengths
    return _finite(data)


def _row(row: Row, softmax: Row) -> dict[str, Any]:
    return {
        "mechanism": row.name,
        "backend": row.room,
        "forward_ms": row.forward_ms,
        "backward_ms": row.backward_ms,
        "forward_ms_rounds": [1e3 * x for x in row.forward],
        "backward_ms_rounds": [1e3 * x for x in row.backward],
        "peak_bytes": row.peak,
        "forward_against_softmax": row.forward_ms / softmax.forward_ms,
        "backward_against_softmax": row.backward_ms / softmax.backward_ms,
        "peak_against_softmax": row.peak / max(softmax.peak, 1),
        "output_distance": row.reading.output_distance,
        "weights_distance": row.reading.weights_distance,
        "entropy_bits": row.reading.entropy,
        "forward_error": row.reading.forward_error,
        "gradient_error": row.gradient_error,
    }


def _finite(x: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and (x != x or abs(x) == float("inf")) else x
