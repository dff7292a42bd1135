"""The audit judges rightly: its oracles agree, a broken sum is caught, its command says what it found."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import complex_step

import linattn as la
from linattn.__main__ import main
from linattn.audit import (
    bounds,
    families,
    measure,
    peers,
    quadratic,
    rigorous,
    subjects,
    survey,
    tables,
    truth,
    verdict,
    workers,
)
from linattn.audit.truth import KINDS
from linattn.audit.units import PASSES, Arithmetic

NAMED = {repr(attend): subjects.of_channels(attend, 3) for make in subjects.SUBJECTS.values() for attend in make(40)}
VALUES, NAMES = list(NAMED.values()), list(NAMED)
BOTH = [
    (attend, causal) for attend in VALUES for causal in (False, True) if subjects.may_be_causal(attend) or not causal
]
BOTH_NAMES = [f"{name}-{causal}" for name, attend in NAMED.items() for at, causal in BOTH if at is attend]
FIRST = [values(20)[0] for values in subjects.SUBJECTS.values()]
U64 = 2.0**-53
OWN_ERROR = 28  # of the float64 oracles, in u: what they judge is 2^29 times coarser


def draw(rng, n=9, m=9, d=3, e=2):
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)), rng.normal(size=(m, e)), rng.normal(size=(n, e))


# ------------------------------------------------------------------------------------------------ oracles


def test_a_mechanism_has_its_row_in_every_table():
    mechanisms = {name for name in la.__all__ if name in quadratic.FORMULAS}
    assert set(subjects.SUBJECTS) == set(quadratic.FORMULAS) == {*rigorous.RULES, *rigorous.WHOLE} == mechanisms
    engines = {subjects.engine_of(attend) for attend in VALUES}
    assert engines == set(subjects.ENGINES) == set(KINDS) == set(bounds.DEPTHS)
    assert survey.unjudged() == []


def test_no_oracle_is_missing_here():
    """Where the tests run all of them judge; elsewhere a missing one is said, never replaced."""
    assert survey.missing_oracles() == {}


@pytest.mark.parametrize("attend, causal", BOTH, ids=BOTH_NAMES)
def test_balls_hold_the_formula_and_its_derivative(attend, causal, rng):
    q, k, v, g = draw(rng)
    mask = np.arange(9) != 4
    balls = rigorous.enclose(attend, q, k, v, causal=causal, key_mask=mask, d_out=g)
    formula, whole = quadratic.formula_of(attend), not subjects.may_be_causal(attend)
    want = complex_step(lambda *args: formula(*args, causal=causal, key_mask=mask), [q, k, v], g, one_by_one=whole)
    for name, near in zip(PASSES, (formula(q, k, v, causal=causal, key_mask=mask), *want), strict=True):
        ball = getattr(balls, name)
        assert np.all(rigorous.distance(near, ball) <= 64 * U64 * (1 + abs(near)))
        radius = [float(x.rad()) for x in ball.ravel()]
        assert max(radius) < 1e-50  # an enclosure that says something
    assert not np.any(rigorous.midpoints(balls.d_k)[4])


def test_balls_know_all_of_the_options(rng):
    """Divisor rules, alignment, lengths and scales; rows alone; unequal lengths."""
    q, k, v, _ = draw(rng, n=5, m=7)
    for attend in (
        la.Linear(eps=("clamp", 4.0)),
        la.Linear("relu", eps=("add", 0.5)),
        la.Linear("identity", normalize=False),
        la.CosFormer(),
        la.CosFormer(align="stretch"),
        la.CosFormer(30, feature_map="elu1", normalize=False),
        la.Softmax(scale=0.3),
    ):
        want = quadratic.formula_of(attend)(q, k, v)
        balls = rigorous.enclose(attend, q, k, v, rows=[1, 4])
        assert balls.d_q is None
        assert np.all(rigorous.distance(want[[1, 4]], balls.out) <= 64 * U64 * (1 + abs(want[[1, 4]])))


def test_distance_is_an_upper_bound_that_no_nan_passes():
    with rigorous.precision() as flint:
        third = flint.arb(1) / 3
    balls = np.array([third, third, third, third - third], object)
    far = rigorous.distance([1 / 3, np.nan, np.inf, 0.0], balls)
    assert 1.8e-17 < far[0] < 1.9e-17  # 1/3 - fl(1/3) = 2^-54 / 3
    assert far[1] == far[2] == np.inf
    assert 0 <= far[3] < 1e-50
    with pytest.raises(ValueError, match=r"`got` must have the shape of the balls, \(4,\), got \(3,\)"):
        rigorous.distance(np.zeros(3), balls)


@pytest.mark.parametrize("family", ["gaussian", "constant", "v + 1e2", "norms near underflow"])
@pytest.mark.parametrize("attend, causal", BOTH, ids=BOTH_NAMES)
def test_sampled_oracles_are_inside_the_balls(attend, causal, family, rng):
    """Value and cotangents of both precisions, in units of the sums of absolute terms."""
    for dtype, u in (("float32", U64), ("float64", 2.0**-64)):
        q, k, v, _ = families.draw(family, rng, 6, 6, 3, 2, dtype)
        g = rng.normal(size=(6, 2)).astype(dtype)
        exact = truth.truth(attend, q, k, v, g, Arithmetic(dtype, getattr(attend, "normalize", True)), causal=causal)
        if exact.unclaimed:
            continue
        balls = rigorous.enclose(attend, *(x.astype(float) for x in (q, k, v)), causal=causal, d_out=g.astype(float))
        for name in PASSES:
            value = exact.value[name]
            near = value.astype(float)
            with rigorous.precision() as flint:
                rest = np.array([flint.arb(float(x)) for x in (value - near).ravel()], object).reshape(near.shape)
                far = rigorous.distance(near, getattr(balls, name) - rest)
            assert np.all(far <= OWN_ERROR * u * exact.terms[name].astype(float) + 1e-300), name


def test_one_row_of_a_long_sequence_in_balls(rng):
    """The float64 oracle that sums in chunks, at the last of 2000 tokens."""
    n, attend = 2000, la.Linear()
    q, k, v = (x.astype("float32") for x in draw(rng, n, n)[:3])
    wide = [x.astype(float) for x in (q, k, v)]
    balls = rigorous.enclose(attend, *wide, causal=True, rows=[n - 1])
    answer = measure.by_sums(attend, *wide, causal=True)
    assert np.all(rigorous.distance(answer.out[-1:], balls.out) <= OWN_ERROR * U64 * answer.absolute[-1:])


@pytest.mark.parametrize("attend", VALUES, ids=NAMES)
def test_terms_are_sums_of_absolute_values(attend, rng):
    """No entry is larger than the sum of its terms, and where nothing cancels they are equal."""
    q, k, v, g = draw(rng)
    exact = truth.truth(attend, q, k, v, g, Arithmetic("float64", getattr(attend, "normalize", True)))
    for name in PASSES:
        assert np.all(abs(exact.value[name]) <= exact.terms[name] * (1 + 1e-12))
    if subjects.is_signed(attend):
        assert exact.unclaimed == truth.SIGNED
        return
    same = truth.truth(attend, q, k, abs(v), abs(g), Arithmetic("float64", getattr(attend, "normalize", True)))
    for name in ("out", "d_v"):
        np.testing.assert_allclose(same.value[name].astype(float), same.terms[name].astype(float), rtol=1e-13)


def test_the_bound_is_for_the_rule_it_was_proved_for(rng):
    with pytest.raises(ValueError, match=r"the bound holds for eps=\"safe\", got \('add', 0.5\)"):
        truth.truth(la.Linear(eps=("add", 0.5)), *draw(rng), Arithmetic("float64"))


# --------------------------------------------------------------------------------------- what it would catch


def sums_one_by_one(q, k, v, dtype):
    """Causal relu attention with a running state in `dtype`: what no backend of ours does."""
    phi_q, phi_k = np.maximum(q, 0), np.maximum(k, 0)
    v1 = np.concatenate([v, np.ones_like(v[:, :1])], axis=1)
    state = np.cumsum(phi_k[:, :, None] * v1[:, None, :], axis=0, dtype=dtype)
    num_den = np.einsum("tr,trx->tx", phi_q.astype(dtype), state)
    return (num_den[:, :-1] / num_den[:, -1:]).astype("float32")


def test_a_running_sum_in_float32_breaks_the_bound(rng):
    """T > 1 from a few thousand repeated keys on, where a state in float64 stays below 0.4."""
    n = 8000
    q, k, v, _ = families.draw("constant", rng, n, n, 8, 4, "float32")
    q = abs(q)
    answer = measure.by_sums(la.Linear("relu"), *(x.astype(float) for x in (q, k, v)), causal=True)
    unit = 2.0**-24 * bounds.depth("linear", "reference", "float32", n_keys=n, n_features=8) * answer.absolute
    ratios = {
        dtype: np.max(abs(sums_one_by_one(q, k, v, dtype) - answer.out) / unit) for dtype in ("float32", "float64")
    }
    assert ratios["float32"] > 1
    assert ratios["float64"] < 0.4


def test_centring_on_the_output_breaks_the_bound_of_cotangents(rng):
    """d_q with D = g . out instead of phi_q . dq~, at v + 1e4: float32."""
    q, k, v, _ = families.draw("v + 1e4", rng, 64, 64, 8, 4, "float32")
    g = rng.normal(size=(64, 4)).astype("float32")
    exact = truth.truth(la.Linear("relu"), q, k, v, g, Arithmetic("float32"))
    phi_q, phi_k = np.maximum(q, 0), np.maximum(k, 0)
    a = phi_q @ phi_k.T
    c = a.sum(axis=1, keepdims=True)
    out = (a @ v) / c
    naive = np.where(q > 0, ((g @ v.T - (g * out).sum(axis=1, keepdims=True)) / c) @ phi_k, 0)
    depth = bounds.depth("linear", "reference", "float32", n_keys=64, n_features=8)
    unit = exact.unit("d_q", Arithmetic("float32"), depth)
    assert np.max(abs(naive - exact.value["d_q"]) / unit) > 1
    d_q = la.Linear("relu").vjp(q, k, v)[1](g)[0]
    assert np.max(abs(d_q - exact.value["d_q"]) / unit) < 0.5


# ------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families_are_what_they_say(name, rng):
    """Finite, of the dtype and shapes asked for; tiny sizes too. Where a format cannot hold one, None."""
    for dtype in ("float64", "float32", "float16"):
        for n, m in ((0, 0), (1, 1), (5, 8)):
            inputs = families.draw(name, rng, n, m, 4, 3, dtype)
            if inputs is None:
                assert dtype == "float16" or name == "subnormal keys"
                continue
            assert [x.shape for x in inputs[:3]] == [(n, 4), (m, 4), (m, 3)]
            assert all(x.dtype == dtype and np.isfinite(x).all() for x in inputs[:3])
            assert (inputs.key_mask is None) == (name not in families.ALIVE or m == 0)


def test_families_reach_the_ends_of_the_range(rng):
    for dtype in ("float64", "float32"):
        least, most = np.finfo(dtype).tiny, np.finfo(dtype).max
        big = families.draw("norms near overflow", rng, 9, 9, 4, 2, dtype)
        assert most ** (1 / 3) < np.max(abs(big.q)) < most**0.5
        small = families.draw("norms near underflow", rng, 9, 9, 4, 2, dtype)
        assert least < np.max(abs(small.k)) < least**0.7
        below = families.draw("subnormal keys", rng, 9, 9, 4, 2, dtype)
        assert 0 < np.max(abs(below.k)) < least


# -------------------------------------------------------------------------------------------------- verdict

GOOD = survey.Figure(
    "Linear()", "out", "numba", "float32", "families", "gaussian", True, 149, 149, 16, 8, 16, 48, "float64", 2,
    0.1, 3.0, 1e-7, 0.5, 1.0, 2.0, 1, "",
)  # fmt: skip


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"ratio": 1.01}, "T = 1.01, at most 1"),
        ({"ratio": float("nan")}, "T = nan, at most 1"),
        ({"nrel": 6e-7}, "relative error 6e-07, at most 5e-07"),
        ({"dtype": "float64", "nrel": 2e-13}, "relative error 2e-13, at most 1e-13"),
        ({"passes": "d_k", "family": "v + 1e4", "nrel": 2e-6}, "relative error 2e-06, at most 1e-06"),
        (
            {"passes": "d_v", "kind": "balls", "oracle": "balls", "werr": 201.0},
            "201 u S from its enclosure, at most 200",
        ),
    ],
)
def test_limits(change, sentence):
    assert verdict.faults([GOOD]) == []
    (fault,) = verdict.faults([GOOD._replace(**change)])
    assert sentence in fault
    assert fault.startswith("Linear(), ")
    assert verdict.faults([GOOD._replace(**change, ratio=None)] if "ratio" not in change else []) == []


def test_growth():
    worse = [GOOD._replace(werr=1.5 * GOOD.werr + 2.1)]
    assert verdict.grown([GOOD], [GOOD]) == verdict.grown([GOOD._replace(werr=6.4)], [GOOD]) == []
    assert "6.6 u, was 3." in verdict.grown(worse, [GOOD])[0]
    assert "no longer measured" in verdict.grown([GOOD], [GOOD, GOOD._replace(family="real")])[0]
    assert "no longer claimed (why)" in verdict.grown([GOOD._replace(ratio=None, note="why")], [GOOD])[0]
    assert verdict.grown([GOOD], [GOOD._replace(backend="reference", family="real")]) == []  # not asked for


def test_what_was_never_claimed_cannot_grow():
    before = GOOD._replace(ratio=None, werr=None, note="why")
    assert verdict.grown([GOOD], [before]) == verdict.grown([before], [before]) == []


def test_the_worst_of_each_metric_is_kept():
    other = GOOD._replace(ratio=0.3, werr=1.0, nrel=float("nan"), seed=2, causal=False)
    both = survey.worse(GOOD, other)
    assert (both.ratio, both.werr, both.seed, both.causal, both.cases) == (0.3, 3.0, 2, False, 4)
    assert np.isnan(both.nrel)
    assert survey.worse(GOOD, GOOD._replace(ratio=None, note="why"))[15] == 0.1


# ------------------------------------------------------------------------------------------------- processes


def test_merged_states_and_fitted_values_are_among_the_cases():
    plan = list(survey.cases(list(subjects.SUBJECTS), False))
    merging = {repr(case.attend) for case in plan if case.kind == "merges"}
    assert merging == {name for name, attend in NAMED.items() if subjects.may_be_causal(attend)} - {"CosFormer(40)"} | {
        "CosFormer(149)"
    }
    fitted = {repr(case.attend) for case in plan if case.kind == "families"}
    assert {"LLN()", "LLN(calibration='exact').calibrate(q, k)", "Performer(8, seed=0).calibrate(q, k)"} <= fitted


def test_a_lost_part_of_a_merged_state_breaks_the_bound(monkeypatch):
    """The audit sees a merge that forgets the earlier part."""
    case = survey.Case(la.Linear(), "merges", "gaussian", "float32", True)
    assert max(f.ratio for f in survey.figures_of(case, ["reference"])) < 1
    monkeypatch.setattr(la.Linear, "merge", lambda self, earlier, later: later)
    assert max(f.ratio for f in survey.figures_of(case, ["reference"])) > 1e3


def test_any_number_of_processes_finds_the_same(few):
    names = ["Linear", "Softmax", "LLN"]
    told = []
    one = survey.survey(names, step=told.append)
    other = survey.survey(names, processes=3, step=lambda what: None)
    assert list(map(repr, other)) == list(map(repr, one))  # NaN is not itself
    assert len(told) == len(list(survey.cases(names, False)))


def test_every_case_is_done_once_and_by_those_who_have_its_kernels():
    plan = list(survey.cases(list(subjects.SUBJECTS), False))
    groups = survey.groups(plan)
    assert sorted(i for group in groups for i in group) == list(range(len(plan)))
    assert all(len({survey.KERNELS.get(plan[i].engine, plan[i].engine) for i in group}) == 1 for group in groups)


def test_what_goes_wrong_in_a_process_is_told():
    def job(i):
        if i == 3:
            raise ZeroDivisionError("three")
        return i * i

    assert dict(workers.shared_out(job, [[0, 1], [2], [4, 5]], 2)) == {0: 0, 1: 1, 2: 4, 4: 16, 5: 25}
    with pytest.raises(ZeroDivisionError, match="three"):
        list(workers.shared_out(job, [[0, 1], [2, 3], [4]], 2))
    with pytest.raises(RuntimeError, match="The processes ended with 2 results missing"):
        list(workers.shared_out(lambda i: os._exit(1), [[0], [1]], 2))


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def few(monkeypatch):
    """A plan of a few cases."""

    def cases(names, full):
        for name in names:
            values = subjects.SUBJECTS[name]
            case = survey.Case(values(20)[0], "families", "gaussian", "float32", True, 20, 20)
            yield case
            yield replace(case, kind="balls", n=4, m=4, d=2, e=2)
            yield replace(case, dtype="float16")
            yield replace(case, family="norms near overflow")
            if case.engine not in survey.QUADRATIC:
                long = replace(case, attend=values(300)[0], kind="long", n=300, m=300, backward=False)
                yield from (long, replace(long, dtype="float64"))

    monkeypatch.setattr(survey, "cases", cases)


def test_command_writes_what_it_measured(few, tmp_path, capsys):
    files = tmp_path / "a.json", tmp_path / "a.md", tmp_path / "a.rst"
    assert main(["audit", "--jobs", "2", "--json", str(files[0]), "--md", str(files[1])]) == 0
    out = capsys.readouterr().out
    for word in ("Ratio to the bound", "Proved by enclosure", "Linear()", "CosFormer(20)", "within its limits"):
        assert word in out
    data = json.loads(files[0].read_text())
    assert data["faults"] == []
    assert data["missing oracles"] == {}
    assert data["mode"] == "quick"
    assert data["subnormals"] == "kept"
    assert {"numpy", "numba", "python"} <= set(data["versions"])
    figures = verdict.figures_from(data)
    assert {f.mechanism for f in figures} == {"CosFormer(300)", *map(repr, FIRST)}
    assert {f.backend for f in figures} == {"reference", "numba"}
    assert {f.passes for f in figures} == set(PASSES)
    extended = np.dtype(np.longdouble).name
    assert {f.oracle for f in figures} == {"balls", "float64", "float64, chunked", f"{extended}, 5 rows"}
    assert "## Proved by enclosure" in files[1].read_text()
    # nothing has grown since
    assert main(["audit", "--against", str(files[0]), "--md", str(files[2]), "--mechanism", "softmax"]) == 0
    text = files[2].read_text()
    assert ".. list-table::" in text
    assert "CosFormer" not in text


def test_command_fails_where_a_figure_has_grown(few, tmp_path, capsys):
    file = tmp_path / "a.json"
    assert main(["audit", "--json", str(file), "--mechanism", "Linear", "--backend", "numba"]) == 0
    data = json.loads(file.read_text())
    data["rows"] = [
        [-9.0 if column == "werr" else x for column, x in zip(data["columns"], row)] for row in data["rows"]
    ]
    file.write_text(json.dumps(data))
    assert main(["audit", "--against", str(file), "--mechanism", "Linear", "--backend", "numba"]) == 1
    assert "u, was -9." in capsys.readouterr().out


def test_command_fails_outside_the_bound(few, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "MOST_RATIO", 1e-9)
    assert main(["audit", "--mechanism", "Softmax"]) == 1
    assert "at most 1e-09" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--mechanism", "Nystrom"], f"`--mechanism` must be one of {', '.join(subjects.SUBJECTS)}, got 'Nystrom'."),
        (["--backend", "fortran"], "`--backend` must be one of reference, numba, cupy or None, got 'fortran'."),
        (["--backend", "cupy"], "`--backend` must be one of reference, numba for an audit, got 'cupy'."),
        (["--against", "/no/such/file"], "`--against` must name a file that can be read"),
        (["--json", "/no/such/folder/a.json"], "`--json` must name a file in a folder that exists"),
        (["--quick", "--full"], "not allowed with argument"),
        (["--jobs", "0"], "must be a number of processes, got '0'"),
    ],
)
def test_command_refuses(argv, sentence, capsys):
    assert main(["audit", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"version": 2, "columns": [], "rows": []}'])
def test_command_refuses_what_is_not_an_audit(text, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text(text)
    assert main(["audit", "--against", str(file)]) == 2
    assert "must name the JSON of an audit" in capsys.readouterr().err


def test_a_missing_oracle_is_said_and_not_replaced(few, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rigorous, "missing", lambda: "python-flint is not installed")
    file = tmp_path / "a.json"
    assert main(["audit", "--mechanism", "Softmax", "--json", str(file)]) == 0
    assert "balls: python-flint is not installed; what this oracle judges is left out." in " ".join(
        capsys.readouterr().out.split()
    )
    assert not any(f.kind == "balls" for f in verdict.figures_from(json.loads(file.read_text())))


# ----------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("causal", [False, True])
def test_peers_own_formulas_are_distributions_where_they_say_so(causal, rng):
    q, k, _ = (rng.normal(size=(peers.TOKENS, peers.CHANNELS)) for _ in range(3))
    for peer in peers.PEERS:
        if peer.causal == causal and peer.package in ("torch", "jax", "fla-core"):
            np.testing.assert_allclose(peer.weights(q, k).sum(axis=1), 1, rtol=1e-8)


def test_peers_that_are_not_there_say_so(monkeypatch):
    """Not installed, raising, too slow: one row each, and no exception."""
    plain = peers.PEERS[0]
    assert peers.ask(replace(plain, module="no_such_library")) == [
        peers.Row(plain.name, "", plain.causal, "", None, None, "not installed")
    ]
    monkeypatch.setattr(peers, "PEERS", [replace(plain, module="numpy", package="no-such-package")])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = peers.ask(peers.PEERS[0])
    assert row.said == "raises no message"


@pytest.mark.torch
def test_torch_is_examined_in_a_process_of_its_own():
    """Exact attention in torch: its error is ours, and a NaN in the last value ruins what came before it."""
    (peer,) = (peer for peer in peers.PEERS if peer.name == "torch SDPA" and peer.causal)
    rows = {row.what: row for row in peers.ask(peer)}
    assert rows["gaussian"].werr < 20
    assert rows["P1"].relative == 0
    assert set(rows) == {*peers.FAMILIES, "P1", "P2", "P4", "P8"}


@pytest.mark.torch
@pytest.mark.parametrize("causal", [False, True])
def test_we_are_as_accurate_as_pairs_written_out_in_torch(causal, rng):
    """float32, well scaled: at most twice the error of the quadratic formula, and on deep negatives a thousandth."""
    (peer,) = (peer for peer in peers.PEERS if peer.name == "torch, elu+1 pairs" and peer.causal == causal)
    for family, factor in (("gaussian", 2.0), ("v >= 0", 2.0), ("all in (-20, -8)", 1e-3)):
        q, k, v, _ = families.draw(family, rng, 128, 128, 16, 8, "float32")
        want = quadratic.FORMULAS["Linear"](q, k, v, causal=causal)
        theirs = measure.relative_error(peer.call(q, k, v), want)
        for backend in ("reference", "numba"):
            ours = measure.relative_error(la.Linear()(q, k, v, causal=causal, backend=backend), want)
            assert ours <= factor * theirs


# ---------------------------------------------------------------------------------------------- as published


def test_the_published_tables_are_those_of_the_published_figures():
    folder = Path(__file__).resolve().parent.parent / "docs" / "measured"
    data = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    figures = verdict.figures_from(data)
    assert data["faults"] == verdict.faults(figures) == []
    page = (folder / "audit.rst").read_text(encoding="utf-8")
    made = tables.as_rst(tables.tables(figures, [peers.Row(*row) for row in data["peers"]]), "")
    assert page.startswith(made[: made.rindex("**")])
    ratios = [f.ratio for f in figures if f.ratio is not None]
    assert len(ratios) > 1000
    assert max(ratios) <= 1


def test_a_full_audit_is_shown_by_its_summary():
    """The tables over all families, not one for each value."""
    file = Path(__file__).resolve().parent.parent / "docs" / "measured" / "audit.json"
    figures = verdict.figures_from(json.loads(file.read_text(encoding="utf-8")))
    whole, summary = tables.tables(figures), tables.tables(figures, whole=False)
    assert [table.title for table in summary] == [f"{table.title}, full audit" for table in whole[: len(summary)]]
    assert len(summary) == 4
    assert [table.rows for table in summary] == [table.rows for table in whole[:4]]
    plan = list(survey.cases(["Linear", "CosFormer"], True))
    assert max(case.n for case in plan) == 1_000_000
    assert len(plan) > 2 * len(list(survey.cases(["Linear", "CosFormer"], False)))
