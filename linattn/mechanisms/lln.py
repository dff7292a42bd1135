"""Linear Log-Normal attention: exponential features whose sharpness is matched to softmax's; alone, and with softmax
inside diagonal blocks."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays, _checks, _moments, _scales
from linattn._arrays import Array
from linattn.engines import blocks, loglinear
from linattn.engines.softmax import SoftmaxState
from linattn.mechanisms.attention import Attention, Call, State, room
from linattn.mechanisms.log_feature_attention import LogFeatureAttention

LOOK_AHEAD = (
    "alpha and beta are read off all queries and keys, so that later tokens would change earlier rows, a look ahead"
)


class Scaled(Attention):
    """What the two share: alpha and beta, given or matched."""

    alpha: Any
    beta: Any
    calibration: Any
    scope: str
    statistics: str

    def calibrate(self, q: Array, k: Array, *, key_mask: Array | None = None) -> Scaled:
        """This value with the alpha and beta that fit q and k, for good: it can be causal and stream.

        Parameters
        ----------
        q, k : array
            (..., N, D), (..., M, D): representative data.
        key_mask : array of bool, optional
            (..., M), True = visible.

        Returns
        -------
        LLN or LLNDiag
            With `alpha` and `beta` numbers; for scope="head" tuples, one number a head, for "sample" one a sequence and
            head, as nested tuples.

        Raises
        ------
        ValueError
            If q or k has no variance or fewer than two numbers in a scope.
        """
        xp = _checks.queries_keys(q, k)
        lead = _checks.leading(q=tuple(q.shape[:-2]), k=tuple(k.shape[:-2]))
        if key_mask is not None:
            _checks.key_mask(key_mask, k, lead)
        for name, x in (("q", q), ("k", k)):
            _checks.readable(name, x)
        with _arrays.quiet(q):
            found = self._fit(_arrays.plain(q), _arrays.plain(k), key_mask, xp)
        this: Any = self
        fresh = {x.name: x.default for x in fields(this) if x.name in ("calibration", "scope", "statistics")}
        return replace(this, alpha=_plain(found.alpha), beta=_plain(found.beta), **fresh)

    def _check_scales(self) -> None:
        """Both or neither, as plain numbers; and the ways of matching them."""
        alone = [name for name in ("alpha", "beta") if getattr(self, name) is not None]
        if len(alone) == 1:
            other = "beta" if alone[0] == "alpha" else "alpha"
            raise ValueError(f"`alpha` and `beta` must be given together, got `{alone[0]}` without `{other}`.")
        for name in alone:
            object.__setattr__(self, name, _checks.real_or_nested(name, getattr(self, name)))
        if isinstance(self.calibration, (tuple, list)):
            object.__setattr__(self, "calibration", _checks.line("calibration", self.calibration))
        else:
            _checks.choice("calibration", self.calibration, ("paper", "exact"))
        _checks.choice("scope", self.scope, _moments.SCOPES)
        _checks.choice("statistics", self.statistics, ("detached", "differentiated"))

    def _fit(self, q: Array, k: Array, key_mask: Array | None, xp: Any) -> _scales.Fit:
        return _scales.fit(
            q, k, key_mask, calibration=self.calibration, scope=self.scope, who=type(self).__name__, xp=xp
        )

    def _checked(
        self, q: Array, k: Array, v: Array, causal: bool, key_mask: Any, positions: Any, backend: Any, xp: Any
    ) -> tuple[Call, tuple[int, ...]]:
        call, lead = super()._checked(q, k, v, causal, key_mask, positions, backend, xp)
        own = {name: np.shape(getattr(self, name)) for name in ("alpha", "beta") if self.alpha is not None}
        return call, _checks.own_axes(lead, **own)

    def _refuse(self, call: Call, streaming: bool) -> None:
        if self.alpha is None and (call.causal or streaming):
            what = "stream" if streaming else "be causal"
            remedy = "give both, or freeze them with `.calibrate(q, k)`"
            raise ValueError(f"`{self!r}` cannot {what} without `alpha` and `beta`: {LOOK_AHEAD}; {remedy}.")


@dataclass(frozen=True, repr=False)
class LLN(Scaled, LogFeatureAttention):
    """Linear Log-Normal attention: features exp(alpha q), exp(beta k), with the log-variance of softmax's weights.

        A[t, s] = sum_r exp(alpha q[t, r] + beta k[s, r]) / sum_s' sum_r exp(alpha q[t, r] + beta k[s', r])
        out[t] = sum_s A[t, s] v[s]                                            (no projection, no 1/sqrt(D))

        V(chi, D) = sigma_q^2 sigma_k^2        alpha = sqrt(chi/2) / sigma_q,  beta = sqrt(chi/2) / sigma_k

    V(chi, D) is the variance of ln sum_r exp(alpha q_r + beta k_r) for Gaussian q, k with
    chi = alpha^2 sigma_q^2 + beta^2 sigma_k^2.

    Parameters
    ----------
    alpha, beta : float or tuple, optional
        The scales, both or neither: a number, or one a head (nested tuples for more leading axes). Left out, they are
        matched to the moments of each call, which cannot be causal.
    calibration : "paper", "exact" or (a, b)
        V(chi, D): "paper" is a chi + b with the authors' constants, fitted at D = 64 and good for chi in 4 .. 9;
        "exact" is V itself, by quadrature; (a, b) is a line of your own.
    scope : {"tensor", "head", "sample"}
        What one alpha and beta serve: the whole array (as the authors have it), each head over the batch, or each head
        of each sequence. "head" takes the first of two or more leading axes for the batch.
    statistics : {"detached", "differentiated"}
        Whether alpha and beta are constants in the backward, or functions of q and k.

    Raises
    ------
    ValueError, TypeError
        If a parameter is none of these, or one of `alpha` and `beta` comes alone. In a call: if q or k has no variance
        or fewer than two numbers in a scope; for `causal` and streams without `alpha` and `beta`.

    Notes
    -----
    Shapes: q (..., N, D), k (..., M, D), v (..., M, E), one dtype -> out (..., N, E).
    Rows of A sum to 1 without any eps; a row that sees nothing is 0 and passes no gradient.
    sigma: all numbers of the scope at visible positions, mean removed, divided by their count less 1. `key_mask` takes
    positions from k, and from q too if N == M. Where several heads share keys, their queries share alpha.
    Recommended: scope="head", calibration="exact"; heads differ a thousandfold in sharpness, and the line suits one D.
    With the line alpha grows without bound as sigma falls; "exact" tends to uniform attention.
    Cost: O(N D E) time, state D (E + 2) numbers; backward keeps q, k, v and two numbers a scope.
    Source: Nahshan, Kampeas, Haleva, "Linear Log-Normal Attention with Unbiased Concentration", ICLR 2024,
    arXiv:2311.13541. "exact", "head", "sample" and "differentiated" are ours.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> la.LLN()(q, k, v).shape
    (2, 5, 4)
    >>> attend = la.LLN(calibration="exact", scope="head").calibrate(q, k)
    >>> attend(q, k, v, causal=True).shape
    (2, 5, 4)
    """

    _: KW_ONLY
    alpha: Any = None
    beta: Any = None
    calibration: Any = "paper"
    scope: str = "tensor"
    statistics: str = "detached"

    def __post_init__(self) -> None:
        self._check_scales()

    # -- features -----------------------------------------------------------------------------------------------------

    def _constants(self, q: Array, k: Array, call: Call) -> tuple[Array, Array]:
        if self.alpha is not None:
            return _given(self.alpha, q, call.xp), _given(self.beta, k, call.xp)
        found = self._fit(q, k, call.key_mask, call.xp)
        if self.statistics == "detached":
            return _arrays.detached(found.alpha), _arrays.detached(found.beta)
        return found.alpha, found.beta

    def _log_q(self, q: Array, constants: tuple[Array, Array], call: Call) -> Array:
        return _arrays.row_major(constants[0] * q)  # in the dtype of the constant, the widest

    def _log_k(self, k: Array, constants: tuple[Array, Array], call: Call) -> Array:
        return _arrays.row_major(constants[1] * k)

    def _log_q_vjp(self, d_lq: Array, q: Array, constants: tuple[Array, Array], call: Call) -> tuple[Array, Any]:
        """lq = alpha q: d_q = alpha d_lq, d_alpha = sum d_lq q."""
        d_q, d_alpha = self._scaled_vjp(d_lq, q, constants[0], call.xp)
        return d_q, (d_alpha, call.xp.zeros_like(constants[1])) if self._differentiates else ()

    def _log_k_vjp(self, d_lk: Array, k: Array, constants: tuple[Array, Array], call: Call) -> tuple[Array, Any]:
        """lk = beta k: d_k = beta d_lk, d_beta = sum d_lk k."""
        d_k, d_beta = self._scaled_vjp(d_lk, k, constants[1], call.xp)
        return d_k, (call.xp.zeros_like(constants[0]), d_beta) if self._differentiates else ()

    @property
    def _differentiates(self) -> bool:
        return self.alpha is None and self.statistics == "differentiated"

    def _scaled_vjp(self, d_log: Array, x: Array, scale: Array, xp: Any) -> tuple[Array, Any]:
        d_x = scale * d_log
        if not self._differentiates:
            return d_x, None
        d_log, x = (_arrays.cast(y, scale.dtype, xp) for y in (d_log, x))
        return d_x, _arrays.unbroadcast(d_log * x, tuple(scale.shape), xp)

    def _constants_vjp(
        self, d_constants: Any, q: Array, k: Array, constants: tuple[Array, Array], call: Call
    ) -> tuple[Array, Array] | None:
        if not self._differentiates:
            return None
        found = self._fit(q, k, call.key_mask, call.xp)
        d_alpha, d_beta = d_constants
        return _scales.fit_vjp(d_alpha, d_beta, found, q, k, call.key_mask, call.xp)


class LLNDiagState(NamedTuple):
    """The log-linear state, and the keys and values of the block that is open."""

    sums: Array
    rest: Array
    gauge: Array
    k: Array
    v: Array
    visible: Array | None


@dataclass(frozen=True, repr=False)
class LLNDiag(Scaled):
    """LLN averaged with softmax attention inside diagonal blocks: far tokens by LLN, near ones exactly.

        out[t] = ratio LLN[t] + (1 - ratio) sum_s G[t, s] v[s]
        G[t, s] = softmax over s of D**-0.5 q[t] . k[s], within t's block of `block` positions

    Parameters
    ----------
    alpha, beta, calibration, scope, statistics
        Those of `LLN`.
    block : int, optional
        Positions of a block; by default D. Blocks begin at position 0 of a sequence, the last one may be ragged.
    ratio : float or tuple
        LLN's share, within 0 .. 1: a number, or one a head. Where all keys of a row's block are masked it is 1.

    Raises
    ------
    ValueError, TypeError
        If a parameter is none of these; in a call, as for `LLN`, and if N != M.

    Notes
    -----
    Shapes: q (..., N, D), k (..., N, D), v (..., N, E), one dtype -> out (..., N, E).
    Masked positions count as positions. The state of a stream is LLN's, and k and v of the open block; states merge
    where the later one begins at a boundary of blocks.
    Held constant in the VJP: `ratio`, and alpha and beta as in `LLN`.
    Source: as for `LLN`. The authors' block is D, their ratio 1/2.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> la.LLNDiag(block=2)(q, k, v).shape
    (2, 5, 4)
    """

    _: KW_ONLY
    alpha: Any = None
    beta: Any = None
    calibration: Any = "paper"
    scope: str = "tensor"
    statistics: str = "detached"
    block: int | None = None
    ratio: Any = 0.5

    def __post_init__(self) -> None:
        self._check_scales()
        if self.block is not None:
            _checks.natural("block", self.block)
        object.__setattr__(self, "ratio", _checks.real_or_nested("ratio", self.ratio))
        _checks.within("ratio", self.ratio, 0.0, 1.0)

    @property
    def _linear(self) -> LLN:
        """The LLN part."""
        own = {"calibration": self.calibration, "scope": self.scope, "statistics": self.statistics}
        return LLN(alpha=self.alpha, beta=self.beta, **own)

    def _checked(
        self, q: Array, k: Array, v: Array, causal: bool, key_mask: Any, positions: Any, backend: Any, xp: Any
    ) -> tuple[Call, tuple[int, ...]]:
        call, lead = super()._checked(q, k, v, causal, key_mask, positions, backend, xp)
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(
                f"`{self!r}` has blocks of positions, which needs N == M, got N = {q.shape[-2]} and M = {k.shape[-2]}."
            )
        return call, _checks.own_axes(lead, ratio=np.shape(self.ratio))

    def _near(self, k: Array, call: Call, streaming: bool) -> blocks.Options:
        dim = max(k.shape[-1], 1)
        block = self.block or dim
        used = call.first_position % block if streaming else 0
        return blocks.Options(dim**-0.5, "past" if call.causal else "all", block, used, call.key_mask)

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        xp, dtype = call.xp, v.dtype
        near = self._near(k, call, arrays is not None)
        linear = None if arrays is None else loglinear.LogLinearState(*arrays[:3])
        cache = None if arrays is None else SoftmaxState(*arrays[3:])
        where = room(call, q, "softmax")
        g, sees, cache, saved_near = blocks.forward(q, k, v, cache, near, room=where, xp=xp)
        a, b, c = (_arrays.cast(x, _arrays.accumulator(x, xp), xp) for x in (q, k, v))  # one rounding, at the end
        y, linear, saved = self._linear._forward(a, b, c, linear, call, None)
        share = self._share(sees, g, xp)
        y = _arrays.fill(out, _arrays.cast(share * y + (1 - share) * g, dtype, xp))
        after = None if cache is None else _joined(linear, cache)
        return y, after, (saved, saved_near, near, where, share, (q, k, v))

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        """out = share LLN + (1 - share) G v: each part has its share of d_out."""
        saved, saved_near, near, where, share, primals = saved
        xp = call.xp
        g = _arrays.cast(d_out, share.dtype, xp)
        d_linear, d_cache = None, None
        if d_arrays is not None:
            d_linear, d_cache = loglinear.LogLinearState(*d_arrays[:3]), SoftmaxState(*d_arrays[3:])
        *grads, d_linear = self._linear._backward(share * g, d_linear, saved, call, None)
        *near_grads, d_before = blocks.backward((1 - share) * g, d_cache, saved_near, near, room=where, xp=xp)
        finished = (
            _arrays.fill(o, _arrays.cast(_arrays.unbroadcast(a + b, tuple(x.shape), xp), x.dtype, xp))
            for o, a, b, x in zip(out or (None, None, None), grads, near_grads, primals, strict=True)
        )
        d_state = None
        if d_before is not None:
            d_k, d_v = (_arrays.cast(d, x.dtype, xp) for d, x in zip(d_before, primals[1:], strict=True))
            d_state = _joined(d_linear, SoftmaxState(d_k, d_v, None))
        return *finished, d_state

    def _share(self, sees: Array | None, like: Array, xp: Any) -> Array:
        """LLN's share of each row, (..., 1 or N, 1)."""
        ratio = _arrays.cast(_given(self.ratio, like, xp), like.dtype, xp)
        return ratio if sees is None else xp.where(sees, ratio, xp.ones_like(ratio))

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        xp = call.xp
        near = self._near(k, call, False)
        g = blocks.weights(q, k, near, xp)
        linear = self._linear._weights(_arrays.cast(q, g.dtype, xp), _arrays.cast(k, g.dtype, xp), call)
        sees = xp.any(g != 0, axis=-1, keepdims=True) if g.shape[-1] else None  # some weight is at least 1 / block
        share = self._share(sees, g, xp)
        return _arrays.cast(share * linear + (1 - share) * g, q.dtype, xp)

    def _empty(self, k: Array, v: Array, call: Call) -> LLNDiagState:
        wide_k, wide_v = (_arrays.cast(x, _arrays.accumulator(x, call.xp), call.xp) for x in (k, v))
        return _joined(self._linear._empty(wide_k, wide_v, call), SoftmaxState(k, v, None))

    # -- states -------------------------------------------------------------------------------------------------------

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        """As for LLN; of k and v fewer tokens than a block."""
        self._check_arrays(state.arrays, k, v, call)

    def _check_arrays(self, arrays: Any, k: Array, v: Array, call: Call) -> None:
        with _arrays.quiet(k):
            like = self._empty(k[..., :0, :], v[..., :0, :], call)
        want = {
            name: (tuple(x.shape), _arrays.dtype_name(x), _arrays.library(x))
            for name, x in like._asdict().items()
            if x is not None
        }
        n_cached = arrays.k.shape[-2]
        for name in ("k", "v"):
            shape, dtype, library = want[name]
            want[name] = ((*shape[:-2], n_cached, shape[-1]), dtype, library)
        _checks.state_arrays("state", arrays._asdict(), want)

    def _merge(self, earlier: LLNDiagState, later: LLNDiagState, xp: Any) -> LLNDiagState:
        linear = loglinear.merge(loglinear.LogLinearState(*earlier[:3]), loglinear.LogLinearState(*later[:3]), xp)
        return _joined(linear, SoftmaxState(*later[3:]))

    def _refuse_merge(self, earlier: State, later: State) -> None:
        k, v = later.arrays.k, later.arrays.v
        block = self.block or max(k.shape[-1], 1)
        self._check_arrays(earlier.arrays, k, v, Call(_arrays.namespace(k), causal=True))
        if later.start != earlier.position or earlier.position % block:
            raise ValueError(
                f"`later` must begin where `earlier` ends and a block begins (blocks of {block}), got a state from "
                f"position {later.start} and one that ends at {earlier.position}: see `init_state(k, v, position=...)`."
            )


