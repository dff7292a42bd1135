"""`python -m linattn`: the tables, the files it writes, and every sentence it refuses with."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

import linattn as la
from linattn.__main__ import main
from linattn._cli import compare, info, inputs, plot
from linattn.audit.measure import relative_error
from linattn.audit.quadratic import FORMULAS, formula_of

ONE_ROUND = {"ROUNDS": 1, "LEAST_ROUNDS": 1}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """One round of timing and short curves: what is tested is the way, not the times."""
    for name, value in ONE_ROUND.items():
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(plot, "LENGTHS", (8, 16, 32))
    monkeypatch.setattr(plot, "MOST_REPEATS", 1)


@pytest.fixture
def small(tmp_path, rng):
    """A file with q, k, v, and one with two layers."""
    q, k, v = rng.normal(size=(3, 2, 24, 8)).astype("float32")
    np.savez(tmp_path / "plain.npz", q=q, k=k, v=v)
    np.savez(tmp_path / "layers.npz", q1=q, k1=k, v1=v, q3=k, k3=q, v3=v, tokens=np.arange(24))
    return tmp_path, (q, k, v)


def refused(capsys, *argv):
    """The sentence alone, on stderr, and status 2."""
    assert main([str(x) for x in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


# ------------------------------------------------------------------------------------------------ compare


def test_default_compares_all_on_real_data(capsys):
    assert main(["compare"]) == 0
    out, err = capsys.readouterr()
    assert "minilm_qkv.npz, layer 0: 4 heads, 384 tokens, 32 channels; not causal, float32" in out
    names = ("Softmax()", "Linear()", "Linear('relu')", "CosFormer(384)", "Performer(256, seed=0)", "LLN, fitted")
    for name in (*names, "LLNDiag, fitted", "Performer.accurate", "Combiner()", "uniform weights"):
        assert name in out
    for heading in ("forward", "backward", "memory", "output", "weights", "entropy", "error", "gradients"):
        assert heading in out
    assert "layers in this file: 0, 2, 5" in out
    assert max(map(len, out.splitlines())) <= 100
    assert "Traceback" not in err


def test_every_mechanism_is_compared_and_has_its_formula():
    """A new mechanism is found without being told of."""
    assert set(compare.registry()) == set(FORMULAS) == set(compare.ENGINES)
    assert {type(x) for name in compare.registry() for x in compare.values_of(name, 9)} == {
        la.Softmax,
        la.Linear,
        la.CosFormer,
        la.Performer,
        la.LLN,
        la.LLNDiag,
        la.Combiner,
    }


@pytest.mark.parametrize("causal", [False, True])
def test_numbers_are_what_they_say(small, causal, capsys):
    """Each figure of the JSON, computed here a second time."""
    folder, (q, k, v) = small
    target = folder / "out.json"
    argv = ["compare", folder / "plain.npz", "--json", target, "--backend", "reference", *["--causal"] * causal]
    assert main([str(x) for x in argv]) == 0
    data = json.loads(target.read_text())
    assert capsys.readouterr().out

    assert data["shape"] == {"q": [2, 24, 8], "k": [2, 24, 8], "v": [2, 24, 8]}
    assert data["causal"] is causal
    assert data["versions"]["linattn"] == la.__version__
    assert data["versions"]["numpy"] == np.__version__
    softmax = FORMULAS["Softmax"]
    a_softmax, out_softmax = softmax.weights(q, k, causal=causal), softmax(q, k, v, causal=causal)
    rows = {row["mechanism"]: row for row in data["mechanisms"]}
    values = {repr(x): x for x in (la.Softmax(), la.Combiner(), la.CosFormer(24))}
    for kind, label in ((la.LLN, "LLN, fitted"), (la.LLNDiag, "LLNDiag, fitted")):
        values[label] = kind(scope="head", calibration="exact").calibrate(q, k)
    values |= {repr(x): x for x in (la.Linear(), la.Linear("relu"), la.Performer())}
    values["Performer.accurate"] = la.Performer.accurate(q, k)
    assert list(rows) == list(values)
    for name, attend in values.items():
        row = rows[name]
        weights = formula_of(attend).weights(q, k, causal=causal)
        out = attend(q, k, v, causal=causal, backend="reference")
        assert row["backend"] == "reference"
        assert row["weights_distance"] == pytest.approx(relative_error(weights, a_softmax), rel=1e-9)
        assert row["output_distance"] == pytest.approx(relative_error(weights @ v, out_softmax), rel=1e-9, abs=0)
        assert row["entropy_bits"] == pytest.approx(np.mean(la.instruments.entropy(weights, causal=causal)))
        assert row["forward_error"] == pytest.approx(relative_error(out, weights @ v.astype("float64")), rel=1e-6)
        assert 0 < row["forward_error"] < 1e-6
        assert 0 < row["gradient_error"] < 1e-5
        assert row["forward_ms"] == row["forward_ms_rounds"][0] > 0
        assert row["backward_ms"] == row["backward_ms_rounds"][0] > 0
        assert row["forward_against_softmax"] == row["forward_ms"] / rows["Softmax()"]["forward_ms"]
        # at least the four results, out, d_q, d_k and d_v
        assert row["peak_bytes"] > 4 * q.nbytes
    assert data["uniform"]["entropy_bits"] == pytest.approx(
        np.mean(np.log2(np.arange(1, 25))) if causal else np.log2(24)
    )


def test_layers_and_names(small, capsys):
    """One layer is chosen, names go in any case, softmax is always the yardstick."""
    folder, _ = small
    target = folder / "out.json"
    argv = [str(folder / "layers.npz"), "--json", str(target)]
    assert main(["compare", *argv, "--mechanism", "LINEAR"]) == 0
    first = json.loads(target.read_text())
    assert (first["layer"], len(first["mechanisms"])) == (1, 3)
    assert main(["compare", *argv, "--mechanism", "cosFormer", "softmax", "--layer", "3"]) == 0
    third = json.loads(target.read_text())
    assert [row["mechanism"] for row in third["mechanisms"]] == ["Softmax()", "CosFormer(24)"]
    assert third["layer"] == 3
    assert third["mechanisms"][0]["entropy_bits"] != first["mechanisms"][0]["entropy_bits"]
    assert "layers in this file: 1, 3" in capsys.readouterr().out


def test_half_precision_is_widened_and_double_rounded(tmp_path, rng, capsys):
    q, k, v = rng.normal(size=(3, 10, 4))
    np.savez(tmp_path / "half.npz", q=q.astype("float16"), k=k.astype("float16"), v=v.astype("float16"))
    np.savez(tmp_path / "double.npz", q=q, k=k, v=v)
    half, double = (inputs.load(str(tmp_path / f"{name}.npz"), None, False) for name in ("half", "double"))
    assert half.q.dtype == double.q.dtype == np.float32
    np.testing.assert_array_equal(half.q, q.astype("float16"))
    np.testing.assert_array_equal(double.q, q.astype("float32"))
    assert main(["compare", str(tmp_path / "half.npz"), "--backend", "reference"]) == 0
    assert "the file's float16 numbers are taken as float32" in capsys.readouterr().out


def test_cross_attention_and_broadcast_heads(tmp_path, rng, capsys):
    """N != M, E != D, and keys that several heads share."""
    q, k, v = rng.normal(size=(2, 3, 7, 4)), rng.normal(size=(2, 1, 11, 4)), rng.normal(size=(11, 5))
    path = str(tmp_path / "cross.npz")
    np.savez(path, q=q, k=k, v=v)
    assert main(["compare", path, "--backend", "reference"]) == 0
    assert "2x3 heads, 7 queries, 11 keys, 4 and 5 channels" in capsys.readouterr().out
    assert re.search(r"`causal` needs .*N = 7 and M = 11", refused(capsys, "compare", path, "--causal"))


def test_long_inputs_are_read_by_sampled_rows(small, monkeypatch, capsys):
    folder, (q, k, _) = small
    monkeypatch.setattr(compare, "PAIRS", 2 * 24 * 6)
    monkeypatch.setattr(compare, "PAIRS_AT_ONCE", 2 * 24 * 4)
    target = folder / "out.json"
    argv = ["compare", folder / "plain.npz", "--json", target, "--backend", "reference", "--mechanism", "linear"]
    assert main([str(x) for x in argv]) == 0
    assert "read from 6 evenly spaced rows of 24" in capsys.readouterr().out
    data = json.loads(target.read_text())
    rows = np.linspace(0, 23, 6).round().astype(int)
    weights = FORMULAS["Softmax"].weights(q, k, rows=rows)
    assert data["rows_read"] == 6
    assert data["mechanisms"][0]["entropy_bits"] == pytest.approx(np.mean(la.instruments.entropy(weights)))


def test_what_a_backend_lacks_is_said(small, monkeypatch, capsys):
    """Left out where nobody asked for it, refused where somebody did; softmax then runs elsewhere."""
    folder, _ = small
    path, load = str(folder / "plain.npz"), compare.backends.load

    def without(missing):
        monkeypatch.setattr(
            compare.backends,
            "load",
            lambda room, engine: f"no {engine} engine" if (room, engine) == ("numba", missing) else load(room, engine),
        )

    without("softmax")
    target = folder / "out.json"
    assert main(["compare", path, "--backend", "numba", "--json", str(target)]) == 0
    rooms = {row["mechanism"]: row["backend"] for row in json.loads(target.read_text())["mechanisms"]}
    assert rooms["Softmax()"] == "reference"
    assert rooms["Linear()"] == "numba"
    assert capsys.readouterr().out
    sentence = refused(capsys, "compare", path, "--backend", "numba", "--mechanism", "softmax")
    assert "numba has no softmax engine" in sentence
    without("linear")
    assert main(["compare", path, "--backend", "numba"]) == 0
    assert "Linear('relu') is left out: numba has no linear engine." in capsys.readouterr().out


def test_a_fallback_is_said(small, monkeypatch, capsys):
    """A backend that cannot be loaded costs time, so the table says that it did."""
    folder, _ = small
    load = compare.backends.load
    broken = "ImportError: no module named numba"
    monkeypatch.setattr(compare.backends, "load", lambda room, x: broken if room == "numba" else load(room, x))
    assert main(["compare", str(folder / "plain.npz")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "reference runs the linear engine instead of numba (ImportError: no module named numba)" in out
    sentence = refused(capsys, "compare", folder / "plain.npz", "--backend", "numba")
    assert "`backend='numba'` cannot be loaded (ImportError: no module named numba)" in sentence


def test_a_bad_setting_is_refused(small, monkeypatch, capsys):
    folder, _ = small
    monkeypatch.setattr(compare, "room_of", lambda attend, backend, like: "numba")
    monkeypatch.setenv("LINATTN_NUMBA_CACHE", "often")
    sentence = refused(capsys, "compare", folder / "plain.npz")
    assert sentence == "`LINATTN_NUMBA_CACHE` must be 0 or 1, got 'often'.\n"


# --------------------------------------------------------------------------------------------------- plot


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(small, suffix, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = small
    target, data = folder / f"picture.{suffix}", folder / "out.json"
    argv = ["compare", folder / "plain.npz", "--causal", "--plot", target, "--json", data, "--backend", "reference"]
    assert main([str(x) for x in argv]) == 0
    assert target.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    curves = json.loads(data.read_text())["time_against_length"]
    assert curves["lengths"] == [8, 16, 32]
    names = {"Softmax()", "Linear()", "Linear('relu')", "CosFormer(24)", "Performer(256, seed=0)", "Combiner()"}
    assert set(curves["seconds"]) == names | {"LLN, fitted", "LLNDiag, fitted", "Performer.accurate"}
    assert all(len(x["forward"]) == len(x["backward"]) == 3 for x in curves["seconds"].values())
    assert capsys.readouterr().out


def test_plot_of_one_head_without_leading_axes(tmp_path, rng):
    pytest.importorskip("matplotlib")
    q, k, v = rng.normal(size=(6, 4)), rng.normal(size=(9, 4)), rng.normal(size=(9, 2))
    np.savez(tmp_path / "one.npz", q=q, k=k, v=v)
    argv = ["compare", tmp_path / "one.npz", "--plot", tmp_path / "one.png", "--mechanism", "softmax"]
    assert main([str(x) for x in argv]) == 0
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_crossover():
    """The last place where a mechanism becomes faster, by straight lines in log-log."""
    lengths, linear = [16, 64, 256, 1024], [16.0, 64.0, 256.0, 1024.0]
    square = [n**2 / 128 for n in lengths]
    assert plot.crossover(lengths, linear, square) == pytest.approx(128)
    assert plot.crossover(lengths, linear, [*square[:3], None]) == pytest.approx(128)
    assert plot.crossover(lengths, square, linear) is None
    assert plot.crossover(lengths, linear, [1e9] * 4) is None
    assert plot.verdict(lengths, linear, square) == ", faster from 130 tokens"
    assert plot.verdict(lengths, linear, [1e9] * 4) == ", faster throughout"
    assert plot.verdict(lengths, linear, [1e-9] * 4) == ""
    assert [plot.two_digits(x) for x in (7.4, 64.4, 183.0, 1561.0)] == [7, 64, 180, 1600]


def test_slow_mechanisms_stop_early(small, monkeypatch):
    """A length that would take too long is left out, and the curve of the others goes on."""
    _, (q, k, v) = small
    monkeypatch.setattr(plot, "SECONDS_OF_A_CALL", 0.0)
    data = inputs.Inputs(q, k, v, "x", None, (), "float32")
    rows, _, _ = compare.choose(["softmax", "cosformer"], "reference", data)
    curves = plot.time_against_length(rows, data, False, lambda what, n: None)["seconds"]
    assert [x is None for x in curves["Softmax()"]["forward"]] == [False, True, True]


def test_stretched():
    x = np.arange(6.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(plot.stretched(x, 5)[0, :, 0], [0, 2, 4, 0, 2])
    np.testing.assert_array_equal(plot.stretched(x, 2), x[:, :2])


# ---------------------------------------------------------------------------------------------------- info


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("LINATTN_NUM_THREADS", "3")
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("Versions", "Backends", "Processor", "Threads", "Compiled kernels", "vector unit", "BLAS"):
        assert text in out
    assert re.search(rf"^linattn +{re.escape(la.__version__)}", out, re.M)
    assert re.search(r"^reference +combiner, linear, loglinear, softmax", out, re.M)
    assert re.search(r"^cupy +none \(", out, re.M)
    assert re.search(r"^LINATTN_NUM_THREADS +3", out, re.M)


@pytest.mark.parametrize("value, text", [("0", "off: LINATTN_NUMBA_CACHE=0"), ("yes", "unusable: .*0 or 1, got 'yes'")])
def test_info_says_what_the_cache_does(value, text, monkeypatch):
    monkeypatch.setenv("LINATTN_NUMBA_CACHE", value)
    assert re.match(text, info.facts()["Compiled kernels"]["cache"])


def test_info_without_numba(monkeypatch):
    """The reason why a backend is missing, in the library's own words."""
    load = compare.backends.load
    monkeypatch.setattr(
        info.backends,
        "load",
        lambda room, engine: "ImportError: no module named numba" if room == "numba" else load(room, engine),
    )
    facts = info.facts()
    assert facts["Backends"]["numba"] == "none (ImportError: no module named numba)"
    assert "vector unit" not in facts["Compiled kernels"]


