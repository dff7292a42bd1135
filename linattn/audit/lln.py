"""Linear Log-Normal attention by its definition, its scales by a quadrature of their own. NumPy alone.

    A[t, s] = sum_r exp(alpha q[t, r] + beta k[s, r]) over the visible s, divided by its sum over s

Arguments may be complex: moments are analytic in q and k, and chi follows its target through V'(chi).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linattn.audit.loglinear import exponentials, log_weights

__all__ = ["chi_of", "lln", "lln_diag", "lln_features", "log_variance", "scales"]

Array = NDArray[Any]

PAPER = (0.14855178144710912, -0.35487039130661086)  # a, b of the authors' code: V = a chi + b


def lln(
    q: Array,
    k: Array,
    pairs: Any,
    *,
    alpha: Any = None,
    beta: Any = None,
    calibration: Any = "paper",
    scope: str = "tensor",
    statistics: str = "detached",
) -> Array:
    """LLN attention (Nahshan et al., arXiv:2311.13541)."""
    if alpha is None and pairs.visible.size == 0:
        alpha = beta = np.ones((1, 1))  # no row, or no key: no weight either
    elif alpha is None:
        whole, known_q, known_k = pairs.every_q, None, pairs.visible[..., :1, :].swapaxes(-1, -2)
        if pairs.n_queries == pairs.n_keys:
            known_q = known_k
        if statistics == "detached":
            alpha, beta = scales(whole.real, k.real, known_q, known_k, calibration, scope)
        else:
            alpha, beta = scales(whole, k, known_q, known_k, calibration, scope)
    else:
        alpha, beta = (np.asarray(x, dtype=float)[..., None, None] for x in (alpha, beta))
    return log_weights(alpha * q, beta * k, pairs.visible)


def lln_diag(q: Array, k: Array, pairs: Any, *, block: int | None = None, ratio: Any = 0.5, **parameters: Any) -> Array:
    """LLN + Diag: ratio LLN + (1 - ratio) softmax within aligned blocks; where that sees nothing, LLN alone."""
    block = max(q.shape[-1], 1) if block is None else block
    near = pairs.visible & (pairs.t[:, None] // block == pairs.s // block)
    scores = (q @ np.swapaxes(k, -1, -2)) * max(q.shape[-1], 1) ** -0.5
    top = np.max(np.where(near, scores.real, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
    g = np.where(near, np.exp(np.where(near, scores - np.where(np.isneginf(top), 0, top), 0)), 0)
    g = g / np.where(np.any(near, axis=-1, keepdims=True), np.sum(g, axis=-1, keepdims=True), 1)
    ratio = np.asarray(ratio, dtype=float)[..., None, None]
    ratio = np.where(np.any(near, axis=-1, keepdims=True), ratio, 1.0)
    return ratio * lln(q, k, pairs, **parameters) + (1 - ratio) * g


def lln_features(q: Array, k: Array, *, alpha: Any, beta: Any, **_: Any) -> tuple[Array, Array]:
    """Phi with A[t, s] = Phi_q[t] . Phi_k[s] over its sum, for given scales."""
    alpha, beta = (np.asarray(x, dtype=float)[..., None, None] for x in (alpha, beta))
    return exponentials(alpha * q, beta * k)


# ------------------------------------------------------------------------------------------------ the scales


def scales(q: Array, k: Array, known_q: Any, known_k: Any, calibration: Any, scope: str) -> tuple[Array, Array]:
    """alpha = sqrt(chi / 2) / sigma_q, beta = sqrt(chi / 2) / sigma_k with V(chi, D) = sigma_q^2 sigma_k^2.

    known_q, known_k: which tokens count, (..., T, 1), or None.
    """
    lead_k = k.shape[:-2] if known_k is None else np.broadcast_shapes(k.shape[:-2], known_k.shape[:-2])
    sigma_q, sigma_k = deviation(q, known_q, scope, lead_k), deviation(k, known_k, scope, None)
    target = (sigma_q * sigma_k) ** 2
    if calibration == "exact":
        flat = [chi_of(x, q.shape[-1]) for x in target.real.ravel()]
        chi = np.array([c for c, _ in flat]).reshape(target.shape)
        chi = chi + (target - target.real) / np.array([slope for _, slope in flat]).reshape(target.shape)
    else:
        a, b = PAPER if calibration == "paper" else calibration
        chi = (target - b) / a
    return np.sqrt(chi / 2) / sigma_q, np.sqrt(chi / 2) / sigma_k


def deviation(x: Array, known: Any, scope: str, lead_k: tuple[int, ...] | None) -> Array:
    """Standard deviation, count less 1, of all numbers of a scope.

    tensor: everything; sample: each sequence and head; head: each head, over the first of two or more leading axes.
    Queries of heads that share keys are one sample.
    """
    if known is not None:
        known = np.broadcast_to(known, np.broadcast_shapes(x.shape, known.shape))
        x = np.broadcast_to(x, known.shape)
    lead = x.shape[:-2]
    axes = {-1, -2}
    if scope == "tensor":
        axes |= {-3 - i for i in range(len(lead))}
    if scope == "head" and len(lead) > 1:
        axes |= {-2 - len(lead)}
    if lead_k is not None:
        padded = (1,) * len(lead) + tuple(lead_k)
        axes |= {-3 - i for i in range(len(lead)) if padded[-1 - i] == 1 and lead[-1 - i] != 1}
    where = True if known is None else known
    axis = tuple(axes)
    count = np.sum(np.broadcast_to(where, x.shape), axis=axis, keepdims=True)
    x = np.where(where, x, 0)
    mean = np.sum(x, axis=axis, keepdims=True) / count
    return np.sqrt(np.sum(np.where(where, (x - mean) ** 2, 0), axis=axis, keepdims=True) / (count - 1))


# ------------------------------------------------------------------------------------------------ V(chi, D)


def log_variance(chi: float, dim: int) -> float:
    """Var ln sum_r exp(sqrt(chi) z_r) over `dim` normal z, from T = E / S: Var ln T - pi^2 / 6.

    P(ln T > c) = phi(c)^D, phi(c) = E_z exp(-exp(c + sqrt(chi) z)); trapezoids over z and c.
    """
    root = math.sqrt(chi)
    z = np.linspace(-10, 10, 1 + 2 * math.ceil(max(150, 33 * root)))
    weights = np.exp(-(z**2) / 2)
    weights /= weights.sum()
    lowest, highest = -40 - 10 * root - math.log(dim), 5 + 10 * root
    c = np.linspace(lowest, highest, 1 + math.ceil(max(600, 4 * (highest - lowest))))
    density = np.empty_like(c)
    with np.errstate(all="ignore"):
        for i in range(0, len(c), 256):
            e = np.exp(np.minimum(c[i : i + 256, None] + root * z, 700.0))
            below = np.minimum(-np.expm1(-e) @ weights, 1.0)
            power = np.exp((dim - 1) * np.log1p(-below)) if dim > 1 else 1.0
            density[i : i + 256] = power * ((e * np.exp(-e)) @ weights)
    density /= density.sum()
    mean = density @ c
    return float(density @ (c - mean) ** 2) - math.pi**2 / 6


@lru_cache(maxsize=1024)
def chi_of(target: float, dim: int) -> tuple[float, float]:
    """chi with V(chi, D) = target by bracketing and false position; V'(chi) from a polynomial through points around."""
    if target < 1e-7:
        return dim * target, 1 / dim
    low, high = 0.0, 1.0
    f_low, f_high = -target, log_variance(high, dim) - target
    while f_high < 0:
        low, f_low, high = high, f_high, 2 * high
        f_high = log_variance(high, dim) - target
    chi, side = high, 0
    for _ in range(100):
        chi = (low * f_high - high * f_low) / (f_high - f_low)
        f = log_variance(chi, dim) - target
        if abs(f) <= 1e-14 * target or high - low <= 1e-15 * high:
            break
        if f > 0:
            high, f_high, f_low, side = chi, f, f_low / 2 if side == 1 else f_low, 1
        else:
            low, f_low, f_high, side = chi, f, f_high / 2 if side == -1 else f_high, -1
    near = np.polynomial.Chebyshev.interpolate(
        lambda x: np.array([log_variance(chi * math.exp(y), dim) for y in x]), 8, domain=[-0.2, 0.2]
    )
    return chi, float(near.deriv()(0.0)) / chi
