"""Linear attention with an elementwise feature map: elu + 1, ReLU, the identity, or the user's own."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from linattn._arrays import Array
from linattn.engines.features import FeatureMap
from linattn.mechanisms.feature_attention import FeatureAttention


@dataclass(frozen=True, repr=False)
class Linear(FeatureAttention):
    """Linear attention: softmax's exponential replaced by a dot product of features.

        out[t] = sum_s (phi(q[t]) . phi(k[s])) v[s] / sum_s phi(q[t]) . phi(k[s])          (paper, eqs. 4-5)

    Parameters
    ----------
    feature_map : {"elu1", "relu", "identity"} or FeatureMap
        phi: elu(x) + 1 (the paper's), max(x, 0), x, or a map of your own.
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
