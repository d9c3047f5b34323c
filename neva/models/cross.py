"""Gated cross-attention from the decoder's tokens to image tiles, over packed rows: what NVLM-X and NVLM-H add to a decoder's layers.

The article (arXiv 2409.11402, 4.3 and figure 3) says "gated X-attention between self-attention and feed-forward"; the rest is a field here.
Shapes: b rows, s tokens in a row, t = b*s, d width, h query heads, j key-value heads, e width of a head, y memory tokens, r runs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from neva.models.attention import SHORT, Documents, Runs, cpu_backward, cpu_forward
from neva.models.layers import GATED, MLP, NORMS, GatedMLP, Rotary, rope, rope_tables


@dataclass(frozen=True, kw_only=True)
class CrossConfig:
    """Mechanisms of the cross-attention layers. Sizes that are not given are the decoder's."""

    heads: int | None = None
    """Query heads."""
    kv_heads: int | None = None
    """Key-value heads; as many as `heads` if not given, also where the decoder has fewer."""
    head_width: int | None = None
    """Width of one head."""
    key_norm: bool = False
    """A norm of the memory, before keys and values are made of it."""
    rotary: bool = False
    """Rotate keys by their place in their image's memory, so that they are no unordered set; queries are not rotated."""
    ffn: int = 0
    """Width of a gated MLP behind the attention, for tokens that see memory; 0 is none, as in NVLM."""

    def __post_init__(self):
        if self.ffn < 0:
            raise ValueError(f"ffn={self.ffn} must be 0 or more.")


class RunAttention(nn.Module):
    """Each run of tokens attends to its own range of keys, all of them; a token without a range gets exactly 0: the weightless `inner`."""

    def forward(self, q: Float[Tensor, "t h e"], k: Float[Tensor, "y j e"], v: Float[Tensor, "y j e"], runs: Runs) -> Float[Tensor, "t h e"]:
        if q.device.type == "cpu":
            return run_attention(q, k, v, runs.bounds)[0]
        return _on_device(q, k, v, runs)


class CrossAttention(nn.Module):
    """x + tanh(gate) * attention(norm x, memory), and the same of an MLP if there is one. A fresh gate is 0: the decoder as it was."""

    def __init__(self, config: CrossConfig, *, width: int, heads: int, head_width: int, norm: str, eps: float, mlp: str, rotary: Rotary):
        super().__init__()
        c = config
        self.head_width = c.head_width or head_width
        heads, kv_heads = c.heads or heads, c.kv_heads or c.heads or heads
        self.norm = NORMS[norm](width, eps)
        self.memory_norm = NORMS[norm](width, eps) if c.key_norm else nn.Identity()
        self.q = nn.Linear(width, heads * self.head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(heads * self.head_width, width, bias=False)  # a bias would reach tokens that see nothing
        self.gate = nn.Parameter(torch.empty(1))
        self.rotary = rotary if c.rotary else None
        self.inner = RunAttention()
        self.mlp_norm = NORMS[norm](width, eps) if c.ffn else None
        self.mlp = (GatedMLP if mlp in GATED else MLP)(width, c.ffn, mlp, bias=False) if c.ffn else None
        self.mlp_gate = nn.Parameter(torch.empty(1)) if c.ffn else None

    def forward(self, x: Float[Tensor, "b s d"], layout: Documents, memory: Float[Tensor, "y d"] | None) -> Float[Tensor, "b s d"]:
        """`memory` is None in a decode step, whose keys and values the cache holds."""
        q = self.q(self.norm(x)).flatten(0, 1).unflatten(-1, (-1, self.head_width))
        k, v = self._keys(memory, layout)
        assert layout.runs is not None, "whoever gives a memory says who sees it"
        y = self.out(self.inner(q, k, v, layout.runs).flatten(1)).view(x.shape)
        x = x + self.gate.tanh() * y
        if self.mlp is None or self.mlp_norm is None or self.mlp_gate is None:
            return x
        return x + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(x)) * _sighted(x, layout.runs)

    def _keys(self, memory: Tensor | None, layout: Documents) -> tuple[Float[Tensor, "y j e"], Float[Tensor, "y j e"]]:
        cache = layout.cache
        if memory is None:
            assert cache is not None, "without a memory the decoder leaves this layer out"
            return cache.memory[layout.layer]
        memory = self.memory_norm(memory)
        k, v = (p.unflatten(-1, (-1, self.head_width)) for p in (self.k(memory), self.v(memory)))
        if self.rotary is not None:
            assert layout.runs is not None
            cos, sin = rope_tables(layout.runs.positions[None], self.rotary)
            k = rope(k[None], cos.to(k.dtype), sin.to(k.dtype))[0]
        if cache is not None:
            cache.memory[layout.layer] = k, v
        return k, v


