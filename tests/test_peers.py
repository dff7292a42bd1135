"""Failures of other projects, each as it was met there: a scenario on which their code goes wrong and ours must not.

Named after the project and the number of its report, or a word for it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from cases import (
    COMPLEX_STEP,
    LENGTH,
    MAIN,
    TOLERANCE,
    Case,
    assert_bits,
    assert_close,
    assert_gradients_close,
    backends_of,
    complex_step,
    numpy_of,
    rounded,
    state_with,
    value_of,
    values_on_backends,
)

import linattn as la

LINEAR = [la.Linear(), la.CosFormer(LENGTH)]
ON_MAIN = pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
ON_LINEAR = pytest.mark.parametrize("attend, backend", values_on_backends(LINEAR))


# -- flash-linear-attention -------------------------------------------------------------------------------------


@ON_MAIN
def test_fla_594_normaliser_summed_over_heads(attend, backend, rng):
    """The denominator is each head's own: ten times the keys of one head leave the other as it was."""
    case = Case(attend, causal=True, lead=((2, 3),) * 3)
    (q, k, v), options = case.draw(rng)
    moved = k.copy()
    moved[:, 1] *= 10
    out, after = (attend(q, x, v, **options, backend=backend) for x in (k, moved))
    assert_bits(after[:, [0, 2]], out[:, [0, 2]])
    assert_close(out, case.formula(q, k, v, **options))


@ON_MAIN
def test_fla_851_cumulated_along_the_wrong_axis(attend, backend, rng):
    """As many tokens as heads or channels: only the token axis is summed along."""
    case = Case(attend, causal=True, n=4, m=4, d=4, e=4, lead=((4, 4),) * 3)
    args, options = case.draw(rng)
    assert_close(attend(*args, **options, backend=backend), case.formula(*args, **options))


@ON_MAIN
def test_fla_875_gradient_of_k_without_the_denominator(attend, backend, rng):
    """d_k through the denominator: with it, a constant v has no gradient of q and k; without, it is that of the sum."""
    case = Case(attend, causal=True)
    (q, k, v), options = case.draw(rng)
    d_out = case.cotangent(rng)
    got = attend.vjp(q, k, v, **options, backend=backend)[1](d_out)
    assert_close(
        got[1], complex_step(lambda *moved: case.formula(*moved, **options), (q, k, v), d_out)[1], COMPLEX_STEP
    )
    flat = attend.vjp(q, k, np.ones_like(v), **options, backend=backend)[1](d_out)
    assert np.max(abs(flat[1])) <= COMPLEX_STEP * np.max(abs(got[1]))


@ON_MAIN
@pytest.mark.parametrize("causal", [False, True])
def test_fla_1263_padding_in_the_denominator(attend, backend, causal, rng):
    """Zeros behind a sequence count as keys under elu + 1, unless the mask says otherwise."""
    case = Case(attend, causal=causal, n=9, m=9)
    args, options = case.draw(rng)
    want = attend(*args, **options, backend=backend)
    padded = [np.concatenate([x, np.zeros_like(x[:, :4])], axis=1) for x in args]
    mask = np.arange(13) < 9
    out = attend(*padded, **options, key_mask=mask, backend=backend)
    assert_close(out[:, :9], want)


@pytest.mark.parametrize("backend", backends_of(la.Linear()))
def test_fla_naive_rows_that_sum_to_a_thousandth(backend, rng):
    """elu(x) + 1 at -16 in float32 has three digits left, and an eps beside it eats the rest: v = 1 must give 1."""
    q, k = (rng.uniform(-17, -15, (2, 40, 8)).astype("float32") for _ in range(2))
    out = la.Linear()(q, k, np.ones((2, 40, 1), "float32"), causal=True, backend=backend)
    assert np.all(abs(out - 1) <= TOLERANCE["float32"])


@ON_MAIN
def test_fla_naive_float64_done_in_float32(attend, backend, rng):
    case = Case(attend, causal=True, n=30, m=30)
    args, options = case.draw(rng)
    out, backward = attend.vjp(*args, **options, backend=backend)
    d_out = case.cotangent(rng)
    assert_close(out, case.formula(*args, **options))
    assert_gradients_close(backward(d_out), complex_step(lambda *moved: case.formula(*moved, **options), args, d_out))
    narrow = [x.astype("float32").astype("float64") for x in args]
    assert np.any(attend(*narrow, **options, backend=backend) != out)


