"""The vision encoder: a ViT that gives the hidden state a VLM reads.

Shapes: n tiles, c channels, h and w pixels, p patches, t tokens (patches and the class token), d width.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from neva.config import Limits, check_numbers
from neva.models.attention import FullAttention
from neva.models.layers import MLP, NORMS, Attention, NormKind

Feature = Literal["patch", "cls_patch"]


LIMITS: Limits = {
    "image": (1, 2**14), "patch": (1, 2**14), "width": (1, 2**20), "layers": (1, 2**10),
    "heads": (1, 2**14), "ffn": (1, 2**22), "head_width": (1, 2**14), "eps": (0.0, 1.0),
}  # fmt: skip
"""Least and most of each number of an encoder; no model comes near the most."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes and mechanisms of a vision encoder."""

    backend: Literal["native", "hf"] = "native"
    """`hf` runs a transformers model as it is, for encoders that this file does not compute."""
    hf_config: dict[str, Any] = field(default_factory=dict)
    """Its config.json, for `backend=hf`; the sizes here only repeat it."""
    image: int
    """Side of a tile in pixels."""
    patch: int
    """Side of a patch in pixels."""
    width: int
    """Width of the hidden state."""
    layers: int
    """Layers of the published encoder; `depth` of them are computed."""
    heads: int
    """Attention heads."""
    ffn: int
    """Width inside the MLP."""
    head_width: int | None = None
    """Width of one head; `width / heads` if not given."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    """The MLP's activation; `quick_gelu` is CLIP's, `gelu_tanh` SigLIP's."""
    norm: NormKind = "layernorm"
    """The norm before attention and MLP."""
    eps: float = 1e-5
    """The norms' addition to the variance."""
    qkv_bias: bool = True
    """Biases on queries, keys and values."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, over all heads together (InternViT-6B)."""
    layer_scale: bool = False
    """A learned factor on each channel of what attention and MLP add (InternViT)."""
    class_token: bool = True
    """Is there a learned token before the patches?"""
    feature: Feature = "patch"
    """Drop the class token from the features, or keep it."""
    pre_norm: bool = True
    """A norm between the embeddings and the first block."""
    patch_bias: bool = False
    """A bias on the patch embedding."""
    select_layer: int = -2
    """Which hidden state is read, counted as transformers' `hidden_states`: 0 is the embeddings, -1 the last block's output."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Channel means of pixels scaled to 0..1."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Channel standard deviations of these."""

    def __post_init__(self):
        check_numbers(self, LIMITS)
        if min(self.std) <= 0 or not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError(
                f"mean={self.mean} and std={self.std} must be finite, and std above 0.",
            )
        if (self.backend == "hf") != bool(self.hf_config):
            raise ValueError(f"backend={self.backend}: hf needs hf_config, the config.json of a transformers vision model, and native has none.")
        if not 0 < self.patch <= self.image:
            raise ValueError(f"patch={self.patch} must be 1 to image={self.image}; pixels at the edge that fill no patch are not seen.")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}; set head_width, or another number of heads.")
        if not -self.layers - 1 <= self.select_layer <= self.layers:
            raise ValueError(
                f"select_layer={self.select_layer} is outside -{self.layers + 1}..{self.layers}, the hidden states of {self.layers} layers."
            )
        if self.feature == "cls_patch" and not self.class_token:
            raise ValueError("feature=cls_patch keeps a class token, but class_token is false; set feature=patch.")

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches along a side of a tile; SigLIP's 384 pixels are 27 patches of 14, and 6 pixels that no patch covers."""
        return self.image // self.patch

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Features that a tile gives."""
        return self.patches + (self.class_token and self.feature == "cls_patch")

    @property
    def depth(self) -> int:
        """Blocks that are computed; those after the selected hidden state are not built."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


def normalise(tiles: UInt8[Tensor, "n c h w"], mean: tuple[float, ...], std: tuple[float, ...]) -> Float[Tensor, "n c h w"]:
    """fp32 pixels of mean 0 and deviation 1 in each channel; numbers in place of tensors, since a copy to a GPU would wait."""
    return torch.stack([(tiles[:, i] / 255 - mean[i]) / std[i] for i in range(len(mean))], dim=1)


class VisionBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), each addition times its layer scale if there is one."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = config
        norm, qk_norm = NORMS[c.norm], c.eps if c.qk_norm else None
        self.attention_norm = norm(c.width, c.eps)
        self.attention = Attention(
            c.width, c.heads, c.heads, c.head, qkv_bias=c.qkv_bias, out_bias=True, inner=FullAttention(), qk_norm=qk_norm
        )  # fmt: skip
        self.mlp_norm = norm(c.width, c.eps)
        self.mlp = MLP(c.width, c.ffn, c.activation)
        self.attention_scale = nn.Parameter(torch.empty(c.width)) if c.layer_scale else None
        self.mlp_scale = nn.Parameter(torch.empty(c.width)) if c.layer_scale else None

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        y = self.attention(self.attention_norm(x), None)
        x = x + (y if self.attention_scale is None else y * self.attention_scale)
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.mlp_scale is None else y * self.mlp_scale)


class ViT(nn.Module):
    """Pixels of tiles -> the selected hidden state."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = self.config = config
        self.patch = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=c.patch_bias)
        self.class_token = nn.Parameter(torch.empty(c.width)) if c.class_token else None
        self.positions = nn.Parameter(torch.empty(c.patches + c.class_token, c.width))
        self.pre_norm = NORMS[c.norm](c.width, c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))

    def forward(self, tiles: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n p d"]:
        """Features of each tile, class token dropped unless `feature=cls_patch`; n may be 0."""
        c, dtype = self.config, self.positions.dtype
        x = self.patch(normalise(tiles, c.mean, c.std).to(dtype)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), dim=1)
        x = self.pre_norm(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:] if self.class_token is not None and c.feature == "patch" else x


def resize_positions(positions: Float[Tensor, "t d"], grid: int, *, class_token: bool) -> Float[Tensor, "u d"]:
    """Learned positions for a grid of another side, bicubic between the patches' as InternVL and transformers do; a class token's stays."""
    first, patches = positions[: int(class_token)], positions[int(class_token) :]
    side = math.isqrt(patches.shape[0])
    if side == grid:
        return positions
    square = patches.T.float().view(1, -1, side, side)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((first, resized.flatten(2)[0].T.to(positions.dtype)))
