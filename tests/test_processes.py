"""The library among threads, processes and broken surroundings: each in a process of its own, none may hang or lie.

Every child prints hashes of its results; they are compared with those of a plain call here.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path

import numba
import pytest
from numba import types

import linattn as la
from linattn.backends.numba import _jit, describe, threads

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # a child that takes longer hangs
INTERRUPTED = 2.0  # seconds within which Ctrl-C must end a call, promised

PROLOGUE = """
import hashlib, os, sys, threading, time, warnings
import numpy as np
import linattn as la
rng = np.random.default_rng(5)
many = rng.normal(size=(4, 8, 512, 64)).astype("float32")
one = rng.normal(size=(4, 1, 4096, 64)).astype("float32")  # a single head is shared out as well
JOBS = [(la.Linear(), many), (la.CosFormer(512), many), (la.Softmax(), many), (la.Linear("relu"), one),
        (la.LLN(alpha=0.8, beta=0.6), many)]
def said(attend, args):
    out, backward = attend.vjp(*args[:3], causal=True, backend="numba")
    return hashlib.sha256(b"".join(x.tobytes() for x in (out, *backward(args[3])))).hexdigest()
def said_of(i):
    return said(*JOBS[i])
def all_said():
    return " ".join(map(said_of, range(len(JOBS))))
"""


def environment(**changes):
    """This process's, with changes; None takes a variable away."""
    found = {**os.environ, "PYTHONPATH": str(ROOT)} | changes
    return {name: value for name, value in found.items() if value is not None}


