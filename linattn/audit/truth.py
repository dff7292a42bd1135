"""What a result should be and how large an error the bound allows: the definition's output and cotangents, and for
each entry the sum of its absolute terms, in float64 or, where the processor has it, in extended precision.

With features, a_ts = Phi_q[t] . Phi_k[s] (`quadratic.FEATURES`); others: truth_scores.py, truth_logs.py,
truth_regions.py.

    A = a / c,   h_ts = g_t . (v_s - mu),   H_t = sum_s A_ts h_ts
    d_a_ts = (h_ts - H_t) / c_t             d_v = A^T g
    S: the same sums with |g_t| . |v_s - mu| for h and nothing subtracted

mu is the mean of the visible values: it changes no cotangent, and it is what the library subtracts as well. Features
are pulled back by complex steps, so their derivative is not written down a second time.

All inputs are one head: q (N, D), k (M, D), v (M, E), d_out (N, E).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import linattn as la
from linattn.audit import bounds, quadratic, subjects
from linattn.audit.truth_logs import by_logs, by_logs_and_blocks, log_errors
from linattn.audit.truth_regions import by_regions
from linattn.audit.truth_scores import by_scores
from linattn.audit.units import Arithmetic, Truth, centred, extended, pulled_back

__all__ = ["KINDS", "largest_error", "truth"]

Array = NDArray[Any]
SIGNED = "signed features: denominators may vanish"
SPARE = 2.0**12  # between a term and the largest number: so many terms may be summed


def truth(
    attend: Any, q: Array, k: Array, v: Array, d_out: Array, arithmetic: Arithmetic, *, causal: bool = False,
    key_mask: Array | None = None,
) -> Truth:  # fmt: skip
    """The truth of one call, and what its error is measured by."""
    real = extended(arithmetic.dtype)
    q, k, v, d_out = (np.asarray(x).astype(real) for x in (q, k, v, d_out))
    pairs = quadratic.pairs_of(q, k, causal, key_mask, None)
    visible = pairs.visible
    if key_mask is not None:
        v = np.where(np.asarray(key_mask)[:, None], v, 0)
    with np.errstate(all="ignore"):
        return KINDS[subjects.engine_of(attend)](attend, q, k, v, d_out, visible, arithmetic)


# ------------------------------------------------------------------------------------------------ features


def by_features(
    attend: Any, q: Array, k: Array, v: Array, g: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic
) -> Truth:
    """a = Phi_q Phi_k^T."""
    parameters = quadratic.formula_of(attend).parameters
    features = quadratic.FEATURES[type(attend).__name__]
    phi_q, phi_k = features(q, k, **parameters)
    power = powers(abs(phi_q), arithmetic.tiny) if arithmetic.normalize else np.ones((len(q), 1), q.dtype)
    size_q, size_k = (abs(phi_q) * power).astype(float), abs(phi_k).astype(float)
    a = np.where(visible, phi_q @ phi_k.T, 0)
    size_a = np.where(visible, size_q @ size_k.T, 0)
    if arithmetic.normalize:
        if hasattr(attend, "normalize") and attend.eps != "safe":
            raise ValueError(f'the bound holds for eps="safe", got {attend.eps!r}.')
        den = a.sum(axis=1, keepdims=True)
        alive = den != 0
        vc, size_vc = centred(v, visible, arithmetic)
    else:
        den = np.ones((len(q), 1), q.dtype)
        alive = den > 0
        vc, size_vc = v, abs(v).astype(float)
    c = np.where(alive, den, 1)
    size_g, size_v = abs(g).astype(float), abs(v).astype(float)
    size_c = np.where(alive, abs(c) * power, 1).astype(float)  # as large as the library sees it
    weights, size = a / c, size_a / size_c
    h, size_h = g @ vc.T, size_g @ size_vc.T
    d_a, size_d_a = h, size_h
    if arithmetic.normalize:
        d_a = h - (weights * h).sum(axis=1, keepdims=True)
        size_d_a = size_h + (size * size_h).sum(axis=1, keepdims=True)
    d_a = np.where(visible & alive, d_a / c, 0)
    size_d_a = np.where(visible & alive, size_d_a / size_c, 0)

    value = {"out": weights @ v, "d_v": weights.T @ g}
    terms = {"out": size @ size_v, "d_v": size.T @ size_g}
    made = (d_a @ phi_k, d_a.T @ phi_q), (power * (size_d_a @ size_k), size_d_a.T @ size_q)
    of_q, of_k = pulled_back(lambda a, b: features(a, b, **parameters), q, k, *made)
    (value["d_q"], terms["d_q"]), (value["d_k"], terms["d_k"]) = of_q, of_k
    e_q, e_k = feature_errors(attend, q, k, phi_q, phi_k, arithmetic)
    of_pairs = np.where(visible, (size_q * e_q) @ size_k.T + size_q @ (size_k * e_k).T, 0) / size_c
    if arithmetic.normalize:
        of_pairs = (of_pairs + size * of_pairs.sum(axis=1, keepdims=True)) / 2
    most = e_q.max(initial=0) + e_k.max(initial=0)
    errors = {"out": of_pairs @ size_v, "d_v": of_pairs.T @ size_g} | {x: most * terms[x] for x in ("d_q", "d_k")}

    with np.errstate(all="ignore"):
        underflow, unclaimed, backward = ends_of_the_range(
            size_q,
            size_k,
            size_v,
            size_vc,
            size_g,
            size_c,
            abs(value["out"]).astype(float),
            power.astype(float),
            terms,
            arithmetic,
        )
    if subjects.is_signed(attend):
        unclaimed = SIGNED
    elif parameters.get("feature_map") in bounds.EXPONENTIAL:  # what underflows there is lost for good
        sums = phi_k.sum(axis=1) + phi_q.sum(axis=1, keepdims=True)
        gone = q.dtype.type(arithmetic.tiny) * np.where(visible, sums + arithmetic.u, 0).sum(axis=1, keepdims=True)
        if (gone > abs(a.sum(axis=1, keepdims=True))).any():
            unclaimed = "features below the normal range"
    return Truth(value, terms, errors, underflow, unclaimed, unclaimed or backward)


def feature_errors(
    attend: Any, q: Array, k: Array, phi_q: Array, phi_k: Array, arithmetic: Arithmetic
) -> tuple[Array, Array]:
    """e / u of each feature, with the axes to meet (N, R) and (M, R)."""
    if not isinstance(attend, la.Performer):
        e = np.full((1, 1), bounds.feature_error(attend.feature_map, hasattr(attend, "length")))
        return e, e
    parameters = quadratic.formula_of(attend).parameters
    w, scale = abs(parameters["projection"](q.shape[1])), parameters["scale"] or max(q.shape[1], 1) ** -0.5
    if subjects.is_signed(attend):  # of which nothing is claimed
        return np.zeros((1, 1)), np.zeros((1, 1))
    made = bounds.MADE / arithmetic.u * bounds.projection_depth(q.shape[1]) * scale**0.5  # W x, in float64
    e_q, e_k = (2 + made * (abs(x).astype(float) @ w.T) / abs(phi) for x, phi in ((q, phi_q), (k, phi_k)))
    return e_q.astype(float), e_k.astype(float)


def ends_of_the_range(
    size_q: Array, size_k: Array, size_v: Array, size_vc: Array, size_g: Array, size_c: Array, size_out: Array,
    power: Array, terms: dict[str, Array], arithmetic: Arithmetic,
) -> tuple[dict[str, Array], str, str]:  # fmt: skip
    """What underflow may add to each result, in smallest normal numbers, and whether a sum leaves the range.

    A product below the normal range is u tiny off, or tiny where somebody has it flushed to zero; in what follows it is
    multiplied by sums of features, queries scaled by their powers of two. A sum on the way may overflow, or its
    terms, although the result is of an ordinary size.
    """
    N, M, R = len(size_q), len(size_k), size_k.shape[1]
    most_v, most_g, least_c = 1 + size_v.max(initial=0), 1 + size_g.max(initial=0), size_c.min(initial=1)
    keys = size_k.sum(axis=0).max(initial=0)  # the largest sum of a feature over all keys
    largest = 1 + size_q.max(axis=1, keepdims=True, initial=0)
    lost = arithmetic.u * (4 * M * (R + 1) * largest + size_k.sum()) / size_c  # of each of a row's weights
    spoiled = 4 * lost.max(initial=0)
    underflow = {
        "out": 1 + lost * (most_v + size_out),
        "d_q": 1 + 4 * most_g * most_v * (1 + keys) * power + spoiled * terms["d_q"],
        "d_k": 1 + 4 * N * most_g * most_v * (1 + R * keys) / least_c + spoiled * terms["d_k"],
        "d_v": most_g * (1 + 2 * N * R * size_k.max(initial=0) + lost.sum()) + spoiled * terms["d_v"],
    }
    most, scaled_g = arithmetic.most / SPARE, size_g / size_c
    forward = size_k.T @ size_v, size_q @ (size_k.T @ size_v), size_q @ size_k.sum(axis=0)
    backward = (
        scaled_g, size_k.T @ size_vc, scaled_g @ (size_k.T @ size_vc).T, size_q.T @ scaled_g,
        size_vc @ (size_q.T @ scaled_g).T, size_k @ (size_q.T @ scaled_g), most_g * most_v * power / least_c,
    )  # fmt: skip
    fits = [all(np.all(x <= most) for x in sums) for sums in (forward, backward)]
    return underflow, "" if fits[0] else "a sum leaves the range", "" if fits[1] else "a sum leaves the range"


def powers(size: Array, tiny: float) -> Array:
    """The power of two that brings the largest entry of a row into [1, 2), at most 1 / tiny; 1 for a row of zeros."""
    largest = size.max(axis=1, keepdims=True, initial=0)
    _, exponent = np.frexp(np.where(largest > 0, largest, 1))
    most = -int(np.frexp(tiny)[1]) + 1
    return np.ldexp(np.ones_like(largest), np.clip(1 - exponent, -most, most))


def largest_error(attend: Any, q: Array, k: Array, arithmetic: Arithmetic) -> float:
    """2 e / u at most, over all features of these queries and keys: for results that are not judged pair by pair."""
    if subjects.engine_of(attend) == "loglinear":
        return log_errors(attend, q, k, arithmetic)
    features, parameters = quadratic.FEATURES[type(attend).__name__], quadratic.formula_of(attend).parameters
    errors = feature_errors(attend, q, k, *features(q, k, **parameters), arithmetic)
    return float(sum(e.max(initial=0) for e in errors))


KINDS = {
    "linear": by_features,
    "loglinear": by_logs,
    "softmax": by_scores,
    "blocks": by_logs_and_blocks,
    "combiner": by_regions,
}
