"""`python -m linattn compare`: every mechanism on the same queries, keys and values, beside exact softmax.

What is measured, for each mechanism:

- milliseconds of the forward and of the backward in float32: medians of interleaved rounds, compiled beforehand
- peak memory that one forward and backward take beyond q, k, v and d_out, results included
- |out - out_softmax| / |out_softmax| and the same for the weights, Euclidean norms
- the mean entropy of the rows of weights, in bits
- the relative error of the float32 output against the definition in float64, and of the float32 gradients against
  the reference backend in float64
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import linattn
from linattn import backends, instruments
from linattn._cli import Refused
from linattn._cli.inputs import Inputs
from linattn.audit import quadratic
from linattn.audit.measure import relative_error
from linattn.mechanisms.attention import Attention

Array = NDArray[Any]
Step = Callable[[str, int], None]  # what has begun, and how many steps it counts

SEED = 0
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "Linear": [{"feature_map": "elu1"}, {"feature_map": "relu"}],
    "Performer": [{}, {"features": "hyperbolic", "norms": "sqrt"}],
    "LLN": [{"scope": "head", "calibration": "exact"}],
    "LLNDiag": [{"scope": "head", "calibration": "exact"}],
}
"""Parameters of the rows of a mechanism, where they are not one row of the defaults."""

FITTED = {"LLN": "LLN, fitted", "LLNDiag": "LLNDiag, fitted", "Performer": "Performer.accurate"}
"""What a value is called that has constants of the data: LLN's scales, a calibrated Performer."""

ENGINES = {
    "Linear": ("linear",),
    "CosFormer": ("linear",),
    "Softmax": ("softmax",),
    "Combiner": ("combiner",),
    "Performer": ("loglinear",),
    "LLN": ("loglinear",),
    "LLNDiag": ("loglinear", "softmax"),
}

ROUNDS = 15  # of timing at most,
LEAST_ROUNDS = 3  # at least; in between, as many as fit into
SECONDS_OF_ROUNDS = 3.0
MOST_SECONDS = 20.0  # after which even fewer rounds must do
PAIRS = 2**25  # weights read off a mechanism in all; of longer inputs evenly spaced rows are read
PAIRS_AT_ONCE = 2**21
FEATURES_A_PAIR = 16  # of the definition of a pair's weight, that cost as much as another pair
STEPS_OF_A_ROW = 3  # warming up, gradients, memory


@dataclass
class Reading:
    """What weights look like beside softmax's."""

    output_distance: float
    weights_distance: float
    entropy: float  # bits
    forward_error: float


@dataclass(eq=False)  # a row is itself
class Row:
    """One mechanism's line in the table."""

    attend: Attention
    backend: str | None  # asked for
    room: str  # that runs it
    label: str = ""  # where its code is too long
    out: Array = field(default_factory=lambda: np.zeros(0))
    forward: list[float] = field(default_factory=list)  # seconds
    backward: list[float] = field(default_factory=list)
    peak: int = 0  # bytes
    gradient_error: float = 0.0
    reading: Reading = field(default_factory=lambda: Reading(*[float("nan")] * 4))

    @property
    def name(self) -> str:
        return self.label or repr(self.attend)

    @property
    def forward_ms(self) -> float:
        return 1e3 * median(self.forward)

    @property
    def backward_ms(self) -> float:
        return 1e3 * median(self.backward)


@dataclass
class Result:
    """The table."""

    inputs: Inputs
    causal: bool
    rows: list[Row]
    softmax: Row  # one of them
    uniform: Reading  # of weights that look at nothing: a scale for the distances
    rows_read: int  # of the N rows of weights
    notes: list[str]


# -- which mechanisms -----------------------------------------------------------------------------------------------


def registry() -> dict[str, type[Attention]]:
    """The mechanisms that the library offers, by name."""
    found = {name: getattr(linattn, name) for name in linattn.__all__}
    return {name: x for name, x in found.items() if isinstance(x, type) and issubclass(x, Attention)}


