"""Which vector unit the kernels are written for, and the register tiles that fill it.

The host's features decide once, at import. The tile of the recurrence holds T tokens by NV vectors: T * NV
accumulators and T * NV values must fit the registers, and the accumulators must cover the latency of the
multiply-add units. The tile of matrix products holds `rows` by NV.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import binding
from numba.core import config

__all__ = ["CHUNK", "SETTLE", "TILE", "Tile"]


class Tile(NamedTuple):
    """One vector unit and its tiles."""

    unit: str
    n_bytes: int  # of a register
    tokens: int  # T
    vectors: int  # NV
    rows: int  # of a matrix product's tile
    reload: bool  # whether T * NV accumulators and values leave no register for a second operand of the state
    halves: bool  # whether float16 is converted in registers

    def lanes(self, itemsize: int) -> int:
        """Numbers of `itemsize` bytes in one register."""
        return self.n_bytes // itemsize

    def columns(self, itemsize: int) -> int:
        """Columns one tile covers."""
        return self.vectors * self.lanes(itemsize)


TILES = {
    "avx512": Tile("avx512", 64, 4, 2, 6, False, True),
    "avx2": Tile("avx2", 32, 3, 2, 6, True, True),
    "neon": Tile("neon", 16, 6, 2, 6, False, True),
    "portable": Tile("portable", 16, 2, 2, 2, True, False),
}

CHUNK = 24  # tokens a prologue prepares: a multiple of every tile's tokens and rows
SETTLE = 96  # tokens between two times the rest of a state is carried over to its sums


def host_features() -> set[str]:
    """What this machine, or the machine `NUMBA_CPU_FEATURES` describes, can do."""
    if config.CPU_FEATURES is None:
        return {name for name, there in binding.get_host_cpu_features().items() if there}
    return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}


def host_tile() -> Tile:
    """The widest unit of this machine."""
    features = host_features()
    if {"avx512f", "f16c"} <= features:
        return TILES["avx512"]
    if {"avx2", "fma", "f16c"} <= features:
        return TILES["avx2"]
    if "neon" in features or binding.get_process_triple().startswith(("aarch64", "arm64")):
        return TILES["neon"]
    return TILES["portable"]


TILE = host_tile()
