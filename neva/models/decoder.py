"""One decoder for every language-model family, chosen by field values.

Shapes: b rows, s tokens in a row, d width, l labelled tokens, v vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neva.batch import IGNORE
from neva.models.layers import Attention, Documents, GatedMLP, PackedAttention, RMSNorm, rope_tables

HEAD_CHUNK = 2**23
"""Most logits that the loss computes at a time: 32 MiB in fp32."""
HEAD_KEPT = 2**25
"""Most logits that the loss keeps for backward in place of computing them again: 1048 labelled tokens of a vocabulary of 32,000."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and mechanisms of a decoder."""

    vocab: int
    """Rows of the embedding."""
    width: int
    layers: int
    heads: int
    kv_heads: int
    """Key-value heads; fewer than `heads` is grouped-query attention."""
    ffn: int
    """Width inside the MLP."""
    head_width: int | None = None
    """Width of one head; `width / heads` if not given."""
    norm: Literal["rmsnorm"] = "rmsnorm"
    eps: float = 1e-5
    mlp: Literal["swiglu"] = "swiglu"
    rope_theta: float = 10000.0
    max_positions: int = 4096
    """Longest document that the positions were made for."""
    tied: bool = False
    """Does the head use the embedding's matrix?"""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: each key-value head serves as many query heads.")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}; set head_width, or another number of heads.")

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.width, c.eps)
        self.attention = Attention(c.width, c.heads, c.kv_heads, c.head, qkv_bias=False, out_bias=False, inner=PackedAttention())
        self.mlp_norm = RMSNorm(c.width, c.eps)
        self.mlp = GatedMLP(c.width, c.ffn)

    def forward(self, x: Float[Tensor, "b s d"], layout: Documents, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Gives the hidden states [b, s, d] and an auxiliary loss (experts' balance; None here)."""
        x = x + self.attention(self.attention_norm(x), layout, angles)
        return x + self.mlp(self.mlp_norm(x)), None


class Decoder(nn.Module):
    """Embedding and blocks; the final norm stands in the head."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x: Float[Tensor, "b s d"], positions: Int64[Tensor, "b s"], layout: Documents) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens -> hidden states [b, s, d] before the final norm, and the blocks' auxiliary losses added up."""
        cos, sin = rope_tables(positions, self.config.head, self.config.rope_theta)
        angles = cos.to(x.dtype), sin.to(x.dtype)
        total = None
        for number, block in enumerate(self.blocks):
            x, aux = block(x, layout.at(number), angles)
            total = aux if total is None else total + aux
        return x, total


class Head(nn.Module):
    """Final norm and vocabulary projection: logits, or the labelled tokens' losses."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.norm = RMSNorm(config.width, config.eps)
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
    """Cross-entropy of x @ weight.T in chunks of tokens.

    In place of the fp32 logits of all tokens and their gradient, memory holds one chunk of each. The exponentials of all
    tokens are kept for backward in the dtype of x while they are few (`HEAD_KEPT`), else each chunk is computed again.
    The values are those of `F.cross_entropy`.
    """

    @staticmethod
    def forward(ctx, x: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], targets: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
        ctx.rows = max(1, HEAD_CHUNK // weight.shape[0])
        losses, kept = [], []
        for part, target in zip(x.split(ctx.rows), targets.split(ctx.rows), strict=True):
            exponentials, total, chosen = _exponentials(part, weight, target)
            losses.append((total.log() - chosen).masked_fill(target == IGNORE, 0))
            if x.shape[0] * weight.shape[0] <= HEAD_KEPT:
                kept += [exponentials.to(x.dtype), total]
        ctx.save_for_backward(x, weight, targets, *kept)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, " n"]):
        x, weight, targets, *kept = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for number, start in enumerate(range(0, x.shape[0], ctx.rows)):
            at = slice(start, start + ctx.rows)
            part, target, scale = x[at], targets[at], grad[at].masked_fill(targets[at] == IGNORE, 0)
            exponentials, total = kept[2 * number : 2 * number + 2] if kept else _exponentials(part, weight, target)[:2]
            logits = (exponentials * (scale / total)[:, None]).to(x.dtype)  # their gradient: scale * (softmax - 1 at the target)
            logits[torch.arange(part.shape[0], device=x.device), target.clamp_min(0)] -= scale.to(x.dtype)
            if grad_x is not None:
                grad_x[at] = logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(logits.T, part) if x.dtype == torch.float32 else grad_weight.add_(logits.T @ part)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _exponentials(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], targets: Int64[Tensor, " n"]
) -> tuple[Float[Tensor, "n v"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """exp(logit - largest logit) in fp32, their sum, and the target's logit - largest logit."""
    logits = (x @ weight.T).float()
    largest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets.clamp_min(0)[:, None]) - largest
    exponentials = logits.sub_(largest).exp_()
    return exponentials, exponentials.sum(-1), chosen[:, 0]
