"""The one product that forward and backward are made of, with its options, on a device.

out[t] = sum_i turn_a[t, i] a[t] . S_i + sum over s in span(t) of w(t, s) (a[t] . b[s]) c[s]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays

from . import plan
from .plan import APPLY, AS_IS, NONE, PLAIN, SUMS, SWEEP, TOTAL


class Slot(NamedTuple):
    """An operand: an array, what is done to it while it is loaded, and its extra column."""

    array: Any
    map: int = 0
    scaled: int = AS_IS
    extra: int = NONE


@dataclass(frozen=True)
class Product:
    """A product's operands and options; states are (*lead, n, R, E1), or transposed."""

    lead: tuple[int, ...]
    dtype: str
    span: str
    a: Slot
    b: Slot
    c: Slot
    out: Any
    n_sums: int
    reverse: bool = False
    normalize: bool = False
    epilogue: int = PLAIN
    rule: tuple[int, float] = (0, 0.0)
    turns: tuple[Any, Any] | None = None
    mask: Any = None
    mask_keys: bool = False
    mask_rows: bool = False
    mean: Any = None
    den: Any = None
    scale: Any = None
    scaled_rows: bool = False
    extra: Any = None  # (tiles, *lead, tokens)
    other: Any = None
    out_map: int = 0
    start: tuple[Any, Any] | None = None  # sums and rest
    final: tuple[Any, Any] | None = None
    start_once: bool = False  # heads that share a state: the first alone starts from it
    transposed: bool = False
    tensor: bool = True  # whether operands may be rounded to 16 bits

    @property
    def sizes(self) -> plan.Sizes:
        rows, width = self.a.array.shape[-2:]
        keys, columns = self.c.array.shape[-2:]
        extra = self.a.extra != NONE
        return plan.Sizes(plan.heads_of(self.lead), rows, keys, width + extra, columns, self.n_sums, self.normalize)


def served(device: Any, q: Any, k: Any, v: Any, lead: tuple[int, ...], state: Any) -> bool:
    """Whether kernels serve a call both ways: not on old cards, not what is empty or has very many axes or features."""
    (N, D), (M, E), n_sums = q.shape[-2:], v.shape[-2:], state[0].shape[-3]
    if device.card.capability < plan.OLDEST or not (plan.fits(lead) and plan.heads_of(lead) and N and M and D and E):
        return False
    dtype = _arrays.dtype_name(q)
    wide = (plan.Sizes(1, N, M, width + 1, 1, n_sums, True) for width in (D, E))
    return all(plan.exact_kernel(dtype, sizes, device.card) for sizes in wide)


def params_of(product: Product, device: Any) -> np.ndarray:
    """All that does not depend on how the product is cut."""
    p = np.zeros((), plan.PARAMS)
    lead, reverse = product.lead, product.reverse and product.span == "past"

    def put(name, x, n_inner=2):
        if x is not None:
            plan.put_array(p[name], device.pointer(x), x, n_inner, lead, reverse)

    for name in ("a", "b", "c"):
        slot = getattr(product, name)
        put(name, slot.array)
        p[f"{name}_map"], p[f"{name}_scaled"] = slot.map, slot.scaled
    put("out", product.out)
    put("other", product.other)
    for name, x in zip(("turn_a", "turn_b"), product.turns or ()):
        put(name, x)
    for name in ("mask", "den", "scale"):
        put(name, getattr(product, name), 1)
    if product.mean is not None:
        plan.put_array(p["mean"], device.pointer(product.mean), product.mean, 2, lead, False)
    if product.extra is not None:
        put("extra", product.extra[0], 1)
        p["extra_tile"] = product.extra.strides[0] // product.extra.itemsize
        p["extra_tiles"] = product.extra.shape[0]
    for names, pair in ((("start", "rest"), product.start), (("final", "final_rest"), product.final)):
        for name, x in zip(names, pair or ()):
            if x is not None:
                plan.put_state(p[name], device.pointer(x), x, lead, product.transposed)
    sizes = product.sizes
    p["size"] = plan.lead_sizes(lead)
    p["rule"], p["eps"] = product.rule
    p["rows"], p["keys"], p["columns"], p["n_sums"] = sizes.rows, sizes.keys, sizes.columns, sizes.n_sums
    p["width"] = sizes.width - (product.a.extra != NONE)
    p["a_extra"], p["b_extra"] = product.a.extra, product.b.extra
    p["normalize"], p["epilogue"], p["out_map"] = product.normalize, product.epilogue, product.out_map
    p["mask_keys"] = product.mask_keys and product.mask is not None
    p["mask_rows"] = product.mask_rows and product.mask is not None
    p["start_once"], p["final_once"] = product.start_once, True
    p["scaled_rows"] = product.scaled_rows
    if product.out is not None:
        p["out_real"] = product.out.dtype.name != product.dtype
    return p


def kernel_of(product: Product, device: Any) -> plan.Kernel:
    """The tensor core's sweep where it serves, else the exact kernel."""
    sizes = product.sizes
    if product.tensor:
        arrays = [
            x for x in (product.a.array, product.b.array, product.c.array, product.out, product.other) if x is not None
        ]
        found = plan.sweep_kernel(product.dtype, sizes, product.a.extra != NONE, device.card)
        if found is not None and all(plan.aligned(x, device.pointer(x)) for x in arrays):
            return found
    found = plan.exact_kernel(product.dtype, sizes, device.card)
    if found is None:
        raise ValueError(f"no kernel for {sizes.width} features fits {device.card.shared} bytes of shared memory")
    return found


