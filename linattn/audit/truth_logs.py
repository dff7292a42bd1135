"""The truth of attentions whose features are given by logarithms, and of those that add softmax inside blocks.

    a_ts = sum_r exp(l_tsr),   l_tsr = lq_tr + lk_sr

The relative error of a term is the absolute error of its exponent. Sums of absolute terms, of exponents and of
results, are formed beside the values; what they mean: truth.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn.audit import bounds, quadratic
from linattn.audit.lln import scales
from linattn.audit.performer import log_features
from linattn.audit.truth_scores import by_scores
from linattn.audit.units import (
    FIRST_ORDER,
    NOT_SMALL,
    PASSES,
    Arithmetic,
    Truth,
    centred,
    derivative_of,
)

__all__ = ["by_logs", "by_logs_and_blocks", "log_errors", "logarithms", "matched"]

Array = NDArray[Any]
Scales = tuple[Any, Any] | None
SMALL_LOGS = 64.0  # so small that exponentials of either side have every digit and nothing leaves the range


class Exponents(NamedTuple):
    """Slopes of the logarithms, their sizes: |dl/dx| entry by entry with nothing cancelled; errors over u."""

    error_q: Array  # (N, R)
    error_k: Array  # (M, R)
    slopes_q: Array  # (N, R, D)
    slopes_k: Array  # (M, R, D)


def logarithms(attend: Any, q: Array, k: Array, given: Scales = None) -> tuple[Array, Array]:
    """lq, lk; arguments may be complex."""
    parameters = quadratic.formula_of(attend).parameters
    name = type(attend).__name__
    if name == "Performer":
        names = ("projection", "features", "scale", "calibration", "eps")
        return log_features(q, k, **{x: parameters[x] for x in names})
    if name in ("LLN", "LLNDiag"):
        alpha, beta = given or (parameters["alpha"], parameters["beta"])
        return alpha * q, beta * k
    return q, k  # Linear("exp")


def matched(attend: Any, q: Array, k: Array, visible: NDArray[np.bool_]) -> Scales:
    """alpha and beta of LLN where the call's own moments give them, constants as they are to its backward."""
    if getattr(attend, "alpha", 0) is not None:
        return None
    if attend.calibration != "paper" or attend.statistics != "detached":
        raise ValueError(f"the bound holds for the paper's line and detached statistics, got {attend!r}.")
    known = visible[:1].T
    found = scales(q, k, known if len(q) == len(k) else None, known, attend.calibration, attend.scope)
    return found[0][0, 0], found[1][0, 0]


def exponents(
    attend: Any, q: Array, k: Array, arithmetic: Arithmetic, given: Scales = None, counted: tuple[int, int] = (0, 0)
) -> Exponents:
    """What the making of the logarithms, in float64, and of their exponentials may do.

    `counted`: the numbers of q and of k that scales of the call's own are made of.
    """
    parameters = quadratic.formula_of(attend).parameters
    made = bounds.MADE / arithmetic.u  # one rounding of float64, in u
    one = bounds.LOG_ERROR + np.zeros((1, 1))
    (N, D), M, eye = q.shape, len(k), np.eye(q.shape[1])
    if type(attend).__name__ == "Performer":
        if parameters["eps"]:
            raise ValueError(f"the bound holds without eps, got {attend!r}.")
        scale = parameters["scale"] or max(D, 1) ** -0.5
        w = abs(np.asarray(parameters["projection"](D), float))
        w = np.concatenate([w, w]) if parameters["features"] == "hyperbolic" else w
        stretch, shift, more = calibrated(parameters["calibration"], D)
        x, y = (abs(z.astype(float)) * scale**0.5 for z in (q, k))
        x, y = x * stretch, (y + shift) / stretch
        half = (y * y).sum(axis=1, keepdims=True) / 2
        depth = bounds.projection_depth(D) + more
        return Exponents(
            one + made * depth * (x @ w.T),
            one + made * (depth + 3 + more) * (y @ w.T + half),
            np.broadcast_to(w * scale**0.5 * stretch, (N, *w.shape)),
            scale**0.5 / stretch * (w + y[:, None, :]),
        )
    alpha, beta = given or (parameters.get(name, 1.0) for name in ("alpha", "beta"))
    rounded = made * (1 + (bounds.matched_error(*counted) if given else 0)) if "alpha" in parameters else 0.0
    return Exponents(
        one + rounded * abs(alpha * q).astype(float),
        one + rounded * abs(beta * k).astype(float),
        np.broadcast_to(abs(float(alpha)) * eye, (N, D, D)),
        np.broadcast_to(abs(float(beta)) * eye, (M, D, D)),
    )


