"""The vision-language model: vision encoder -> projector -> splice into the decoder's sequence -> decoder -> head.

Shapes: b rows, s tokens in a row, t = b*s, n tiles, m inline tiles, k memory tiles, p tokens per tile, y memory tokens, d decoder width,
l labelled tokens, v vocabulary.
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

from neva.batch import IGNORE, NEWLINE, VECTORS, Aspect, Batch, CrossVisible, ImageLayout, Inline, Resample, TagBinding, Tags, Thumbnail
from neva.config import check_numbers
from neva.models.attention import Cache, Documents
from neva.models.decoder import Decoder, DecoderConfig, Head
from neva.models.hf_vision import HFVision
from neva.models.vit import VisionConfig, ViT


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How images are brought to the encoder's size."""

    aspect: Aspect = "pad"
    """`square` squashes, `pad` pads to a square as LLaVA-1.5 does, `crop` cuts the centre as CLIP does: one tile each. `tiles` cuts the image
    into a grid of tiles as InternVL and NVLM do, `anyres` into one of `pinpoints` as LLaVA-NeXT does."""
    min_tiles: int = 1
    """Fewest tiles that `tiles` cuts an image into, the thumbnail not counted."""
    max_tiles: int = 1
    """Most of these; NVLM has 6."""
    thumbnail: Thumbnail = "last"
    """Where the whole image stands as one more tile, if it is cut into several."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels of the grids that `anyres` chooses from, as LLaVA-NeXT's config lists them."""
    tags: Tags = "none"
    """Text before each tile: `1d` its number (`<tile_1>`), `grid` its place, `bbox` its corners."""
    thumbnail_tag: str = "<tile_global_thumbnail>"
    """Tag of the thumbnail, and of an image that is one tile; `<tile_global>` in the article and with Yi-34B."""
    box_scale: int = 1000
    """Width and height of an image in the units of `bbox` tags, which the article does not say."""
    tag_tokens: Literal["apart", "joined"] = "apart"
    """Are tags tokenised by themselves, as in NVLM's training, or with the text before them, as the released model's code does?"""
    resample: Resample = "bicubic"
    """The filter with which images are resized."""
    crop_share: float = 1.0
    """Share of the short side that `crop` keeps when it cuts out the centre: 1 is CLIP's; 0.875 is
    DINOv2's, which resizes to 256 and cuts out 224 (timm's `crop_pct`)."""
    resize: Literal["exact", "fast"] = "exact"
    """Pillow's own resize, or torch's, which is several times as fast and
    within 2 levels of 255 of it.

    A few values in a thousand of a bicubic one differ more, by up to 15, at hard edges.
    """
    prefix: str = ""
    """Text before an image's features; NVLM has `<Image>`."""
    suffix: str = ""
    """Text after an image's features; NVLM has `</Image>`."""
    process: str = ""
    """A function of yours in place of `aspect`, as `module:name`; it takes a Pillow image and the `ImageLayout`, and gives its tile."""

    def __post_init__(self):
        check_numbers(
            self,
            {"min_tiles": (1, 2**10), "max_tiles": (1, 2**10), "box_scale": (1, 2**20), "crop_share": (1 / 16, 1.0)},
        )
        sides = [side for pair in self.pinpoints for side in pair]
        if len(self.pinpoints) > 2**10 or not all(1 <= side <= 2**16 for side in sides):
            raise ValueError("pinpoints must be at most 1,024 pairs of 1 to 65,536 pixels.")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"min_tiles={self.min_tiles} and max_tiles={self.max_tiles}: need 1 <= min_tiles <= max_tiles.")
        if self.tags == "bbox" and self.box_scale < self.max_tiles:
            raise ValueError(f"box_scale={self.box_scale} gives tiles the same corners: it must be at least max_tiles={self.max_tiles}.")
        if self.max_tiles > 1 and self.aspect != "tiles":
            raise ValueError(f"max_tiles={self.max_tiles} needs aspect=tiles; aspect={self.aspect} cuts no image into a grid of any size.")
        if (self.aspect == "anyres") != bool(self.pinpoints):
            raise ValueError(
                f"aspect={self.aspect} with {len(self.pinpoints)} pinpoints: anyres needs some, such as [[336, 672]], and no other has any."
            )
        if self.aspect == "anyres" and self.tags != "none":
            raise ValueError(f"tags={self.tags} have no place with aspect=anyres, whose features stand row by row over all tiles; use aspect=tiles.")
        if self.crop_share != 1 and self.aspect != "crop":
            raise ValueError(f"crop_share={self.crop_share} needs aspect=crop; with aspect={self.aspect}, which crops nothing, set crop_share=1.")
        if self.process and self.aspect in ("tiles", "anyres"):
            raise ValueError(f"process={self.process!r} gives one tile; it cannot take the place of aspect={self.aspect}.")
        if self.resize == "fast" and self.resample not in ("bicubic", "bilinear"):
            raise ValueError(f"resize=fast knows bicubic and bilinear, not resample={self.resample}; use resize=exact.")


