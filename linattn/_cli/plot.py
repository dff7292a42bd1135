"""The picture of `compare --plot`: weights side by side, and time against length with the crossovers."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linattn import instruments
from linattn._cli import Refused
from linattn._cli.compare import SEED, Result, Row, Step
from linattn._cli.inputs import Inputs
from linattn.audit import quadratic

Array = NDArray[Any]

LENGTHS = tuple(2**power for power in range(4, 14))
SECONDS_OF_A_CALL = 1.0  # a longer length is left out when it would take more
SECONDS_OF_A_POINT = 0.25
MOST_REPEATS = 11
MAP_TOKENS = 512  # of longer inputs the first tokens are drawn
OCTAVES = 4  # of the colour scale, up and down from uniform
MAPS_IN_A_ROW = 4
MAP_INCHES = 2.9
DOTS_PER_INCH = 130
INK, PAPER, GREY, HIDDEN = "#1b1b1b", "white", "#b8b8b8", "#dcdcdc"
COLOURS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4fc9", "#8c6d31")


# -- time against length --------------------------------------------------------------------------------------------


def count_steps(rows: list[Row]) -> int:
    return len(rows) * len(LENGTHS)


def time_against_length(rows: list[Row], inputs: Inputs, causal: bool, step: Step) -> dict[str, Any]:
    """{"lengths": [...], "seconds": {mechanism: {"forward": [...], "backward": [...]}}}.

    Longer inputs than the file's are made by repeating it: a time does not depend on the values. A point is the
    fastest of its repeats, None where it would take too long.
    """
    found: dict[str, Any] = {
        row.name: {"forward": [None] * len(LENGTHS), "backward": [None] * len(LENGTHS)} for row in rows
    }
    tired: set[str] = set()
    for i, length in enumerate(LENGTHS):
        q, k, v = (stretched(x, length) for x in inputs[:3])
        shape = (*inputs.lead, length, v.shape[-1])
        d_out = np.random.default_rng(SEED).normal(size=shape).astype(np.float32)
        for row in rows:
            step(f"{row.name}: {length} tokens", 1)
            if row.name in tired:
                continue
            attend = at_length(row.attend, length)
            forward, backward = [], []
            for _ in range(MOST_REPEATS):
                start = time.perf_counter()
                _, undo = attend.vjp(q, k, v, causal=causal, backend=row.backend)
                middle = time.perf_counter()
                undo(d_out)
                forward.append(middle - start)
                backward.append(time.perf_counter() - middle)
                if sum(forward) + sum(backward) > SECONDS_OF_A_POINT:
                    break
            found[row.name]["forward"][i] = min(forward)
            found[row.name]["backward"][i] = min(backward)
            growth = 4  # of exact softmax from one length to the next
            if growth * (min(forward) + min(backward)) > SECONDS_OF_A_CALL:
                tired.add(row.name)
    return {"lengths": list(LENGTHS), "seconds": found}


def stretched(x: Array, length: int) -> Array:
    """The first `length` tokens of x, x repeated as often as needed."""
    times = -(-length // x.shape[-2])
    return np.ascontiguousarray(np.concatenate([x] * times, axis=-2)[..., :length, :])


def at_length(attend: Any, length: int) -> Any:
    """The same value with room for so many tokens."""
    return replace(attend, length=length) if has_length(attend) else attend


def has_length(attend: Any) -> bool:
    return "length" in {x.name for x in fields(attend)}


def crossover(lengths: list[int], seconds: list[float | None], yardstick: list[float | None]) -> float | None:
    """Where a mechanism becomes faster than softmax and stays so, by straight lines in log-log; None if nowhere."""
    gaps = [
        (math.log(n), math.log(x) - math.log(y)) for n, x, y in zip(lengths, seconds, yardstick, strict=True) if x and y
    ]
    for (n0, gap0), (n1, gap1) in reversed(list(pairwise(gaps))):
        if gap1 > 0:
            return None
        if gap0 > 0:
            return math.exp(n0 + (n1 - n0) * gap0 / (gap0 - gap1))
    return None


# -- the picture ----------------------------------------------------------------------------------------------------


def draw(result: Result, lengths: dict[str, Any], path: Path) -> None:
    """Write the picture: a row of maps for up to `MAPS_IN_A_ROW` mechanisms, then the times."""
    from matplotlib.figure import Figure

    columns = min(MAPS_IN_A_ROW, len(result.rows))
    map_rows = -(-len(result.rows) // columns)
    width = 2 * MAP_INCHES + 1.0 if columns < 3 else columns * MAP_INCHES + 1.0
    figure = Figure(figsize=(width, map_rows * (MAP_INCHES + 0.3) + 4.6), layout="constrained", facecolor=PAPER)
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=[map_rows * (MAP_INCHES + 0.5), 4.2]))
    draw_maps(upper, result, map_rows, columns)
    draw_times(lower, result, lengths)
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror or error}.") from None


def label(row: Row) -> str:
    """The mechanism's name without a length that follows the input."""
    return type(row.attend).__name__ if has_length(row.attend) else row.name


def maps_of(result: Result, row: Row) -> Array:
    """Weights of the first tokens, in float64."""
    q, k = (x[..., :MAP_TOKENS, :].astype(np.float64) for x in (result.inputs.q, result.inputs.k))
    weights = quadratic.formula_of(row.attend).weights(q, k, causal=result.causal)
    return np.broadcast_to(weights, (*result.inputs.lead, *weights.shape[-2:]))


