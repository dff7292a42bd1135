"""Sequence parallelism: any cut over ranks is the whole, forward and backward, and no fault hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cases import SQUARE, Case, assert_bits, assert_close, assert_gradients_close

import linattn as la
from linattn import distributed
from linattn.audit.measure import relative_error
from linattn.backends.numba import linear_halves
from linattn.distributed import communicators, exchange
from linattn.engines import log_features

VALUES = [
    la.Linear(),
    la.Linear("relu", normalize=False),
    la.Linear(eps=("clamp", 25.0)),
    la.Linear(SQUARE),
    la.CosFormer(64),
    la.CosFormer(64, eps=("add", 0.5)),
    la.Linear("exp"),
    la.Performer(12, seed=0),
    la.Performer(12, features="relu"),
    la.LLN(alpha=(30.0, 0.5), beta=(20.0, 0.6)),  # the gauges of a sharp head are far apart
]
CUTS = [[0, 11], [0, 5, 11], [0, 0, 4, 4, 11], [0, 1, 2, 3, 11, 11]]
MPIEXEC = Path(sysconfig.get_path("scripts")) / "mpiexec"
SECONDS = 120


def cut(x, edges, rank, axis=-2):
    return x[(..., slice(edges[rank], edges[rank + 1]), *[slice(None)] * (-axis - 1))]


def on_ranks(attend, args, d_out, edges, key_edges=None, key_mask=None, scan=None, **options):
    """out and gradients, each joined over the ranks; the communicators too."""
    key_edges = key_edges or edges

    def rank(comm):
        q, k, v = (cut(x, e, comm.rank) for x, e in zip(args, (edges, key_edges, key_edges), strict=True))
        mask = None if key_mask is None else cut(key_mask, key_edges, comm.rank, axis=-1)
        out, backward = distributed.vjp(q, k, v, attend, comm, key_mask=mask, **options)
        return out, *backward(cut(d_out, edges, comm.rank)), comm

    *arrays, comms = zip(*distributed.run_local(len(edges) - 1, rank, scan=scan), strict=True)
    return [np.concatenate(x, axis=-2) for x in arrays], comms


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend", VALUES, ids=repr)
def test_ranks_are_one_process(attend, causal, rng):
    """For uneven shards and empty ranks, masked and not, gathered and scanned, in both rooms."""
    runs = [("numba", edges, i % 2 == 1, None) for i, edges in enumerate(CUTS)]
    runs += [("numba", CUTS[2], False, "exscan"), ("reference", CUTS[2], True, "exscan")]
    for backend, edges, masked, scan in runs:
        case = Case(attend, causal=causal, masked=masked)
        args, options = case.draw(rng)
        d_out = case.cotangent(rng)
        want, backward = attend.vjp(*args, **options)
        mask = options.get("key_mask")
        options = {"causal": causal, "key_mask": mask, "backend": backend, "scan": scan}
        (out, *grads), _ = on_ranks(attend, args, d_out, edges, **options)
        assert_close(out, want)
        assert_gradients_close(grads, backward(d_out), 1e-13)


def test_long_shards_go_piece_by_piece(monkeypatch, rng):
    """The log-linear engine's keys alone, which no query of their rank reads."""
    monkeypatch.setattr(log_features, "PIECE", 4)
    monkeypatch.setattr(log_features, "WHOLE", 0)
    args, d_out = rng.normal(size=(3, 2, 23, 4)), rng.normal(size=(2, 23, 4))
    for attend in (la.LLN(alpha=(30.0, 0.5), beta=(20.0, 0.6)), la.Performer(12, seed=0), la.Performer(12, eps=0.1)):
        want, backward = attend.vjp(*args, causal=True)
        (out, *grads), _ = on_ranks(attend, args, d_out, [0, 9, 17, 23], causal=True)
        assert_close(out, want)
        assert_gradients_close(grads, backward(d_out), 1e-13)