def values_of(name: str, n_tokens: int) -> list[Attention]:
    """The values that stand for a mechanism, with the length they need."""
    mechanism: Any = registry()[name]
    needed = {"length": n_tokens} if "length" in {x.name for x in fields(mechanism)} else {}
    return [mechanism(**needed, **parameters) for parameters in VARIANTS.get(name, [{}])]


def fitted(attend: Any, inputs: Inputs) -> tuple[Attention, str]:
    """The value with its constants from these inputs, and its name, where it has any; raises where there are none."""
    name = type(attend).__name__
    if name == "Combiner" and inputs.q.shape[-2] != inputs.k.shape[-2]:
        raise ValueError("it is for self-attention, which needs N == M.")
    if name not in FITTED or getattr(attend, "norms", "sqrt") != "sqrt":
        return attend, ""
    if name == "LLNDiag" and inputs.q.shape[-2] != inputs.k.shape[-2]:
        raise ValueError("it has blocks of positions, which needs N == M.")
    return attend.calibrate(inputs.q, inputs.k), FITTED[name]


def names_of(asked: list[str] | None) -> list[str]:
    """The mechanisms asked for, in any case of letters; by default all. Softmax comes first."""
    known = {name.lower(): name for name in registry()}
    for name in asked or []:
        if name.lower() not in known:
            raise Refused(f"`--mechanism` must be one of {', '.join(known.values())}, got {name!r}.")
    names = [known[name.lower()] for name in asked] if asked else list(known.values())
    return sorted(dict.fromkeys(names), key=lambda name: (name != "Softmax", name))


def room_of(attend: Attention, backend: str | None, like: Array) -> str:
    """Name of the backend that runs this mechanism; raises as the call itself would."""
    rooms = [backends.resolve(backend, like, engine) for engine in ENGINES[type(attend).__name__]]
    return rooms[0].__name__.split(".")[-2]


def lacks(attend: Attention, backend: str | None) -> bool:
    """Whether this backend takes NumPy arrays, but is without an engine that the mechanism needs."""
    if backend is None or backends.WANTS.get(backend) != "numpy":
        return False
    found = [backends.load(backend, engine) for engine in ENGINES[type(attend).__name__]]
    return any(isinstance(x, str) and x.startswith("no ") for x in found)


def choose(asked: list[str] | None, backend: str | None, inputs: Inputs) -> tuple[list[Row], Row, list[str]]:
    """The rows, softmax's row, and notes on what runs elsewhere or not at all."""
    rows: list[Row] = []
    notes: list[str] = []
    for name in names_of(asked):
        for attend in values_of(name, max(inputs.q.shape[-2], inputs.k.shape[-2])):
            try:
                room = room_of(attend, backend, inputs.q)
            except (ImportError, TypeError, ValueError) as error:
                if asked or not lacks(attend, backend):
                    raise Refused(str(error)) from None
                if name != "Softmax":
                    notes.append(f"{attend!r} is left out: {backend} has no {' or '.join(ENGINES[name])} engine.")
                continue
            try:
                value, label = fitted(attend, inputs)
            except ValueError as error:
                if asked:
                    raise Refused(str(error)) from None
                notes.append(f"{attend!r} is left out: {error}")
                continue
            rows.append(Row(value, backend, room, label))
    if not rows:
        raise Refused(f"`--backend` must have an engine for one of the mechanisms, got {backend!r}, which has none.")
    softmax = next((row for row in rows if isinstance(row.attend, linattn.Softmax)), None)
    if softmax is None:
        softmax = Row(linattn.Softmax(), None, room_of(linattn.Softmax(), None, inputs.q))
        rows.insert(0, softmax)
    check_kernels(rows)
    return rows, softmax, notes + fallbacks(rows)


