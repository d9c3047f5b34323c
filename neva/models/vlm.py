"""The vision-language model: vision encoder -> projector -> splice into the decoder's sequence -> decoder -> head.

Shapes: b rows, s tokens in a row, t = b*s, n tiles, m inline tiles, p tokens per tile, d decoder width, l labelled tokens, v vocabulary.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from neva.batch import IGNORE, VECTORS, Batch, ImageLayout
from neva.models.attention import Cache, Documents
from neva.models.decoder import Decoder, DecoderConfig, Head
from neva.models.hf_vision import HFVision
from neva.models.vit import VisionConfig, ViT


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How images are brought to the encoder's size."""

    aspect: Literal["square", "pad", "crop"] = "pad"
    """`square` squashes, `pad` pads to a square as LLaVA-1.5 does, `crop` cuts the centre as CLIP does."""
    resample: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"
    prefix: str = ""
    """Text before an image's features."""
    suffix: str = ""
    """Text after an image's features."""
    process: str = ""
    """A function of yours in place of `aspect`, as `module:name`; it takes a Pillow image and the `ImageLayout`, and gives its tiles."""


@dataclass(frozen=True, kw_only=True)
class VLMConfig:
    """A vision encoder, a projector and a decoder."""

    decoder: DecoderConfig
    vision: VisionConfig | None
    """None is a model of text alone, with `projector=none`."""
    projector: str = "mlp2x_gelu"
    """`identity`, `linear`, or `mlpNx_gelu`: N linear layers with GELU between; `norm_mlpNx_gelu` has a LayerNorm before."""
    pixel_shuffle: Literal["none", "v1", "v2"] = "none"
    """Join the features of 2 x 2 patches to one of four times the width, a quarter as many; `v1` gives their grid transposed."""
    image: ImageConfig = field(default_factory=ImageConfig)
    use_im_start_end: bool = False
    """A learned vector on either side of an image's features."""

    def __post_init__(self):
        if (self.vision is None) != (self.projector == "none"):
            raise ValueError(f"projector={self.projector} and vision={'null' if self.vision is None else 'an encoder'}: a model of text has neither.")
        if self.vision is None:
            return
        if self.pixel_shuffle != "none" and (self.vision.grid % 2 or self.vision.feature != "patch"):
            grid = f"{self.vision.grid} patches a side and feature={self.vision.feature}"
            raise ValueError(f"pixel_shuffle={self.pixel_shuffle} joins 2 x 2 patches: it needs an even grid and feature=patch, not {grid}.")
        with torch.device("meta"):  # for its errors
            projector(self.projector, self.feature_width, self.decoder.width)

    @property
    def feature_width(self) -> int:
        """Width of what the projector is given."""
        assert self.vision is not None
        return self.vision.width * (1 if self.pixel_shuffle == "none" else 4)

    @property
    def tokens_per_tile(self) -> int:
        """Features that the projector gives for a tile."""
        assert self.vision is not None
        return self.vision.tokens if self.pixel_shuffle == "none" else self.vision.tokens // 4

    @property
    def layout(self) -> ImageLayout:
        """What data must know about vision."""
        if self.vision is None:
            return ImageLayout(tile=1, tokens_per_tile=1, images=False)
        red, green, blue = (int(255 * x) for x in self.vision.mean)
        return ImageLayout(
            tile=self.vision.image,
            tokens_per_tile=self.tokens_per_tile,
            start_end=self.use_im_start_end,
            aspect=self.image.aspect,
            resample=self.image.resample,
            process=self.image.process,
            image_prefix=self.image.prefix,
            image_suffix=self.image.suffix,
            pad_colour=(red, green, blue),
        )