HALVED = [la.Linear(), la.CosFormer(512), la.Linear("relu", normalize=False), la.Linear(eps=("clamp", 2.0))]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("attend", [*HALVED, la.Linear(eps=("add", 0.5))], ids=repr)
def test_the_halves_are_the_backward(attend, dtype, rng):
    """Bit by bit for the gradients; what reaches the incoming state is the same sum in another order."""
    q, k, v, d_out = rng.normal(size=(4, 3, 141, 5)).astype(dtype)
    call, _ = attend._checked(q, k, v, True, rng.random((3, 141)) > 0.3, None, None, np)
    state = attend._forward(q, k, v, None, call, None)[1]
    _, _, ((*_, den), options, room) = attend._forward(q, k, v, state, call, None)
    given = {**options._asdict(), "feature_map": options.feature_map.name}
    d_state = rng.normal(size=state.sums.shape).astype(state.sums.dtype)
    want = room.backward(d_out, d_state, q, k, v, state, den, **given, out=None, xp=np)
    reached = room.backward(d_out, None, q, k, v, state, den, **given, out=None, xp=np)[3]
    assert linear_halves.serves(d_out, q, k, v, **given)
    d_q, h, found = linear_halves.to_queries(d_out, q, k, v, state, den, **given, reach=True)
    grads = d_q, *linear_halves.to_keys(d_out, d_state, q, k, v, state, den, h, **given)
    for x, y in zip(grads, want, strict=False):
        assert_bits(x, y)
    assert relative_error(found, reached) < (1e-14 if dtype == "float64" else 1e-6)


def test_the_halves_leave_shared_heads_to_others(rng):
    q, k = rng.normal(size=(2, 3, 7, 4)), rng.normal(size=(2, 1, 7, 4))
    options = {"turns": None, "key_mask": None, "normalize": True, "eps": "safe", "feature_map": "elu1"}
    assert linear_halves.serves(q, q, q, q, span="past", **options)
    assert not linear_halves.serves(q, q, k, k, span="past", **options)
    assert not linear_halves.serves(q, q, q, q, span="all", **options)


