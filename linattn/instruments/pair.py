"""How far two weight matrices are apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn import _checks
from linattn._arrays import Array
from linattn.instruments.reading import Floats, matrix, mean_of_rows, read, x_log2_y


class Comparison(NamedTuple):
    """How far two weight matrices are apart: mean over the rows, and the largest row.

    For scale: `tv_uniform` is the distance of uniform weights; returning zeros has an `output_error` of 1.
    """

    tv: Any  # sum_s |A - B| / 2
    tv_max: Any
    kl: Any  # sum_s A log2(A / B), infinite where B is 0 and A is not
    kl_max: Any
    js: Any  # (KL(A, C) + KL(B, C)) / 2, C = (A + B) / 2, in bits
    js_max: Any
    hellinger2: Any  # 1 - sum_s sqrt(A B)
    hellinger2_max: Any
    tv_uniform: Any
    output_error: Any  # |A v - B v| / |B v|; None without `v`
    dead: Any  # rows left out because one of the two is dead


def compare(
    a: Array,
    b: Array,
    *,
    v: Array | None = None,
    causal: bool = False,
    key_mask: Array | None = None,
    renormalize: bool = False,
) -> Comparison:
    """How far the weights `a` are from the weights `b`, row by row.

    `compare(attend.weights(q, k), Softmax().weights(q, k))` is the distance to exact softmax.

    Parameters
    ----------
    a, b : arrays (..., N, M)
        Weight matrices; leading axes broadcast.
    v : array (..., M, E), optional
        Values, for the relative difference of the outputs.
    causal, key_mask, renormalize
        As for one matrix.

    Notes
    -----
    KL is infinite where b is 0 and a is not (ReLU features, sparse patterns): read JS. Closeness to softmax
    is no quality in itself; `tv_uniform` says how close weights that look at nothing would be.
    """
    first = read(a, causal, key_mask, renormalize, "a")
    second = read(b, causal, key_mask, renormalize, "b")
    if first.a.shape[-2:] != second.a.shape[-2:]:
        raise ValueError(f"`a` and `b` must have the same last two axes, got {first.a.shape} and {second.a.shape}.")
    _checks.leading(a=first.a.shape[:-2], b=second.a.shape[:-2])
    p, q = np.broadcast_arrays(first.a, second.a)
    live = first.live & second.live
    uniform = first.visible / np.maximum(first.n, 1)[..., None]
    middle = (p + q) / 2
    tv, tv_max = mean_and_max(np.sum(abs(p - q), axis=-1) / 2, live)
    kl, kl_max = mean_and_max(_kl(p, q), live)
    js, js_max = mean_and_max((_kl(p, middle) + _kl(q, middle)) / 2, live)
    overlap = np.sum(np.sqrt(p) * np.sqrt(q), axis=-1)
    hellinger2, hellinger2_max = mean_and_max(np.maximum(0.0, 1 - overlap), live)
    return Comparison(
        tv=tv,
        tv_max=tv_max,
        kl=kl,
        kl_max=kl_max,
        js=js,
        js_max=js_max,
        hellinger2=hellinger2,
        hellinger2_max=hellinger2_max,
        tv_uniform=mean_of_rows(np.sum(abs(uniform - q), axis=-1) / 2, live),
        output_error=None if v is None else _output_error(p, q, live, v),
        dead=np.sum(~live, axis=-1)[()],
    )


def mean_and_max(values: Floats, live: NDArray[np.bool_]) -> tuple[Any, Any]:
    """Over the live rows."""
    largest = np.max(np.where(live, values, -np.inf), axis=-1, initial=-np.inf)
    return mean_of_rows(values, live), np.where(np.any(live, axis=-1), largest, np.nan)[()]


def _kl(p: Floats, q: Floats) -> Floats:
    """sum_s p log2(p / q), in bits."""
    kl: Floats = np.sum(x_log2_y(p, p) - x_log2_y(p, q), axis=-1)
    return np.maximum(0.0, kl)


def _output_error(p: Floats, q: Floats, live: NDArray[np.bool_], v: Array) -> Any:
    """|A v - B v| / |B v| over the live rows."""
    values, _ = matrix("v", v)
    if values.shape[-2] != p.shape[-1]:
        raise ValueError(f"`v` must have as many tokens as there are keys, {p.shape[-1]}, got {values.shape}.")
    _checks.leading(weights=p.shape[:-2], v=values.shape[:-2])
    kept = live[..., None]
    got, want = np.where(kept, p @ values, 0.0), np.where(kept, q @ values, 0.0)
    error = np.sqrt(np.sum((got - want) ** 2, axis=(-2, -1)))
    size = np.sqrt(np.sum(want**2, axis=(-2, -1)))
    return np.where(size > 0, error / np.where(size > 0, size, 1.0), np.where(error > 0, np.inf, 0.0))[()]
