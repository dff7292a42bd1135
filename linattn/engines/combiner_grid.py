"""Streams of spans and of the axial patterns: a piece ends with its row, at the latest.

A closed row leaves behind, by the kind of the regions:

    span                         one region
    row, row_rest, left, right   one region for each column
    column                       a row more in the columns' regions: pools go on, u is mixed anew over the raw keys
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends.reference import combiner as reference
from linattn.engines.combiner import Options, centred, makes_kappa, summaries, weighed, weighed_vjp
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
from linattn.plans.mixing import ALL, FROM, NOT, UPTO, Block, Mixing, columns, rows

KINDS = {
    "fixed": (("span",),),
    "axial_vertical": (("column",),),
    "axial_horizontal": (("row_rest",),),
    "axial_rowmajor": (("row",),),
    "joint": (("column", "left", "right"),),
    "average": (("column",), ("row_rest",)),
}
"""The kinds of regions that each softmax of a pattern meets."""
HAS_COLUMN = frozenset({"axial_vertical", "axial_horizontal", "joint", "average"})
WITHOUT_OWN = frozenset({"column", "row_rest", "left", "right"})  # none where the own column is the only one


class Grid(Stream):
    """Spans and the axial patterns: `width` tokens a row, `r` closed rows, then the open one."""

    def __init__(self, pattern: str, width: int, options: Options, xp: Any) -> None:
        super().__init__(options, xp)
        self.pattern, self.width = pattern, width
        alone = WITHOUT_OWN if width == 1 else frozenset()
        self.softmaxes = [[kind for kind in own if kind not in alone] for own in KINDS[pattern]]
        self.kinds = tuple(kind for own in self.softmaxes for kind in own)
        self.keeps_all = pattern in HAS_COLUMN

    def n_tokens(self, arrays: CombinerState) -> int:
        if self.keeps_all:
            return int(arrays.k.shape[-2])
        return int(arrays.q.shape[-2] + arrays.kappa.shape[-2] * (self.width if self.pattern == "fixed" else 1))

    def counts(self, n_tokens: int) -> list[int]:
        r, w = n_tokens // self.width, self.width
        of_kind = {"span": r, "column": w if r else 0, "left": r * (w - 1), "right": r * (w - 1)}
        return [of_kind.get(kind, r * w) for kind in self.kinds]

    def entries(self, n_tokens: int) -> dict[str, int]:
        n_open, n_regions = n_tokens % self.width, sum(self.counts(n_tokens))
        kept = n_tokens if self.keeps_all else n_open
        pooled = self.width if "column" in self.kinds and n_tokens >= self.width else 0
        return {"q": n_open, "k": kept, "v": kept, "rho": pooled, "kappa": n_regions, "u": n_regions}

    def piece(self, at: int, most: int) -> int:
        return min(most, self.width - at % self.width)

    def advance(
        self, q: Array, k: Array, v: Array, mask: Array | None, held: Held, marks: Marks, at: int
    ) -> tuple[Array, Held, Marks, Back]:
        xp, n = self.xp, q.shape[-2]
        new = held | {name: append(held[name], x, xp, -2) for name, x in (("q", q), ("k", k), ("v", v))}
        new_marks = marks | {"visible": visible_so_far(marks["visible"], mask, held["k"], k, xp)}
        y, attend_back = self.attend(q, new, new_marks, at)
        after, after_marks, close_back = new, new_marks, None
        if (at + n) % self.width == 0:
            after, after_marks, close_back = self.close(new, new_marks, at // self.width)

        def back(d_y: Array, d_after: Held) -> tuple[list[Array], Held]:
            d_new = d_after if close_back is None else close_back(d_after)
            d_q, d_more = attend_back(d_y)
            d_new = {name: d + d_more[name] if name in d_more else d for name, d in d_new.items()}
            d_own = []
            for name, x in (("q", q), ("k", k), ("v", v)):
                d, m = d_new[name], held[name].shape[-2]
                d_new[name] = _arrays.unbroadcast(d[..., :m, :], tuple(held[name].shape), xp)
                d_own.append(_arrays.unbroadcast(d[..., m:, :], tuple(x.shape), xp))
            return [d_own[0] + d_q, *d_own[1:]], d_new

        return y, after, after_marks, back

    def attend(self, q: Array, new: Held, marks: Marks, at: int) -> tuple[Array, Callable[..., Any]]:
        """The piece's queries over the open row, their columns in the closed rows, and the regions."""
        xp, n, w, (r, c) = self.xp, q.shape[-2], self.width, divmod(at, self.width)
        k, v, visible = new["k"], new["v"], marks["visible"]
        m = k.shape[-2] - c - n  # closed tokens that are kept
        row, kept = (
            [k[..., s, :], v[..., s, :], None if visible is None else visible[..., s], None]
            for s in (slice(m, None), slice(0, m))
        )
        direct = [Block(rows(1, n), rows(1, c + n), UPTO, c)]
        sources: list[Any] = [row]
        if m:
            sources.append(kept)
            direct.append(Block(rows(n, 1), columns(n, r, w, first=c), ALL, 0, 1))
        first = len(sources)
        sources += [self.source(new, marks, f) for f in range(len(self.kinds))]
        mixings, f = [], 0
        for own in self.softmaxes:
            met = [self.users(kind, n, r, c, first + f + i) for i, kind in enumerate(own)] if r else []
            n_keys = tuple(source[0].shape[-2] for source in sources)
            mixings.append(Mixing(n, n_keys, (*direct, *(block for block in met if block is not None))))
            f += len(own)
        y, mix_back = self.mix(q, sources, mixings)

        def back(d_y: Array) -> tuple[Array, Held]:
            d_q, d_sources = mix_back(d_y)
            d_tokens = [joined([d[i] for d in d_sources[first - 1 :: -1]], -2, xp) for i in (0, 1)]
            d_more = {"k": d_tokens[0], "v": d_tokens[1]}
            for f, (d_kappa, d_u) in enumerate(d_sources[first:]):
                d_more |= {f"kappa{f}": d_kappa, f"u{f}": d_u}
            return d_q, d_more

        return y, back

    def users(self, kind: str, n: int, r: int, c: int, source: int) -> Block | None:
        """Queries in the columns c .. c + n - 1 over the regions of r closed rows."""
        w = self.width
        if kind == "span":
            return Block(rows(1, n), rows(1, r), ALL, 0, source)
        if kind == "column":
            return Block(rows(1, n), rows(1, w), NOT, c, source)
        if kind == "left":  # its regions are left of the columns 1 ..
            skipped = 1 if c == 0 else 0
            m, c, w, start = n - skipped, c + skipped - 1, w - 1, skipped
        elif kind == "right":  # its regions are right of the columns .. w - 2
            m, w, start = min(n, w - 1 - c), w - 1, 0
        else:
            m, start = n, 0
        return Block(rows(m, 1, start=start), columns(m, r, w, first=c), ALL, 0, source) if m > 0 else None

    def close(self, new: Held, marks: Marks, r: int) -> tuple[Held, Marks, Callable[[Held], Held]]:
        """The open row, number r, is whole: its regions, and back(d_after) -> the cotangent of `new`."""
        xp, w = self.xp, self.width
        q, visible = new["q"], marks["visible"]
        k, v = (new[name][..., -w:, :] for name in ("k", "v"))
        mask = None if visible is None else visible[..., -w:]
        after, after_marks = dict(new), dict(marks)
        after["q"] = q[..., :0, :]
        if not self.keeps_all:
            after |= {"k": k[..., :0, :], "v": v[..., :0, :]}
            after_marks["visible"] = None if visible is None else visible[..., :0]
        backs: list[Callable[[Held, Held], None]] = []
        for f, kind in enumerate(self.kinds):
            close = self._grow_columns if kind == "column" else self._close_row
            backs.append(close(f, kind, q, k, v, mask, new, marks, after, after_marks, r))

        def back(d_after: Held) -> Held:
            d_new = dict(d_after)
            d_new["q"] = xp.zeros_like(q)
            if not self.keeps_all:
                d_new |= {"k": xp.zeros_like(k), "v": xp.zeros_like(v)}
            for one in backs:
                one(d_after, d_new)
            return d_new

        return after, after_marks, back

    def _close_row(
        self, f: int, kind: str, q: Array, k: Array, v: Array, mask: Array | None,
        new: Held, marks: Marks, after: Held, after_marks: Marks, r: int,
    ) -> Callable[[Held, Held], None]:  # fmt: skip
        """Regions of one row join those that are there."""
        xp, w = self.xp, self.width
        local = {
            "span": Block(rows(1, 1), rows(1, w), ALL),
            "row": Block(rows(1, w), rows(1, w), ALL),
            "row_rest": Block(rows(1, w), rows(1, w), NOT),
            "left": Block(rows(1, w - 1), rows(1, w - 1, step=w), UPTO),
            "right": Block(rows(1, w - 1), rows(1, w - 1, step=w, first=1), FROM),
        }[kind]
        mixing = Mixing(local.queries.size, (w,), (local,))
        regions = self.regions(mixing, mask, k, has_rep=kind == "row")
        rho, kappa = summaries(regions, q, k)
        given = kappa is not None
        kappa, u = weighed(regions, rho, k, v, kappa)
        size = reference.sizes(mask, k, mixing=mixing, xp=xp)
        for name, x, axis in ((f"kappa{f}", kappa, -2), (f"u{f}", u, -2)):
            after[name] = append(new[name], x, xp, axis)
        after_marks[f"size{f}"] = append(marks[f"size{f}"], size, xp, -1)

        def back(d_after: Held, d_new: Held) -> None:
            n_old = new[f"u{f}"].shape[-2]
            d_kappa, d_u = (
                _arrays.unbroadcast(d_after[name][..., n_old:, :], tuple(x.shape), xp)
                for name, x in ((f"kappa{f}", kappa), (f"u{f}", u))
            )
            for name in (f"kappa{f}", f"u{f}"):
                d_new[name] = _arrays.unbroadcast(d_after[name][..., :n_old, :], tuple(new[name].shape), xp)
            d_rho, d_k, d_v = weighed_vjp(regions, d_u, d_kappa, rho, k, centred(v, mask, xp), given)
            if not makes_kappa(regions):
                d_k = d_k + regions.pool_vjp(d_kappa, k)
            d_new["q"] = d_new["q"] + regions.pool_vjp(d_rho, q)
            d_v = _arrays.unbroadcast(d_v, tuple(v.shape), xp)
            d_new["k"], d_new["v"] = plus_last(d_new["k"], d_k, xp), plus_last(d_new["v"], d_v, xp)

        return back

    def _grow_columns(
        self, f: int, kind: str, q: Array, k: Array, v: Array, mask: Array | None,
        new: Held, marks: Marks, after: Held, after_marks: Marks, r: int,
    ) -> Callable[[Held, Held], None]:  # fmt: skip
        """The row joins the regions of the columns."""
        xp, w = self.xp, self.width
        added = xp.ones((w,), dtype=k.dtype, device=_arrays.device(k)) if mask is None else xp.astype(mask, k.dtype)
        old = {"rho": new["rho"], "kappa": new[f"kappa{f}"], "size": marks[f"size{f}"]}
        if r == 0:
            old = {"rho": xp.zeros_like(q), "kappa": xp.zeros_like(k), "size": xp.zeros_like(added)}
        rho, rho_back = self.pooled_on(old["rho"], q, old["size"], added)
        kappa, kappa_back = self.pooled_on(old["kappa"], k, old["size"], added)
        all_k, all_v, visible = new["k"], new["v"], marks["visible"]
        local = Mixing(w, (w * (r + 1),), (Block(rows(w, 1), columns(w, r + 1, w), ALL),))
        regions = self.regions(local, visible, k)
        after |= {"rho": rho, f"kappa{f}": kappa, f"u{f}": regions.local(rho, all_k, all_v)}
        after_marks[f"size{f}"] = old["size"] + added

        def back(d_after: Held, d_new: Held) -> None:
            vc = centred(all_v, visible, xp)
            d_rho, d_k, d_v = regions.local_vjp(d_after[f"u{f}"], rho, all_k, vc)
            d_old_rho, d_q = rho_back(d_after["rho"] + d_rho)
            d_old_kappa, d_k_row = kappa_back(d_after[f"kappa{f}"])
            d_new["q"] = d_new["q"] + _arrays.unbroadcast(d_q, tuple(q.shape), xp)
            d_new["v"] = d_new["v"] + _arrays.unbroadcast(d_v, tuple(all_v.shape), xp)
            d_new["k"] = plus_last(d_new["k"] + d_k, _arrays.unbroadcast(d_k_row, tuple(k.shape), xp), xp)
            d_new[f"u{f}"] = xp.zeros_like(new[f"u{f}"])
            for name, d in (("rho", d_old_rho), (f"kappa{f}", d_old_kappa)):
                like = new[name]
                d_new[name] = _arrays.unbroadcast(d, tuple(like.shape), xp) if r else xp.zeros_like(like)

        return back

    def fault(self, n_earlier: int, n_later: int) -> str | None:
        if n_earlier % self.width == 0 or n_later == 0:
            return None
        return f"the earlier one must end with a row of {self.width} tokens, got {n_earlier} tokens"

    def merge(self, earlier: CombinerState, later: CombinerState) -> CombinerState:
        xp, w = self.xp, self.width
        (a, marks_a), (b, marks_b) = self.opened(earlier), self.opened(later)
        n_a, n_b = self.n_tokens(earlier), self.n_tokens(later)
        held = {name: append(a[name], b[name], xp, -2) for name in a if name != "rho"}
        held["rho"] = b["rho"] if n_a < w else a["rho"]
        marks = {name: append(x, marks_b[name], xp, -1) for name, x in marks_a.items() if name != "visible"}
        marks["visible"] = visible_so_far(marks_a["visible"], marks_b["visible"], a["k"], b["k"], xp)
        if "column" in self.kinds and n_a >= w and n_b >= w:
            f = self.kinds.index("column")
            sizes = marks_a[f"size{f}"], marks_b[f"size{f}"]
            held["rho"], _ = self.pooled_on(a["rho"], b["rho"], *sizes)
            held[f"kappa{f}"], _ = self.pooled_on(a[f"kappa{f}"], b[f"kappa{f}"], *sizes)
            marks[f"size{f}"] = sizes[0] + sizes[1]
            r = (n_a + n_b) // w
            local = Mixing(w, (w * r,), (Block(rows(w, 1), columns(w, r, w), ALL),))
            k, v = (held[name][..., : r * w, :] for name in ("k", "v"))
            visible = None if marks["visible"] is None else marks["visible"][..., : r * w]
            held[f"u{f}"] = self.regions(local, visible, k).local(held["rho"], k, v)
        return self.closed(held, marks, later)
