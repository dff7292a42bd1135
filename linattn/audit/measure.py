"""How far a result is from the truth: the metrics, and the float64 oracle for sequences of any length.

u             half a unit in the last place of the number 1: 2^-24 for float32
relative      |got - want| / |want|, Euclidean norms over everything; alone it hides bad rows
weighted      max over t, x of |got - want| / (u (|A| |v|)), the quantity that the error bound limits
ulps          |got - want| in units in the last place of want: median, 99 %, largest
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from linattn.audit import quadratic

__all__ = [
    "Answer",
    "Ulps",
    "error_in_eps",
    "oracle",
    "relative_error",
    "smallest_normal",
    "ulps",
    "unit_roundoff",
    "weighted_error",
]

Array = NDArray[Any]

FORMATS = {"float64": (53, -1022), "float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}
"""Bits of the significand and exponent of the smallest normal number of each floating format."""

PAIRS_AT_ONCE = 2**22  # weights held in memory at a time: 32 MB in float64
PAIRS_IN_ALL = 2**28  # beyond it running sums replace the pairs, where the mechanism has features
CHUNK = 128


# ------------------------------------------------------------------------------------------------- metrics


def unit_roundoff(dtype: Any) -> float:
    """u: the largest relative error of one rounding."""
    return float(2.0 ** -FORMATS[np.dtype(dtype).name][0])


def smallest_normal(dtype: Any) -> float:
    return float(2.0 ** FORMATS[np.dtype(dtype).name][1])


def relative_error(got: ArrayLike, want: ArrayLike) -> float:
    """|got - want| / |want| in the Euclidean norm; 0 if both are zero or empty, NaN if a value is NaN."""
    got, want = quadratic.wide(got), quadratic.wide(want)
    size = float(np.max(abs(want), initial=0.0))
    if size == 0.0:
        return 0.0 if not np.any(got) else float("inf")
    error, norm = np.linalg.norm((got - want) / size), np.linalg.norm(want / size)  # squares cannot overflow
    return float(error / norm)


def error_in_eps(got: ArrayLike, want: ArrayLike) -> float:
    """The relative error in units of the machine epsilon, 2 u, of the dtype of `got`."""
    return relative_error(got, want) / (2 * unit_roundoff(np.asarray(got).dtype))


def weighted_error(got: ArrayLike, want: ArrayLike, absolute: ArrayLike, dtype: Any = None) -> float:
    """max |got - want| / (u absolute + smallest normal number), with absolute = |A| |v| and u of `dtype`.

    `dtype` is the arithmetic's, if that is not the dtype of `got`.
    """
    dtype = np.asarray(got).dtype if dtype is None else dtype
    allowed = unit_roundoff(dtype) * quadratic.wide(absolute) + smallest_normal(dtype)
    return float(np.max(abs(quadratic.wide(got) - quadratic.wide(want)) / allowed, initial=0.0))


class Ulps(NamedTuple):
    """Errors in units in the last place."""

    p50: float
    p99: float
    max: float


def ulps(got: ArrayLike, want: ArrayLike) -> Ulps:
    """|got - want| over the spacing of the numbers of the dtype of `got` at `want`."""
    bits, least = FORMATS[np.asarray(got).dtype.name]
    got, want = quadratic.wide(got), quadratic.wide(want)
    if got.size == 0:
        return Ulps(0.0, 0.0, 0.0)
    _, exponent = np.frexp(want)  # |want| in [2^(exponent - 1), 2^exponent)
    spacing = np.ldexp(1.0, np.maximum(exponent - 1, least) + 1 - bits)
    errors = np.sort((abs(got - want) / spacing).ravel())  # NaN comes last

    def percentile(p: float) -> float:
        at = p / 100 * (errors.size - 1)
        low, high = errors[int(at)], errors[min(int(at) + 1, errors.size - 1)]
        return float(low + (high - low) * (at - int(at)))

    return Ulps(percentile(50), percentile(99), float(errors[-1]))


# -------------------------------------------------------------------------------------------------- oracle


class Answer(NamedTuple):
    """What a mechanism's definition gives, in float64."""

    out: Array  # (..., n, E)
    absolute: Array  # (..., n, E), |A| |v|: the unit of `weighted_error`


