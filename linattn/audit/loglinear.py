"""The definition of log-linear attention, pair by pair: features given by their logarithms. NumPy alone.

    A[t, s] = sum_r exp(lq[t, r] + lk[s, r])  over the visible s, divided by its sum over s

Arguments may be complex: every comparison looks at the real part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["exponentials", "log_similarity", "log_weights"]

Array = NDArray[Any]
PAIRS = 1 << 22  # entries of a block of exponentials


def log_similarity(lq: Array, lk: Array, visible: NDArray[np.bool_]) -> tuple[Array, Array]:
    """a (..., N, M) and c (..., N, 1) with A = a exp(c): c[t] = the largest lq[t, r] + lk[s, r] that t sees.

    lq (..., N, R), lk (..., M, R), visible (..., N, M). Rows that see nothing have a = 0, c = -inf.
    """
    n_queries, n_keys, n_features = lq.shape[-2], lk.shape[-2], lq.shape[-1]
    lead = np.broadcast_shapes(lq.shape[:-2], lk.shape[:-2], visible.shape[:-2])
    dtype = np.result_type(lq, lk, np.float64)
    a, c = np.zeros((*lead, n_queries, n_keys), dtype), np.full((*lead, n_queries, 1), -np.inf, lq.real.dtype)
    if n_keys * n_features == 0:
        return a, c
    size = max(1, PAIRS // (n_keys * n_features * max(1, int(np.prod(lead)))))
    for t in range(0, n_queries, size):
        logs = lq[..., t : t + size, None, :] + lk[..., None, :, :]
        logs = np.where(visible[..., t : t + size, :, None], logs, -np.inf)
        top = np.max(logs.real, axis=(-1, -2), keepdims=True)
        safe = np.where(np.isneginf(top), 0, top)
        a[..., t : t + size, :] = np.sum(np.exp(logs - safe), axis=-1)
        c[..., t : t + size, :] = top[..., 0]
    return a, c


def log_weights(lq: Array, lk: Array, visible: NDArray[np.bool_]) -> Array:
    """A[t, s] / sum_s A[t, s]; a row that sees nothing is zero."""
    a, _ = log_similarity(lq, lk, visible)
    den = np.sum(a, axis=-1, keepdims=True)
    return np.where(den == 0, 0, a / np.where(den == 0, 1, den))


def exponentials(lq: Array, lk: Array) -> tuple[Array, Array]:
    """exp(lq + m - c), exp(lk - m): m_r = max_s lk[s, r] and c_t = max_r (lq[t, r] + m_r) cancel in the weights."""
    if lk.shape[-2] * lk.shape[-1] == 0:
        return np.exp(lq), np.exp(lk)
    m = np.max(lk.real, axis=-2, keepdims=True)
    c = np.max(lq.real + m, axis=-1, keepdims=True)
    return np.exp(lq + m - c), np.exp(lk - m)
