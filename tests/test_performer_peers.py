"""Performer beside performer-pytorch and google's code: what they compute, and what ours does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cases import assert_bits, assert_close, assert_gradients_close, backends_of, complex_step

import linattn as la
from linattn.audit import performer as formulas
from linattn.audit.quadratic import Formula

PEER = np.load(Path(__file__).parent / "data" / "performer_pytorch.npz")


@pytest.mark.parametrize("causal", [False, True])
def test_compatibility_form_is_the_package(causal):
    """performer-pytorch 1.1.4, from its own matrix: forward and gradients to 1e-10."""
    which = "causal" if causal else "all"
    formula = Formula(formulas.performer_pytorch, projection=PEER["projection"])
    args, d_out = [PEER[name] for name in "qkv"], PEER["d_out"]
    assert_close(formula(*args, causal=causal), PEER[f"out_{which}"], 1e-10)
    want = [PEER[f"{name}_{which}"] for name in ("d_q", "d_k", "d_v")]
    got = complex_step(lambda *moved: formula(*moved, causal=causal), args, d_out, one_by_one=True)
    assert_gradients_close(got, want, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_we_differ_from_the_package_by_its_eps(causal):
    """With its eps at 0 (and, causal, its 1e-6) the same weights; the difference falls in proportion to eps."""
    args = [PEER[name] for name in "qkv"]
    ours = la.Performer(projection=PEER["projection"])(*args, causal=causal)
    errors = []
    for eps in (1e-4, 1e-5, 1e-6):
        formula = Formula(formulas.performer_pytorch, projection=PEER["projection"], eps=eps)
        out = formula(*args, causal=False) if not causal else without_its_guard(formula, args, eps)
        errors.append(np.linalg.norm(out - ours))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)
    none = Formula(formulas.performer_pytorch, projection=PEER["projection"], eps=0.0)
    assert_close(ours, none(*args) if not causal else without_its_guard(none, args, 0.0), 1e-12)


def without_its_guard(formula, args, eps):
    """The causal form without the 1e-6 sum_r phi_q: rows made to sum to 1."""
    a = formula.weights(*args[:2], causal=True)
    return (a / np.sum(a, axis=-1, keepdims=True)) @ args[2]


def test_no_eps(rng):
    """At D = 64 and N(0, 1) the package's eps is nearly all of the mass of a key: its output is the mean of v."""
    q, k, v = rng.normal(size=(3, 256, 64))
    w = la.draw_projection(256, 64, seed=0)
    _, phi_k = formulas.plain_features(q, k, w, 1e-4)
    share = np.median(1e-4 * 256**-0.5 / phi_k)
    assert share > 0.99
    theirs = Formula(formulas.performer_pytorch, projection=w)(q, k, v)
    mean = np.broadcast_to(v.mean(0), v.shape)
    ours = la.Performer(projection=w)(q, k, v)
    assert np.linalg.norm(theirs - mean) < 0.2 * np.linalg.norm(ours - mean)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one(causal, rng):
    """Where google's guard against small denominators fires in most rows, ours are a distribution in float32 too."""
    q, k = rng.normal(size=(2, 256, 64))
    w = la.draw_projection(256, 64, seed=0)
    theirs = Formula(formulas.google_jax, projection=w).weights(q, k, causal=causal)
    assert np.median(np.sum(theirs, axis=-1)) < 0.5
    for dtype, tolerance in (("float64", 1e-13), ("float32", 1e-6)):
        a = la.Performer(projection=w).weights(q.astype(dtype), k.astype(dtype), causal=causal)
        assert np.max(abs(np.sum(a.astype("float64"), axis=-1) - 1)) < tolerance


def test_key_max_leak(rng):
    """A maximum over all keys lets the last key move earlier rows; nothing of ours does, down to the bits."""
    q, k, v = rng.normal(size=(3, 64, 64))
    w = la.draw_projection(256, 64, seed=0)
    louder = np.concatenate([k[:-1], 2 * k[-1:]])
    theirs = Formula(formulas.performer_pytorch, projection=w)
    a, b = (theirs(q, x, v, causal=True)[:-1] for x in (k, louder))
    assert np.max(abs(a - b)) > 0.01
    attend = la.Performer(projection=w)
    for backend in backends_of(attend):
        for last in (2 * k[-1:], 1e3 * k[-1:], np.full_like(k[-1:], np.nan)):
            moved = attend(q, np.concatenate([k[:-1], last]), v, causal=True, backend=backend)
            assert_bits(moved[:-1], attend(q, k, v, causal=True, backend=backend)[:-1])
