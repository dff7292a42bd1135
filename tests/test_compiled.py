"""What only the compiled kernels promise: their machine code, number formats, threads, a cache that never hurts."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numba import njit

import linattn as la
from linattn.backends.numba import _jit, _maps, _products, _rows, _vector
from linattn.backends.numba.threads import number, run

ROOT = Path(la.__file__).parents[1]
EXACT = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def program(source, **variables):
    """Run a program of its own and return the finished process, its text decoded."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    source = textwrap.dedent(source)
    return subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=300)


# -- machine code -----------------------------------------------------------------------------------------------

ASSEMBLY = """
    import numpy as np
    from numba import njit, types
    from linattn.backends.numba import _products, _rows, _tiles, _vector

    advance, relu, pointer = _products.advance, _rows.copy_rows, _vector.pointer

    def sweep(q, k, v, s, w, y):
        S, Y = pointer(s), pointer(y)
        advance(24, 2, 64, 4096, pointer(q), 0, 64, pointer(k), 0, 64, pointer(v), 0, 64, S, 0, 64,
                pointer(w), 0, 0, Y, 0, 64, Y, 0, 64)

    compiled = njit(error_model="numpy", fastmath={"contract"})(sweep)
    compiled.compile((types.Array(types.%s, 1, "C"),) * 6)
    print(_tiles.TILE.unit)
    print(next(iter(compiled.inspect_asm().values())))
"""
# a machine as Numba's variables describe it: its unit, and its packed multiply-adds of the widest register
UNITS = {
    "avx512": (
        "skylake-avx512",
        "+avx512f,+avx512vl,+avx512dq,+avx512bw,+avx2,+avx,+fma,+f16c",
        r"vfn?madd\w+p[sd]\s.*%zmm",
    ),
    "avx2": ("haswell", "+avx2,+avx,+fma,+f16c", r"vfn?madd\w+p[sd]\s.*%ymm"),
    "portable": ("x86-64", "", r"mulp[sd]\s.*%xmm"),
}


@pytest.mark.skipif("x86_64" not in os.uname().machine, reason="the units named here are those of x86-64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_sweep_fills_the_widest_registers(unit, dtype):
    """Its innermost loop holds T x NV multiply-adds for the result and as many for the state, and little else."""
    cpu, features, packed = UNITS[unit]
    done = program(ASSEMBLY % dtype, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
    assert done.returncode == 0, done.stderr
    found, _, assembly = done.stdout.partition("\n")
    assert found == unit
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB).*\n)*?)\s+j\w+\s+\1\n", assembly, re.MULTILINE)
    body = max((body for _, body in loops), key=lambda body: len(re.findall(packed, body)))
    tile = _tile(unit)
    assert len(re.findall(packed, body)) >= 2 * tile.tokens * tile.vectors
    scalars = re.findall(r"\s(?:v?mul|v?add|v?fn?madd\w+)s[sd]\s", body)
    assert not scalars
    spilled = re.findall(r"\(%rsp\)", body)
    assert len(spilled) <= 2


def _tile(unit):
    from linattn.backends.numba._tiles import TILES

    return TILES[unit]


