"""The papers' formulas, pair by pair in float64: the definition that everything else is judged by.

NumPy alone is imported here, and of linattn nothing but formulas. Each formula forms all N x M weights, as its paper's
definition says, and

    out[t] = sum over the visible s of A[t, s] v[s]

Inputs may be complex: the imaginary part of `formula(q + 1j h u, ...)` over h, with h = 1e-30, is the
directional derivative along u, and nothing cancels in it. Comparisons (relu's kink, softmax's maximum, the
clamp) look at the real part. float16, bfloat16 and float32 are widened to float64; longdouble is kept.

    FORMULAS["CosFormer"](q, k, v, causal=True, length=4096)            out      (..., N, E)
    FORMULAS["CosFormer"].weights(q, k, causal=True, length=4096)       A        (..., N, M)
    formula_of(linattn.CosFormer(length=4096))(q, k, v, causal=True)    the parameters read off the value
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from linattn.audit.combiner import combiner
from linattn.audit.lln import lln, lln_diag, lln_features
from linattn.audit.performer import performer, performer_features

__all__ = [
    "FEATURES",
    "FEATURE_MAPS",
    "FORMULAS",
    "Formula",
    "Pairs",
    "cosformer",
    "formula_of",
    "linear",
    "lln",
    "lln_diag",
    "performer",
    "softmax",
]

Array = NDArray[Any]
Map = Callable[[Array], Array]
Mask = NDArray[np.bool_]
Rows = slice | NDArray[np.int_] | None
Eps = str | tuple[str, float]
Positions = ArrayLike | tuple[ArrayLike, ArrayLike] | None


class Pairs(NamedTuple):
    """Which query meets which key."""

    visible: Mask  # (..., n, M) bool
    t: NDArray[np.int_]  # (n,) token indices of the queries
    s: NDArray[np.int_]  # (M,) token indices of the keys
    n_queries: int  # N, of which the n above are a part
    n_keys: int  # M
    every_q: Array  # (..., N, D), all queries
    causal: bool = False
    key_mask: ArrayLike | None = None


# ---------------------------------------------------------------------------------------------- feature maps


def identity(x: Array) -> Array:
    """phi(x) = x."""
    return x


def relu(x: Array) -> Array:
    """phi(x) = max(x, 0);  phi'(0) = 0, NaN stays NaN."""
    return np.where(x.real <= 0, 0, x)


def elu1(x: Array) -> Array:
    """phi(x) = elu(x) + 1 = 1 + x for x > 0, exp(x) otherwise."""
    return np.where(x.real > 0, 1 + x, np.exp(np.where(x.real > 0, 0, x)))


def exp(x: Array) -> Array:
    """phi(x) = exp(x)."""
    return np.exp(x)


FEATURE_MAPS: dict[str, Map] = {
    "identity": identity,
    "relu": relu,
    "elu1": elu1,
    "exp": exp,
}


def feature_map_called(name: str | Map) -> Map:
    """The map of that name; a function is taken as it is, an object gives its `phi(x, xp)`."""
    if isinstance(name, str):
        return FEATURE_MAPS[name]
    return partial(name.phi, xp=np) if hasattr(name, "phi") else name


# ------------------------------------------------------------------------------------------------- formulas


def linear(
    q: Array,
    k: Array,
    pairs: Pairs,
    *,
    feature_map: str | Map = "elu1",
    normalize: bool = True,
    eps: Eps = "safe",
) -> Array:
    """Linear attention (Katharopoulos et al., arXiv:2006.16236).

    A[t, s] = phi(q_t) . phi(k_s) / c_t
    """
    phi = feature_map_called(feature_map)
    similarity = np.where(pairs.visible, phi(q) @ transpose(phi(k)), 0)
    return over_divisor(similarity, eps) if normalize else similarity


