"""One decoder for every language-model family, chosen by field values.

Shapes: b rows, s tokens in a row, d width, l labelled tokens, v vocabulary, y memory tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neva.batch import IGNORE
from neva.config import Limits, check_numbers
from neva.models.attention import Documents, PackedAttention
from neva.models.cross import CrossAttention, CrossConfig
from neva.models.layers import GATED, MLP, NORMS, Attention, GatedMLP, MLPKind, NormKind, RopeScaling, Rotary, rope_tables
from neva.models.moe import MoE

HEAD_TILE = 2**21
"""Most logits that the loss computes at a time on a CPU: 8 MiB in fp32, which stay in its cache. 64 times as many fill an accelerator."""
HEAD_TOKENS = 2**13
"""Most tokens of these; with fewer, a tile holds more of the vocabulary."""
HEAD_KEPT = 2**25
"""Most logits that the loss keeps for backward in place of computing them again: 1048 labelled tokens of a vocabulary of 32,000."""


LIMITS: Limits = {
    "vocab": (1, 2**24), "width": (1, 2**20), "layers": (1, 2**10),
    "heads": (1, 2**14), "kv_heads": (1, 2**14), "head_width": (1, 2**14), "ffn": (1, 2**22),
    "window": (0, 2**40), "max_positions": (1, 2**31),
    "experts": (0, 2**14), "active_experts": (1, 2**14), "eps": (0.0, 1.0),
    "rope_theta": (1e-3, 1e15), "rotary_fraction": (0.0, 1.0), "balance": (0.0, 1e6),
}  # fmt: skip
"""Least and most of each number of a decoder; no model comes near the most."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and mechanisms of a decoder."""

    vocab: int
    """Rows of the embedding."""
    width: int
    """Width of the hidden state."""
    layers: int
    """Number of blocks."""
    heads: int
    """Query heads of self-attention."""
    kv_heads: int
    """Key-value heads; fewer than `heads` is grouped-query attention."""
    ffn: int
    """Width inside the MLP."""
    head_width: int | None = None
    """Width of one head; `width / heads` if not given."""
    norm: NormKind = "rmsnorm"
    """`layernorm1p` is LayerNorm that keeps its weight minus 1 (Nemotron); both LayerNorms have biases."""
    eps: float = 1e-5
    """The norms' addition to the variance."""
    mlp: MLPKind = "swiglu"
    """`swiglu` and `geglu` have a gate, the others are one activation between two matrices."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    out_bias: bool = False
    """A bias on the attention's output."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    positions: Literal["rotary", "learned"] = "rotary"
    """`learned` adds a trained vector of each position to the embedding (GPT)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Share of a head's dimensions that are rotated, its first ones."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are stretched for longer documents."""
    window: int = 0
    """Tokens that a token sees, itself included; 0 is all before it."""
    max_positions: int = 4096
    """Longest document that the positions were made for, before `linear` or `dynamic` scaling."""
    tied: bool = False
    """Does the head use the embedding's matrix?"""
    experts: int = 0
    """MLPs in a block, of which a router chooses `active_experts` for each token; 0 is one MLP without a router."""
    active_experts: int = 2
    """Experts that a token goes through."""
    balance: float = 0.0
    """Weight in the loss of the experts' load balance, a mean over layers (`moe.balance_loss`).

    It is transformers' `router_aux_loss_coef`. Megatron adds up over layers and divides by the
    experts of a token, so that this is `layers / active_experts` times its `moe_aux_loss_coeff`.
    """
    cross_layers: tuple[int, ...] = ()
    """Numbers of the layers, from 0, with cross-attention to image tiles between self-attention and MLP."""
    cross: CrossConfig = field(default_factory=CrossConfig)
    """Mechanisms of these layers' cross-attention."""
    embedding_dropout: float = 0.0
    """Dropout of the embedded tokens."""
    hidden_dropout: float = 0.0
    """Dropout of what attention and MLP add to the hidden state."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights; it costs a dense mask."""
    ffn_dropout: float = 0.0
    """Dropout inside the MLP, behind its activation."""

    def __post_init__(self):
        check_numbers(self, LIMITS)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: each key-value head serves as many query heads.")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}; set head_width, or another number of heads.")
        if self.experts and self.mlp not in GATED:
            raise ValueError(f"experts={self.experts} need an MLP with a gate ({', '.join(GATED)}), not mlp={self.mlp}.")
        if self.experts and not 1 <= self.active_experts <= self.experts:
            raise ValueError(f"active_experts={self.active_experts} must be 1 to experts={self.experts}.")
        if not 0 < self.rotary_fraction <= 1 or self.rotary_width % 2:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} rotates {self.rotary_width} of a head's {self.head} dimensions; it must be even."
            )
        self._check_cross()
        for name in ("embedding_dropout", "hidden_dropout", "attention_dropout", "ffn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more, and less than 1.")

    def _check_cross(self) -> None:
        beyond = [number for number in self.cross_layers if not 0 <= number < self.layers]
        if beyond or list(self.cross_layers) != sorted(set(self.cross_layers)):
            raise ValueError(f"cross_layers={list(self.cross_layers)} must be numbers from 0 to {self.layers - 1}, each once, in order.")
        heads, width = self.cross.heads or self.heads, self.cross.head_width or self.head
        if self.cross_layers and heads % (self.cross.kv_heads or heads):
            raise ValueError(f"cross.kv_heads={self.cross.kv_heads} does not divide its {heads} heads: each key-value head serves as many of them.")
        if self.cross_layers and self.cross.rotary and width % 2:
            raise ValueError(f"cross.rotary turns pairs of dimensions, but a head has {width}; set cross.head_width to an even number.")

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head * self.rotary_fraction)

    @property
    def reach(self) -> int:
        """Longest document that the model reads."""
        scaling = None if self.positions == "learned" else self.rope_scaling
        if scaling is None or scaling.kind == "llama3":  # of which max_positions already speaks
            return self.max_positions
        return int(self.max_positions * scaling.factor)