def calibrated(calibration: Any, n_channels: int) -> tuple[Array, Array, int]:
    """|A|, |c| of x' = A x, y' = A^-1 (y - c), and how many roundings it adds; 1, 0 and none without it."""
    if calibration is None:
        return np.ones(n_channels), np.zeros(n_channels), 0
    a, c = calibration[:2]
    if a is None or np.count_nonzero(a) > n_channels:
        raise ValueError('the bound holds for calibrations by rule="scale".')
    return abs(np.diagonal(a)), abs(np.asarray(c)), bounds.CALIBRATED


def log_errors(attend: Any, q: Array, k: Array, arithmetic: Arithmetic) -> float:
    """2 e / u at most, of one term."""
    of = exponents(attend, q, k, arithmetic)
    return float(of.error_q.max(initial=0) + of.error_k.max(initial=0))


def similarities(lq: Array, lk: Array, visible: NDArray[np.bool_]) -> tuple[Array, float]:
    """exp(lq + lk) over a number of each row, (N, M, R), 0 where not visible; the size of the logarithms that are."""
    seen = visible[:, :, None]
    size = float(abs(lq).max(initial=0) + abs(lk).max(initial=0))
    if size <= SMALL_LOGS:
        a = np.exp(lq)[:, None, :] * np.exp(lk)[None, :, :]
        return (a if visible.all() else a * seen), size
    logs = lq[:, None, :] + lk[None, :, :]
    size = float(abs(np.where(seen & ~np.isneginf(logs), logs, 0)).max(initial=0))
    logs = np.where(seen, logs, -np.inf)
    top = logs.max(axis=(1, 2), keepdims=True, initial=-np.inf)
    return np.exp(logs - np.where(np.isfinite(top), top, 0)), size


def over_pairs(p: Array, x: Array) -> tuple[Array, Array]:
    """sum_s p[t, s, r] x[t, s] for each query and sum_t for each key."""
    return np.einsum("tsr,ts->tr", p, x), np.einsum("tsr,ts->sr", p, x)


