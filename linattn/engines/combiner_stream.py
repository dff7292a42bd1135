"""Streams of the combiner engine: states, steps and their VJPs, for causal patterns.

A step is cut into pieces in which no region closes. A piece is one call of the reference room: its queries meet the
open tokens, those that are kept, and the regions that earlier pieces closed. A region that closes pools its queries
and keys, and its values are mixed over raw keys there and then. How pieces are cut, and what closes at their ends:
combiner_grid.py, combiner_counter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends.reference import combiner as reference
from linattn.backends.reference._scans import larger
from linattn.engines.combiner import Options, Regions, offset
from linattn.engines.softmax import append
from linattn.plans.mixing import Mixing

Held = dict[str, Array]  # what cotangents flow through
Marks = dict[str, Any]  # what none does
Back = Callable[[Array, Held], tuple[list[Array], Held]]


class CombinerState(NamedTuple):
    """What past tokens leave behind.

    q (..., open, D): queries of the open row. k, v (..., kept, .): keys and values of the open row, or of all tokens
    where later queries meet them directly; visible (..., kept), None: all. rho (..., P, D): pooled queries that are
    pooled on. kappa, u (..., R, .): the closed regions; size (..., R): how many visible members each has.
    """

    q: Array
    k: Array
    v: Array
    visible: Array | None
    rho: Array
    kappa: Array
    u: Array
    size: Array


def empty_state(k: Array, v: Array, xp: Any) -> CombinerState:
    """Before the first token; k (..., 0, D), v (..., 0, E)."""
    kappa, u = (_arrays.cast(x, _arrays.accumulator(x, xp), xp) for x in (k, v))
    size = xp.zeros(tuple(k.shape[:-1]), dtype=kappa.dtype, device=_arrays.device(k))
    return CombinerState(k, k, v, None, kappa, kappa, u, size)


class Stream:
    """One pattern's steps. Regions of kind f are ``kappa<f>``, ``u<f>`` in `held` and ``size<f>`` in `marks`."""

    kinds: tuple[str, ...]
    keeps_all: bool  # later queries meet all past keys directly, or regions are mixed anew over them

    def __init__(self, options: Options, xp: Any) -> None:
        self.options, self.xp = options, xp

    def n_tokens(self, arrays: CombinerState) -> int:
        return int(arrays.k.shape[-2])

    def entries(self, n_tokens: int) -> dict[str, int]:
        """How many entries each array of a state has behind so many tokens."""
        raise NotImplementedError

    def counts(self, n_tokens: int) -> list[int]:
        """Regions of each kind."""
        raise NotImplementedError

    def piece(self, at: int, most: int) -> int:
        """Tokens of the piece that starts behind `at`."""
        raise NotImplementedError

    def advance(
        self, q: Array, k: Array, v: Array, mask: Array | None, held: Held, marks: Marks, at: int
    ) -> tuple[Array, Held, Marks, Back]:
        """One piece: out, what is held behind it, and back(d_out, d_held) -> [d_q, d_k, d_v], d_held before."""
        raise NotImplementedError

    def merge(self, earlier: CombinerState, later: CombinerState) -> CombinerState:
        raise NotImplementedError

    def fault(self, n_earlier: int, n_later: int) -> str | None:
        """Why states of so many tokens do not merge, if they do not."""
        raise NotImplementedError

    # -- states -----------------------------------------------------------------------------------------------------

    def opened(self, arrays: CombinerState) -> tuple[Held, Marks]:
        """`held` and `marks` of a state, in the accumulation dtype."""
        dtype, first = arrays.u.dtype, 0
        held = {name: _arrays.cast(getattr(arrays, name), dtype, self.xp) for name in ("q", "k", "v", "rho")}
        marks: Marks = {"visible": arrays.visible}
        for f, count in enumerate(self.counts(self.n_tokens(arrays))):
            last = first + count
            held[f"kappa{f}"], held[f"u{f}"] = arrays.kappa[..., first:last, :], arrays.u[..., first:last, :]
            marks[f"size{f}"] = arrays.size[..., first:last]
            first = last
        return held, marks

    def closed(self, held: Held, marks: Marks, like: CombinerState) -> CombinerState:
        """The state of `held`, its tokens in the dtype of `like`."""
        q, k, v = (_arrays.cast(held[name], like.k.dtype, self.xp) for name in ("q", "k", "v"))
        kappa, u, size = (
            joined([where[f"{name}{f}"] for f in range(len(self.kinds))] or [getattr(like, name)], axis, self.xp)
            for name, where, axis in (("kappa", held, -2), ("u", held, -2), ("size", marks, -1))
        )
        return CombinerState(q, k, v, marks["visible"], held["rho"], kappa, u, size)

    def step(
        self, q: Array, k: Array, v: Array, key_mask: Array | None, arrays: CombinerState
    ) -> tuple[Array | None, CombinerState, Callable[..., Any]]:
        """out (None without tokens), the state behind, and backward(d_out, d_arrays) -> (d_q, d_k, d_v), d_arrays."""
        xp, n_tokens, before = self.xp, q.shape[-2], self.n_tokens(arrays)
        wide = [_arrays.row_major(_arrays.cast(x, arrays.u.dtype, xp)) for x in (q, k, v)]
        start, start_marks = held, marks = self.opened(arrays)
        edges = [0]
        outs: list[Array] = []
        backs: list[Back] = []
        while edges[-1] < n_tokens:
            first = edges[-1]
            last = first + self.piece(before + first, n_tokens - first)
            q_own, k_own, v_own = (x[..., first:last, :] for x in wide)
            mask = None if key_mask is None else key_mask[..., first:last]
            y, held, marks, back = self.advance(q_own, k_own, v_own, mask, held, marks, before + first)
            edges.append(last)
            outs.append(y)
            backs.append(back)
        end = held

        def backward(d_out: Array, d_arrays: CombinerState | None) -> tuple[list[Array], CombinerState]:
            if d_arrays is None:
                d_held = {name: xp.zeros_like(x) for name, x in end.items()}
            else:
                d_held = self.opened(d_arrays)[0]
            d_out = _arrays.row_major(_arrays.cast(d_out, arrays.u.dtype, xp))
            parts: list[list[Array]] = []
            for back, first, last in reversed(list(zip(backs, edges[:-1], edges[1:], strict=True))):
                d_own, d_held = back(d_out[..., first:last, :], d_held)
                parts.insert(0, d_own)
            grads = [
                _arrays.cast(joined([own[i] for own in parts] or [xp.zeros_like(x)], -2, xp), x.dtype, xp)
                for i, x in enumerate((q, k, v))
            ]
            d_held = {name: _arrays.unbroadcast(d, tuple(start[name].shape), xp) for name, d in d_held.items()}
            zero = {name: None if name == "visible" else xp.zeros_like(x) for name, x in start_marks.items()}
            return grads, self.closed(d_held, zero, arrays)

        y = joined(outs, -2, xp) if outs else None
        return y, self.closed(held, marks, arrays), backward

    # -- parts ------------------------------------------------------------------------------------------------------

    def source(self, held: Held, marks: Marks, f: int) -> tuple[Array, Array, Array, Array | None]:
        """The regions of kind f as keys."""
        size, xp = marks[f"size{f}"], self.xp
        bias = xp.log(xp.where(size > 0, size, xp.ones_like(size))) if self.options.size_bias else None
        return held[f"kappa{f}"], held[f"u{f}"], size > 0, bias

    def mix(
        self, q: Array, sources: list[Any], mixings: list[Mixing]
    ) -> tuple[Array, Callable[[Array], tuple[Array, list[Any]]]]:
        """The mean of the softmaxes, and back(d_out) -> d_q, [(d_k, d_v), ...]; values are centred in it."""
        xp, given = self.xp, {"scale": self.options.scale, "xp": self.xp}
        y = plus([reference.forward(q, sources, mixing=mixing, out=None, **given) for mixing in mixings])
        _, v, visible, _ = sources[0]

        def back(d_out: Array) -> tuple[Array, list[Any]]:
            taken_off = offset(v, visible, xp)
            moved = [(k, v - taken_off, visible, bias) for k, v, visible, bias in sources]
            parts = [reference.backward(d_out / len(mixings), q, moved, mixing=m, **given) for m in mixings]
            d_sources = [
                [_arrays.unbroadcast(plus(d), tuple(x.shape), xp) for d, x in zip(zip(*ds), source[:2], strict=True)]
                for source, *ds in zip(sources, *(part[1] for part in parts), strict=True)
            ]
            return plus([part[0] for part in parts]), d_sources

        return y / len(mixings) if len(mixings) > 1 else y, back

    def regions(self, local: Mixing, visible: Array | None, like: Array, has_rep: bool = False) -> Regions:
        """Regions that close, over some tokens of their own."""
        options = self.options._replace(key_mask=visible)
        return Regions(local, None, options, reference, like, self.xp, has_rep=has_rep)

    def pooled_on(self, old: Array, new: Array, n_old: Array, n_new: Array) -> tuple[Array, Callable[..., Any]]:
        """One pool from two, the old one's tokens first, and back(d) -> d_old, d_new. n: members of each."""
        xp = self.xp
        n_old, n_new = n_old[..., None], n_new[..., None]
        zero, both = xp.zeros_like(old), n_old + n_new
        if self.options.pool == "mean":
            whole = xp.where(both == 0, xp.ones_like(both), both)
            shares = n_old / whole, n_new / whole
            y = plus([xp.where(n > 0, x * s, zero) for x, n, s in zip((old, new), (n_old, n_new), shares, strict=True)])
            return y, lambda d: tuple(d * share for share in shares)
        takes_new = (n_new > 0) & ((n_old == 0) | larger(new, old, xp))
        takes_old = (n_old > 0) & ~takes_new
        y = xp.where(takes_new, new, xp.where(takes_old, old, zero))
        return y, lambda d: tuple(xp.where(takes, d, xp.zeros_like(d)) for takes in (takes_old, takes_new))


# -- parts ----------------------------------------------------------------------------------------------------------


def joined(parts: list[Array], axis: int, xp: Any) -> Array:
    """Along the token axis; the axes before it broadcast."""
    whole = parts[0]
    for part in parts[1:]:
        whole = append(whole, part, xp, axis)
    return whole


def plus(parts: Any) -> Array:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def visible_so_far(old: Array | None, new: Array | None, old_k: Array, new_k: Array, xp: Any) -> Array | None:
    if old is None and new is None:
        return None
    old, new = (
        xp.ones((k.shape[-2],), dtype=xp.bool, device=_arrays.device(k)) if mask is None else mask
        for mask, k in ((old, old_k), (new, new_k))
    )
    return append(old, new, xp, axis=-1)


def plus_last(total: Array, part: Array, xp: Any) -> Array:
    """The part is that of the last tokens."""
    m = total.shape[-2] - part.shape[-2]
    return total + part if m == 0 else xp.concat([total[..., :m, :], total[..., m:, :] + part], axis=-2)
