"""What a result should be and how large an error the bound allows: the definition's output and cotangents, and for
each entry the sum of its absolute terms, in float64 or, where the processor has it, in extended precision.

With features, a_ts = Phi_q[t] . Phi_k[s] (`quadratic.FEATURES`), and with scores, a_ts = exp(s_ts):

    A = a / c,   h_ts = g_t . (v_s - mu),   H_t = sum_s A_ts h_ts
    d_a_ts = (h_ts - H_t) / c_t             d_v = A^T g
    S: the same sums with |g_t| . |v_s - mu| for h and nothing subtracted

mu is the mean of the visible values: it changes no cotangent, and it is what the library subtracts as well. Features
are pulled back by complex steps, so their derivative is not written down a second time.

All inputs are one head: q (N, D), k (M, D), v (M, E), d_out (N, E).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn.audit import bounds, quadratic
from linattn.audit.measure import smallest_normal, unit_roundoff

__all__ = ["EXTENDED_BITS", "KINDS", "PASSES", "Truth", "extended", "missing_extended", "truth"]

Array = NDArray[Any]
PASSES = ("out", "d_q", "d_k", "d_v")
EXTENDED_BITS = 63  # of the significand, at least: float64 cannot judge float64
STEP = 1e-30
SPARE = 2.0**12  # between a term and the largest number: so many terms may be summed
FIRST_ORDER = 2.0**-5  # of an exponent's error: beyond it the bound, which neglects its square, is not claimed


def missing_extended() -> str | None:
    """Why float64 results of this length have no judge here; None if they have."""
    bits = np.finfo(np.longdouble).nmant
    return None if bits >= EXTENDED_BITS else f"long double has {bits} bits here, {EXTENDED_BITS} are needed"


def extended(dtype: str) -> Any:
    """The dtype that judges results of `dtype`."""
    return np.longdouble if dtype == "float64" else np.float64


class Truth(NamedTuple):
    """A dict each, by pass: "out", "d_q", "d_k", "d_v"."""

    value: dict[str, Array]
    terms: dict[str, Array]  # A|v| and S, the sums of absolute terms
    errors: dict[str, Array]  # what errors of features, 2 e A|v|, or of scores, pair by pair, may do to them, over u
    underflow: dict[str, Array]  # what underflow may add, in smallest normal numbers
    unclaimed: str = ""  # why the bound is not claimed for these inputs; empty where it is
    unclaimed_backward: str = ""

    def unit(self, name: str, arithmetic: Arithmetic, depth: float) -> Array:
        """What T divides an error by: (D + 2 e / u) u A|v|, half without a denominator, and the underflow."""
        share = 1.0 if arithmetic.normalize else 0.5
        with np.errstate(over="ignore", invalid="ignore"):
            sums = share * arithmetic.u * (depth * self.terms[name] + self.errors[name])
        return sums + arithmetic.tiny * self.underflow[name]


@dataclass(frozen=True)
class Arithmetic:
    """Whose error is judged: the dtype of the results, and with it that of the sums."""

    dtype: str
    normalize: bool = True

    @property
    def sums(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def u(self) -> float:
        return unit_roundoff(self.sums)

    @property
    def tiny(self) -> float:
        return smallest_normal(self.sums)

    @property
    def most(self) -> float:
        return float(np.finfo(self.sums).max)


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
        return KINDS[type(attend).__name__](attend, q, k, v, d_out, visible, arithmetic)


def centred(v: Array, visible: NDArray[np.bool_], u: float) -> tuple[Array, Array]:
    """v - mu, and its size: |v - mu| and what the rounding of mu, a sum of M terms, may add to it."""
    seen = visible.any(axis=0)
    if not seen.any():
        return v, abs(v)
    vc = v - v[seen].mean(axis=0)
    return vc, abs(vc) + u * seen.sum() * abs(v[seen]).mean(axis=0)


def parameters_of(attend: Any) -> dict[str, Any]:
    return {field.name: getattr(attend, field.name) for field in fields(attend)}


# ------------------------------------------------------------------------------------------------ features


def by_features(
    attend: Any, q: Array, k: Array, v: Array, g: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic
) -> Truth:
    """a = Phi_q Phi_k^T."""
    parameters = parameters_of(attend)
    features = quadratic.FEATURES[type(attend).__name__]
    phi_q, phi_k = features(q, k, **parameters)
    power = powers(abs(phi_q), arithmetic.tiny) if attend.normalize else np.ones((len(q), 1), q.dtype)
    size_q, size_k = (abs(phi_q) * power).astype(float), abs(phi_k).astype(float)
    a = np.where(visible, phi_q @ phi_k.T, 0)
    size_a = np.where(visible, size_q @ size_k.T, 0)
    if attend.normalize:
        if attend.eps != "safe":
            raise ValueError(f'the bound holds for eps="safe", got {attend.eps!r}.')
        den = a.sum(axis=1, keepdims=True)
        alive = den != 0
        vc, size_vc = centred(v, visible, arithmetic.u)
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
    if attend.normalize:
        d_a = h - (weights * h).sum(axis=1, keepdims=True)
        size_d_a = size_h + (size * size_h).sum(axis=1, keepdims=True)
    d_a = np.where(visible & alive, d_a / c, 0)
    size_d_a = np.where(visible & alive, size_d_a / size_c, 0)

    value = {"out": weights @ v, "d_v": weights.T @ g}
    terms = {"out": size @ size_v, "d_v": size.T @ size_g}
    of_q, of_k = pulled_back(
        features, parameters, q, k, (d_a @ phi_k, d_a.T @ phi_q), (power * (size_d_a @ size_k), size_d_a.T @ size_q)
    )
    (value["d_q"], terms["d_q"]), (value["d_k"], terms["d_k"]) = of_q, of_k
    error = 2 * bounds.feature_error(attend.feature_map, hasattr(attend, "length"))
    errors = {name: error * terms[name] for name in PASSES}

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
    if attend.feature_map in bounds.EXPONENTIAL:  # exp underflows where its definition is positive: lost for good
        sums = phi_k.sum(axis=1) + phi_q.sum(axis=1, keepdims=True)
        gone = q.dtype.type(arithmetic.tiny) * np.where(visible, sums + arithmetic.u, 0).sum(axis=1, keepdims=True)
        if (gone > abs(a.sum(axis=1, keepdims=True))).any():
            unclaimed = "features below the normal range"
    return Truth(value, terms, errors, underflow, unclaimed, unclaimed or backward)


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


def pulled_back(
    features: Any, parameters: dict[str, Any], q: Array, k: Array, d_phi: tuple[Array, Array], size: tuple[Array, Array]
) -> list[tuple[Array, Array]]:
    """For q and k: d_x[:, d] = sum_r d_phi[:, r] dphi_r / dx_d by complex steps, and the same of sizes."""
    d_x = [(np.zeros_like(x), np.zeros(x.shape)) for x in (q, k)]
    for d in range(q.shape[1]):
        step = 1j * STEP * (np.arange(q.shape[1]) == d)
        slopes = (phi.imag / STEP for phi in features(q + step, k + step, **parameters))
        for (value, terms), d_y, s, slope in zip(d_x, d_phi, size, slopes, strict=True):
            value[:, d] = (d_y * slope).sum(axis=1)
            terms[:, d] = (s * abs(slope)).sum(axis=1)
    return d_x


# -------------------------------------------------------------------------------------------------- scores


def by_scores(
    attend: Any, q: Array, k: Array, v: Array, g: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic
) -> Truth:
    """a = exp(scale q k^T); every pair has an error of its own, that of its exponent."""
    scale = 1 / np.sqrt(q.dtype.type(max(q.shape[1], 1))) if attend.scale is None else q.dtype.type(attend.scale)
    scores = scale * (q @ k.T)
    top = np.where(visible, scores, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    shifted = np.where(visible, scores - top, 0)
    a = np.where(visible, np.exp(shifted), 0)
    den = a.sum(axis=1, keepdims=True)
    p = np.where(den == 0, 0, a / np.where(den == 0, 1, den))
    vc, size_vc = centred(v, visible, arithmetic.u)
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
    unclaimed = "an exponent's error is not small" if (arithmetic.u * e > FIRST_ORDER).any() else ""
    return Truth(value, terms, errors, underflow, unclaimed, unclaimed)


KINDS = {"Linear": by_features, "CosFormer": by_features, "Softmax": by_scores}
