"""A module in the place of `torch.nn.MultiheadAttention`: its parameters, its forward, any mechanism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linattn import _checks
from linattn.interop._torch_call import attention, step
from linattn.mechanisms.attention import Attention as Mechanism
from linattn.mechanisms.attention import State


class Attention(nn.Module):
    """Multi-head attention by any mechanism, in `torch.nn.MultiheadAttention`'s place.

    Parameters
    ----------
    embed_dim : int
        Channels of the input and the output.
    num_heads : int
        Heads of the queries; divides `embed_dim`.
    mechanism : Linear, CosFormer, Softmax, ...
        Any value of linattn.
    num_kv_heads : int, optional
        Heads of keys and values, each shared by `num_heads / num_kv_heads` heads of queries; by default `num_heads`.
    bias : bool
        Whether the projections have one.
    batch_first : bool
        Tokens are (batch, N, embed_dim), else (N, batch, embed_dim).
    backend : {"reference", "numba", "cupy"}, optional
        See `attention`.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    in_proj_weight, in_proj_bias, out_proj
        As in `torch.nn.MultiheadAttention`, so that `load_state_dict` takes a trained one: rows for the queries,
        the keys, the values.

    Raises
    ------
    ValueError, TypeError
        If the numbers of heads and channels do not fit, or the mechanism is none.

    Notes
    -----
    A module of its own and no subclass of `MultiheadAttention`: in eval mode `TransformerEncoderLayer` would pass a
    subclass over and compute softmax attention. `_qkv_same_embed_dim = False` makes it call us.
    There is no dropout of weights: a linear mechanism has no weights to drop.

    Examples
    --------
    >>> import torch
    >>> import linattn as la
    >>> from linattn.interop.torch import Attention
    >>> attend = Attention(32, 4, mechanism=la.CosFormer(length=4096), num_kv_heads=2)
    >>> x = torch.randn(2, 10, 32)
    >>> out, _ = attend(x, x, x, is_causal=True)
    >>> out.shape
    torch.Size([2, 10, 32])
    """

    _qkv_same_embed_dim = False  # encoder and decoder layers take their fused softmax path where this is true

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        mechanism: Mechanism,
        num_kv_heads: int | None = None,
        bias: bool = True,
        batch_first: bool = True,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(mechanism, Mechanism):
            raise TypeError(f"`mechanism` must be a value like linattn.Linear(), got {mechanism!r}.")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, n in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            _checks.natural(name, n)
        for name, whole, what, part in (
            ("num_heads", embed_dim, "embed_dim", num_heads),
            ("num_kv_heads", num_heads, "num_heads", num_kv_heads),
        ):
            if whole % part:
                raise ValueError(f"`{name}` must divide `{what}` = {whole}, got {part}.")
        _checks.backend_name(backend)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.mechanism, self.batch_first, self.backend = mechanism, batch_first, backend
        self.dropout = 0.0
        kv_dim = num_kv_heads * self.head_dim
        self.sizes = [embed_dim, kv_dim, kv_dim]
        of = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(sum(self.sizes), embed_dim, **of))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(sum(self.sizes), **of))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **of)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and zero biases as `MultiheadAttention` draws them."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, mechanism={self.mechanism!r}, num_kv_heads={self.num_kv_heads}"

    # -- whole sequences ------------------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, if asked for, the weights.

        Parameters
        ----------
        query, key, value : Tensor
            (batch, N or M, embed_dim), or as `batch_first` says, or without a batch.
        key_padding_mask : Tensor, optional
            (batch, M): True, or -inf in a mask of floats, where a key is *hidden*. The opposite of `key_mask`.
        need_weights : bool
            Also the weights, in O(N M) time and memory; `MultiheadAttention` has True here.
        attn_mask : Tensor, optional
            Only beside `is_causal=True`, as encoder layers hand it on; what it says is then not read.
        average_attn_weights : bool
            Weights (batch, N, M) as the mean over heads, else (batch, num_heads, N, M).
        is_causal : bool
            Query t sees the keys s <= t; needs N == M.

        Returns
        -------
        out : Tensor
            Shaped like `query`.
        weights : Tensor or None

        Raises
        ------
        ValueError
            For an `attn_mask` that is not causal, and for masks whose shape or values say something else.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            self._check_tokens(name, x)
        if attn_mask is not None:
            self._check_attn_mask(attn_mask, is_causal, query, key)
        batched = query.ndim == 3
        hidden = None if key_padding_mask is None else self._hidden(key_padding_mask, key, batched)
        q, k, v = self._heads(query, key, value)
        mask = None if hidden is None else ~hidden[..., None, None, :]
        out = attention(q, k, v, self.mechanism, causal=is_causal, key_mask=mask, backend=self.backend)
        weights = None
        if need_weights:
            weights = self.mechanism.weights(q, k, causal=is_causal, key_mask=mask).flatten(-4, -3)
            weights = weights.mean(dim=-3) if average_attn_weights else weights
        return self._joined(out, batched), weights

    # -- streams --------------------------------------------------------------------------------------------------

    def init_state(self, batch: int | None = None) -> State:
        """The empty decoding cache, for a batch of that size or for tokens without a batch axis."""
        if batch is not None:
            _checks.natural("batch", batch, least=0)
        lead = () if batch is None else (batch,)
        none = self.in_proj_weight.new_zeros((*lead, self.num_kv_heads, 1, 0, self.head_dim)).detach()
        return self.mechanism.init_state(none, none)

    def step(self, query: Tensor, state: State, key_padding_mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Self-attention of n new tokens over themselves and all before them: prefill and decoding.

        Parameters
        ----------
        query : Tensor
            (batch, n, embed_dim), or as `batch_first` says, or without a batch.
        state : State
            From `init_state` or an earlier step; what `state` holds is differentiable.
        key_padding_mask : Tensor, optional
            (batch, n), of the new tokens alone.

        Returns
        -------
        out : Tensor
            Shaped like `query`.
        state : State
        """
        self._check_tokens("query", query)
        batched = query.ndim == 3
        hidden = None if key_padding_mask is None else self._hidden(key_padding_mask, query, batched)
        q, k, v = self._heads(query, query, query)
        mask = None if hidden is None else ~hidden[..., None, None, :]
        out, state = step(q, k, v, self.mechanism, state, key_mask=mask, backend=self.backend)
        return self._joined(out, batched), state

    # -- projections ----------------------------------------------------------------------------------------------

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """(batch, kv heads, group, N, head_dim), the group being 1 for keys and values: none is repeated."""
        if query is key and key is value:
            parts = functional.linear(query, self.in_proj_weight, self.in_proj_bias).split(self.sizes, dim=-1)
        else:
            weights = self.in_proj_weight.split(self.sizes)
            biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.split(self.sizes)
            parts = [functional.linear(*args) for args in zip((query, key, value), weights, biases, strict=True)]
        if query.ndim == 3 and not self.batch_first:
            parts = [x.transpose(0, 1) for x in parts]
        split = [x.unflatten(-1, (self.num_kv_heads, -1, self.head_dim)) for x in parts]
        return [x.movedim(-4, -2) for x in split]

    def _joined(self, out: Tensor, batched: bool) -> Tensor:
        out = self.out_proj(out.movedim(-2, -4).flatten(-3))
        return out.transpose(0, 1) if batched and not self.batch_first else out

    # -- checks ---------------------------------------------------------------------------------------------------

    def _check_tokens(self, name: str, x: Any) -> None:
        if not isinstance(x, Tensor) or x.is_nested:
            what = "nested tensor (build the encoder with enable_nested_tensor=False)"
            raise TypeError(
                f"`{name}` must be a dense Tensor, got {what if isinstance(x, Tensor) else type(x).__name__}."
            )
        if x.ndim not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"`{name}` must have shape (batch, tokens, {self.embed_dim}) or (tokens, {self.embed_dim}), "
                f"got {tuple(x.shape)}."
            )

    def _check_attn_mask(self, attn_mask: Tensor, is_causal: bool, query: Tensor, key: Tensor) -> None:
        if not is_causal:
            raise ValueError("`attn_mask` must come with is_causal=True, got one alone: weights take no mask.")
        tokens = -3 if query.ndim == 3 and not self.batch_first else -2
        want = (query.shape[tokens], key.shape[tokens])
        if tuple(attn_mask.shape[-2:]) != want:
            raise ValueError(f"`attn_mask` must have shape {want}, got {tuple(attn_mask.shape)}.")

    def _hidden(self, mask: Tensor, key: Tensor, batched: bool) -> Tensor:
        """True where a key is hidden; layers hand the boolean mask on as 0 and -inf."""
        shape = key.shape[:-1] if self.batch_first or not batched else (key.shape[1], key.shape[0])
        if tuple(mask.shape) != tuple(shape):
            raise ValueError(f"`key_padding_mask` must have shape {tuple(shape)}, got {tuple(mask.shape)}.")
        if mask.dtype is torch.bool:
            return mask
        hidden = torch.isneginf(mask) if mask.is_floating_point() else None
        if hidden is None:
            raise TypeError(f"`key_padding_mask` must hold bool, or 0 and -inf, got dtype {mask.dtype}.")
        if not torch.compiler.is_compiling() and bool(((mask != 0) & ~hidden).any()):
            raise ValueError("`key_padding_mask` must hold 0 and -inf alone, got another number: weights take no bias.")
        return hidden
