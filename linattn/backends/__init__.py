"""Who runs the loop: one folder a backend, the same file names and signatures in each.

`resolve` picks the room for a call: by name, or for NumPy arrays `numba`, for CuPy arrays `cupy`, for all else
`reference`. Asked for by name, a room that cannot serve is an error; otherwise the reference room takes over.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from linattn import _arrays, _checks
from linattn._arrays import Array
from linattn.backends.reference import combiner, linear, loglinear, softmax

# all loaded: compilers trace a look-up, not an import
REFERENCE = {"combiner": combiner, "linear": linear, "loglinear": loglinear, "softmax": softmax}
ROOM_OF = {"numpy": "numba", "cupy": "cupy"}
WANTS = {"numba": "numpy", "cupy": "cupy"}
EXTRA = {"numba": "test", "cupy": "gpu"}


@cache
def load(backend: str, engine: str) -> ModuleType | str:
    """The module backends/<backend>/<engine>.py, or the reason why there is none."""
    name = f"linattn.backends.{backend}"
    if find_spec(name) is None or find_spec(f"{name}.{engine}") is None:
        return f"no {engine} engine"
    try:
        why_not = getattr(importlib.import_module(name), "why_not", lambda: None)()
        return why_not or importlib.import_module(f"{name}.{engine}")
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def resolve(backend: str | None, like: Array, engine: str) -> ModuleType:
    """The room that serves `engine` for arrays of the library of `like`."""
    _checks.backend_name(backend)
    library = _arrays.library(like)
    room = backend or ROOM_OF.get(library, "reference")
    if room in WANTS and library != WANTS[room]:
        raise _checks.backend_arrays(room, library, WANTS[room])
    if room == "reference":
        return REFERENCE[engine]
    found = load(room, engine)
    if isinstance(found, ModuleType):
        return found
    if backend is None:
        return REFERENCE[engine]
    if found.startswith("no "):
        raise _checks.backend_lacks(room, found.removeprefix("no "))
    raise _checks.backend_missing(room, EXTRA[room], found)