@ON_MAIN
@pytest.mark.parametrize("n", [63, 65, 127, 130])
def test_fla_naive_and_lucidrains_lengths_that_are_no_multiple(attend, backend, n, rng):
    """65 tokens are not 64 and not an error."""
    case = Case(attend, causal=True, n=n, m=n)
    args, options = case.draw(rng)
    assert_close(attend(*args, **options, backend=backend), case.formula(*args, **options))


# -- fast-transformers, mamba -----------------------------------------------------------------------------------


@ON_MAIN
def test_fast_transformers_cotangent_without_strides(attend, backend, rng):
    """The cotangent of a sum is one number shown everywhere: all its strides are 0."""
    case = Case(attend, causal=True)
    args, options = case.draw(rng)
    d_out = np.broadcast_to(1.0, case.out_shape)
    assert set(d_out.strides) == {0}
    got = attend.vjp(*args, **options, backend=backend)[1](d_out)
    assert_gradients_close(
        got, complex_step(lambda *moved: case.formula(*moved, **options), args, np.ones(d_out.shape))
    )


def test_fast_transformers_keys_cut_to_the_queries(rng):
    """Causal with more keys than queries is refused, not answered for the first keys."""
    q, k = rng.normal(size=(4, 3)), rng.normal(size=(9, 3))
    for attend in MAIN:
        with pytest.raises(ValueError, match=r"`causal` needs as many queries as keys, got N = 4 and M = 9"):
            attend(q, k, k, causal=True)


@ON_LINEAR
def test_mamba_cotangent_of_the_last_state_dropped(attend, backend, rng):
    """A loss on the state alone has gradients of k and v."""
    (q, k, v), _ = Case(attend, causal=True).draw(rng)
    out, state, backward = attend.step_vjp(q, k, v, attend.init_state(k, v), backend=backend)
    d_sums = rng.normal(size=state.arrays.sums.shape)
    d_q, d_k, d_v, _ = backward(np.zeros_like(out), state_with(state, sums=d_sums))
    assert not d_q.any()
    h = 2.0**-20
    for got, i in ((d_k, 1), (d_v, 2)):
        u = rng.normal(size=got.shape)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * h * u if j == i else x for j, x in enumerate((q, k, v))]
            ends.append(np.sum(d_sums * value_of(attend.step(*moved, attend.init_state(k, v), backend=backend)[1])))
        want = (ends[0] - ends[1]) / (2 * h)
        assert abs(np.sum(got * u) - want) <= 1e-8 * np.sum(abs(got * u))


# -- Performer's implementations --------------------------------------------------------------------------------


@ON_MAIN
def test_performer_pytorch_maximum_over_all_keys(attend, backend, rng):
    """The last key times three moves no earlier row."""
    case = Case(attend, causal=True, n=30, m=30)
    (q, k, v), options = case.draw(rng)
    out = attend(q, k, v, **options, backend=backend)
    k = k.copy()
    k[:, -1] *= 3
    assert_bits(attend(q, k, v, **options, backend=backend)[:, :-1], out[:, :-1])


