"""Linear attention with an elementwise feature map: elu + 1, ReLU, exp, the identity, or the user's own."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from linattn import _arrays
from linattn._arrays import Array
from linattn.engines.features import FeatureMap
from linattn.mechanisms.attention import Attention, Call, State
from linattn.mechanisms.feature_attention import FeatureAttention
from linattn.mechanisms.log_feature_attention import LogFeatureAttention


@dataclass(frozen=True, repr=False)
class Linear(FeatureAttention, LogFeatureAttention):
    """Linear attention: softmax's exponential replaced by a dot product of features.

        out[t] = sum_s (phi(q[t]) . phi(k[s])) v[s] / sum_s phi(q[t]) . phi(k[s])          (paper, eqs. 4-5)

    Parameters
    ----------
    feature_map : {"elu1", "relu", "exp", "identity"} or FeatureMap
        phi: elu(x) + 1 (the paper's), max(x, 0), exp(x), x, or a map of your own.
    normalize : bool
        False leaves out the denominator: out[t] = sum_s (phi(q[t]) . phi(k[s])) v[s]; features may then be signed.
    eps : "safe", ("clamp", x) or ("add", x)
        The divisor c for a denominator den: "safe" is den itself, and a row with den = 0 is 0 and passes no gradient;
        ("clamp", x) is max(den, x), ("add", x) is den + x, as other implementations have it. Only "safe" does not
        depend on the scale of the features.

    Raises
    ------
    ValueError, TypeError
        If a parameter is none of these.

    Notes
    -----
    Shapes: q (..., N, D), k (..., M, D), v (..., M, E), one dtype -> out (..., N, E).
    No 1/sqrt(D): a scale of q or k cancels for homogeneous maps (relu, identity).
    Subgradient: relu'(0) = 0, elu1'(0) = 1. Held constant in the VJP: nothing.
    Cost: O(N R E) time, state R (E + 1) numbers; backward keeps q, k, v and one number a token.
    "exp", normalised and with eps="safe", goes by the logarithms of the features: exact however large q and k are.
    With the other options the sums themselves are asked for, and beyond exp's range they are inf.
    With signed features ("identity") the denominator may vanish or change sign: nothing is promised then.
    Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", ICML 2020, arXiv:2006.16236.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> la.Linear("elu1")(q, k, v, causal=True).shape
    (2, 5, 4)
    """

    feature_map: str | FeatureMap = "elu1"
    _: KW_ONLY
    normalize: bool = True
    eps: Any = "safe"

    def __post_init__(self) -> None:
        self._check_parameters()

    @property
    def _by_logarithms(self) -> bool:
        return self.feature_map == "exp" and self.normalize and self.eps == "safe"

    @property
    def _verbs(self) -> type[Attention]:
        """Whose inner verbs are meant."""
        return LogFeatureAttention if self._by_logarithms else FeatureAttention

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        return self._verbs._forward(self, q, k, v, arrays, call, out)

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        return self._verbs._backward(self, d_out, d_arrays, saved, call, out)

    def _saved(self, q: Array, k: Array, v: Array, arrays: Any, call: Call) -> Any:
        return self._verbs._saved(self, q, k, v, arrays, call)

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        return self._verbs._weights(self, q, k, call)

    def _empty(self, k: Array, v: Array, call: Call) -> Any:
        return self._verbs._empty(self, k, v, call)

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        self._verbs._refuse_state(self, state, k, v, call)

    def _merge(self, earlier: Any, later: Any, xp: Any) -> Any:
        return self._verbs._merge(self, earlier, later, xp)

    def _log_shape(self, k: Array, call: Call) -> tuple[int, ...]:
        return tuple(k.shape)

    # phi = exp:  log phi(q) = q, log phi(k) = k

    def _log_q(self, q: Array, constants: tuple[Any, ...], call: Call) -> Array:
        return _arrays.cast(q, _arrays.accumulator(q, call.xp), call.xp)

    def _log_k(self, k: Array, constants: tuple[Any, ...], call: Call) -> Array:
        return _arrays.cast(k, _arrays.accumulator(k, call.xp), call.xp)

    def _log_q_vjp(
        self, d_lq: Array, q: Array, constants: tuple[Any, ...], call: Call
    ) -> tuple[Array, tuple[Any, ...]]:
        return d_lq, ()

    def _log_k_vjp(
        self, d_lk: Array, k: Array, constants: tuple[Any, ...], call: Call
    ) -> tuple[Array, tuple[Any, ...]]:
        return d_lk, ()


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    feature_map: str | FeatureMap = "elu1",
    normalize: bool = True,
    eps: Any = "safe",
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Any = None,
    backend: str | None = None,
    out: Array | None = None,
) -> Array:
    """`Linear(feature_map, normalize=..., eps=...)(q, k, v, ...)` in one call; see `Linear` and `Linear.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.ones((3, 2, 5, 4))
    >>> float(la.linear_attention(q, k, v, feature_map="relu").max())
    1.0
    """
    attend = Linear(feature_map, normalize=normalize, eps=eps)
    return attend(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend, out=out)
