"""Rigorous enclosures of small cases: the papers' formulas in ball arithmetic, and their derivatives.

Every number is an interval of 200 bits (python-flint's `arb`), inputs are taken as the exact numbers that they are, and
what comes out contains the mathematical result, whatever was rounded on the way. Derivatives are coefficients of power
series: the rule of a mechanism is evaluated on x + h and the coefficient of h is read off. Nothing is derived by hand.

    enclose(attend, q, k, v, causal=True, d_out=g)      balls of out, |A| |v|, d_q, d_k, d_v
    distance(got, balls)                                upper bounds of |got - truth|, as floats

A rule gives one row of weights, `rule(x, keys, at, **parameters)`: x the query, keys those that it sees, `at` their
places. It uses +, -, *, /, exp and comparisons alone, so that it runs on balls and on series of balls alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from operator import mul
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from linattn.audit import quadratic
from linattn.audit.combiner import plans_of
from linattn.audit.lln import PAPER

__all__ = ["BITS", "RULES", "Enclosure", "Places", "distance", "enclose", "midpoints", "missing"]

BITS = 200
Balls = NDArray[Any]  # of dtype object: each entry an arb
Row = list[Any]


def missing() -> str | None:
    """Why there are no balls here; None if there are."""
    return None if find_spec("flint") else "python-flint is not installed"


@cache
def library() -> Any:
    """python-flint, imported when balls are first asked for."""
    return import_module("flint")


@contextmanager
def precision() -> Iterator[Any]:
    """Inside, python-flint works with `BITS` bits and series a + b h. Gives the module."""
    flint = library()
    bits, terms = flint.ctx.prec, flint.ctx.cap
    flint.ctx.prec, flint.ctx.cap = BITS, 2
    try:
        yield flint
    finally:
        flint.ctx.prec, flint.ctx.cap = bits, terms
        _known.clear()


_known: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # kept for one enclosure, in which parameters do not change


def once(make: Callable[..., Any], *rows: Row) -> Any:
    """`make(*rows)`, made once for rows that are the same lists: a derivative moves one of many."""
    at = (make.__code__, *map(id, rows))
    if at not in _known:
        _known[at] = make(*rows), rows  # the rows, lest their ids come again
    return _known[at][0]


# --------------------------------------------------------------------------------------------------- rules


class Places(NamedTuple):
    """Where a row's pairs stand: the query's token, the visible keys' tokens, and the number of tokens of each."""

    t: int
    s: list[int]
    n_queries: int
    n_keys: int


def real(x: Any) -> Any:
    """The ball itself, or that of a series' constant."""
    return x if hasattr(x, "is_exact") else x[0]


def zero(x: Any) -> Any:
    return x * 0  # exactly, whatever the radius of x


FEATURE_MAPS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda x: x,
    "relu": lambda x: x if real(x) > 0 else zero(x),
    "elu1": lambda x: 1 + x if real(x) > 0 else x.exp(),
    "exp": lambda x: x.exp(),
}


def dot(x: Row, y: Row) -> Any:
    return sum(map(mul, x, y), start=arb(0))


def arb(x: Any) -> Any:
    """The ball of exactly x: an integer, a float, a fraction, or a ball."""
    flint = library()
    if type(x) is Fraction:
        return flint.arb(flint.fmpq(x.numerator, x.denominator))
    return flint.arb(x)


def over_divisor(row: Row, eps: Any) -> Row:
    """A row of similarities over c; see `quadratic.divisor`."""
    den = sum(row, start=arb(0))
    if eps == "safe":
        return [zero(a) for a in row] if real(den).is_zero() else [a / den for a in row]
    rule, x = eps
    if rule == "add":
        return [a / (den + x) for a in row]
    c = arb(x) if real(den) < x else den
    return [a / c for a in row]


def linear(
    x: Row, keys: list[Row], at: Places, *, feature_map: str = "elu1", normalize: bool = True, eps: Any = "safe"
) -> Row:
    """A[t, s] = phi(q_t) . phi(k_s) / c_t"""
    phi = FEATURE_MAPS[feature_map]
    phi_x = [phi(a) for a in x]
    row = [dot(phi_x, [phi(a) for a in y]) for y in keys]
    return over_divisor(row, eps) if normalize else row


