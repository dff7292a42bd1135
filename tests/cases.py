"""The one table that the property tests run over: mechanism values, calls of them, and how arguments are drawn.

A row is a `Case`: a value, its options and shapes. `case.draw(rng, dtype)` gives q, k, v and the options of a call;
`case.formula` is the paper's formula for it. What decides whether a result is right stands here as well: the
tolerances, each with its origin, and comparisons that no NaN passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import linattn as la
from linattn.audit import quadratic
from linattn.audit.measure import relative_error, smallest_normal, unit_roundoff

# -- what judges ------------------------------------------------------------------------------------------------

FLOAT64, FLOAT32 = 1e-13, 5e-7  # normwise, well-scaled inputs: the library's promise
TOLERANCE = {"float64": FLOAT64, "float32": FLOAT32}
COMPLEX_STEP = 1e-12  # gradients in float64, the library's promise
CAST_ONCE = 1.1  # 16 bits: error over that of rounding the best answer for the same inputs
U = {name: unit_roundoff(dtype) for name, dtype in (("float64", "float64"), ("float32", "float32"))}
SIXTEEN_BITS = ("float16", "bfloat16")
DTYPES = {"bfloat16": ml_dtypes.bfloat16} | {name: name for name in ("float64", "float32", "float16")}


def rounded(x, dtype):
    """x in a floating format of that name."""
    return np.asarray(x).astype(DTYPES[dtype])


def numpy_of(x):
    """The same numbers as a NumPy array."""
    return np.asarray(x.detach() if hasattr(x, "detach") else x)


def assert_close(got, want, tolerance=FLOAT64):
    """Same shape, and |got - want| <= tolerance |want| in the Euclidean norm."""
    got, want = numpy_of(got), np.asarray(want)
    assert got.shape == want.shape
    error = relative_error(got, want)
    assert error <= tolerance, f"relative error {error:.3g}, at most {tolerance:.3g}"


def assert_gradients_close(got, want, tolerance=COMPLEX_STEP):
    """d_q, d_k, d_v, ... normwise over the whole: some of them may vanish, the whole does not."""
    got, want = [numpy_of(x) for x in got], [np.asarray(x) for x in want]
    assert [x.shape for x in got] == [x.shape for x in want]
    assert_close(*(np.concatenate([quadratic.wide(x).ravel() for x in xs]) for xs in (got, want)), tolerance)


def assert_bits(got, want):
    """The same dtype, shape and bytes."""
    got, want = numpy_of(got), numpy_of(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    differ = np.count_nonzero(np.ascontiguousarray(got).view(np.uint8) != np.ascontiguousarray(want).view(np.uint8))
    assert differ == 0, f"{differ} bytes differ"


def assert_within(got, want, absolute, units, dtype):
    """|got - want| <= units u absolute, entry by entry: the error bound with absolute = |A| |v|."""
    allowed = units * unit_roundoff(DTYPES[dtype]) * absolute + smallest_normal(DTYPES[dtype])
    worst = np.max(abs(quadratic.wide(numpy_of(got)) - want) / allowed, initial=0.0)
    assert worst <= 1, f"{worst * units:.3g} u |A||v|, at most {units:.3g}"


# -- backends ---------------------------------------------------------------------------------------------------

ROOMS = Path(la.__file__).parent / "backends"
CPU = ("reference", "numba")  # rooms that take NumPy arrays


def has_room(backend, engine):
    """Whether the room is there; whether it loads is for the tests to find out."""
    return (ROOMS / backend / f"{engine}.py").exists()


LOG_FEATURES = ("positive", "hyperbolic", "oprf", "sderf")


def engine_of(attend):
    if isinstance(attend, (la.Softmax, la.Combiner)):
        return type(attend).__name__.lower()
    by_logs = getattr(attend, "feature_map", None) == "exp" or getattr(attend, "features", None) in LOG_FEATURES
    return "loglinear" if by_logs or isinstance(attend, (la.LLN, la.LLNDiag)) else "linear"


def backends_of(attend):
    return [backend for backend in CPU if has_room(backend, engine_of(attend))]


def backends_of_steps(attend):
    """Combiner's streams are the reference room's."""
    return ["reference"] if isinstance(attend, la.Combiner) else backends_of(attend)


BACKENDS = [backend for backend in CPU if has_room(backend, "linear")]
CHUNKS = [import_module("linattn.backends.reference.linear").CHUNK]
if "numba" in BACKENDS:
    CHUNKS.append(import_module("linattn.backends.numba._tiles").CHUNK)
SIZES = sorted({0, 1, 2} | {n for c in CHUNKS for n in (c - 1, c, c + 1, 3 * c + 5)})

# -- values -----------------------------------------------------------------------------------------------------


def both_sides(x, xp):
    return xp.concat([xp.exp(x), xp.exp(-x)], axis=-1)


def both_sides_vjp(d_phi, x, xp):
    n = x.shape[-1]
    return d_phi[..., :n] * xp.exp(x) - d_phi[..., n:] * xp.exp(-x)


def square(x, xp):
    return x * x


def square_vjp(d_phi, x, xp):
    return 2 * x * d_phi


BOTH_SIDES = la.FeatureMap("both_sides", both_sides, both_sides_vjp)  # R = 2 D
SQUARE = la.FeatureMap("square", square, square_vjp)

LENGTH = 512  # of cosFormer, beyond every size
VALUES = [
    la.Linear(),
    la.Linear("relu"),
    la.Linear("identity", normalize=False),
    la.Linear(normalize=False),
    la.Linear("exp"),
    la.Linear(BOTH_SIDES),
    la.Linear(eps=("clamp", 25.0)),  # reached by some rows and not by others
    la.Linear("relu", eps=("add", 0.5)),
    la.CosFormer(LENGTH),
    la.CosFormer(LENGTH, feature_map="elu1", normalize=False),
    la.CosFormer(200, feature_map=BOTH_SIDES, eps=("clamp", 100.0)),
    la.CosFormer(LENGTH, eps=("add", 0.5)),
    la.CosFormer(),
    la.CosFormer(align="stretch"),
    la.Softmax(),
    la.Softmax(scale=0.25),
    la.Performer(12),
    la.Performer(12, features="hyperbolic", kind="iid", norms="sqrt", scale=0.3, eps=0.1),
    la.Performer(12, features="oprf", calibration=(None, None, 0.2)),
    la.Performer(12, features="relu"),
    la.Performer(12, features=SQUARE, eps=0.5),
    la.LLN(),
    la.LLN(alpha=0.8, beta=0.6),
    la.LLN(calibration="exact", scope="sample", statistics="differentiated"),
    la.LLN(calibration=(0.3, -0.1), scope="head", statistics="differentiated"),
    la.LLNDiag(block=4),
    la.LLNDiag(alpha=0.8, beta=0.6, block=4, ratio=0.25),
    la.Combiner(span=4),  # the other patterns: test_combiner.py
    la.Combiner("mixture", width=4, pool="mean", size_bias=True, scale=0.4),
]
MAIN = [
    la.Linear(),
    la.CosFormer(LENGTH),
    la.Softmax(),
    la.Performer(12),
    la.LLN(alpha=0.8, beta=0.6),
    la.LLNDiag(alpha=0.8, beta=0.6, block=4, ratio=0.25),
    la.Combiner(span=4),
]
FEATURE_ERROR = {  # e_phi / u
    "identity": 0,
    "relu": 0,
    "elu1": 2,
    BOTH_SIDES: 2,
    SQUARE: 1,
}
COSINE_ERROR = 3


def is_cosformer(attend):
    return isinstance(attend, la.CosFormer)


def is_combiner(attend):
    return isinstance(attend, la.Combiner)


def has_blocks(attend):
    """Whether positions of queries are those of keys: N == M, and a hidden key keeps its place."""
    return isinstance(attend, (la.LLNDiag, la.Combiner))


def reads_the_call(attend):
    """Whether some of its numbers are moments of q and k."""
    return isinstance(attend, (la.LLN, la.LLNDiag)) and attend.alpha is None


def sees_others(attend):
    """Whether such moments are taken over more than one head of one sequence."""
    return reads_the_call(attend) and attend.scope != "sample"


def holds_moments(attend):
    """Whether its backward takes such moments for constants, so that it is not the derivative of its forward."""
    return reads_the_call(attend) and attend.statistics == "detached"


def can_be_causal(attend):
    return not reads_the_call(attend) and (not is_cosformer(attend) or attend.length is not None)


def is_elementary(attend):
    """Linear and CosFormer on plain features: with a formula for their states, and a proved bound for each entry."""
    return isinstance(attend, (la.Linear, la.CosFormer)) and engine_of(attend) == "linear"


def is_distribution(attend):
    """Rows of weights are non-negative and sum to 1, or to 0 where nothing is seen."""
    return not isinstance(attend, (la.Linear, la.CosFormer)) or (attend.normalize and attend.eps == "safe")


def error_bound(attend, n_tokens, n_channels):
    """2 D + 4 e_phi / u, the proved error in units of u |A||v| for sums over tokens and features in any blocking."""
    n_features = n_channels * (2 if attend.feature_map is BOTH_SIDES else 1) * (2 if is_cosformer(attend) else 1)
    e_phi = FEATURE_ERROR[attend.feature_map] + (COSINE_ERROR if is_cosformer(attend) else 0)
    return 2 * (n_tokens + n_features + 3) + 4 * e_phi


# -- cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A value, a call of it, and the shapes of the arguments; `lead` has the leading axes of q, k and v."""

    attend: object
    causal: bool = False
    masked: bool = False
    packed: bool = False
    moved: bool = False
    n: int = 11
    m: int = 11
    d: int = 5
    e: int = 4
    lead: tuple = ((2,), (2,), (2,))

    def __str__(self):
        options = [name for name in ("causal", "masked", "packed", "moved") if getattr(self, name)]
        shapes = "" if self.lead == Case.lead else "/".join(map(str, self.lead)).replace(" ", "")
        return " ".join([repr(self.attend), *options, f"{self.n}x{self.m}x{self.d}x{self.e}", shapes]).strip()

    @property
    def offered(self):
        """Whether the mechanism can do it."""
        if is_cosformer(self.attend):
            return self.attend.length is not None or not (self.causal or self.masked or self.moved)
        if has_blocks(self.attend) and self.n != self.m:
            return False
        return not self.moved and not (self.causal and reads_the_call(self.attend))

    @property
    def formula(self):
        return quadratic.formula_of(self.attend)

    def draw(self, rng, dtype="float64"):
        """(q, k, v), well scaled, and the options of the call."""
        shapes = ((self.n, self.d), (self.m, self.d), (self.m, self.e))
        args = tuple(
            rounded(rng.normal(size=(*lead, *shape)), dtype) for lead, shape in zip(self.lead, shapes, strict=True)
        )
        options = {"causal": self.causal} if self.causal else {}
        if self.masked:
            mask = rng.random((*self.lead[1], self.m)) > 0.4
            mask[..., :1] = False  # a causal first row sees nothing
            options["key_mask"] = mask
        if self.packed:
            options["cu_seqlens"] = [0, self.n // 3, self.n // 3, self.n // 3 + 1, self.n]
        if self.moved:
            p_q, p_k = rng.uniform(0, self.attend.length, self.n), rng.integers(0, self.attend.length, (2, self.m))
            options["positions"] = p_q if self.n == self.m else (p_q, p_k)
        return args, options

    def cotangent(self, rng, dtype="float64"):
        """A d_out."""
        return rounded(rng.normal(size=self.out_shape), dtype)

    @property
    def out_shape(self):
        moved = [(2,)] if self.moved and self.n != self.m else []
        return (*np.broadcast_shapes(*self.lead, *moved), self.n, self.e)


CALLS = [
    {},
    {"causal": True},
    {"n": 7, "m": 13},
    {"causal": True, "masked": True},
    {"n": 7, "m": 13, "masked": True},
    {"packed": True},
    {"packed": True, "causal": True, "masked": True},
    {"moved": True, "causal": True},
    {"moved": True, "n": 7, "m": 13},
    {"moved": True, "packed": True, "causal": True},
    {"causal": True, "lead": ((2, 3), (2, 1), (2, 1))},  # grouped queries
    {"n": 7, "m": 13, "masked": True, "lead": ((2, 3), (), (3,))},  # one key head, values of their own
    {"causal": True, "lead": ((), (3, 1), (2,))},  # one set of queries for all
    {"causal": True, "d": 1, "e": 1},
    {"causal": True, "d": 17, "e": 33, "lead": ((), (), ())},
]
CASES = [case for attend in VALUES for call in CALLS if (case := Case(attend, **call)).offered]
MAIN_CASES = [case for case in CASES if case.attend in MAIN]
CAUSAL_CASES = [case for case in CASES if case.causal and not case.packed]


def on_backends(cases, backends=backends_of):
    """Parameters `case, backend`."""
    return [pytest.param(case, backend, id=f"{backend} {case}") for case in cases for backend in backends(case.attend)]


def values_on_backends(values, backends=backends_of):
    """Parameters `attend, backend`."""
    return [
        pytest.param(attend, backend, id=f"{backend} {attend!r}") for attend in values for backend in backends(attend)
    ]


def streams_on_backends(values):
    """Likewise, for those that take steps."""
    return values_on_backends(values, backends_of_steps)


# -- states by their formula ------------------------------------------------------------------------------------


def wide_features(attend, q, k, first=0):
    """Phi_q, Phi_k with w(t, s) phi(q_t).phi(k_s) = Phi_q[t] . Phi_k[s], from position `first` on."""
    parameters = quadratic.formula_of(attend).parameters
    if is_cosformer(attend):
        parameters = parameters | {"positions": tuple(first + np.arange(x.shape[-2]) for x in (q, k))}
    return quadratic.FEATURES[type(attend).__name__](q, k, **parameters)


def values_and_ones(attend, v):
    return np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1) if attend.normalize else v