class Block(nn.Module):
    """x + attention(norm x), then cross-attention to the memory where there is some, then x + mlp(norm x)."""

    def __init__(self, config: DecoderConfig, *, cross: bool = False):
        super().__init__()
        c = config
        inner = PackedAttention(window=c.window, dropout=c.attention_dropout)
        self.attention_norm = NORMS[c.norm](c.width, c.eps)
        self.attention = Attention(c.width, c.heads, c.kv_heads, c.head, qkv_bias=c.qkv_bias, out_bias=c.out_bias, inner=inner)
        self.cross = None
        if cross:
            rotary = Rotary(width=c.cross.head_width or c.head, theta=c.rope_theta, scaling=None, limit=0)
            self.cross = CrossAttention(
                c.cross, width=c.width, heads=c.heads, head_width=c.head, norm=c.norm, eps=c.eps, mlp=c.mlp, rotary=rotary
            )  # fmt: skip
        self.mlp_norm = NORMS[c.norm](c.width, c.eps)
        if c.experts:
            self.mlp = MoE(
                c.width,
                c.ffn,
                c.mlp,
                experts=c.experts,
                active=c.active_experts,
                balance=c.balance / c.layers,
                dropout=c.ffn_dropout,
            )
        else:
            self.mlp = (GatedMLP if c.mlp in GATED else MLP)(c.width, c.ffn, c.mlp, bias=c.mlp_bias, dropout=c.ffn_dropout)
        self.dropout = nn.Dropout(c.hidden_dropout)

    def forward(
        self, x: Float[Tensor, "b s d"], layout: Documents, angles: tuple[Tensor, Tensor] | None, memory: Float[Tensor, "y d"] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Gives the hidden states [b, s, d] and the layer's share of the balance loss, or None."""
        x = x + self.dropout(self.attention(self.attention_norm(x), layout, angles))
        if self.cross is not None and (memory is not None or (layout.cache is not None and layout.cache.memory)):
            x = self.cross(x, layout, memory)
        y = self.mlp_norm(x)
        y, aux = self.mlp(y, layout.segments) if isinstance(self.mlp, MoE) else (self.mlp(y), None)
        return x + self.dropout(y), aux


class Decoder(nn.Module):
    """Embedding and blocks; the final norm stands in the head."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab, c.width)
        self.positions = nn.Parameter(torch.empty(c.max_positions, c.width)) if c.positions == "learned" else None
        self.dropout = nn.Dropout(c.embedding_dropout)
        self.blocks = nn.ModuleList(Block(c, cross=number in c.cross_layers) for number in range(c.layers))

    def forward(
        self, x: Float[Tensor, "b s d"], positions: Int64[Tensor, "b s"], layout: Documents, memory: Float[Tensor, "y d"] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens -> hidden states [b, s, d] before the final norm, and the balance loss.

        The balance loss is weighted, and the sum of the blocks' shares. `memory` is what
        cross-attention reads; None leaves it out.
        """
        angles = None
        if self.positions is not None:
            x = x + self.positions[positions].to(x.dtype)
        else:
            cos, sin = rope_tables(positions, self.rotary, layout.lengths() if self.rotary.dynamic else None)
            angles = cos.to(x.dtype), sin.to(x.dtype)
        x, total = self.dropout(x), None
        for number, block in enumerate(self.blocks):
            x, aux = block(x, layout.at(number), angles, memory if block.cross is not None else None)
            if aux is not None:
                total = aux if total is None else total + aux
        return x, total

    @property
    def rotary(self) -> Rotary:
        """What the rotary positions are computed from."""
        c = self.config
        return Rotary(width=c.rotary_width, theta=c.rope_theta, scaling=c.rope_scaling, limit=c.max_positions)


class Head(nn.Module):
    """Final norm and vocabulary projection: logits, or the labelled tokens' losses."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.norm = NORMS[config.norm](config.width, config.eps)
        self.weight = None if config.tied else nn.Parameter(torch.empty(config.vocab, config.width))

    def forward(self, x: Float[Tensor, "n d"], targets: Int64[Tensor, " n"] | None = None, *, tied: Tensor | None = None) -> Tensor:
        """Logits [n, v], or with targets the fp32 loss of each token [n] (0 where the target is `IGNORE`).

        `tied` is the embedding's matrix [v, d] where the head has none of its own.
        """
        weight = tied if self.weight is None else self.weight
        assert weight is not None, "a tied head is given the embedding's matrix"
        x = self.norm(x)
        if targets is None:
            return F.linear(x, weight)
        return LinearLoss.apply(x, weight, targets)


class LinearLoss(torch.autograd.Function):
    """Cross-entropy of x @ weight.T, in tiles of some tokens and a part of the vocabulary.

    In place of the fp32 logits of all tokens and their gradient, memory holds one tile of each; a tile is as wide as it may be
    in tokens, so that each row of the weight's gradient is written once. The exponentials of all tokens are kept for backward
    in the dtype of x while they are few (`HEAD_KEPT`), else each tile is computed again. The values are those of
    `F.cross_entropy`.
    """

    @staticmethod
    def forward(ctx, x: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], targets: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
        keep = x.shape[0] * weight.shape[0] <= HEAD_KEPT
        losses, sums, kept = [], [], []
        for part, target in zip(x.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
            log_sum = chosen = None
            for start, rows in _vocabulary(weight, part.shape[0]):
                logits = (part @ rows.T).float()
                here = logits.gather(-1, (target - start).clamp(0, rows.shape[0] - 1)[:, None])[:, 0]
                chosen = here if chosen is None else torch.where(target >= start, here, chosen)
                largest = logits.amax(-1)
                exponentials = logits.sub_(largest[:, None]).exp_()
                part_sum = largest + exponentials.sum(-1).log()
                log_sum = part_sum if log_sum is None else torch.logaddexp(log_sum, part_sum)
                if keep:
                    kept += [exponentials.to(x.dtype), largest]
            assert log_sum is not None and chosen is not None, "a vocabulary has at least one token"
            sums.append(log_sum)
            losses.append((log_sum - chosen).masked_fill(target == IGNORE, 0))
        ctx.save_for_backward(x, weight, targets, torch.cat(sums), *kept)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, " n"]):
        x, weight, targets, sums, *kept = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x, dtype=torch.float32) if need_x else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
        tiles = iter(kept)
        for first in range(0, max(1, x.shape[0]), HEAD_TOKENS):  # once for no token at all: a gradient of 0
            at = slice(first, first + HEAD_TOKENS)
            part, target, log_sum, scale = x[at], targets[at], sums[at], grad[at].masked_fill(targets[at] == IGNORE, 0)
            for start, rows in _vocabulary(weight, part.shape[0]):
                if kept:
                    logits = next(tiles) * (scale * (next(tiles) - log_sum).exp())[:, None]
                else:
                    logits = (part @ rows.T).float().sub_(log_sum[:, None]).exp_().mul_(scale[:, None])
                # Now the gradient of the logits: scale * (softmax - 1 at the target).
                inside = (target >= start) & (target < start + rows.shape[0])
                logits.scatter_add_(-1, torch.where(inside, target - start, 0)[:, None], (-scale * inside)[:, None])
                logits = logits.to(x.dtype)
                if grad_x is not None:
                    _add_product(grad_x[at], logits, rows, first=start == 0)
                if grad_weight is not None:
                    _add_product(grad_weight[start : start + rows.shape[0]], logits.T, part, first=first == 0)
        return None if grad_x is None else grad_x.to(x.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None


def _add_product(out: Float[Tensor, "n m"], a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], *, first: bool) -> None:
    """out = a @ b the first time, then out += a @ b; `out` is fp32 whatever the factors are."""
    if a.dtype == torch.float32:
        out.addmm_(a, b, beta=0 if first else 1)
    elif first:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)


def _vocabulary(weight: Float[Tensor, "v d"], tokens: int) -> Iterator[tuple[int, Float[Tensor, "w d"]]]:
    """Parts of the vocabulary, each with its first id, so that `tokens` times a part is a tile."""
    tile = HEAD_TILE if weight.device.type == "cpu" else 64 * HEAD_TILE
    width = max(1, tile // max(1, tokens))
    yield from zip(range(0, weight.shape[0], width), weight.split(width), strict=True)
