"""States on disk: .npz with a JSON header, no pickle, checked before anything is allocated.

A file holds the arrays of one state and a header that says, as plain data, which mechanism made it. What does not
match the header to the byte is refused.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from dataclasses import fields
from typing import Any

import numpy as np

from linattn import _arrays, _checks
from linattn._arrays import FLOATS
from linattn.engines.combiner_stream import CombinerState
from linattn.engines.linear import LinearState
from linattn.engines.loglinear import LogLinearState
from linattn.engines.softmax import SoftmaxState
from linattn.mechanisms.attention import State
from linattn.mechanisms.combiner import Combiner
from linattn.mechanisms.cosformer import CosFormer
from linattn.mechanisms.linear import Linear
from linattn.mechanisms.lln import LLN, LLNDiag, LLNDiagState
from linattn.mechanisms.performer import Performer
from linattn.mechanisms.softmax import Softmax

MAGIC, VERSION = "linattn state", 1
MECHANISMS = {cls.__name__: cls for cls in (Combiner, CosFormer, Linear, LLN, LLNDiag, Performer, Softmax)}
KINDS = {cls.__name__: cls for cls in (CombinerState, LinearState, LLNDiagState, LogLinearState, SoftmaxState)}
STORED = (*FLOATS, "bool", "int32")
HEADER_LIMIT = 1 << 16


def save_state(file: str | os.PathLike[str], state: State) -> None:
    """Write a state of NumPy arrays to an .npz file that `load_state` reads back bit for bit.

    Parameters
    ----------
    file : path
        Written whole or not at all; ".npz" is not added.
    state : State
        From `step` or `init_state`.

    Raises
    ------
    TypeError
        If the arrays are not NumPy's, or a parameter of the mechanism is not plain data (a FeatureMap of your own).
    """
    if not isinstance(state, State):
        raise TypeError(f"`state` must be a State, got {type(state).__name__}.")
    arrays = {name: x for name, x in state.arrays._asdict().items() if x is not None}
    for x in arrays.values():
        if not isinstance(x, np.ndarray):
            raise TypeError(f"`state` must hold NumPy arrays to be saved, got {_arrays.library(x)}.")
    parameters, given = _plain_parameters(state.attend)
    header = {
        "magic": MAGIC,
        "version": VERSION,
        "mechanism": type(state.attend).__name__,
        "parameters": parameters,
        "given": [list(x.shape) for x in given],
        "kind": type(state.arrays).__name__,
        "start": state.start,
        "position": state.position,
        "arrays": {name: {"dtype": _arrays.dtype_name(x), "shape": list(x.shape)} for name, x in arrays.items()},
    }
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    members = {"header": text, **{name: _storable(x) for name, x in arrays.items()}}
    members |= {_given_name(i): x for i, x in enumerate(given)}
    target = os.fspath(file)
    partial = f"{target}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as stream:
            np.savez(stream, allow_pickle=False, **members)
        os.replace(partial, target)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def load_state(file: str | os.PathLike[str]) -> State:
    """Read a state that `save_state` wrote.

    Raises
    ------
    ValueError
        If the file is anything but a whole linattn state of a known version.
    """
    try:
        with zipfile.ZipFile(os.fspath(file)) as archive:
            return _read(archive)
    except (
        zipfile.BadZipFile,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        EOFError,
    ) as error:
        raise ValueError(f"`{os.fspath(file)}` is not a linattn state: {error}") from None


def _read(archive: zipfile.ZipFile) -> State:
    header = json.loads(_member(archive, "header", np.dtype(np.uint8), None).tobytes())
    if header["magic"] != MAGIC or header["version"] != VERSION:
        raise ValueError(f"expected {MAGIC!r} of version {VERSION}, got {header['magic']!r} of {header['version']!r}.")
    extra = set(header) - {
        "magic",
        "version",
        "mechanism",
        "parameters",
        "given",
        "kind",
        "start",
        "position",
        "arrays",
    }
    if extra:
        raise ValueError(f"the header has unknown keys {sorted(extra)}.")
    kind, cls = KINDS[header["kind"]], MECHANISMS[header["mechanism"]]
    described, given = header["arrays"], header["given"]
    names = {f"{name}.npy" for name in ("header", *described, *map(_given_name, range(len(given))))}
    if (
        not set(described) <= set(kind._fields)
        or names != set(archive.namelist())
        or len(archive.namelist()) != len(names)
    ):
        raise ValueError(f"it must hold {sorted(names)}, got {sorted(archive.namelist())}.")
    matrices = [_member(archive, _given_name(i), np.dtype(np.float64), tuple(shape)) for i, shape in enumerate(given)]
    parameters = {name: _from_plain(value, matrices) for name, value in header["parameters"].items()}
    attend = cls(**parameters)
    start, position = header["start"], header["position"]
    _checks.natural("start", start, least=0)
    _checks.natural("position", position, least=start)
    arrays = {}
    for name, about in described.items():
        dtype, stored = _dtypes(about["dtype"])
        arrays[name] = _member(archive, name, stored, tuple(about["shape"])).view(dtype)
    missing = set(kind._fields) - set(arrays) - {"visible"}
    if missing:
        raise ValueError(f"{sorted(missing)} are missing.")
    return State(attend, kind(**{name: arrays.get(name) for name in kind._fields}), start, position)


def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...] | None) -> np.ndarray:
    """One array; its own header and its size are compared with what is expected before it is read."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed.")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{name} has format {version}, not (1, 0).")
        came_shape, fortran, came_dtype = np.lib.format.read_array_header_1_0(stream)
        n_bytes = info.file_size - stream.tell()
        limit = HEADER_LIMIT if shape is None else math.prod(shape) * dtype.itemsize
        fits = came_dtype == dtype and not fortran and n_bytes == math.prod(came_shape) * dtype.itemsize
        if not fits or (shape is None and n_bytes > limit) or (shape is not None and tuple(came_shape) != shape):
            raise ValueError(f"{name} must be {dtype} {shape}, got {came_dtype} {came_shape} in {n_bytes} bytes.")
        data = stream.read(n_bytes + 1)
    if len(data) != n_bytes:
        raise ValueError(f"{name} has {len(data)} bytes, not {n_bytes}.")
    return np.frombuffer(bytearray(data), dtype).reshape(came_shape)


def _dtypes(name: str) -> tuple[np.dtype, np.dtype]:
    """The dtype of an array and the one it is stored in: .npy knows no bfloat16."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16), np.dtype(np.uint16)
    if name not in STORED:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(STORED)}.")
    return np.dtype(name), np.dtype(name)


def _storable(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x).reshape(x.shape)
    return x.view(np.uint16) if _arrays.dtype_name(x) == "bfloat16" else x


def _given_name(i: int) -> str:
    """The member that holds the i-th array among the parameters."""
    return f"parameter_{i}"


def _plain_parameters(attend: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The parameters as plain data, and the arrays among them (a projection, a calibration) in order."""
    given: list[np.ndarray] = []

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(name, x) for x in value]
        if isinstance(value, np.ndarray):
            given.append(np.array(value, dtype=np.float64, order="C"))
            return {"array": len(given) - 1}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"`state` cannot be saved: `{name}` of `{attend!r}` is not plain data, got {value!r}.")

    return {field.name: plain(field.name, getattr(attend, field.name)) for field in fields(attend)}, given


def _from_plain(value: Any, matrices: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        return matrices[value["array"]]
    return tuple(_from_plain(x, matrices) for x in value) if isinstance(value, list) else value