def by_logs(
    attend: Any, q: Array, k: Array, v: Array, g: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic
) -> Truth:
    """a = sum_r exp(lq + lk); every term has an error of its own, that of its exponent."""
    given, seen = matched(attend, q, k, visible), int(visible.any(axis=0).sum())
    lq, lk = logarithms(attend, q, k, given)
    counted = (seen if len(q) == len(k) else len(q)) * q.shape[1], seen * q.shape[1]
    of = exponents(attend, q, k, arithmetic, given, counted)
    a, largest = similarities(lq, lk, visible)
    den = a.sum(axis=(1, 2), keepdims=True)
    p = a / np.where(den == 0, 1, den)  # (N, M, R), its sum over s and r is 1
    weights = p.sum(axis=2)
    vc, size_vc = centred(v, visible, arithmetic)
    h, size_h = g @ vc.T, (abs(g) @ size_vc.T).astype(float)
    size, small = p.astype(float), weights.astype(float)
    size_h = size_h + (small * size_h).sum(axis=1, keepdims=True)
    value = {"out": weights @ v, "d_v": weights.T @ g}
    terms = {"out": small @ abs(v).astype(float), "d_v": small.T @ abs(g).astype(float)}
    d_l = over_pairs(p, h - (weights * h).sum(axis=1, keepdims=True))
    value["d_q"], value["d_k"] = derivative_of(lambda a, b: logarithms(attend, a, b, given), q, k, *d_l)

    def back(of_q: Array, of_k: Array) -> tuple[Array, Array]:
        """Sizes of cotangents: |dl/dx| d_l, summed over r."""
        return np.einsum("tr,trd->td", of_q, of.slopes_q), np.einsum("sr,srd->sd", of_k, of.slopes_k)

    terms["d_q"], terms["d_k"] = back(*over_pairs(size, size_h))
    e = of.error_q[:, None, :] + of.error_k[None, :, :]  # over u
    of_pairs = size * e
    if not np.isfinite(e).all():
        of_pairs = np.where(size > 0, of_pairs, 0)  # a term that is 0 has no error
    of_weights = of_pairs.sum(axis=2)
    rows = of_weights.sum(axis=1, keepdims=True)
    share = (of_weights + small * rows) / 2  # of one weight
    spread = (of_weights * size_h).sum(axis=1, keepdims=True)
    errors = {"out": share @ abs(v).astype(float), "d_v": share.T @ abs(g).astype(float)}
    # of d_l: (of_pairs + size rows) / 2 size_h + size spread
    parts = over_pairs(of_pairs, size_h / 2), over_pairs(size, rows * size_h / 2 + spread)
    errors["d_q"], errors["d_k"] = back(*(x + y for x, y in zip(*parts, strict=True)))

    most_v, most_g = 1 + abs(v).max(initial=0), 1 + abs(g).max(initial=0)
    # products below the range: 1/2 <= den, and a key's feature, up to 2^G, may meet a query's that has vanished
    lost = np.ones(()) * 2.0 ** bounds.gauge_bits(arithmetic.sums) * (1 + size.shape[1] * size.shape[2]) * most_v
    steep_q, steep_k = (1 + x.max(initial=0) for x in (of.slopes_q, of.slopes_k))
    underflow = {
        "out": lost,
        "d_q": lost * most_g * steep_q,
        "d_k": lost * most_g * steep_k * max(len(q), 1),
        "d_v": lost * most_g * max(len(q), 1),
    }
    most_e = np.where(visible, e.max(axis=2, initial=0), 0).max(initial=0)
    fits = bool(arithmetic.u * most_e <= FIRST_ORDER) and bool(largest < bounds.LOG_LIMIT)
    unclaimed = "" if fits else NOT_SMALL
    return Truth(value, terms, errors, underflow, unclaimed, unclaimed)


def by_logs_and_blocks(
    attend: Any, q: Array, k: Array, v: Array, g: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic
) -> Truth:
    """share LLN + (1 - share) softmax inside blocks: truths, terms and errors are added like the parts themselves."""
    block = max(q.shape[1], 1) if attend.block is None else attend.block
    near = visible & (np.arange(len(q))[:, None] // block == np.arange(len(k)) // block)
    share = np.where(near.any(axis=1, keepdims=True), float(attend.ratio), 1.0)
    parts = [
        (share, by_logs(attend, q, k, v, share * g, visible, arithmetic)),
        (1 - share, by_scores(attend, q, k, v, (1 - share) * g, near, arithmetic)),
    ]

    def mixed(which: str) -> dict[str, Array]:
        dicts = [getattr(part, which) for _, part in parts]
        out = sum(weight * of["out"] for (weight, _), of in zip(parts, dicts, strict=True))
        return {"out": out} | {name: sum(of[name] for of in dicts) for name in PASSES[1:]}

    fields = {which: mixed(which) for which in ("value", "terms", "errors", "underflow")}
    unclaimed = next((part.unclaimed for _, part in parts if part.unclaimed), "")
    return Truth(**fields, unclaimed=unclaimed, unclaimed_backward=unclaimed)
