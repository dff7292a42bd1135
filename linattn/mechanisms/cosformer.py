"""cosFormer: ReLU features, weighed by the cosine of the token distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from linattn import _arrays, _checks
from linattn._arrays import Array
from linattn.engines.features import FeatureMap
from linattn.mechanisms.attention import Call, State
from linattn.mechanisms.feature_attention import FeatureAttention


@dataclass(frozen=True, repr=False)
class CosFormer(FeatureAttention):
    """cosFormer attention: ReLU features, weighed by the cosine of the distance.

        out[t] = sum_s w(t, s) (phi(q[t]) . phi(k[s])) v[s] / sum_s w(t, s) (phi(q[t]) . phi(k[s]))
        phi(x) = max(x, 0),   w(t, s) = cos(angle(t) - angle(s)),   angle(p) = pi p / (2 length)       (section 3)

    Parameters
    ----------
    length : int, optional
        The paper's M, in tokens: at this distance the weight is 0, and no position may lie beyond it. Required for
        `causal`, `step`, `positions` and `key_mask`; otherwise the longer of N and M, for each packed sequence its own.
    feature_map : {"relu", "elu1", "identity"} or FeatureMap
        phi; the paper's is "relu".
    normalize : bool
        False leaves out the denominator.
    eps : "safe", ("clamp", x) or ("add", x)
        What the sums are divided by, see `Linear`; the authors' code has ("clamp", 1e-6).
    align : {"start", "stretch"}
        "start": q and k both begin at position 0. "stretch" (cross attention): angle_q = pi (t + 1) / (2 N),
        angle_k = pi (s + 1) / (2 M), so that both ends meet; takes no `length`.

    Raises
    ------
    ValueError, TypeError
        If `length` is not a positive integer or another parameter is none of these.

    Notes
    -----
    Shapes: q (..., N, D), k (..., M, D), v (..., M, E), one dtype -> out (..., N, E).
    Positions are 0, 1, ... for q and for k unless `positions` gives others; a stream goes on where its state stopped.
    Causality goes by the order of tokens, not by position. No 1/sqrt(D): a scale of q or k cancels.
    A row whose features meet no key's (den = 0) is 0 and has gradient 0: likely only in small heads.
    Subgradient: relu'(0) = 0. Held constant in the VJP: the angles.
    Cost: O(N D E) time, state 2 D (E + 1) numbers; backward keeps q, k, v and one number a token.
    Source: Qin et al., "cosFormer: Rethinking Softmax in Attention", ICLR 2022, arXiv:2202.08791.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> attend = la.CosFormer(length=4096)
    >>> attend(q, k, v, causal=True).shape
    (2, 5, 4)
    >>> attend
    CosFormer(4096)
    """

    length: int | None = None
    _: KW_ONLY
    feature_map: str | FeatureMap = "relu"
    normalize: bool = True
    eps: Any = "safe"
    align: str = "start"
    n_sums: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.length is not None:
            _checks.natural("length", self.length)
        self._check_parameters()
        _checks.choice("align", self.align, ("start", "stretch"))
        if self.align == "stretch" and self.length is not None:
            raise ValueError(f'`length` must be left out with align="stretch", got {self.length}.')

    # -- the public verbs, with positions -------------------------------------------------------------------------

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        cu_seqlens: Any = None,
        positions: Any = None,
        backend: str | None = None,
        out: Array | None = None,
    ) -> Array:
        """Attention of the queries over the keys and values; options as in `Linear.__call__`, and `positions`.

        Parameters
        ----------
        q, k, v, causal, key_mask, cu_seqlens, backend, out
            See `Linear.__call__`.
        positions : array, or pair of arrays, optional
            (..., N) for q and k alike, or one for q and one for k; integers or reals within 0 .. length, in tokens.

        Returns
        -------
        array
            (..., N, E), library, device and dtype of the inputs.

        Raises
        ------
        ValueError
            For a position outside 0 .. length, and for what needs `length` when there is none.
        """
        return self._run(q, k, v, causal, key_mask, cu_seqlens, positions, backend, out)[0]

    def vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        cu_seqlens: Any = None,
        positions: Any = None,
        backend: str | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Callable[..., tuple[Array, Array, Array]]]:
        """`out, backward`; see `Linear.vjp`. Positions are constants."""
        return self._run(q, k, v, causal, key_mask, cu_seqlens, positions, backend, out)

    def weights(
        self,
        q: Array,
        k: Array,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        cu_seqlens: Any = None,
        positions: Any = None,
    ) -> Array:
        """The weight matrix (..., N, M) that the mechanism means: out = weights @ v. O(N M) time and memory."""
        return self._run_weights(q, k, causal, key_mask, cu_seqlens, positions)

    # -- the pair weight --------------------------------------------------------------------------------------------

    def _turns(self, call: Call, n_queries: int, n_keys: int, like: Array) -> tuple[Array, Array]:
        """Cosine and sine of every query's and every key's angle, (..., N, 2) and (..., M, 2).

        cos(angle_q - angle_k) = cos angle_q cos angle_k + sin angle_q sin angle_k: what is summed over keys is never
        turned afterwards, so nothing is subtracted from it.
        """
        if self.align == "stretch":
            return tuple(self._table(1, n, max(n, 1), like, call) for n in (n_queries, n_keys))
        length = self.length or max(n_queries, n_keys, 1)
        if call.positions is None:
            self._check_last(call.first_position + max(n_queries, n_keys) - 1, length)
            table = self._table(call.first_position, max(n_queries, n_keys), length, like, call)
            return table[:n_queries, :], table[:n_keys, :]
        turns = []
        for given in call.positions:
            p = _arrays.constant(given, like, call.xp)
            self._check_positions(p, length, call.xp)
            turns.append(_arrays.cast(angle_table(p, length, call.xp), _arrays.accumulator(like, call.xp), call.xp))
        return turns[0], turns[1]

    def _table(self, first: int, count: int, length: int, like: Array, call: Call) -> Array:
        p = _arrays.arange(first, count, like, call.xp)
        return _arrays.cast(angle_table(p, length, call.xp), _arrays.accumulator(like, call.xp), call.xp)

    def _check_last(self, last: int, length: Any) -> None:
        if not _arrays.is_traced(last) and last > length:
            raise _checks.position_outside(self, length + 1, length)

    def _check_positions(self, p: Array, length: int, xp: Any) -> None:
        if _arrays.is_lazy(p):
            return
        outside = ~((p >= 0) & (p <= length))
        if bool(xp.any(outside)):
            first_bad = xp.reshape(p, (-1,))[int(xp.argmax(_arrays.cast(xp.reshape(outside, (-1,)), xp.int8, xp)))]
            raise _checks.position_outside(self, float(first_bad), length)

    # -- what it cannot do --------------------------------------------------------------------------------------------

    def _refuse(self, call: Call, streaming: bool) -> None:
        if self.length is not None:
            return
        where = f"`{self!r}` without `length`"
        for asked, what in (
            (streaming, "stream: it has no state"),
            (call.causal, "be causal"),
            (call.positions is not None, "take `positions`"),
            (call.key_mask is not None, "take `key_mask`: the true lengths are not known"),
        ):
            if asked:
                remedy = "give `length`, in tokens" if self.align == "start" else 'use align="start" with a `length`'
                raise ValueError(f"{where} cannot {what}; {remedy}.")

    def _refuse_last(self, position: int) -> None:
        self._check_last(position, self.length)

    def _refuse_merge(self, earlier: State, later: State) -> None:
        super()._refuse_merge(earlier, later)
        known = not (_arrays.is_traced(later.start) or _arrays.is_traced(earlier.position))
        if known and later.start != earlier.position:
            raise ValueError(
                f"`later` must have been begun at the position where `earlier` ends ({earlier.position}), "
                f"got {later.start}: see `init_state(k, v, position=...)`."
            )


def angle_table(p: Array, length: int, xp: Any) -> Array:
    """(cos, sin) of pi p / (2 length), (..., 2): each from the argument below pi / 4, so exact at both ends.

    cos(pi p / (2 length)) = sin(pi (length - p) / (2 length)): at p = length the cosine is 0, never negative.
    """
    unit = math.pi / (2 * length)
    near, far = p * unit, (length - p) * unit
    low = 2 * p <= length
    return xp.stack([xp.where(low, xp.cos(near), xp.sin(far)), xp.where(low, xp.sin(near), xp.cos(far))], axis=-1)


def cosformer(
    q: Array,
    k: Array,
    v: Array,
    *,
    length: int | None = None,
    feature_map: str | FeatureMap = "relu",
    normalize: bool = True,
    eps: Any = "safe",
    align: str = "start",
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Any = None,
    positions: Any = None,
    backend: str | None = None,
    out: Array | None = None,
) -> Array:
    """`CosFormer(length, ...)(q, k, v, ...)` in one call; see `CosFormer` and `CosFormer.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.ones((3, 2, 5, 4))
    >>> float(la.cosformer(q, k, v, length=8, causal=True)[0, 0, 0])
    1.0
    """
    attend = CosFormer(length, feature_map=feature_map, normalize=normalize, eps=eps, align=align)
    return attend(
        q,
        k,
        v,
        causal=causal,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        positions=positions,
        backend=backend,
        out=out,
    )
