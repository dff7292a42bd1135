"""One interleaved run: rounds in rotating order, medians, and no time for a wrong answer."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from linattn.audit import quadratic

from .contenders import attends

__all__ = ["disagreement", "draw", "medians"]

HEAD = 256  # tokens of the first head that are compared with the definition
OUT_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-3  # far above rounding in float32, far below any other algorithm


def draw(heads: int, n_tokens: int, channels: int, n_arrays: int = 4) -> list[np.ndarray]:
    """The same numbers in every run."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(heads, n_tokens, channels)).astype("float32") for _ in range(n_arrays)]


def disagreement(
    out: Any, grads: list[np.ndarray], computes: str, n_tokens: int, args: list[np.ndarray], first: list[np.ndarray]
) -> str:
    """Nothing, or how far answers are off: out from the N x N formula in float64, gradients from the `first` ones'.

    Causal rows do not see what comes behind them, so the first HEAD tokens of one head are a problem of their own.
    Gradients of the first tokens have small denominators: they are compared as a whole. None may be given.
    """
    q, k, v = (x[0, :HEAD].astype("float64") for x in args)
    want = quadratic.formula_of(attends(n_tokens)[computes])(q, k, v, causal=True)
    error = float(np.max(np.abs(np.asarray(out)[0, :HEAD] - want)) / np.max(np.abs(v)))
    if not error <= OUT_LIMIT:
        return f"out is off by {error:.1e}"
    for name, got, ours in zip("qkv", grads, first, strict=False):
        error = float(np.linalg.norm(got - ours) / np.linalg.norm(ours))
        if not error <= GRADIENT_LIMIT:
            return f"d_{name} is off by {error:.1e}"
    return ""


def medians(
    jobs: dict[Any, Callable[[], Any]],
    seconds: float,
    *,
    clock: Callable[[], float],
    least: int = 3,
    most: int = 200,
    tick: Callable[[], Any] = lambda: None,
) -> dict[Any, float]:
    """The median time of each job over as many rounds as `seconds` allow; every round starts with another job."""
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    order, stop, rounds = list(jobs.items()), time.perf_counter() + seconds, 0
    gc.disable()
    try:
        while rounds < least or (rounds < most and time.perf_counter() < stop):
            at = rounds * 5 % len(order)
            for name, job in order[at:] + order[:at]:
                start = clock()
                job()
                times[name].append(clock() - start)
            rounds += 1
            tick()
    finally:
        gc.enable()
    return {name: statistics.median(some) for name, some in times.items()}