@pytest.mark.parametrize("norm", [8, 50])
@ON_MAIN
def test_performer_pytorch_constants_in_the_features(attend, backend, norm, rng):
    """Long queries and keys give neither the mean of v nor zero gradients, in 32 bits and in 16."""
    case = Case(attend, n=20, m=20, d=16)
    (q, k, v), options = case.draw(rng)
    q, k = (norm * x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    for dtype in ("float32", "float16"):
        args = [rounded(x, dtype) for x in (q, k, v)]
        out, backward = attend.vjp(*args, **options, backend=backend)
        want = case.formula(*args, **options)
        scores = norm**2 / 4 if isinstance(attend, la.Softmax) else 1.0  # their rounding is the weights' error
        assert_close(out, want, (TOLERANCE["float32"] if dtype == "float32" else 2.0**-11) * (1 + scores / 8))
        assert np.linalg.norm(out.astype("float64") - v.mean(axis=1, keepdims=True)) > 0.05 * np.linalg.norm(v)
        d_q, d_k, d_v = backward(np.ones_like(out))
        assert all(np.isfinite(x).all() and x.any() for x in (d_q, d_k, d_v))


@ON_MAIN
def test_google_research_mask_on_the_values_only(attend, backend, rng):
    """A hidden key is not in the denominator either: v = 1 gives 1, whatever the key holds."""
    case = Case(attend, causal=True, masked=True)
    (q, k, v), options = case.draw(rng)
    ones = attend(q, k, np.ones_like(v), **options, backend=backend)
    assert np.all((abs(ones - 1) < 1e-13) | (ones == 0))
    moved = np.where(options["key_mask"][..., None], k, 1e3)
    assert_bits(attend(q, moved, v, **options, backend=backend), attend(q, k, v, **options, backend=backend))


@ON_MAIN
def test_google_research_what_a_batch_does_to_its_members(attend, backend, rng):
    """An entry's result does not depend on who else is in the batch: nothing is drawn from the data."""
    case = Case(attend, causal=True, lead=((4,),) * 3)
    args, options = case.draw(rng)
    out = attend(*args, **options, backend=backend)
    for i in range(4):
        assert_bits(attend(*(x[i : i + 1] for x in args), **options, backend=backend), out[i : i + 1])


# -- linear-attention-transformer -------------------------------------------------------------------------------


@ON_MAIN
def test_linear_attention_transformer_mask_written_into_the_callers_arrays(attend, backend, rng):
    case = Case(attend, causal=True, masked=True)
    args, options = case.draw(rng)
    kept = [x.copy() for x in (*args, options["key_mask"])]
    out, backward = attend.vjp(*args, **options, backend=backend)
    backward(out)
    for x, y in zip((*args, options["key_mask"]), kept, strict=True):
        assert_bits(x, y)


@ON_MAIN
@pytest.mark.parametrize("n", [1, 64, 65])
def test_linear_attention_transformer_rows_that_sum_to_six_hundredths(attend, backend, n, rng):
    """v = 1 gives 1, not causal as well as causal."""
    (q, k, v), _ = Case(attend, n=n, m=n, d=16).draw(rng)
    for causal in (False, True):
        out = attend(abs(q), abs(k), np.ones_like(v), causal=causal, backend=backend)
        assert np.all(abs(out - 1) <= 1e-13)


# -- torch ------------------------------------------------------------------------------------------------------


@ON_MAIN
def test_torch_sdpa_nan_in_the_last_value_ruins_all_rows(attend, backend, rng):
    """64 of 64 there; here the one row that sees it, and of that the one column."""
    case = Case(attend, causal=True, n=64, m=64)
    (q, k, v), options = case.draw(rng)
    q, k = abs(q), abs(k)
    clean = attend(q, k, v, **options, backend=backend)
    v[0, -1, 2] = np.nan
    out = attend(q, k, v, **options, backend=backend)
    assert np.argwhere(np.isnan(out)).tolist() == [[0, 63, 2]]
    assert_close(np.where(np.isnan(out), 0, out), np.where(np.isnan(out), 0, clean), 1e-14)


@pytest.mark.torch
@pytest.mark.parametrize("causal", [False, True])
def test_torch_sdpa_is_our_softmax(causal, rng):
    """Where it is right it is an oracle: exact attention of somebody else."""
    import torch

    case = Case(la.Softmax(), causal=causal, n=20, m=20)
    args, options = case.draw(rng)
    tensors = [torch.tensor(x, requires_grad=True) for x in args]
    want = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
    d_out = case.cotangent(rng)
    grads = torch.autograd.grad(want, tensors, torch.tensor(d_out))
    for backend in backends_of(case.attend):
        out, backward = case.attend.vjp(*args, **options, backend=backend)
        assert_close(out, numpy_of(want))
        assert_gradients_close(backward(d_out), [numpy_of(g) for g in grads])


# -- the authors' cosFormer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends_of(la.CosFormer()))
def test_cosformer_negative_weight_at_the_end(backend):
    """cos(pi / 2) in float32 is -4.4e-8 there: two tokens `length` apart have weight 0 and nothing below it."""
    for length in (1, 2, 3, 64, 1000, 4096):
        attend = la.CosFormer(length)
        x = np.ones((1, 2), "float32")
        pair = (np.array([0]), np.array([length]))
        assert attend.weights(x, x, positions=pair).item() == 0
        assert attend(x, x, x, positions=pair, backend=backend).tolist() == [[0, 0]]
        assert np.all(la.CosFormer(length, normalize=False)(x, x, x, positions=pair, backend=backend) == 0)


@pytest.mark.parametrize("backend", backends_of(la.CosFormer()))
def test_cosformer_small_inputs_are_clamped_away(backend, rng):
    """q and k times 1e-3 change the result by a third there, by nothing here."""
    case = Case(la.CosFormer(LENGTH), causal=True)
    (q, k, v), options = case.draw(rng)
    out, small = (case.attend(q * c, k * c, v, **options, backend=backend) for c in (1.0, 1e-3))
    assert_close(small, out)


@pytest.mark.parametrize("backend", backends_of(la.CosFormer()))
def test_cosformer_earlier_rows_change_as_the_sequence_grows(backend, rng):
    """The length follows the input there; here causal use without a length is refused, and with one nothing moves."""
    case = Case(la.CosFormer(LENGTH), causal=True, n=64, m=64)
    args, _ = case.draw(rng)
    whole = case.attend(*args, causal=True, backend=backend)
    assert_close(case.attend(*(x[:, :32] for x in args), causal=True, backend=backend), whole[:, :32])
    with pytest.raises(ValueError, match="`length`"):
        la.CosFormer()(*args, causal=True, backend=backend)


def test_cosformer_value_defaults_to_the_query(rng):
    """There v=None takes the query; here nothing stands for what was not given."""
    q, k = rng.normal(size=(2, 5, 3))
    with pytest.raises(TypeError):
        la.CosFormer(8)(q, k)
    with pytest.raises(TypeError, match="`v` must be an array, got NoneType"):
        la.CosFormer(8)(q, k, None)


@pytest.mark.parametrize("backend", backends_of(la.CosFormer()))
def test_cosformer_one_query_against_a_cache(backend, rng):
    """Decoding there puts the query at position 1 and makes the cache's length the cosine's: another function."""
    case = Case(la.CosFormer(LENGTH), causal=True)
    (q, k, v), options = case.draw(rng)
    want = case.formula(q, k, v, **options)
    state = case.attend.init_state(k, v)
    for t in range(case.n):
        one = slice(t, t + 1)
        out, state = case.attend.step(q[:, one], k[:, one], v[:, one], state, backend=backend)
        assert_close(out, want[:, one])
    pair = (np.array([case.n - 1]), np.arange(case.m))
    assert_close(case.attend(q[:, -1:], k, v, positions=pair, backend=backend), want[:, -1:])


def test_cosformer_positions_in_sixteen_bits(rng):
    """An index in q's own dtype is infinite from 41 712 in float16, and one of 748 values of 4096 in bfloat16."""
    n = 50_000
    attend = la.CosFormer(n, normalize=False)
    for dtype in ("float16", "bfloat16"):
        x = rounded(np.ones((2, 1)), dtype)
        p = np.array([n - 3, n])
        got = attend.weights(x, x, positions=p).astype("float64")
        want = np.cos(np.pi * (p[:, None] - p) / (2 * n))
        assert_close(got, want, 2.0**-8)
        late = attend.weights(x[:1], x, positions=(np.array([0]), p)).astype("float64")
        assert late[0, 0] > 0 == late[0, 1]
        assert abs(late[0, 0] / np.cos(np.pi * p[0] / (2 * n)) - 1) <= 2.0**-8


# -- what programs with compiled kernels met --------------------------------------------------------------------


def python(code, **environment):
    """What `code` prints in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


CALL = (
    "import numpy as np, linattn as la\n"
    "q, k, v = np.random.default_rng(0).normal(size=(3, 4, 70, 8)).astype('float32')\n"
    "def run():\n"
    "    out, backward = la.CosFormer(512).vjp(q, k, v, causal=True)\n"
    "    return b''.join(x.tobytes() for x in (out, *backward(v)))\n"
)


def test_umap_707_two_threads_at_once_abort():
    """Numba's workqueue layer ends the process when two Python threads enter it."""
    code = CALL + (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    got = set(pool.map(lambda _: run(), range(32)))\n"
        "print(len(got), got == {run()})\n"
    )
    assert python(code).split() == ["1", "True"]


def test_numba_8563_a_child_after_the_first_call_is_killed():
    """OpenMP's threads do not survive a fork; a child computes the same bits."""
    code = CALL + (
        "import os, sys, warnings\n"
        "if not hasattr(os, 'fork'):\n"
        "    sys.exit(print(0))\n"
        "warnings.simplefilter('ignore')\n"
        "want = run()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if run() == want else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert python(code).split() == ["0"]


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_stumpy_858_division_by_zero_raises(attend):
    """0/0 of a serial kernel is Python's ZeroDivisionError by default; here a row without weight is 0."""
    q, k, v = np.zeros((3, 5, 2))
    mask = np.zeros(5, dtype=bool)
    for backend in backends_of(attend):
        out, backward = attend.vjp(q, k, v + 1, key_mask=mask, backend=backend)
        assert not out.any()
        assert not any(x.any() for x in backward(v + 1))