def cosformer(
    q: Array,
    k: Array,
    pairs: Pairs,
    *,
    length: float | None = None,
    feature_map: str | Map = "relu",
    normalize: bool = True,
    eps: Eps = "safe",
    align: str = "start",
    positions: Positions = None,
) -> Array:
    """cosFormer (Qin et al., arXiv:2202.08791).

    A[t, s] = (phi(q_t) . phi(k_s)) cos(pi (p_t - p_s) / (2 length)) / c_t
    """
    phi = feature_map_called(feature_map)
    distance, length = distances(pairs, length, align, positions)
    weight = cosine(distance, length, q.real.dtype)
    similarity = np.where(pairs.visible, (phi(q) @ transpose(phi(k))) * weight, 0)
    return over_divisor(similarity, eps) if normalize else similarity


def softmax(q: Array, k: Array, pairs: Pairs, *, scale: float | None = None) -> Array:
    """Exact attention (Vaswani et al., arXiv:1706.03762).

    A[t, s] = exp(scale q_t . k_s) / sum over the visible s' of exp(scale q_t . k_s'),    scale = D^(-1/2)
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    scores = scale * (q @ transpose(k))
    top = np.max(np.where(pairs.visible, scores.real, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)  # a row that sees nothing
    similarity = np.where(pairs.visible, np.exp(np.where(pairs.visible, scores - top, 0)), 0)
    return over_divisor(similarity, "safe")


# ---------------------------------------------------------------------------------------- parts of formulas


def over_divisor(similarity: Array, eps: Eps) -> Array:
    """similarity[t, s] / c_t with den_t = sum_s similarity[t, s]; a row with c_t = 0 is zero."""
    c = divisor(np.sum(similarity, axis=-1, keepdims=True), eps)
    return np.where(c == 0, 0, similarity / np.where(c == 0, 1, c))


def divisor(den: Array, eps: Eps) -> Array:
    """c of a row whose similarities sum to den.

    "safe"         c = den
    ("clamp", x)   c = max(den, x)
    ("add", x)     c = den + x
    """
    if eps == "safe":
        return den
    rule, x = eps if isinstance(eps, tuple) else (eps, 0.0)
    if rule == "clamp":
        return np.where(den.real < x, x, den)  # NaN stays NaN
    if rule == "add":
        return den + x
    raise ValueError(f'`eps` must be "safe", ("clamp", x) or ("add", x), got {eps!r}.')


def distances(pairs: Pairs, length: float | None, align: str, positions: Positions) -> tuple[Array, float]:
    """|p_t - p_s| (..., n, M) and the length at which the cosine is zero.

    start     p = 0, 1, ... for queries and for keys, or `positions`
    stretch   angle_q = pi (t+1) / (2 N), angle_k = pi (s+1) / (2 M): distance |(t+1) M - (s+1) N|, length N M
    """
    if align == "stretch":
        p_q, p_k = (pairs.t + 1) * pairs.n_keys, (pairs.s + 1) * pairs.n_queries
        return abs(p_q[:, None] - p_k), pairs.n_queries * pairs.n_keys
    if align != "start":
        raise ValueError(f'`align` must be "start" or "stretch", got {align!r}.')
    if length is None:
        length = max(pairs.n_queries, pairs.n_keys)
    p_q, p_k = pairs.t, pairs.s
    if positions is not None:
        of_queries, of_keys = positions if isinstance(positions, tuple) else (positions, positions)
        p_q, p_k = np.asarray(of_queries)[..., pairs.t], np.asarray(of_keys)
    return abs(p_q[..., :, None] - p_k[..., None, :]), length


def cosine(distance: Array, length: float, dtype: np.dtype[Any]) -> Array:
    """cos(pi d / (2 length)), from the argument below pi / 4: exactly 1 at d = 0, exactly 0 at d = length."""
    half_turn = 4 * np.arctan(np.ones((), dtype)) / (2 * max(length, 1))
    near, far = distance * half_turn, (length - distance) * half_turn
    return np.where(2 * distance <= length, np.cos(near), np.sin(far))


def transpose(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def mix(weights: Array, visible: Mask, v: Array) -> Array:
    """sum_s A[t, s] v[s] over the visible s; a NaN or inf in v reaches its column in the rows that see it."""
    bad = ~np.isfinite(v)
    if not bad.any():
        return weights @ v
    touched = (visible.astype(float) @ bad.astype(float)) > 0
    return np.where(touched, np.nan, weights @ np.where(bad, 0, v))


# ---------------------------------------------------------------------------------------------------- calls


class Formula:
    """One paper's attention by its definition: `formula(q, k, v)` is `formula.weights(q, k) @ v`.

    Parameters
    ----------
    rule : callable
        `rule(q, k, pairs, **parameters)` gives the weights (..., n, M) of the pairs.
    **parameters
        The paper's own, under the names they have in the mechanism.

    Notes
    -----
    Options of both calls: `causal`, `key_mask` (bool (..., M), True = visible), `cu_seqlens` (each segment a
    call of its own), `positions` where the rule takes them, and parameters in place of those above. `rows` (a
    slice, an integer array, None for all) gives these queries alone, at the indices they have in the whole.
    """

    def __init__(self, rule: Callable[..., Array], **parameters: Any) -> None:
        self.rule = rule
        self.parameters = parameters

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.parameters.items())
        return f"Formula({self.rule.__name__}{given})"

    @np.errstate(all="ignore")
    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        *,
        causal: bool = False,
        key_mask: ArrayLike | None = None,
        cu_seqlens: Sequence[int] | None = None,
        rows: Rows = None,
        **parameters: Any,
    ) -> Array:
        """out (..., n, E)."""
        q, k, v = wide(q), wide(k), wide(v)
        if cu_seqlens is not None:
            call = partial(self, causal=causal)
            parts = [
                call(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], **segment(a, b, key_mask, parameters))
                for a, b in pairwise(cu_seqlens)
            ]
            return np.concatenate(parts, axis=-2)
        pairs = pairs_of(q, k, causal, key_mask, rows)
        return mix(self.of_pairs(q, k, pairs, self.parameters | parameters), pairs.visible, v)

    @np.errstate(all="ignore")
    def weights(
        self,
        q: ArrayLike,
        k: ArrayLike,
        *,
        causal: bool = False,
        key_mask: ArrayLike | None = None,
        cu_seqlens: Sequence[int] | None = None,
        rows: Rows = None,
        **parameters: Any,
    ) -> Array:
        """A (..., n, M)."""
        q, k = wide(q), wide(k)
        if cu_seqlens is not None:
            parts = {
                (a, b): self.weights(
                    q[..., a:b, :], k[..., a:b, :], causal=causal, **segment(a, b, key_mask, parameters)
                )
                for a, b in pairwise(cu_seqlens)
            }
            leads = np.broadcast_shapes(*(block.shape[:-2] for block in parts.values()))
            whole = np.zeros((*leads, q.shape[-2], k.shape[-2]), np.result_type(*parts.values()))
            for (a, b), block in parts.items():
                whole[..., a:b, a:b] = block
            return whole
        return self.of_pairs(q, k, pairs_of(q, k, causal, key_mask, rows), self.parameters | parameters)

    def of_pairs(self, q: Array, k: Array, pairs: Pairs, parameters: dict[str, Any]) -> Array:
        """The rule is given the queries it is asked for."""
        return self.rule(q[..., pairs.t, :], k, pairs, **parameters)


class PooledFormula(Formula):
    """A formula whose rows depend on other queries too: its rule is given all of them."""

    def of_pairs(self, q: Array, k: Array, pairs: Pairs, parameters: dict[str, Any]) -> Array:
        return self.rule(q, k, pairs, **parameters)


def wide(x: ArrayLike) -> Array:
    """At least double precision, real or complex."""
    x = np.asarray(x)
    return x.astype(np.result_type(x.dtype if x.dtype.kind in "fc" else np.float64, np.float64), copy=False)


def pairs_of(q: Array, k: Array, causal: bool, key_mask: ArrayLike | None, rows: Rows) -> Pairs:
    """visible[t, s] = key_mask[s] and, if causal, s <= t."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    t, s = np.arange(n_queries), np.arange(n_keys)
    t = t if rows is None else t[rows]
    visible = np.ones((t.size, s.size), dtype=bool)
    if causal:
        if n_queries != n_keys:
            raise ValueError(f"causal attention needs as many queries as keys, got {n_queries} and {n_keys}.")
        visible = s <= t[:, None]
    if key_mask is not None:
        visible = visible & np.asarray(key_mask)[..., None, :]
    return Pairs(visible, t, s, n_queries, n_keys, q, causal, key_mask)


