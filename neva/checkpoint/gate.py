"""Which models the parity gate compares: a checkpoint's tensors against the folders that they came from, or went to."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neva.checkpoint import parity
from neva.checkpoint.hf import Source, is_left_behind, relative
from neva.checkpoint.manifest import CheckpointError, few
from neva.checkpoint.parity import Difference, Peer
from neva.models import hf, hf_vlm
from neva.models.vit import VisionConfig
from neva.models.vlm import VLMConfig

Read = Callable[[str], Tensor]
LLAVAS = ("llava", "llava_next")
"""Formats of transformers' own LLaVAs."""
PROJECTOR = re.compile(r"model\.mm_projector(?:\.(\d+))?\.(weight|bias)")
"""A tensor of a projector in LLaVA's own layout: the number of its layer, if there are several."""


def compare(
    sources: Sequence[Source], model: VLMConfig | None, vision: VisionConfig | None, read: Read, *, cast: torch.dtype | None = None
) -> list[Difference]:
    """Our tensors, from `read`, against transformers on each of the folders; in slices where two fp32 copies do not fit in memory.

    With `cast`, theirs are rounded to that dtype first, as ours were.
    """
    found: list[Difference] = []
    fits = parity.fits(sum(math.prod(entry.shape) for source in sources for entry in source.shards.entries.values()))
    for source in sources:
        if source.format in ("nemo", "nemo-neva"):
            continue
        if source.kind == "projector":
            found += _projector(source, read, cast)
            continue
        seen, original = _at_own_resolution(source, vision, read)
        if source.format in LLAVAS:
            _check_settings(source)
        if source.format in LLAVAS and model is not None:
            asked = _reads(seen) != _reads(source.model.vision)  # type: ignore[union-attr]
            whole = replace(model, vision=seen)
            found += parity.llava(
                whole,
                original,
                source.folder,
                whole=fits,
                asked=asked,
                cast=cast,
            )
            if fits:
                continue
        if source.kind != "vision" and model is not None:
            found += parity.decoder(model.decoder, read, peer(source, "decoder", cast), whole=fits)
        if seen is not None and (source.kind == "vision" or source.format in (*LLAVAS, "NVLM_D")):
            found += parity.vision(seen, original, peer(source, "vision", cast), whole=fits)
        if source.format == "llava-original" and model is not None:
            layers = _projector_layers(source)
            found.append(parity.llava_projector(model, read, layers, cast=cast))
        if source.format == "NVLM_D" and model is not None:
            found.append(parity.nvlm_projector(model, read, source.shards.read, cast=cast))
    return found


def _projector(source: Source, read: Read, cast: torch.dtype | None) -> list[Difference]:
    """A projector by itself: its tensors, of which transformers has no model."""
    found = []
    for default, name in source.spelled.items():
        ours = read(hf.ours_of(default, source.table))
        found.append(parity.one_tensor(name, ours, source.shards.read(name), cast=cast))
    return found


def peer(source: Source, part: str, cast: torch.dtype | None = None) -> Peer:
    """The decoder or the encoder of a folder as transformers' model of that alone."""
    taken = set(source.spelled.values())
    if source.kind == part:
        kept = {**source.spelled, **{relative(name): name for name in source.shards.entries if name not in taken and not is_left_behind(name)}}
        config = source.config
        own = all(file.parent == source.folder for file in source.shards.files)
        folder = source.folder if own and source.format != "intern_vit_6b" else None
        return Peer(config=config, names=tuple(kept), read=lambda name: source.shards.read(kept[name]), folder=folder, cast=cast)
    beginnings = ("vision.",) if part == "vision" else ("decoder.", "head.")
    before = "vision_model." if source.format == "NVLM_D" else ""
    named = {default: name for default, name in source.spelled.items() if hf.ours_of(default, source.table).startswith(beginnings)}
    inside = {relative(default).removeprefix(before): name for default, name in named.items()}
    if part == "vision":
        inside |= {relative(name): name for name in source.shards.entries if name not in taken and not is_left_behind(name)}
        config = {"model_type": "intern_vit_6b", **source.config["vision_config"]}
    elif source.format == "NVLM_D":
        config = hf_vlm.nvlm_text(source.config)
    elif source.format == "llava-original":
        config = hf_vlm.original_text(source.config)
    else:
        config = hf_vlm.llava_text(source.config)
    return Peer(config=config, names=tuple(inside), read=lambda name: source.shards.read(inside[name]), cast=cast)


def _reads(vision: VisionConfig | None) -> tuple[int, str] | None:
    """Which features of an encoder go to the projector."""
    return vision and (vision.select_layer, parity.strategy(vision))


def _check_settings(source: Source) -> None:
    """CheckpointError where transformers reads other settings in a LLaVA's config.json."""
    import transformers

    assert isinstance(source.model, VLMConfig) and source.model.vision is not None
    read = transformers.AutoConfig.from_pretrained
    with parity.loading(source.folder):
        theirs: Any = read(source.folder, trust_remote_code=False)
    layer = theirs.vision_feature_layer
    said = {
        "vision_feature_layer": layer if isinstance(layer, list) else [layer],
        "vision_feature_select_strategy": theirs.vision_feature_select_strategy,
    }
    ours: dict[str, Any] = {
        "vision_feature_layer": [source.model.vision.select_layer],
        "vision_feature_select_strategy": parity.strategy(source.model.vision),
    }
    if source.format == "llava_next":
        said["image_grid_pinpoints"] = [tuple(view) for view in theirs.image_grid_pinpoints]
        ours["image_grid_pinpoints"] = [*source.model.image.pinpoints]
    if wrong := [f"{name}={said[name]!r}" for name in said if said[name] != ours[name]]:
        named = f"{source.folder}/config.json"
        raise CheckpointError(f"{named}: transformers reads {few(wrong)} in it, neva another value")


def _projector_layers(source: Source) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each linear layer of a LLaVA's projector, in order of their numbers."""
    found: dict[int, dict[str, str]] = {}
    for name in source.shards.entries:
        if match := PROJECTOR.fullmatch(name):
            found.setdefault(int(match[1] or 0), {})[match[2]] = name
    read = source.shards.read
    return [(read(layer["weight"]), read(layer["bias"])) for _, layer in sorted(found.items())]


def _at_own_resolution(source: Source, vision: VisionConfig | None, read: Read) -> tuple[VisionConfig | None, Read]:
    """The encoder and `read` as they were before position embeddings were resized: transformers' side has those."""
    own = source.model if isinstance(source.model, VisionConfig) else source.model.vision if isinstance(source.model, VLMConfig) else None
    if vision is None or own is None or source.format == "llava-original" or own.image == vision.image:
        return vision, read

    def original(name: str) -> Tensor:
        made = hf.origin(name, source.table)
        if name != "vision.positions" or made is None:
            return read(name)
        return made.gather([source.shards.read(source.spelled[made.theirs[0]])]).to(read(name).dtype)

    return replace(vision, image=own.image), original
