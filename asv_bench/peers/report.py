"""What was measured, as a page for the docs and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw_lengths", "report_as_rst"]


def table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = [f".. list-table:: {caption}", "   :header-rows: 1", ""]
    for row in [heads, *rows]:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def report_as_rst(report: dict[str, Any]) -> str:
    """The tables of docs/measured/peers.rst."""
    rows, ours = [], {}
    for row in report["lengths"]:
        key = row["computes"], row["tokens"]
        ours.setdefault(key, row)
        cells = [
            f"{row[job] * 1e3:.3g} ({row[job] / ours[key][job]:.2f})" if job in row else ""
            for job in ("forward", "both")
        ]
        if row["fault"]:
            cells = [f"not timed: {row['fault']}", ""]
        rows.append([row["computes"], str(row["tokens"]), row["name"], *cells])
    parts = [
        ".. Written by python -m asv_bench.peers; not by hand.\n",
        table(
            "Milliseconds, and in brackets times ours with fresh results: 8 heads, 64 channels, float32, causal, "
            "one thread",
            ["computes", "tokens", "", "forward", "forward and backward"],
            rows,
        ),
        table(
            "Peak memory of a call at 8192 tokens beyond its arguments, results included, in sizes of one input",
            ["", "forward", "forward and backward"],
            [
                [name, *(f"{r['over one input']:.2f}" for r in report["memory"] if r["name"] == name)]
                for name in dict.fromkeys(r["name"] for r in report["memory"])
            ],
        ),
        table(
            "One token of decoding, 8 heads, 64 channels, in microseconds",
            ["", "a step"],
            [[name, f"{t:.0f}"] for name, t in report["step"].items()],
        ),
        table(
            "Where the microseconds of our step are",
            ["", "microseconds"],
            [[name, f"{t:.0f}"] for name, t in report["step profile"].items()],
        ),
        table(
            "Share of one core's multiply-add peak, measured in the same run",
            ["engine", "data", "direction", "share"],
            [[*name.rsplit(", ", 2), f"{share:.0%}"] for name, share in report["peak"].items()],
        ),
        table(
            "Two threads over one, forward and backward",
            ["", "times as fast"],
            [[name, f"{ratio:.2f}"] for name, ratio in report["threads"].items()],
        ),
    ]
    costs = report["costs"]
    parts.append(
        f"The compensated state makes the sweep over data in cache take {costs['compensated']:.2f} times what plain "
        f"sums take. A row of 256 bytes is written in {costs['pages in use']:.0f} ns into memory in use and in "
        f"{costs['fresh pages']:.0f} ns into fresh pages.\n"
    )
    if report["long"]:
        parts.append(
            f"At 131072 tokens ours takes {report['long']['ours']:.2f} s. Exact softmax by torch takes "
            f"{report['long']['softmax at 8192']:.2f} s at 8192 tokens; grown by the square of the length that is "
            f"{report['long']['ratio']:.0f} times ours.\n"
        )
    if report["missing"]:
        names = ", ".join(line.partition(" (")[0] for line in report["missing"])
        parts.append(f"Not installed where this was measured: {names}.\n")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts.append(f"*{versions}; {report['machine']}*\n")
    return "\n".join(parts)


def draw_lengths(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of one call against the length: the linear contenders, and exact softmax, which they cross."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, job, title in zip(axes, ("forward", "both"), ("forward", "forward and backward"), strict=True):
        curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            if row["computes"] != "cosformer" and job in row:
                curves.setdefault((row["name"], row["computes"]), []).append((row["tokens"], 1e3 * row[job]))
        for (name, computes), points in curves.items():
            ours = name.startswith("linattn")
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                linewidth=2.5 if ours else 1.2,
                linestyle="--" if computes == "softmax" else "-",
                label=f"{name}: {computes}",
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("milliseconds, 8 heads, 64 channels, one thread")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
