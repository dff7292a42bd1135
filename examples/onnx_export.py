"""A mechanism as an ONNX model, forward and gradient, run by onnxruntime.

    pip install ndonnx onnxruntime
    python examples/onnx_export.py

The reference room is array-API code, so an array library that records instead of computing gives the graph. Shapes are
fixed when it is recorded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ndonnx as nd
import numpy as np
import onnxruntime

import linattn as la

MECHANISMS = (
    la.Linear("elu1"),
    la.CosFormer(length=128),
    la.Softmax(),
    la.Performer(16, seed=0),
    la.LLN(alpha=0.8, beta=0.6),
)


def export(attend: Any, shape: tuple[int, ...]) -> Any:
    """The model q, k, v, d_out -> out, d_q, d_k, d_v for causal self-attention in float32."""
    inputs = {name: nd.argument(shape=shape, dtype=nd.float32) for name in ("q", "k", "v", "d_out")}
    *args, d_out = inputs.values()
    out, backward = attend.vjp(*args, causal=True)
    d_q, d_k, d_v = backward(d_out)
    return nd.build(inputs, {"out": out, "d_q": d_q, "d_k": d_k, "d_v": d_v})


def run(model: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    """The model's outputs by onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(("q", "k", "v", "d_out"), arrays, strict=True)))


def error(attend: Any, shape: tuple[int, ...] = (2, 24, 8), file: Path | None = None) -> float:
    """The greatest relative error of the exported model's outputs against the plain verbs."""
    model = export(attend, shape)
    if file is not None:
        file.write_bytes(model.SerializeToString())
    *args, d_out = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    out, backward = attend.vjp(*args, causal=True)
    pairs = zip(run(model, *args, d_out), (out, *backward(d_out)), strict=True)
    return max(float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in pairs)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="keep the first mechanism's model here")
    names = [type(attend).__name__ for attend in MECHANISMS]
    parser.add_argument("--mechanisms", nargs="+", default=names, choices=names)
    given = parser.parse_args(arguments)
    far = {}
    chosen = [attend for attend in MECHANISMS if type(attend).__name__ in given.mechanisms]
    for i, attend in enumerate(chosen):
        far[repr(attend)] = error(attend, file=given.file if i == 0 else None)
        print(f"{attend!r}: onnxruntime and linattn differ by {far[repr(attend)]:.1e}")
    return far


if __name__ == "__main__":
    main()