def check_kernels(rows: list[Row]) -> None:
    """Refuses a setting that the first compiled call would trip over."""
    if any(row.room == "numba" for row in rows):
        from linattn.backends import numba

        kind, _, sentence = numba.describe()["cache"].partition(": ")
        if kind == "unusable":
            raise Refused(sentence)


def fallbacks(rows: list[Row]) -> list[str]:
    """Why the reference backend runs what nobody asked it to run."""
    usual = backends.ROOM_OF["numpy"]
    mechanisms = [type(row.attend).__name__ for row in rows if row.backend is None]
    engines = dict.fromkeys(engine for name in mechanisms for engine in ENGINES[name])
    found = {engine: backends.load(usual, engine) for engine in engines}
    return [f"reference runs the {x} engine instead of {usual} ({y})" for x, y in found.items() if isinstance(y, str)]


# -- measuring ------------------------------------------------------------------------------------------------------


def count_steps(rows: list[Row], inputs: Inputs) -> int:
    """How many steps `compare` will count."""
    _, blocks = blocks_of(inputs, rows)
    return len(rows) * (STEPS_OF_A_ROW + ROUNDS) + len(blocks)


def compare(rows: list[Row], softmax: Row, inputs: Inputs, causal: bool, notes: list[str], step: Step) -> Result:
    """Fill in the rows."""
    d_out = np.random.default_rng(SEED).normal(size=(*inputs.lead, inputs.q.shape[-2], inputs.v.shape[-1]))
    d_out = d_out.astype(np.float32)
    for row in rows:
        step(f"{row.name}: first call", 1)
        row.out, grads = train(row, inputs, causal, d_out)
        step(f"{row.name}: gradients in float64", 1)
        row.gradient_error = gradient_error(row, inputs, causal, d_out, grads)
        step(f"{row.name}: memory", 1)
        row.peak = peak_memory(row, inputs, causal, d_out)
    take_times(rows, inputs, causal, d_out, step)
    uniform, n_read = read_weights(rows, softmax, inputs, causal, step)
    return Result(inputs, causal, rows, softmax, uniform, n_read, notes)


