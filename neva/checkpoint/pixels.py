"""The gate's third part: a folder's image processor, asked through transformers, has our pixels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from neva.checkpoint.hf import around, image_settings
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.parity import loading, silence
from neva.checkpoint.source import Source
from neva.data.image import to_tiles
from neva.models.vit import VisionConfig, normalise
from neva.models.vlm import VLMConfig

TOLERANCE = 1e-5
"""Largest difference of normalised pixels: both round differently."""
WIDE, HIGH, SQUARE = (61, 33), (30, 71), (45, 45)
"""Sizes (width, height) of the pictures: padding and cropping show on those that are no squares."""


def compare_images(sources: Sequence[Source]) -> list[str]:
    """A line for each source that has an image processor of transformers'.

    CheckpointError where its pixels are not those that the settings read from it make.
    """
    return [_compare(source) for source in sources if _has_processor(source)]


def _has_processor(source: Source) -> bool:
    if source.kind != "vision" and source.format not in ("llava", "llava_next"):
        return False
    return image_settings(source.folder)[0] is not None


def _compare(source: Source) -> str:
    import transformers

    with silence():
        try:
            read = transformers.AutoImageProcessor.from_pretrained
            theirs: Any = read(source.folder, backend="pil", trust_remote_code=False)
        except Exception as error:  # a class that this version does not have, or code beside it
            reason = str(error).splitlines()[0][:100]
            return f"Pixels: NOT COMPARED, transformers cannot read the processor ({reason})"
    model = _as_read(source)
    assert model.vision is not None
    said, _ = image_settings(source.folder)
    alike = said is not None and said.aspect == model.image.aspect
    apart = 0.0
    for size in (WIDE, HIGH, SQUARE) if alike else (SQUARE,):
        picture = _picture(size)
        with loading(source.folder):
            given = torch.as_tensor(theirs(picture, return_tensors="pt")["pixel_values"])
        given = given.reshape(-1, *given.shape[-3:])
        ours = normalise(to_tiles(picture, model.layout), model.vision.mean, model.vision.std)
        if not alike:  # a processor that gives one view of a square, the first of the views here
            ours = ours[:1]
        if ours.shape != given.shape:
            raise CheckpointError(
                f"{source.folder}: of a picture of {size} transformers' image processor makes "
                f"pixels of the shape {list(given.shape)}, neva {list(ours.shape)} by its settings."
            )
        apart = max(apart, float((ours - given).abs().max()))
    if not apart <= TOLERANCE:
        raise CheckpointError(
            f"{source.folder}: transformers' image processor gives pixels that differ by "
            f"{apart:.2e} from those that the model would be fed: aspect={model.image.aspect}, "
            f"resample={model.image.resample} is what neva reads in it."
        )
    return f"Pixels: as transformers' {type(theirs).__name__} makes them, apart by {apart:.1e}"


def _as_read(source: Source) -> VLMConfig:
    """A model with the source's own encoder and image settings, at the size of its processor."""
    if isinstance(source.model, VLMConfig):
        model = source.model
    else:
        assert isinstance(source.model, VisionConfig) and source.image is not None
        model = replace(around(source.model), image=source.image)
    if not source.side or model.vision is None:
        return model
    return replace(model, vision=replace(model.vision, image=source.side))


def _picture(size: tuple[int, int]) -> Image.Image:
    """Noise, on which every filter differs."""
    generator = torch.Generator().manual_seed(sum(size))
    shape = (size[1], size[0], 3)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
