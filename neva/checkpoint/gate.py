"""Which models the parity gate compares: a checkpoint's tensors against the folders that they came from, or went to."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from neva.checkpoint import parity
from neva.checkpoint.hf import Source, is_left_behind, relative
from neva.checkpoint.parity import Difference, Peer
from neva.models import hf, hf_vlm
from neva.models.vit import VisionConfig
from neva.models.vlm import VLMConfig

Read = Callable[[str], Tensor]


def need_transformers() -> None:
    """ValueError where there is nothing to compare with: better before the weights are written than after."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("comparing with transformers needs it: pip install 'neva[hf]', or leave the comparison out with --no-parity")


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
        seen, original = _at_own_resolution(source, vision, read)
        if source.format in ("llava", "llava_next") and fits and model is not None:
            found += parity.llava(replace(model, vision=seen), original, source.folder, cast=cast)
            continue
        if source.kind != "vision" and model is not None:
            found += parity.decoder(model.decoder, read, peer(source, "decoder", cast), whole=fits)
        if seen is not None and (source.kind == "vision" or source.format in ("llava", "llava_next", "NVLM_D")):
            found += parity.vision(seen, original, peer(source, "vision", cast), whole=fits)
        if source.format == "NVLM_D" and model is not None:
            found.append(parity.nvlm_projector(model, read, source.shards.read, cast=cast))
    return found


def peer(source: Source, part: str, cast: torch.dtype | None = None) -> Peer:
    """The decoder or the encoder of a folder as transformers' model of that alone."""
    taken = set(source.spelled.values())
    if source.kind == part:
        kept = {**source.spelled, **{relative(name): name for name in source.shards.entries if name not in taken and not is_left_behind(name)}}
        config, folder = source.config, source.folder if source.format != "intern_vit_6b" else None
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
        config = {**source.config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    else:
        config = {"model_type": "llama", **source.config["text_config"]}
    return Peer(config=config, names=tuple(inside), read=lambda name: source.shards.read(inside[name]), cast=cast)


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
