"""Which vision encoder a NeMo config means: NeMo names it by a folder, a `.nemo` file or a name on the hub, and says only some of its sizes."""

import re
from dataclasses import replace
from pathlib import Path

from neva.checkpoint.hf import WHOLE, read_json
from neva.checkpoint.nemo import is_nemo, read_config
from neva.checkpoint.nemo_config import clip_config, section
from neva.models.hf_config import vision_config
from neva.models.presets import VISION
from neva.models.vit import VisionConfig

_SIGLIP = VISION["siglip-base-16-224"]
PUBLISHED: dict[str, VisionConfig] = {
    "clip-vit-base": VISION["clip-b-32"],
    "clip-vit-large": VISION["clip-l-14"],
    "siglip-base": _SIGLIP,
    "siglip-large": replace(_SIGLIP, width=1024, layers=24, heads=16, ffn=4096),
    "siglip-so400m": VISION["siglip-so400m-14-384"],
}
"""Start of a published name -> its encoder; the name goes on with the sizes of patches and images. NeMo knows no other family."""
NAME = re.compile(r"(clip-vit|siglip)2?-(base|large|so400m)-patch(\d+)(?:-(\d+))?(?:\.nemo)?/?$", re.IGNORECASE)


def encoder(path: str) -> VisionConfig | None:
    """The encoder that `from_pretrained` names: of the folder or file where it lies here, else by its published name, else None.

    ValueError for a folder or file that holds none.
    """
    place = Path(path)
    if is_nemo(place) and place.exists():
        return clip_config(section(read_config(place), "vision"))
    if (place / "config.json").is_file():
        config = read_json(place / "config.json")
        try:
            whole = {**section(config, "vision_config"), "model_type": WHOLE[config["model_type"]]} if config.get("model_type") in WHOLE else config
            return vision_config(whole)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place / 'config.json'} describes no vision encoder ({error})") from None
    match = NAME.search(path)
    known = PUBLISHED.get(f"{match[1]}-{match[2]}".lower()) if match else None
    return replace(known, patch=int(match[3]), image=int(match[4] or 224)) if match and known else None


def by_size(*, width: int, patch: int, image: int, class_token: bool) -> VisionConfig | None:
    """The published encoder of this width and patch, for images of this size, or None; of two alike, the one with or without class token."""
    known = (*PUBLISHED.values(), replace(PUBLISHED["clip-vit-base"], patch=16))
    found = [config for config in known if (config.width, config.patch) == (width, patch)]
    found = [config for config in found if config.class_token == class_token] if len(found) > 1 else found
    return replace(found[0], image=image) if found else None
