"""The drill: named faults of one line, each put into a copy of the real code, each of which a named test must find.

    python scripts/mutate.py                 all of them; a quarter of an hour
    python scripts/mutate.py --sample        those that CI tries; under three minutes
    python scripts/mutate.py NAME ...        some
    python scripts/mutate.py --list

A fault survives if its tests stay green, or do not run; then the tests are too weak, and the exit status is 1. The tests
must be green without any fault, or nothing is tried at all. A fault whose line is gone is an error: the list follows the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("linattn", "tests", "pyproject.toml", "docs/measured", "scripts", "README.md", ".ci")
SECONDS = 240  # a fault may make tests hang: that is found as well
RED, GREEN = 1, 0  # pytest: some failed, all passed; anything else is neither

LINEAR, SOFTMAX = "linattn/backends/reference/linear.py", "linattn/backends/reference/softmax.py"
ENGINE, SOFTMAX_ENGINE, FEATURES = "linattn/engines/linear.py", "linattn/engines/softmax.py", "linattn/engines/features.py"
VERBS, COSFORMER = "linattn/mechanisms/attention.py", "linattn/mechanisms/cosformer.py"
ARRAYS, CHECKS, STATES = "linattn/_arrays.py", "linattn/_checks.py", "linattn/states.py"
NUMBA = "linattn/backends/numba/"
FORMULA = "tests/test_forward.py::test_out_is_the_formulas"
DERIVATIVE = "tests/test_gradients.py::test_vjp_is_the_formulas_derivative"
SIZES = "tests/test_forward.py::test_sizes_around_the_chunks"


class Fault(NamedTuple):
    """One line made wrong: `old` stands once in `file`; `test` is a pytest node, `select` its -k."""

    name: str
    file: str
    old: str
    new: str
    test: str
    select: str = ""
    sampled: bool = False


FAULTS = [
    # -- mixing
    Fault("diagonal excluded", LINEAR, "xp.tril(scores)", "xp.tril(scores, k=-1)", FORMULA, "reference and Linear and float64", True),
    Fault("triangle off by one", LINEAR, "xp.tril(scores)", "xp.tril(scores, k=1)", FORMULA, "reference and Linear and float64"),
    Fault("softmax sees one key too many", SOFTMAX, "device=_arrays.device(q))[None, :] <= t)",
          "device=_arrays.device(q))[None, :] <= t + 1)", FORMULA, "reference and Softmax and float64"),
    Fault("cached keys not counted", SOFTMAX, "t = xp.arange(first + offset, last + offset,", "t = xp.arange(first, last,",
          "tests/test_streaming.py::test_any_split_is_the_whole_pass", "reference and Softmax", True),
    Fault("last ragged chunk dropped", NUMBA + "_linear.py", "            for c in range(0, N, CHUNK):\n                n = min(CHUNK, N - c)\n                query_features",
          "            for c in range(0, N // CHUNK * CHUNK, CHUNK):\n                n = min(CHUNK, N - c)\n                query_features", SIZES, "Linear and True"),
    Fault("state kept across packed boundaries", VERBS, "y, _, saved = self._forward(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], None, own, room)",
          "y, kept_on, saved = self._forward(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], locals().get('kept_on'), own, room)",
          FORMULA, "packed and causal and Linear and float64"),
    Fault("positions kept across packed boundaries", VERBS, "return call._replace(key_mask=mask, positions=positions)",
          "return call._replace(key_mask=mask, positions=positions, first_position=first)",
          "tests/test_cosformer.py::test_packed_sequences_are_separate_calls_to_the_bit", "512"),
    Fault("normaliser over heads", LINEAR, "        c, _, dead = divisor(den, eps, xp)\n        num_den",
          "        c, _, dead = divisor(xp.sum(den, axis=0, keepdims=True) / max(den.shape[0], 1), eps, xp)\n        num_den",
          "tests/test_peers.py::test_fla_594_normaliser_summed_over_heads", "reference and Linear", True),
    Fault("mask on v only", LINEAR, "    phi_k, v1 = visible(phi_k, key_mask, xp), visible(v1, key_mask, xp)",
          "    v1 = visible(v1, key_mask, xp)", "tests/test_invariances.py::test_a_masked_key_is_a_removed_key", "reference and Linear", True),
    Fault("mask by product", LINEAR, "return x if key_mask is None else xp.where(key_mask[..., None], x, xp.zeros_like(x))",
          "return x if key_mask is None else x * _arrays.cast(key_mask[..., None], x.dtype, xp)",
          "tests/test_invariances.py::test_a_masked_key_is_a_removed_key", "reference and Linear"),
    Fault("queries of a group get the first head's keys", NUMBA + "_layout.py", "        total = total + index * step\n", "        total = total + index * step * (axis > 0)\n",
          FORMULA, "numba and float64 and Linear", True),
    # -- features
    Fault("elu(x) + 1 as it is written", FEATURES, "return xp.where(x > 0, 1 + x, below)", "return 1 + xp.where(x > 0, x, below - 1)",
          "tests/test_invariances.py::test_elu1_far_below_zero_is_the_exponential", "reference", True),
    Fault("relu swallows NaN", FEATURES, "return xp.where(x <= 0, xp.zeros_like(x), x)  # x > 0", "return xp.where(x > 0, x, xp.zeros_like(x))  # x > 0",
          "tests/test_causality.py::test_a_bad_key_stays_in_the_rows_that_see_it", "reference and relu", True),
    Fault("relu has slope 1 at 0", FEATURES, "return xp.where(x <= 0, xp.zeros_like(x), d_phi)", "return xp.where(x < 0, xp.zeros_like(x), d_phi)",
          "tests/test_gradients.py::test_subgradients_at_zero", "reference", True),
    Fault("elu1 has slope 1 everywhere", FEATURES, "    return d_phi * slope", "    return d_phi", DERIVATIVE, "Linear() and not packed"),
    Fault("cosine not reduced", COSFORMER, "xp.where(low, xp.cos(near), xp.sin(far)), xp", "xp.cos(near), xp",
          "tests/test_cosformer.py::test_table_is_right_to_a_rounding", "", True),
    Fault("length of the current call", COSFORMER, "length = self.length or max(n_queries, n_keys, 1)", "length = max(n_queries, n_keys, 1)",
          "tests/test_cosformer.py::test_a_fixed_length_does_not_look_at_how_long_the_input_is", "", True),
    Fault("a stream forgets its position", COSFORMER, "table = self._table(call.first_position,", "table = self._table(0 * call.first_position,",
          "tests/test_streaming.py::test_any_split_is_the_whole_pass", "reference and CosFormer"),
    Fault("stretch counts from 0", COSFORMER, "self._table(1, n, max(n, 1), like, call)", "self._table(0, n, max(n, 1), like, call)",
          FORMULA, "reference and stretch and float64"),
    Fault("eps added to the sums", LINEAR, "return xp.where(den == 0, one, den), one, den == 0", "return xp.where(den == 0, one, den) + 1e-6, one, den == 0",
          "tests/test_invariances.py::test_ones_give_ones", "reference and Linear"),
    Fault("no stabiliser", SOFTMAX, "p = xp.exp(scores - top)", "p = xp.exp(scores)", "tests/test_peers.py::test_performer_pytorch_constants_in_the_features",
          "reference and Softmax", True),
    Fault("maximum over all keys", SOFTMAX, "    scores = xp.where(seen, scores, xp.full_like(scores, -math.inf))\n    top = xp.max(scores, axis=-1, keepdims=True)",
          "    top = xp.max(scores, axis=-1, keepdims=True)\n    scores = xp.where(seen, scores, xp.full_like(scores, -math.inf))",
          "tests/test_causality.py::test_a_huge_suffix_stays_behind", "reference and Softmax"),
    # -- backward
    Fault("denominator path dropped from d_q", LINEAR, "d_phi_q = d_phi_q + g_den * seen", "d_phi_q = d_phi_q + 0 * seen", DERIVATIVE, "Linear() and not packed", True),
    Fault("denominator path dropped from d_k", LINEAR, "xp.concat([g, g_den], axis=-1)\n", "xp.concat([g, 0 * g_den], axis=-1)\n",
          "tests/test_peers.py::test_fla_875_gradient_of_k_without_the_denominator", "reference and Linear", True),
    Fault("softmax's mean dropped", SOFTMAX, "d_s = p * (d_p - xp.sum(p * d_p, axis=-1, keepdims=True, dtype=p.dtype))", "d_s = p * d_p",
          DERIVATIVE, "Softmax() and not packed", True),
    Fault("span not transposed", LINEAR, "turned, T = TRANSPOSED[span],", "turned, T = span,", DERIVATIVE, "Linear() and causal"),
    Fault("values not centred", LINEAR, "mu = visible_mean(v1[..., :-1], key_mask, xp)", "mu = 0 * visible_mean(v1[..., :-1], key_mask, xp)",
          "tests/test_gradients.py::test_values_far_from_zero", "reference and Linear", True),
    Fault("broadcast axes averaged", ARRAYS, "total = xp.sum(x, axis=stretched, keepdims=True, dtype=x.dtype)", "total = xp.mean(x, axis=stretched, keepdims=True)",
          "tests/test_invariances.py::test_broadcast_arguments_are_repeated_ones", "reference and Linear", True),
    Fault("a state's cotangent dropped", LINEAR, "after = xp.zeros_like(before) if after is None else _arrays.cast(after, before.dtype, xp)", "after = xp.zeros_like(before)",
          "tests/test_peers.py::test_mamba_cotangent_of_the_last_state_dropped", "reference", True),
    Fault("d_v not masked", LINEAR, "visible(d_phi_k, key_mask, xp), visible(d_v, key_mask, xp))\n    finished", "visible(d_phi_k, key_mask, xp), d_v)\n    finished",
          "tests/test_invariances.py::test_a_masked_key_is_a_removed_key", "reference and Linear"),
    Fault("d_k not masked behind the map", ENGINE, "visible(vjp(d_phi_k, _arrays.cast(k, phi_k.dtype, xp), xp), _seen_by_any(options.key_mask, k, xp), xp)",
          "vjp(d_phi_k, _arrays.cast(k, phi_k.dtype, xp), xp)", "tests/test_gradients.py tests/test_invariances.py tests/test_causality.py", "mask or nan or bad"),
    Fault("row scale not undone", LINEAR, "d_phi_q = d_phi_q * scale", "d_phi_q = d_phi_q * 1", DERIVATIVE, "Linear() and not packed"),
    Fault("incoming state not centred", LINEAR, "before[..., :-1] - before[..., -1:] * wide_mu, before", "before[..., :-1], before",
          "tests/test_gradients.py::test_cotangents_of_states_from_the_formula", "reference", True),
    Fault("outgoing cotangent not uncentred", LINEAR, "d_before[..., -1:] - lost]", "d_before[..., -1:]]",
          "tests/test_gradients.py::test_cotangents_of_states_from_the_formula", "reference"),
    # -- machine
    Fault("rest of a state forgotten", LINEAR, "    return sums + rest\n", "    return sums\n", "tests/test_backends.py::test_both_parts_of_a_state_count", "reference", True),
    Fault("merging rounds", ENGINE, "earlier.rest + later.rest + lost)", "earlier.rest + later.rest)", "tests/test_streaming.py::test_merging_loses_nothing", "", True),
    Fault("running state in float32", ARRAYS, "        return x.dtype\n    return xp.float64\n", "        return x.dtype\n    return x.dtype\n",
          "tests/test_long.py::test_repeated_keys", "reference and float32"),
    Fault("sums in 16 bits", ARRAYS, 'return xp.float64 if dtype_name(x) == "float64" else xp.float32', 'return xp.float64 if dtype_name(x) == "float64" else x.dtype',
          "tests/test_forward.py::test_sixteen_bits_are_rounded_once", "reference and Linear and float16", True),
    Fault("float64 done in float32", ARRAYS, 'return xp.float64 if dtype_name(x) == "float64" else xp.float32', "return xp.float32",
          "tests/test_peers.py::test_fla_naive_float64_done_in_float32", "reference", True),
    Fault("numerator rounded before the division", LINEAR, "num_den = xp.where(dead, xp.zeros_like(num), num / c)",
          "num_den = xp.where(dead, xp.zeros_like(num), _arrays.cast(_arrays.cast(num, q.dtype, xp), num.dtype, xp) / c)",
          "tests/test_extremes.py::test_sixteen_bits_divide_before_they_round", "reference", True),
    Fault("no power of two for small rows", LINEAR, "            phi_q = phi_q * scale\n", "            scale = xp.ones_like(scale)\n",
          "tests/test_invariances.py::test_tiny_and_huge_features_in_float32", "reference"),
    Fault("NaN left in the products", LINEAR, "    b, c = xp.where(bad_b, xp.zeros_like(b), b), xp.where(bad_c, xp.zeros_like(c), c)\n", "",
          "tests/test_causality.py::test_a_bad_key_stays_in_the_rows_that_see_it", "reference and Linear", True),
    Fault("NaN not put back", LINEAR, "return _nan_where(seen, out, xp), _nan_where(spoiled, total, xp)", "return out, _nan_where(spoiled, total, xp)",
          "tests/test_causality.py::test_a_bad_value_stays_in_its_column", "reference and Linear"),
    Fault("result may overlap an input", CHECKS, "    if any(_arrays.share_memory(out, x) for x in inputs):", "    if False:",
          "tests/test_errors.py::test_results_that_cannot_be_filled", "", True),
    Fault("repeated edges refused", CHECKS, "any(a > b for a, b in pairwise(edges))", "any(a >= b for a, b in pairwise(edges))", FORMULA, "reference and packed and Linear() and float64"),
    Fault("trailing bytes accepted", STATES, "n_bytes == math.prod(came_shape) * dtype.itemsize", "n_bytes >= math.prod(came_shape) * dtype.itemsize",
          "tests/test_streaming.py", "not_a_state or truncated or damaged", True),
    Fault("any version accepted", STATES, 'if header["magic"] != MAGIC or header["version"] != VERSION:', 'if header["magic"] != MAGIC:',
          "tests/test_streaming.py", "not_a_state"),
    # -- compiled
    Fault("negative strides forgotten", NUMBA + "_layout.py", "    start = -sum(min(0, step) * (n - 1) for n, step in zip(shape, strides) if n > 0)\n", "    start = 0\n",
          "tests/test_inputs.py::test_a_layout_changes_no_bit", "numba and Linear", True),
    Fault("offsets of 32 bits", NUMBA + "_layout.py", "index = np.arange(n, dtype=np.int64)", "index = np.arange(n, dtype=np.int32) * np.int32(1)",
          "tests/test_extremes.py::test_elements_beyond_two_to_the_31", "numba"),
    Fault("rows behind a ragged chunk not cleared", NUMBA + "_linear.py", "    clear_rows(min(CHUNK, count + BLOCK) - count, padded, x, count * padded, padded)\n", "    pass\n",
          SIZES + " " + FORMULA, "Linear and (True or numba)"),
    Fault("an infinite denominator divides", NUMBA + "_linear.py", "c[t] = d + (d - d)", "c[t] = d", "tests/test_causality.py::test_an_infinite_denominator_is_no_zero", ""),
    Fault("values of hidden keys not cleared", NUMBA + "_linear.py",
          "                    if masked:\n                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)\n                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)\n                    values = ",
          "                    if masked:\n                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)\n                    values = ",
          "tests/test_invariances.py::test_a_masked_key_is_a_removed_key", "numba and Linear"),
    Fault("the rest of a sum never settles", NUMBA + "_tiles.py", "SETTLE = 96 ", "SETTLE = 96 << 20 ", "tests/test_long.py", "numba and float32 and Linear or numba and not_grow"),
    Fault("a power of two not undone", NUMBA + "_linear.py",
          "unmap_rows(which, n, D, power, 1, q, q_at + c * q_stride, q_stride, Y, Fp, d_q, (den_at + c) * D, D)\n                else",
          "unmap_rows(which, n, D, unit, 0, q, q_at + c * q_stride, q_stride, Y, Fp, d_q, (den_at + c) * D, D)\n                else",
          "tests/test_backends.py::test_rooms_agree", "Linear() and not packed"),
    Fault("heads of a group overwrite each other", NUMBA + "_linear.py", "store_cotangent(X, F, E, E1, cols, mu, zero, d_before, state_at, same)",
          "store_cotangent(X, F, E, E1, cols, mu, zero, d_before, state_at, False)", "tests/test_gradients.py::test_cotangents_of_states_from_the_formula", "numba and Linear"),
    Fault("NaN assumed away", NUMBA + "_jit.py", 'EXACT = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}',
          'EXACT = {"nogil": True, "error_model": "numpy", "fastmath": True}', "tests/test_causality.py", "numba"),
    Fault("division by zero raises", NUMBA + "_jit.py", 'EXACT = {"nogil": True, "error_model": "numpy",', 'EXACT = {"nogil": True, "error_model": "python",',
          "tests/test_causality.py::test_a_row_without_weight_stays_zero tests/test_architecture.py", "numba or flags"),
    Fault("a fork keeps its parent's pool", NUMBA + "threads.py", "    os.register_at_fork(after_in_child=_forget)\n", "    pass\n",
          "tests/test_processes.py::test_a_fork_after_use_builds_its_own_pool", ""),
    Fault("a share of the work is lost", NUMBA + "_calls.py", "marks = [i * n_groups // pieces for i in range(pieces + 1)]", "marks = [i * (n_groups - 1) // pieces for i in range(pieces + 1)]",
          FORMULA, "numba and float64 and Linear() and not packed"),
    Fault("shared folders trusted", NUMBA + "_jit.py", "    if here.st_uid != os.getuid() or here.st_mode & (stat.S_IWGRP | stat.S_IWOTH):\n        return False\n", "",
          "tests/test_processes.py", "planted or somebody", True),
    Fault("one name in the cache for all sources", NUMBA + "_jit.py", "        digest.update(path.read_bytes())\n", "        digest.update(path.name.encode())\n",
          "tests/test_processes.py::test_an_edited_source_is_compiled_anew", "", True),
    Fault("a spoiled cache stops the call", NUMBA + "_jit.py", "                except Exception as error:  # a spoiled", "                except OSError as error:  # a spoiled",
          "tests/test_processes.py::test_a_spoiled_cache_file_costs_time_only", "", True),
    # -- the audit itself
    Fault("the audit passes NaN", "linattn/audit/verdict.py", "        if not figure.ratio <= MOST_RATIO:", "        if figure.ratio > MOST_RATIO:", "tests/test_audit.py::test_limits", "", True),
    Fault("a lost figure is no fault", "linattn/audit/verdict.py", "            found.append(f\"{named(before)}: no longer measured.\")\n", "", "tests/test_audit.py::test_growth", "", True),
]  # fmt: skip


def copy(to: Path) -> None:
    """What the tests need, without what was compiled."""
    for name in COPIED:
        source, target = ROOT / name, to / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc"))
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def pytest(folder: Path, nodes: str, select: str) -> tuple[int, str]:
    """The exit status, and pytest's last line; a run that hangs is red."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:randomly", *nodes.split()]
    command += ["-k", select] if select else []
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    changes = {**os.environ, **one, "PYTHONPATH": str(folder), "CI": "true"}
    changes.pop("NUMBA_CACHE_DIR", None)
    try:
        done = subprocess.run(command, cwd=folder, env=changes, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return RED, f"took more than {SECONDS} s"
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return done.returncode, lines[-1]


def spoil(folder: Path, fault: Fault) -> str:
    """Put the fault in; gives the text that was there."""
    file = folder / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: its line stands {text.count(fault.old)} times in {fault.file}.")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return text


def drill(faults: list[Fault]) -> int:
    """Try them, two at a time; the number of survivors."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folders = [Path(name) / str(i) for i in range(min(2, os.cpu_count() or 1, len(faults)))]
        for folder in folders:
            copy(folder)
        by_selection: dict[str, list[str]] = {}
        for fault in faults:
            by_selection.setdefault(fault.select, []).extend(fault.test.split())
        free = list(folders)

        def green(item: tuple[str, list[str]]) -> tuple[int, str, str]:
            folder = free.pop()
            try:
                return *pytest(folder, " ".join(dict.fromkeys(item[1])), item[0]), f"{item[1]} -k '{item[0]}'"
            finally:
                free.append(folder)

        def tried(fault: Fault) -> bool:
            folder = free.pop()
            before = spoil(folder, fault)
            start = time.perf_counter()
            try:
                status, line = pytest(folder, fault.test, fault.select)
            finally:
                (folder / fault.file).write_text(before, encoding="utf-8")
                free.append(folder)
            verdict = {RED: "found", GREEN: "SURVIVED"}.get(status, f"NOT RUN ({status})")
            print(f"{verdict:9} {time.perf_counter() - start:5.1f} s  {fault.name}: {line}", flush=True)
            return status == RED

        with ThreadPoolExecutor(len(folders)) as pool:
            for status, line, what in pool.map(green, by_selection.items()):
                if status != GREEN:
                    raise SystemExit(f"Without any fault the tests must be green, got {line} from {what}.")
            print(f"green without a fault; {len(faults)} faults to try", flush=True)
            return sum(not found for found in pool.map(tried, faults))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults by name; by default all")
    parser.add_argument("--sample", action="store_true", help="those that CI tries")
    parser.add_argument("--list", action="store_true", help="print the names")
    options = parser.parse_args()
    unknown = set(options.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    faults = [f for f in FAULTS if (f.name in options.names or not options.names) and (f.sampled or not options.sample)]
    if options.list:
        print("\n".join(f"{fault.name}  ({fault.file})" for fault in faults))
        return 0
    survivors = drill(faults)
    print(f"{len(faults) - survivors} of {len(faults)} faults found." + (f" {survivors} SURVIVED." if survivors else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