def child(code, prologue=PROLOGUE, **changes):
    """What a process prints, and what it says on stderr; it must end well and in time."""
    done = subprocess.run(
        [sys.executable, "-c", prologue + textwrap.dedent(code)],
        env=environment(**changes), capture_output=True, text=True, timeout=SECONDS, check=False, cwd=os.sep,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.fixture(scope="module")
def want():
    """The hashes, from this process."""
    names = {}
    exec(PROLOGUE, names)
    with la.threads(1):
        return names["all_said"]()


# ------------------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize("n_threads", ["1", "2", "7"])
def test_threads_that_all_call_first(n_threads, want):
    """Eight Python threads start before any kernel is loaded, with a pool of 1, 2 or 7 behind them."""
    out, _ = child(
        """
        gate, found = threading.Barrier(8), set()
        def call():
            gate.wait()
            found.add(all_said())
        workers = [threading.Thread(target=call) for _ in range(8)]
        for w in workers: w.start()
        for w in workers: w.join()
        print(*found)
        """,
        LINATTN_NUM_THREADS=n_threads,
    )
    assert out == want


def test_a_fork_after_use_builds_its_own_pool(want):
    """Parent and child, while another thread of the parent is calling; the child's pool is not the parent's."""
    out, _ = child(
        """
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: that is the point
        stop = threading.Event()
        def busy():
            while not stop.is_set(): all_said()
        print(all_said(), flush=True)
        worker = threading.Thread(target=busy); worker.start()
        children = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                os.write(1, (all_said() + "\\n").encode())
                os._exit(0)
            children.append(pid)
        ends = [os.waitpid(pid, 0)[1] for pid in children]
        stop.set(); worker.join()
        print(all_said(), ends)
        """,
        LINATTN_NUM_THREADS="4",
    )
    *lines, last = out.splitlines()
    assert lines == [want] * 4
    assert last == f"{want} [0, 0, 0]"


def test_multiprocessing_by_spawn_and_by_fork(want, tmp_path):
    """Values and calls travel to workers of both kinds."""
    script = tmp_path / "workers.py"
    script.write_text(
        PROLOGUE
        + textwrap.dedent(
            """
            import multiprocessing
            if __name__ == "__main__":
                warnings.simplefilter("ignore", DeprecationWarning)
                all_said()
                for how in ("fork", "spawn"):
                    with multiprocessing.get_context(how).Pool(2) as pool:
                        print(*pool.map(said_of, range(len(JOBS))))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [want, want]


@pytest.mark.parametrize("n_threads", ["1", "2"])
def test_ctrl_c_ends_a_long_call(n_threads):
    """KeyboardInterrupt within two seconds, and the next call is right."""
    code = PROLOGUE + textwrap.dedent(
        """
        attend = la.Softmax()
        x = rng.normal(size=(400, 1500, 64)).astype("float32")
        before = said_of(0)
        try:
            print("begun", flush=True)
            attend(x, x, x, backend="numba")
            print("finished", flush=True)
        except KeyboardInterrupt:
            print("interrupted", said_of(0) == before, flush=True)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(LINATTN_NUM_THREADS=n_threads), stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "begun\n"
        time.sleep(0.3)
        start = time.perf_counter()
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == "interrupted True\n"
        took = time.perf_counter() - start
        assert running.wait(SECONDS) == 0
    assert took < INTERRUPTED


# ---------------------------------------------------------------------------------------------- kernel cache
# All kernels go through `compile_kernel`; here a small one does, in a cache folder of its own.

SIGNATURE = (types.float64,)


def build(salt):
    def tiny(x):
        return x + salt

    return tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    made = tmp_path / "cache"
    made.mkdir()
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(made))
    return made


def compiled():
    """What the small kernel makes of 1, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kernel = _jit.compile_kernel(build, SIGNATURE)
    assert kernel(1.0) == 1.0 + _jit.source_salt()
    return [str(w.message) for w in said]


def files(folder, pattern):
    return sorted(folder.rglob(pattern))


def test_kernels_are_kept_and_found_again(folder):
    assert compiled() == []
    (index,), (code,) = files(folder, "*.nbi"), files(folder, "*.nbc")
    stamps = [file.stat().st_mtime_ns for file in (index, code)]
    assert compiled() == []
    assert [file.stat().st_mtime_ns for file in (index, code)] == stamps
    assert _jit.cache_status() == str(index.parent)


def test_an_edited_source_is_compiled_anew(folder, monkeypatch, tmp_path):
    """Numba's own key sees a kernel's code alone; ours has every source of the room and the vector unit in it."""
    salts = set()
    for salt in (_jit.source_salt(), 7):
        monkeypatch.setattr(_jit, "source_salt", lambda salt=salt: salt)
        assert compiled() == []
        salts.add(salt)
    assert len(files(folder, "*.nbc")) == len(salts) == 2
    monkeypatch.undo()
    package = tmp_path / "copy"
    shutil.copytree(ROOT / "linattn", package / "linattn", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from linattn.backends.numba._jit import source_salt; print(source_salt())"
    said = [child(code, "", PYTHONPATH=str(package))[0]]
    with open(package / "linattn" / "backends" / "numba" / "_rows.py", "a", encoding="utf-8") as source:
        source.write("# edited\n")
    said.append(child(code, "", PYTHONPATH=str(package))[0])
    assert said[0] == str(_jit.source_salt()) != said[1]


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("content", [b"", b"half", b"\x80\x05garbage that is no pickle", b"\0" * 4096], ids=len)
def test_a_spoiled_cache_file_costs_time_only(folder, kind, content):
    """Truncated, empty or foreign: a warning at most, and the right result."""
    compiled()
    (file,) = files(folder, kind)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    for line in compiled():
        assert "kernel cache" in line
        assert "unreadable" in line


def test_a_planted_file_in_a_shared_folder_is_not_loaded(folder, tmp_path):
    """The index is a pickle and runs what it says: where others may write it is not read."""
    compiled()
    marker = tmp_path / "was here"
    (index,) = files(folder, "*.nbi")
    index.write_bytes(f"cposix\nsystem\n(S'touch \"{marker}\"'\ntR.".encode())
    for mode in (0o777, 0o775, 0o757):
        index.parent.chmod(mode)
        (warned,) = compiled()
        assert warned == f"kernel cache off: {index.parent} writable by others."
        assert not marker.exists()
    index.parent.chmod(0o755)  # where we alone may write, the index is ours
    compiled()
    assert marker.exists()


def test_a_parent_that_others_may_write_is_as_bad(folder):
    compiled()
    folder.chmod(0o777)
    assert "writable by others" in compiled()[0]
    folder.chmod(0o777 | stat.S_ISVTX)  # others may add names there, but not change ours
    assert compiled() == []


def test_a_folder_of_somebody_else(folder, monkeypatch):
    compiled()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "writable by others" in compiled()[0]


def test_a_read_only_install_without_a_home(monkeypatch, tmp_path):
    """Nothing can be written anywhere: kernels are compiled for this process alone, and `info` says so."""

    def refused(*args, **kwargs):
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr(numba.core.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    for name in ("TemporaryFile", "NamedTemporaryFile"):
        monkeypatch.setattr(tempfile, name, refused)
    monkeypatch.setattr(os, "makedirs", refused)
    assert compiled() == []
    assert _jit.cache_status() == "off: no writable folder"
    assert describe()["cache"] == "off: no writable folder"


def test_eight_processes_on_one_empty_cache(tmp_path):
    """All at once, and one more when they are done."""
    script = tmp_path / "eight.py"
    script.write_text(
        "import warnings\n"
        "from numba import types\n"
        "from linattn.backends.numba import _jit\n"
        "def build(salt):\n"
        "    def tiny(x):\n"
        "        return x + salt\n"
        "    return tiny\n"
        "warnings.simplefilter('error')\n"
        "kernel = _jit.compile_kernel(build, (types.float64,))\n"
        "print(kernel(1.0) == 1.0 + _jit.source_salt(), _jit.cache_status())\n"
    )
    folder = tmp_path / "cache"
    folder.mkdir()
    changes = environment(NUMBA_CACHE_DIR=str(folder))
    running = [
        subprocess.Popen([sys.executable, str(script)], env=changes, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for _ in range(8)
    ]
    said = [process.communicate(timeout=SECONDS)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 8
    assert {right for right, _ in said} == {"True"}
    assert {Path(where).parent for _, where in said} == {folder}
    assert len(files(folder, "*.nbi")) == 1


def test_no_home_folder(want, tmp_path):
    for home in (None, str(tmp_path / "nobody")):
        out, _ = child("print(said_of(0))", HOME=home, XDG_CACHE_HOME=None, USERPROFILE=None)
        assert out == want.split()[0]


@pytest.mark.parametrize(
    "name, value", [("LINATTN_NUMBA_CACHE", "yes"), ("LINATTN_NUM_THREADS", "0"), ("LINATTN_NUM_THREADS", "two")]
)
def test_settings_that_cannot_be(name, value, monkeypatch, folder):
    """A sentence at the first call that asks for them."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got '{value}'\.$"):
        compiled() if name.endswith("CACHE") else threads.number()


def test_no_variable_names_code():
    """What stands in our variables is compared with a few values; there is none for a file, a module, an expression."""
    names = set()
    for file in (ROOT / "linattn").rglob("*.py"):
        names |= set(re.findall(r"LINATTN_[A-Z_]+", file.read_text(encoding="utf-8")))
    assert names == {"LINATTN_NUMBA_CACHE", "LINATTN_NUM_THREADS"}


def test_nothing_we_read_is_a_pickle():
    """No pickle, no marshal, no eval in what the library imports or calls; NumPy is told so wherever it loads."""
    for file in (ROOT / "linattn").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                roots = {a.name.partition(".")[0] for a in node.names} | {(getattr(node, "module", "") or "")}
                assert not roots & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, file
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert name not in ("eval", "exec", "loads_pickle"), file
                if name == "load" and getattr(getattr(node.func, "value", None), "id", "") == "np":
                    allowed = {k.arg: k.value for k in node.keywords}.get("allow_pickle")
                    assert allowed is None or allowed.value is False, file


# ---------------------------------------------------------------------------------- other libraries' settings


@pytest.mark.torch
def test_subnormals_flushed_by_another_library():
    """Whoever sets the processor's flags: results in the normal range have the bits they had, and the audit says so."""
    out, _ = child(
        """
        import torch
        from linattn._cli.audit import flushed
        before = all_said()
        assert torch.set_flush_denormal(True)
        assert flushed()
        print(all_said() == before)
        from linattn.audit import survey, verdict
        plan = [case for case in survey.cases(["Linear", "Softmax"], False)
                if case.kind == "families" and case.dtype == "float32" and case.causal
                and case.family in ("gaussian", "norms near underflow", "student-t(2)", "v + 1e4")]
        survey.cases = lambda names, full: plan
        print(verdict.faults(survey.survey(["Linear"], step=lambda what: None)))
        """,
        LINATTN_NUM_THREADS="1",
    )
    assert out.splitlines() == ["True", "[]"]