def test_cross_attention_is_cut_on_both_sides(rng):
    case = Case(la.CosFormer(64), n=7, m=11)
    args, _ = case.draw(rng)
    d_out = case.cotangent(rng)
    want, backward = case.attend.vjp(*args)
    (out, *grads), _ = on_ranks(case.attend, args, d_out, [0, 3, 3, 7], [0, 1, 9, 11])
    assert_close(out, want)
    assert_gradients_close(grads, backward(d_out), 1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_shared_heads(causal, rng):
    """Leading axes broadcast; also values shared by several heads of keys."""
    args = [rng.normal(size=(*lead, 11, 4)) for lead in ((2, 3), (2, 1), ())]
    d_out = rng.normal(size=(2, 3, 11, 4))
    want, backward = la.Linear().vjp(*args, causal=causal)
    (out, *grads), _ = on_ranks(la.Linear(), args, d_out, [0, 4, 11], causal=causal)
    assert_close(out, want)
    assert_gradients_close(grads, backward(d_out), 1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend", [la.Linear(), la.CosFormer(512), la.LLN(alpha=0.8, beta=0.6)], ids=repr)
def test_values_far_from_zero_keep_their_gradients(attend, causal, rng):
    """float32, values 1000 + noise: as in one process, nothing cancels on the way between ranks."""
    q, k, v, d_out = rng.normal(size=(4, 2, 300, 16))
    args = [x.astype("float32") for x in (q, k, 1000 + v)]
    exact = attend.vjp(*(x.astype("float64") for x in args), causal=causal)[1](
        d_out.astype("float32").astype("float64")
    )
    (_, *grads), _ = on_ranks(attend, args, d_out.astype("float32"), [0, 70, 200, 300], causal=causal)
    assert [x.dtype for x in grads] == ["float32"] * 3
    for got, want in zip(grads, exact, strict=True):
        assert relative_error(got, want) < 2e-6


def test_array_libraries_other_than_numpy(rng):
    """States cross on the host and come back in the library of the shards."""
    import array_api_strict as xp

    args = rng.normal(size=(3, 2, 11, 4))
    want = la.CosFormer(64)(*args, causal=True)

    def rank(comm):
        mine = [xp.asarray(np.array(cut(x, [0, 4, 11], comm.rank))) for x in args]
        return distributed.attention(*mine, la.CosFormer(64), comm, causal=True)

    parts = distributed.run_local(2, rank)
    assert_close(np.concatenate([np.asarray(x) for x in parts], axis=-2), want)


def test_bytes_do_not_grow_with_the_sequence(rng):
    sent = []
    for n in (20, 200):
        args, d_out = rng.normal(size=(3, 2, n, 4)), rng.normal(size=(2, n, 4))
        _, comms = on_ranks(la.Linear(), args, d_out, [0, n // 2, n], causal=True)
        sent.append({comm.bytes_sent for comm in comms})
    state = 2 * 2 * 4 * 5 * 8  # sums and rest, heads, R, E + 1, bytes
    assert sent[0] == sent[1] == {3 * exchange.TEXT + 16 + 2 * state}


def test_states_are_gathered_while_they_fit(monkeypatch):
    """Gathering holds the states of all ranks; beyond that a scan holds two."""
    comm = distributed.LocalComm(0, 8, [], None)
    assert comm.gathers(1 << 23)
    assert not comm.gathers((1 << 23) + 1)
    comm.scan = "exscan"
    assert not comm.gathers(1)


def test_a_scan_holds_fewer_bytes(rng):
    args, d_out = rng.normal(size=(3, 2, 24, 4)), rng.normal(size=(2, 24, 4))
    held = {}
    for scan in ("gather", "exscan"):
        _, comms = on_ranks(la.Linear(), args, d_out, [0, 3, 6, 9, 12, 15, 18, 21, 24], scan=scan, causal=True)
        held[scan] = max(comm.bytes_received for comm in comms)
    state = 2 * 2 * 4 * 5 * 8
    assert held["gather"] == 7 * (3 * exchange.TEXT + 16 + 2 * state)
    assert held["exscan"] == 7 * (exchange.TEXT + 16 + 2 * 2) + 4 * state  # flags; scan and total, twice


def test_a_failure_is_heard_before_a_scan(rng):
    q, heard = rng.normal(size=(2, 6, 4)), {}

    def rank(comm):
        try:
            distributed.attention(q, q, q, la.CosFormer(10), comm)
        except Exception as error:
            heard[comm.rank] = error

    distributed.run_local(3, rank, scan="exscan")
    assert isinstance(heard[1], ValueError)
    assert "rank 1 failed" in str(heard[0])


def test_a_device_is_waited_for_before_its_memory_is_handed_on(monkeypatch):
    """By a stand-in for CuPy: MPI does not know of streams."""
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(True))
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    communicators._wait(type("ndarray", (), {"__module__": "cupy"})())
    communicators._wait(np.zeros(1))
    assert waited == [True]


def test_device_arrays_need_a_transport_for_them(rng):
    comm = distributed.LocalComm(0, 1, [], None)
    with pytest.raises(TypeError, match="LocalComm cannot hand on arrays of a device"):
        comm.allgather_device(rng.normal(size=3), np)


# ------------------------------------------------------------------------------------------------- faults


def refused(function, size=2):
    with pytest.raises(Exception) as caught:  # each caller looks at type and text
        distributed.run_local(size, function)
    return caught.value


def test_ranks_that_disagree(rng):
    q = rng.normal(size=(2, 6, 4))
    for change, text in (
        (lambda x, r: x[: 2 - r], "heads"),
        (lambda x, r: x.astype("float32") if r else x, "float32"),
        (lambda x, r: x[..., : 4 - r], "D 3"),
    ):
        error = refused(lambda comm, f=change: distributed.attention(*[f(q, comm.rank)] * 3, la.Linear(), comm))
        assert isinstance(error, ValueError)
        assert text in str(error)
        assert "Shards must agree in all but their tokens, got rank 0" in str(error)
    error = refused(lambda comm: distributed.attention(q, q, q, la.Linear(), comm, causal=comm.rank == 0))
    assert "causal=False" in str(error)


def test_a_rank_that_is_refused_takes_the_others_along(rng):
    q = rng.normal(size=(2, 6, 4))
    heard = {}

    def rank(comm):
        try:
            return distributed.attention(q, q if comm.rank else q[:, :3], q, la.Linear(), comm, causal=True)
        except ValueError as error:
            heard[comm.rank] = str(error)

    distributed.run_local(3, rank)
    assert "same number of tokens" in heard[0]
    assert heard[1] == heard[2]
    assert heard[1].startswith("rank 0 was refused, so no rank goes on: ValueError: k and v must have")


def test_positions_beyond_the_length_on_the_last_rank(rng):
    q, heard = rng.normal(size=(2, 6, 4)), {}

    def rank(comm):
        try:
            distributed.attention(q, q, q, la.CosFormer(10), comm)
        except Exception as error:
            heard[comm.rank] = error

    distributed.run_local(3, rank)
    assert isinstance(heard[1], ValueError)
    assert isinstance(heard[0], RuntimeError)
    assert "rank 1 failed" in str(heard[0])
    assert "outside 0 .. length=10" in str(heard[0])


def test_a_wrong_cotangent_on_one_rank(rng):
    q, heard = rng.normal(size=(2, 6, 4)), {}

    def rank(comm):
        _, backward = distributed.vjp(q, q, q, la.Linear(), comm, causal=True)
        try:
            backward(q if comm.rank else q[:, :2])
        except Exception as error:
            heard[comm.rank] = error

    distributed.run_local(2, rank)
    assert "`d_out` must have the shape" in str(heard[0])
    assert "rank 0 failed" in str(heard[1])


def test_refusals(rng):
    q = rng.normal(size=(2, 6, 4))
    for error, text, arguments in (
        (TypeError, "`comm` must be an MPIComm or a LocalComm, got str", (q, la.Linear(), "world")),
        (ValueError, "`Softmax()` cannot run on many processes", (q, la.Softmax(), None)),
        (TypeError, "`mechanism` must be a value", (q, "linear", None)),
        (ValueError, "cannot stream", (q, la.CosFormer(), None)),
        (TypeError, "`q` must be an array", (None, la.Linear(), None)),
    ):
        x, attend, comm = arguments
        came = refused(lambda c, x=x, a=attend, comm=comm: distributed.attention(x, x, x, a, comm or c))
        assert isinstance(came, error)
        assert text in str(came)
    with pytest.raises(ValueError, match="`size` must be at least 1"):
        distributed.run_local(0, print)


def test_threads_that_do_not_meet_give_up(monkeypatch):
    monkeypatch.setattr(communicators, "WAIT", 0.2)
    error = refused(lambda comm: comm.allgather(np.zeros(1)) if comm.rank else None)
    assert type(error).__name__ == "BrokenBarrierError"


def test_mpi_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"pip install linattn\[mpi\]"):
        distributed.MPIComm()


# ---------------------------------------------------------------------------------------------------- MPI


def mpi(size, what):
    program = Path(__file__).with_name("mpi_program.py")
    root = str(program.parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [MPIEXEC if MPIEXEC.exists() else "mpiexec", "-n", str(size), sys.executable, program, what]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)


@pytest.mark.mpi4py
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("what", ["same_as_one_process", "wrong_kind"])
def test_mpi(size, what):
    run = mpi(size, what)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": ok") == size


@pytest.mark.mpi4py
@pytest.mark.parametrize("size, what", [(4, "scanned"), (3, "order")])
def test_mpi_scans_by_the_engines_merge(size, what):
    run = mpi(size, what)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": ok") == size


