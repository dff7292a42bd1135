"""Queries, keys and values from an npz file, or the real ones that ship with the package."""

from __future__ import annotations

import re
import zipfile
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn import _checks
from linattn._cli import Refused

PACKAGED = "minilm_qkv.npz"
ARRAY_NAME = re.compile(r"([qkv])(\d*)")


class Inputs(NamedTuple):
    """One layer, in float32 whatever the file has: half-precision data are widened, float64 data rounded."""

    q: NDArray[np.float32]  # (..., N, D)
    k: NDArray[np.float32]  # (..., M, D)
    v: NDArray[np.float32]  # (..., M, E)
    file: str
    layer: int | None
    layers: tuple[int, ...]  # all that the file has
    dtype: str  # of the file

    @property
    def lead(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(x.shape[:-2] for x in self[:3]))

    @property
    def heads(self) -> str:
        """How many there are, as one says it: "4 heads", "2x4 heads"."""
        count = "x".join(map(str, self.lead)) or "1"
        return f"{count} head" if count == "1" else f"{count} heads"


def load(path: str | None, layer: int | None, causal: bool) -> Inputs:
    """Read and check everything before anything is computed."""
    shown = PACKAGED if path is None else path
    try:
        with open(path, "rb") if path is not None else (files("linattn") / "data" / PACKAGED).open("rb") as stream:
            return _read(stream, shown, layer, causal)
    except FileNotFoundError:
        raise Refused(f"The file must exist, got {shown!r}.") from None
    except IsADirectoryError:
        raise Refused(f"The file must be an .npz file, got the folder {shown!r}.") from None
    except OSError as error:
        raise Refused(f"{shown} cannot be read: {error.strerror or error}.") from None


def _read(stream: Any, shown: str, layer: int | None, causal: bool) -> Inputs:
    if not zipfile.is_zipfile(stream):
        raise Refused(f"{shown} must be an .npz file with q, k and v, got something else.")
    stream.seek(0)
    try:
        with np.load(stream, allow_pickle=False) as archive:
            layers, chosen = _choose(list(archive.files), shown, layer)
            suffix = "" if chosen is None else str(chosen)
            raw = {f"{x}{suffix}": archive[f"{x}{suffix}"] for x in "qkv"}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, MemoryError, NotImplementedError) as error:
        raise Refused(f"{shown} must hold plain arrays q, k and v, got an unreadable one ({error}).") from None
    for name, x in raw.items():
        try:
            _checks.floating(name, x)
            _checks.axes(**{name: x})
        except (TypeError, ValueError) as error:
            raise Refused(f"{shown}: {error}") from None
        if x.size == 0:
            raise Refused(f"{shown}: `{name}` must not be empty, got shape {x.shape}.")
        if not np.all(np.isfinite(x)):
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
            raise Refused(f"{shown}: `{name}` must be finite, got {x[at]} at {at}.")
    dtype = "/".join(dict.fromkeys(str(x.dtype) for x in raw.values()))
    with np.errstate(over="ignore"):
        q, k, v = (np.ascontiguousarray(x, dtype=np.float32) for x in raw.values())
    for name, x in zip(raw, (q, k, v), strict=True):
        if not np.all(np.isfinite(x)):
            raise Refused(f"{shown}: `{name}` must fit into float32, got {np.max(abs(raw[name])):.3g}.")
    try:
        _checks.queries_keys_values(q, k, v)
        _checks.leading(q=q.shape[:-2], k=k.shape[:-2], v=v.shape[:-2])
        if causal:
            _checks.causal_lengths(q.shape[-2], k.shape[-2])
    except ValueError as error:
        raise Refused(f"{shown}: {error}") from None
    return Inputs(q, k, v, shown, chosen, layers, dtype)


def _choose(names: list[str], shown: str, layer: int | None) -> tuple[tuple[int, ...], int | None]:
    """All layers of the file, and the one to read; None for plain q, k, v."""
    found: dict[str, set[str]] = {}
    for name in names:
        if match := ARRAY_NAME.fullmatch(name):
            found.setdefault(match[2], set()).add(match[1])
    layers = tuple(sorted(int(suffix) for suffix in found if suffix))
    if not found:
        came = ", ".join(names) if names else "no array"
        raise Refused(f"{shown} must hold q, k and v, or q0, k0 and v0 and so on, got {came}.")
    if layer is None:
        suffix = "" if "" in found else str(layers[0])
    elif not layers:
        raise Refused(f"`--layer` is for files with q0, k0, v0 and so on, got {layer} for {shown}, which has q, k, v.")
    elif layer not in layers:
        raise Refused(f"`--layer` must be one of {', '.join(map(str, layers))}, got {layer}.")
    else:
        suffix = str(layer)
    missing = [f"{x}{suffix}" for x in "qkv" if x not in found.get(suffix, ())]
    if missing:
        raise Refused(f"{shown} must hold q{suffix}, k{suffix} and v{suffix}, got no {' and no '.join(missing)}.")
    return layers, int(suffix) if suffix else None
