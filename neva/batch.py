"""All that crosses from data to model: one micro-batch, and how images are laid out in it.

Shapes: b rows, s `seq_length`, n tiles, m inline tiles, k memory tiles, p tokens per tile, g longest tag,
l labelled tokens (padded), d documents, r runs, y memory tokens (keys that cross-attention reads).
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

IGNORE = -100
"""Label of a token that carries no loss."""
IMAGE = -200
"""Token id at the place of one image feature, as LLaVA writes it."""
VECTORS = -201
"""Token id of learned vector 0; vector number v has the id `VECTORS - v`."""
IMAGE_START, IMAGE_END = VECTORS, VECTORS - 1
"""The two learned vectors of `use_im_start_end`: before and after the features of an image."""
NEWLINE = VECTORS - 2
"""The learned vector behind each row of an any-resolution image's features."""

Aspect = Literal["square", "pad", "crop", "tiles", "anyres"]
Resample = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Thumbnail = Literal["none", "first", "last"]
Inline = Literal["all", "thumbnail", "none"]
Tags = Literal["none", "1d", "grid", "bbox"]
TagBinding = Literal["adjacent", "added", "rotary"]
CrossVisible = Literal["latest", "all"]


@dataclass(frozen=True, kw_only=True)
class ImageLayout:
    """How one image becomes tiles, and tiles become tokens: all that data needs to know about vision.

    Derived from the model's config (`VLMConfig.layout`), never written by hand in a recipe.
    """

    tile: int
    """Side of a square tile in pixels."""
    images: bool = True
    """Does the model see images? One of text alone does not."""
    tokens_per_tile: int
    """Features that the projector gives for a tile."""
    aspect: Aspect = "pad"
    """`square` squashes, `pad` pads to a square with `pad_colour`, `crop` resizes the short side
    and cuts out the centre: one tile each. `tiles` cuts the image into the grid of tiles that is
    nearest to its shape (InternVL, NVLM), `anyres` into one of `pinpoints` (LLaVA-NeXT)."""
    min_tiles: int = 1
    max_tiles: int = 1
    """Fewest and most tiles that `tiles` cuts an image into, the thumbnail not counted."""
    thumbnail: Thumbnail = "last"
    """Where the whole image stands as one more tile, if it is cut into several."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels of the grids that `anyres` chooses from, multiples of `tile`."""
    inline: Inline = "all"
    """Which tiles stand in the token sequence; the others are cross-attention memory. An image of one tile counts as its own thumbnail."""
    tags: Tags = "none"
    """Text before each tile: its number, its place in the grid, or its corners."""
    thumbnail_tag: str = "<tile_global_thumbnail>"
    """Tag of the thumbnail, and of an image that is one tile."""
    box_scale: int = 1000
    """Width and height of an image in the units of `bbox` tags."""
    tag_tokens: Literal["apart", "joined"] = "apart"
    """Are tags tokenised by themselves, as in NVLM's training, or with the text before them, as the released model's code does?"""
    tag_binding: TagBinding = "adjacent"
    """How the tag of a memory tile is tied to it: as keys beside its features, the same with rotary positions on the keys, or added to them."""
    cross_visible: CrossVisible = "latest"
    """Which images' memory a token sees: that of the last image before it, or of all before it."""
    image_prefix: str = ""
    """Text before an image's features."""
    image_suffix: str = ""
    """Text after an image's features."""
    start_end: bool = False
    """A learned vector (`IMAGE_START`, `IMAGE_END`) on either side of an image's features."""
    pad_colour: tuple[int, int, int] = (122, 116, 104)
    """RGB of the padding; LLaVA-1.5 uses int(255 * CLIP mean)."""
    resample: Resample = "bicubic"
    """Pillow's resampling filter."""
    crop_share: float = 1.0
    """Share of the short side that `crop` keeps."""
    resize: Literal["exact", "fast"] = "exact"
    """Pillow's own resize, or torch's, which is several times as fast and
    within 2 levels of 255 of it.

    A few values in a thousand of a bicubic one differ more, by up to 15, at hard edges.
    """
    process: str = ""
    """`module:name` of a function (Pillow image, ImageLayout) -> uint8 tiles [1, 3, tile, tile], in place of `aspect`."""

    @property
    def most_tiles(self) -> int:
        """Most tiles that one image makes, the thumbnail counted."""
        grid = max((high * wide // self.tile**2 for high, wide in self.pinpoints), default=self.max_tiles)
        return grid + (self.aspect == "anyres" or (grid > 1 and self.thumbnail != "none"))

    @property
    def tokens_per_image(self) -> int:
        """Most token positions that one image takes, learned vectors included; prefix, suffix and tags not."""
        if self.aspect == "anyres":
            side = math.isqrt(self.tokens_per_tile)
            return self.tokens_per_tile + max(high * side // self.tile * (wide * side // self.tile + 1) for high, wide in self.pinpoints)
        inline = {"all": self.most_tiles, "thumbnail": 1, "none": 0}[self.inline]
        return inline * self.tokens_per_tile + (2 if self.start_end else 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of packed rows. Every length is final: the model neither counts nor syncs.

    Example with s = 8 and two samples in one row, `9 9` their answers and `i` an image of two features:
        tokens    5 i i 9 | 6 9 9 | 0        (i = IMAGE; padding is 0)
        segments  1 1 1 1 | 2 2 2 | 0
        positions 0 1 2 3 | 0 1 2 | 0
        labels    . . 9 . | 9 9 . | .        (already shifted: the label at t is the token after t)
        slots     [[1, 2]]                   cu_seqlens [0, 4, 7, 8]
    """

    tokens: Int64[Tensor, "b s"]
    """Ids; `IMAGE` at features, `VECTORS - v` at learned vector v, 0 at padding."""
    labels: Int64[Tensor, "b s"]
    """The token that follows in the same segment where it carries loss, else `IGNORE`."""
    positions: Int64[Tensor, "b s"]
    """Position within the segment, from 0."""
    segments: Int64[Tensor, "b s"]
    """Segment number from 1 in each row; 0 is padding, whose attention output is 0."""
    cu_seqlens: Int32[Tensor, " d1"]
    """Document bounds in the flattened b*s (padding runs are documents too), padded with b*s to a fixed length."""
    max_len: int
    """An upper bound on the length of a document."""
    labelled: Int64[Tensor, " l"]
    """Flat positions that carry a label, padded with -1 to a multiple of the head's chunk."""
    groups: Int64[Tensor, "b s"]
    """Number of the kind (or source) of each token's sample, an index into `group_names`."""
    group_names: tuple[str, ...]
    tiles: UInt8[Tensor, "n c h w"]
    """Pixels; normalised on the device. n may be 0."""
    inline: Int64[Tensor, " m"]
    """Rows of `tiles` whose features stand in the sequence."""
    slots: Int64[Tensor, "m p"]
    """Flat position of each inline feature; -1 is a feature that is not placed."""
    memory: Int64[Tensor, " k"]
    """Rows of `tiles` that are cross-attention memory; empty while every image is inline."""
    memory_tags: Int64[Tensor, "k g"]
    """Token ids of each memory tile's tag, -1 pads and is no key; g is 0 where tags stand in the sequence."""
    memory_tokens: Int64[Tensor, " y"]
    """The keys: flat positions in k * (tag, features) of a memory tile, pads left out; g counts only where tags are keys of their own."""
    memory_positions: Int64[Tensor, " y"]
    """Position of each key within its image's memory, for rotary positions."""
    sees: Int64[Tensor, "b s 2"]
    """Half-open range of memory tiles (rows of `memory`) that a token may attend to."""
    runs: Int64[Tensor, "r 4"]
    """`sees` compressed: (query start, query end, key start, key end) over the flattened b*s and `memory_tokens`; empty ranges left out."""
    run_sizes: tuple[int, int, int, int]
    """Of the runs: queries, keys (counted per run), longest of queries, longest of keys. Numbers of the CPU, so that no device waits."""
    any_tiles: bool
    """Does any rank's micro-batch of this number hold a tile? If none does, every rank skips the encoder."""
    keys: tuple[tuple[str, str], ...] = ()
    """(source, id) of each segment, row by row, for replay and reports."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`; the copy does not wait."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, from which a copy to a GPU can overlap compute."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self) if isinstance(getattr(self, f.name), Tensor)})

    @property
    def label_count(self) -> int:
        """Tokens that carry loss."""
        return int((self.labelled >= 0).sum())

    @property
    def useful_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments > 0).sum())
