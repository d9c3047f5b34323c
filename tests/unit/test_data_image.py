"""Every image mode, every kind of damage, and tiles equal to transformers' CLIP processor bit for bit."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neva.batch import ImageLayout
from neva.data import image as module
from neva.data.image import image_size, open_image, to_tiles

CASES = Path(__file__).parents[1] / "data" / "cases"
ORIENTATION = 0x0112


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixel(image: Image.Image) -> tuple[int, int, int]:
    return open_image(saved(image, "PNG")).getpixel((0, 0))


def test_modes_become_rgb() -> None:
    assert pixel(Image.new("RGB", (2, 2), (1, 2, 3))) == (1, 2, 3)
    assert pixel(Image.new("L", (2, 2), 9)) == (9, 9, 9)
    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert open_image(saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)


def test_transparency_is_laid_over_white() -> None:
    assert pixel(Image.new("RGBA", (2, 2), (10, 20, 30, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (2, 2), (10, 20, 30, 255))) == (10, 20, 30)
    assert pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 128))) == (127, 127, 127)
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert pixel(palette) == (200, 0, 0)
    assert open_image(saved(palette, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(saved(palette, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(saved(Image.new("RGB", (2, 2), (7, 8, 9)), "PNG", transparency=(7, 8, 9))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("deep", "grey"), [(0, 0), (257, 1), (32768, 128), (65535, 255)])
def test_deep_greys_are_scaled(deep: int, grey: int) -> None:
    for image in (Image.fromarray(np.full((2, 2), deep, np.uint16)), Image.fromarray(np.full((2, 2), deep, np.int32))):
        assert open_image(image).getpixel((0, 0)) == (grey,) * 3
        assert open_image(saved(image, "TIFF")).getpixel((0, 0)) == (grey,) * 3
    assert open_image(saved(Image.fromarray(np.full((2, 2), deep, np.uint16)), "PNG")).getpixel((0, 0)) == (grey,) * 3


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        open_image(Image.new("F", (2, 2)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(format: str, orientation: int) -> None:
    """The size of the header is that of the decoded image, which stands as Pillow's own exif_transpose turns it."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = saved(Image.fromarray(noise(20, 12)), format, exif=exif)
    image = open_image(data)
    with Image.open(io.BytesIO(data)) as raw:
        expected = ImageOps.exif_transpose(raw).convert("RGB")
    assert image.size == image_size(data) == expected.size == ((12, 20) if orientation >= 5 else (20, 12))
    assert image.tobytes() == expected.tobytes()


def turned_by_pillow(data: bytes) -> Image.Image:
    """By Pillow's own exif_transpose; as it lies where that fails."""
    from PIL import ImageOps

    with Image.open(io.BytesIO(data)) as raw:
        try:
            return ImageOps.exif_transpose(raw).convert("RGB")
        except Exception:
            return raw.convert("RGB")


def orientation_entry(kind: int, count: int, value: bytes) -> bytes:
    """EXIF data whose only tag is an orientation of this TIFF type."""
    entry = struct.pack(">HHI", ORIENTATION, kind, count) + value[:4].ljust(4, b"\0")
    more = value if len(value) > 4 else b""
    if more:
        entry = entry[:8] + struct.pack(">I", 8 + 2 + 12 + 4)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + b"\0\0\0\0" + more