SHARED = (
    "aspect", "min_tiles", "max_tiles", "thumbnail", "pinpoints", "tags", "thumbnail_tag", "box_scale", "tag_tokens",
    "resample", "crop_share", "resize", "process",
)  # fmt: skip
"""Fields of `ImageConfig` that data must know as they are."""


@dataclass(frozen=True, kw_only=True)
class VLMConfig:
    """A vision encoder, a projector and a decoder."""

    decoder: DecoderConfig
    """The language model."""
    vision: VisionConfig | None
    """None is a model of text alone, with `projector=none`."""
    projector: str = "mlp2x_gelu"
    """`identity`, `linear`, or `mlpNx_gelu`: N linear layers with GELU between; `norm_mlpNx_gelu` has a LayerNorm before. NVLM's have no
    biases: `norm_ffn_gelu` is as wide inside as the decoder's MLP (D and H), `norm_linear` has one layer (X)."""
    pixel_shuffle: Literal["none", "v1", "v2"] = "none"
    """Join the features of 2 x 2 patches to one of four times the width, a quarter as many; `v1` gives their grid transposed."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """How images become tiles."""
    use_im_start_end: bool = False
    """A learned vector on either side of an image's features."""
    inline: Inline = "all"
    """Which tiles stand in the token sequence: `all` (LLaVA, NVLM-D), the `thumbnail` (NVLM-H) or `none` (NVLM-X). The others are memory of
    `decoder.cross_layers`."""
    tag_binding: TagBinding = "adjacent"
    """NVLM-H: how a memory tile's tag is tied to it. `adjacent` has the tag's embeddings among the keys, as the article says, where nothing but
    their neighbourhood, which attention does not see, ties them; `rotary` adds positions to the keys (`decoder.cross.rotary`); `added` adds
    the tag to the features, brought to their size."""
    cross_visible: CrossVisible = "latest"
    """Which images a token sees in the memory: the last one before it, or all before it."""

    def __post_init__(self):
        self._check_fusion()
        if (self.vision is None) != (self.projector == "none"):
            raise ValueError(f"projector={self.projector} and vision={'null' if self.vision is None else 'an encoder'}: a model of text has neither.")
        if self.vision is None:
            return
        if self.pixel_shuffle != "none" and (self.vision.grid % 2 or self.vision.feature != "patch"):
            grid = f"{self.vision.grid} patches a side and feature={self.vision.feature}"
            raise ValueError(f"pixel_shuffle={self.pixel_shuffle} joins 2 x 2 patches: it needs an even grid and feature=patch, not {grid}.")
        with torch.device("meta"):  # for its errors
            projector(self.projector, self.feature_width, self.decoder.width, self.decoder.ffn)

    def _check_fusion(self) -> None:
        """ValueError where tiles have no layer that reads them, or layers no tile."""
        layers, image = self.decoder.cross_layers, self.image
        if self.inline != "all" and not layers:
            raise ValueError(
                f"inline={self.inline} leaves tiles to cross-attention, but decoder.cross_layers is empty: name layers, or set inline=all."
            )
        if self.inline == "all" and layers:
            raise ValueError(f"decoder.cross_layers={list(layers)} would see no tile: with inline=all they stand in the sequence. Set inline=none.")
        if self.inline == "thumbnail" and (image.max_tiles == 1 or image.thumbnail == "none"):
            has = f"image.max_tiles={image.max_tiles} and image.thumbnail={image.thumbnail}"
            raise ValueError(f"inline=thumbnail needs images of several tiles and a thumbnail, not {has}: nothing would be left for cross-attention.")
        if self.inline != "all" and (self.use_im_start_end or image.aspect == "anyres" or image.tag_tokens == "joined"):
            raise ValueError(f"use_im_start_end, image.aspect=anyres and image.tag_tokens=joined need inline=all, not inline={self.inline}.")
        if self.tag_binding != "adjacent" and (self.inline != "thumbnail" or image.tags == "none"):
            needs = "it needs inline=thumbnail and image.tags, or set tag_binding=adjacent"
            raise ValueError(f"tag_binding={self.tag_binding} ties tags to tiles of the memory: {needs}.")
        keyed = self.inline == "thumbnail" and image.tags != "none" and self.tag_binding != "added"
        if keyed and (self.tag_binding == "rotary") != self.decoder.cross.rotary:
            fix = "tag_binding=rotary and decoder.cross.rotary=true go together, or neither"
            raise ValueError(f"tag_binding={self.tag_binding} with decoder.cross.rotary={str(self.decoder.cross.rotary).lower()}: {fix}.")
        if image.aspect == "anyres" and self.vision is not None:
            if any(side % self.vision.image for pinpoint in image.pinpoints for side in pinpoint) or self.pixel_shuffle != "none":
                raise ValueError(f"image.pinpoints must be multiples of vision.image={self.vision.image}, with pixel_shuffle=none.")
            if self.vision.feature != "patch" or self.use_im_start_end:
                raise ValueError("image.aspect=anyres needs vision.feature=patch and use_im_start_end=false: features stand in a grid.")

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
            inline=self.inline,
            tag_binding=self.tag_binding,
            cross_visible=self.cross_visible,
            image_prefix=self.image.prefix,
            image_suffix=self.image.suffix,
            pad_colour=(red, green, blue),
            **{name: getattr(self.image, name) for name in SHARED},
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


