"""The truth of Combiner: a softmax inside each region, and one over single keys and regions; see truth.py.

    l = scale rho_r . k_s,  Pi = softmax of l inside a region,  u = Pi v
    s = scale q_t . k_s,    f = scale q_t . kappa_r + b_r,      P = one softmax over [s, f]
    A = P_direct + P_regions Pi

What flows back is written here a second time; balls, which derive nothing by hand, hold it on small cases.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from linattn.audit import bounds
from linattn.audit.combiner import plans_of
from linattn.audit.units import FIRST_ORDER, NOT_SMALL, Arithmetic, Truth, centred

__all__ = ["by_regions"]

Array = NDArray[Any]


def by_regions(
    attend: Any, q: Array, k: Array, v: Array, g: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic
) -> Truth:
    """One plan, pooled by maxima, without a bias."""
    if attend.pool != "max" or attend.size_bias or attend.pattern != "fixed":
        raise ValueError(f"the bound holds for pooled maxima of spans, got {attend!r}.")
    n, causal = len(q), bool(len(q) > 1 and not visible[0, -1] and visible[-1, -1])
    mask = visible.any(axis=0)
    (plan,) = plans_of(attend.pattern, n, attend.span, causal, attend.mix)
    scale = q.dtype.type(attend.scale or 1) if attend.scale else 1 / np.sqrt(q.dtype.type(max(q.shape[1], 1)))
    members, direct = plan.members & mask, plan.direct & mask
    users = plan.users & members.any(axis=1)
    rho, from_q = largest(q, members)
    kappa, from_k = largest(k, members)

    (pi,), (e_pi,) = softmaxed(scale, [(rho, k, members)], arithmetic)
    (p_near, p_far), e_outer = softmaxed(scale, [(q, k, direct), (q, kappa, users)], arithmetic)
    vc, size_vc = centred(v, visible, arithmetic)
    a = p_near + p_far @ pi

    def back(g: Array, v: Array, sign: float, q: Array, k: Array, rho: Array, kappa: Array) -> dict[str, Array]:
        """Cotangents; with sizes for arguments and sign = 1, the sizes of their terms."""
        u = pi @ v
        h_near, h_far = g @ v.T, g @ u.T
        m = (p_near * h_near).sum(axis=1, keepdims=True) + (p_far * h_far).sum(axis=1, keepdims=True)
        d_s, d_f = p_near * (h_near + sign * m), p_far * (h_far + sign * m)
        d_u = p_far.T @ g
        h_pi = d_u @ v.T
        d_l = pi * (h_pi + sign * (pi * h_pi).sum(axis=1, keepdims=True))
        d_q = d_s @ k + d_f @ kappa + spread(d_l @ k, from_q, n)
        d_k = d_s.T @ q + d_l.T @ rho + spread(d_f.T @ q, from_k, n)
        return {"d_q": scale * d_q, "d_k": scale * d_k}

    value = {"out": a @ v, "d_v": a.T @ g, **back(g, vc, -1, q, k, rho, kappa)}
    sizes = [abs(x) for x in (q, k, rho, kappa)]
    terms = {"out": a @ abs(v), "d_v": a.T @ abs(g), **back(abs(g), size_vc, 1, *sizes)}

    # a weight of the outer softmax errs by its exponent and by the row's mean of them, one of the inner likewise
    row = sum((x * e).sum(axis=1, keepdims=True) for x, e in zip((p_near, p_far), e_outer, strict=True))
    of_pi = pi * (e_pi + (pi * e_pi).sum(axis=1, keepdims=True))
    of_a = p_near * (e_outer[0] + row) + (p_far * (e_outer[1] + row)) @ pi + p_far @ of_pi
    most = 2 * sum(np.max(e, initial=0) for e in (*e_outer, e_pi))
    errors = {"out": of_a / 2 @ abs(v), "d_v": (of_a / 2).T @ abs(g)} | {x: most * terms[x] for x in ("d_q", "d_k")}
    sides = (1 + abs(x).max(initial=0) for x in (q, k, v, g))
    most_q, most_k, most_v, most_g = sides
    one = np.ones(())
    underflow = {"out": one * most_v, "d_q": one * most_g * most_v * most_k, "d_k": one * most_g * most_v * most_q,
                 "d_v": one * most_g}  # fmt: skip
    exact = all((arithmetic.u * e <= FIRST_ORDER).all() for e in (*e_outer, e_pi))
    return Truth(value, terms, errors, underflow, "" if exact else NOT_SMALL, "" if exact else NOT_SMALL)


def largest(x: Array, members: NDArray[np.bool_]) -> tuple[Array, Array]:
    """The largest of each channel over a region's tokens, of equal ones the first, and whose it is: (R, D) each."""
    if not len(members):
        return np.zeros((0, x.shape[1]), x.dtype), np.zeros((0, x.shape[1]), int)
    index = np.argmax(np.where(members[:, :, None], x, -np.inf), axis=1)
    found = np.take_along_axis(x, index, axis=0)
    return np.where(members.any(axis=1, keepdims=True), found, 0), index


def spread(d_pooled: Array, index: Array, n: int) -> Array:
    """Each entry (R, D) back to the token it is of: (N, D)."""
    d_x = np.zeros((n, d_pooled.shape[1]), d_pooled.dtype)
    np.add.at(d_x, (index, np.arange(d_pooled.shape[1])), d_pooled)
    return d_x


def softmaxed(
    scale: Any, parts: list[tuple[Array, Array, NDArray[np.bool_]]], arithmetic: Arithmetic
) -> tuple[list[Array], list[Array]]:
    """Of scores scale a . b where seen, in one softmax: the weights, and their exponents' errors over u."""
    scores = [scale * (a @ b.T) for a, b, _ in parts]
    tops = [np.where(seen, s, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
            for s, (_, _, seen) in zip(scores, parts, strict=True)]  # fmt: skip
    top = np.maximum.reduce(tops)
    top = np.where(np.isneginf(top), 0, top)
    shifted = [np.where(seen, s - top, 0) for s, (_, _, seen) in zip(scores, parts, strict=True)]
    weights = [np.where(seen, np.exp(s), 0) for s, (_, _, seen) in zip(shifted, parts, strict=True)]
    total = sum(w.sum(axis=1, keepdims=True) for w in weights)
    weights = [np.where(total == 0, 0, w / np.where(total == 0, 1, total)) for w in weights]
    errors = [
        np.where(seen, bounds.score_error(scale * (abs(a) @ abs(b).T), abs(s), a.shape[1]), 0)
        for s, (a, b, seen) in zip(shifted, parts, strict=True)
    ]
    return weights, errors
