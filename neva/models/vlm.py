"""The vision-language model: vision encoder -> projector -> splice into the decoder's sequence -> decoder -> head.

Shapes: b rows, s tokens in a row, t = b*s, n tiles, m inline tiles, p tokens per tile, d decoder width, l labelled tokens, v vocabulary.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from neva.batch import IGNORE, VECTORS, Batch, ImageLayout
from neva.models.decoder import Decoder, DecoderConfig, Head
from neva.models.layers import Cache, Documents
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


@dataclass(frozen=True, kw_only=True)
class VLMConfig:
    """A vision encoder, a projector and a decoder."""

    decoder: DecoderConfig
    vision: VisionConfig
    projector: str = "mlp2x_gelu"
    """`identity`, `linear`, or `mlpNx_gelu`: N linear layers with GELU between."""
    image: ImageConfig = field(default_factory=ImageConfig)
    use_im_start_end: bool = False
    """A learned vector on either side of an image's features."""

    def __post_init__(self):
        with torch.device("meta"):  # for its errors
            projector(self.projector, self.vision.width, self.decoder.width)

    @property
    def layout(self) -> ImageLayout:
        """What data must know about vision."""
        red, green, blue = (int(255 * x) for x in self.vision.mean)
        return ImageLayout(
            tile=self.vision.image,
            tokens_per_tile=self.vision.tokens,
            start_end=self.use_im_start_end,
            aspect=self.image.aspect,
            resample=self.image.resample,
            image_prefix=self.image.prefix,
            image_suffix=self.image.suffix,
            pad_colour=(red, green, blue),
        )


def _mlp(depth: int, width: int, out: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(width, out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out, out)]
    return nn.Sequential(*layers)


PROJECTORS: dict[str, Callable[[re.Match, int, int], nn.Module]] = {
    r"identity": lambda name, width, out: nn.Identity(),
    r"linear": lambda name, width, out: nn.Sequential(nn.Linear(width, out)),
    r"mlp([1-9])x_gelu": lambda name, width, out: _mlp(int(name[1]), width, out),
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
    raise ValueError(f"projector={name!r} is unknown; there are identity, linear and mlpNx_gelu (mlp2x_gelu is LLaVA-1.5's).")


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
        self.vision = ViT(config.vision)
        self.projector = projector(config.projector, config.vision.width, config.decoder.width)
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
        return self.projector(self.vision(tiles))

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


def fresh(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The fp32 start value of a parameter: a function of its logical name, its shape and the seed alone.

    Norm weights are 1, biases 0, embeddings and learned vectors normal with deviation 0.02, matrices normal with 1 / sqrt(fan-in).
    So a patch's embedding has deviation 1; its position gets 0.5, or the encoder would be blind to where a patch lies for hundreds of steps.
    """
    last = name.rsplit(".", 1)[-1]
    if last == "bias":
        return torch.zeros(shape)
    if last == "weight" and len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    looked_up = last != "weight" or name.startswith(("decoder.embed.", "head."))
    beside_patches = name in ("vision.positions", "vision.class_token")
    deviation = 0.5 if beside_patches else 0.02 if looked_up else shape[1:].numel() ** -0.5
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