# -------------------------------------------------------------------------------------------- bad requests


def test_bad_options(small, capsys, tmp_path):
    """Nothing is computed, the sentence names the option, the rule and what came."""
    folder, _ = small
    path = folder / "plain.npz"
    layers = folder / "layers.npz"
    for argv, text in (
        ([], "A command must be given, `compare`, `audit` or `info`, got none"),
        (["paint"], "invalid choice: 'paint'"),
        (["compare", "--wrong"], "nrecognized arguments: --wrong"),
        (["compare", path, "--layer", "two"], "--layer: must be a layer's number, got 'two'"),
        (["compare", path, "--layer", "-1"], "--layer: "),
        (["compare", path, "--layer", "2"], "`--layer` is for files with q0, k0, v0"),
        (["compare", layers, "--layer", "2"], "`--layer` must be one of 1, 3, got 2"),
        (["compare", "--layer", "1"], "`--layer` must be one of 0, 2, 5, got 1"),
        (["compare", path, "--mechanism", "Magic"], "LLN, LLNDiag, Linear, Performer, Softmax, got 'Magic'"),
        (["compare", path, "--mechanism"], "--mechanism: expected at least one argument"),
        (["compare", path, "--backend", "gpu"], "`backend` must be one of reference, numba, cupy or None, got 'gpu'"),
        (["compare", path, "--backend", "cupy"], "takes cupy arrays, got numpy"),
        (["compare", path, "--plot", folder / "no" / "x.png"], "`--plot` must name a file in a folder that exists"),
        (["compare", path, "--json", folder / "no" / "x"], "`--json` must name a file in a folder that exists"),
        (["compare", path, "--json", folder], "`--json` must name a file that can be written"),
        (["compare", path, "--plot", folder / "x.txt"], r"`--plot` must end in .png, .pdf, .svg, got "),
        (["info", "more"], "nrecognized arguments: more"),
    ):
        assert text in refused(capsys, *argv), argv
    assert sorted(x.name for x in folder.iterdir()) == ["layers.npz", "plain.npz"]


