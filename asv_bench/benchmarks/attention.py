"""Every mechanism: forward and backward of whole sequences, and steps of a stream.

Errors are in units of the machine epsilon of float32, against the formulas of linattn/audit/quadratic.py: what a
change costs in accuracy stands beside what it gains in time.
"""

from __future__ import annotations

import numpy as np

import linattn as la
import linattn.backends.numba.combiner  # loaded once, before asv forks a process for each measurement
import linattn.backends.numba.linear
import linattn.backends.numba.loglinear
import linattn.backends.numba.softmax
from linattn.audit import measure, quadratic

ATTENDS = [
    la.Linear("elu1"),
    la.CosFormer(length=4096),
    la.Softmax(),
    la.Performer(128),
    la.LLN(alpha=2.0, beta=2.0),
    la.LLNDiag(alpha=2.0, beta=2.0),
    la.Combiner(span=32),
]
PATTERNS = [
    la.Combiner(span=32),
    la.Combiner("logsparse"),
    la.Combiner("axial_vertical", width=32),
    la.Combiner("axial_horizontal", width=32),
    la.Combiner("axial_rowmajor", width=32),
]
BACKENDS = ["reference", "numba"]
SEES = ["all", "causal"]
HEADS, CHANNELS = 4, 64
EPS = float(np.finfo("float32").eps)
SAMPLE = 8  # errors are read off every eighth row: a formula by logarithms takes R exponentials a pair


def draw(heads, n_tokens):
    """q, k, v, d_out in float32: the same numbers in every run."""
    return np.random.default_rng(0).normal(size=(4, heads, n_tokens, CHANNELS)).astype("float32")


def gradient_error(attend, args, d_out, grads, **options):
    """Error of the directional derivative along one random direction, over the sum of its terms, in eps."""
    directions = [np.random.default_rng(1 + i).normal(size=x.shape) for i, x in enumerate(args)]
    h = 1e-30  # complex step: nothing cancels
    moved = (x + 1j * h * u for x, u in zip(args, directions, strict=True))
    rows = slice(None, None, SAMPLE)
    d_formula = quadratic.formula_of(attend)(*moved, rows=rows, **options).imag / h
    got = sum(np.sum(d_x.astype("float64") * u) for d_x, u in zip(grads, directions, strict=True))
    size = sum(np.sum(abs(d_x * u)) for d_x, u in zip(grads, directions, strict=True))
    return float(abs(got - np.sum(d_out[..., rows, :] * d_formula)) / size / EPS)


class Whole:
    """A whole sequence."""

    params = (ATTENDS, SEES, BACKENDS, [256, 1024])
    param_names = ["attend", "sees", "backend", "n_tokens"]
    timeout = 120

    def setup(self, attend, sees, backend, n_tokens):
        *self.args, self.d_out = draw(HEADS, n_tokens)
        self.options = {"causal": sees == "causal", "backend": backend}
        self.run_backward = attend.vjp(*self.args, **self.options)[1]
        self.run_backward(self.d_out)  # compiled before the clock starts

    def time_forward(self, attend, *_):
        attend(*self.args, **self.options)

    def time_backward(self, *_):
        self.run_backward(self.d_out)

    def track_forward_error(self, attend, sees, *_):
        rows = np.arange(0, self.d_out.shape[-2], SAMPLE)
        want = measure.oracle(attend, *self.args, causal=sees == "causal", rows=rows).out
        return measure.error_in_eps(attend(*self.args, **self.options)[..., rows, :], want)

    def track_backward_error(self, attend, sees, *_):
        args, d_out = [x[:1] for x in self.args], np.zeros_like(self.d_out[:1])  # one head: the formula is N x N
        d_out[:, ::SAMPLE] = self.d_out[:1, ::SAMPLE]
        grads = attend.vjp(*args, **self.options)[1](d_out)
        return gradient_error(attend, args, d_out, grads, causal=sees == "causal")

    track_forward_error.unit = "eps"
    track_backward_error.unit = "eps"


class Memory:
    """A whole sequence, causal: the most memory the process ever had."""

    params = (ATTENDS, BACKENDS, [256, 4096])
    param_names = ["attend", "backend", "n_tokens"]
    timeout = 120

    def setup(self, attend, backend, n_tokens):
        *self.args, self.d_out = draw(HEADS, n_tokens)
        self.options = {"causal": True, "backend": backend}

    def peakmem_forward(self, attend, *_):
        attend(*self.args, **self.options)

    def peakmem_backward(self, attend, *_):
        attend.vjp(*self.args, **self.options)[1](self.d_out)


class Step:
    """New tokens after a context."""

    params = (ATTENDS, BACKENDS, [1, 16])
    param_names = ["attend", "backend", "n_new"]
    context = 1024
    timeout = 120

    def setup(self, attend, backend, n_new):
        if isinstance(attend, la.Combiner) and backend != "reference":
            raise NotImplementedError("Combiner's steps are the reference room's")
        self.args = draw(HEADS, self.context + n_new)[:3]
        before, self.new = ([x[:, part] for x in self.args] for part in self.parts(n_new))
        _, self.state = attend.step(*before, attend.init_state(*before[1:]), backend=backend)
        self.run = lambda: attend.step(*self.new, self.state, backend=backend)[0]
        self.run_backward = attend.step_vjp(*self.new, self.state, backend=backend)[2]
        self.d_out = np.ones_like(self.run())
        self.run_backward(self.d_out)

    def parts(self, n_new):
        return slice(self.context), slice(self.context, self.context + n_new)

    def time_step(self, *_):
        self.run()

    def time_step_backward(self, *_):
        self.run_backward(self.d_out)

    def track_step_error(self, attend, _, n_new):
        rows = self.parts(n_new)[1]
        return measure.error_in_eps(self.run(), measure.oracle(attend, *self.args, causal=True, rows=rows).out)

    track_step_error.unit = "eps"


class Patterns:
    """Combiner's patterns, causal and compiled; the pairs that each computes beside its time."""

    params = (PATTERNS,)
    param_names = ["attend"]
    timeout = 120
    n_tokens = 1024

    def setup(self, attend):
        *self.args, self.d_out = draw(HEADS, self.n_tokens)
        self.run_backward = attend.vjp(*self.args, causal=True, backend="numba")[1]
        self.run_backward(self.d_out)

    def time_forward(self, attend):
        attend(*self.args, causal=True, backend="numba")

    def time_backward(self, attend):
        self.run_backward(self.d_out)

    def track_pairs(self, attend):
        (plan,) = attend.plans(self.n_tokens, causal=True)
        return sum(plan.pairs())

    track_pairs.unit = "pairs"
