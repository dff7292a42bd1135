"""Check and measure the kernels on a machine with an NVIDIA GPU, in one run of under ten minutes.

    python -m linattn.backends.cupy.check --out DIR [--budget 540] [--only ceilings,correct,repeat,speed]

ceilings: what this card reaches in a copy and in a bf16 product. correct: every kind of kernel, forward, states and
backward, against float64. repeat: two runs give the same bits. speed: against those ceilings, and, where they can be
imported, against PyTorch's flash and cuDNN attention and fla's linear attention. DIR/check.json is written after each.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays
from linattn.backends.reference import linear as reference

from . import _maps, linear

LIMIT = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1.4, "float16": 1.4}  # 16 bits: in roundings of the result
GRADIENT = {"float64": 2e-13, "float32": 2e-6, "bfloat16": 4 * 2**-9, "float16": 2**-10}
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}  # where nothing else is known
TOKENS = (1, 63, 64, 65, 1000, 4097)
ROTATED_BYTES = 2**28  # inputs change between calls, so that no cache holds them
SHAPES = (  # batch, heads, tokens, width
    (8, 16, 2048, 64), (32, 12, 512, 64), (2, 16, 16384, 64), (1, 16, 65536, 64),
    (1, 8, 131072, 64), (4, 32, 4096, 128), (1, 96, 8192, 128), (2, 64, 16384, 128),
)  # fmt: skip


class Variant(NamedTuple):
    """A call of the engine."""

    dtype: str
    d: int
    feature_map: str = "elu1"
    normalize: bool = True
    eps: Any = "safe"
    turned: bool = False
    masked: bool = False
    span: str = "past"
    heads: tuple[int, ...] = (2, 3)
    heads_kv: tuple[int, ...] = (2, 3)


VARIANTS = (
    Variant("float64", 13, masked=True),
    Variant("float32", 13, masked=True, turned=True),
    *(
        variant
        for dtype in ("bfloat16", "float16")
        for d in (64, 128)
        for variant in (
            Variant(dtype, d),
            Variant(dtype, d, "identity", normalize=False),
            Variant(dtype, d, "relu", turned=True),
            Variant(dtype, d, masked=True, eps=("add", 0.5), heads_kv=(2, 1)),
            Variant(dtype, d, span="all", masked=True),
        )
    ),
)


class Call(NamedTuple):
    """The same call for the kernels and, in float64, for the reference."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    d_out: Any
    d_state: Any


def drawn(variant: Variant, n: int, xp: Any, seed: int = 0) -> Call:
    """Random arguments on the library's current device."""
    rng = np.random.default_rng(seed)
    real = xp.float64 if variant.dtype == "float64" else xp.float32
    if variant.dtype == "bfloat16":
        from ml_dtypes import bfloat16 as dtype
    else:
        dtype = getattr(xp, variant.dtype)

    def array(shape: tuple[int, ...], to: Any) -> Any:
        return xp.astype(xp.asarray(rng.normal(size=shape)), to)

    q, d_out = (array((*variant.heads, n, variant.d), dtype) for _ in "qg")
    k, v = (array((*variant.heads_kv, n, variant.d), dtype) for _ in "kv")
    sums = array((*variant.heads_kv, 1 + variant.turned, variant.d, variant.d + variant.normalize), real)
    angle = np.linspace(0, np.pi / 2, n)
    turn = xp.astype(xp.asarray(np.stack([np.cos(angle), np.sin(angle)], axis=-1)), real)
    mask = xp.asarray(rng.random((*variant.heads_kv, n)) > 0.3) if variant.masked else None
    options = {
        "feature_map": variant.feature_map, "span": variant.span, "turns": (turn, turn) if variant.turned else None,
        "key_mask": mask, "normalize": variant.normalize, "eps": variant.eps, "out": None, "xp": xp,
    }  # fmt: skip
    return Call((q, k, v, (abs(sums), 0 * sums)), options, d_out, array(sums.shape, real))


def both_ways(call: Call) -> tuple[Any, ...]:
    """out, the state's value, d_q, d_k, d_v, d_state."""
    out, den, after = linear.forward(*call.args, **call.options)
    q, k, v, state = call.args
    grads = linear.backward(call.d_out, call.d_state, q, k, v, state, den, **call.options)
    return out, after[0] + after[1], *grads


