"""Mixture of experts: a router chooses a few of a block's MLPs for each token.

Shapes: b rows, s tokens in a row, t = b*s, d model width, f width inside an expert, x experts, k experts of a token.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neva.models.layers import GATED

ALIGNED = 8
"""`F.grouped_mm` takes matrices whose rows begin at multiples of 16 bytes: 8 numbers of 2 bytes."""
UNCOMPILED = cast("Callable[..., Tensor]", torch.compiler.disable(F.grouped_mm))
"""`F.grouped_mm` as a break in a compiled graph: torch compiles it in bfloat16 alone."""


class Experts(nn.Module):
    """Gated MLPs side by side, each applied to its own run of rows.

    Widths that are no multiple of `ALIGNED` cost a copy of the weights in each forward.
    """

    def __init__(self, width: int, ffn: int, kind: str, *, experts: int, dropout: float = 0.0):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, ffn, width))
        self.up = nn.Parameter(torch.empty(experts, ffn, width))
        self.down = nn.Parameter(torch.empty(experts, width, ffn))
        self.activation, self.dropout = GATED[kind], dropout

    def forward(self, rows: Float[Tensor, "n d"], counts: Int64[Tensor, " x"]) -> Float[Tensor, "n d"]:
        """The first `counts[0]` rows go through expert 0, the next `counts[1]` through expert 1, and so on; counts add up to n."""
        ends = counts.cumsum(0, dtype=torch.int32)
        width = rows.shape[-1]
        rows = _aligned(rows, 1)
        gate, up, down = (_aligned(weight, 2) for weight in (self.gate, self.up, self.down))
        product = F.grouped_mm if rows.dtype == torch.bfloat16 else UNCOMPILED
        opened = self.activation(product(rows, gate.transpose(-2, -1), offs=ends))
        inside = opened * product(rows, up.transpose(-2, -1), offs=ends)
        inside = F.dropout(inside, self.dropout, self.training)
        return product(inside, down.transpose(-2, -1), offs=ends)[:, :width]


def _aligned(x: Float[Tensor, "*n d"], dimensions: int) -> Float[Tensor, "*m e"]:
    """The tensor with zeros behind its last dimensions, up to multiples of `ALIGNED`."""
    missing = [-size % ALIGNED for size in reversed(x.shape[-dimensions:])]
    if not any(missing):
        return x
    return F.pad(x, [pad for size in missing for pad in (0, size)])


class MoE(nn.Module):
    """Mixtral's block: softmax over all experts, the likeliest k, their weights made to add up to 1 (arXiv 2401.04088, section 2.1)."""

    def __init__(self, width: int, ffn: int, kind: str, *, experts: int, active: int, balance: float, dropout: float = 0.0):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = Experts(width, ffn, kind, experts=experts, dropout=dropout)
        self.active, self.balance = active, balance

    def forward(self, x: Float[Tensor, "b s d"], segments: Int64[Tensor, "b s"]) -> tuple[Float[Tensor, "b s d"], Tensor | None]:
        """Gives the mixed outputs, and in training with a `balance` that times the balance loss."""
        flat = x.flatten(0, 1)
        scores = self.router(flat).float().softmax(-1)
        weights, chosen = scores.topk(self.active, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        order = chosen.flatten().argsort(stable=True)
        counts = F.one_hot(chosen.flatten(), scores.shape[-1]).sum(0)
        rows = self.experts(flat.index_select(0, order // self.active), counts)
        back = torch.empty_like(rows).index_copy(0, order, rows).unflatten(0, chosen.shape)
        aux = self.balance * balance_loss(scores, chosen, segments) if self.training and self.balance else None
        return (back * weights[..., None]).sum(1).view(x.shape), aux


def balance_loss(scores: Float[Tensor, "t x"], chosen: Int64[Tensor, "t k"], segments: Int64[Tensor, "b s"]) -> Float[Tensor, ""]:
    """One layer's loss, the mean over rows of x * sum over experts of (share of the row's tokens
    that chose it) * (its mean probability in the row).

    Padding does not count; a row of nothing else gives 0. Perfectly even routing gives k. Source:
    Switch Transformer, arXiv 2101.03961, section 2.2. The model's loss is `DecoderConfig.balance`
    times the mean over layers, which can be added up over the stages of a pipeline.

    transformers' `load_balancing_loss_func`, called with one layer of one row, gives the same.
    Called with all layers it pools shares and probabilities over them before it multiplies: near
    to the mean, not equal.
    """
    experts = scores.shape[-1]
    real = (segments > 0).to(scores.dtype)[..., None]
    tokens = real.sum(1).clamp_min(1)
    taken = F.one_hot(chosen, experts).sum(1).to(scores.dtype).view(*segments.shape, experts)
    shares = (taken * real).sum(1) / tokens
    probabilities = (scores.view(*segments.shape, experts) * real).sum(1) / tokens
    return experts * (shares * probabilities).sum(-1).mean()
