"""Pictures of what the model is given, for people."""

from PIL import Image, ImageDraw, ImageFont

from neva.batch import ImageLayout
from neva.data.image import to_tiles
from neva.data.tiling import tags, tiling

GAP, LINE = 6, 22
"""Pixels between tiles, and of the line that names a tile."""


def grid_picture(image: Image.Image, layout: ImageLayout) -> Image.Image:
    """The tiles of an RGB image as they are cut, row by row, each under its tag, the thumbnail in a row of its own."""
    found, side = tiling(image.size, layout), layout.tile
    tiles, names, places = to_tiles(image, layout), tags(found, layout), found.places()
    rows = found.rows + (found.thumbnail != "none")
    sheet = Image.new("RGB", (found.columns * (side + GAP) + GAP, rows * (side + LINE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for pixels, name, place in zip(tiles, names, places, strict=True):
        column, row = place if place is not None else (0, rows - 1)
        left, top = GAP + column * (side + GAP), GAP + row * (side + LINE + GAP)
        draw.text((left, top), name or "(no tag)", fill="black", font=font)
        sheet.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (left, top + LINE))
    return sheet