def cosformer(
    x: Row,
    keys: list[Row],
    at: Places,
    *,
    length: int | None = None,
    feature_map: str = "relu",
    normalize: bool = True,
    eps: Any = "safe",
    align: str = "start",
) -> Row:
    """A[t, s] = (phi(q_t) . phi(k_s)) cos(pi (t - s) / (2 length)) / c_t"""
    flint = library()
    row = []
    for a, s in zip(linear(x, keys, at, feature_map=feature_map, normalize=False), at.s, strict=True):
        if align == "stretch":
            turn = Fraction(at.t + 1, 2 * at.n_queries) - Fraction(s + 1, 2 * at.n_keys)
        else:
            turn = Fraction(at.t - s, 2 * (length or max(at.n_queries, at.n_keys)))
        row.append(a * flint.arb.cos_pi_fmpq(flint.fmpq(turn.numerator, turn.denominator)))
    return over_divisor(row, eps) if normalize else row


def softmax(x: Row, keys: list[Row], at: Places, *, scale: float | None = None) -> Row:
    """A[t, s] = exp(scale q_t . k_s) / sum_s exp(scale q_t . k_s),   scale = D^(-1/2)"""
    factor = arb(scale) if scale is not None else arb(max(len(x), 1)).rsqrt()
    return normalised([factor * dot(x, y) for y in keys])


def by_logs(x: Row, y: Row) -> Any:
    """sum_r exp(lq_r + lk_r): exponents of balls have no limit"""
    return sum(((a + b).exp() for a, b in zip(x, y, strict=True)), start=arb(0))


def performer(
    x: Row, keys: list[Row], at: Places, *, projection: Callable[[int], Any], features: str = "positive",
    scale: float | None = None, eps: float | None = None, calibration: Any = None, **_: Any,
) -> Row:  # fmt: skip
    """A[t, s] = sum_r exp(w_r . x' + w_r . y'_s - |y'_s|^2 / 2) / c_t, or other features in place of exponentials.

    x' = A x,  y' = A^-1 (y - c), of diagonal A; x and y with the root of the scale.
    """
    if features not in ("positive", "hyperbolic", "relu", "trig"):
        raise ValueError(f"There is no rule for features={features!r}.")
    n = len(x)
    root = arb(scale).sqrt() if scale is not None else arb(max(n, 1)).rsqrt().sqrt()
    w = [[arb(float(a)) for a in row] for row in projection(n)]
    w = [*w, *([-a for a in row] for row in w)] if features == "hyperbolic" else w
    stretch, shift = diagonal(calibration, n)

    def side(y: Row, is_key: bool) -> tuple[Row, Any]:
        """W y' and |y'|^2 / 2."""
        if is_key:
            y = [(root * a - c) / f for a, c, f in zip(y, shift, stretch, strict=True)]
        else:
            y = [root * a * f for a, f in zip(y, stretch, strict=True)]
        return [dot(row, y) for row in w], dot(y, y) / 2

    def of_query(y: Row) -> Row:
        u, _ = side(y, False)
        if features == "trig":
            return [*(a.cos() for a in u), *(a.sin() for a in u)]
        return [FEATURE_MAPS["relu"](a) + added for a in u] if features == "relu" else u

    def of_key(y: Row) -> Row:
        u, half = side(y, True)
        if features == "trig":
            return [half.exp() * b for b in (*(a.cos() for a in u), *(a.sin() for a in u))]
        return [FEATURE_MAPS["relu"](a) + added for a in u] if features == "relu" else [a - half for a in u]

    def similarity(x: Row, y: Row) -> Any:
        of = dot if features in ("relu", "trig") else by_logs
        return of(once(of_query, x), once(of_key, y))

    added = arb(1e-3 if eps is None else eps)
    return over_divisor([once(similarity, x, y) for y in keys], "safe")


def diagonal(calibration: Any, n: int) -> tuple[Row, Row]:
    """A and c of a calibration; 1 and 0 without one."""
    a, c = (*(calibration or ()), None, None)[:2]
    if a is not None and np.count_nonzero(a) > n:
        raise ValueError("There is no rule for a calibration that mixes channels.")
    stretch = np.ones(n) if a is None else np.diagonal(a)
    shift = np.zeros(n) if c is None else np.asarray(c)
    return [arb(float(x)) for x in stretch], [arb(float(x)) for x in shift]


