"""Compiled CPU kernels, for NumPy arrays.

Requirements: numba, imported when this room is first used. Kernels are serial, release the interpreter lock,
allocate nothing, and work on one head of k and v at a time in a fixed order, so that a head's bits depend neither
on its neighbours nor on threads. All compiler flags: _jit.py. All vector code: _vector.py. Register tiles: _tiles.py.
"""

from __future__ import annotations

from pathlib import Path


def describe() -> dict[str, str]:
    """For `info`: the vector unit that the kernels are written for, and what becomes of compiled kernels."""
    from numba import njit

    from ._jit import CACHE_SWITCH, cache_wanted, folder_is_safe
    from ._tiles import TILE

    def probe():  # asked where it would be kept, never compiled
        return None

    facts = {"vector unit": f"{TILE.unit}, {8 * TILE.n_bytes} bits"}
    try:
        if not cache_wanted():
            return {**facts, "cache": f"off: {CACHE_SWITCH}=0"}
        folder = njit(cache=True)(probe).stats.cache_path
    except ValueError as error:  # the switch is neither 0 nor 1
        return {**facts, "cache": f"unusable: {error}"}
    except RuntimeError:  # Numba found no folder it may write to
        return {**facts, "cache": "off: no writable folder"}
    if not folder_is_safe(folder):
        return {**facts, "cache": f"off: {folder} writable by others"}
    kernels = len(list(Path(folder).glob("*.nbc")))
    return {**facts, "cache": f"{folder}, {kernels} compiled"}
