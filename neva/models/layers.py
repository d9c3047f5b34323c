"""Norms, rotary positions, attention over packed rows, and the MLPs that every family is made of.

Shapes: b rows, s tokens in a row, h query heads, j key-value heads, e width of a head, d model width, t tokens = b*s,
d1 document bounds, r requests, m slots of a cache row.
"""

import inspect
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from neva.batch import Batch

# torch 2.11 spells the causal window `is_causal`.
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}


def rope_tables(positions: Int64[Tensor, "b s"], width: int, theta: float) -> tuple[Float[Tensor, "b s 1 e"], Float[Tensor, "b s 1 e"]]:
    """Cosine and sine of each position's angles, in fp32; both halves of a head carry the same angles (Llama's half-split order)."""
    frequencies = 1 / theta ** (torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def rope(x: Float[Tensor, "b s h e"], cos: Float[Tensor, "b s 1 e"], sin: Float[Tensor, "b s 1 e"]) -> Float[Tensor, "b s h e"]:
    """Rotate each head by its position: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), halves split in the middle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cache:
    """Keys and values of r requests for every layer, and where this call's tokens go.

    A prefill is a packed row with one document a request; a decode step is a batch [r, 1].
    """

    keys: Float[Tensor, "layers r m j e"]
    values: Float[Tensor, "layers r m j e"]
    slots: Int64[Tensor, " t"]
    """Flat position request * m + position of each token of this call; the last flat position takes padding."""
    lengths: Int64[Tensor, " r"]
    """Tokens of each request, this call's included."""
    decoding: bool
    """Does this call hold one token a request that attends to the whole cache? Else it attends within its documents."""
    span: int
    """Longest of `lengths`, as a Python int: no sync."""
    ragged: bool
    """Do lengths differ? One length needs no mask."""

    def write(self, layer: int, k: Float[Tensor, "b s j e"], v: Float[Tensor, "b s j e"]) -> None:
        """Store this call's keys and values of a layer."""
        self.keys[layer].flatten(0, 1).index_copy_(0, self.slots, k.flatten(0, 1))
        self.values[layer].flatten(0, 1).index_copy_(0, self.slots, v.flatten(0, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """What attention must know about packed rows: where documents begin and end, and a cache if there is one."""

    cu_seqlens: Int32[Tensor, " d1"]
    max_len: int
    segments: Int64[Tensor, "b s"]
    cache: Cache | None = None
    layer: int = 0

    @staticmethod
    def of(batch: Batch, cache: Cache | None = None) -> "Documents":
        """The documents of a batch."""
        return Documents(cu_seqlens=batch.cu_seqlens, max_len=batch.max_len, segments=batch.segments, cache=cache)

    def at(self, layer: int) -> "Documents":
        """The same documents as seen by decoder layer number `layer`."""
        return replace(self, layer=layer) if self.cache is not None else self


_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


SHORT = 400
"""Documents of fewer tokens go backward in fp32 on the CPU: its bf16 kernel takes 2.6 times as long at 100 tokens, 0.7 times at 1,000."""


def _spans(cu_seqlens: Tensor, segments: Tensor) -> list[tuple[int, int, bool]]:
    """Start, length and "is no padding" of each document: they cover all tokens in order."""
    bounds, real = cu_seqlens.tolist(), (segments > 0).flatten().tolist()
    return [(start, stop - start, real[start]) for start, stop in pairwise(bounds) if stop > start]


def _one(x: Tensor, start: int, length: int) -> Tensor:
    """A view of one document: [t, h, ...] -> [1, h, length, ...]."""
    return x.narrow(0, start, length).transpose(0, 1)[None]


@torch.library.custom_op("neva::document_attention", mutates_args=())
def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention within each document on the CPU, one call a document; one opaque operator, so that compile sees no loop.

    q [t, h, e], k and v [t, j, e] -> output [t, h, e] (0 at padding) and the log-sum-exp [t, h] that backward needs.
    Batching short documents of like length was measured and gained nothing: gathering them costs what the calls cost.
    """
    outs, stats = [], []
    for start, length, real in _spans(cu_seqlens, segments):
        if real:
            out, lse = _cpu_forward(*(_one(x, start, length) for x in (q, k, v)), 0.0, True)
            outs.append(out[0].transpose(0, 1))
            stats.append(lse[0].transpose(0, 1))
        else:
            outs.append(q.new_zeros(length, *q.shape[1:]))
            stats.append(q.new_zeros(length, q.shape[1], dtype=torch.float32))
    return torch.cat(outs), torch.cat(stats)


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("neva::document_attention_backward", mutates_args=())
def document_attention_backward(grad: Tensor, saved: list[Tensor], cu_seqlens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k, v; `saved` is q, k, v, the output and the log-sum-exp."""
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for start, length, real in _spans(cu_seqlens, segments):
        if real:
            given = [_one(x, start, length) for x in (grad, *saved)]
            if length < SHORT:
                given = [x.float() for x in given]
            pieces = _cpu_backward(*given, 0.0, True)
            pieces = [piece[0].transpose(0, 1).to(grad.dtype) for piece in pieces]
        else:
            pieces = [x.new_zeros(length, *x.shape[1:]) for x in saved[:3]]
        for whole, piece in zip(grads, pieces, strict=True):
            whole.append(piece)
    q, k, v = (torch.cat(whole) for whole in grads)
    return q, k, v


@document_attention_backward.register_fake
def _(grad: Tensor, saved: list[Tensor], cu_seqlens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return saved[0].new_empty(saved[0].shape), saved[1].new_empty(saved[1].shape), saved[2].new_empty(saved[2].shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad: Tensor, _grad_lse: Tensor):
    q, k, v, cu_seqlens, segments, out, lse = ctx.saved_tensors
    return *document_attention_backward(grad.contiguous(), [q, k, v, out, lse], cu_seqlens, segments), None, None


document_attention.register_autograd(_backward, setup_context=_setup)


def dense_mask(segments: Int64[Tensor, "b s"]) -> Bool[Tensor, "b 1 s s"]:
    """Which token may attend to which: earlier ones, and itself, of its own segment.

    segments 1 1 2 0 -> row 0: x...  row 1: xx..  row 2: ..x.  row 3 (padding): ....
    """
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    return (same & torch.ones_like(same[0]).tril())[:, None]


class PackedAttention(nn.Module):
    """Causal attention within documents: the weightless `inner` of a decoder's attention.

    Context parallelism and the serving engine put another module in this one's place; nothing else of the model changes.
    """

    def forward(
        self, q: Float[Tensor, "b s h e"], k: Float[Tensor, "b s j e"], v: Float[Tensor, "b s j e"], layout: Documents
    ) -> Float[Tensor, "b s h e"]:
        if layout.cache is not None:
            layout.cache.write(layout.layer, k, v)
            if layout.cache.decoding:
                return _attend_cache(q, layout.cache, layout.layer)
        if q.device.type == "cpu":
            return document_attention(*(x.flatten(0, 1) for x in (q, k, v)), layout.cu_seqlens, layout.segments)[0].view(q.shape)
        if q.dtype in (torch.bfloat16, torch.float16):
            out = _varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout).view(q.shape)
        else:  # varlen kernels take half precision only
            out = _attend(q, k, v, mask=dense_mask(layout.segments))
        return out.masked_fill((layout.segments == 0)[..., None, None], 0)


class FullAttention(nn.Module):
    """Every token attends to every other of its own image: the `inner` of a vision block."""

    def forward(
        self, q: Float[Tensor, "b s h e"], k: Float[Tensor, "b s j e"], v: Float[Tensor, "b s j e"], layout: None
    ) -> Float[Tensor, "b s h e"]:
        return _attend(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _attend_cache(q: Float[Tensor, "r 1 h e"], cache: Cache, layer: int) -> Float[Tensor, "r 1 h e"]:
    k, v = cache.keys[layer][:, : cache.span], cache.values[layer][:, : cache.span]
    mask = (torch.arange(cache.span, device=q.device) < cache.lengths[:, None])[:, None, None] if cache.ragged else None
    return _attend(q, k, v, mask)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Documents) -> Tensor:
    """Flash attention over documents on CUDA: [t, h, e] -> [t, h, e]."""
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len, **_CAUSAL)
    assert isinstance(out, Tensor)
    return out


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Project to queries, keys and values, rotate if positions are given, attend in `inner`, project back."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int, *, qkv_bias: bool, out_bias: bool, inner: nn.Module):
        super().__init__()
        self.head_width = head_width
        self.q = nn.Linear(width, heads * head_width, bias=qkv_bias)
        self.k = nn.Linear(width, kv_heads * head_width, bias=qkv_bias)
        self.v = nn.Linear(width, kv_heads * head_width, bias=qkv_bias)
        self.out = nn.Linear(heads * head_width, width, bias=out_bias)
        self.inner = inner

    def forward(self, x: Float[Tensor, "b s d"], layout: Documents | None, angles: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "b s d"]:
        # -1 heads: under tensor parallelism a rank holds a share of them.
        q, k, v = (p(x).unflatten(-1, (-1, self.head_width)) for p in (self.q, self.k, self.v))
        if angles is not None:
            q, k = rope(q, *angles), rope(k, *angles)
        return self.out(self.inner(q, k, v, layout).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.gate = nn.Linear(width, ffn, bias=False)
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def quick_gelu(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """x * sigmoid(1.702 x), as OpenAI's CLIP was trained."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class MLP(nn.Module):
    """down(activation(up(x))), with biases."""

    def __init__(self, width: int, ffn: int, activation: str):
        super().__init__()
        self.up = nn.Linear(width, ffn)
        self.down = nn.Linear(ffn, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return self.down(self.activation(self.up(x)))