@torch.compiler.disable()  # lengths that are never the same would each ask for a graph of their own
def _on_device(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
    if not runs.sizes[0]:  # nothing to attend to, but every rank has a gradient to reduce
        return q * 0 + (k.sum() + v.sum()) * 0
    return _varlen(q, k, v, runs) if q.dtype in (torch.bfloat16, torch.float16) else dense(q, k, v, runs)


@torch.compiler.disable()
def _sighted(x: Float[Tensor, "b s d"], runs: Runs) -> Float[Tensor, "b s 1"]:
    """1 for tokens that see memory, 0 for others."""
    seen = x.new_zeros(x.shape[0] * x.shape[1])
    return seen.index_fill(0, _queries(runs), 1).view(*x.shape[:2], 1)


def _queries(runs: Runs) -> Int64[Tensor, " q"]:
    """Flat positions of the tokens in runs, run by run."""
    return _ranges(runs.bounds[:, 0], runs.bounds[:, 1], runs.sizes[0])


def _ranges(starts: Tensor, ends: Tensor, total: int) -> Int64[Tensor, " n"]:
    """start, start + 1, ..., end - 1 of each range, one behind the other; `total` of them, so that no device is asked."""
    lengths = ends - starts
    before = starts - (lengths.cumsum(0) - lengths)
    return before.repeat_interleave(lengths, output_size=total) + torch.arange(total, device=starts.device)


@torch.library.custom_op("neva::run_attention", mutates_args=())
def run_attention(q: Tensor, k: Tensor, v: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of runs on the CPU, one call a run; one opaque operator, so that compile sees no loop.

    q [t, h, e], k and v [y, j, e], runs [r, 4] -> output [t, h, e] (0 outside runs) and the log-sum-exp [t, h] that backward needs.
    """
    out, stats = torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)
    for start, end, first, last in runs.tolist():
        one, lse = cpu_forward(_heads_first(q[start:end]), _heads_first(k[first:last]), _heads_first(v[first:last]), 0.0, False)
        out[start:end], stats[start:end] = one[0].transpose(0, 1), lse[0].transpose(0, 1)
    return out, stats


def _heads_first(x: Float[Tensor, "t h *e"]) -> Float[Tensor, "1 h t *e"]:
    return x.transpose(0, 1)[None]


@run_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("neva::run_attention_backward", mutates_args=())
def run_attention_backward(grad: Tensor, saved: list[Tensor], runs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v; `saved` is q, k, v, the output and the log-sum-exp."""
    q, k, v, out, lse = saved
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for start, end, first, last in runs.tolist():
        given = [_heads_first(x) for x in (grad[start:end], q[start:end], k[first:last], v[first:last], out[start:end])]
        given = [x.float() for x in given] if end - start < SHORT else given  # as in document_attention
        one, for_k, for_v = cpu_backward(*given, _heads_first(lse[start:end]), 0.0, False)
        dq[start:end] = one[0].transpose(0, 1)
        dk[first:last] += for_k[0].transpose(0, 1)
        dv[first:last] += for_v[0].transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@run_attention_backward.register_fake
def _(grad: Tensor, saved: list[Tensor], runs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return saved[0].new_empty(saved[0].shape), saved[1].new_empty(saved[1].shape), saved[2].new_empty(saved[2].shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, runs = inputs
    ctx.save_for_backward(*tensors, *output, runs)


def _backward(ctx, grad: Tensor, _grad_lse: Tensor):
    *saved, runs = ctx.saved_tensors
    return *run_attention_backward(grad.contiguous(), saved, runs), None


run_attention.register_autograd(_backward, setup_context=_setup)


def _varlen(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Float[Tensor, "t h e"]:
    """Flash attention over runs on CUDA: their queries and keys are copied side by side, since ranges of keys overlap.

    With `cross_visible=all` the copies of keys grow with the square of a sample's images.
    """
    bounds, (_, keys, longest_q, longest_k) = runs.bounds, runs.sizes
    at, of = _queries(runs), _ranges(bounds[:, 2], bounds[:, 3], keys)
    share = q.shape[1] // k.shape[1]
    k, v = (x.index_select(0, of).repeat_interleave(share, dim=1) if share > 1 else x.index_select(0, of) for x in (k, v))
    cu_q, cu_k = (F.pad((bounds[:, n + 1] - bounds[:, n]).cumsum(0), (1, 0)).to(torch.int32) for n in (0, 2))
    out = varlen_attn(q.index_select(0, at), k, v, cu_q, cu_k, longest_q, longest_k)
    assert isinstance(out, Tensor)
    return torch.zeros_like(q).index_copy(0, at, out)


def dense(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Float[Tensor, "t h e"]:
    """The same with a mask of all pairs: for dtypes that no varlen kernel takes."""
    bounds, queries = runs.bounds, runs.sizes[0]
    at, lengths = _queries(runs), bounds[:, 1] - bounds[:, 0]
    first, last = (bounds[:, n].repeat_interleave(lengths, output_size=queries)[:, None] for n in (2, 3))
    number = torch.arange(k.shape[0], device=q.device)
    mask = (number >= first) & (number < last)
    out = F.scaled_dot_product_attention(
        _heads_first(q.index_select(0, at)), _heads_first(k), _heads_first(v), attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    return torch.zeros_like(q).index_copy(0, at, out[0].transpose(0, 1))
