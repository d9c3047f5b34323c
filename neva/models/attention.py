"""Attention over packed rows: documents, the cache of generation, and the kernels of each device.

Shapes: b rows, s tokens in a row, h query heads, j key-value heads, e width of a head, t tokens = b*s,
d1 document bounds, r requests (of a batch: runs), m slots of a cache row, y memory tokens.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from neva.batch import Batch

_WINDOWS = "window_size" in inspect.signature(varlen_attn).parameters
"""Can varlen attention see a limited window? torch 2.11 knows `is_causal` alone."""


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
    memory: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> the keys and values [y, j, e] of its cross-attention, noted by the prefill."""

    def write(self, layer: int, k: Float[Tensor, "b s j e"], v: Float[Tensor, "b s j e"]) -> None:
        """Store this call's keys and values of a layer."""
        self.keys[layer].flatten(0, 1).index_copy_(0, self.slots, k.flatten(0, 1))
        self.values[layer].flatten(0, 1).index_copy_(0, self.slots, v.flatten(0, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Which tokens see which part of the memory."""

    bounds: Int64[Tensor, "r 4"]
    """`Batch.runs`."""
    sizes: tuple[int, int, int, int]
    """`Batch.run_sizes`."""
    positions: Int64[Tensor, " y"]
    """`Batch.memory_positions`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """What attention must know about packed rows: where documents begin and end, what of the memory they see, and a cache if there is one."""

    cu_seqlens: Int32[Tensor, " d1"]
    max_len: int
    segments: Int64[Tensor, "b s"]
    runs: Runs | None = None
    """None where there is no cross-attention."""
    cache: Cache | None = None
    layer: int = 0

    @staticmethod
    def of(batch: Batch, cache: Cache | None = None) -> "Documents":
        """The documents of a batch."""
        runs = Runs(bounds=batch.runs, sizes=batch.run_sizes, positions=batch.memory_positions)
        return Documents(cu_seqlens=batch.cu_seqlens, max_len=batch.max_len, segments=batch.segments, runs=runs, cache=cache)

    def lengths(self) -> Int64[Tensor, "b s"]:
        """Tokens of each token's document; while decoding, of its request so far."""
        if self.cache is not None and self.cache.decoding:
            return self.cache.lengths[:, None]
        lengths = self.cu_seqlens.long().diff()
        return lengths.repeat_interleave(lengths, output_size=self.segments.numel()).view(self.segments.shape)

    def at(self, layer: int) -> "Documents":
        """The same documents as seen by decoder layer number `layer`."""
        return replace(self, layer=layer) if self.cache is not None else self


cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


SHORT = 400
"""Documents of fewer tokens go backward in fp32 on the CPU: its bf16 kernel takes 2.6 times as long at 100 tokens, 0.7 times at 1,000."""


def _spans(cu_seqlens: Tensor, segments: Tensor) -> list[tuple[int, int, bool]]:
    """Start, length and "is no padding" of each document: they cover all tokens in order."""
    bounds, real = cu_seqlens.tolist(), (segments > 0).flatten().tolist()
    return [(start, stop - start, real[start]) for start, stop in pairwise(bounds) if stop > start]


def _one(x: Tensor, start: int, length: int) -> Tensor:
    """A view of one document: [t, h, ...] -> [1, h, length, ...]."""
    return x.narrow(0, start, length).transpose(0, 1)[None]


WINDOW_STEP = 512
"""Least number of queries that windowed attention on the CPU computes at a time."""


def _banded(length: int, window: int, like: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Parts of a document longer than the window: first query, end of queries and keys, first key, additive mask [queries, keys].

    A token sees itself and the window - 1 tokens before it. Each part holds the keys that its queries can see, so that no mask
    is as large as the square of the document.
    """
    step = max(window, WINDOW_STEP)
    for first in range(0, length, step):
        end, start = min(first + step, length), max(0, first - window + 1)
        behind = torch.arange(first, end)[:, None] - torch.arange(start, end)
        yield first, end, start, torch.zeros_like(behind, dtype=like.dtype).masked_fill_((behind < 0) | (behind >= window), -math.inf)[None, None]


def _forward_one(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one document."""
    if not window or q.shape[2] <= window:
        return cpu_forward(q, k, v, 0.0, True)
    parts = []
    for first, end, start, mask in _banded(q.shape[2], window, q):
        parts.append(cpu_forward(q[:, :, first:end], k[:, :, start:end], v[:, :, start:end], 0.0, False, attn_mask=mask))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _backward_one(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one document."""
    if not window or q.shape[2] <= window:
        return cpu_backward(grad, q, k, v, out, lse, 0.0, True)
    grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first, end, start, mask in _banded(q.shape[2], window, q):
        given = (grad[:, :, first:end], q[:, :, first:end], k[:, :, start:end], v[:, :, start:end], out[:, :, first:end], lse[:, :, first:end])
        dq, dk, dv = cpu_backward(*given, 0.0, False, attn_mask=mask)
        grads[0][:, :, first:end] = dq
        grads[1][:, :, start:end] += dk
        grads[2][:, :, start:end] += dv
    return grads


@torch.library.custom_op("neva::document_attention", mutates_args=())
def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, segments: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Causal attention within each document on the CPU, one call a document; one opaque operator, so that compile sees no loop.

    q [t, h, e], k and v [t, j, e] -> output [t, h, e] (0 at padding) and the log-sum-exp [t, h] that backward needs. A token
    sees at most `window` tokens, itself included; 0 is no limit.
    Batching short documents of like length was measured and gained nothing: gathering them costs what the calls cost.
    """
    outs, stats = [], []
    for start, length, real in _spans(cu_seqlens, segments):
        if real:
            out, lse = _forward_one(_one(q, start, length), _one(k, start, length), _one(v, start, length), window)
            outs.append(out[0].transpose(0, 1))
            stats.append(lse[0].transpose(0, 1))
        else:
            outs.append(q.new_zeros(length, *q.shape[1:]))
            stats.append(q.new_zeros(length, q.shape[1], dtype=torch.float32))
    return torch.cat(outs), torch.cat(stats)


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, segments: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("neva::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor, saved: list[Tensor], cu_seqlens: Tensor, segments: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k, v; `saved` is q, k, v, the output and the log-sum-exp."""
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for start, length, real in _spans(cu_seqlens, segments):
        if real:
            given = [_one(x, start, length) for x in (grad, *saved)]
            if length < SHORT:
                given = [x.float() for x in given]
            pieces = [piece[0].transpose(0, 1).to(grad.dtype) for piece in _backward_one(*given, window)]
        else:
            pieces = [x.new_zeros(length, *x.shape[1:]) for x in saved[:3]]
        for whole, piece in zip(grads, pieces, strict=True):
            whole.append(piece)
    q, k, v = (torch.cat(whole) for whole in grads)
    return q, k, v


@document_attention_backward.register_fake
def _(grad: Tensor, saved: list[Tensor], cu_seqlens: Tensor, segments: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    return saved[0].new_empty(saved[0].shape), saved[1].new_empty(saved[1].shape), saved[2].new_empty(saved[2].shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad: Tensor, _grad_lse: Tensor):
    q, k, v, cu_seqlens, segments, out, lse = ctx.saved_tensors
    return *document_attention_backward(grad.contiguous(), [q, k, v, out, lse], cu_seqlens, segments, ctx.window), None, None, None


document_attention.register_autograd(_backward, setup_context=_setup)


def dense_mask(segments: Int64[Tensor, "b s"], window: int = 0) -> Bool[Tensor, "b 1 s s"]:
    """Which token may attend to which: earlier ones, and itself, of its own segment; with a window, only the nearest `window`.

    segments 1 1 2 0 -> row 0: x...  row 1: xx..  row 2: ..x.  row 3 (padding): ....
    """
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    seen = torch.ones_like(same[0]).tril()
    return (same & (seen.triu(1 - window) if window else seen))[:, None]


class PackedAttention(nn.Module):
    """Causal attention within documents: the weightless `inner` of a decoder's attention.

    Context parallelism and the serving engine put another module in this one's place; nothing else of the model changes.
    """

    def __init__(self, *, window: int = 0, dropout: float = 0.0):
        """`window` tokens, itself included, are the most that a token sees (0: all); `dropout` of the attention weights costs a dense mask."""
        super().__init__()
        self.window, self.dropout = window, dropout

    def forward(
        self, q: Float[Tensor, "b s h e"], k: Float[Tensor, "b s j e"], v: Float[Tensor, "b s j e"], layout: Documents
    ) -> Float[Tensor, "b s h e"]:
        if layout.cache is not None:
            layout.cache.write(layout.layer, k, v)
            if layout.cache.decoding:
                return _attend_cache(q, layout.cache, layout.layer, self.window)
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and not dropout:
            return document_attention(*(x.flatten(0, 1) for x in (q, k, v)), layout.cu_seqlens, layout.segments, self.window)[0].view(q.shape)
        # varlen kernels take half precision only, and no dropout
        if q.dtype in (torch.bfloat16, torch.float16) and not dropout and (_WINDOWS or not self.window):
            out = _varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout, self.window).view(q.shape)
        else:
            out = _attend(q, k, v, mask=dense_mask(layout.segments, self.window), dropout=dropout)
        return out.masked_fill((layout.segments == 0)[..., None, None], 0)


class FullAttention(nn.Module):
    """Every token attends to every other of its own image: the `inner` of a vision block."""

    def forward(
        self, q: Float[Tensor, "b s h e"], k: Float[Tensor, "b s j e"], v: Float[Tensor, "b s j e"], layout: None
    ) -> Float[Tensor, "b s h e"]:
        return _attend(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _attend_cache(q: Float[Tensor, "r 1 h e"], cache: Cache, layer: int, window: int) -> Float[Tensor, "r 1 h e"]:
    k, v = cache.keys[layer][:, : cache.span], cache.values[layer][:, : cache.span]
    if not cache.ragged and not 0 < window < cache.span:
        return _attend(q, k, v)
    behind = cache.lengths[:, None] - 1 - torch.arange(cache.span, device=q.device)
    seen = (behind >= 0) & (behind < window) if window else behind >= 0
    return _attend(q, k, v, seen[:, None, None])


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Documents, window: int) -> Tensor:
    """Flash attention over documents on CUDA: [t, h, e] -> [t, h, e]."""
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    how: dict = {"window_size": (window - 1 if window else -1, 0)} if _WINDOWS else {"is_causal": True}
    out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len, **how)
    assert isinstance(out, Tensor)
    return out