def tiles_of(product: Product, device: Any) -> int:
    """Tiles of columns."""
    return plan.grid(product.sizes, kernel_of(product, device).tile, 1)[1]


class Sums(NamedTuple):
    """States that a product has formed: before each segment of tokens, or of all; as the kernels see them."""

    memory: Any
    state: np.ndarray
    rest: np.ndarray
    n_segments: int
    length: int


def run(product: Product, device: Any, xp: Any, sums: Sums | None = None) -> Sums | None:
    """Launch it. The sums serve any product of the same b and c, the state's rows and columns exchanged."""
    made, sums = launches(product, device, xp, sums)
    for launch in made:
        device.run(launch)
    return sums


def launches(product: Product, device: Any, xp: Any, sums: Sums | None = None) -> tuple[list[plan.Launch], Sums | None]:
    """The launches of a product, in order, each with the memory it works in; `sums` are another's, exchanged."""
    sizes, card, kernel = product.sizes, device.card, kernel_of(product, device)
    blocks, tiles = plan.grid(sizes, kernel.tile, 1)
    base = replaced(params_of(product, device), tiles=tiles)
    none = np.zeros((), plan.STATE)
    past = product.span == "past"

    def launch(mode, n_segments, length, keeps=None, **changes):
        p = replaced(base, mode=mode, segments=n_segments, segment=length, **changes)
        instance, shared = kernel.modes[mode]
        return plan.Launch(instance, blocks * n_segments, shared, p, keeps)

    def parts(number, n_segments, length):
        """The sums of `number` segments, each by itself."""
        memory, work = segment_sums(product, sizes, n_segments, device, xp)
        own = {"start": none, "rest": none, "final": work, "final_rest": none, "final_once": 0}
        return launch(SUMS, number, length, memory, **own), memory, work

    made: list[plan.Launch] = []
    if sums is None:
        n_segments, length = plan.segments(blocks, sizes.rows if past else sizes.keys, kernel.chunk, card)
        if past and n_segments == 1:
            return [launch(SWEEP, 1, length)], None
        if past:  # what comes before each segment: the last one's own sums are not needed
            first, memory, work = parts(n_segments - 1, n_segments, length)
            scan = replaced(base, work=work, segments=n_segments)
            made = [first, plan.scan_launch(scan, sizes, product.dtype, SWEEP, card)]
            sums = Sums(memory, work, none, n_segments, length)
        else:
            memory, total = total_of(product, sizes, base, device, xp)
            if n_segments == 1:
                made = [launch(SUMS, 1, length, memory, **total)]
            else:
                first, _, work = parts(n_segments, n_segments, length)
                scan = replaced(base, work=work, segments=n_segments, **total)
                made = [first, plan.scan_launch(scan, sizes, product.dtype, TOTAL, card)]
            sums = Sums(memory, total["final"], total["final_rest"], 1, length)
    else:
        sums = sums._replace(state=exchanged(sums.state), rest=exchanged(sums.rest))
    start = {"start": sums.state, "rest": sums.rest, "start_once": 0}
    if past:
        return [*made, launch(SWEEP, sums.n_segments, sums.length, sums.memory, **start)], sums
    n_segments, length = plan.segments(blocks, sizes.rows, kernel.chunk, card)
    return [*made, launch(APPLY, n_segments, length, sums.memory, **start)], sums


def total_of(product: Product, sizes: plan.Sizes, base: np.ndarray, device: Any, xp: Any) -> tuple[Any, dict[str, Any]]:
    """Where the state after all keys goes: to the result, or, if none is asked for, to memory of its own."""
    if product.final is not None:
        return product.final, {name: replaced(base[name]) for name in ("final", "final_rest")}
    memory = empty(
        (*product.lead, sizes.n_sums, sizes.width, sizes.columns + sizes.normalize), real_of(product.dtype), xp
    )
    state = np.zeros((), plan.STATE)
    plan.put_state(state, device.pointer(memory), memory, product.lead, False)
    return memory, {"final": state, "final_rest": np.zeros((), plan.STATE)}


def exchanged(state: np.ndarray) -> np.ndarray:
    """The same state with rows and columns exchanged."""
    return replaced(state, row=state["column"], column=state["row"])


def segment_sums(product: Product, sizes: plan.Sizes, n_segments: int, device: Any, xp: Any) -> tuple[Any, np.ndarray]:
    """Memory for the segments' sums, and the same as the kernels see it."""
    work = empty(plan.work_shape(product.lead, sizes, n_segments), real_of(product.dtype), xp)
    record = np.zeros((), plan.STATE)
    plan.put_state(record, device.pointer(work), work, product.lead, False, segmented=True)
    return work, record


def empty(shape: tuple[int, ...], dtype: str, xp: Any) -> Any:
    """Fresh memory on the current device, which is that of the arrays."""
    return xp.empty(shape, dtype=getattr(xp, dtype))


def real_of(dtype: str) -> str:
    """The accumulation dtype."""
    return "float64" if dtype == "float64" else "float32"


def replaced(p: np.ndarray, **changes: Any) -> np.ndarray:
    """A copy with other values; of its bytes, for NumPy copies a struct field by field."""
    p = np.frombuffer(p, np.uint8).copy().view(p.dtype).reshape(())
    for name, x in changes.items():
        p[name] = x
    return p