@pytest.mark.skipif("x86_64" not in os.uname().machine, reason="the portable unit of x86-64")
def test_a_machine_without_wide_vectors():
    """The narrowest unit gives the same results, float16 included, which it cannot convert in registers."""
    done = program(
        """
        import numpy as np
        import linattn as la
        from linattn.backends.numba._tiles import TILE

        assert TILE.unit == "portable" and not TILE.halves
        rng = np.random.default_rng(0)
        for dtype, tolerance in (("float32", 5e-7), ("float16", 1e-3)):
            q, k, v = rng.uniform(0, 1, (3, 2, 70, 11)).astype(dtype)
            got = la.Linear()(q, k, v, causal=True, backend="numba")
            want = la.Linear()(*(x.astype("float64") for x in (q, k, v)), causal=True, backend="reference")
            assert got.dtype == dtype
            assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
        """,
        NUMBA_CPU_NAME="x86-64",
        NUMBA_CPU_FEATURES="",
        LINATTN_NUMBA_CACHE="0",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags, keeps", [({"contract"}, True), ({"contract", "reassoc", "nsz"}, False)])
def test_flags_can_delete_the_compensation(flags, keeps):
    """With our flags a settled sum keeps what it rounds away; flags that would lose it do lose it here."""
    pointer, settle = _vector.pointer, _products.settle

    @njit(error_model="numpy", fastmath=flags)
    def add(s):
        settle(1, 1, pointer(s), 0, 0)

    lanes = _vector.TILE.lanes(4)
    s = np.repeat(np.array([1, 1e-9], "float32"), lanes)  # [S | E]: 1 + 1e-9 is 1
    add(s)
    assert np.all(s[:lanes] == 1)
    assert np.all(s[lanes:] == np.float32(1e-9)) == keeps


def test_the_rooms_flags_are_the_exact_ones():
    assert _jit.EXACT["fastmath"] == {"contract"}
    assert _jit.EXACT["error_model"] == _jit.SUM["error_model"] == "numpy"  # 0 / 0 is NaN and no ZeroDivisionError
    assert _jit.SUM["fastmath"] <= {"contract", "reassoc"}
    assert "parallel" not in _jit.EXACT | _jit.SUM


# -- numbers ----------------------------------------------------------------------------------------------------

exp_rows = _vector.rowwise(0, 1, _maps.exp)


@njit(**EXACT)
def compiled_exp(x, y):
    exp_rows(1, x.size, _vector.pointer(x), 0, 0, _vector.pointer(y), 0, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_is_right_to_a_unit_and_a_half(dtype, rng):
    low, high = {"float32": (-87, 88), "float64": (-708, 709)}[dtype]
    x = np.concatenate([rng.uniform(low, high, 100_000), rng.uniform(-1, 1, 100_000)]).astype(dtype)
    got = np.empty_like(x)
    compiled_exp(x, got)
    want = np.exp(x.astype(np.longdouble))
    ulp = np.spacing(want.astype(dtype)).astype(np.longdouble)
    assert np.max(abs(got - want) / ulp) <= 1.5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_at_its_ends(dtype):
    tiny = np.finfo(dtype)
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 800, -800, np.log(float(tiny.tiny)) - 3, 1], dtype)
    got = np.empty_like(x)
    compiled_exp(x, got)
    assert np.isnan(got[0])
    assert np.array_equal(got[1:7], np.array([np.inf, 0, 1, 1, np.inf, 0], dtype))
    assert 0 < got[7] < tiny.tiny  # below the normal range, and not flushed
    assert abs(got[7] - np.exp(x[7].astype("float64"))) <= 2 * float(tiny.smallest_subnormal)


@njit(**EXACT)
def compiled_copy(x, y):
    _rows.copy_rows(1, x.size, _vector.pointer(x), 0, 0, _vector.pointer(y), 0, 0)


@pytest.mark.parametrize("dtype, seen_as", [(np.float16, np.uint16), (ml_dtypes.bfloat16, np.int16)])
def test_sixteen_bit_numbers_are_read_and_written_exactly(dtype, seen_as, rng):
    if dtype is np.float16 and not _vector.TILE.halves:
        return  # widened before the kernels: test_a_machine_without_wide_vectors
    every = np.arange(2**16).astype(np.uint16).view(dtype)
    wide = np.empty(every.size, "float32")
    compiled_copy(every.view(seen_as), wide)
    assert np.array_equal(wide, every.astype("float32"), equal_nan=True)

    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view("float32")
    near = wide[np.isfinite(wide)].astype("float64")
    halfway = ((near[:-1] + near[1:]) / 2).astype("float32")
    for x in (bits, halfway, np.float32([np.nan, np.inf, -np.inf, 0, -0.0])):
        narrow = np.empty(x.size, seen_as)
        compiled_copy(x, narrow)
        with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            want = x.astype(dtype)
        assert np.array_equal(narrow.view(dtype).astype("float32"), want.astype("float32"), equal_nan=True)


