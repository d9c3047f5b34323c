"""Norms, rotary positions, the projections around attention, and the MLPs that every family is made of.

Shapes: b rows, s tokens in a row, h query heads, e width of a head, r rotated dimensions of it, d model width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neva.config import Limits, check_numbers
from neva.models.attention import Documents


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched, so that a decoder reads longer documents than it was first trained on."""

    kind: Literal["linear", "dynamic", "llama3"]
    """`linear` divides positions by `factor`; `dynamic` raises the base with a document's length beyond `max_positions`; `llama3`
    divides low frequencies by `factor`, keeps high ones, and blends those between."""
    factor: float
    """How much longer documents become."""
    low: float = 1.0
    """llama3: frequencies with fewer turns than this over `original` positions are low."""
    high: float = 4.0
    """llama3: those with more turns than this are high."""
    original: int = 8192
    """llama3: positions that the model was first trained on."""

    def __post_init__(self):
        limits: Limits = {
            "factor": (0.0, 1e6),
            "low": (0.0, 1e6),
            "high": (0.0, 1e6),
            "original": (1, 2**31),
        }
        check_numbers(self, limits)
        if self.factor < 1:
            raise ValueError(f"factor={self.factor} must be at least 1.")
        if self.kind == "llama3" and not 0 < self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: need 0 < low < high.")


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """What rotary positions are computed from."""

    width: int
    """Dimensions of a head that are rotated, its first."""
    theta: float
    scaling: RopeScaling | None
    limit: int
    """Positions up to which `dynamic` scaling changes nothing."""

    @property
    def dynamic(self) -> bool:
        """Do the angles depend on a document's length?"""
        return self.scaling is not None and self.scaling.kind == "dynamic"


def rope_tables(
    positions: Int64[Tensor, "b s"], rotary: Rotary, lengths: Int64[Tensor, "b s"] | None = None
) -> tuple[Float[Tensor, "b s 1 e"], Float[Tensor, "b s 1 e"]]:
    """Cosine and sine of each position's angles, in fp32; both halves of a head carry the same angles (Llama's half-split order).

    `lengths`, of each token's document, are wanted for dynamic scaling alone.
    """
    exponents = torch.arange(0, rotary.width, 2, device=positions.device, dtype=torch.float32) / rotary.width
    frequencies, scaling = 1 / rotary.theta**exponents, rotary.scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        turns = scaling.original * frequencies / (2 * math.pi)
        high = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequencies = frequencies * (high + (1 - high) / scaling.factor)
    elif scaling is not None:
        assert lengths is not None, "dynamic scaling looks at the length of a document"
        stretch = (scaling.factor * lengths / rotary.limit - (scaling.factor - 1)).clamp_min(1)
        frequencies = 1 / (rotary.theta * stretch ** (rotary.width / (rotary.width - 2)))[..., None] ** exponents
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def rope(x: Float[Tensor, "b s h e"], cos: Float[Tensor, "b s 1 r"], sin: Float[Tensor, "b s 1 r"]) -> Float[Tensor, "b s h e"]:
    """Rotate each head by its position: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), halves of its first r dimensions."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rope(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class LayerNorm1P(nn.Module):
    """LayerNorm that keeps its weight minus 1, as Megatron's zero-centred gamma: a fresh one is 0, and weight decay pulls towards 1."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.offset = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return F.layer_norm(x, x.shape[-1:], self.offset + 1, self.bias, self.eps)


NormKind = Literal["rmsnorm", "layernorm", "layernorm1p"]
NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm, "layernorm1p": LayerNorm1P}
"""Name of a norm -> the module of a width and an epsilon."""


class FlatRMSNorm(nn.Module):
    """InternViT's norm of queries and keys: over all heads together, not head by head.

    The mean square is over `mean_over` dimensions: NVLM pads 25 heads with 7 of zeros, which must not count.
    """

    def __init__(self, width: int, eps: float, mean_over: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.mean_over = eps, mean_over

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        wide = x.float()
        return (wide * (wide.square().sum(-1, keepdim=True) / self.mean_over + self.eps).rsqrt()).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Project to queries, keys and values, norm and rotate them where wanted, attend in `inner`, project back.

    With `qk_norm`, an epsilon, queries and keys pass a `FlatRMSNorm` each.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
        inner: nn.Module,
        qk_norm: float | None = None,
    ):
        super().__init__()
        self.head_width = head_width
        self.q = nn.Linear(width, heads * head_width, bias=qkv_bias)
        self.k = nn.Linear(width, kv_heads * head_width, bias=qkv_bias)
        self.v = nn.Linear(width, kv_heads * head_width, bias=qkv_bias)
        self.out = nn.Linear(heads * head_width, width, bias=out_bias)
        self.q_norm = nn.Identity() if qk_norm is None else FlatRMSNorm(heads * head_width, qk_norm, mean_over=width)
        self.k_norm = nn.Identity() if qk_norm is None else FlatRMSNorm(kv_heads * head_width, qk_norm, mean_over=width)
        self.inner = inner

    def forward(self, x: Float[Tensor, "b s d"], layout: Documents | None, angles: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "b s d"]:
        # -1 heads: under tensor parallelism a rank holds a share of them.
        q, k, v = (p.unflatten(-1, (-1, self.head_width)) for p in (self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)))
        if angles is not None:
            q, k = rope(q, *angles), rope(k, *angles)
        return self.out(self.inner(q, k, v, layout).flatten(2))


def quick_gelu(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """x * sigmoid(1.702 x), as OpenAI's CLIP was trained."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """GELU by its tanh approximation, as SigLIP and GPT-2 were trained."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """relu(x) squared, Nemotron's."""
    return F.relu(x).square()


MLPKind = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "quick_gelu", "squared_relu"]
GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
"""Name of an MLP with a gate -> the gate's activation."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "squared_relu": squared_relu,
}  # fmt: skip
"""Name of an MLP without a gate -> its activation."""


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, width: int, ffn: int, kind: str, *, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        self.gate = nn.Linear(width, ffn, bias=bias)
        self.up = nn.Linear(width, ffn, bias=bias)
        self.down = nn.Linear(ffn, width, bias=bias)
        self.activation, self.dropout = GATED[kind], dropout

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return self.down(F.dropout(self.activation(self.gate(x)) * self.up(x), self.dropout, self.training))


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, width: int, ffn: int, kind: str, *, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(width, ffn, bias=bias)
        self.down = nn.Linear(ffn, width, bias=bias)
        self.activation, self.dropout = ACTIVATIONS[kind], dropout

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return self.down(F.dropout(self.activation(self.up(x)), self.dropout, self.training))
