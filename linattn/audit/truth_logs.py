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

__all__ = ["by_logs", "by_logs_and_blocks", "log_errors", "logarithms"]

Array = NDArray[Any]


class Exponents(NamedTuple):
    """Slopes of the logarithms, their sizes: |dl/dx| entry by entry with nothing cancelled; errors over u."""

    error_q: Array  # (N, R)
    error_k: Array  # (M, R)
    slopes_q: Array  # (N, R, D)
    slopes_k: Array  # (M, R, D)


def logarithms(attend: Any, q: Array, k: Array) -> tuple[Array, Array]:
    """lq, lk; arguments may be complex."""
    parameters = quadratic.formula_of(attend).parameters
    name = type(attend).__name__
    if name == "Performer":
        names = ("projection", "features", "scale", "calibration", "eps")
        return log_features(q, k, **{x: parameters[x] for x in names})
    if name in ("LLN", "LLNDiag"):
        if parameters["alpha"] is None:
            raise ValueError(f"the bound holds for given alpha and beta, got {attend!r}.")
        return parameters["alpha"] * q, parameters["beta"] * k
    return q, k  # Linear("exp")


def exponents(attend: Any, q: Array, k: Array, arithmetic: Arithmetic) -> Exponents:
    """What the making of the logarithms, in float64, and of their exponentials may do."""
    parameters = quadratic.formula_of(attend).parameters
    made = bounds.MADE / arithmetic.u  # one rounding of float64, in u
    one = bounds.LOG_ERROR + np.zeros((1, 1))
    (N, D), M, eye = q.shape, len(k), np.eye(q.shape[1])
    if type(attend).__name__ == "Performer":
        if parameters["calibration"] is not None or parameters["eps"]:
            raise ValueError(f"the bound holds without calibration and eps, got {attend!r}.")
        scale = parameters["scale"] or max(D, 1) ** -0.5
        w = abs(np.asarray(parameters["projection"](D), float))
        w = np.concatenate([w, w]) if parameters["features"] == "hyperbolic" else w
        x, y = (abs(z.astype(float)) * scale**0.5 for z in (q, k))
        half = (y * y).sum(axis=1, keepdims=True) / 2
        return Exponents(
            one + made * bounds.projection_depth(D) * (x @ w.T),
            one + made * (bounds.projection_depth(D) + 3) * (y @ w.T + half),
            np.broadcast_to(w * scale**0.5, (N, *w.shape)),
            scale**0.5 * (w + y[:, None, :]),
        )
    alpha, beta = (parameters.get(name, 1.0) for name in ("alpha", "beta"))
    rounded = made if "alpha" in parameters else 0.0
    return Exponents(
        one + rounded * abs(alpha * q).astype(float),
        one + rounded * abs(beta * k).astype(float),
        np.broadcast_to(abs(alpha) * eye, (N, D, D)),
        np.broadcast_to(abs(beta) * eye, (M, D, D)),
    )


def log_errors(attend: Any, q: Array, k: Array, arithmetic: Arithmetic) -> float:
    """2 e / u at most, of one term."""
    of = exponents(attend, q, k, arithmetic)
    return float(of.error_q.max(initial=0) + of.error_k.max(initial=0))


def by_logs(
    attend: Any, q: Array, k: Array, v: Array, g: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic
) -> Truth:
    """a = sum_r exp(lq + lk); every term has an error of its own, that of its exponent."""
    lq, lk = logarithms(attend, q, k)
    of = exponents(attend, q, k, arithmetic)
    logs = np.where(visible[:, :, None], lq[:, None, :] + lk[None, :, :], -np.inf)
    top = logs.max(axis=(1, 2), keepdims=True, initial=-np.inf)
    a = np.exp(logs - np.where(np.isfinite(top), top, 0))
    den = a.sum(axis=(1, 2), keepdims=True)
    p = np.where(den == 0, 0, a / np.where(den == 0, 1, den))  # (N, M, R), its sum over s and r is 1
    weights = p.sum(axis=2)
    vc, size_vc = centred(v, visible, arithmetic)
    h, size_h = g @ vc.T, (abs(g) @ size_vc.T).astype(float)
    size, small = p.astype(float), weights.astype(float)
    size_h = size_h + (small * size_h).sum(axis=1, keepdims=True)
    d_l = p * (h - (weights * h).sum(axis=1, keepdims=True))[:, :, None]
    size_d_l = size * size_h[:, :, None]
    value = {"out": weights @ v, "d_v": weights.T @ g}
    terms = {"out": small @ abs(v).astype(float), "d_v": small.T @ abs(g).astype(float)}
    derivatives = derivative_of(lambda a, b: logarithms(attend, a, b), q, k, d_l.sum(axis=1), d_l.sum(axis=0))
    value["d_q"], value["d_k"] = derivatives

    def back(d_l: Array) -> tuple[Array, Array]:
        """Sizes of cotangents: |dl/dx| d_l, summed over r."""
        return (
            np.einsum("tr,trd->td", d_l.sum(axis=1), of.slopes_q),
            np.einsum("sr,srd->sd", d_l.sum(axis=0), of.slopes_k),
        )

    terms["d_q"], terms["d_k"] = back(size_d_l)
    e = np.where(visible[:, :, None], of.error_q[:, None, :] + of.error_k[None, :, :], 0)  # over u
    e = np.broadcast_to(e, size.shape)
    of_pairs = np.where(size > 0, size * e, 0)  # a term that is 0 has no error
    rows = of_pairs.sum(axis=(1, 2))
    share = (of_pairs.sum(axis=2) + small * rows[:, None]) / 2  # of one weight
    spread = (of_pairs.sum(axis=2) * size_h).sum(axis=1)
    of_d_l = (of_pairs + size * rows[:, None, None]) / 2 * size_h[:, :, None] + size * spread[:, None, None]
    errors = {"out": share @ abs(v).astype(float), "d_v": share.T @ abs(g).astype(float)}
    errors["d_q"], errors["d_k"] = back(of_d_l)

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
    live = abs(logs[np.isfinite(logs) | np.isnan(logs)])
    fits = bool((arithmetic.u * e <= FIRST_ORDER).all()) and bool((live < bounds.LOG_LIMIT).all())
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