PROJECTORS: dict[str, Callable[[re.Match, int, int, int], nn.Module]] = {
    r"identity": lambda name, width, out, ffn: nn.Identity(),
    r"linear": lambda name, width, out, ffn: nn.Sequential(nn.Linear(width, out)),
    r"mlp([1-9])x_gelu": lambda name, width, out, ffn: _mlp(int(name[1]), width, out),
    r"norm_mlp([1-9])x_gelu": lambda name, width, out, ffn: nn.Sequential(nn.LayerNorm(width), *_mlp(int(name[1]), width, out)),
    r"norm_linear": lambda name, width, out, ffn: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out, bias=False)),
    r"norm_ffn_gelu": lambda name, width, out, ffn: nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, ffn, bias=False), nn.GELU(), nn.Linear(ffn, out, bias=False)
    ),
}
"""Pattern of a projector's name -> the module that maps features [n, p, width] to [n, p, out]; it may use the width of the decoder's MLP."""


def projector(name: str, width: int, out: int, ffn: int) -> nn.Module:
    """The projector of this name. ValueError for an unknown name, or where `identity` meets two widths."""
    for pattern, make in PROJECTORS.items():
        match = re.fullmatch(pattern, name)
        if match:
            if name == "identity" and width != out:
                raise ValueError(f"projector=identity needs vision.width={width} equal to decoder.width={out}; use linear or mlp2x_gelu.")
            return make(match, width, out, ffn)
    known = "identity, linear, mlpNx_gelu (mlp2x_gelu is LLaVA-1.5's), norm_mlpNx_gelu, norm_linear and norm_ffn_gelu"
    raise ValueError(f"projector={name!r} is unknown; there are {known}.")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """A projector by itself, and the learned vectors that belong to it."""

    name: str
    width: int
    """Of the features that it is given."""
    out: int
    """Of those that it gives: the decoder's width."""
    ffn: int
    """Width inside, of those that have one of their own."""
    start_end: bool = False
    newline: bool = False

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each of its parameters, by their names in a model. ValueError for an unknown
        name."""
        with torch.device("meta"):
            module = projector(self.name, self.width, self.out, self.ffn)
        found = {f"projector.{name}": p.shape for name, p in module.named_parameters()}
        if self.start_end:
            found["image_vectors"] = torch.Size((2, self.out))
        if self.newline:
            found["image_newline"] = torch.Size((self.out,))
        return found


PARTS = ("vision", "projector", "cross", "decoder", "head")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to; learned image vectors count as projector."""
    if ".cross." in name:
        return "cross"
    first = name.split(".", 1)[0]
    return "projector" if first.startswith("image_") else first


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
        c = config
        self.vision = VISION_BACKENDS[c.vision.backend](c.vision) if c.vision is not None else None
        self.projector = projector(c.projector, c.feature_width, c.decoder.width, c.decoder.ffn) if c.vision is not None else None
        self.image_vectors = nn.Parameter(torch.empty(2, c.decoder.width)) if c.use_im_start_end else None
        self.image_newline = nn.Parameter(torch.empty(c.decoder.width)) if c.image.aspect == "anyres" else None
        self.decoder = Decoder(c.decoder)
        self.head = Head(c.decoder)

    def forward(self, batch: Batch, *, logits_at: Int64[Tensor, " n"] | None = None, cache: Cache | None = None) -> Output:
        """Losses at the labelled tokens, or logits [n, v] at the flat positions `logits_at`; keys and values go to `cache` if given."""
        if batch.memory.numel() and not self.config.decoder.cross_layers:
            raise ValueError("The batch holds image tiles for cross-attention, but this decoder has no cross-attention layers.")
        # Also where this rank has no tile: every rank enters the encoder as often as the others.
        features = self.features(batch.tiles) if batch.any_tiles else None
        memory = self.memory(batch, features) if features is not None and self.config.decoder.cross_layers else None
        x, aux = self.decoder(self.splice(batch, features), batch.positions, Documents.of(batch, cache), memory)
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

    def splice(self, batch: Batch, features: Float[Tensor, "n p d"] | None) -> Float[Tensor, "b s d"]:
        """Embedded tokens with image features and learned vectors in their places."""
        flat = F.pad(batch.tokens.flatten(), (0, 1))  # one more position takes the features that are not placed
        x = self.decoder.embed(flat.clamp_min(0))
        if self.image_vectors is not None:
            number = (VECTORS - flat).clamp(0, 1)
            x = torch.where(((flat == VECTORS) | (flat == VECTORS - 1))[:, None], self.image_vectors[number].to(x.dtype), x)
        if self.image_newline is not None:
            x = torch.where((flat == NEWLINE)[:, None], self.image_newline.to(x.dtype), x)
        if features is not None and self.config.inline != "none":  # else the layers before the first cross-attention would go backward for nothing
            slots = torch.where(batch.slots < 0, flat.numel() - 1, batch.slots)
            x = x.index_copy(0, slots.flatten(), features.index_select(0, batch.inline).flatten(0, 1).to(x.dtype))
        return x[:-1].view(*batch.tokens.shape, -1)

    def memory(self, batch: Batch, features: Float[Tensor, "n p d"]) -> Float[Tensor, "y d"]:
        """What cross-attention reads: features of the memory tiles, their tags' embeddings beside them or added to them."""
        x = features.index_select(0, batch.memory)
        if batch.memory_tags.shape[1]:
            tags = self.decoder.embed(batch.memory_tags.clamp_min(0)).to(x.dtype)
            if self.config.tag_binding == "added":
                real = (batch.memory_tags >= 0).to(x.dtype)[..., None]
                tag = (tags * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
                # As large as the features: an embedding is small, since each block has a norm before it, and cross-attention need not.
                x = x + F.rms_norm(tag, tag.shape[-1:], eps=1e-12) * x.detach().pow(2).mean((1, 2), keepdim=True).sqrt()
            else:
                x = torch.cat((tags, x), dim=1)
        return x.flatten(0, 1).index_select(0, batch.memory_tokens)


CONSTANTS = {"weight": 1.0, "bias": 0.0, "offset": 0.0, "attention_scale": 0.1, "mlp_scale": 0.1, "gate": 0.0, "mlp_gate": 0.0}
"""Last part of a vector's name -> the value that a fresh one is filled with; others are random."""


def fresh(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The fp32 start value of a parameter: a function of its logical name, its shape and the seed alone.

    Norm weights are 1 (0 where a norm keeps its weight minus 1), biases and the gates of cross-attention 0, layer scales 0.1, embeddings
    and learned vectors normal with deviation 0.02, matrices normal with 1 / sqrt(fan-in). So a patch's embedding has deviation 1; its
    position gets 0.5, or the encoder would be blind to where a patch lies for hundreds of steps.
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


VOCABULARY = ("decoder.embed.weight", "head.weight")
"""Matrices with a row for each token."""


def grown(weight: Tensor, rows: int) -> Tensor:
    """A matrix of the vocabulary [v, d] with `rows` rows: each new one is the mean of the others,
    so that a new token is never the likeliest."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat((weight, mean.expand(rows - weight.shape[0], -1)))


def build(config: VLMConfig, *, seed: int = 0) -> VLM:
    """A model with fresh fp32 weights on the CPU."""
    with torch.device("meta"):
        model = VLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fresh(name, parameter.shape, seed))
    return model
