"""Combiner: full attention, far keys through regions."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from linattn import _checks
from linattn._arrays import Array
from linattn.engines import combiner as engine
from linattn.engines.plans import PATTERNS, Plan
from linattn.mechanisms.attention import Attention, Call, room

SPANS, WIDTHS = ("fixed",), ("axial_vertical", "axial_horizontal", "axial_rowmajor", "mixture")
POOLS = ("max", "mean")
ROW_KEYS = ("self", "wsum")
MIXES = {"average": ("axial_vertical", "axial_horizontal"), "joint": ("joint",)}


@dataclass(frozen=True, repr=False)
class Combiner(Attention):
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
        own = isinstance(self.pattern, Plan)
        if not own:
            _checks.choice("pattern", self.pattern, PATTERNS)

    def plans(self, n: int, *, causal: bool = False) -> tuple[Plan, ...]:
        if isinstance(self.pattern, Plan):
            return (self.pattern,)
        names = MIXES[self.mix] if self.pattern == "mixture" else (self.pattern,)
        size = self.span or self.width
        return tuple(Plan.pattern(name, n, size=size, causal=causal) for name in names)

    def _options(self, q: Array, call: Call) -> engine.Options:
        scale = float(self.scale) if self.scale is not None else max(q.shape[-1], 1) ** -0.5
        return engine.Options(self.pool, self.size_bias, self.row_key, scale, call.key_mask)

    def _forward(self, q, k, v, arrays, call, out):
        plans, options = self.plans(q.shape[-2], causal=call.causal), self._options(q, call)
        where = room(call, q, "combiner")
        y = engine.forward(q, k, v, plans, options, room=where, out=out, xp=call.xp)
        return y, None, (q, k, v, plans, options, where)

    def _backward(self, d_out, d_arrays, saved, call, out):
        *args, where = saved
        return *engine.backward(d_out, *args, room=where, out=out, xp=call.xp), None

    def _weights(self, q, k, call):
        return engine.weights(q, k, self.plans(q.shape[-2], causal=call.causal), self._options(q, call), call.xp)