def right(call: Call) -> tuple[Any, ...]:
    """The same, by the reference room in float64."""
    options = call.options
    xp = options["xp"]

    def wide(x: Any) -> Any:
        return _arrays.cast(x, xp.float64, xp)

    q, k, v = (wide(x) for x in call.args[:3])
    state = tuple(wide(x) for x in call.args[3])
    options = {**options, "turns": options["turns"] and tuple(wide(x) for x in options["turns"])}
    out, den, after = _maps.forward(q, k, v, state, **options)
    grads = _maps.backward(wide(call.d_out), wide(call.d_state), q, k, v, state, den, **options)
    return out, reference._value(after, xp), *grads


def errors(variant: Variant, n: int, xp: Any) -> dict[str, float]:
    """Normwise errors, of out in roundings where it has 16 bits; each over what is allowed."""
    call = drawn(variant, n, xp)
    got, want = both_ways(call), right(call)

    def error(x: Any, y: Any) -> float:
        x, y = (_arrays.cast(a, xp.float64, xp) for a in (x, y))
        size = float(xp.sqrt(xp.sum(y * y)))
        return float(xp.sqrt(xp.sum((x - y) ** 2))) / size if size else float(xp.max(xp.abs(x)))

    out = error(got[0], want[0])
    if variant.dtype in ROUNDING:
        out /= max(error(_arrays.cast(want[0], got[0].dtype, xp), want[0]), ROUNDING[variant.dtype] / 4)
    limit = LIMIT[variant.dtype] * (1 if variant.normalize else 1.5)
    found = {"out": out / limit}
    names = ("state", "d_q", "d_k", "d_v", "d_state")
    return found | {
        name: error(x, y) / GRADIENT[variant.dtype] for name, x, y in zip(names, got[1:], want[1:], strict=True)
    }


def correct(xp: Any, variants: tuple[Variant, ...] = VARIANTS, tokens: tuple[int, ...] = TOKENS) -> dict[str, Any]:
    """{variant: worst error over what is allowed}, and what is above it."""
    worst: dict[str, float] = {}
    failures = []
    for variant in variants:
        for n in tokens:
            found = errors(variant, n, xp)
            name = " ".join(map(str, variant))
            worst[name] = max(worst.get(name, 0.0), *found.values())
            failures += [f"{name}, {n} tokens: {what} {x:.3g}" for what, x in found.items() if not x <= 1]
    return {"worst": worst, "failures": failures}


def repeat(xp: Any, variants: tuple[Variant, ...] = VARIANTS, n: int = 4097, times: int = 3) -> dict[str, Any]:
    """The variants whose bits are not those of the first run."""
    moved = []
    for variant in variants:
        call = drawn(variant, n, xp)
        first = both_ways(call)
        again = [both_ways(call) for _ in range(times - 1)]
        same = all(bool(xp.all((x == y) | (x != x))) for run in again for x, y in zip(run, first, strict=True))
        moved += [] if same else [" ".join(map(str, variant))]
    return {"moved": moved}


# -- time -------------------------------------------------------------------------------------------------------


