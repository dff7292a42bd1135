"""What every landed commit can run: the first mechanisms, on one size. `nox -s history` measures it over main.

Nothing but the plain calls is used, for this file runs with every package since the first.
"""

from __future__ import annotations

import numpy as np

import linattn as la

HEADS, TOKENS, CHANNELS = 4, 1024, 64
EPS = float(np.finfo("float32").eps)


class Landed:
    """Causal, float32: time and error of one call on one page."""

    params = (["Linear", "Softmax"], ["reference", "numba"])
    param_names = ["attend", "backend"]
    timeout = 120

    def setup(self, name, backend):
        self.attend = getattr(la, name)()
        *self.args, self.d_out = np.random.default_rng(0).normal(size=(4, HEADS, TOKENS, CHANNELS)).astype("float32")
        try:
            self.backward = self.attend.vjp(*self.args, causal=True, backend=backend)[1]
            self.backward(self.d_out)
        except ValueError as error:  # a commit before this backend
            raise NotImplementedError(str(error)) from None

    def time_forward(self, name, backend):
        self.attend(*self.args, causal=True, backend=backend)

    def time_backward(self, name, backend):
        self.backward(self.d_out)

    def track_forward_error(self, name, backend):
        """Of the last row: its formula in float64."""
        q, k, v = (x.astype("float64") for x in self.args)
        q = q[:, -1:]
        if name == "Softmax":
            scores = q @ k.swapaxes(-1, -2) / CHANNELS**0.5
            a = np.exp(scores - scores.max(axis=-1, keepdims=True))
        else:
            phi_q, phi_k = (np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0))) for x in (q, k))
            a = phi_q @ phi_k.swapaxes(-1, -2)
        want = a @ v / a.sum(axis=-1, keepdims=True)
        got = self.attend(*self.args, causal=True, backend=backend)[:, -1:]
        return float(np.linalg.norm(got - want) / np.linalg.norm(want) / EPS)

    track_forward_error.unit = "eps"
