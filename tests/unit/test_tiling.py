"""Dynamic high resolution: grids against a brute-force rule, pixels against Pillow and transformers, tags, any-resolution images."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import unpad_image

from neva.batch import IMAGE, NEWLINE, ImageLayout
from neva.data.image import open_image, to_tiles
from neva.data.sample import Sample, Turn
from neva.data.tiling import (
    Tiling,
    anyres_slots,
    best_pinpoint,
    fitted,
    tags,
    tile_grid,
    tiling,
    unpadded,
)
from tests import nvlm_reference as reference

LAYOUT = ImageLayout(tile=448, tokens_per_tile=256, aspect="tiles", max_tiles=6)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
NEXT = ImageLayout(tile=336, tokens_per_tile=576, aspect="anyres", pinpoints=PINPOINTS)
IMAGES = Path(__file__).parents[1] / "data" / "images"
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(("least", "most"), [(1, 6), (1, 12), (2, 6), (1, 1), (6, 6)])
def test_grids_equal_a_brute_force_rule(least: int, most: int) -> None:
    """10,000 random sizes in all, of many shapes, small and large; and transformers' own rule."""
    draw = random.Random(most)
    for number in range(2000):
        top = (40, 500, 2000, 6000)[number % 4]
        width, height = draw.randint(1, top), draw.randint(1, top)
        found = tile_grid(width, height, min_tiles=least, max_tiles=most, tile=448)
        assert found == reference.grid(width, height, min_tiles=least, max_tiles=most, tile=448)
        if least == 1:
            assert found == get_optimal_tiled_canvas((height, width), (448, 448), least, most)


@pytest.mark.parametrize(("size", "most", "grid"), [
    ((336, 224), 6, (3, 2)), ((10, 25), 6, (1, 3)), ((633, 633), 6, (1, 1)), ((634, 634), 6, (2, 2)), ((950, 950), 12, (2, 2)),
    ((951, 951), 12, (3, 3)), ((300, 120), 6, (2, 1)), ((1120, 448), 6, (3, 1)), ((1920, 1080), 6, (2, 1)), ((10000, 100), 6, (6, 1)),
    ((1000, 1001), 6, (2, 2)), ((1, 1), 6, (1, 1)), ((1, 5000), 6, (1, 6)), ((5000, 1), 12, (12, 1)),
])  # fmt: skip
def test_known_grids(size: tuple[int, int], most: int, grid: tuple[int, int]) -> None:
    assert tile_grid(*size, max_tiles=most) == grid


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_a_pixel(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="has nothing to show"):
        tile_grid(*size, max_tiles=6)
    with pytest.raises(ValueError, match="has nothing to show"):
        to_tiles(Image.new("RGB", size), LAYOUT)


def pictures() -> list[Image.Image]:
    """Real images of many shapes and modes; 60 more where the shared data lies
    beside the repository."""
    paths = [path for path in sorted(IMAGES.iterdir()) if path.suffix in (".png", ".jpg")]
    for name in ("vega_charts", "forms", "nlvr", "mathv", "emoji", "easyvqa"):
        found = sorted(path for path in (SHARED / name).rglob("*.*") if path.suffix in (".png", ".jpg", ".jpeg"))
        paths += found[:10]
    return [open_image(path) for path in paths]


