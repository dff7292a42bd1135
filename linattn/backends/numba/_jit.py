"""Every compiler flag and the cache of compiled kernels: nothing else in this room sets one.

`helper` functions are inlined into the kernels that call them and are never cached by themselves;
`compile_kernel` turns a kernel into machine code for one signature, from the cache where it can.

Flags: `nogil`, so that Python threads run side by side; `error_model="numpy"`, so that 0/0 is NaN and no
branch; `fastmath` at most `{"contract"}`: `reassoc` together with `nsz` deletes the compensation of the
sums, `nnan` and `ninf` lose NaN. `reduction` adds `reassoc` for functions that are one plain sum.
No `parallel=True`: its thread layers abort when two Python threads enter, or after a fork.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from pathlib import Path

from numba import njit

from ._tiles import TILE

__all__ = ["cache_status", "compile_kernel", "helper", "reduction"]

EXACT = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
SUM = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}
CACHE_SWITCH = "LINATTN_NUMBA_CACHE"

INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # called by kernels alone: half the compile time

helper = njit(**EXACT, **INNER)
reduction = njit(**SUM, **INNER)

_status = {"cache": "not used yet"}


def cache_status() -> str:
    """One line: where this process found or kept its last kernel, or why nowhere; what to expect: `describe`."""
    return _status["cache"]


def cache_wanted() -> bool:
    """What `LINATTN_NUMBA_CACHE` asks for; 1 where it is not set."""
    value = os.environ.get(CACHE_SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(f"`{CACHE_SWITCH}` must be 0 or 1, got {value!r}.")
    return value == "1"


def source_salt() -> int:
    """A number that changes with any source of this room and with the tile.

    Numba's cache key sees a kernel's own byte code alone, not the helpers and the vector code it inlines. The
    salt is a closure constant of each kernel, and so part of its key.
    """
    digest = hashlib.sha256(repr(TILE).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


def folder_is_safe(folder: str) -> bool:
    """Whether nobody else can plant a cache file there: the index is a pickle, and loading it runs code."""
    path = Path(folder)
    if not hasattr(os, "getuid") or path.is_relative_to(Path(__file__).parent):
        return True
    here = path.stat()
    if here.st_uid != os.getuid() or here.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    for parent in path.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return False
    return True


def compile_kernel(build, signature):
    """The kernel `build(salt)` compiled for one signature: from the cache, or afresh where that fails.

    A missing or read-only folder, a folder others can write to and an unreadable cache file cost time only.
    """
    kernel = build(source_salt())
    if cache_wanted():
        try:
            cached = njit(cache=True, no_cfunc_wrapper=True, **EXACT)(kernel)
        except RuntimeError:  # Numba found no folder it may write to
            _status["cache"] = "off: no writable folder"
        else:
            folder = cached.stats.cache_path
            if folder_is_safe(folder):
                try:
                    cached.compile(signature)
                except Exception as error:  # a spoiled pickle may raise anything; a real fault comes again below
                    _status["cache"] = f"off: {folder} unreadable"
                    warnings.warn(
                        f"kernel cache {folder} unreadable ({type(error).__name__}): compiled without it.",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                else:
                    _status["cache"] = folder
                    cached.disable_compile()
                    return cached
            else:
                _status["cache"] = f"off: {folder} writable by others"
                warnings.warn(f"kernel cache off: {folder} writable by others.", RuntimeWarning, stacklevel=4)
    else:
        _status["cache"] = f"off: {CACHE_SWITCH}=0"
    fresh = njit(no_cfunc_wrapper=True, **EXACT)(kernel)
    fresh.compile(signature)
    fresh.disable_compile()
    return fresh
