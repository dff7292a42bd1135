"""Measure what the docs say: tables of errors and times, written to docs/measured.

    python scripts/measure_docs.py [TABLE ...]    measures the tables (default: all) and writes them
    python scripts/measure_docs.py --check        measures the errors again; exit 1 if one has more than doubled,
                                                  or a distance from softmax has moved

The yardsticks are the formulas of linattn/audit/quadratic.py and their complex-step derivatives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

for variable in ("OPENBLAS_NUM_THREADS", "LINATTN_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import ml_dtypes
import numpy as np

import linattn as la
from linattn._cli import info
from linattn.audit import measure, quadratic

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "measured"
DTYPES = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
ATTENDS = {
    "linear": [la.Linear("elu1"), la.Linear("relu")],
    "cosformer": [la.CosFormer(length=4096)],
    "softmax": [la.Softmax()],
    "performer": [la.Performer(16), la.Performer(16, features="hyperbolic", norms="sqrt")],
    "lln": [la.LLN(alpha=2.0, beta=2.0), la.LLNDiag(alpha=2.0, beta=2.0)],
    "combiner": [la.Combiner(span=16)],
}
EVERY = [attend for attends in ATTENDS.values() for attend in attends]
TIMED = [*(attend for attend in EVERY if not isinstance(attend, la.Performer)), la.Performer(256)]
BACKENDS = ("reference", "numba")
EXTENDED = np.finfo(np.longdouble).nmant >= 63  # wide enough to judge float64


# ------------------------------------------------------------------------------------------- yardsticks


def exact(attend: Any, args: list, d_out: Any, causal: bool) -> list[np.ndarray]:
    """out, d_q, d_k, d_v of one head by the formula and its complex step, in the precision of the arguments.

    Where the row of a query depends on no other query, one step moves all queries; keys are moved one at a time, and so
    are queries that regions pool; out is linear in v.
    """
    formula = quadratic.formula_of(attend)
    q, k, v = args
    h = q.dtype.type(1e-30)
    n_keys, dim = k.shape
    weights = formula.weights(q, k, causal=causal)
    d_q, d_k = np.zeros_like(q), np.zeros_like(k)
    one = np.eye(n_keys, dtype=q.dtype)
    pooled = isinstance(attend, la.Combiner)
    for r in range(dim):
        unit = np.zeros(dim, q.dtype)
        unit[r] = 1
        if not pooled:
            moved = formula(q + 1j * h * unit, k, v, causal=causal).imag / h
            d_q[:, r] = np.sum(d_out * moved, axis=-1)
        for some in np.array_split(np.arange(n_keys), -(-n_keys // 32)):
            step = 1j * h * one[some][..., None] * unit
            d_k[some, r] = np.sum(d_out * (formula(q, k + step, v, causal=causal).imag / h), axis=(-2, -1))
            if pooled:
                d_q[some, r] = np.sum(d_out * (formula(q + step, k, v, causal=causal).imag / h), axis=(-2, -1))
    return [weights @ v, d_q, d_k, weights.T @ d_out]


def ours(attend: Any, args: list, d_out: Any, causal: bool, backend: str) -> list[np.ndarray]:
    out, backward = attend.vjp(*args, causal=causal, backend=backend)
    return [out, *backward(d_out)]


def draw(seed: int, dtype: np.dtype, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def widened(arrays: list[np.ndarray], dtype: np.dtype) -> list[np.ndarray]:
    """The same numbers in the precision that judges `dtype`."""
    return [x.astype(np.longdouble if dtype == np.float64 and EXTENDED else np.float64) for x in arrays]


def called(causal: bool) -> str:
    return "causal" if causal else "all"


# ----------------------------------------------------------------------------------------------- tables
# Each gives a caption, the heads of the columns and the rows. Numbers below `LABELS` columns are measured.


N_TOKENS, DIM = 100, 16  # of the Gaussian inputs
SMALLER = {"performer": (52, 4), "lln": (52, 8), "combiner": (52, 8)}  # whose definition costs more a pair


def size_of(attend: Any) -> tuple[int, int]:
    """Tokens and channels."""
    return next((size for name, size in SMALLER.items() if attend in ATTENDS[name]), (N_TOKENS, DIM))


@cache
def judged(attend: Any, causal: bool, dtype_name: str) -> tuple[dict[str, list[float]], list[float]]:
    """Errors of out, d_q, d_k, d_v on each backend, and those of one rounding of the exact answers."""
    dtype = DTYPES[dtype_name]
    *args, d_out = draw(0, dtype, *[size_of(attend)] * 4)
    *wide, wide_d_out = widened([*args, d_out], dtype)
    want = exact(attend, wide, wide_d_out, causal)
    errors = {
        backend: [
            measure.relative_error(g, w) for g, w in zip(ours(attend, args, d_out, causal, backend), want, strict=True)
        ]
        for backend in BACKENDS
    }
    return errors, [measure.relative_error(w.astype(dtype), w) for w in want]


def errors_of(name: str) -> tuple[str, list[str], list[list[Any]]]:
    """Forward and gradients of a mechanism against its formula."""
    rows = [
        [repr(attend), called(causal), dtype_name, backend, *errors]
        for attend in ATTENDS[name]
        for causal in (False, True)
        for dtype_name in DTYPES
        for backend, errors in judged(attend, causal, dtype_name)[0].items()
    ]
    n_tokens, dim = SMALLER.get(name, (N_TOKENS, DIM))
    caption = (
        f"Relative error of the output and the gradients against the formula; Gaussian inputs, {n_tokens} tokens, "
        f"{dim} channels."
    )
    return caption, ["mechanism", "sees", "dtype", "backend", "out", "d_q", "d_k", "d_v"], rows


def errors() -> tuple[str, list[str], list[list[Any]]]:
    """The largest error of each mechanism, beside that of one rounding of the exact answer."""
    rows = []
    for attend in EVERY:
        for dtype_name in DTYPES:
            both = [judged(attend, causal, dtype_name) for causal in (False, True)]
            found = np.array([errors for by_backend, _ in both for errors in by_backend.values()])  # (..., 4)
            rounding = np.max([rounded for _, rounded in both])
            rows.append([repr(attend), dtype_name, *map(float, (np.max(found[:, 0]), np.max(found[:, 1:]), rounding))])
    fewer = min(SMALLER.values())[0]
    caption = (
        f"Largest relative error over both backends, causal and not; Gaussian inputs, {N_TOKENS} tokens, {fewer} for "
        "the mechanisms with logarithms."
    )
    return caption, ["mechanism", "dtype", "out", "d_q, d_k, d_v", "one rounding"], rows


def real() -> tuple[str, list[str], list[list[Any]]]:
    """float32 on queries, keys and values of a transformer."""
    from importlib.resources import files

    rows = []
    with (files("linattn") / "data" / "minilm_qkv.npz").open("rb") as file, np.load(file) as arrays:
        layers = sorted({name[1:] for name in arrays.files if name.startswith("q")})
        for layer in layers:
            args = [arrays[f"{x}{layer}"].astype("float32") for x in "qkv"]
            (d_out,) = draw(0, np.dtype("float32"), args[2].shape)
            for attend in EVERY:
                for causal in (False, True):
                    answer = measure.oracle(attend, *args, causal=causal)
                    got = ours(attend, args, d_out, causal, "numba")
                    wide = [x.astype("float64") for x in (*args, d_out)]
                    want = ours(attend, wide[:3], wide[3], causal, "reference")
                    grads = [measure.relative_error(g, w) for g, w in zip(got[1:], want[1:], strict=True)]
                    relative = measure.relative_error(got[0], answer.out)
                    weighted = measure.weighted_error(got[0], answer.out, answer.absolute)
                    rows.append([layer, repr(attend), called(causal), relative, weighted, *grads])
    caption = (
        "float32, backend numba, on the packaged queries, keys and values. The output is judged by the formula, the "
        "gradients by our own in float64."
    )
    return caption, ["layer", "mechanism", "sees", "out", "out, weighted", "d_q", "d_k", "d_v"], rows


def length() -> tuple[str, list[str], list[list[Any]]]:
    """float32 against the number of tokens."""
    rows = []
    dim = 32
    for attend in (la.Linear("elu1"), la.CosFormer(length=100_000)):
        for family in ("gaussian", "constant"):
            for n_tokens in (1_000, 10_000, 100_000):
                args = draw(0, np.dtype("float32"), *[(n_tokens, dim)] * 3)
                if family == "constant":
                    args = [args[0], *(np.tile(abs(x[:1]), (n_tokens, 1)) for x in args[1:])]
                answer = measure.oracle(attend, *args, causal=True)
                found = [
                    measure.weighted_error(attend(*args, causal=True, backend=backend), answer.out, answer.absolute)
                    for backend in BACKENDS
                ]
                rows.append([repr(attend), family, n_tokens, *found])
    caption = (
        f"Weighted error of the output in float32, causal, {dim} channels; constant: the same key and value at every "
        "token, the hardest case for a running sum."
    )
    return caption, ["mechanism", "keys and values", "tokens", *BACKENDS], rows


def growth() -> tuple[str, list[str], list[list[Any]]]:
    """float32 up to a million tokens, beside a running sum as one writes it first."""
    dim, late, lengths = 16, 16, (1_000, 10_000, 100_000, 1_000_000)
    attends = [la.Linear("elu1"), la.CosFormer(length=lengths[-1]), la.Performer(dim), la.LLN(alpha=1.0, beta=1.0)]
    rows: list[list[Any]] = []
    for family in ("random", "repeated"):
        args = draw(0, np.dtype("float32"), *[(lengths[-1], dim)] * 3)
        if family == "repeated":
            args = [args[0], *(np.broadcast_to(abs(x[:1]), x.shape) for x in args[1:])]
        for n_tokens in lengths:
            some = [x[:n_tokens] for x in args]
            last = slice(n_tokens - late, n_tokens)
            for attend in attends:
                answer = measure.oracle(attend, *some, causal=True, rows=last)
                got = attend(*some, causal=True, backend="numba")[last]
                error = measure.weighted_error(got, answer.out, answer.absolute)
                rows.append([repr(attend), family, n_tokens, error])
                if attend == la.Linear("elu1"):
                    plain = running_sums(*some)[last]
                    error = measure.weighted_error(plain, answer.out, answer.absolute)
                    rows.append(["plain running sum, elu + 1", family, n_tokens, error])
    caption = (
        f"Largest weighted error of the last {late} rows in float32, causal, {dim} channels, backend numba; repeated: "
        "the same key and value at every token. The plain running sum adds each token to a float32 state."
    )
    return caption, ["mechanism", "keys and values", "tokens", "error"], rows


def running_sums(q: np.ndarray, k: np.ndarray, v: np.ndarray, piece: int = 2000) -> np.ndarray:
    """Causal elu + 1: S <- S + phi_k[t] v1[t]^T token by token, all of it in the dtype of q."""
    phi_q, phi_k = (np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0))) for x in (q, k))
    v1 = np.concatenate([v, np.ones_like(v[:, :1])], axis=-1)
    state = np.zeros((1, k.shape[-1], v1.shape[-1]), q.dtype)
    out = np.empty_like(v)
    for a in range(0, len(q), piece):
        own = slice(a, a + piece)
        states = np.cumsum(np.concatenate([state, phi_k[own, :, None] * v1[own, None, :]]), axis=0, dtype=q.dtype)
        num_den = (phi_q[own, None, :] @ states[1:])[:, 0]
        out[own] = num_den[:, :-1] / num_den[:, -1:]
        state = states[-1:]
    return out


def closeness() -> tuple[str, list[str], list[list[Any]]]:
    """How close each mechanism's output is to softmax's on queries, keys and values of a transformer."""
    from importlib.resources import files

    with (files("linattn") / "data" / "minilm_qkv.npz").open("rb") as file, np.load(file) as arrays:
        layers = [[arrays[f"{x}{layer}"].astype("float64") for x in "qkv"] for layer in (0, 2, 5)]
    n_tokens = layers[0][0].shape[-2]
    made: dict[str, Callable[[Any, Any], Any]] = {
        "Linear('elu1')": lambda q, k: la.Linear("elu1"),
        "Linear('relu')": lambda q, k: la.Linear("relu"),
        f"CosFormer({n_tokens})": lambda q, k: la.CosFormer(n_tokens),
        "Performer(256)": lambda q, k: la.Performer(256),
        "Performer.accurate(q, k, n_features=256)": lambda q, k: la.Performer.accurate(q, k, n_features=256),
        "LLN(scope='head', calibration='exact')": lambda q, k: la.LLN(scope="head", calibration="exact").calibrate(
            q, k
        ),
        "LLNDiag(scope='head', calibration='exact')": lambda q, k: la.LLNDiag(
            scope="head", calibration="exact"
        ).calibrate(q, k),
        "Combiner('fixed', span=16)": lambda q, k: la.Combiner("fixed", span=16),
        "Combiner('fixed', span=16, pool='mean', size_bias=True)": lambda q, k: la.Combiner(
            "fixed", span=16, pool="mean", size_bias=True
        ),
        "Combiner('logsparse')": lambda q, k: la.Combiner("logsparse"),
    }
    rows: list[list[Any]] = []
    for name, make in made.items():
        for causal in (False, True):
            found = []
            for q, k, v in layers:
                exact = la.softmax_attention(q, k, v, causal=causal)
                mean = la.Softmax()(np.zeros_like(q), k, v, causal=causal)  # of the values that each row sees
                off = make(q, k)(q, k, v, causal=causal) - exact
                found.append(np.linalg.norm(off, axis=(-2, -1)) / np.linalg.norm(mean - exact, axis=(-2, -1)))
            each = np.array(found)
            medians_of_layers = [float(x) for x in np.median(each, axis=-1)]
            rows.append([name, called(causal), *medians_of_layers, float(np.min(each)), float(np.max(each))])
    caption = (
        "Distance of the output from softmax's, over the distance of the mean of the visible values from it: 0 is "
        "softmax, 1 is worth no more than that mean. The packaged queries, keys and values, medians over the four "
        "heads of a layer, and the best and the worst of all twelve heads."
    )
    heads = ["mechanism", "sees", "layer 0", "layer 2", "layer 5", "best head", "worst head"]
    return caption, heads, rows


def memory() -> tuple[str, list[str], list[list[Any]]]:
    """Bytes of a call beyond its results, and of the state of a stream."""
    dim = 64
    rows: list[list[Any]] = []
    lengths = (512, 2048, 8192)
    for attend in (
        la.Softmax(), la.Linear("elu1"), la.CosFormer(length=lengths[-1]), la.Performer(256),
        la.LLN(alpha=1.0, beta=1.0), la.Combiner("fixed", span=64),
    ):  # fmt: skip
        for n_tokens in lengths:
            *args, d_out = draw(0, np.dtype("float32"), *[(n_tokens, dim)] * 4)
            run = partial(ours, attend, args, d_out, True, "numba")
            run()  # compiles
            call = peak(run) - 4 * d_out.nbytes
            _, state = attend.step(*args, attend.init_state(*args[1:]))
            rows.append([repr(attend), n_tokens, call / 1024, sum(x.nbytes for x in leaves(state.arrays)) / 1024])
    caption = (
        "KiB that a causal forward and backward take at most beyond inputs and results, and KiB of a stream's state "
        f"after so many tokens; one head of {dim} channels, float32, backend numba."
    )
    return caption, ["mechanism", "tokens", "call", "state"], rows


def leaves(arrays: Any) -> list[Any]:
    """The arrays of a state, whose parts may be tuples or missing."""
    if arrays is None:
        return []
    return [leaf for part in arrays for leaf in leaves(part)] if isinstance(arrays, tuple) else [arrays]


def streaming() -> tuple[str, list[str], list[list[Any]]]:
    """Streams against the whole pass."""
    rows = []
    n_tokens = 300
    for attend in EVERY:
        for dtype_name in ("float64", "float32"):
            q, k, v = draw(0, DTYPES[dtype_name], *[(2, n_tokens, 16)] * 3)
            whole = attend(q, k, v, causal=True)
            found = [measure.relative_error(streamed(attend, q, k, v, cut), whole) for cut in cuts(n_tokens)]
            rows.append([repr(attend), dtype_name, *found])
    caption = f"Relative difference between a stream of {n_tokens} tokens and one pass."
    return caption, ["mechanism", "dtype", "token by token", "random pieces", "two halves"], rows


def cuts(n_tokens: int) -> list[list[int]]:
    inner = np.sort(np.random.default_rng(0).choice(np.arange(1, n_tokens), size=9, replace=False))
    return [list(range(n_tokens + 1)), [0, *inner.tolist(), n_tokens], [0, n_tokens // 2, n_tokens]]


def streamed(attend: Any, q: Any, k: Any, v: Any, edges: list[int]) -> np.ndarray:
    state, pieces = attend.init_state(k, v), []
    for a, b in pairwise(edges):
        piece, state = attend.step(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], state)
        pieces.append(piece)
    return np.concatenate(pieces, axis=-2)


def frame() -> tuple[str, list[str], list[list[Any]]]:
    """cosFormer's sums kept at the tokens' own angles, or turned with the present token."""
    rows = []
    for n_tokens in (512, 4096, 16384):
        q, k = (abs(x) for x in draw(0, np.dtype("float32"), *[(n_tokens, 16)] * 2))
        k[3:] = 0  # only the first keys are alive
        ones = np.ones((n_tokens, 1), "float32")
        attend = la.CosFormer(length=n_tokens, normalize=False)
        last = slice(n_tokens - 256, n_tokens - 128)  # late, and the weights are not yet zero
        want = quadratic.formula_of(attend)(q, k, ones, causal=True, rows=last)[:, 0]
        absolute = attend(q, k, ones, causal=True)[last, 0]
        rows.append(
            [n_tokens, measure.relative_error(turned(q, k)[last], want), measure.relative_error(absolute, want)]
        )
    caption = (
        "Relative error of late denominators in float32 with only the first three keys alive: a state that is turned "
        "by one angle at each token, and ours, in the absolute frame."
    )
    return caption, ["tokens", "turned state", "absolute frame"], rows


def turned(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """den[t] with S_c <- cos d S_c - sin d S_s + k[t], S_s <- sin d S_c + cos d S_s, in the dtype of q."""
    angle = np.pi / (2 * len(q))
    cos, sin = q.dtype.type(np.cos(angle)), q.dtype.type(np.sin(angle))
    near, far = np.zeros_like(k[0]), np.zeros_like(k[0])
    den = np.zeros(len(q), q.dtype)
    for t in range(len(q)):
        near, far = cos * near - sin * far + k[t], sin * near + cos * far
        den[t] = q[t] @ near
    return den


def centring() -> tuple[str, list[str], list[list[Any]]]:
    """Gradients when all values share an offset."""
    rows = []
    attend = la.Linear("elu1")
    for offset in (0, 100, 10_000):
        q, k, v, d_out = draw(0, np.dtype("float32"), *[(N_TOKENS, DIM)] * 4)
        v = v + np.float32(offset)
        *wide, wide_d_out = widened([q, k, v, d_out], v.dtype)
        want = exact(attend, wide, wide_d_out, True)
        plain = uncentred(q, k, v, d_out)
        got = ours(attend, [q, k, v], d_out, True, "numba")
        found = [measure.relative_error(x, w) for pair in (plain, got[1:3]) for x, w in zip(pair, want[1:3])]
        rows.append([offset, *found])
    caption = "Relative error of gradients in float32, causal elu + 1, when an offset is added to all values."
    heads = ["offset", "d_q, not centred", "d_k, not centred", "d_q, ours", "d_k, ours"]
    return caption, heads, rows


def uncentred(q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d_q, d_k of causal elu + 1 by G = [g / den, -(g . out) / den], in the dtype of q."""
    phi_q, phi_k = (np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0))) for x in (q, k))
    scores = np.tril(phi_q @ phi_k.T)
    den = scores.sum(axis=-1, keepdims=True)
    out = scores @ v / den
    d_scores = np.tril(d_out @ v.T - np.sum(d_out * out, axis=-1, keepdims=True)) / den
    slopes = (np.where(x > 0, 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    return tuple(d * slope for d, slope in zip((d_scores @ phi_k, d_scores.T @ phi_q), slopes, strict=True))


def eps() -> tuple[str, list[str], list[list[Any]]]:
    """What a small scale of q and k does to the output under each rule."""
    rows = []
    q, k, v = draw(0, np.dtype("float64"), *[(200, 32)] * 3)
    for rule in ("safe", ("clamp", 1e-6), ("add", 1e-6)):
        attend = la.Linear("relu", eps=rule)
        whole = attend(q, k, v, causal=True)
        found = [measure.relative_error(attend(q * s, k * s, v, causal=True), whole) for s in (1e-2, 1e-3, 1e-4)]
        rows.append([repr(attend), *found])
    caption = "Relative change of the output when q and k are multiplied by a number that should cancel."
    return caption, ["mechanism", "by 1e-2", "by 1e-3", "by 1e-4"], rows


def zero_rows() -> tuple[str, list[str], list[list[Any]]]:
    """First rows of a causal call that see nothing."""
    rows = []
    draws = 20_000
    for dim in (4, 8, 16, 32):
        q, k, v = draw(dim, np.dtype("float64"), *[(draws, 1, dim)] * 3)
        first = la.CosFormer(length=4096)(q, k, v, causal=True)
        rows.append([dim, float(np.mean(np.all(first == 0, axis=(-2, -1)))), 0.75**dim])
    caption = f"Share of {draws} Gaussian draws in which the first causal row is zero."
    return caption, ["channels", "measured", "(3/4) to the number of channels"], rows


def speed() -> tuple[str, list[str], list[list[Any]]]:
    """Time of the reference over that of the compiled kernels, and against exact softmax."""
    rows = []
    heads, dim = 4, 64
    for n_tokens in (512, 2048, 4096):
        *args, d_out = draw(0, np.dtype("float32"), *[(heads, n_tokens, dim)] * 4)
        runs: dict[tuple[str, str, bool], Callable[[], Any]] = {}
        for attend in TIMED:
            for backend in BACKENDS:
                runs[repr(attend), backend, False] = partial(attend, *args, causal=True, backend=backend)
                runs[repr(attend), backend, True] = partial(ours, attend, args, d_out, True, backend)
        times = medians(runs)
        exact_times = {both: times[repr(la.Softmax()), "numba", both] for both in (False, True)}
        for attend in TIMED:
            row: list[Any] = [repr(attend), n_tokens]
            for both in (False, True):
                best = times[repr(attend), "numba", both]
                row += [times[repr(attend), "reference", both] / best, exact_times[both] / best]
            rows.append(row)
    caption = (
        "How many times faster the compiled kernels are, in processor time: than the reference room, and than exact "
        f"softmax on the same backend. Causal, float32, {heads} heads, {dim} channels, one thread; forward, and with "
        "backward."
    )
    heads_of_columns = [
        "mechanism", "tokens", "forward: reference", "softmax", "with backward: reference", "softmax"
    ]  # fmt: skip
    return caption, heads_of_columns, rows


def combiner_cost() -> tuple[str, list[str], list[list[Any]]]:
    """Time and memory of Combiner's patterns beside exact softmax."""
    heads, n_tokens, dim = 8, 4096, 64
    *args, d_out = draw(0, np.dtype("float32"), *[(heads, n_tokens, dim)] * 4)
    inputs = sum(x.nbytes for x in args)
    names = "fixed", "logsparse", "axial_vertical", "axial_horizontal", "axial_rowmajor"
    attends = [la.Softmax(), *map(la.Combiner, names)]
    runs: dict[tuple[Any, bool], Callable[[], Any]] = {}
    for attend in attends:
        runs[attend, False] = partial(attend, *args, causal=True, backend="numba")
        runs[attend, True] = partial(ours, attend, args, d_out, True, "numba")
    times = medians(runs)
    exact_pairs = n_tokens * (n_tokens + 1) // 2
    rows = []
    for attend in attends[1:]:
        (plan,) = attend.plans(n_tokens, causal=True)
        faster = [times[attends[0], both] / times[attend, both] for both in (False, True)]
        extra = [
            (peak(runs[attend, both]) - results) / inputs
            for both, results in ((False, inputs / 3), (True, 4 * inputs / 3))
        ]
        rows.append([repr(attend), f"{sum(plan.pairs()) / exact_pairs:.3f}", *faster, *extra])
    caption = (
        f"Causal, float32, {n_tokens} tokens, {heads} heads, {dim} channels, backend numba, one thread. Pairs that a "
        "forward computes, over those of exact softmax; how many times faster it is; the most memory it takes beyond "
        "its results, over that of q, k and v."
    )
    columns = [
        "mechanism",
        "pairs",
        "forward: times faster",
        "with backward",
        "forward: memory",
        "with backward: memory",
    ]
    return caption, columns, rows


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that arrays hold during a call, its results among them."""
    tracemalloc.start()
    run()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def medians(runs: dict[Any, Callable[[], Any]], rounds: int = 5) -> dict[Any, float]:
    """The median processor time of each; every round runs each once, so that all share the machine's moods."""
    for run in runs.values():
        run()  # compiles
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.process_time()
            run()
            times[key].append(time.process_time() - start)
    return {key: float(np.median(spent)) for key, spent in times.items()}


# ------------------------------------------------------------------------------------- writing, checking

TABLES: dict[str, Callable[[], tuple[str, list[str], list[list[Any]]]]] = {
    **{name: (lambda name=name: errors_of(name)) for name in ATTENDS},
    "errors": errors,
    "real": real,
    "closeness": closeness,
    "length": length,
    "growth": growth,
    "memory": memory,
    "streaming": streaming,
    "frame": frame,
    "centring": centring,
    "eps": eps,
    "zero_rows": zero_rows,
    "speed": speed,
    "combiner_cost": combiner_cost,
}
UNCHECKED = "eps", "zero_rows", "speed", "combiner_cost", "growth"  # shares, times, and what takes a minute
ERROR_TABLES = [name for name in TABLES if name not in UNCHECKED]
GIVEN = {"tokens", "offset", "channels", "(3/4) to the number of channels", "layer"}  # columns that were put in
FORMATS = {"times": ".1f", "KiB": ".0f", "error": ".2g"}
NOISE = 2.0**-52  # below it an error of float64 is luck


def shown(value: Any, unit: str) -> str:
    if isinstance(value, float):
        return f"{value:{FORMATS[unit]}}"
    return f"``{value}``" if "(" in str(value) else str(value)


def page(name: str, table: dict[str, Any], host: str) -> str:
    """The table in reStructuredText."""
    unit = {"speed": "times", "memory": "KiB"}.get(name, "error")
    lines = [
        f".. Written by scripts/measure_docs.py {name}; not by hand.",
        "",
        ".. list-table:: " + table["caption"],
        "   :header-rows: 1",
        "",
    ]
    for row in [table["heads"], *table["rows"]]:
        lines += [f"   {'*' if i == 0 else ' '} - {shown(cell, unit)}" for i, cell in enumerate(row)]
    return "\n".join([*lines, "", f"*{host}*", ""])


def host() -> str:
    import array_api_compat
    import numba

    names = {"NumPy": np.__version__, "Numba": numba.__version__, "array-api-compat": array_api_compat.__version__}
    versions = ", ".join(f"{name} {version}" for name, version in names.items())
    machine = f"{platform.machine()}, {info.processor()}"
    return f"linattn {la.__version__}, {versions}, Python {platform.python_version()}, {machine}"


def grown(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Errors more than twice the committed ones."""
    faults = []
    for before, now in zip(old["rows"], new["rows"], strict=True):
        for head, a, b in zip(new["heads"], before, now, strict=True):
            if head not in GIVEN and isinstance(b, float) and not b <= 2 * a + NOISE:
                faults.append(
                    f"{' '.join(str(x) for x in now if not isinstance(x, float))}, {head}: {a:.2g} -> {b:.2g}"
                )
    return faults


def moved(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Numbers that are a property of the mechanism, not of rounding, and differ from the committed ones by 1 %."""
    return [
        f"{now[0]} {now[1]}, {head}: {a:.3g} -> {b:.3g}"
        for before, now in zip(old["rows"], new["rows"], strict=True)
        for head, a, b in zip(new["heads"], before, now, strict=True)
        if isinstance(b, float) and not abs(a - b) <= 0.01 * a
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if an error has grown")
    options = parser.parse_args()
    unknown = sorted(set(options.tables) - set(TABLES))
    if unknown:
        parser.error(f"no such table: {', '.join(unknown)}")
    file = FOLDER / "measured.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    faults = []
    for name in options.tables or (ERROR_TABLES if options.check else TABLES):
        start = time.perf_counter()
        table = dict(zip(("caption", "heads", "rows"), TABLES[name](), strict=True))
        if options.check:
            judge = moved if name == "closeness" else grown
            faults += [f"{name}: {fault}" for fault in judge(stored[name], table)]
        else:
            stored[name] = table
            (FOLDER / f"{name}.rst").write_text(page(name, table, host()), encoding="utf-8")
            file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    print("\n".join(faults), end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
