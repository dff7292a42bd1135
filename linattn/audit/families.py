"""Inputs of the audit: well-scaled ones, and those on which attentions have been seen to fail.

A family is a function `(rng, n, m, d, e, least, most) -> q, k, v` in float64; `least` and `most`: the smallest normal
and the largest number of the dtype under test. `draw` rounds to that dtype; where it cannot hold a family, None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn.audit.measure import FORMATS

__all__ = ["FAMILIES", "WELL_SCALED", "Inputs", "draw"]

Array = NDArray[Any]
Drawn = tuple[Array, Array, Array]


class Inputs(NamedTuple):
    """One head in the dtype under test, and a mask of keys or None."""

    q: Array
    k: Array
    v: Array
    key_mask: NDArray[np.bool_] | None


def gaussian(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """Independent, N(0, 1)."""
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)), rng.normal(size=(m, e))


def heavy_tails(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """Student's t with two degrees of freedom: no variance."""
    return rng.standard_t(2, size=(n, d)), rng.standard_t(2, size=(m, d)), rng.standard_t(2, size=(m, e))


def negative(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """q and k in (-20, -8): elu + 1 down to 2e-9, relu 0 throughout."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    return rng.uniform(-20, -8, q.shape), rng.uniform(-20, -8, k.shape), v


def scaled(factor: float | None, power: float = 0.0) -> Callable[..., Drawn]:
    """q and k with norms near `factor`, or near least^power or most^-power."""

    def family(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
        q, k, v = gaussian(rng, n, m, d, e, least, most)
        size = factor if factor is not None else (least**power if power > 0 else most**-power)
        return q * size / max(d, 1) ** 0.5, k * size / max(d, 1) ** 0.5, v

    return family


def subnormal(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """Keys below the normal range."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    return q, k * least / 64, v


def constant(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """All keys the same and all values the same: every rounding goes the same way."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    return q, np.broadcast_to(abs(k[:1]), k.shape), np.broadcast_to(v[:1], v.shape)


def repeated(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """Three keys over and over, with values of their own."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    return q, k[np.arange(m) % 3] if m else k, v


def one_hot(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """A single channel of each query and key."""
    v = gaussian(rng, n, m, d, e, least, most)[2]
    return np.eye(d)[rng.integers(0, d, n)], np.eye(d)[rng.integers(0, d, m)], v


def offset(by: float) -> Callable[..., Drawn]:
    """v + by."""

    def family(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
        q, k, v = gaussian(rng, n, m, d, e, least, most)
        return q, k, v + by

    return family


def first_value(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """v_0 = 1e4: whoever centres on it loses."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    v[:1] = 1e4
    return q, k, v


def drift(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """v_s = s + noise."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    return q, k, v + np.arange(m)[:, None]


def ones(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """v = 1: the result is 1."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    return q, k, np.ones_like(v)


def positive(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """v >= 0: the bound is relative, entry by entry."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    return q, k, abs(v)


def outlier(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """One channel of q and k is 50 times the others, as in trained networks."""
    q, k, v = gaussian(rng, n, m, d, e, least, most)
    q[:, :1], k[:, :1] = 50 * q[:, :1], 50 * k[:, :1]
    return q, k, v


@cache
def recorded() -> Drawn:
    """One head of layer 2 of a real transformer; shipped with the package, see data/README.md."""
    with (files("linattn") / "data" / "minilm_qkv.npz").open("rb") as stream, np.load(stream) as archive:
        q, k, v = (archive[f"{x}2"][0].astype(float) for x in "qkv")
    return q, k, v


def real(rng: np.random.Generator, n: int, m: int, d: int, e: int, least: float, most: float) -> Drawn:
    """What a trained network computes: the first tokens and channels of a recorded head."""
    q, k, v = recorded()
    return tuple(np.resize(x, (tokens, x.shape[1]))[:, :width]
                 for x, tokens, width in ((q, n, d), (k, m, d), (v, m, e)))  # type: ignore[return-value]  # fmt: skip


FAMILIES: dict[str, Callable[..., Drawn]] = {
    "gaussian": gaussian,
    "student-t(2)": heavy_tails,
    "all in (-20, -8)": negative,
    "norms 1e2": scaled(1e2),
    "norms 1e4": scaled(1e4),
    "norms near overflow": scaled(None, -0.49),
    "norms near underflow": scaled(None, 0.8),
    "subnormal keys": subnormal,
    "constant": constant,
    "repeated keys": repeated,
    "first key alive": gaussian,
    "last key alive": gaussian,
    "one-hot": one_hot,
    "v + 1": offset(1.0),
    "v + 1e2": offset(1e2),
    "v + 1e4": offset(1e4),
    "v_0 = 1e4": first_value,
    "drifting v": drift,
    "v = 1": ones,
    "v >= 0": positive,
    "outlier channel": outlier,
    "real": real,
}

WELL_SCALED = ("gaussian", "v + 1", "v = 1", "v >= 0", "real")
ALIVE = {"first key alive": 0, "last key alive": -1}


def draw(family: str, rng: np.random.Generator, n: int, m: int, d: int, e: int, dtype: Any) -> Inputs | None:
    """Inputs of that dtype; None where it cannot hold them: something is inf, or q, k or v are all 0 by rounding."""
    _, exponent = FORMATS[np.dtype(dtype).name]
    most = 2.0 ** (-exponent + 1) if exponent > -1022 else float(np.finfo(float).max)
    wide = FAMILIES[family](rng, n, m, d, e, 2.0**exponent, most)
    with np.errstate(over="ignore", under="ignore"):
        q, k, v = (np.ascontiguousarray(x).astype(dtype) for x in wide)
    for x, before in zip((q, k, v), wide, strict=True):
        if not np.isfinite(x.astype(float)).all() or (before.any() and not x.any()):
            return None
    mask = None
    if family in ALIVE and m:
        mask = np.zeros(m, bool)
        mask[ALIVE[family]] = True
    return Inputs(q, k, v, mask)
