"""The audit: which calls are made, what judges each, and the figures that come of it.

A case is a value, a family of inputs, sizes, a dtype; one oracle judges all backends on it. Cases that differ in
causality and seed alone make one figure, the worst of them: a sampled maximum, a lower bound of the true one.

    families   149 tokens and all families, both directions          long double; float64
    sizes      0, 1, 2 and around the chunks                         the same
    balls      a few tokens, both directions                         ball arithmetic: these figures are proved
    streams    `step_vjp` in three steps, cotangents through states   as families
    merges     a step after two states that were merged               as families
    weights    `weights`: the forward of the identity                 as families
    long       10 000 tokens, forward; with `full` 100 000, and a     sums in float64; some rows in long double
               million for the first value of each mechanism
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn import backends
from linattn.audit import bounds, families, measure, quadratic, rigorous, subjects, truth_logs, workers
from linattn.audit.truth import KINDS, largest_error, truth
from linattn.audit.units import PASSES, Arithmetic, Truth, extended, missing_extended

__all__ = ["COLUMNS", "Case", "Figure", "cases", "key", "missing_oracles", "rooms", "survey"]

Array = NDArray[Any]
Step = Callable[[str], None]

D, E = 16, 8  # channels of a head and of its values
TOKENS = 149  # three chunks of 48 and five tokens, two of 64 and 21
FEW = 9  # tokens under balls
LONG, LONGER = (10_000,), (100_000, 1_000_000)
SAMPLED = 5  # rows of a long sequence that extended precision judges
BALLS = ("gaussian", "student-t(2)", "norms near overflow", "norms near underflow", "constant", "v + 1e4", "real")
NARROW = ("gaussian", "v + 1e2", "real")  # families of the 16-bit formats
LONG_FAMILIES = ("gaussian", "constant")
QUADRATIC = ("softmax", "blocks", "combiner")  # no oracle of linear cost
STREAMING = {"combiner": ("reference",)}  # rooms that have steps, where not all have them
SELF = ("blocks", "combiner")  # as many queries as keys
DTYPES = ("float64", "float32", "float16", "bfloat16")
BACKENDS = ("reference", "numba")  # rooms that take NumPy arrays
STREAMED = ("gaussian", "v + 1e2", "real")
CUTS = (0, 50, 51, TOKENS)  # steps of many tokens, of one, and across a chunk
PARTS = (0, 48, 96, TOKENS)  # what is merged, and what follows: blocks of 16 end there, and Combiner's spans
KERNELS = {"loglinear": "logs", "softmax": "logs", "blocks": "logs"}  # engines whose cases share compiled kernels
SIZES = (0, 1, 2, 47, 48, 49, 63, 64, 65, 95, 96, 97)


@dataclass(frozen=True)
class Case:
    """One call on one family of inputs, judged by one oracle."""

    attend: Any
    kind: str  # families, sizes, balls, streams, merges, weights, long
    family: str
    dtype: str
    causal: bool
    n: int = TOKENS
    m: int = TOKENS
    d: int = D
    e: int = E
    backward: bool = True
    repeat: int = 0

    @property
    def value(self) -> Any:
        return subjects.of_channels(self.attend, self.d)

    @property
    def engine(self) -> str:
        return subjects.engine_of(self.value)

    @property
    def through_states(self) -> bool:
        return self.kind in ("streams", "merges")

    @property
    def seed(self) -> int:
        """The same for every backend, other for every case, whatever else is audited."""
        return zlib.crc32(repr((self.attend, self.family, self.dtype, self.causal, self.n, self.m, self.d,
                                self.e, self.repeat)).encode())  # fmt: skip


class Figure(NamedTuple):
    """The worst of some cases; see `COLUMNS`."""

    mechanism: str
    passes: str
    backend: str
    dtype: str
    kind: str
    family: str
    causal: bool
    n: int
    m: int
    d: int
    e: int
    r: int
    chunk: int
    oracle: str
    cases: int
    ratio: float | None
    werr: float
    nrel: float
    ulp50: float
    ulp99: float
    ulpmax: float
    seed: int
    note: str


COLUMNS = tuple(name.replace("passes", "pass") for name in Figure._fields)


# ------------------------------------------------------------------------------------------------- the plan


def rooms(engine: str, only: str | None) -> list[str]:
    """The backends that have all of the engine and run here."""
    asked = BACKENDS if only is None else (only,)
    files = subjects.ENGINES[engine]
    return [name for name in asked if not any(isinstance(backends.load(name, file), str) for file in files)]


def missing_oracles() -> dict[str, str]:
    """{oracle: why it cannot judge here}."""
    reasons = {"balls": rigorous.missing(), "long double": missing_extended()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def cases(names: list[str], full: bool) -> Iterator[Case]:
    """All calls of an audit of these mechanisms, cheap ones first."""
    quick = not full
    for name in names:
        values = subjects.SUBJECTS[name]
        for attend in values(TOKENS):
            plain = Case(attend, "families", "gaussian", "float64", False)
            both = [plain, *([replace(plain, causal=True)] if subjects.may_be_causal(attend) else [])]
            for case in both:
                for dtype in DTYPES[:2]:
                    for family in BALLS:
                        yield replace(case, kind="balls", family=family, dtype=dtype, n=FEW, m=FEW, d=3, e=2)
                    for family in NARROW if quick and subjects.is_variant(attend) else families.FAMILIES:
                        for repeat in range(3 if full else 1):
                            yield replace(case, family=family, dtype=dtype, repeat=repeat)
                    for n in SIZES:
                        yield replace(case, kind="sizes", dtype=dtype, n=n, m=n, d=6, e=5)
                    yield replace(case, kind="sizes", dtype=dtype, n=50, m=50, d=1, e=1)
                    if not case.causal and case.engine not in SELF:
                        yield replace(case, kind="sizes", dtype=dtype, n=7, m=130)
                        yield replace(case, kind="sizes", dtype=dtype, n=130, m=7)
                    for family in STREAMED if case.causal else ():
                        yield replace(case, kind="streams", family=family, dtype=dtype)
                        yield replace(case, kind="merges", family=family, dtype=dtype)
                    yield replace(case, kind="weights", dtype=dtype, n=TOKENS // 2, m=TOKENS // 2, backward=False)
                if quick and getattr(attend, "feature_map", "") == "exp":
                    continue  # kernels of its own, and half a minute to compile them
                for dtype in DTYPES[2:]:
                    for family in NARROW if quick else families.FAMILIES:
                        yield replace(case, family=family, dtype=dtype)
        for n in (*LONG, *(LONGER if full else ())):
            for attend in values(n):
                if not has_long_sums(attend):
                    continue
                if n == LONGER[-1] and attend != values(n)[0]:
                    continue  # minutes each
                for family in LONG_FAMILIES if n < LONGER[-1] else LONG_FAMILIES[-1:]:
                    for dtype in DTYPES[:2]:
                        yield Case(attend, "long", family, dtype, True, n, n, backward=False)


def has_long_sums(attend: Any) -> bool:
    """Whether its definition can be summed in linear time, causally."""
    value = subjects.of_channels(attend, D)
    is_linear = subjects.engine_of(value) not in QUADRATIC
    return is_linear and subjects.may_be_causal(value) and not subjects.is_signed(value)


def groups(plan: list[Case]) -> list[list[int]]:
    """Which cases one process does: those that call the same compiled kernels, long ones first."""
    found: dict[tuple[int, str], list[int]] = {}
    for i, case in enumerate(plan):
        kernels = KERNELS.get(case.engine, case.engine)
        narrow = case.dtype if kernels != "combiner" or case.dtype == "float64" else "float32"
        found.setdefault((DTYPES.index(narrow), kernels), []).append(i)
    order = ("logs", "linear", "combiner")
    return [found[at] for at in sorted(found, key=lambda at: (at[0], order.index(at[1])))]


# -------------------------------------------------------------------------------------------- one case


def dtype_of(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)


def drawn(case: Case) -> tuple[families.Inputs, Array] | None:
    """Inputs and a cotangent in the case's dtype; None if it cannot hold the family."""
    rng = np.random.default_rng(case.seed)
    inputs = families.draw(case.family, rng, case.n, case.m, case.d, case.e, dtype_of(case.dtype))
    if inputs is None:
        return None
    return inputs, rng.normal(size=(case.n, case.e)).astype(dtype_of(case.dtype))