def pixel_shuffle(x: Float[Tensor, "n p d"], order: Literal["v1", "v2"]) -> Float[Tensor, "n q c"]:
    """Features of a square of patches, row by row -> those of 2 x 2 of them joined, channels of top left, top right, bottom left, bottom right.

    Output goes row by row (InternVL's and NVLM's `ps_version` v2) or column by column (v1, and VILA's `mlp_downsample`).
    """
    side = math.isqrt(x.shape[1])
    x = x.unflatten(1, (side // 2, 2, side // 2, 2))  # n, row of squares, row in it, column of squares, column in it
    x = x.permute(0, 1, 3, 2, 4, 5) if order == "v2" else x.permute(0, 3, 1, 2, 4, 5)
    return x.flatten(3).flatten(1, 2)


def _mlp(depth: int, width: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(width, out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out, out)]
    return nn.Sequential(*layers)


PROJECTORS: dict[str, Callable[[re.Match, int, int], nn.Module]] = {
    r"identity": lambda name, width, out: nn.Identity(),
    r"linear": lambda name, width, out: nn.Sequential(nn.Linear(width, out)),
    r"mlp([1-9])x_gelu": lambda name, width, out: _mlp(int(name[1]), width, out),
    r"norm_mlp([1-9])x_gelu": lambda name, width, out: nn.Sequential(nn.LayerNorm(width), *_mlp(int(name[1]), width, out)),
}
"""Pattern of a projector's name -> the module that maps features [n, p, width] to [n, p, out]."""


def projector(name: str, width: int, out: int) -> nn.Module:
    """The projector of this name. ValueError for an unknown name, or where `identity` meets two widths."""
    for pattern, make in PROJECTORS.items():
        match = re.fullmatch(pattern, name)
        if match:
            if name == "identity" and width != out:
                raise ValueError(f"projector=identity needs vision.width={width} equal to decoder.width={out}; use linear or mlp2x_gelu.")
            return make(match, width, out)
    raise ValueError(f"projector={name!r} is unknown; there are identity, linear, mlpNx_gelu (mlp2x_gelu is LLaVA-1.5's) and norm_mlpNx_gelu.")


VISION_BACKENDS: dict[str, Callable[[VisionConfig], nn.Module]] = {"native": ViT, "hf": HFVision}


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """What a forward pass gives: one of the two, and the blocks' auxiliary loss where there is one."""

    losses: Float[Tensor, " l"] | None = None
    """fp32 loss at each of `Batch.labelled`; 0 where that is -1."""
    logits: Float[Tensor, "n v"] | None = None
    aux: Tensor | None = None


class VLM(nn.Module):
    """One class for every fusion: where image features go is in the batch."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.vision = VISION_BACKENDS[config.vision.backend](config.vision) if config.vision is not None else None
        self.projector = projector(config.projector, config.feature_width, config.decoder.width) if config.vision is not None else None
        self.image_vectors = nn.Parameter(torch.empty(2, config.decoder.width)) if config.use_im_start_end else None
        self.decoder = Decoder(config.decoder)
        self.head = Head(config.decoder)

    def forward(self, batch: Batch, *, logits_at: Int64[Tensor, " n"] | None = None, cache: Cache | None = None) -> Output:
        """Losses at the labelled tokens, or logits [n, v] at the flat positions `logits_at`; keys and values go to `cache` if given."""
        if batch.memory.numel():
            raise ValueError("The batch holds image tiles for cross-attention, but this decoder has no cross-attention layers.")
        x, aux = self.decoder(self.splice(batch), batch.positions, Documents.of(batch, cache))
        x = x.flatten(0, 1)
        tied = self.decoder.embed.weight if self.config.decoder.tied else None
        if logits_at is not None:
            return Output(logits=self.head(x.index_select(0, logits_at), tied=tied), aux=aux)
        at = batch.labelled.clamp_min(0)
        targets = batch.labels.flatten().index_select(0, at).masked_fill(batch.labelled < 0, IGNORE)
        return Output(losses=self.head(x.index_select(0, at), targets, tied=tied), aux=aux)

    def features(self, tiles: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n p d"]:
        """Projected features of tiles."""
        assert self.vision is not None and self.projector is not None, "data of a model without an encoder holds no tile"
        x, order = self.vision(tiles), self.config.pixel_shuffle
        return self.projector(x if order == "none" else pixel_shuffle(x, order))

    def splice(self, batch: Batch) -> Float[Tensor, "b s d"]:
        """Embedded tokens with image features and learned vectors in their places."""
        flat = F.pad(batch.tokens.flatten(), (0, 1))  # one more position takes the features that are not placed
        x = self.decoder.embed(flat.clamp_min(0))
        if self.image_vectors is not None:
            number = (VECTORS - flat).clamp(0, self.image_vectors.shape[0] - 1)
            x = torch.where((flat <= VECTORS)[:, None], self.image_vectors[number].to(x.dtype), x)
        if batch.any_tiles:  # also where this rank has none: every rank enters the encoder as often as the others
            features = self.features(batch.tiles).index_select(0, batch.inline)
            slots = torch.where(batch.slots < 0, flat.numel() - 1, batch.slots)
            x = x.index_copy(0, slots.flatten(), features.flatten(0, 1).to(x.dtype))
        return x[:-1].view(*batch.tokens.shape, -1)


CONSTANTS = {"weight": 1.0, "bias": 0.0, "offset": 0.0, "attention_scale": 0.1, "mlp_scale": 0.1}
"""Last part of a vector's name -> the value that a fresh one is filled with; others are random."""


def fresh(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The fp32 start value of a parameter: a function of its logical name, its shape and the seed alone.

    Norm weights are 1 (0 where a norm keeps its weight minus 1), biases 0, layer scales 0.1, embeddings and learned vectors normal with
    deviation 0.02, matrices normal with 1 / sqrt(fan-in). So a patch's embedding has deviation 1; its position gets 0.5, or the encoder
    would be blind to where a patch lies for hundreds of steps.
    """
    last = name.rsplit(".", 1)[-1]
    if len(shape) == 1 and last in CONSTANTS:
        return torch.full(shape, CONSTANTS[last])
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    expert, beside_patches = ".experts." in name, name in ("vision.positions", "vision.class_token")
    looked_up = (last != "weight" and not expert) or name.startswith(("decoder.embed.", "head."))
    fan_in = shape[-1] if expert else shape[1:].numel()
    deviation = 0.5 if beside_patches else 0.02 if looked_up else fan_in**-0.5
    return torch.empty(shape).normal_(0, deviation, generator=generator)


def build(config: VLMConfig, *, seed: int = 0) -> VLM:
    """A model with fresh fp32 weights on the CPU."""
    with torch.device("meta"):
        model = VLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fresh(name, parameter.shape, seed))
    return model
