"""The vision encoder: a ViT that gives the hidden state a VLM reads.

Shapes: n tiles, c channels, h and w pixels, p patches, t tokens (patches and the class token), d width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from neva.models.layers import MLP, Attention, FullAttention

Feature = Literal["patch", "cls_patch"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes and mechanisms of a vision encoder."""

    image: int
    """Side of a tile in pixels."""
    patch: int
    """Side of a patch in pixels."""
    width: int
    layers: int
    """Layers of the published encoder; `depth` of them are computed."""
    heads: int
    ffn: int
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: float = 1e-5
    class_token: bool = True
    """Is there a learned token before the patches?"""
    feature: Feature = "patch"
    """Drop the class token from the features, or keep it."""
    pre_norm: bool = True
    """A LayerNorm between the embeddings and the first block."""
    patch_bias: bool = False
    select_layer: int = -2
    """Which hidden state is read, counted as transformers' `hidden_states`: 0 is the embeddings, -1 the last block's output."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Channel means and standard deviations of pixels scaled to 0..1."""

    def __post_init__(self):
        if self.image % self.patch:
            raise ValueError(f"image={self.image} is not a multiple of patch={self.patch}; a near size is {self.image // self.patch * self.patch}.")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}.")
        if not -self.layers - 1 <= self.select_layer <= self.layers:
            raise ValueError(
                f"select_layer={self.select_layer} is outside -{self.layers + 1}..{self.layers}, the hidden states of {self.layers} layers."
            )
        if self.feature == "cls_patch" and not self.class_token:
            raise ValueError("feature=cls_patch keeps a class token, but class_token is false; set feature=patch.")

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.image // self.patch) ** 2

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
    """x + attention(norm x), then x + mlp(norm x), with LayerNorm and biases."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = config
        self.attention_norm = nn.LayerNorm(c.width, eps=c.eps)
        self.attention = Attention(c.width, c.heads, c.heads, c.width // c.heads, qkv_bias=True, out_bias=True, inner=FullAttention())
        self.mlp_norm = nn.LayerNorm(c.width, eps=c.eps)
        self.mlp = MLP(c.width, c.ffn, c.activation)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        x = x + self.attention(self.attention_norm(x), None)
        return x + self.mlp(self.mlp_norm(x))


class ViT(nn.Module):
    """Pixels of tiles -> the selected hidden state."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        c = self.config = config
        self.patch = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=c.patch_bias)
        self.class_token = nn.Parameter(torch.empty(c.width)) if c.class_token else None
        self.positions = nn.Parameter(torch.empty(c.patches + c.class_token, c.width))
        self.pre_norm = nn.LayerNorm(c.width, eps=c.eps) if c.pre_norm else nn.Identity()
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