@pytest.mark.mpi4py
@pytest.mark.torch
def test_mpi_is_handed_the_buffers_of_another_library():
    """Tensors on the CPU stand for arrays of a device: their own memory goes to MPI."""
    run = mpi(2, "device_buffers")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.mpi4py
def test_mpi_shards_that_disagree():
    run = mpi(2, "disagree")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.mpi4py
@pytest.mark.parametrize("size", [2, 4])
def test_mpi_a_failing_rank_ends_the_job(size):
    run = mpi(size, "fail")
    assert run.returncode != 0
    assert "rank out of memory on purpose" in run.stderr


# -------------------------------------------------------------------------------------------------- recipes


@pytest.mark.torch
def test_gloo(tmp_path):
    program, root = Path(__file__).with_name("gloo_program.py"), str(Path(la.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    commands = [[sys.executable, program, str(rank), "2", str(tmp_path / "meet")] for rank in range(2)]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(c, stdout=pipe, stderr=pipe, text=True, env=environment) for c in commands]
    said = [run.communicate(timeout=SECONDS) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert all(out.endswith("ok") for out, _ in said)


@pytest.mark.jax
def test_shard_map():
    program, root = Path(__file__).with_name("shard_map_program.py"), str(Path(la.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    run = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=2 * SECONDS, check=False, env=environment
    )
    assert (run.returncode, run.stdout) == (0, "ok"), run.stderr


@pytest.mark.dask
def test_dask_takes_heads_a_block_at_a_time(rng):
    import dask.array as da

    q, k, v = rng.normal(size=(3, 6, 20, 4))
    blocks = (da.from_array(x, chunks=(2, 20, 4)) for x in (q, k, v))
    got = da.map_blocks(la.Linear(), *blocks, causal=True, dtype=q.dtype).compute(scheduler="synchronous")
    assert_close(got, la.Linear()(q, k, v, causal=True))