def chosen_head(result: Result) -> tuple[int, ...]:
    """The head in which softmax tells most about the key by the query."""
    selectivity = instruments.selectivity(maps_of(result, result.softmax), causal=result.causal)
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(selectivity)), np.shape(selectivity)))


def draw_maps(figure: Any, result: Result, n_rows: int, n_columns: int) -> None:
    """log2(n_t A[t, s]): 0, white, is a weight of 1/n_t, as if the row were uniform."""
    import matplotlib

    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=HIDDEN)
    head = chosen_head(result)
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    for ax in axes.flat[len(result.rows) :]:
        ax.remove()
    for ax, row in zip(axes.flat, result.rows, strict=False):
        a = maps_of(result, row)[head]
        n_queries, n_keys = a.shape
        visible = np.tri(n_queries, n_keys, dtype=bool) if result.causal else np.ones_like(a, dtype=bool)
        n = np.sum(visible, axis=-1, keepdims=True)
        with np.errstate(divide="ignore"):
            octaves = np.where(visible, np.clip(np.log2(n * a), -OCTAVES, OCTAVES), np.nan)
        entropy = np.nanmean(instruments.entropy(a, causal=result.causal, per_row=True))
        drawn = ax.imshow(octaves, cmap=colours, vmin=-OCTAVES, vmax=OCTAVES, interpolation="nearest", aspect="auto")
        ax.set_title(f"{label(row)}\n{entropy:.2f} bits", fontsize=10, color=INK)
        ax.tick_params(labelsize=8, colors=INK)
    for ax in axes[-1]:
        ax.set_xlabel("key", fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("query", fontsize=9)
    ticks = range(-OCTAVES, OCTAVES + 1, 2)
    bar = figure.colorbar(drawn, ax=list(axes.flat[: len(result.rows)]), shrink=0.9, pad=0.01, ticks=ticks, aspect=25)
    bar.ax.set_yticklabels([power(tick) for tick in ticks], fontsize=8)
    bar.set_label("weight, as a multiple of uniform", fontsize=9)
    where = "" if result.inputs.layer is None else f", layer {result.inputs.layer}"
    which = f", head {', '.join(map(str, head))} (where softmax is most selective)" if head else ""
    causal = ", causal" if result.causal else ""
    figure.suptitle(f"Weights: {Path(result.inputs.file).name}{where}{which}{causal}", fontsize=12, color=INK)


def power(octave: int) -> str:
    return "1" if octave == 0 else f"{2**octave}x" if octave > 0 else f"1/{2**-octave}"


def draw_times(figure: Any, result: Result, lengths: dict[str, Any]) -> None:
    """Milliseconds against tokens, both logarithmic, and where each mechanism overtakes softmax."""
    axes = np.asarray(figure.subplots(1, 2, sharex=True, sharey=True))
    tokens = lengths["lengths"]
    for ax, verb in zip(axes, ("forward", "backward"), strict=True):
        yardstick = lengths["seconds"][result.softmax.name][verb]
        for colour, row in zip(cycle(COLOURS), result.rows, strict=False):
            seconds = lengths["seconds"][row.name][verb]
            points = [(n, 1e3 * x) for n, x in zip(tokens, seconds, strict=True) if x is not None]
            crossing = None if row is result.softmax else crossover(tokens, seconds, yardstick)
            note = "" if row is result.softmax else verdict(tokens, seconds, yardstick)
            wide = 2.4 if row is result.softmax else 1.6
            ax.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=wide, color=colour, label=label(row) + note)
            if crossing is not None:
                level = 1e3 * math.exp(np.interp(math.log(crossing), np.log(tokens), logs(seconds)))
                ax.plot(crossing, level, "o", ms=9, mfc="none", mec=colour, mew=1.4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(tokens, [str(n) for n in tokens], fontsize=8)
        ax.minorticks_off()
        ax.tick_params(labelsize=8, colors=INK)
        ax.grid(color=GREY, lw=0.4, alpha=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("tokens", fontsize=9)
        ax.set_title(verb, fontsize=10, color=INK)
        ax.legend(fontsize=8, frameon=False, loc="upper left")
    axes[0].set_ylabel(f"milliseconds, {result.inputs.heads}", fontsize=9)
    figure.suptitle("Time against length", fontsize=12, color=INK)


def verdict(tokens: list[int], seconds: list[float | None], yardstick: list[float | None]) -> str:
    """From where on a mechanism is faster than softmax, for the legend."""
    crossing = crossover(tokens, seconds, yardstick)
    if crossing is not None:
        return f", faster from {two_digits(crossing)} tokens"
    both = [(x, y) for x, y in zip(seconds, yardstick, strict=True) if x is not None and y is not None]
    return ", faster throughout" if both and all(x < y for x, y in both) else ""


def two_digits(x: float) -> int:
    """x >= 1 to two digits: all that such a measurement is worth."""
    return int(round(x, 1 - math.floor(math.log10(x))))


def logs(seconds: list[float | None]) -> list[float]:
    """Logarithms, the last one repeated where nothing was measured."""
    found: list[float] = []
    for x in seconds:
        found.append(found[-1] if x is None else math.log(x))
    return found