def results(case: Case, inputs: families.Inputs, d_out: Array, backend: str) -> dict[str, Array]:
    """What the library makes of it; what it says of signed features the tables say as well."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has signed features", category=RuntimeWarning)
        return called(case, inputs, d_out, backend)


def called(case: Case, inputs: families.Inputs, d_out: Array, backend: str) -> dict[str, Array]:
    """By the verb that is audited."""
    attend, options = case.value, {"causal": case.causal, "backend": backend}
    if inputs.key_mask is not None:
        options["key_mask"] = inputs.key_mask
    if case.kind == "streams":
        return streamed(attend, inputs, d_out, backend)
    if case.kind == "merges":
        return merged(attend, inputs, d_out, backend)
    if case.kind == "weights":
        return {"out": attend.weights(*inputs[:2], causal=case.causal)}
    if not case.backward:
        return {"out": attend(*inputs[:3], **options)}
    out, backward = attend.vjp(*inputs[:3], **options)
    return dict(zip(PASSES, (out, *backward(d_out)), strict=True))


def streamed(attend: Any, inputs: families.Inputs, d_out: Array, backend: str) -> dict[str, Array]:
    """The same through states: forward step by step, and back from the last step to the first."""
    q, k, v = inputs[:3]
    steps: list[Any] = []
    state = attend.init_state(k, v)
    for a, b in pairwise(CUTS):
        y, state, backward = attend.step_vjp(q[a:b], k[a:b], v[a:b], state, backend=backend)
        steps.append((slice(a, b), y, backward))
    d_state, grads = None, []
    for part, _, backward in reversed(steps):
        *d_qkv, d_state = backward(d_out[part], d_state)
        grads.append(d_qkv)
    columns = [y for _, y, _ in steps], *zip(*reversed(grads), strict=True)
    return {name: np.concatenate(column) for name, column in zip(PASSES, columns, strict=True)}


def merged(attend: Any, inputs: families.Inputs, d_out: Array, backend: str) -> dict[str, Array]:
    """The rows of the last part, after the merged states of two parts that knew nothing of each other."""
    q, k, v = inputs[:3]
    parts = [slice(a, b) for a, b in pairwise(PARTS)]
    states = []
    for part in parts[:2]:
        empty = attend.init_state(k, v, position=part.start)
        states.append(attend.step(q[part], k[part], v[part], empty, backend=backend)[1])
    last = parts[-1]
    y, _, backward = attend.step_vjp(q[last], k[last], v[last], attend.merge(*states), backend=backend)
    return dict(zip(PASSES, (y, *backward(d_out[last])[:3]), strict=True))


def survey(
    names: list[str], *, backend: str | None = None, full: bool = False, processes: int = 1, step: Step
) -> list[Figure]:
    """Run the plan and give its figures; `step` is told of every case. They do not depend on `processes`."""
    plan = list(cases(names, full))

    def job(i: int) -> list[Figure]:
        return list(figures_of(plan[i], rooms(plan[i].engine, backend)))

    found: dict[int, list[Figure]] = {}
    for i, figures in workers.shared_out(job, groups(plan), processes):
        step(f"{plan[i].attend!r}, {plan[i].kind}: {plan[i].family}")
        found[i] = figures
    worst: dict[tuple[Any, ...], Figure] = {}
    for i in range(len(plan)):
        for figure in found[i]:
            group = key(figure)
            worst[group] = worse(worst[group], figure) if group in worst else figure
    return list(worst.values())


def key(figure: Figure) -> tuple[Any, ...]:
    """The cases that make one figure: all under balls, all in 16 bits, all sizes, else those of a family and length."""
    common = figure.kind == "balls" or figure.dtype not in DTYPES[:2]
    return (*figure[:5], "" if common else figure.family, figure.n if figure.kind == "long" else 0)


def worse(a: Figure, b: Figure) -> Figure:
    """Each metric the larger of both, the rest that of the larger ratio. NaN is larger than anything."""
    first, second = (a, b) if size(a.ratio) >= size(b.ratio) else (b, a)
    metrics = {name: max(getattr(a, name), getattr(b, name), key=size)
               for name in ("werr", "nrel", "ulp50", "ulp99", "ulpmax")}  # fmt: skip
    return first._replace(cases=a.cases + b.cases, note=first.note or second.note, **metrics)


def size(x: float | None) -> float:
    return -1.0 if x is None else (x if x == x else np.inf)


def figures_of(case: Case, where: list[str]) -> Iterator[Figure]:
    """The figures of one case on these backends; none if its oracle is missing or no dtype holds its inputs."""
    if case.kind == "balls" and rigorous.missing():
        return
    if case.dtype == "float64" and case.kind != "balls" and missing_extended():
        return
    found = drawn(case)
    if found is None:
        return
    inputs, d_out = found
    attend = case.value
    if not has_scales(attend, inputs):
        return
    if case.kind == "long":
        yield from long_figures(case, inputs, where)
        return
    arithmetic = Arithmetic(case.dtype, getattr(attend, "normalize", True), case.through_states)
    if case.kind == "weights":
        inputs, d_out = inputs._replace(v=np.eye(case.m, dtype=d_out.dtype)), np.zeros((case.n, case.m), d_out.dtype)
    if case.kind == "merges":
        d_out[: PARTS[-2]] = 0  # so that the last rows of every cotangent are those of the last part
    exact = truth(attend, *inputs[:3], d_out, arithmetic, causal=case.causal, key_mask=inputs.key_mask)
    if case.kind == "merges":
        exact = exact.rows(slice(PARTS[-2], None))
    balls, oracle = None, np.dtype(extended(case.dtype)).name
    if case.kind == "balls" and not exact.unclaimed:
        *args, g = (x.astype(float) for x in (*inputs[:3], d_out))
        balls, oracle = rigorous.enclose(attend, *args, causal=case.causal, d_out=g), "balls"
    if case.kind == "weights":
        where = where[:1]  # it has one room
    if case.through_states:
        where = [backend for backend in where if backend in STREAMING.get(case.engine, where)]
    for backend in where:
        got = results(case, inputs, d_out, backend)
        for name in got:
            error = None if balls is None else rigorous.distance(got[name].astype(float), getattr(balls, name))
            yield figure(case, backend, name, got[name], exact, arithmetic, oracle, error)


def figure(
    case: Case, backend: str, name: str, got: Array, exact: Truth, arithmetic: Arithmetic, oracle: str,
    error: Array | None = None,
) -> Figure:  # fmt: skip
    """The metrics of one result; `error` where something surer than a difference bounds it."""
    n_features = subjects.n_rows(case.value, case.d)
    depth = bounds.depth(case.engine, backend, arithmetic.sums, n_keys=max(case.n, case.m), n_features=n_features)
    depth += len(CUTS) if case.through_states else 0  # a state is rounded once where it is handed on
    want, terms, unit = exact.value[name], exact.terms[name], exact.unit(name, arithmetic, depth)
    wide = got.astype(want.dtype)
    error = abs(wide - want) if error is None else error
    bits, exponent = measure.FORMATS[case.dtype]
    most = 2.0**-exponent / 4
    note = ""
    in_range = terms <= most
    if not in_range.all():  # the sums themselves leave the range: nothing is promised of these entries
        note = "beyond the range"
    counts = in_range & (error != 0)  # NaN counts
    allowed = unit
    if case.dtype not in ("float64", "float32"):  # one rounding to 16 bits
        u = 2.0**-bits
        allowed = unit + u * abs(want) + u * 2.0**exponent
    with np.errstate(all="ignore"):
        ratio: float | None = float(np.max(np.where(counts, error / allowed, 0), initial=0))
    unclaimed = exact.unclaimed if name == "out" else exact.unclaimed_backward
    if unclaimed:
        ratio, note = None, unclaimed
        error = np.where(case.kind == "balls", 0, error)  # no ball was made: this case counts in none of its figures
    with np.errstate(all="ignore"):
        werr = float(np.max(np.where(counts, error / (2.0**-bits * terms + 2.0**exponent), 0), initial=0))
        shown = np.where(in_range, wide, 0).astype(got.dtype), np.where(in_range, want, 0)
        nrel, ulps = measure.relative_error(*shown), measure.ulps(*shown)
    return Figure(
        repr(case.attend), name, backend, case.dtype, case.kind, case.family, case.causal, case.n, case.m, case.d,
        case.e, n_features, bounds.chunk_of(backend, case.engine), oracle, 1, ratio, werr, nrel,
        *ulps, case.seed, note,
    )  # fmt: skip


def has_scales(attend: Any, inputs: families.Inputs) -> bool:
    """Whether these inputs have the moments that a value of its own scales needs."""
    q, k, _, key_mask = inputs
    if subjects.may_be_causal(attend):
        return True
    if min(q.size, k.size) < 2:
        return False
    visible = quadratic.pairs_of(q, k, False, key_mask, None).visible
    with np.errstate(all="ignore"):
        found: Any = truth_logs.matched(attend, q.astype(float), k.astype(float), visible)
    return bool(np.isfinite(found).all())


def long_figures(case: Case, inputs: families.Inputs, where: list[str]) -> Iterator[Figure]:
    """Forward alone. float32 is judged by sums in float64, float64 on a few rows in extended precision."""
    attend, (q, k, v) = case.value, inputs[:3]
    rows = None if case.dtype == "float32" else np.unique(np.linspace(0, case.n - 1, SAMPLED).astype(int))
    if rows is None:
        answer = measure.by_sums(attend, *(x.astype(float) for x in (q, k, v)), causal=case.causal)
        want, absolute, oracle = answer.out, answer.absolute, "float64, chunked"
    else:
        q, k, v = (x.astype(extended(case.dtype)) for x in (q, k, v))
        formula = quadratic.formula_of(attend)
        parts = [formula(q, k, x, causal=case.causal, rows=rows) for x in (v, abs(v))]
        want, absolute, oracle = *parts, f"{np.dtype(extended(case.dtype)).name}, {len(rows)} rows"
    arithmetic = Arithmetic(case.dtype, getattr(attend, "normalize", True))
    error = largest_error(attend, q, k, arithmetic)
    exact = Truth({"out": want}, {"out": absolute}, {"out": error * absolute}, {"out": np.ones(())})
    for backend in where:
        got = results(case, inputs, q, backend)["out"]
        got = got if rows is None else got[rows]
        yield figure(case, backend, "out", got, exact, arithmetic, oracle)


def audited(names: list[str] | None) -> list[str]:
    """The mechanisms asked for, in any case of letters; by default all. Raises KeyError for one that there is not."""
    known = {name.lower(): name for name in subjects.SUBJECTS}
    if names is None:
        return list(known.values())
    for name in names:
        if name.lower() not in known:
            raise KeyError(name)
    return list(dict.fromkeys(known[name.lower()] for name in names))


def unjudged() -> list[str]:
    """Mechanisms of the table that lack a formula, a rule for balls, or a derivative."""

    def is_judged(name: str, values: list[Any]) -> bool:
        engines = {subjects.engine_of(subjects.of_channels(attend, D)) for attend in values}
        return name in quadratic.FORMULAS and name in {**rigorous.RULES, **rigorous.WHOLE} and engines <= set(KINDS)

    return [name for name, values in subjects.SUBJECTS.items() if not is_judged(name, values(TOKENS))]