def lln(x: Row, keys: list[Row], at: Places, *, alpha: Any, beta: Any, **_: Any) -> Row:
    """A[t, s] = sum_r exp(alpha x_r + beta y_r) / c_t, with alpha and beta given or matched"""

    def similarity(x: Row, y: Row) -> Any:
        return by_logs([arb(alpha) * a for a in x], [arb(beta) * a for a in y])

    return over_divisor([once(similarity, x, y) for y in keys], "safe")


def matched(q: list[Row], k: list[Row], mask: NDArray[np.bool_], calibration: Any) -> dict[str, Any]:
    """alpha and beta of one head: constants, whatever moves."""
    if calibration != "paper":
        raise ValueError(f"There is no rule for calibration={calibration!r}.")
    seen = [y for y, is_seen in zip(k, mask, strict=True) if is_seen]
    of_q, of_k = (
        variance([x for x, is_seen in zip(q, mask, strict=True) if is_seen] if len(q) == len(k) else q),
        variance(seen),
    )
    a, b = (arb(x) for x in PAPER)
    half = (of_q * of_k - b) / a / 2
    return {"alpha": (half / of_q).sqrt(), "beta": (half / of_k).sqrt()}


def variance(rows: list[Row]) -> Any:
    """Of all numbers, their count less 1."""
    numbers = [a for row in rows for a in row]
    mean = sum(numbers, start=arb(0)) / len(numbers)
    return sum(((a - mean) ** 2 for a in numbers), start=arb(0)) / (len(numbers) - 1)


