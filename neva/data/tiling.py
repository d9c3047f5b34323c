"""Into which tiles an image of a size is cut, what each is called, and where an any-resolution image's features stand: no pixel is read.

Shapes: n tiles, p features of a tile.
"""

import math
from dataclasses import dataclass
from functools import cache, partial

import torch
from jaxtyping import Int64
from torch import Tensor

from neva.batch import ImageLayout, Thumbnail

FEWER = (12, 8, 6, 4, 2, 1)
"""Most tiles of an over-long sample's images, step by step (Megatron-LM's `num_tiles_degradation_map`)."""


@dataclass(frozen=True)
class Tiling:
    """A grid of tiles, row by row, and where the thumbnail stands, `none` if there is none."""

    columns: int = 1
    rows: int = 1
    thumbnail: Thumbnail = "none"

    @property
    def tiles(self) -> int:
        """Tiles, the thumbnail counted."""
        return self.columns * self.rows + (self.thumbnail != "none")

    @property
    def whole(self) -> int:
        """Number of the tile that shows the whole image: the thumbnail, or the only one."""
        return self.tiles - 1 if self.thumbnail == "last" else 0

    def places(self) -> list[tuple[int, int] | None]:
        """(column, row) of each tile in order; None is the one that shows the whole image."""
        grid: list[tuple[int, int] | None] = [(n % self.columns, n // self.columns) for n in range(self.columns * self.rows)]
        if self.thumbnail == "none":
            return grid if len(grid) > 1 else [None]
        return [None, *grid] if self.thumbnail == "first" else [*grid, None]


def tile_grid(width: int, height: int, *, max_tiles: int, min_tiles: int = 1, tile: int = 448) -> tuple[int, int]:
    """(columns, rows) of the grid of at most `max_tiles` tiles whose shape is nearest to the image's: InternVL's `dynamic_preprocess`.

    Of grids of one shape the largest wins whose area the image fills by more than half; ties of other shapes go the same way.
    tile_grid(1000, 500, max_tiles=6) == (2, 1); tile_grid(1200, 1200, max_tiles=6) == (2, 2). ValueError for a side of 0.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has nothing to show: leave the sample out")
    shape, best, chosen = width / height, math.inf, (1, 1)
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(shape - columns / rows)
        if distance < best or (distance == best and width * height > 0.5 * tile**2 * columns * rows):
            best, chosen = distance, (columns, rows)
    return chosen


@cache
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    if not 1 <= least <= most:
        raise ValueError(f"min_tiles={least} and max_tiles={most}: need 1 <= min_tiles <= max_tiles")
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1) if i * j >= least]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def tiling(size: tuple[int, int], layout: ImageLayout, *, max_tiles: int = 0) -> Tiling:
    """The tiles of an image of this (width, height); `max_tiles`, if given, is a stricter limit than the layout's."""
    width, height = size
    if layout.aspect == "tiles" and not layout.process:
        most = max(1, min(max_tiles or layout.max_tiles, layout.max_tiles))
        columns, rows = tile_grid(width, height, max_tiles=most, min_tiles=min(layout.min_tiles, most), tile=layout.tile)
        return Tiling(columns, rows, layout.thumbnail if columns * rows > 1 else "none")
    if layout.aspect == "anyres" and not layout.process:
        high, wide = best_pinpoint(size, layout.pinpoints)
        return Tiling(wide // layout.tile, high // layout.tile, "first")
    return Tiling()


def tags(found: Tiling, layout: ImageLayout) -> list[str]:
    """What is written before each tile; empty texts for `tags=none`.

    1d: <tile_1> <tile_2> ... ; grid: <tile_x0_y0> <tile_x1_y0> ... ; bbox: <box> (0, 0), (500, 333) </box> ...; the whole image: `thumbnail_tag`.
    """
    texts = []
    for place in found.places():
        if layout.tags == "none":
            texts.append("")
        elif place is None:
            texts.append(layout.thumbnail_tag)
        elif layout.tags == "1d":
            texts.append(f"<tile_{place[1] * found.columns + place[0] + 1}>")
        elif layout.tags == "grid":
            texts.append(f"<tile_x{place[0]}_y{place[1]}>")
        else:
            across, down = ([round(layout.box_scale * n / parts) for n in range(parts + 1)] for parts in (found.columns, found.rows))
            (x, y) = place
            texts.append(f"<box> ({across[x]}, {down[y]}), ({across[x + 1]}, {down[y + 1]}) </box>")
    return texts


def all_tags(layout: ImageLayout) -> list[str]:
    """The tags of an image of the most tiles that the layout allows."""
    return tags(Tiling(layout.max_tiles, 1, layout.thumbnail if layout.max_tiles > 1 else "none"), layout)


# LLaVA-NeXT's any-resolution images.


def best_pinpoint(size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The (height, width) that keeps most of the image's pixels, and of equals the one that wastes least. ValueError for a side of 0."""
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has nothing to show: leave the sample out")
    return max(pinpoints, key=partial(_kept_and_wasted, size))


def _kept_and_wasted(size: tuple[int, int], pinpoint: tuple[int, int]) -> tuple[int, int]:
    """Pixels that are kept of the image within the pinpoint, and minus those that say nothing."""
    width, height = size
    high, wide = pinpoint
    scale = min(wide / width, high / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - wide * high


def fitted(size: tuple[int, int], pinpoint: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the image within its pinpoint, in proportion; the rest is padding.

    The quotient is rounded before the product, as LLaVA's `resize_and_pad_image` and transformers'
    `get_patch_output_size` do: for one size in 2,000 the other order gives another pixel.
    """
    width, height = size
    high, wide = pinpoint
    across, down = wide / width, high / height
    if across < down:
        return wide, min(math.ceil(height * across), high)
    return min(math.ceil(width * down), wide), high


def unpadded(size: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """(left, top): how many columns and rows of a grid of features lie in the padding, on either side."""
    width, height = size
    if width / height > columns / rows:
        return 0, (rows - int(round(height * (columns / width), 7))) // 2
    return (columns - int(round(width * (rows / height), 7))) // 2, 0


def anyres_slots(size: tuple[int, int], found: Tiling, layout: ImageLayout) -> tuple[Int64[Tensor, "n p"], list[bool]]:
    """Where the features of an any-resolution image stand among its tokens (-1: in the padding), and which tokens are features.

    First the whole image's, then the grid's row by row without what lies in the padding, each row with a newline behind it.
    """
    side = math.isqrt(layout.tokens_per_tile)
    columns, rows = side * found.columns, side * found.rows
    left, top = unpadded(size, columns, rows)
    wide, high = columns - 2 * left, rows - 2 * top
    grid = torch.full((rows, columns), -1, dtype=torch.int64)
    first = layout.tokens_per_tile
    grid[top : top + high, left : left + wide] = first + torch.arange(high)[:, None] * (wide + 1) + torch.arange(wide)
    cut = grid.view(found.rows, side, found.columns, side).transpose(1, 2).reshape(-1, first)
    return torch.cat((torch.arange(first)[None], cut)), [True] * first + ([True] * wide + [False]) * high