def as_tiles(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def test_tiles_equal_pillows_bit_for_bit() -> None:
    shown = pictures()
    assert len(shown) >= 12 and len({image.size for image in shown}) >= 12
    for number, image in enumerate(shown):
        most = (6, 12)[number % 2]
        layout = ImageLayout(tile=112, tokens_per_tile=1, aspect="tiles", max_tiles=most)
        assert torch.equal(to_tiles(image, layout), as_tiles(reference.cut(image, min_tiles=1, max_tiles=most, tile=112)))
        theirs = tf.GotOcr2ImageProcessorPil(size={"height": 112, "width": 112}, crop_to_patches=True, min_patches=1, max_patches=most)
        pixels = theirs(image, do_normalize=False, do_rescale=False)["pixel_values"]
        assert np.array_equal(np.stack(pixels).astype(np.uint8), to_tiles(image, layout).numpy())


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_the_fast_resize_is_within_two_levels(resample: Literal["bicubic", "bilinear"]) -> None:
    """Bicubic ones but for some values at hard edges, of drawings above all."""
    exact = ImageLayout(tile=112, tokens_per_tile=1, aspect="tiles", max_tiles=6, resample=resample)
    for image in pictures():
        apart = (to_tiles(image, replace(exact, resize="fast")).int() - to_tiles(image, exact).int()).abs()
        assert apart.max() <= (20 if resample == "bicubic" else 2)
        assert (apart > 2).float().mean() < 0.005


def test_odd_images_tile() -> None:
    """Palettes, greys, transparency and strips a pixel wide become RGB first: a palette would be resized by nearest neighbour."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    for mode in ("P", "L", "1", "RGBA", "CMYK"):
        image = open_image(colours.convert(mode))
        assert torch.equal(to_tiles(image, LAYOUT), as_tiles(reference.cut(image, min_tiles=1, max_tiles=6, tile=448)))
    for size, count in (((1, 1000), 7), ((1000, 1), 7), ((1, 1), 1), ((10000, 100), 7)):
        assert to_tiles(Image.new("RGB", size), LAYOUT).shape == (count, 3, 448, 448)


def test_a_stricter_limit_and_the_thumbnails_place() -> None:
    image = Image.new("RGB", (1920, 900))
    assert tiling(image.size, LAYOUT) == Tiling(2, 1, "last")
    assert tiling(image.size, LAYOUT, max_tiles=1) == Tiling(1, 1, "none") and tiling(image.size, LAYOUT, max_tiles=99) == Tiling(2, 1, "last")
    first = ImageLayout(tile=4, tokens_per_tile=1, aspect="tiles", max_tiles=6, thumbnail="first")
    last, none = (ImageLayout(tile=4, tokens_per_tile=1, aspect="tiles", max_tiles=6, thumbnail=where) for where in ("last", "none"))  # type: ignore[arg-type]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    assert torch.equal(to_tiles(picture, first), to_tiles(picture, last).roll(1, 0)) and len(to_tiles(picture, none)) == 2


TAGS = {
    "none": [""] * 5,
    "1d": ["<tile_1>", "<tile_2>", "<tile_3>", "<tile_4>", "<tile_global_thumbnail>"],
    "grid": ["<tile_x0_y0>", "<tile_x1_y0>", "<tile_x0_y1>", "<tile_x1_y1>", "<tile_global_thumbnail>"],
    "bbox": [
        "<box> (0, 0), (500, 500) </box>", "<box> (500, 0), (1000, 500) </box>", "<box> (0, 500), (500, 1000) </box>",
        "<box> (500, 500), (1000, 1000) </box>", "<tile_global_thumbnail>",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", TAGS)
def test_tags(kind: str) -> None:
    layout = ImageLayout(tile=4, tokens_per_tile=1, aspect="tiles", max_tiles=6, tags=kind)  # type: ignore[arg-type]
    assert tags(Tiling(2, 2, "last"), layout) == TAGS[kind]
    assert tags(Tiling(), layout) == TAGS[kind][-1:]
    assert tags(Tiling(2, 2, "first"), layout) == [TAGS[kind][-1], *TAGS[kind][:-1]]


# LLaVA-NeXT


def next_processor() -> tf.LlavaNextImageProcessorPil:
    pinpoints = [list(pinpoint) for pinpoint in PINPOINTS]
    return tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=pinpoints, do_pad=True
    )  # fmt: skip


SIZES = [(336, 336), (640, 480), (480, 640), (1000, 300), (301, 999), (7, 1300), (1300, 9), (672, 672), (33, 34), (2000, 1999), (335, 671)]


@pytest.mark.parametrize("size", SIZES)
def test_any_resolution_tiles_equal_transformers(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = next_processor()(image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
    mine = to_tiles(image, NEXT).numpy()
    assert mine.shape == theirs[: len(mine)].shape and np.array_equal(mine, theirs[: len(mine)].astype(np.uint8))
    assert not theirs[len(mine) :].any()


@pytest.mark.parametrize("size", SIZES)
def test_any_resolution_features_equal_transformers(size: tuple[int, int]) -> None:
    """Where each feature of each tile lands is where transformers' `pack_image_features` puts it, and the processor counts as many tokens."""
    found = tiling(size, NEXT)
    slots, features = anyres_slots(size, found, NEXT)
    count = found.tiles
    numbers = torch.arange(count * 576, dtype=torch.float32).view(count, 576, 1)
    holder = tf.LlavaNextModel.__new__(tf.LlavaNextModel)
    torch.nn.Module.__init__(holder)
    config = tf.LlavaNextConfig(vision_config=tf.CLIPVisionConfig(image_size=336, patch_size=14), image_grid_pinpoints=[list(p) for p in PINPOINTS])
    object.__setattr__(holder, "config", config)
    packed, _ = holder.pack_image_features([numbers], [(size[1], size[0])], "default", image_newline=torch.tensor([-5.0]))
    mine = torch.full((len(features),), -5.0)
    flat, place = numbers.flatten(), slots.flatten()
    mine[place[place >= 0]] = flat[place >= 0]
    assert torch.equal(mine, packed[0][:, 0])
    assert [value != -5 for value in mine.tolist()] == features
    processor = tf.LlavaNextProcessor.__new__(tf.LlavaNextProcessor)  # which wants a tokenizer, of no use here
    processor.image_processor, processor.patch_size = next_processor(), 14
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = 1, "default"
    assert processor._get_number_of_features(size[1], size[0], 336, 336) - 1 == len(features)  # it counts the class token, and takes it off later


def test_any_resolution_geometry_equals_transformers() -> None:
    """The grid, the resized image and the cut of its padding, of 40,000 sizes, some tiny."""
    draw = random.Random(0)
    pinpoints = [list(pinpoint) for pinpoint in PINPOINTS]
    numbered = torch.arange(72 * 72).view(1, 72, 72)
    for number in range(40000):
        top = (60, 700, 2500, 9000)[number % 4]
        size = draw.randint(1, top), draw.randint(1, top)
        flipped = size[1], size[0]
        best = best_pinpoint(size, PINPOINTS)
        assert best == select_best_resolution(flipped, pinpoints)
        blank = np.broadcast_to(np.uint8(0), (*flipped, 3))
        high, wide = get_patch_output_size(blank, best, ChannelDimension.LAST)
        assert fitted(size, best) == (wide, high), size
        rows, columns = best[0] // 14, best[1] // 14
        left, top = unpadded(size, columns, rows)
        kept = unpad_image(numbered[:, :rows, :columns], flipped)
        assert torch.equal(numbered[:, top : rows - top, left : columns - left], kept), size


@pytest.mark.parametrize("size", [(155, 155), (38, 152), (300, 425), (121, 968), (209, 836)])
def test_any_resolution_pixels_where_the_order_of_rounding_counts(size: tuple[int, int]) -> None:
    """Sizes of which height * wide / width, rounded once, gives a pixel more or less."""
    width, height = size
    high, wide = best_pinpoint(size, PINPOINTS)
    once = (wide, min(math.ceil(height * wide / width), high))
    if wide / width >= high / height:
        once = (min(math.ceil(width * high / height), wide), high)
    assert fitted(size, (high, wide)) != once
    test_any_resolution_tiles_equal_transformers(size)
    test_any_resolution_features_equal_transformers(size)


def test_any_resolution_tokens() -> None:
    """In a sample: the whole image's features, then rows with a newline each; a tile's features that lie in the padding are not placed."""
    from neva.data.encode import Encoder
    from neva.data.tokenizer import load_tokenizer

    layout = ImageLayout(tile=4, tokens_per_tile=4, aspect="anyres", pinpoints=((4, 8), (8, 4)))
    encoder = Encoder(load_tokenizer(Path(__file__).parents[1] / "data" / "tiny.model"), "v1", "", layout)
    turns = (Turn(role="user", text="<image>\nwhat"), Turn(role="assistant", text="a"))
    encoded = encoder.encode(Sample(source="s", id="0", turns=turns, images=(Image.new("RGB", (12, 3)),)))
    shown = encoded.tokens[(encoded.tokens == IMAGE) | (encoded.tokens == NEWLINE)].tolist()
    assert shown == [IMAGE] * 4 + ([IMAGE] * 4 + [NEWLINE]) * 2
    assert encoded.slots.shape == (3, 4) and int((encoded.slots >= 0).sum()) == shown.count(IMAGE)
    assert torch.equal(encoded.slots[encoded.slots >= 0].sort().values, torch.nonzero(encoded.tokens == IMAGE)[:, 0])
