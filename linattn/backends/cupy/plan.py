"""How a product is cut into launches: parameters, grids, shared memory, segments. Pure Python, no CUDA.

    P(a, b, c)[t] = sum over s in span(t) of w(t, s) (a[t] . b[s]) c[s]

A launch covers heads x segments of tokens x tiles of columns. With one segment a causal product is one launch. With
more, a first launch sums b c^T over each segment, a scan turns these into the sums before each, and the sweep starts
every segment from its own: as few segments as fill the chip. A product over all tokens is sums, scan and rows.
The number of segments depends on shapes and on the card, never on timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from . import specs

AXES = 6  # leading axes other than 1
SWEEP, SUMS, APPLY, TOTAL = range(4)
PLAIN, DIVIDE, DELTA, CHAIN = range(4)
AS_IS, MAKE, READ = range(3)
NONE, ONES, VECTOR = range(3)
MAPS = {"identity": 0, "relu": 1, "elu1": 2, "exp": 3}
DIVIDED, CENTRED = 4, 5
RULES = {"safe": 0, "clamp": 1, "add": 2}

ARRAY = np.dtype([("data", "u8"), ("axis", "i8", (AXES,)), ("token", "i8"), ("column", "i8")], align=True)
STATE = np.dtype(
    [("data", "u8"), ("axis", "i8", (AXES,)), *((name, "i8") for name in ("segment", "sum", "row", "column"))],
    align=True,
)
NUMBERS = (
    "rows", "keys", "width", "columns", "n_sums", "tiles", "segments", "segment", "mode", "epilogue", "rule",
    "normalize", "a_map", "b_map", "c_map", "out_map", "a_scaled", "b_scaled", "c_scaled", "a_extra", "b_extra",
    "mask_keys", "mask_rows", "extra_tiles", "start_once", "final_once", "out_real", "scaled_rows",
)  # fmt: skip
ARRAYS = ("a", "b", "c", "out", "other", "turn_a", "turn_b", "mask", "mean", "den", "scale", "extra")
STATES = ("start", "rest", "final", "final_rest", "work")
PARAMS = np.dtype(
    [
        *((name, ARRAY) for name in ARRAYS),
        *((name, STATE) for name in STATES),
        ("size", "i8", (AXES,)), ("extra_tile", "i8"), ("eps", "f8"),
        *((name, "i4") for name in NUMBERS),
    ],
    align=True,
)  # fmt: skip

SHORTEST = 512  # tokens in a segment, at least
BLOCKS_PER_MULTIPROCESSOR = 3
OLDEST = (8, 0)  # compute capability: bf16, asynchronous copies


class Card(NamedTuple):
    """What a plan asks of a device."""

    multiprocessors: int
    shared: int  # bytes a block may have, with the opt-in
    capability: tuple[int, int]


class Launch(NamedTuple):
    """One kernel, once."""

    instance: specs.Instance
    grid: int
    shared: int
    params: np.ndarray
    keeps: Any = None  # memory that must live until the launch is under way


# -- where numbers lie ------------------------------------------------------------------------------------------


def strides_of(x: Any, n_inner: int, lead: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Strides of `x` in elements: of the leading axes, broadcast to `lead`, without those of size 1; of the others."""
    steps = [step // x.itemsize for step in x.strides]
    outer = len(x.shape) - n_inner
    axes = [0] * (len(lead) - outer) + [0 if n == 1 else step for n, step in zip(x.shape[:outer], steps)]
    return [step for step, n in zip(axes, lead, strict=True) if n != 1], steps[outer:]


def fits(lead: tuple[int, ...]) -> bool:
    """Whether a launch can address heads laid out like this."""
    return sum(n != 1 for n in lead) <= AXES


def put_array(record: np.ndarray, pointer: int, x: Any, n_inner: int, lead: tuple[int, ...], reverse: bool) -> None:
    """`x` (*lead, tokens) or (*lead, tokens, columns); in reverse, from its last token to its first."""
    axes, inner = strides_of(x, n_inner, lead)
    token, column = (*inner, 0)[:2]
    if reverse:
        pointer += (x.shape[len(x.shape) - n_inner] - 1) * token * x.itemsize
        token = -token
    record["data"], record["token"], record["column"] = pointer, token, column
    record["axis"] = [0] * (AXES - len(axes)) + axes


def put_state(
    record: np.ndarray, pointer: int, x: Any, lead: tuple[int, ...], transposed: bool, segmented: bool = False
) -> None:
    """`x` (*lead, n, rows, columns), or with an axis of segments behind lead."""
    axes, inner = strides_of(x, 4 if segmented else 3, lead)
    segment, total, row, column = inner if segmented else (0, *inner)
    record["data"], record["segment"], record["sum"] = pointer, segment, total
    record["row"], record["column"] = (column, row) if transposed else (row, column)
    record["axis"] = [0] * (AXES - len(axes)) + axes


# -- how much of the card a launch takes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A product's sizes: heads, tokens of a and of b, the contraction's width, columns of c and a denominator's."""

    heads: int
    rows: int
    keys: int
    width: int
    columns: int
    n_sums: int
    normalize: bool


def exact_shared(sizes: Sizes, chunk: int, tile: int, itemsize: int) -> int:
    """Bytes of shared memory of the exact kernel; the kernel lays them out in this order."""
    pitch = sizes.width | 1
    state = sizes.n_sums * sizes.width * (tile + 1)
    numbers = 2 * chunk * pitch + chunk * tile + chunk * (chunk + 1) + 4 * chunk + 2 * chunk
    return itemsize * (numbers + state * (2 if itemsize == 4 else 1))


class Kernel(NamedTuple):
    """The kernel that serves a product: its chunk and tile; for each mode the instance and bytes of shared memory."""

    chunk: int
    tile: int
    modes: tuple[tuple[specs.Instance, int], ...]


def exact_kernel(dtype: str, sizes: Sizes, card: Card) -> Kernel | None:
    """The larger of the two sizes that fits, the smaller for few tokens; None if none does."""
    itemsize = 8 if dtype == "float64" else 4
    larger, smaller = specs.EXACT_SIZES[dtype]
    few = max(sizes.rows, sizes.keys) <= smaller[0]  # decoding: less to fill with zeros, more blocks
    for chunk, tile in (smaller,) if few else (larger, smaller):
        shared = exact_shared(sizes, chunk, tile, itemsize)
        if shared <= card.shared:
            return Kernel(chunk, tile, ((specs.exact(dtype, chunk, tile), shared),) * 3)
    return None


def sweep_shared(width: int, n_sums: int, extra: bool, mode: str) -> int:
    """Bytes of shared memory of the sweep; the kernel lays them out in this order."""
    rows, keys, chunk = mode != "SUMS", mode != "APPLY", specs.SWEEP_CHUNK
    pitch, pitch_x = width + 8, specs.SWEEP_TILE + 8
    stage = keys * chunk * (pitch + pitch_x) + rows * chunk * pitch
    state = rows * n_sums * (width + 16 * extra) * pitch_x
    tables = 2 * 10 * chunk + chunk + 128 + 8
    return 2 * (2 * stage + state) + 4 * tables


def sweep_kernel(dtype: str, sizes: Sizes, extra: bool, card: Card) -> Kernel | None:
    """The tensor-core sweep, if it serves such a product on this card."""
    width = sizes.width - extra
    kind = "extra" if extra else "ones" if sizes.normalize else "bare"
    short = max(sizes.rows, sizes.keys) < specs.SWEEP_CHUNK
    if kind not in specs.SWEEPS.get(dtype, ()) or width not in specs.SWEEP_WIDTHS or short:
        return None
    if sizes.columns % specs.SWEEP_TILE:
        return None
    modes = tuple(
        (specs.sweep(dtype, width, sizes.n_sums, kind, mode), sweep_shared(width, sizes.n_sums, extra, mode))
        for mode in specs.MODES
    )
    if max(shared for _, shared in modes) > card.shared:
        return None
    return Kernel(specs.SWEEP_CHUNK, specs.SWEEP_TILE, modes)


def aligned(x: Any, pointer: int) -> bool:
    """Whether every row of `x` is contiguous and begins on a 16-byte boundary."""
    *outer, column = x.strides
    return column == x.itemsize and not any(step % 16 for step in (*outer, pointer))


def segments(blocks: int, tokens: int, chunk: int, card: Card) -> tuple[int, int]:
    """(number of segments, tokens in one, a multiple of the chunk): as few as fill the card."""
    wanted = BLOCKS_PER_MULTIPROCESSOR * card.multiprocessors
    number = 1
    if 2 * blocks < wanted:
        number = max(1, min(-(-wanted // max(1, blocks)), tokens // SHORTEST))
    length = max(chunk, -(-tokens // (chunk * number)) * chunk)
    return max(1, -(-tokens // length)), length


def lead_sizes(lead: tuple[int, ...]) -> list[int]:
    kept = [n for n in lead if n != 1]
    return [1] * (AXES - len(kept)) + kept


def grid(sizes: Sizes, tile: int, n_segments: int) -> tuple[int, int]:
    """(blocks, tiles)"""
    tiles = max(1, -(-sizes.columns // tile))
    return sizes.heads * n_segments * tiles, tiles


def scan_launch(params: np.ndarray, sizes: Sizes, dtype: str, mode: int, card: Card) -> Launch:
    """The scan over the segments' sums in params["work"]; it takes `params` over."""
    params["mode"], params["width"], params["columns"] = mode, sizes.width, sizes.columns + sizes.normalize
    elements = sizes.heads * sizes.n_sums * sizes.width * (sizes.columns + sizes.normalize)
    instance = specs.scan("float64" if dtype == "float64" else "float32")
    blocks = max(1, min(-(-elements // instance.threads), 32 * card.multiprocessors))
    return Launch(instance, blocks, 0, params)


def work_shape(lead: tuple[int, ...], sizes: Sizes, n_segments: int) -> tuple[int, ...]:
    """Of the segments' sums."""
    return (*lead, n_segments, sizes.n_sums, sizes.width, sizes.columns + sizes.normalize)


def heads_of(lead: tuple[int, ...]) -> int:
    return prod(lead)