def state_formula(attend, k, v, first=0, key_mask=None):
    """sum_s Phi_k[s] [v, 1][s]^T as a state lays it out, (..., n_sums, R, E + 1)."""
    _, phi_k = wide_features(attend, k, k, first)
    v1 = values_and_ones(attend, v)
    if key_mask is not None:
        phi_k, v1 = np.where(key_mask[..., None], phi_k, 0), np.where(key_mask[..., None], v1, 0)
    sums = quadratic.transpose(phi_k) @ v1
    n_sums = 2 if is_cosformer(attend) else 1
    return sums.reshape(*sums.shape[:-2], n_sums, sums.shape[-2] // n_sums, sums.shape[-1])


def step_formula(attend, q, k, v, sums, first=0, key_mask=None):
    """out of a step from the sums of a state: [num, den][t] = Phi_q[t] . (sums + those of the keys s <= t)."""
    phi_q, phi_k = wide_features(attend, q, k, first)
    v1 = values_and_ones(attend, v)
    seen = np.tri(q.shape[-2], dtype=bool)
    if key_mask is not None:
        seen = seen & key_mask[..., None, :]
    pairs = np.where(seen, phi_q @ quadratic.transpose(phi_k), 0)
    num_den = pairs @ v1 + phi_q @ sums.reshape(*sums.shape[:-3], -1, sums.shape[-1])
    if not attend.normalize:
        return num_den
    c = quadratic.divisor(num_den[..., -1:], attend.eps)
    return np.where(c == 0, 0, num_den[..., :-1] / np.where(c == 0, 1, c))


def value_of(state):
    """The value of a linear state, in float64."""
    return numpy_of(state.arrays.sums).astype("float64") + numpy_of(state.arrays.rest)


def state_with(state, **arrays):
    """A state (or a cotangent of one) with these arrays; `rest` is zero unless given."""
    if "sums" in arrays:
        arrays = {"rest": np.zeros_like(arrays["sums"])} | arrays
    return replace(state, arrays=state.arrays._replace(**arrays))


# -- derivatives ------------------------------------------------------------------------------------------------

TINY = 1e-30  # a complex step: squares of it vanish, nothing cancels


def complex_step(function, args, d_out, one_by_one=False):
    """The gradient of sum(d_out * function(*args)), every entry of it, from imaginary parts.

    The moved arguments are a batch, unless the function looks at a batch as a whole.
    """
    n_axes = max(x.ndim for x in args)
    grads = []
    for i, x in enumerate(args):
        if one_by_one:
            change = np.empty(x.size)
            for j in range(x.size):
                step = 1j * TINY * np.eye(1, x.size, j).reshape(x.shape)
                moved = [*args[:i], x + step, *args[i + 1 :]]
                change[j] = np.sum(d_out * function(*moved).imag / TINY)
            grads.append(change.reshape(x.shape))
            continue
        one = np.eye(x.size).reshape(x.size, *(1,) * (n_axes - x.ndim), *x.shape)
        moved = [*args[:i], x + 1j * TINY * one, *args[i + 1 :]]
        change = np.sum(d_out * function(*moved).imag / TINY, axis=tuple(range(1, d_out.ndim + 1)))
        grads.append(change.reshape(x.shape))
    return grads
