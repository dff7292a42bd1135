"""Which vector unit the kernels are written for, and the register tile that fills it.

The host's features decide once, at import: the width of a vector in bytes, the number of tokens T a tile
holds and the number NV of vectors side by side. T * NV accumulators, T * NV values and two state vectors
(sum and rest) must fit the registers; T * NV accumulators must cover the latency of the FMA units.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import binding
from numba.core import config

__all__ = ["CHUNK", "TILE", "Tile"]


class Tile(NamedTuple):
    """One vector unit: its name, bytes in a register, tokens and vectors of a tile, rows of a matrix tile."""

    unit: str
    n_bytes: int
    tokens: int
    vectors: int
    rows: int

    def lanes(self, itemsize: int) -> int:
        """Numbers of `itemsize` bytes in one register."""
        return self.n_bytes // itemsize

    def columns(self, itemsize: int) -> int:
        """Columns one tile covers."""
        return self.vectors * self.lanes(itemsize)


TILES = {
    "avx512": Tile("avx512", 64, 4, 2, 4),
    "avx2": Tile("avx2", 32, 3, 2, 4),
    "neon": Tile("neon", 16, 6, 2, 4),
    "portable": Tile("portable", 16, 2, 2, 2),
}

CHUNK = 48  # tokens a prologue prepares: a multiple of every tile's tokens


def host_tile() -> Tile:
    """The widest unit of this machine, or of the machine `NUMBA_CPU_FEATURES` describes."""
    if config.CPU_FEATURES is None:
        features = {name for name, there in binding.get_host_cpu_features().items() if there}
    else:
        features = {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    if "avx512f" in features:
        return TILES["avx512"]
    if {"avx2", "fma"} <= features:
        return TILES["avx2"]
    triple = binding.get_process_triple()
    if "neon" in features or triple.startswith(("aarch64", "arm64")):
        return TILES["neon"]
    return TILES["portable"]


TILE = host_tile()