def segment(a: int, b: int, key_mask: ArrayLike | None, parameters: dict[str, Any]) -> dict[str, Any]:
    """The options of one packed segment, tokens a to b."""
    options = dict(parameters)
    if key_mask is not None:
        options["key_mask"] = np.asarray(key_mask)[..., a:b]
    positions = options.get("positions")
    if isinstance(positions, tuple):
        options["positions"] = tuple(np.asarray(p)[..., a:b] for p in positions)
    elif positions is not None:
        options["positions"] = np.asarray(positions)[..., a:b]
    return options


FORMULAS: dict[str, Formula] = {
    "Linear": Formula(linear),
    "CosFormer": Formula(cosformer),
    "Softmax": Formula(softmax),
    "Performer": Formula(performer),
    "LLN": Formula(lln),
    "LLNDiag": Formula(lln_diag),
    "Combiner": PooledFormula(combiner),
}


def formula_of(attend: Any) -> Formula:
    """The formula of a mechanism value, with the value's own parameters."""
    parameters = {field.name: getattr(attend, field.name) for field in fields(attend)}
    if "projection" in parameters:
        parameters["projection"] = attend.matrix  # drawn or given, of any number of channels
    known = FORMULAS[type(attend).__name__]
    return type(known)(known.rule, **parameters)


