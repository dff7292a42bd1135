"""Combiner: full attention, far keys through regions."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from linattn import _arrays, _checks
from linattn._arrays import Array
from linattn.engines import combiner as engine
from linattn.engines.combiner_counter import Counter
from linattn.engines.combiner_grid import Grid
from linattn.engines.combiner_stream import CombinerState, Stream, empty_state
from linattn.mechanisms.attention import Attention, Call, State, room
from linattn.plans.plan import PATTERNS, SIZES, Plan

POOLS = ("max", "mean")
ROW_KEYS = ("self", "wsum")
MIXES = {"average": ("axial_vertical", "axial_horizontal"), "joint": ("joint",)}


@dataclass(frozen=True, repr=False)
class Combiner(Attention):
    """Full attention at the cost of a sparse one: near keys directly, every other visible key through a region.

        rho_r, kappa_r = max over s in region r of q_s, of k_s, per channel
        Pi[r, s] = softmax over s in region r of scale rho_r . k_s,    u_r = sum_s Pi[r, s] v_s
        P[t, .]  = one softmax over [scale q_t . k_s, s met directly ; scale q_t . kappa_r + b_r, r met by t]
        out_t    = sum_s P[t, s] v_s + sum_r P[t, r] u_r                                 (paper, eqs. 3-10)

    Each visible key is met exactly once, so a row of weights is a distribution over all of them.

    Parameters
    ----------
    pattern : str or Plan
        ``"fixed"`` spans; ``"logsparse"`` blocks of 2, 4, 8, ... tokens; ``"axial_vertical"``, ``"axial_horizontal"``
        and ``"axial_rowmajor"`` on a grid of tokens; their ``"mixture"``; or a plan of your own.
    span : int, optional
        Tokens of a span of ``"fixed"``; by default a power of two near sqrt(N). Required for streams.
    width : int, optional
        Tokens of a row of the axial patterns and the mixture; by default and for streams as `span`.
    pool : {"max", "mean"}
        How a region's queries and keys are summarised. ``"axial_rowmajor"`` and plans with representatives pool not.
    size_bias : bool
        b_r = log of the number of visible members, else 0. With it attention to equal keys is uniform.
    row_key : {"self", "wsum"}
        kappa where a token stands for its region: its key, or the sum of the keys that Pi weighs.
    mix : {"average", "joint"}
        The mixture as the mean of vertical and horizontal, each with a softmax (the paper), or as one softmax that
        meets the keys above in other columns twice (the authors' code; causal only).
    scale : float, optional
        Positive; by default D**-0.5.

    Raises
    ------
    ValueError, TypeError
        For a pattern that is not known, a parameter that the pattern does not have, and values out of range.

    Notes
    -----
    Shapes: q (..., N, D), k (..., N, D), v (..., N, E), one dtype -> out (..., N, E). Self-attention only: queries are
    pooled over the positions of keys. A masked key is in no region and is met by nobody, but keeps its position.
    Subgradient: of equal maxima the lowest index takes all. Held constant in the VJP: b.
    Cost: O(N sqrt N (D + E)), logsparse O(N log N (D + E)); backward keeps q, k and v. `plans` counts the pairs.
    A stream keeps less than all keys and values with "fixed" only; a plan of your own has none.
    Source: Ren et al., NeurIPS 2021, arXiv:2107.05768. It is an attention of its own, no approximation of softmax.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 100, 4))
    >>> la.Combiner("fixed", span=10)(q, k, v, causal=True).shape
    (2, 100, 4)
    """

    pattern: str | Plan = "fixed"
    _: KW_ONLY
    span: int | None = None
    width: int | None = None
    pool: str = "max"
    size_bias: bool = False
    row_key: str = "self"
    mix: str = "average"
    scale: float | None = None

    def __post_init__(self) -> None:
        own = self.pattern if isinstance(self.pattern, Plan) else None
        if own is None:
            _checks.choice("pattern", self.pattern, PATTERNS)
        for name, size in (("span", self.span), ("width", self.width)):
            if size is not None and (own is not None or SIZES[str(self.pattern)] != name):
                raise self._without(f"{name}={size!r}", f"it has no {name}")
            if size is not None:
                _checks.natural(name, size)
        _checks.choice("pool", self.pool, POOLS)
        _checks.flag("size_bias", self.size_bias)
        _checks.choice("row_key", self.row_key, ROW_KEYS)
        if self.row_key != "self" and not (own.has_rep if own else self.pattern == "axial_rowmajor"):
            raise self._without(f"row_key={self.row_key!r}", "no token stands for its regions")
        _checks.choice("mix", self.mix, tuple(MIXES))
        if self.mix != "average" and self.pattern != "mixture":
            raise self._without(f"mix={self.mix!r}", "it is no mixture")
        if self.scale is not None:
            _checks.positive_real("scale", self.scale)

    def _without(self, what: str, why: str) -> ValueError:
        name = "a plan" if isinstance(self.pattern, Plan) else repr(self.pattern)
        return ValueError(f"`Combiner` of {name} must not be given {what}: {why}.")

    def plans(self, n: int, *, causal: bool = False) -> tuple[Plan, ...]:
        """Who meets whom among n tokens: a plan for each softmax, two for the mixture's average.

        Raises
        ------
        ValueError
            If a plan of your own has another number of tokens, or does not meet each visible key exactly once.
        """
        _checks.natural("n", n, least=0)
        if isinstance(self.pattern, Plan):
            plan, span = self.pattern, "past" if causal else "all"
            if plan.n != n:
                raise ValueError(f"`pattern` must be a plan of the tokens at hand, N = {n}, got one of {plan.n}.")
            if plan.span != span and (fault := plan.fault(span)):
                t, s, count = fault
                raise ValueError(
                    f"`pattern` must meet each visible key exactly once (causal={causal}), "
                    f"got {count} times for query {t} and key {s}."
                )
            return (plan,)
        names = MIXES[self.mix] if self.pattern == "mixture" else (self.pattern,)
        return tuple(Plan.pattern(name, n, size=self._size, causal=causal) for name in names)

    @property
    def _size(self) -> int | None:
        return self.span if self.span is not None else self.width

    def _options(self, n_channels: int, key_mask: Any) -> engine.Options:
        scale = float(self.scale) if self.scale is not None else max(n_channels, 1) ** -0.5
        return engine.Options(self.pool, self.size_bias, self.row_key, scale, key_mask)

    # -- whole sequences --------------------------------------------------------------------------------------------

    def _checked(self, q: Array, k: Array, *args: Any) -> tuple[Call, tuple[int, ...]]:
        found = super()._checked(q, k, *args)
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(
                f"`{type(self).__name__}` is for self-attention, it needs N == M, "
                f"got N = {q.shape[-2]} and M = {k.shape[-2]}."
            )
        return found

    def _refuse(self, call: Call, streaming: bool) -> None:
        if self.mix == "joint" and not call.causal:
            raise ValueError(f"`{self!r}` must be causal: the joint mixture has no other form, got causal=False.")
        if not streaming:
            return
        if isinstance(self.pattern, Plan):
            raise ValueError("`Combiner` of a plan cannot be streamed: a plan is of a fixed number of tokens.")
        if SIZES[self.pattern] is not None and self._size is None:
            name = SIZES[self.pattern]
            raise ValueError(f"`{self!r}` cannot be streamed: give `{name}`, whose default depends on the length.")
        if call.backend not in (None, "reference"):
            raise _checks.backend_lacks(call.backend, "steps of Combiner")

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        if arrays is not None:
            y, after, back = self._stream(q.shape[-1], call.xp).step(q, k, v, call.key_mask, arrays)
            return _arrays.fill(out, self._result(y, q, k, v, call)), after, back
        plans, options = self.plans(q.shape[-2], causal=call.causal), self._options(q.shape[-1], call.key_mask)
        where = room(call, q, "combiner")
        y = engine.forward(q, k, v, plans, options, room=where, out=out, xp=call.xp)
        return y, None, (q, k, v, plans, options, where)

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        if callable(saved):
            (d_q, d_k, d_v), d_before = saved(d_out, d_arrays)
            return d_q, d_k, d_v, d_before
        *args, where = saved
        return *engine.backward(d_out, *args, room=where, out=out, xp=call.xp), None

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        plans, options = self.plans(q.shape[-2], causal=call.causal), self._options(q.shape[-1], call.key_mask)
        return engine.weights(q, k, plans, options, call.xp)

    # -- streams ----------------------------------------------------------------------------------------------------

    def _stream(self, n_channels: int, xp: Any) -> Stream:
        options = self._options(n_channels, None)
        if self.pattern == "logsparse":
            return Counter(options, xp)
        name, width = self.mix if self.pattern == "mixture" else str(self.pattern), self._size
        assert width is not None  # `_refuse` saw to it
        return Grid(name, width, options, xp)

    def _result(self, y: Array | None, q: Array, k: Array, v: Array, call: Call) -> Array:
        if y is not None:
            return _arrays.cast(y, q.dtype, call.xp)
        leads = [tuple(x.shape[:-2]) for x in (q, k, v)]
        leads += [] if call.key_mask is None else [tuple(call.key_mask.shape[:-1])]
        shape = (*_arrays.broadcast_shapes(*leads), 0, v.shape[-1])
        return call.xp.zeros(shape, dtype=q.dtype, device=_arrays.device(q))

    def _empty(self, k: Array, v: Array, call: Call) -> CombinerState:
        return empty_state(k, v, call.xp)

    _fits_by_shape = False

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        """The leading axes of what is pooled may have grown; tokens and regions follow from the position."""
        arrays, wide = state.arrays, "float64" if _arrays.dtype_name(k) == "float64" else "float32"
        entries = self._stream(k.shape[-1], call.xp).entries(state.position - state.start)
        width = {"q": k, "k": k, "v": v, "rho": k, "kappa": k, "u": v}
        want = {}
        for name, n in entries.items():
            x = getattr(arrays, name)
            given = {"k": k, "v": v}.get(name, x)
            dtype = _arrays.dtype_name(k) if name in ("q", "k", "v") else wide
            want[name] = ((*given.shape[:-2], n, width[name].shape[-1]), dtype, _arrays.library(k))
        want["size"] = ((*arrays.size.shape[:-1], entries["u"]), wide, _arrays.library(k))
        _checks.state_arrays("state", arrays._asdict(), want)

    def _refuse_merge(self, earlier: State, later: State) -> None:
        call = Call(_arrays.namespace(later.arrays.k))
        self._refuse_state(earlier, later.arrays.k, later.arrays.v, call)
        self._refuse_state(later, later.arrays.k, later.arrays.v, call)
        n_earlier, n_later = (state.position - state.start for state in (earlier, later))
        why = self._stream(later.arrays.k.shape[-1], call.xp).fault(n_earlier, n_later)
        if why is not None:
            raise ValueError(f"`{self!r}` merges states where regions end only: {why}.")

    def _merge(self, earlier: Any, later: Any, xp: Any) -> CombinerState:
        return self._stream(later.k.shape[-1], xp).merge(earlier, later)


def combiner(
    q: Array,
    k: Array,
    v: Array,
    *,
    pattern: str | Plan = "fixed",
    span: int | None = None,
    width: int | None = None,
    pool: str = "max",
    size_bias: bool = False,
    row_key: str = "self",
    mix: str = "average",
    scale: float | None = None,
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Any = None,
    backend: str | None = None,
    out: Array | None = None,
) -> Array:
    """`Combiner(pattern, ...)(q, k, v, ...)` in one call; see `Combiner` and `Combiner.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.ones((3, 2, 5, 4))
    >>> float(la.combiner(q, k, v, pattern="logsparse", causal=True).min())
    1.0
    """
    attend = Combiner(
        pattern, span=span, width=width, pool=pool, size_bias=size_bias, row_key=row_key, mix=mix, scale=scale
    )
    return attend(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend, out=out)
