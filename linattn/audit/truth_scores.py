"""The truth of softmax attention, a_ts = exp(s_ts): every pair has an error of its own; see truth.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from linattn.audit import bounds
from linattn.audit.units import FIRST_ORDER, NOT_SMALL, Arithmetic, Truth, centred

__all__ = ["by_scores"]

Array = NDArray[Any]


def by_scores(
    attend: Any, q: Array, k: Array, v: Array, g: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic
) -> Truth:
    """a = exp(scale q k^T); every pair has an error of its own, that of its exponent."""
    given = getattr(attend, "scale", None)
    scale = 1 / np.sqrt(q.dtype.type(max(q.shape[1], 1))) if given is None else q.dtype.type(given)
    scores = scale * (q @ k.T)
    top = np.where(visible, scores, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    shifted = np.where(visible, scores - top, 0)
    a = np.where(visible, np.exp(shifted), 0)
    den = a.sum(axis=1, keepdims=True)
    p = np.where(den == 0, 0, a / np.where(den == 0, 1, den))
    vc, size_vc = centred(v, visible, arithmetic)
    h, size_h = g @ vc.T, abs(g) @ size_vc.T
    H, size_H = ((p * x).sum(axis=1, keepdims=True) for x in (h, size_h))
    d_s, size_d_s = p * (h - H), p * (size_h + size_H)
    value = {"out": p @ v, "d_q": scale * (d_s @ k), "d_k": scale * (d_s.T @ q), "d_v": p.T @ g}
    terms = {"out": p @ abs(v), "d_q": scale * (size_d_s @ abs(k)), "d_k": scale * (size_d_s.T @ abs(q)),
             "d_v": p.T @ abs(g)}  # fmt: skip
    sizes = scale * (abs(q) @ abs(k).T)
    e = np.where(visible, bounds.score_error(sizes, abs(shifted), q.shape[1]), 0)  # over u
    share = (e + (p * e).sum(axis=1, keepdims=True)) / 2  # of one weight
    of_d_s = p * (share * (size_h + size_H) + (p * e * size_h).sum(axis=1, keepdims=True))
    errors = {"out": (share * p) @ abs(v), "d_q": scale * (of_d_s @ abs(k)), "d_k": scale * (of_d_s.T @ abs(q)),
              "d_v": (share * p).T @ abs(g)}  # fmt: skip
    most_q, most_k, most_v, most_g = (1 + abs(x).max(initial=0) for x in (q, k, v, g))
    one = np.ones(())
    underflow = {"out": one * most_v, "d_q": one * most_g * most_v * most_k, "d_k": one * most_g * most_v * most_q,
                 "d_v": one * most_g}  # fmt: skip
    unclaimed = NOT_SMALL if (arithmetic.u * e > FIRST_ORDER).any() else ""
    return Truth(value, terms, errors, underflow, unclaimed, unclaimed)