# ------------------------------------------------------------------------------------------- as wide features
# The same weights as a plain dot product, A[t, s] = Phi_q[t] . Phi_k[s] / c_t: with it `measure` sums in
# linear time where N x M pairs are out of reach.


def linear_features(q: Array, k: Array, *, feature_map: str | Map = "elu1", **_: Any) -> tuple[Array, Array]:
    """Phi = phi."""
    phi = feature_map_called(feature_map)
    return phi(q), phi(k)


def cosformer_features(
    q: Array,
    k: Array,
    *,
    length: float | None = None,
    feature_map: str | Map = "relu",
    align: str = "start",
    positions: Positions = None,
    **_: Any,
) -> tuple[Array, Array]:
    """Phi = [cos(angle) phi, sin(angle) phi], since cos(a - b) = cos a cos b + sin a sin b."""
    phi = feature_map_called(feature_map)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    of_queries, of_keys = positions if isinstance(positions, tuple) else (positions, positions)
    p_q = np.arange(n_queries) if of_queries is None else np.asarray(of_queries)
    p_k = np.arange(n_keys) if of_keys is None else np.asarray(of_keys)
    length_q = length_k = max(n_queries, n_keys) if length is None else length
    if align == "stretch":
        p_q, p_k, length_q, length_k = p_q + 1, p_k + 1, n_queries, n_keys

    def turned(phi: Array, p: Array, length: float) -> Array:
        c, s = cosine(p, length, phi.real.dtype), cosine(length - p, length, phi.real.dtype)
        return np.concatenate([c[..., None] * phi, s[..., None] * phi], axis=-1)

    return turned(phi(q), p_q, length_q), turned(phi(k), p_k, length_k)


FEATURES: dict[str, Callable[..., tuple[Array, Array]]] = {
    "Linear": linear_features,
    "CosFormer": cosformer_features,
    "Performer": performer_features,
    "LLN": lln_features,
}