def oracle(
    attend: Any,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = False,
    key_mask: ArrayLike | None = None,
    cu_seqlens: Any = None,
    rows: quadratic.Rows = None,
    **positions: Any,
) -> Answer:
    """The definition's `out` and |A| |v| for sequences of any length; nothing N x M is stored.

    Parameters
    ----------
    attend : mechanism
        A value such as `linattn.CosFormer(length=4096)`; its parameters are read off it.
    q, k, v : array_like
        Finite, any floating dtype. They are taken as exact.
    rows : slice or integer array, optional
        These queries alone.
    causal, key_mask, cu_seqlens, positions
        As in the mechanism's call.

    Notes
    -----
    Rows are done in blocks of at most 4 million pairs. Beyond 2^28 pairs in all, mechanisms with non-negative
    features are summed in linear time instead, in float64 and in chunks; an error of about 1e-13 at a million
    tokens, far below what it judges in float32.
    """
    q, k, v = quadratic.wide(q), quadratic.wide(k), quadratic.wide(v)
    options = {"causal": causal, "key_mask": key_mask, **positions}
    if cu_seqlens is not None:
        parts = [
            oracle(
                attend, q[..., a:b, :], k[..., a:b, :], v[..., a:b, :],
                causal=causal, **quadratic.segment(a, b, key_mask, positions),
            )
            for a, b in pairwise(cu_seqlens)
        ]  # fmt: skip
        return Answer(*(np.concatenate(part, axis=-2) for part in zip(*parts, strict=True)))
    leads = int(np.prod(np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])))
    many = leads * q.shape[-2] * k.shape[-2] > PAIRS_IN_ALL
    if many and rows is None and has_positive_features(attend):
        return by_sums(attend, q, k, v, **options)
    t = np.arange(q.shape[-2])[slice(None) if rows is None else rows]
    at_once = max(1, PAIRS_AT_ONCE // max(1, leads * k.shape[-2]))
    blocks = [t[first : first + at_once] for first in range(0, max(1, t.size), at_once)]
    parts = [by_pairs(attend, q, k, v, rows=block, **options) for block in blocks]
    return Answer(*(np.concatenate(part, axis=-2) for part in zip(*parts, strict=True)))


def by_pairs(attend: Any, q: Array, k: Array, v: Array, *, rows: Array, **options: Any) -> Answer:
    """One block of rows by the formula."""
    weights = quadratic.formula_of(attend).weights(q, k, rows=rows, **options)
    visible = quadratic.pairs_of(q, k, options["causal"], options["key_mask"], rows).visible
    return Answer(quadratic.mix(weights, visible, v), quadratic.mix(abs(weights), visible, abs(v)))


def has_positive_features(attend: Any) -> bool:
    """Whether sums of features are as good as pairs; exponentials are not where their exponents are thousands."""
    plain = getattr(attend, "feature_map", None) in ("relu", "elu1", "exp")
    return plain and type(attend).__name__ in quadratic.FEATURES


def by_sums(
    attend: Any,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    key_mask: ArrayLike | None = None,
    **positions: Any,
) -> Answer:
    """In linear time: num_t = Phi_q[t] S_t, S_t = sum over the visible s of Phi_k[s] [v, |v|, 1]_s."""
    parameters = quadratic.formula_of(attend).parameters
    phi_q, phi_k = quadratic.FEATURES[type(attend).__name__](q, k, **parameters, **positions)
    if key_mask is not None:
        seen = np.asarray(key_mask)[..., None]
        phi_k, v = np.where(seen, phi_k, 0), np.where(seen, v, 0)
    v1 = np.concatenate([v, abs(v), np.ones((*v.shape[:-1], 1))], axis=-1)
    if causal:
        state: Any = np.zeros((1, 1))  # grows to (..., R, 2 E + 1) with the first chunk
        sums = []
        for first in range(0, q.shape[-2], CHUNK):
            chunk = slice(first, first + CHUNK)
            a, b, x = phi_q[..., chunk, :], quadratic.transpose(phi_k[..., chunk, :]), v1[..., chunk, :]
            sums.append(np.tril(a @ b) @ x + (a @ state if first else 0.0))
            state = state + b @ x
        num = np.concatenate(sums, axis=-2)
    else:
        num = phi_q @ (quadratic.transpose(phi_k) @ v1)
    n_columns = v.shape[-1]
    out, absolute, den = num[..., :n_columns], num[..., n_columns:-1], num[..., -1:]
    if parameters.get("normalize", True):
        c = quadratic.divisor(den, parameters["eps"] if "normalize" in parameters else "safe")
        dead = np.equal(c, 0)
        out, absolute = (np.where(dead, 0, x / np.where(dead, 1, c)) for x in (out, absolute))
    return Answer(out, absolute)