# -- threads ----------------------------------------------------------------------------------------------------


def both_ways(attend, q, k, v):
    out, backward = attend.vjp(q, k, v, causal=True, backend="numba")
    return out, *backward(out)


ATTENDS = [la.Linear(), la.CosFormer(4000), la.Softmax()]


@pytest.mark.parametrize("shape", [(1, 2500, 64), (5, 900, 40), (2, 3, 700, 64)], ids=str)
@pytest.mark.parametrize("attend", ATTENDS, ids=repr)
def test_any_number_of_threads_gives_the_same_bits(attend, shape, rng):
    """One head is split by columns and sweeps, several by heads."""
    q, k, v = rng.normal(size=(3, *shape)).astype("float32")
    with la.threads(1):
        want = both_ways(attend, q, k, v)
    for n in (2, 3, 7):
        with la.threads(n):
            got = both_ways(attend, q, k, v)
        assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True)), n


def test_shared_keys_and_threads(rng):
    q = rng.normal(size=(2, 3, 4, 500, 64)).astype("float32")
    k, v = rng.normal(size=(2, 2, 3, 1, 500, 64)).astype("float32")
    with la.threads(1):
        want = both_ways(la.Linear(), q, k, v)
    with la.threads(4):
        got = both_ways(la.Linear(), q, k, v)
    assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))