def lln_diag(
    x: Row, keys: list[Row], at: Places, *, block: int | None = None, ratio: float = 0.5, **parameters: Any
) -> Row:
    """ratio LLN + (1 - ratio) softmax inside the block of t, or LLN alone where that sees nothing"""
    size = max(len(x), 1) if block is None else block
    near = [s // size == at.t // size for s in at.s]
    far = lln(x, keys, at, **parameters)
    if not any(near):
        return far
    exact = iter(softmax(x, [y for y, is_near in zip(keys, near, strict=True) if is_near], at))
    share = arb(ratio)
    return [share * a + ((1 - share) * next(exact) if is_near else 0) for a, is_near in zip(far, near, strict=True)]


RULES: dict[str, Callable[..., Row]] = {
    "Linear": linear,
    "CosFormer": cosformer,
    "Softmax": softmax,
    "Performer": performer,
    "LLN": lln,
    "LLNDiag": lln_diag,
}


def combiner(
    queries: list[Row], keys: list[Row], seen: NDArray[np.bool_], causal: bool, *, pattern: Any = "fixed",
    span: int | None = None, width: int | None = None, pool: str = "max", size_bias: bool = False,
    mix: str = "average", scale: float | None = None, **_: Any,
) -> list[Row]:  # fmt: skip
    """All rows of A = P_direct + P_regions Pi: a region's query and key are maxima, so rows depend on other queries."""
    if pool != "max" or size_bias or pattern == "axial_rowmajor":
        raise ValueError(f"There is no rule for pool={pool!r}, size_bias={size_bias!r} and pattern={pattern!r}.")
    n = len(queries)
    factor = arb(scale) if scale is not None else arb(max(len(queries[0]) if n else 1, 1)).rsqrt()
    plans = plans_of(pattern, n, span or width, causal, mix)
    total: list[Row] = [[arb(0)] * n for _ in range(n)]
    for plan in plans:
        members = [np.flatnonzero(row & seen).tolist() for row in plan.members]
        regions = {}
        for r, own in enumerate(members):
            if own:
                rho, kappa = ([max((x[s][d] for s in own), key=lambda a: float(real(a).mid()))
                               for d in range(len(x[0]))] for x in (queries, keys))  # fmt: skip
                regions[r] = kappa, normalised([factor * dot(rho, keys[s]) for s in own])
        for t in range(n):
            near = np.flatnonzero(plan.direct[t] & seen).tolist()
            far = [r for r in np.flatnonzero(plan.users[t]).tolist() if r in regions]
            others = [*(keys[s] for s in near), *(regions[r][0] for r in far)]
            row = normalised([factor * dot(queries[t], y) for y in others])
            for s, a in zip(near, row, strict=False):
                total[t][s] += a / len(plans)
            for r, a in zip(far, row[len(near) :], strict=True):
                for s, b in zip(members[r], regions[r][1], strict=True):
                    total[t][s] += a * b / len(plans)
    return total


def normalised(scores: Row) -> Row:
    """softmax of one row"""
    if not scores:
        return []
    top = max(float(real(a).mid()) for a in scores)  # any number: it cancels
    return over_divisor([(a - top).exp() for a in scores], "safe")


WHOLE: dict[str, Callable[..., list[Row]]] = {"Combiner": combiner}  # rules that give all rows of weights at once


# --------------------------------------------------------------------------------------------- enclosures


class Enclosure(NamedTuple):
    """Balls that contain the truth; the cotangents are None unless `d_out` was given."""

    out: Balls  # (n, E)
    absolute: Balls  # (n, E), |A| |v|
    d_q: Balls | None
    d_k: Balls | None
    d_v: Balls | None


def enclose(
    attend: Any,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = False,
    key_mask: ArrayLike | None = None,
    d_out: ArrayLike | None = None,
    rows: list[int] | None = None,
) -> Enclosure:
    """Enclosures of a mechanism's result and cotangents.

    Parameters
    ----------
    attend : mechanism
        Its parameters are read off it.
    q, k, v : array_like
        (N, D), (M, D), (M, E), finite, any floating dtype: exactly these numbers.
    causal, key_mask
        As in the mechanism's call; `key_mask` is (M,).
    d_out : array_like, optional
        (N, E): with it d_q, d_k, d_v are enclosed too.
    rows : list of int, optional
        These queries alone; d_k and d_v are then the sums over them, and d_q has a row for each.

    Notes
    -----
    About a microsecond for each pair, channel and direction: 0.1 s for the cotangents of 12 tokens, 6 s for one row
    of out at 100 000 keys.
    """
    q, k, v = (np.asarray(x, dtype=float) for x in (q, k, v))
    n_queries, n_keys = len(q), len(k)
    parameters = quadratic.formula_of(attend).parameters
    mask = np.ones(n_keys, bool) if key_mask is None else np.asarray(key_mask)
    if type(attend).__name__ in WHOLE:
        return enclose_whole(attend, q, k, v, mask, causal, d_out, rows)
    rule = RULES[type(attend).__name__]
    rows = list(range(n_queries)) if rows is None else rows
    with precision() as flint:
        queries, keys, values = (balls(x).tolist() for x in (q, k, v))
        if parameters.get("alpha", 0) is None:
            parameters |= matched(queries, keys, mask, parameters["calibration"])
        cotangents = None if d_out is None else balls(np.asarray(d_out, dtype=float)).tolist()
        out, absolute, d_q = balls(np.zeros((3, len(rows), v.shape[1]))) if d_out is None else (
            *balls(np.zeros((2, len(rows), v.shape[1]))), balls(np.zeros((len(rows), q.shape[1])))
        )  # fmt: skip
        d_k, d_v = balls(np.zeros(k.shape)), balls(np.zeros(v.shape))
        for i, t in enumerate(rows):
            seen = [s for s in range(n_keys) if mask[s] and (s <= t or not causal)]
            at = Places(t, seen, n_queries, n_keys)
            those = [keys[s] for s in seen]
            weights = rule(queries[t], those, at, **parameters)
            for x in range(v.shape[1]):
                out[i, x] = dot(weights, [values[s][x] for s in seen])
                absolute[i, x] = dot([abs(a) for a in weights], [abs(values[s][x]) for s in seen])
            if cotangents is None:
                continue
            g = cotangents[t]
            paired = [dot(g, values[s]) for s in seen]  # what a weight is worth: g . v_s

            def slope(x: Row, those: list[Row], at: Places = at, paired: Row = paired) -> Any:
                """The coefficient of h in g_t . out_t."""
                loss = dot(rule(x, those, at, **parameters), paired)
                return loss[1] if hasattr(loss, "length") else flint.arb(0)

            for d in range(q.shape[1]):
                d_q[i, d] = slope(moved(queries[t], d, flint), those)
            for j, s in enumerate(seen):
                for d in range(q.shape[1]):
                    d_k[s, d] += slope(queries[t], [*those[:j], moved(those[j], d, flint), *those[j + 1 :]])
                for x in range(v.shape[1]):
                    d_v[s, x] += weights[j] * g[x]
    if d_out is None:
        return Enclosure(out, absolute, None, None, None)
    return Enclosure(out, absolute, d_q, d_k, d_v)


def enclose_whole(
    attend: Any, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: NDArray[np.bool_], causal: bool, d_out: Any,
    rows: list[int] | None,
) -> Enclosure:  # fmt: skip
    """By a rule that gives all rows at once; cotangents are those of all rows."""
    parameters, of = quadratic.formula_of(attend).parameters, WHOLE[type(attend).__name__]
    with precision() as flint:
        queries, keys, values = (balls(x).tolist() for x in (q, k, v))

        def product(weights: list[Row], columns: list[Row], size: Any = lambda a: a) -> Balls:
            made = balls(np.zeros((len(weights), v.shape[1])))
            for t, x in np.ndindex(made.shape):
                made[t, x] = dot([size(a) for a in weights[t]], [size(y[x]) for y in columns])
            return made

        weights = of(queries, keys, mask, causal, **parameters)
        shown = weights if rows is None else [weights[t] for t in rows]
        out, absolute = product(shown, values), product(shown, values, abs)
        if d_out is None:
            return Enclosure(out, absolute, None, None, None)
        if rows is not None:
            raise ValueError(f"`rows` must be left out with `d_out` for {attend!r}, got {rows}.")
        g = balls(np.asarray(d_out, dtype=float)).tolist()
        paired = [[dot(g_t, v_s) for v_s in values] for g_t in g]

        def slope(queries: list[Row], keys: list[Row]) -> Any:
            """The coefficient of h in sum_t g_t . out_t."""
            moved = of(queries, keys, mask, causal, **parameters)
            loss = sum((dot(row, worth) for row, worth in zip(moved, paired, strict=True)), start=arb(0))
            return loss[1] if hasattr(loss, "length") else flint.arb(0)

        grads = []
        for side in range(2):
            d_x = balls(np.zeros((q, k)[side].shape))
            for t, d in np.ndindex(d_x.shape):
                sides = [queries, keys]
                sides[side] = [*sides[side][:t], moved(sides[side][t], d, flint), *sides[side][t + 1 :]]
                d_x[t, d] = slope(*sides)
            grads.append(d_x)
        d_v = product([list(column) for column in zip(*weights, strict=True)], g)
    return Enclosure(out, absolute, grads[0], grads[1], d_v)


def moved(x: Row, d: int, flint: Any) -> Row:
    """x + h in its d-th entry."""
    return [*x[:d], flint.arb_series([x[d], 1]), *x[d + 1 :]]


def balls(x: NDArray[np.float64]) -> Balls:
    """Each number as the ball that contains it alone."""
    flint = library()
    made = np.empty(x.shape, object)
    for at in product(*map(range, x.shape)):
        made[at] = flint.arb(float(x[at]))
    return made


def distance(got: ArrayLike, want: Balls) -> NDArray[np.float64]:
    """Upper bounds of |got - truth|, entry by entry, rounded up; inf where `got` is not finite."""
    got = np.asarray(got, dtype=float)
    if got.shape != want.shape:
        raise ValueError(f"`got` must have the shape of the balls, {want.shape}, got {got.shape}.")
    far = np.full(got.shape, np.inf)
    with precision() as flint:
        for at in product(*map(range, got.shape)):
            if np.isfinite(got[at]):
                apart = float(abs(flint.arb(float(got[at])) - want[at]).upper())
                far[at] = np.nextafter(apart, np.inf) if apart else 0.0
    return far


def midpoints(want: Balls) -> NDArray[np.float64]:
    """The middle of each ball, rounded to float64."""
    return np.array([float(x.mid()) for x in want.ravel()]).reshape(want.shape)
