"""`interop.torch.Attention` in the place of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import copy
import pickle
from importlib import import_module
from importlib.util import find_spec

import pytest
from cases import MAIN, assert_bits, assert_close, assert_gradients_close

import linattn as la

torch = import_module("torch") if find_spec("torch") else None
interop = import_module("linattn.interop.torch") if torch else None
pytestmark = pytest.mark.torch

TOLERANCE = 1e-12
D, HEADS, N, M, BATCH = 12, 3, 7, 9, 2


@pytest.fixture
def tokens(rng):
    """(batch, n, embed_dim) in float64."""
    return lambda n=N: torch.from_numpy(rng.normal(size=(BATCH, n, D)))


@pytest.fixture
def hidden(rng):
    mask = torch.from_numpy(rng.random((BATCH, M)) > 0.6)
    mask[:, 0] = False
    return mask


def make(mechanism, **options):
    torch.manual_seed(0)
    return interop.Attention(D, HEADS, mechanism=mechanism, dtype=torch.float64, **options)


@pytest.fixture(params=[True, False], ids=["batch first", "tokens first"])
def pair(request):
    """torch's own module and ours with its parameters."""
    torch.manual_seed(1)
    theirs = torch.nn.MultiheadAttention(D, HEADS, batch_first=request.param, dtype=torch.float64)
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours = make(la.Softmax(), batch_first=request.param)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def test_it_is_multihead_attention(pair, tokens, hidden):
    theirs, ours = pair
    q, k, v = tokens(N), tokens(M), tokens(M)
    if not ours.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    floats = torch.zeros(BATCH, M, dtype=q.dtype).masked_fill(hidden, float("-inf"))
    for mask in (None, hidden, floats):
        for average in (True, False):
            options = {"key_padding_mask": mask, "need_weights": True, "average_attn_weights": average}
            (want, weights), (out, own) = theirs(q, k, v, **options), ours(q, k, v, **options)
            assert_close(out, want.detach().numpy(), TOLERANCE)
            assert_close(own, weights.detach().numpy(), TOLERANCE)
    assert ours(q, k, v)[1] is None


def test_causal_and_without_a_batch(pair, tokens):
    theirs, ours = pair
    x = tokens()[0]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(N, dtype=x.dtype)
    want, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert_close(ours(x, x, x, is_causal=True)[0], want.detach().numpy(), TOLERANCE)
    assert_close(ours(x, x, x, attn_mask=mask, is_causal=True)[0], want.detach().numpy(), TOLERANCE)


def test_it_starts_like_multihead_attention():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(D, HEADS, dtype=torch.float64)
    ours = make(la.Linear())
    for name, want in theirs.state_dict().items():
        assert_bits(ours.state_dict()[name], want)
    without = make(la.Linear(), bias=False)
    assert set(without.state_dict()) == {"in_proj_weight", "out_proj.weight"}


# ------------------------------------------------------------------------------------ in torch's own layers


def encoder_layer(mechanism, **options):
    torch.manual_seed(2)
    layer = torch.nn.TransformerEncoderLayer(D, HEADS + 1, 16, dropout=0, batch_first=True, dtype=torch.float64)
    layer.self_attn = interop.Attention(D, HEADS + 1, mechanism=mechanism, dtype=torch.float64, **options)
    return layer


def counted(module, monkeypatch):
    calls, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *a, **o: calls.append(o) or forward(*a, **o))
    return calls


@pytest.mark.parametrize("mechanism", MAIN, ids=repr)
def test_encoder_layer_calls_us_in_every_mode(mechanism, tokens, monkeypatch):
    """Training and eval agree; with an even number of heads and no gradient the layer would take its own path."""
    layer, x = encoder_layer(mechanism), tokens()
    want = layer(x)
    layer.eval()
    calls = counted(layer.self_attn, monkeypatch)
    with torch.no_grad():
        assert_close(layer(x), want.detach().numpy())
    assert len(calls) == 1