def train(row: Row, inputs: Inputs, causal: bool, d_out: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """One forward and one backward."""
    out, backward = row.attend.vjp(inputs.q, inputs.k, inputs.v, causal=causal, backend=row.backend)
    return out, backward(d_out)


def gradient_error(row: Row, inputs: Inputs, causal: bool, d_out: Array, grads: tuple[Array, Array, Array]) -> float:
    """The largest of the relative errors of d_q, d_k and d_v."""
    q, k, v = (x.astype(np.float64) for x in inputs[:3])
    _, backward = row.attend.vjp(q, k, v, causal=causal, backend="reference")
    want = backward(d_out.astype(np.float64))
    return max(relative_error(got, exact) for got, exact in zip(grads, want, strict=True))


def peak_memory(row: Row, inputs: Inputs, causal: bool, d_out: Array) -> int:
    """Bytes that one forward and backward hold at most beyond what was there before."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        train(row, inputs, causal, d_out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before


def take_times(rows: list[Row], inputs: Inputs, causal: bool, d_out: Array, step: Step) -> None:
    """Rounds over all mechanisms in turn, so that a busy machine slows all alike."""
    began = time.perf_counter()
    for n in range(ROUNDS):
        for row in rows:
            step(f"{row.name}: round {n + 1}", 1)
            start = time.perf_counter()
            _, backward = row.attend.vjp(inputs.q, inputs.k, inputs.v, causal=causal, backend=row.backend)
            middle = time.perf_counter()
            backward(d_out)
            end = time.perf_counter()
            row.forward.append(middle - start)
            row.backward.append(end - middle)
        elapsed = time.perf_counter() - began
        if elapsed > MOST_SECONDS or (n + 1 >= LEAST_ROUNDS and elapsed > SECONDS_OF_ROUNDS):
            step("rounds", (ROUNDS - n - 1) * len(rows))
            return


# -- reading weights ------------------------------------------------------------------------------------------------


def blocks_of(inputs: Inputs, rows: list[Row]) -> tuple[int, list[NDArray[np.int_]]]:
    """How many rows of weights are read, and their indices in blocks that fit into memory."""
    n_queries, n_keys = inputs.q.shape[-2], inputs.k.shape[-2]
    features = max((getattr(row.attend, "n_features", 1) for row in rows), default=1)  # exponentials a pair
    pairs_of_a_row = max(1, int(np.prod(inputs.lead))) * n_keys * max(1, features // FEATURES_A_PAIR)
    n_read = min(n_queries, max(1, PAIRS // pairs_of_a_row))
    t = np.unique(np.linspace(0, n_queries - 1, n_read).round().astype(int))
    at_once = max(1, PAIRS_AT_ONCE // pairs_of_a_row)
    return t.size, [t[first : first + at_once] for first in range(0, t.size, at_once)]


@dataclass
class Sums:
    """Sums over blocks of rows: of squares, and of entropies."""

    weights: float = 0.0  # |A|^2
    weights_apart: float = 0.0  # |A - A_softmax|^2
    outputs: float = 0.0  # |A v|^2
    outputs_apart: float = 0.0  # |A v - A_softmax v|^2
    error: float = 0.0  # |out - A v|^2, out in float32
    entropies: float = 0.0
    live: int = 0

    def add(self, a: Array, out: Array, a_softmax: Array, out_softmax: Array, measured: Array) -> None:
        self.weights += squares(a)
        self.weights_apart += squares(a - a_softmax)
        self.outputs += squares(out)
        self.outputs_apart += squares(out - out_softmax)
        self.error += squares(measured - out)
        entropies = instruments.entropy(a, per_row=True)
        self.entropies += float(np.nansum(entropies))
        self.live += int(np.sum(np.isfinite(entropies)))

    def reading(self, softmax: Sums) -> Reading:
        return Reading(
            output_distance=root_of_ratio(self.outputs_apart, softmax.outputs),
            weights_distance=root_of_ratio(self.weights_apart, softmax.weights),
            entropy=self.entropies / self.live if self.live else float("nan"),
            forward_error=root_of_ratio(self.error, self.outputs),
        )


def squares(x: Array) -> float:
    return float(np.sum(x * x))


def root_of_ratio(x: float, y: float) -> float:
    if y == 0:
        return 0.0 if x == 0 else float("inf")
    return float((x / y) ** 0.5)


def read_weights(rows: list[Row], softmax: Row, inputs: Inputs, causal: bool, step: Step) -> tuple[Reading, int]:
    """Fill in the readings from the definitions in float64, a block of rows at a time; gives that of uniform weights.

    Softmax of q = 0 is uniform over what is visible.
    """
    q, k, v = (x.astype(np.float64) for x in inputs[:3])
    formulas = [quadratic.formula_of(row.attend) for row in rows]
    yardstick = quadratic.formula_of(softmax.attend)
    sums, uniform = [Sums() for _ in rows], Sums()
    n_read, blocks = blocks_of(inputs, rows)
    for t in blocks:
        step(f"weights of rows {t[0]} to {t[-1]}", 1)
        a_softmax = yardstick.weights(q, k, causal=causal, rows=t)
        out_softmax = a_softmax @ v
        for row, formula, total in zip(rows, formulas, sums, strict=True):
            a = formula.weights(q, k, causal=causal, rows=t)
            total.add(a, a @ v, a_softmax, out_softmax, row.out[..., t, :])
        a = yardstick.weights(np.zeros_like(q), k, causal=causal, rows=t)
        uniform.add(a, a @ v, a_softmax, out_softmax, a @ v)
    reference = sums[rows.index(softmax)]
    for row, total in zip(rows, sums, strict=True):
        row.reading = total.reading(reference)
    return uniform.reading(reference), n_read
