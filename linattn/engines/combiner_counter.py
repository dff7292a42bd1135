"""Streams of logsparse: a binary counter.

A piece is an aligned block of 2^l tokens, attended as a whole sequence that also meets the blocks waiting in the
counter. Two waiting blocks of one size merge into one of twice the size: pools go on, values are mixed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends.reference import combiner as reference
from linattn.engines.combiner import centred, of_plan, summaries
from linattn.engines.combiner_stream import (
    Back,
    CombinerState,
    Held,
    Marks,
    Stream,
    joined,
    plus_last,
    visible_so_far,
)  # fmt: skip
from linattn.engines.softmax import append
from linattn.plans.mixing import ALL, Block, Mixing, rows
from linattn.plans.plan import Plan


class Counter(Stream):
    """A binary counter of waiting blocks: one of 2^l tokens for each bit of the number of tokens, largest first."""

    kinds = ("block",)
    keeps_all = True

    def counts(self, n_tokens: int) -> list[int]:
        return [n_tokens.bit_count()]

    def entries(self, n_tokens: int) -> dict[str, int]:
        blocks = n_tokens.bit_count()
        return {"q": 0, "k": n_tokens, "v": n_tokens, "rho": blocks, "kappa": blocks, "u": blocks}

    def piece(self, at: int, most: int) -> int:
        """The largest aligned block that fits."""
        largest = 1 << (most.bit_length() - 1)
        return min(largest, at & -at) if at else largest

    def advance(
        self, q: Array, k: Array, v: Array, mask: Array | None, held: Held, marks: Marks, at: int
    ) -> tuple[Array, Held, Marks, Back]:
        xp, n = self.xp, q.shape[-2]
        plan = Plan.pattern("logsparse", n, causal=True)
        inner = of_plan(plan, self.options._replace(key_mask=mask), reference, q, xp)
        rho, kappa = summaries(inner, q, k)
        u = inner.local(rho, k, v)
        waiting = self.source(held, marks, 0)
        n_waiting = waiting[0].shape[-2]
        extra = (Block(rows(1, n), rows(1, n_waiting), ALL, 0, 2),) if n_waiting else ()
        mixing = Mixing(n, (n, plan.n_regions, n_waiting), (plan.main.blocks or ()) + extra)
        sources = [(k, v, mask, None), (kappa, u, inner.alive, inner.bias), waiting]
        y, mix_back = self.mix(q, sources, [mixing])

        new = held | {name: append(held[name], x, xp, -2) for name, x in (("k", k), ("v", v))}
        new_marks = marks | {"visible": visible_so_far(marks["visible"], mask, held["k"], k, xp)}
        whole = self.regions(Mixing(1, (n,), (Block(rows(1, 1), rows(1, n), ALL),)), mask, k)
        size = reference.sizes(mask, k, mixing=whole.local_mixing, xp=xp)
        after, after_marks, count_back = self.count(new, new_marks, whole.pool(q), whole.pool(k), size, at, n)

        def back(d_y: Array, d_after: Held) -> tuple[list[Array], Held]:
            d_new, d_rho_whole, d_kappa_whole = count_back(d_after)
            d_q, ((d_k, d_v), (d_kappa, d_u), (d_kappa_waiting, d_u_waiting)) = mix_back(d_y)
            d_rho, d_k_local, d_v_local = inner.local_vjp(d_u, rho, k, centred(v, mask, xp))
            d_q = d_q + inner.pool_vjp(d_rho, q) + whole.pool_vjp(d_rho_whole, q)
            d_k = d_k + d_k_local + inner.pool_vjp(d_kappa, k) + whole.pool_vjp(d_kappa_whole, k)
            d_v = d_v + _arrays.unbroadcast(d_v_local, tuple(v.shape), xp)
            d_held = d_new | {"kappa0": d_new["kappa0"] + d_kappa_waiting, "u0": d_new["u0"] + d_u_waiting}
            d_own = [d_q]
            for name, x, d in (("k", k, d_k), ("v", v, d_v)):
                m = held[name].shape[-2]
                d_own.append(d + _arrays.unbroadcast(d_new[name][..., m:, :], tuple(x.shape), xp))
                d_held[name] = _arrays.unbroadcast(d_new[name][..., :m, :], tuple(held[name].shape), xp)
            return d_own, d_held

        return y, after, after_marks, back

    def count(
        self, new: Held, marks: Marks, rho: Array, kappa: Array, size: Array, at: int, n: int
    ) -> tuple[Held, Marks, Callable[[Held], Any]]:
        """A block of n tokens joins the counter and merges while one of its size waits; its values are mixed last.

        back(d_after) -> the cotangent of `new`, d_rho, d_kappa.
        """
        xp, length, steps = self.xp, n, []
        kept = new["kappa0"].shape[-2]
        while at & length:
            kept -= 1
            old = slice(kept, kept + 1)
            n_old = marks["size0"][..., old]
            rho, rho_back = self.pooled_on(new["rho"][..., old, :], rho, n_old, size)
            kappa, kappa_back = self.pooled_on(new["kappa0"][..., old, :], kappa, n_old, size)
            steps.append((rho_back, kappa_back))
            size, length = n_old + size, 2 * length
        k, v = (new[name][..., -length:, :] for name in ("k", "v"))
        visible = None if marks["visible"] is None else marks["visible"][..., -length:]
        whole = self.regions(Mixing(1, (length,), (Block(rows(1, 1), rows(1, length), ALL),)), visible, k)
        u = whole.local(rho, k, v)
        after, names = dict(new), (("rho", rho), ("kappa0", kappa), ("u0", u))
        for name, x in names:
            after[name] = append(new[name][..., :kept, :], x, xp, -2)
        after_marks = marks | {"size0": append(marks["size0"][..., :kept], size, xp, -1)}

        def back(d_after: Held) -> tuple[Held, Array, Array]:
            d_rho, d_kappa, d_u = (
                _arrays.unbroadcast(d_after[name][..., kept:, :], tuple(x.shape), xp) for name, x in names
            )
            d_more, d_k, d_v = whole.local_vjp(d_u, rho, k, centred(v, visible, xp))
            d_rho = d_rho + d_more
            merged_rho, merged_kappa = [], []
            for rho_back, kappa_back in reversed(steps):
                d_old, d_rho = rho_back(d_rho)
                merged_rho.append(d_old)
                d_old, d_kappa = kappa_back(d_kappa)
                merged_kappa.append(d_old)
            d_new = dict(d_after)
            zero = xp.zeros_like(new["u0"][..., kept:, :])
            for name, parts in (("rho", merged_rho), ("kappa0", merged_kappa), ("u0", [zero])):
                d = joined([d_after[name][..., :kept, :], *parts], -2, xp)
                d_new[name] = _arrays.unbroadcast(d, tuple(new[name].shape), xp)
            for name, d in (("k", d_k), ("v", _arrays.unbroadcast(d_v, tuple(v.shape), xp))):
                d_new[name] = plus_last(d_after[name], d, xp)
            return d_new, d_rho, d_kappa

        return after, after_marks, back

    def fault(self, n_earlier: int, n_later: int) -> str | None:
        lowest = n_earlier & -n_earlier
        if n_earlier == 0 or n_later <= lowest:
            return None
        return f"behind {n_earlier} tokens a later one may hold {lowest} at most, got {n_later}"

    def merge(self, earlier: CombinerState, later: CombinerState) -> CombinerState:
        xp = self.xp
        (a, marks_a), (b, marks_b) = self.opened(earlier), self.opened(later)
        n_a, n_b = self.n_tokens(earlier), self.n_tokens(later)
        tokens = {name: append(a[name], b[name], xp, -2) for name in ("k", "v")}
        visible = {"visible": visible_so_far(marks_a["visible"], marks_b["visible"], a["k"], b["k"], xp)}
        if n_b and n_a & n_b:  # as many as the last block of the earlier one: they carry
            one = (b["rho"], b["kappa0"], marks_b["size0"])
            held, marks, _ = self.count(a | tokens, marks_a | visible, *one, n_a, n_b)
        else:
            held = {name: append(a[name], b[name], xp, -2) for name in a} | tokens
            marks = visible | {"size0": append(marks_a["size0"], marks_b["size0"], xp, -1)}
        return self.closed(held, marks, later)