def test_a_subclass_would_be_passed_over(tokens):
    """The trap that the module's base class avoids: torch computes softmax and calls nobody."""

    class Subclass(torch.nn.MultiheadAttention):
        calls = 0

        def forward(self, *args, **options):
            Subclass.calls += 1
            return super().forward(*args, **options)

    layer = encoder_layer(la.Linear()).eval()
    layer.self_attn = Subclass(D, HEADS + 1, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        layer(tokens())
    assert Subclass.calls == 0
    assert not issubclass(interop.Attention, torch.nn.MultiheadAttention)


def test_encoder_hands_on_masks(tokens, hidden, monkeypatch):
    """Causal masks are detected by the encoder, padding comes as 0 and -inf; both mean what they say."""
    layer = encoder_layer(la.Softmax())
    plain = torch.nn.TransformerEncoderLayer(D, HEADS + 1, 16, dropout=0, batch_first=True, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=True)
    ours, theirs = (torch.nn.TransformerEncoder(x, 2, enable_nested_tensor=False).eval() for x in (layer, plain))
    x = tokens(M)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(M, dtype=x.dtype)
    padding = torch.zeros(BATCH, M, dtype=x.dtype).masked_fill(hidden, float("-inf"))
    for options in (
        {},
        {"mask": mask},
        {"src_key_padding_mask": padding},
        {"mask": mask, "src_key_padding_mask": padding},
    ):
        assert_close(ours(x, **options), theirs(x, **options).detach().numpy(), TOLERANCE)
    calls = counted(ours.layers[0].self_attn, monkeypatch)
    with torch.no_grad():
        ours(x, src_key_padding_mask=hidden)
    assert calls[0]["key_padding_mask"].is_floating_point()


def test_decoder_layer(tokens):
    """Self-attention and cross-attention both ours; cross-attention sees all of the memory."""
    torch.manual_seed(3)
    plain = torch.nn.TransformerDecoderLayer(D, HEADS + 1, 16, dropout=0, batch_first=True, dtype=torch.float64).eval()
    layer = copy.deepcopy(plain)
    for name in ("self_attn", "multihead_attn"):
        module = interop.Attention(D, HEADS + 1, mechanism=la.Softmax(), dtype=torch.float64)
        module.load_state_dict(getattr(plain, name).state_dict())
        setattr(layer, name, module)
    x, memory = tokens(N), tokens(M)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(N, dtype=x.dtype)
    want = plain(x, memory, tgt_mask=mask, tgt_is_causal=True)
    assert_close(layer(x, memory, tgt_mask=mask, tgt_is_causal=True), want.detach().numpy(), TOLERANCE)


# -------------------------------------------------------------------------------------------- grouped heads


@pytest.mark.parametrize("mechanism", MAIN, ids=repr)
def test_grouped_heads_are_repeated_heads(mechanism, tokens):
    grouped = interop.Attention(D, 6, mechanism=mechanism, num_kv_heads=2, dtype=torch.float64)
    full = interop.Attention(D, 6, mechanism=mechanism, dtype=torch.float64)
    q, k, v = grouped.in_proj_weight.detach().split(grouped.sizes)
    k, v = (x.unflatten(0, (2, 1, 2)).expand(-1, 3, -1, -1).reshape(D, D) for x in (k, v))
    full.load_state_dict(
        grouped.state_dict() | {"in_proj_weight": torch.cat([q, k, v]), "in_proj_bias": torch.zeros(3 * D)}
    )
    x = tokens()
    assert_close(grouped(x, x, x, is_causal=True)[0], full(x, x, x, is_causal=True)[0].detach().numpy())
    weights = grouped(x, x, x, need_weights=True, average_attn_weights=False)[1]
    assert_close(weights, full(x, x, x, need_weights=True, average_attn_weights=False)[1].detach().numpy())


# -------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("mechanism", MAIN, ids=repr)
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoding_is_one_causal_pass(mechanism, batch_first, tokens, hidden):
    module = make(mechanism, batch_first=batch_first)
    x = tokens(M).requires_grad_()
    whole = x if batch_first else x.transpose(0, 1)
    want, _ = module(whole, whole, whole, is_causal=True, key_padding_mask=hidden)
    want = want if batch_first else want.transpose(0, 1)
    state, parts = module.init_state(BATCH), []
    for a, b in ((0, 5), (5, 6), (6, M)):
        piece = x[:, a:b] if batch_first else x[:, a:b].transpose(0, 1)
        out, state = module.step(piece, state, key_padding_mask=hidden[:, a:b])
        parts.append(out if batch_first else out.transpose(0, 1))
    got = torch.cat(parts, dim=1)
    assert_close(got, want.detach().numpy(), TOLERANCE)
    parameters = [x, *module.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (got, want)]
    assert_gradients_close(*grads)
    single, _ = module.step(x[0], module.init_state())
    assert single.shape == (M, D)


def test_it_trains(tokens):
    torch.manual_seed(4)
    layer, x, target = encoder_layer(la.CosFormer(64), num_kv_heads=2), tokens(), tokens()
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x, is_causal=True, src_mask=torch.zeros(N, N)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_it_is_copied_pickled_and_compiled(tokens):
    module, x = make(la.CosFormer(64)), tokens()
    want = module(x, x, x, is_causal=True)[0]
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bits(again(x, x, x, is_causal=True)[0], want)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_bits(compiled(x, x, x, is_causal=True)[0], want)
    assert "CosFormer(64)" in repr(module)


def test_autocast_runs_in_sixteen_bits(tokens):
    module, x = make(la.Linear()).float(), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = module(x, x, x)
    assert out.dtype is torch.bfloat16
    assert_close(out.detach().float(), module(x, x, x)[0].detach().numpy(), 3e-2)


# ------------------------------------------------------------------------------------------------- refusals


def test_refusals(tokens, hidden):
    module, x = make(la.Linear()), tokens(M)
    new = interop.Attention
    half = torch.zeros(BATCH, M).masked_fill(hidden, -1.0)
    for error, match, call in (
        (TypeError, "`mechanism` must be a value", lambda: new(D, HEADS, mechanism="softmax")),
        (ValueError, "`num_heads` must divide `embed_dim` = 12, got 5", lambda: new(D, 5, mechanism=la.Linear())),
        (ValueError, "`num_kv_heads` must divide", lambda: new(D, 6, num_kv_heads=4, mechanism=la.Linear())),
        (TypeError, "`num_heads` must be an integer", lambda: new(D, 1.5, mechanism=la.Linear())),
        (ValueError, "`backend` must be one of", lambda: new(D, 3, mechanism=la.Linear(), backend="fast")),
        (ValueError, "`attn_mask` must come with", lambda: module(x, x, x, attn_mask=torch.zeros(M, M))),
        (
            ValueError,
            "`attn_mask` must have shape",
            lambda: module(x, x, x, attn_mask=torch.zeros(2, 2), is_causal=True),
        ),
        (ValueError, "earlier keys come as a state, see `step`", lambda: module(x[:, :3], x, x, is_causal=True)),
        (ValueError, "`key_padding_mask` must have shape", lambda: module(x, x, x, key_padding_mask=hidden[:, :3])),
        (ValueError, "0 and -inf alone", lambda: module(x, x, x, key_padding_mask=half)),
        (TypeError, "must hold bool, or 0 and -inf", lambda: module(x, x, x, key_padding_mask=hidden.int())),
        (ValueError, "`query` must have shape", lambda: module(x[..., :4], x, x)),
        (TypeError, "`key` must be a dense Tensor, got list", lambda: module(x, [1], x)),
        (ValueError, "`batch` must be at least 0", lambda: module.init_state(-1)),
        (ValueError, "cannot stream", lambda: make(la.CosFormer()).init_state(2)),
    ):
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(TypeError, match="enable_nested_tensor=False"):
        module(torch.nested.nested_tensor([x[0]], layout=torch.jagged), x, x)