def test_many_python_threads_at_once(rng):
    q, k, v = rng.normal(size=(3, 4, 900, 64)).astype("float32")
    want = both_ways(la.Linear(), q, k, v)
    found = []

    def work():
        with la.threads(3):
            for _ in range(3):
                got = both_ways(la.Linear(), q, k, v)
                found.append(all(np.array_equal(x, y) for x, y in zip(got, want, strict=True)))

    workers = [threading.Thread(target=work) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_forked_child_builds_its_own_pool():
    done = program(
        """
        import os
        import numpy as np
        import linattn as la

        q, k, v = np.random.default_rng(0).normal(size=(3, 4, 900, 64)).astype("float32")
        with la.threads(2):
            want = la.Linear()(q, k, v, causal=True, backend="numba")
            child = os.fork()
            if child == 0:
                same = np.array_equal(la.Linear()(q, k, v, causal=True, backend="numba"), want)
                os._exit(0 if same else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert np.array_equal(la.Linear()(q, k, v, causal=True, backend="numba"), want)
        """
    )
    assert done.returncode == 0, done.stderr


def test_the_pool_starts_with_the_first_large_call():
    done = program(
        """
        import threading
        import numpy as np
        import linattn as la

        q, k, v = np.ones((3, 2, 8, 4), "float32")
        with la.threads(4):
            la.Linear()(q, k, v, causal=True, backend="numba")
            assert threading.active_count() == 1
            q, k, v = np.ones((3, 8, 900, 64), "float32")
            la.Linear()(q, k, v, causal=True, backend="numba")
            assert threading.active_count() == 4
        """
    )
    assert done.returncode == 0, done.stderr


def test_threads_is_a_setting_of_its_block():
    before = number()
    with la.threads(3):
        assert number() == 3
        with la.threads(1):
            assert number() == 1
        assert number() == 3
    assert number() == before
    assert repr(la.threads(2)) == "threads(2)"


@pytest.mark.parametrize("n, error, text", [(0, ValueError, "at least 1, got 0"), (1.5, TypeError, "integer, got 1.5"),
                                            (True, TypeError, "integer, got True")])  # fmt: skip
def test_threads_refuses(n, error, text):
    with pytest.raises(error, match=text):
        la.threads(n)


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_the_variable_for_threads_refuses(value, monkeypatch):
    monkeypatch.setenv("LINATTN_NUM_THREADS", value)
    with pytest.raises(ValueError, match="LINATTN_NUM_THREADS` must be an integer of at least 1"):
        number()
    monkeypatch.setenv("LINATTN_NUM_THREADS", "3")
    assert number() == 3


@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_exception_of_a_share_reaches_the_caller(n_threads):
    def share(x):
        if x == 2:
            raise ArithmeticError(x)

    with pytest.raises(ArithmeticError):
        run(share, [1, 2, 3, 4], n_threads)
    run(share, [1, 3], n_threads)  # and the next call is right


# -- the cache --------------------------------------------------------------------------------------------------

CALL = """
    import sys
    import time
    import warnings
    import numpy as np

    warnings.simplefilter("error")
    if {warns!r}:
        warnings.filterwarnings("always", category=RuntimeWarning)
    from linattn.backends.numba import _jit, softmax

    x = np.ones((2, 5, 4), "float32")
    start = time.perf_counter()
    out, _ = softmax.forward(x, x, x, scale=0.5, span="past", offset=0, key_mask=None, out=None, xp=np)
    print(time.perf_counter() - start)
    assert np.allclose(out, 1)
    print(_jit.cache_status())
"""


def call(folder, warns=False, **variables):
    return program(CALL.format(warns=warns), NUMBA_CACHE_DIR=str(folder), **variables)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with the kernel of `CALL` in it."""
    folder = tmp_path_factory.mktemp("cache")
    done = call(folder)
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*.nb*"))


def copy_of(filled, tmp_path):
    for path in files(filled):
        there = tmp_path / path.relative_to(filled)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(path.read_bytes())
    return tmp_path


def test_a_cached_kernel_loads_quickly(filled):
    before = [path.stat().st_mtime_ns for path in files(filled)]
    done = call(filled)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in files(filled)] == before  # loaded, not compiled again


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_spoiled_cache_file_costs_time_only(kind, damage, filled, tmp_path):
    folder = copy_of(filled, tmp_path)
    for path in folder.rglob(f"*.{kind}"):
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"no pickle", "empty": b""}[damage])
    done = call(folder, warns=True)
    assert done.returncode == 0, done.stderr
    if "unreadable" in done.stdout:
        assert re.search(r"RuntimeWarning: kernel cache .* unreadable", done.stderr)


def test_a_folder_others_can_write_to_is_not_used(filled, tmp_path):
    folder = copy_of(filled, tmp_path)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        path.chmod(path.stat().st_mode | stat.S_IWOTH)
    done = call(folder, warns=True)
    assert done.returncode == 0, done.stderr
    assert "writable by others" in done.stdout
    assert "RuntimeWarning: kernel cache off: " in done.stderr


def test_no_place_for_a_cache_is_no_error(tmp_path):
    """A file where the folder should be: nothing can be written there, whoever runs this."""
    place = tmp_path / "file"
    place.write_text("")
    done = call(place / "cache", HOME=str(place), XDG_CACHE_HOME=str(place))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value, text", [("0", "off: LINATTN_NUMBA_CACHE=0"), ("2", "must be 0 or 1, got '2'")])
def test_the_switch_of_the_cache(value, text, tmp_path):
    done = call(tmp_path, LINATTN_NUMBA_CACHE=value)
    assert text in done.stdout + done.stderr
    assert not files(tmp_path)


def test_the_salt_is_part_of_every_kernel():
    """Numba's key sees a kernel's own byte code alone; the salt stands for everything it inlines."""
    from linattn.backends.numba import _linear, _softmax

    builds = (_linear.forward_kernel, _linear.backward_kernel, _softmax.forward_kernel, _softmax.backward_kernel)
    kernels = [build(_jit.source_salt()) for build in builds]
    assert len({kernel.__name__ for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        assert [cell.cell_contents for cell in kernel.__closure__] == [_jit.source_salt()]
