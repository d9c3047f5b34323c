"""Reads images of any mode as RGB, and cuts them to square uint8 tiles.

Shapes: n tiles of side p pixels.
"""

import importlib
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from neva.batch import ImageLayout
from neva.data.kinds import first_bytes, what_it_is, without_text
from neva.data.sample import Picture
from neva.data.tiling import best_pinpoint, fitted, tiling

MAX_PIXELS = 89_000_000
"""Largest image that is decoded: a small file can claim a size that fills the memory (Pillow warns from about here)."""
WHITE = (255, 255, 255)
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000",
    "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP",
)  # fmt: skip
"""What is decoded, by Pillow's names: formats of pixels alone. Others, such as EPS, are programs
that Pillow hands to another program to run."""
STRIP = 64
"""Rows of an image that are padded at a time."""
RESAMPLE = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos", "nearest")}
# The transposition that undoes each EXIF orientation; 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(picture: Picture) -> Image.Image:
    """The picture decoded, upright and in RGB; transparency is laid over white, deep greys are scaled to 8 bits.

    Raises ValueError with the path, the reason and what to do if it is missing, empty, truncated,
    no image, or too large.
    """
    return _read(picture, _decoded)


def image_size(picture: Picture) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header alone. Raises as `open_image`, except for damage after the header."""
    return _read(picture, _upright_size)


def _decoded(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)  # of a PNG it must be asked before: the header's answer counts, as in image_size
    image.load()
    if image.format == "TIFF":
        orientation = _orientation(image)  # Pillow turns a TIFF by itself, and then says that it is upright
    turn = UPRIGHT.get(orientation)
    rgb = _rgb(image)
    return rgb.transpose(turn) if turn is not None else rgb


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose `size` is already turned, or not, by Pillow's version
        width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return (height, width) if _orientation(image) >= 5 else (width, height)


def to_tiles(image: Image.Image, layout: ImageLayout, *, max_tiles: int = 0) -> UInt8[Tensor, "n 3 p p"]:
    """An RGB image as the layout's tiles; pixels are not normalised. `max_tiles`, if given, is a stricter limit than the layout's.

    `pad` is LLaVA's expand2square followed by CLIP's resize, `crop` is CLIP's resize of the short side and centre crop
    (equal bit for bit to transformers' CLIPImageProcessorPil), `square` resizes both sides; `tiles` is InternVL's grid, `anyres` LLaVA-NeXT's.
    `process`, a function of the user's, takes the place of all. Raises ValueError for an image without a pixel, for one so elongated that
    its padded or resized form would be too large, and for tiles of that function that do not fit the layout.
    """
    check_shape(image.size, layout)
    if layout.process:
        return _processed(image, layout)
    if layout.aspect in ("tiles", "anyres"):
        return _grid(image, layout, max_tiles)
    if layout.aspect == "pad":
        return _padded(image, layout)[None].permute(0, 3, 1, 2)
    if layout.aspect == "crop":
        image = _crop(image, layout)
    return _resized(image, (layout.tile, layout.tile), layout)[None].permute(0, 3, 1, 2)


def check_shape(size: tuple[int, int], layout: ImageLayout) -> None:
    """Raise ValueError for a (width, height) of which `to_tiles` makes no tiles."""
    width, height = size
    side = max(size)
    short = min(size)
    shown = f"an image of {width} x {height} pixels"
    if short < 1:
        raise ValueError(f"{shown} has nothing to show: leave the sample out")
    if layout.process:
        return
    if layout.aspect == "pad" and (side**2 > 4 * MAX_PIXELS or side > short * layout.tile):
        raise ValueError(f"{shown} is too elongated to pad to a square: make it smaller or cut it")
    if layout.aspect == "crop" and math.prod(_crop_sides(size, layout)) > MAX_PIXELS:
        raise ValueError(f"{shown} is too elongated to crop: cut it, or use aspect 'pad'")


def _grid(image: Image.Image, layout: ImageLayout, max_tiles: int) -> UInt8[Tensor, "n 3 p p"]:
    """The tiles of a grid, row by row, and the whole image before or after them. In memory colours stand together, as both resizers give them."""
    found, side = tiling(image.size, layout, max_tiles=max_tiles), layout.tile
    size = (side * found.columns, side * found.rows)
    if layout.aspect == "anyres":
        inner = fitted(image.size, best_pinpoint(image.size, layout.pinpoints))
        padded = Image.new("RGB", size)  # black, the image in its middle
        padded.paste(image.resize(inner, RESAMPLE[layout.resample]), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
        pixels = _pixels(padded)
    else:
        pixels = _resized(image, size, layout)
    tiles = torch.empty(found.tiles, side, side, 3, dtype=torch.uint8)
    first = int(found.thumbnail == "first")
    grid = tiles[first : first + found.columns * found.rows].view(found.rows, found.columns, side, side, 3)
    grid.copy_(pixels.view(found.rows, side, found.columns, side, 3).transpose(1, 2))
    if found.thumbnail != "none":
        tiles[found.whole] = _resized(image, (side, side), layout)
    return tiles.permute(0, 3, 1, 2)


def _pixels(image: Image.Image) -> UInt8[Tensor, "h w 3"]:
    return torch.from_numpy(np.array(image))


def _resized(image: Image.Image, size: tuple[int, int], layout: ImageLayout) -> UInt8[Tensor, "h w 3"]:
    """The image at another (width, height)."""
    if layout.resize == "exact" or image.size == size:
        return _pixels(image.resize(size, RESAMPLE[layout.resample]))  # to the same size it is a copy
    assert layout.resample in ("bicubic", "bilinear"), "VLMConfig checks it"
    given = _pixels(image)[None].permute(0, 3, 1, 2)  # torch is twice as fast where it sees that colours stand together
    # Pillow rounds and clips between its two passes, so their order shows; where only the height shrinks it begins with that.
    for high, wide in ((size[1], image.width), (size[1], size[0])) if size[0] >= image.width and size[1] < image.height else ((size[1], size[0]),):
        given = F.interpolate(given, size=(high, wide), mode=layout.resample, antialias=True, align_corners=False)
    return given[0].permute(1, 2, 0)


@cache
def _function(name: str) -> Callable[[Image.Image, ImageLayout], Tensor]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"image.process={name!r} names no function ({error}): write module:name, and put the module on PYTHONPATH") from None


def _processed(image: Image.Image, layout: ImageLayout) -> UInt8[Tensor, "n 3 p p"]:
    """The tile of the user's function, checked: a float or a wrong size would train on nonsense without a word."""
    tiles = _function(layout.process)(image, layout)
    wanted = f"a uint8 tensor [1, 3, {layout.tile}, {layout.tile}]"
    if not isinstance(tiles, Tensor):
        raise ValueError(f"image.process={layout.process!r} gave {type(tiles).__name__}, not {wanted}")
    if tiles.dtype != torch.uint8 or tuple(tiles.shape) != (1, 3, layout.tile, layout.tile):
        raise ValueError(f"image.process={layout.process!r} gave {tiles.dtype} {list(tiles.shape)}, not {wanted}; pixels are normalised later")
    return tiles


T = TypeVar("T")


class _Fault(ValueError):
    """What is wrong with a picture, in full."""


def _read(picture: Picture, read: Callable[[Image.Image], T]) -> T:
    """What `read` makes of the opened picture; whatever goes wrong is a ValueError with the
    picture's path and what to do."""
    called = _called(picture)
    try:
        return _tried(picture, called, read)
    except ValueError:
        bare = without_text(picture)
        if bare is None:
            raise
    return _tried(bare, called, read)


def _tried(picture: Picture, called: str, read: Callable[[Image.Image], T]) -> T:
    try:
        with _opened(picture, called) as image:
            _check_header(image, called)
            return read(image)
    except _Fault as fault:
        raise ValueError(str(fault)) from None
    except FileNotFoundError:
        raise ValueError(f"{called} is missing: check image_folder and the sample's image path") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{called} is too large to decode ({error}): make it smaller or leave the sample out") from None
    except UnidentifiedImageError:
        raise ValueError(_unidentified(picture, called)) from None
    except Exception as error:  # Pillow's decoders raise errors of a dozen types on damaged data
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{called} cannot be read ({reason}): it is damaged or no image; replace it or leave the sample out") from None


def _opened(picture: Picture, called: str) -> AbstractContextManager[Image.Image]:
    """The picture with its header read."""
    if isinstance(picture, Image.Image):
        return nullcontext(picture)
    empty = picture == b""
    if isinstance(picture, Path) and picture.exists():
        if not picture.is_file():
            what = "is no image but a folder, a pipe or a device"
            raise _Fault(f"{called} {what}: leave the sample out")
        empty = picture.stat().st_size == 0
    if empty:
        raise _Fault(f"{called} is empty (0 bytes): download it again or leave the sample out")
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    return Image.open(file, formats=_formats())


def _unidentified(picture: Picture, called: str) -> str:
    """What is said of a file that Pillow does not know."""
    known = f"of none of the formats {', '.join(_formats())}"
    found = what_it_is(first_bytes(picture))
    if found is not None:
        what, fix = found
        return f"{called} is {what}, {known}: {fix}, or leave the sample out"
    reason = f"it is damaged, or {known}"
    return f"{called} cannot be read: {reason}; replace it or leave the sample out"


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _called(picture: Picture) -> str:
    return f"the image {picture}" if isinstance(picture, Path) else "the image"


def _check_header(image: Image.Image, called: str) -> None:
    """Raise for an image that its size or its kind of pixels lets nobody decode."""
    if image.mode == "F":
        what = "has floating-point pixels, of no known range"
        raise _Fault(f"{called} {what}: save it with 8 or 16 bits per channel")
    if image.width * image.height > MAX_PIXELS:
        size = f"has {image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}"
        raise _Fault(f"{called} {size}: make it smaller or leave the sample out")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that the header tells; 1 (upright) if none, or one that means
    nothing."""
    try:
        if image.format == "PNG":  # getexif would decode the whole file to look for a chunk after the pixels
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        value = exif.get(ExifTags.Base.Orientation)
        return int(value) if value in UPRIGHT else 1  # of any type: a text or several are not in it
    except Exception:  # the data can be anything; Pillow raises a dozen types
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit greys; Pillow's own conversion cuts off everything above 255. 65535 / 257 = 255.
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        grey += 128
        grey //= 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")
    return image.convert("RGB")


def _padded(image: Image.Image, layout: ImageLayout) -> UInt8[Tensor, "p p 3"]:
    """LLaVA's expand2square, the image in the middle of a square of its long side, and the resize.

    Pillow resizes every row by itself before it resizes columns. So rows are padded and resized a
    few at a time, which gives the same pixels, and the square, which may be many times as large as
    the image, never lies in memory.
    """
    width, height = image.size
    side = max(image.size)
    tile = layout.tile
    left, top = (side - width) // 2, (side - height) // 2
    if width == height:
        return _resized(image, (tile, tile), layout)
    if layout.resize == "fast":
        square = Image.new("RGB", (side, side), layout.pad_colour)
        square.paste(image, (left, top))
        return _resized(square, (tile, tile), layout)
    narrow = Image.new("RGB", (tile, side), layout.pad_colour)
    for start in range(0, height, STRIP):
        rows = min(STRIP, height - start)
        padded = Image.new("RGB", (side, rows), layout.pad_colour)
        padded.paste(image.crop((0, start, width, start + rows)), (left, 0))
        narrow.paste(padded.resize((tile, rows), RESAMPLE[layout.resample]), (0, top + start))
    return _resized(narrow, (tile, tile), layout)


def _crop(image: Image.Image, layout: ImageLayout) -> Image.Image:
    """CLIP's: the short side resized, the long side in proportion (rounded down), then the
    centre."""
    tile = layout.tile
    short, long = _crop_sides(image.size, layout)
    size = (short, long) if image.width <= image.height else (long, short)
    image = image.resize(size, RESAMPLE[layout.resample])
    left, top = (image.width - tile) // 2, (image.height - tile) // 2
    return image.crop((left, top, left + tile, top + tile))


def _crop_sides(size: tuple[int, int], layout: ImageLayout) -> tuple[int, int]:
    """Short and long side before the centre, a tile, is cut out."""
    short = round(layout.tile / layout.crop_share)
    return short, int(short * max(size) / min(size))