def test_plot_without_matplotlib(small, capsys, monkeypatch):
    folder, _ = small
    find = importlib.util.find_spec
    monkeypatch.setattr("linattn.__main__.find_spec", lambda name: None if name == "matplotlib" else find(name))
    sentence = refused(capsys, "compare", folder / "plain.npz", "--plot", folder / "x.png")
    assert "`--plot` needs matplotlib, which is not installed: pip install linattn[plot]" in sentence


GOOD = np.ones((2, 5, 3))
BAD_NUMBER = np.where(np.arange(30).reshape(2, 5, 3) == 17, np.nan, 1.0)

BAD_FILES = {
    "no q k v": ({"x": GOOD, "query": GOOD}, r"must hold q, k and v, or q0, k0 and v0 and so on, got x, query"),
    "empty": ({}, r"must hold q, k and v.*got no array"),
    "no v": ({"q": GOOD, "k": GOOD}, r"must hold q, k and v, got no v"),
    "no k2 and v2": ({"q2": GOOD}, r"must hold q2, k2 and v2, got no k2 and no v2"),
    "NaN": ({"q": GOOD, "k": BAD_NUMBER, "v": GOOD}, r"`k` must be finite, got nan at \(1, 0, 2\)"),
    "infinite": ({"q": GOOD, "k": GOOD, "v": GOOD * np.inf}, r"`v` must be finite, got inf at \(0, 0, 0\)"),
    "too large": ({"q": 1e300 * GOOD, "k": GOOD, "v": GOOD}, r"`q` must fit into float32, got 1e\+300"),
    "integers": ({"q": GOOD.astype(int), "k": GOOD, "v": GOOD}, r"`q` has dtype int64, must have one of float64"),
    "complex": ({"q": GOOD, "k": GOOD * 1j, "v": GOOD}, r"`k` has dtype complex128"),
    "one axis": ({"q": GOOD[0, 0], "k": GOOD, "v": GOOD}, r"`q` must have at least 2 axes"),
    "no tokens": ({"q": GOOD[:, :0], "k": GOOD, "v": GOOD}, r"`q` must not be empty, got shape \(2, 0, 3\)"),
    "channels": ({"q": GOOD[..., :2], "k": GOOD, "v": GOOD}, r"q and k must have the same last axis"),
    "tokens": ({"q": GOOD, "k": GOOD, "v": GOOD[:, :4]}, r"k and v must have the same number of tokens"),
    "heads": ({"q": GOOD, "k": np.ones((3, 5, 3)), "v": GOOD}, r"leading axes of q, k, v must broadcast"),
    "objects": ({"q": GOOD.astype(object), "k": GOOD, "v": GOOD}, r"must hold plain arrays q, k and v, got"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_arrays(case, tmp_path, capsys, monkeypatch):
    """Refused before anything is computed."""
    arrays, text = BAD_FILES[case]
    path = tmp_path / "bad.npz"
    with np.errstate(all="ignore"):
        np.savez(path, **arrays)
    monkeypatch.setattr(compare, "compare", None)  # calling it would be an error of another kind
    assert re.search(text, refused(capsys, "compare", path, "--json", tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()


def test_bad_files(tmp_path, capsys):
    """Missing, a folder, no archive, a truncated one, an array alone, an unreadable one."""
    assert re.search(r"The file must exist, got '.*nothing.npz'", refused(capsys, "compare", tmp_path / "nothing.npz"))
    assert re.search(r"got the folder", refused(capsys, "compare", tmp_path))
    text, array, cut = tmp_path / "text.npz", tmp_path / "array.npy", tmp_path / "cut.npz"
    text.write_text("q k v")
    np.save(array, GOOD)
    np.savez(cut, q=GOOD, k=GOOD, v=GOOD)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    for path in (text, array, cut):
        assert re.search(r"must be an .npz file with q, k and v, got something else", refused(capsys, "compare", path))
    spoiled = tmp_path / "spoiled.npz"
    spoiled.write_bytes(whole.replace(b"\x93NUMPY", b"\x93NOTPY"))
    assert "must hold plain arrays q, k and v, got an unreadable one" in refused(capsys, "compare", spoiled)
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        cut.chmod(0)
        assert "cannot be read" in refused(capsys, "compare", cut)


def test_inputs_are_not_written_to(small, capsys):
    folder, _ = small
    before = (folder / "plain.npz").read_bytes()
    assert main(["compare", str(folder / "plain.npz"), "--backend", "reference"]) == 0
    assert (folder / "plain.npz").read_bytes() == before
    assert capsys.readouterr().out


def test_interrupted(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "load", stop)
    assert main(["compare"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


# -------------------------------------------------------------------------------------------- as a process


def test_as_a_process(small):
    """The module runs, refuses with status 2, and needs neither torch nor jax nor matplotlib."""
    folder, _ = small
    code = (
        "import sys; from linattn.__main__ import main; status = main(sys.argv[1:]);"
        "print([x for x in ('torch', 'jax', 'matplotlib', 'cupy') if x in sys.modules]); sys.exit(status)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "compare", folder / "plain.npz", "--backend", "reference"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("[]\n")
    wrong = subprocess.run(
        [sys.executable, "-m", "linattn", "compare", folder / "none.npz"], capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("The file must exist")


# ------------------------------------------------------------------------------------------- shipped data


def test_shipped_data():
    """Small, complete, with its provenance, and a real spread of heads."""
    folder = files("linattn") / "data"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for text in ("all-MiniLM-L6-v2", "Apache License", "Paradise Lost", "np.savez_compressed"):
        assert text in readme
    entropies = {}
    for layer in (0, 2, 5):
        data = inputs.load(None, layer, True)
        assert data.q.shape == data.k.shape == data.v.shape == (4, 384, 32)
        entropies[layer] = la.instruments.entropy(la.Softmax().weights(data.q.astype(float), data.k.astype(float)))
    np.testing.assert_allclose(entropies[0], [7.9, 0.4, 4.1, 8.3], atol=0.06)
    assert np.max(entropies[5]) < np.log2(384)
