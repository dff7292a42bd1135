"""Exact softmax attention: the yardstick."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from linattn import _arrays, _checks
from linattn._arrays import Array
from linattn.engines import softmax
from linattn.mechanisms.attention import Attention, Call, State, room


@dataclass(frozen=True, repr=False)
class Softmax(Attention):
    """Softmax attention, exact and without ever storing the N x M weights.

        out[t] = sum_s exp(scale q[t] . k[s]) v[s] / sum_s exp(scale q[t] . k[s])

    Parameters
    ----------
    scale : float, optional
        Positive; by default D**-0.5.

    Raises
    ------
    ValueError, TypeError
        If `scale` is not a positive, finite number.

    Notes
    -----
    Shapes: q (..., N, D), k (..., M, D), v (..., M, E), one dtype -> out (..., N, E).
    With D = 0 every visible key has the same weight. A row that sees nothing is 0 and has gradient 0.
    Held constant in the VJP: nothing. The row maximum that is subtracted has no cotangent: it cancels.
    Cost: O(N M (D + E)) time; backward keeps q, k and v. The state of a stream is its keys and
    values, so it grows.
    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017, arXiv:1706.03762, eq. 1.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> la.Softmax()(q, k, v, causal=True).shape
    (2, 5, 4)
    """

    _: KW_ONLY
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            _checks.positive_real("scale", self.scale)

    def _options(self, q: Array, call: Call, offset: int, key_mask: Any) -> softmax.Options:
        scale = float(self.scale) if self.scale is not None else max(q.shape[-1], 1) ** -0.5
        return softmax.Options(scale, "past" if call.causal else "all", offset, key_mask)

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        where, xp = room(call, q, "softmax"), call.xp
        if arrays is None:
            offset, mask, after = 0, call.key_mask, None
        else:
            offset, after = arrays.k.shape[-2], softmax.extend(arrays, k, v, call.key_mask, xp)
            k, v, mask = after
        options = self._options(q, call, offset, mask)
        y, saved = softmax.forward(q, k, v, options, room=where, out=out, xp=xp)
        return y, after, (saved, options, where)

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        saved, options, where = saved
        d_q, d_k, d_v = softmax.backward(d_out, saved, options, room=where, out=out, xp=call.xp)
        if d_arrays is not None:
            # state_out = [state, new]: its cotangent adds to that of all the keys and values
            d_k, d_v = d_k + d_arrays.k, d_v + d_arrays.v
        cached = options.offset
        d_state = softmax.SoftmaxState(d_k[..., :cached, :], d_v[..., :cached, :], None)
        if cached:
            d_k, d_v = d_k[..., cached:, :], d_v[..., cached:, :]
        return d_q, d_k, d_v, d_state

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        return softmax.weights(q, k, self._options(q, call, 0, call.key_mask), call.xp)

    def _empty(self, k: Array, v: Array, call: Call) -> softmax.SoftmaxState:
        return softmax.SoftmaxState(k, v, None)

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        """The cache may hold any number of tokens; all other axes are those of k and v."""
        n_cached = state.arrays.k.shape[-2]
        want = {
            field: ((*x.shape[:-2], n_cached, x.shape[-1]), _arrays.dtype_name(x), _arrays.library(x))
            for field, x in (("k", k), ("v", v))
        }
        _checks.state_arrays("state", state.arrays._asdict(), want)

    def _merge(self, earlier: Any, later: Any, xp: Any) -> softmax.SoftmaxState:
        return softmax.merge(earlier, later, xp)

    def _refuse_merge(self, earlier: State, later: State) -> None:
        self._refuse_state(earlier, later.arrays.k, later.arrays.v, Call(_arrays.namespace(later.arrays.k)))


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Any = None,
    backend: str | None = None,
    out: Array | None = None,
) -> Array:
    """`Softmax(scale=...)(q, k, v, ...)` in one call; see `Softmax` and `Softmax.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.ones((3, 2, 5, 4))
    >>> float(la.softmax_attention(q, k, v, causal=True).min())
    1.0
    """
    attend = Softmax(scale=scale)
    return attend(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend, out=out)