def milliseconds(function: Callable[[], Any], cupy: Any, repeats: int = 20, rounds: int = 5) -> float:
    """Median of rounds that the card's own clock times, after warming up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / repeats)
    return sorted(times)[rounds // 2]


def ceilings(cupy: Any) -> dict[str, Any]:
    """TB/s of a copy, read and written, and TFLOP/s of a bf16 product, if PyTorch is there to make one."""
    x = cupy.ones(2**31, dtype=cupy.uint8)
    y = cupy.empty_like(x)
    found = {"copy_tb_s": 2 * x.nbytes / milliseconds(lambda: cupy.copyto(y, x), cupy, 10) / 1e9}
    try:
        import torch
    except ImportError:
        return found
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        return found | {"product_tflop_s": 2 * 8192**3 / milliseconds(lambda: a @ b, cupy, 10) / 1e9}


def ours(shape: tuple[int, ...], xp: Any, cupy: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, a call): normalised, plain and with turns; forward, then both ways."""
    batch, heads, n, d = shape
    sets = max(2, min(8, ROTATED_BYTES // (2 * batch * heads * n * d)))
    for name, variant in (
        ("normalised", Variant("bfloat16", d)),
        ("plain", Variant("bfloat16", d, "identity", normalize=False)),
        ("turned", Variant("bfloat16", d, "relu", turned=True)),
    ):
        calls = [
            drawn_on_device(variant._replace(heads=shape[:2], heads_kv=shape[:2]), n, xp, cupy) for _ in range(sets)
        ]
        turn = itertools.cycle(calls)

        def forward(turn: Iterator[Call] = turn) -> Any:
            call = next(turn)
            return linear.forward(*call.args, **call.options)

        def both(turn: Iterator[Call] = turn) -> Any:
            return both_ways(next(turn))

        yield f"{name} forward", forward
        yield f"{name} both ways", both


def drawn_on_device(variant: Variant, n: int, xp: Any, cupy: Any) -> Call:
    """As `drawn`, by the card's own generator: there may be gigabytes."""
    small = drawn(variant, 2, xp)

    def array(like: Any) -> Any:
        return cupy.random.standard_normal((*like.shape[:-2], n, like.shape[-1]), dtype=cupy.float32).astype(like.dtype)

    q, k, v = (array(x) for x in small.args[:3])
    turns = None
    if variant.turned:
        angle = cupy.linspace(0, np.pi / 2, n, dtype=cupy.float32)
        turns = (cupy.stack([cupy.cos(angle), cupy.sin(angle)], axis=-1),) * 2
    return small._replace(
        args=(q, k, v, small.args[3]), options={**small.options, "turns": turns}, d_out=array(small.d_out)
    )


def others(shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Softmax as PyTorch has it, and fla's linear attention: what can be imported. fla tunes for minutes: last."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return
    batch, heads, n, d = shape
    q, k, v = (torch.randn(batch, heads, n, d, device="cuda", dtype=torch.bfloat16) for _ in "qkv")

    def softmax(backend: Any) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call

    if n <= 65536:
        yield "softmax, flash", softmax(SDPBackend.FLASH_ATTENTION)
        yield "softmax, cuDNN", softmax(SDPBackend.CUDNN_ATTENTION)
    try:
        chunk_linear_attn = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    except ImportError:
        return
    tokens_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    yield "fla, plain", lambda: chunk_linear_attn(*tokens_first, normalize=False)
    yield "fla, normalised", lambda: chunk_linear_attn(*tokens_first, normalize=True)


def speed(xp: Any, cupy: Any, left: Callable[[], float], copy_tb_s: float) -> dict[str, Any]:
    """{shape: {name: ms}}, with the floor of four tensor passes at the speed of a copy."""
    table: dict[str, Any] = {}
    for shape in SHAPES:
        batch, heads, n, d = shape
        row: dict[str, Any] = {"floor": 4 * 2 * batch * heads * n * d / copy_tb_s / 1e9}
        table["B{} H{} N{} D{}".format(*shape)] = row
        for source in (ours(shape, xp, cupy), others(shape)):
            for name, call in source:
                if left() < 30:
                    row[name] = "no time left"
                    continue
                try:
                    row[name] = milliseconds(call, cupy, 3 if name.startswith("softmax") else 20)
                except Exception as error:  # another library may refuse a shape
                    row[name] = f"{type(error).__name__}: {error}"[:100]
        cupy.get_default_memory_pool().free_all_blocks()
        print("B{} H{} N{} D{}".format(*shape), {k: x if isinstance(x, str) else round(x, 4) for k, x in row.items()})
    return table


def main(given: list[str] | None = None) -> int:
    """Run the sections asked for; the number of failures."""
    from . import launch

    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m linattn.backends.cupy.check", description=about)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where check.json goes")
    parser.add_argument("--budget", type=float, default=540, metavar="S", help="seconds for everything")
    parser.add_argument("--only", default="ceilings,correct,repeat,speed", help="sections, separated by commas")
    options = parser.parse_args(given)
    reason = launch.why_not()
    if reason:
        print(f"There is nothing to check: {reason}.", file=sys.stderr)
        return 1
    cupy = launch.cupy()
    xp = _arrays.namespace(cupy.ones(1))
    end = time.monotonic() + options.budget
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
    results: dict[str, Any] = {
        "device": name, "date": time.strftime("%Y-%m-%d"), "cupy": cupy.__version__,
        "card": launch.device(cupy.cuda.runtime.getDevice()).card._asdict(),
    }  # fmt: skip
    sections: dict[str, Callable[[], Any]] = {
        "ceilings": lambda: ceilings(cupy),
        "correct": lambda: correct(xp),
        "repeat": lambda: repeat(xp),
        "speed": lambda: speed(
            xp, cupy, lambda: end - time.monotonic(), results.get("ceilings", {}).get("copy_tb_s", 4.0)
        ),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for section, run in sections.items():
        if section not in options.only.split(","):
            continue
        start = time.monotonic()
        try:
            results[section] = run()
            failures += len(results[section].get("failures", ())) + len(results[section].get("moved", ()))
        except Exception:  # the other sections still have something to say
            results[section] = {"failed": traceback.format_exc()}
            failures += 1
        print(f"{section}: {time.monotonic() - start:.1f} s", flush=True)
        (options.out / "check.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
        if section != "speed":
            print(json.dumps(results[section], indent=1, default=str)[:4000], flush=True)
    print(f"{failures} failures; {options.out / 'check.json'}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
