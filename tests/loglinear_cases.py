"""The log-linear engine as its tests call it: the engine on logarithms, its oracle, and data that are hard.

The oracle is the quadratic form in log space, `audit/loglinear.py`.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
from cases import assert_close, has_room

from linattn.audit.loglinear import log_similarity, log_weights
from linattn.engines import loglinear
from linattn.engines.loglinear import Options

ROOMS = {
    name: import_module(f"linattn.backends.{name}.loglinear")
    for name in ("reference", "numba")
    if has_room(name, "loglinear")
}
SPANS = ("past", "all")
FAR = 2e-6  # float32, norms up to 50
NORMS = (8, 20, 50)


@np.errstate(all="ignore")
def attend(lq, lk, v, room, *, span="past", key_mask=None, state=None):
    """out, lse and the state after all keys."""
    return loglinear.forward(lq, lk, v, state, Options(span, key_mask), room=room, out=None, xp=np)


@np.errstate(all="ignore")
def gradients(d_out, lq, lk, v, room, *, span="past", key_mask=None, state=None, d_lse=None, d_state=None):
    """d_lq, d_lk, d_v, d_sums."""
    return loglinear.backward(d_out, d_lse, d_state, lq, lk, v, state, Options(span, key_mask), room=room, xp=np)


def seen_by(lq, lk, span, key_mask=None):
    """visible (..., N, M)"""
    n, m = lq.shape[-2], lk.shape[-2]
    visible = np.tri(n, m, dtype=bool) if span == "past" else np.ones((n, m), dtype=bool)
    return visible if key_mask is None else visible & key_mask[..., None, :]


@np.errstate(all="ignore")
def formula(lq, lk, v, span="past", key_mask=None):
    """out, from pairs."""
    if key_mask is not None:
        v = np.where(key_mask[..., None], v, 0)
    return log_weights(lq, lk, seen_by(lq, lk, span, key_mask)) @ v


@np.errstate(all="ignore")
def formula_lse(lq, lk, span="past", key_mask=None):
    a, c = log_similarity(lq, lk, seen_by(lq, lk, span, key_mask))
    return np.log(np.sum(a, axis=-1)) + c[..., 0]


def draw(rng, n=11, m=None, r=6, e=4, scale=1.0, lead=((2,), (2,), (2,)), dtype="float64"):
    """lq, lk in float64 and v."""
    m = n if m is None else m
    lq, lk = (scale * rng.normal(size=(*a, t, r)) for a, t in zip(lead, (n, m)))
    return lq, lk, rng.normal(size=(*lead[2], m, e)).astype(dtype)


def performer_logs(q, k, rng, n_features=32):
    """lq = W x, lk = W y - |y|^2 / 2, x and y = D^(-1/4) q and k: positive random features."""
    x, y = (np.asarray(z, np.float64) * q.shape[-1] ** -0.25 for z in (q, k))
    w = rng.normal(size=(n_features, q.shape[-1]))
    return x @ w.T, y @ w.T - np.sum(y * y, axis=-1, keepdims=True) / 2


def of_norm(x, norm):
    return norm * x / np.linalg.norm(x, axis=-1, keepdims=True)


def families(rng, norm, n=150, d=16):
    """The hostile eight: {name: (q, k)}."""
    q, k = (rng.normal(size=(n, d)) for _ in range(2))
    e = np.eye(d)
    ramp = np.linspace(0.02, 1, n)[:, None]
    return {
        "gauss": (q * norm / np.sqrt(d), k * norm / np.sqrt(d)),
        "unit": (of_norm(q, norm), of_norm(k, norm)),
        "aligned": (np.full((n, d), norm / np.sqrt(d)), np.full((n, d), norm / np.sqrt(d)) + 0.01 * k),
        "opposed": (norm * e[0] + 0.1 * q, -norm * e[0] + 0.1 * k),
        "growing": (of_norm(q, norm), of_norm(k, norm) * ramp),
        "shrinking": (of_norm(q, norm), of_norm(k, norm) * ramp[::-1]),
        "one-hot": (norm * e[np.arange(n) % d], norm * e[np.arange(n)[::-1] % d]),
        "rotating": tuple(
            norm * np.stack([np.cos(a), np.sin(a), *[np.zeros(n)] * (d - 2)], axis=-1)
            for a in (np.arange(n) * 0.7, np.arange(n) * 1.1)
        ),
    }


FAMILIES = tuple(families(np.random.default_rng(0), 1))


def empty(lk, v):
    return loglinear.empty_state(loglinear.state_shape(lk.shape, v.shape, None), v, np)


def assert_same_sums(got, want, tolerance):
    """States of one value, 2^gauge (sums + rest), whatever their gauges."""
    assert got.gauge.shape == want.gauge.shape
    top = np.maximum(got.gauge, want.gauge)
    shifted = [
        np.ldexp(np.asarray(s.sums, np.float64) + s.rest, np.maximum(s.gauge - top, -2000)[..., None])
        for s in (got, want)
    ]
    assert_close(*shifted, tolerance)