ODD = {
    "short 0": orientation_entry(3, 1, b"\0\0"),
    "short 9": orientation_entry(3, 1, b"\0\x09"),
    "short 65535": orientation_entry(3, 1, b"\xff\xff"),
    "no short": orientation_entry(3, 0, b""),
    "two shorts": orientation_entry(3, 2, b"\0\6\0\6"),
    "five shorts": orientation_entry(3, 5, b"\0\6" * 5),
    "byte 6": orientation_entry(1, 1, b"\6"),
    "text": orientation_entry(2, 2, b"6\0"),
    "long 6": orientation_entry(4, 1, b"\0\0\0\6"),
    "long": orientation_entry(4, 1, b"\xff\xff\xff\xff"),
    "signed": orientation_entry(9, 1, b"\xff\xff\xff\xfa"),
    "undefined": orientation_entry(7, 1, b"\6"),
    "ratio 6/1": orientation_entry(5, 1, struct.pack(">II", 6, 1)),
    "ratio 13/2": orientation_entry(5, 1, struct.pack(">II", 13, 2)),
    "ratio 6/0": orientation_entry(5, 1, struct.pack(">II", 6, 0)),
    "float": orientation_entry(11, 1, struct.pack(">f", 6.5)),
    "nan": orientation_entry(11, 1, struct.pack(">f", float("nan"))),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("odd", ODD)
def test_an_orientation_is_what_pillow_takes_it_for(format: str, odd: str) -> None:
    """As its exif_transpose: what is not one of 2 to 8 turns nothing, in the header's size as in
    the pixels."""
    data = saved(Image.fromarray(noise(20, 12)), format, exif=ODD[odd])
    expected = turned_by_pillow(data)
    assert open_image(data).tobytes() == expected.tobytes()
    assert image_size(data) == open_image(data).size == expected.size


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_odd_orientation_of_a_tiff_turns_nothing(orientation: int) -> None:
    data = saved(Image.fromarray(noise(20, 12)), "TIFF", tiffinfo={ORIENTATION: orientation})
    assert open_image(data).tobytes() == noise(20, 12).tobytes()
    assert image_size(data) == (20, 12)


@pytest.mark.parametrize("garbage", [b"", b"Exif\0\0", b"MM\0*\0\0", b"II*\0\xff\xff\xff\xff", b"six"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_data_that_cannot_be_read_turn_nothing(format: str, garbage: bytes) -> None:
    data = saved(Image.fromarray(noise(20, 12)), format, exif=garbage)
    with Image.open(io.BytesIO(data)) as raw:
        assert open_image(data).tobytes() == raw.convert("RGB").tobytes()
    assert image_size(data) == (20, 12)


@pytest.mark.parametrize("name", ["photo.jpg", "xmp.jpg", "g.png", "good.png"])
def test_the_cases_of_odd_orientations(name: str) -> None:
    path = CASES / "exif-orientation" / "images" / name
    expected = turned_by_pillow(path.read_bytes())
    assert open_image(path).tobytes() == expected.tobytes()
    assert image_size(path) == expected.size


def with_chunks(png: bytes, chunk: bytes, *, last: bool) -> bytes:
    """A PNG with a chunk before its pixels, or behind them."""
    place = png.index(b"IEND") - 4 if last else png.index(b"IDAT") - 4
    return png[:place] + chunk + png[place:]


def chunk(kind: bytes, content: bytes) -> bytes:
    size = struct.pack(">I", len(content))
    return size + kind + content + struct.pack(">I", zlib.crc32(kind + content))


LARGE = zlib.compress(b"a" * (3 << 20))
CHUNKS = {
    "zTXt": chunk(b"zTXt", b"k\0\0" + LARGE),
    "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + LARGE),
    "iCCP": chunk(b"iCCP", b"k\0\0" + LARGE),
    "many": chunk(b"tEXt", b"k\0" + b"a" * (1 << 20)) * 70,
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", CHUNKS)
def test_large_chunks_that_hold_no_pixel_are_skipped(tmp_path: Path, kind: str, last: bool) -> None:
    image = Image.fromarray(noise(20, 12))
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path.write_bytes(with_chunks(saved(image, "PNG", exif=exif), CHUNKS[kind], last=last))
    assert image_size(path) == (12, 20)
    assert open_image(path).tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert open_image(path.read_bytes()).size == (12, 20)


def test_the_case_of_a_screenshot_with_a_large_text() -> None:
    path = CASES / "png-text-chunk" / "images" / "shot.png"
    with pytest.raises(ValueError), Image.open(path) as raw:
        raw.load()
    assert open_image(path).size == image_size(path)


def test_a_damaged_image_with_a_large_text_is_still_damaged(tmp_path: Path) -> None:
    png = with_chunks(saved(Image.fromarray(noise(20, 12)), "PNG"), CHUNKS["zTXt"], last=False)
    (tmp_path / "a.png").write_bytes(png[: len(png) - 200])
    with pytest.raises(ValueError, match="a.png cannot be read .*replace it or leave the sample out"):
        open_image(tmp_path / "a.png")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
KINDS = {
    "HEIC": (HEIC, "is a HEIC image, of none of the formats .*save it as JPEG or PNG"),
    "HEIF": (HEIC.replace(b"ftypheic", b"ftypmif1"), "is a HEIC image"),
    "SVG": (b'<?xml version="1.0"?>\n<!-- x -->\n<svg width="4"/>', "is an SVG drawing.*as PNG"),
    "bare SVG": (b"\xef\xbb\xbf <svg/>", "is an SVG drawing"),
    "PDF": (b"%PDF-1.7\n", "is a PDF document.*pdftoppm"),
    "page": (b"<!DOCTYPE html><title>404</title>", "is a web page, perhaps that of a failed download"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS.*git lfs pull"),
    "video": (b"\0\0\0\x20ftypisom", "is a video"),
    "JPEG XL": (b"\xff\x0a\0", "is a JPEG XL image"),
    "Photoshop": (b"8BPS\0\1", "is a Photoshop document"),
    "XML": (b"<?xml?><kml/>", "cannot be read: it is damaged, or of none"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_image_is_named(tmp_path: Path, kind: str) -> None:
    content, message = KINDS[kind]
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=f"the image {path} {message}.*leave the sample out"):
            read(path)
        with pytest.raises(ValueError, match=f"the image {message}"):
            read(content)


def test_every_error_has_the_path_and_a_way_out(tmp_path: Path) -> None:
    """Whatever Pillow raises, for files damaged at every place of their header."""
    path = tmp_path / "a.bin"
    for format in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        whole = saved(Image.fromarray(noise(24, 24)), format)
        for place in range(0, min(len(whole), 400), 7):
            path.write_bytes(whole[:place] + b"\xff\xff\xff" + whole[place + 3 : place + 500])
            for read in (open_image, image_size):
                try:
                    read(path)
                except ValueError as error:
                    told = str(error)
                    assert told.startswith(f"the image {path} ")
                    assert "leave the sample out" in told or "save it with" in told


def test_a_picture_is_a_path_bytes_or_an_image(tmp_path: Path) -> None:
    image = Image.fromarray(noise(5, 3))
    path = tmp_path / "a.png"
    image.save(path)
    for picture in (path, path.read_bytes(), image):
        assert open_image(picture).tobytes() == image.tobytes() and image_size(picture) == (5, 3)


def bomb() -> bytes:
    """A PNG of 100 bytes that claims 12000 x 12000 pixels."""

    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_told(tmp_path: Path) -> None:
    jpeg = saved(Image.fromarray(noise(64, 64)), "JPEG")
    cases = {
        "missing": (tmp_path / "no.png", "is missing"),
        "folder": (tmp_path, "is no image but a folder"),
        "empty": (b"", r"is empty \(0 bytes\)"),
        "text": (b"hello, I am no image", "cannot be read"),
        "bomb": (bomb(), "over the limit"),
    }
    for picture, message in cases.values():
        for read in (open_image, image_size):
            with pytest.raises(ValueError, match=message):
                read(picture)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty.png is empty"):
        image_size(tmp_path / "empty.png")
    assert image_size(jpeg[:-900]) == (64, 64)  # the header is whole
    with pytest.raises(ValueError, match="truncated"):
        open_image(jpeg[:-900])


def test_a_far_larger_bomb_is_refused_by_pillow_with_the_same_kind_of_error() -> None:
    data = bytearray(bomb())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    with pytest.raises(ValueError, match="too large to decode"):
        image_size(bytes(data))


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_image_gives_a_value_error_or_pixels(seed: int) -> None:
    random = np.random.default_rng(seed)
    format = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")[seed % 6]
    data = bytearray(saved(Image.fromarray(noise(24, 24)), format))
    for place in random.integers(0, len(data), 8):
        data[place] = random.integers(256)
    try:
        assert open_image(bytes(data)).mode == "RGB"
    except ValueError as error:
        assert "image" in str(error)


SIZES = [(40, 40), (64, 48), (48, 64), (33, 100), (101, 32), (300, 31), (7, 5), (1, 1), (224, 224), (225, 224), (97, 51)]


def processor(tile: int) -> Callable[..., Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size, crop = {"shortest_edge": tile}, {"height": tile, "width": tile}
    return CLIPImageProcessorPil(size=size, crop_size=crop, do_rescale=False, do_normalize=False)


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_transformers(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    for tile in (32, 56):
        expected = processor(tile)(image, return_tensors="np")["pixel_values"]
        assert np.array_equal(to_tiles(image, ImageLayout(tile=tile, tokens_per_tile=1, aspect="crop")).numpy(), expected)


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_llava(size: tuple[int, int]) -> None:
    """LLaVA: the image in the middle of a square of colour int(255 * mean), offset (long - short) // 2, then CLIP's processor."""
    pixels = noise(*size)
    side, (width, height) = max(size), size
    colour = [int(255 * mean) for mean in (0.48145466, 0.4578275, 0.40821073)]
    square = np.broadcast_to(np.array(colour, np.uint8), (side, side, 3)).copy()
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    for tile in (32, 56):
        expected = processor(tile)(Image.fromarray(square), return_tensors="np")["pixel_values"]
        tiles = to_tiles(Image.fromarray(pixels), ImageLayout(tile=tile, tokens_per_tile=1))
        assert tiles.dtype == torch.uint8 and np.array_equal(tiles.numpy(), expected)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_square_resizes_both_sides(resample: str) -> None:
    image = Image.fromarray(noise(50, 20))
    expected = np.asarray(image.resize((16, 16), getattr(Image.Resampling, resample.upper()))).transpose(2, 0, 1)
    assert np.array_equal(to_tiles(image, ImageLayout(tile=16, tokens_per_tile=1, aspect="square", resample=resample))[0].numpy(), expected)


def test_a_tile_is_a_copy_that_may_be_written() -> None:
    image = Image.fromarray(noise(16, 16))
    tiles = to_tiles(image, ImageLayout(tile=16, tokens_per_tile=1))
    tiles.zero_()
    assert tiles.permute(0, 2, 3, 1).is_contiguous() and np.array_equal(np.asarray(image), noise(16, 16))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("size", [(300, 131), (131, 300), (90, 2), (65, 64), (1, 40), (20, 11)])
def test_padding_row_by_row_is_padding_the_square(size: tuple[int, int], resample: Any) -> None:
    """Pixel by pixel what LLaVA's expand2square and Pillow's resize of the whole square give."""
    image = Image.fromarray(noise(*size))
    layout = ImageLayout(tile=47, tokens_per_tile=1, resample=resample)
    square = Image.new("RGB", (max(size), max(size)), layout.pad_colour)
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    wanted = np.asarray(square.resize((47, 47), getattr(Image.Resampling, resample.upper())))
    assert np.array_equal(to_tiles(image, layout)[0].permute(1, 2, 0).numpy(), wanted)


def test_padding_a_long_image_does_not_fill_the_memory() -> None:
    """Its square would have 1.06 GB."""
    code = """
import resource
from PIL import Image
from neva.batch import ImageLayout
from neva.data.image import to_tiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
to_tiles(Image.new("RGB", (18_800, 60)), ImageLayout(tile=336, tokens_per_tile=1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kib = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert kib < 200_000


def test_a_program_in_place_of_an_image_is_not_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pillow gives PostScript to Ghostscript, here one that leaves a file behind."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho ran > {tmp_path}/canary\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.eps").read_bytes())
    with Image.open(tmp_path / "a.png") as trusting, pytest.raises(OSError):
        trusting.load()
    assert (tmp_path / "canary").exists()
    (tmp_path / "canary").unlink()
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match="of none of the formats"):
            read(tmp_path / "a.png")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("aspect", "size"),
    [("pad", (20_000, 2)), ("pad", (18_800, 1)), ("pad", (1, 337)), ("crop", (3, 3_000_000))],
)
def test_elongated_images_do_not_fill_the_memory(aspect: str, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="too elongated"):
        to_tiles(Image.new("RGB", size), ImageLayout(tile=336, tokens_per_tile=1, aspect=aspect))


def test_the_limit_is_below_pillows_warning() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None and module.MAX_PIXELS <= Image.MAX_IMAGE_PIXELS


def mirrored(image: Image.Image, layout: ImageLayout) -> torch.Tensor:
    """A user's own preprocessing."""
    pixels = np.array(image.resize((layout.tile, layout.tile)))[:, ::-1].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def as_floats(image: Image.Image, layout: ImageLayout) -> torch.Tensor:
    return mirrored(image, layout) / 255


def too_small(image: Image.Image, layout: ImageLayout) -> torch.Tensor:
    return mirrored(image, layout)[:, :, 1:]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mirrored", None),
        ("as_floats", r"gave torch.float32 \[1, 3, 28, 28\], not a uint8 tensor"),
        ("too_small", r"gave torch.uint8 \[1, 3, 27, 28\]"),
        ("nothing", "names no function"),
        ("", "names no function"),
    ],
)
def test_a_function_of_the_users(name: str, said: str | None) -> None:
    """It takes the place of `aspect`, and what it gives is checked against the layout."""
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    layout = ImageLayout(tile=28, tokens_per_tile=4, process=f"{__name__}:{name}")
    if said is None:
        assert torch.equal(to_tiles(image, layout), mirrored(image, layout))
        return
    with pytest.raises(ValueError, match=said):
        to_tiles(image, layout)
