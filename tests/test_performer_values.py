"""Performer as a value: compared and stored by contents, printed as code, and what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from cases import assert_bits

import linattn as la

Q = np.random.default_rng(0).normal(size=(5, 6))
HEADS = np.random.default_rng(1).normal(size=(2, 5, 6))


def test_values_by_contents(rng):
    w = rng.normal(size=(8, 6))
    a, b = la.Performer(projection=w), la.Performer(projection=w.tolist())
    assert a == b
    assert hash(a) == hash(b)
    assert a != la.Performer(projection=w + 1e-9)
    assert a != la.Performer(8)
    assert a.n_features == 8
    assert la.Performer(projection=w, features="hyperbolic").n_features == 16
    w[:] = 0  # ours is a copy
    assert a == b
    assert np.any(a.matrix(6))
    assert replace(a, scale=2.0) == la.Performer(projection=a.projection, scale=2.0)
    other = replace(a, features="hyperbolic", n_features=None)
    assert other == la.Performer(projection=a.projection, features="hyperbolic")


def test_values_are_picklable(rng):
    q, k = rng.normal(size=(2, 9, 6))
    for attend in (la.Performer(8, seed=2), la.Performer(projection=q), la.Performer.accurate(q, k, 4)):
        again = pickle.loads(pickle.dumps(attend))
        assert again == attend
        assert hash(again) == hash(attend)
        assert_bits(again(q, k, k), attend(q, k, k))
        assert again.projection is None or not again.projection.flags.writeable


def test_repr_is_code_or_a_fingerprint(rng):
    assert repr(la.Performer()) == "Performer(256, seed=0)"
    small = la.Performer(projection=[[1.0, 0.5]], calibration=(None, [0.25, -1.0]))
    assert repr(small) == "Performer(projection=[[1.0, 0.5]], calibration=(None, [0.25, -1.0]))"
    assert eval(repr(small), vars(la)) == small
    large = la.Performer(projection=rng.normal(size=(40, 6)))
    assert repr(large).startswith("Performer(projection=<(40, 6) ")
    assert repr(large) != repr(la.Performer(projection=large.projection + 1))


def test_states_are_saved_with_their_matrices(rng, tmp_path):
    q, k, v = rng.normal(size=(3, 2, 23, 6))
    for attend in (
        la.Performer(12),
        la.Performer(projection=rng.normal(size=(2, 10, 6))),
        la.Performer.accurate(q, k, 12),
        la.Performer(12, features="sderf").calibrate(q, k),
        la.Performer(12, features="relu"),
    ):
        _, state = attend.step(q[:, :9], k[:, :9], v[:, :9], attend.init_state(k, v))
        la.save_state(tmp_path / "state.npz", state)
        again = la.load_state(tmp_path / "state.npz")
        assert again.attend == attend
        rest = [x[:, 9:] for x in (q, k, v)]
        assert_bits(attend.step(*rest, again)[0], attend.step(*rest, state)[0])
    with pytest.raises(ValueError, match="`state` was made by"):
        la.Performer(12, features="relu", seed=1).step(*rest, again)


def refused(*args, **parameters):
    return lambda: la.Performer(*args, **parameters)


def called(*args, q=Q, k=Q, **parameters):
    return lambda: la.Performer(*args, **parameters)(q, k, k)


def calibrated(q, k, **options):
    return lambda: la.Performer(8).calibrate(q, k, **options)


ERRORS = [
    (ValueError, r"`n_features` must be at least 1, got 0", refused(0)),
    (TypeError, r"`n_features` must be an integer, got 2.5", refused(2.5)),
    (ValueError, r"`n_features` must be even for features='hyperbolic', got 7", refused(7, features="hyperbolic")),
    (ValueError, r"`seed` must be at least 0, got -1", refused(seed=-1)),
    (ValueError, r"`projection` and `seed` exclude each other, got seed=0", refused(seed=0, projection=np.eye(3))),
    (ValueError, r"`n_features` must be left out .* or 3, got 4", refused(4, projection=np.eye(3))),
    (ValueError, r"`projection` must have as many columns .*D = 6, got shape \(3, 3\)", called(projection=np.eye(3))),
    (
        ValueError,
        r"`projection` must have as many columns as q and k",
        lambda: la.Performer(projection=np.eye(3)).init_state(Q, Q),
    ),
    (ValueError, r"`projection` must have at least 2 axes.*got shape \(3,\)", refused(projection=np.ones(3))),
    (ValueError, r"`projection` must have .* none of them empty", refused(projection=np.ones((0, 3)))),
    (ValueError, r"`projection` must be finite", refused(projection=[[np.nan]])),
    (TypeError, r"`projection` must hold real numbers", refused(projection=np.array([[1j]]))),
    (TypeError, r"`projection` must hold real numbers, got str", refused(projection="abc")),
    (ValueError, r"`features` must be one of 'positive'.*got 'favor'", refused(features="favor")),
    (TypeError, r"`features` must be a name or a FeatureMap, got 3", refused(features=3)),
    (ValueError, r"`kind` must be one of", refused(kind="qr")),
    (ValueError, r'`kind="hadamard"` has rows of one length only', refused(kind="hadamard")),
    (ValueError, r"`norms` must be one of", refused(norms="one")),
    (ValueError, r"`scale` must be positive and finite", refused(scale=0.0)),
    (ValueError, r"`eps` must not be negative, got -1", refused(eps=-1)),
    (TypeError, r"`eps` must be a real number, got 'safe'", refused(eps="safe")),
    (ValueError, r'`eps` must be left out for features="trig"', refused(features="trig", eps=0.1)),
    (TypeError, r"`calibration` must be \(A, c\) or \(A, c, second\), got ndarray", refused(calibration=np.eye(3))),
    (ValueError, r"`calibration: A` must be square", refused(calibration=(np.ones((2, 3)), None))),
    (ValueError, r"`calibration: A` must have an inverse", refused(calibration=(np.ones((2, 2)), None))),
    (ValueError, r"must be without a third entry for features='positive'", refused(calibration=(None, None, 1.0))),
    (
        ValueError,
        r"must be with a third entry for features='oprf'",
        refused(features="oprf", calibration=(None, [1.0])),
    ),
    (
        ValueError,
        r"`calibration: second` must be non-negative, got -1",
        refused(features="oprf", calibration=(None, None, -1.0)),
    ),
    (
        ValueError,
        r"`calibration` leaves softmax as it is, not features='relu'",
        refused(features="relu", calibration=(None, [1.0])),
    ),
    (
        ValueError,
        r"`calibration: c` must fit q and k with D = 6 channels, got shape \(3,\)",
        called(calibration=(None, np.ones(3))),
    ),
    (
        ValueError,
        r"`calibration: c` must broadcast with the leading axes of q, k and v \(2,\), got shape \(3,\)",
        called(calibration=(None, np.ones((3, 6))), q=HEADS, k=HEADS),
    ),
    (
        ValueError,
        r"has features fitted to data: use the value that `.calibrate\(q, k\)` gives",
        called(features="oprf"),
    ),
    (ValueError, r"has features fitted to data", lambda: la.Performer(features="sderf").init_state(Q, Q)),
    (
        ValueError,
        r"cannot be calibrated: its kernel is not softmax's",
        lambda: la.Performer(features="relu").calibrate(Q, Q),
    ),
    (ValueError, r"`k` must vary over its visible tokens in every head", calibrated(Q, np.ones_like(Q))),
    (ValueError, r"`q` must vary over its visible tokens", calibrated(Q[:0], Q)),
    (ValueError, r"`q` must vary over its visible tokens", calibrated(HEADS[:0], HEADS[:0])),
    (ValueError, r"`rule` must be one of", calibrated(Q, Q, rule="best")),
    (ValueError, r"`q` must vary", lambda: la.Performer.accurate(np.zeros_like(Q), Q)),
]


@pytest.mark.parametrize("kind, text, call", ERRORS, ids=[text for _, text, _ in ERRORS])
def test_errors(kind, text, call):
    with np.errstate(all="ignore"), pytest.raises(kind, match=text) as caught:
        call()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