def _joined(linear: loglinear.LogLinearState, cache: SoftmaxState) -> LLNDiagState:
    return LLNDiagState(linear.sums, linear.rest, linear.gauge, cache.k, cache.v, cache.visible)


def _given(value: Any, like: Array, xp: Any) -> Array:
    """A number or nested tuple as (..., 1, 1)."""
    return _arrays.constant(np.asarray(value, dtype=np.float64)[..., None, None], like, xp)


def _plain(scale: Array) -> Any:
    """(..., 1, 1) as a number or nested tuples; leading axes of length 1 are left out."""
    numbers = _arrays.to_numpy(scale)[..., 0, 0]
    while numbers.ndim and numbers.shape[0] == 1:
        numbers = numbers[0]
    return _checks.real_or_nested("alpha, beta of these q and k", numbers.tolist())


def lln(
    q: Array,
    k: Array,
    v: Array,
    *,
    alpha: Any = None,
    beta: Any = None,
    calibration: Any = "paper",
    scope: str = "tensor",
    statistics: str = "detached",
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Any = None,
    backend: str | None = None,
    out: Array | None = None,
) -> Array:
    """`LLN(alpha=..., ...)(q, k, v, ...)` in one call; see `LLN` and `LLN.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> la.lln(q, k, v, alpha=2.0, beta=2.0, causal=True).shape
    (2, 5, 4)
    """
    attend = LLN(alpha=alpha, beta=beta, calibration=calibration, scope=scope, statistics=statistics)
    return attend(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend, out=out)


def lln_diag(
    q: Array,
    k: Array,
    v: Array,
    *,
    alpha: Any = None,
    beta: Any = None,
    calibration: Any = "paper",
    scope: str = "tensor",
    statistics: str = "detached",
    block: int | None = None,
    ratio: Any = 0.5,
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Any = None,
    backend: str | None = None,
    out: Array | None = None,
) -> Array:
    """`LLNDiag(alpha=..., ...)(q, k, v, ...)` in one call; see `LLNDiag` and `LLNDiag.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> la.lln_diag(q, k, v, alpha=2.0, beta=2.0, block=3, causal=True).shape
    (2, 5, 4)
    """
    attend = LLNDiag(
        alpha=alpha, beta=beta, calibration=calibration, scope=scope, statistics=statistics, block=block, ratio=ratio
    )
    return attend(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend, out=out)
