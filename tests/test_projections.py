"""Drawn matrices: what the arguments promise, and what they refuse. Distributions: test_statistics.py."""

from __future__ import annotations

import numpy as np
import pytest

import linattn as la

KINDS = [("orthogonal", "chi"), ("orthogonal", "sqrt"), ("iid", "chi"), ("iid", "sqrt")]
KINDS += [("simplex", "chi"), ("simplex", "sqrt"), ("hadamard", "sqrt")]


@pytest.mark.parametrize("kind, norms", KINDS)
@pytest.mark.parametrize("n_features, dim", [(1, 1), (5, 1), (3, 8), (8, 8), (21, 8), (7, 6), (64, 16)])
def test_shape_and_extension(n_features, dim, kind, norms):
    """Any number of rows; more rows extend fewer."""
    w = la.draw_projection(n_features, dim, seed=3, kind=kind, norms=norms)
    assert (w.shape, w.dtype) == ((n_features, dim), np.float64)
    assert np.all(np.isfinite(w))
    longer = la.draw_projection(n_features + 3 * dim + 1, dim, seed=3, kind=kind, norms=norms)
    np.testing.assert_array_equal(longer[:n_features], w)
    assert np.any(w != la.draw_projection(n_features, dim, seed=4, kind=kind, norms=norms)) or w.size < 4


def test_extension_beyond_one_group_of_blocks():
    from linattn import projections

    n = projections.BLOCKS_AT_ONCE * 2 + 1
    w = la.draw_projection(n, 1, seed=0, kind="iid")
    np.testing.assert_array_equal(la.draw_projection(n + 7, 1, seed=0, kind="iid")[:n], w)
    np.testing.assert_array_equal(w[-1], np.random.default_rng([projections.VERSION, 0, n - 1]).standard_normal(1))


def test_a_result_is_the_callers_own():
    w = la.draw_projection(4, 4, seed=0)
    kept = w.copy()
    w[:] = 0
    np.testing.assert_array_equal(la.draw_projection(4, 4, seed=0), kept)


@pytest.mark.parametrize("kind, norms", KINDS)
def test_lengths_of_rows(kind, norms):
    w = la.draw_projection(32, 16, seed=1, kind=kind, norms=norms)
    squares = np.sum(w * w, axis=-1)
    if norms == "sqrt":
        np.testing.assert_allclose(squares, 16, rtol=1e-13)
    else:
        assert np.ptp(squares) > 1
    for block in (w[:16], w[16:]):
        unit = block / np.linalg.norm(block, axis=-1, keepdims=True)
        cosines = (unit @ unit.T)[~np.eye(16, dtype=bool)]
        if kind in ("orthogonal", "hadamard"):
            np.testing.assert_allclose(cosines, 0, atol=1e-14)
        elif kind == "simplex":
            np.testing.assert_allclose(cosines, -1 / 15, atol=1e-14)
        else:
            assert np.max(abs(cosines)) > 0.1


def test_hadamard_is_cut_from_the_next_power_of_two():
    """Blocks of 8 rows for 6 columns."""
    w = la.draw_projection(16, 6, seed=2, kind="hadamard", norms="sqrt")
    np.testing.assert_allclose(w[:8].T @ w[:8], 8 * np.eye(6), atol=1e-13)
    assert np.max(abs(np.abs(np.sum(w * w, axis=-1) - 6))) <= 6


def test_orthogonal_is_gram_schmidt():
    """What makes the matrix the same everywhere: the columns of G, orthogonalised one after the other."""
    from linattn import projections

    rng = np.random.default_rng([projections.VERSION, 5, 0])
    g, norms = rng.standard_normal((4, 4)), np.linalg.norm(rng.standard_normal((4, 4)), axis=-1)
    rows = []
    for column in g.T:
        for _ in range(2):
            for row in rows:
                column = column - (row @ column) * row
        rows.append(column / np.linalg.norm(column))
    want = norms[:, None] * np.array(rows)
    np.testing.assert_allclose(la.draw_projection(4, 4, seed=5), want, rtol=0, atol=1e-13)


ERRORS = [
    (ValueError, r"`n_features` must be at least 1, got 0", {"n_features": 0}),
    (TypeError, r"`n_features` must be an integer, got 2.0", {"n_features": 2.0}),
    (ValueError, r"`dim` must be at least 1, got 0", {"dim": 0}),
    (ValueError, r"`seed` must be at least 0, got -1", {"seed": -1}),
    (TypeError, r"`seed` must be an integer, got None", {"seed": None}),
    (ValueError, r"`kind` must be one of 'orthogonal'.*got 'qr'", {"kind": "qr"}),
    (ValueError, r"`norms` must be one of 'chi', 'sqrt', got 'one'", {"norms": "one"}),
    (ValueError, r'`kind="hadamard"` has rows of one length only.*got \'chi\'', {"kind": "hadamard"}),
]


@pytest.mark.parametrize("kind, text, arguments", ERRORS, ids=[text for _, text, _ in ERRORS])
def test_errors(kind, text, arguments):
    arguments = {"n_features": 4, "dim": 4, "seed": 0} | arguments
    with pytest.raises(kind, match=text) as caught:
        la.draw_projection(arguments.pop("n_features"), arguments.pop("dim"), **arguments)
    assert str(caught.value).endswith(".")
