"""Which format of Hugging Face's holds a checkpoint, and what goes into its files: an export before anything is written."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from neva.batch import ImageLayout
from neva.checkpoint import hf as folders
from neva.checkpoint import index, store
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.shards import read_json
from neva.checkpoint.tokens import Tokens, imported_ends, prepare_tokens
from neva.data.encode import Encoder
from neva.data.sample import MARKER
from neva.data.template import starts
from neva.data.templates import find_template
from neva.data.tokenizer import load_tokenizer
from neva.models import hf, hf_config, hf_vlm
from neva.models.vit import VisionConfig
from neva.models.vlm import ImageConfig, VLMConfig, part_of

Part = Literal["all", "decoder", "vision", "projector"]
PEER = "vision.model."
"""How the names of an encoder begin that runs as transformers' own."""
SHARD = 5 * 10**9
"""Bytes of a shard, as transformers writes them."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""How config.json spells the weights' dtype: transformers writes the first since 4.56, and every version reads the second."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What an export is asked for."""

    part: Part = "all"
    keys: Literal["source", "vllm"] = "source"
    """Spelling of names: as the imported folder's, or as vLLM reads them."""
    dtype: Literal["keep", "fp32", "fp16", "bf16"] = "keep"
    shard: int = SHARD
    """Most bytes of a file, but for a tensor that is larger."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """What a checkpoint remembers of the folder that it was imported from."""

    config: Mapping[str, Any] | None = None
    """Its config.json."""
    odd_names: Mapping[str, str] = field(default_factory=dict)
    """Default spelling -> its own, where they differ."""
    unused: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of an encoder that the model does not compute, without what stands before their names in a LLaVA."""
    folder: Path | None = None

    def is_a(self, kind: str) -> bool:
        """Was it a folder of this kind (vlm, decoder, vision)?"""
        return self.folder is not None and self.folder.name == kind


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """An export before anything is written."""

    kind: str
    """vlm, decoder, vision or projector."""
    config: dict[str, Any]
    table: Mapping[str, str]
    names: tuple[str, ...]
    """Our tensors that go into it."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that are not ours to compute, under their default spelling."""
    odd_names: Mapping[str, str] = field(default_factory=dict)
    """Default spelling -> the one to write, where they differ."""
    grow: Mapping[str, int] = field(default_factory=dict)
    """Our tensor -> rows that it must have: the vocabulary grows by `<image>` and padding."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What stands beside the weights, but for config.json."""
    model: VLMConfig | None = None
    """What transformers must compute with it: the whole model, or its decoder alone."""
    vision: VisionConfig | None = None
    """The encoder in it."""
    encoder: Encoder | None = None
    """What makes its prompts; None where it has no tokenizer."""
    note: str = ""
    """What the format's users should know."""

    def spelled(self, name: str) -> str:
        """The name to write for a default spelling."""
        return self.odd_names.get(name, name)


def configs(
    folder: Path,
    described: Mapping[str, Any],
) -> tuple[VLMConfig | None, VisionConfig | None]:
    """The whole model's config, None for an encoder by itself, and the encoder's.

    CheckpointError where a checkpoint is neither, such as a projector.
    """
    held = store.model_of(folder, described)
    if isinstance(held, VLMConfig):
        return held, held.vision
    if isinstance(held, VisionConfig):
        return None, held
    raise CheckpointError(f"{folder} holds a projector alone, which came from such a folder: export a model that has it, with --part projector.")


def read_origin(folder: Path, *kinds: str) -> Origin:
    """What a checkpoint's `source/` holds of the first of these kinds (vlm, decoder, vision)."""
    for kind in kinds:
        own = folder / "source" / kind
        if own.is_dir():
            unused = load_file(own / folders.UNUSED) if (own / folders.UNUSED).is_file() else {}
            return Origin(config=read_json(own / "config.json"), odd_names=read_json(own / folders.KEYS), unused=unused, folder=own)
    return Origin()


def make_target(folder: Path, described: Mapping[str, Any], model: VLMConfig | None, vision: VisionConfig | None, options: ExportOptions) -> Target:
    """What to write. ValueError for a part that the checkpoint does not have, and for fields that the format cannot hold."""
    names = tuple(index.stored(folder / "weights"))
    part = options.part
    if part == "all":
        part = "vision" if model is None else "decoder" if vision is None else "all"
    if (
        (part in ("projector", "all") and (model is None or vision is None))
        or (part == "decoder" and model is None)
        or (part == "vision" and vision is None)
    ):
        raise ValueError(f"{folder} has no {part}; it holds {'an encoder' if model is None else 'a decoder'} alone")
    if part == "decoder":
        assert model is not None
        return _decoder(folder, described, model, names, options)
    if part == "vision":
        assert vision is not None
        return _vision(folder, vision, names, options, model.image if model is not None else ImageConfig(aspect="square"))
    assert model is not None
    if part == "projector":
        config = {"mm_projector_type": model.projector, "mm_hidden_size": model.feature_width, "hidden_size": model.decoder.width}
        own = tuple(name for name in names if part_of(name) == "projector")
        table = hf.one_spelling(hf.PROJECTOR_ALONE, numbered=True)
        return Target(kind="projector", config=config, table=table, names=own)
    return (_nvlm if model.image.aspect == "tiles" and model.inline == "all" else _llava)(folder, described, model, names, options)


def _decoder(folder: Path, described: Mapping[str, Any], model: VLMConfig, names: tuple[str, ...], options: ExportOptions) -> Target:
    origin = read_origin(folder, "decoder", "vlm")
    written = hf_config.decoder_json(model.decoder, _decoder_source(origin))
    own = tuple(name for name in names if part_of(name) in ("decoder", "head"))
    alone = origin.is_a("decoder")
    tokens, encoder = _text(folder, described, model, origin, images=False)
    return Target(
        kind="decoder", config=written,
        table=hf_config.DECODERS[written["model_type"]].table, names=own,
        odd_names=origin.odd_names if alone and options.keys == "source" else {}, files=tokens.files, encoder=encoder,
        model=VLMConfig(decoder=replace(model.decoder, cross_layers=()), vision=None, projector="none"),
    )  # fmt: skip


def _decoder_source(origin: Origin) -> Mapping[str, Any] | None:
    """The config.json that a decoder once had, inside a LLaVA's too; None if there was none that we write."""
    source = origin.config or {}
    if "text_config" in source:
        source = {"model_type": "llama", **_part_of(source, "text_config")}
    elif "llm_config" in source:
        source = hf_vlm.nvlm_text(source)
    elif "mm_vision_tower" in source:
        source = hf_vlm.original_text(source)
    return source if source.get("model_type") in hf_config.DECODERS else None


def _part_of(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The config.json of a part, from that of the whole, which alone may name the dtype."""
    return {**{key: config[key] for key in DTYPE_KEYS if key in config}, **config[part]}


def with_dtype(target: Target, weights: index.Tensors, options: ExportOptions) -> Target:
    """The target whose config.json names the dtype of the weights that are written, the widest of several, as the source spelled it."""
    if target.kind == "projector":
        return target
    kinds = {kept_dtype(weights.described[name].dtype, options) for name in target.names}
    dtype = str(reduce(torch.promote_types, kinds)).removeprefix("torch.")
    inside = {part: dict(target.config[part]) for part in ("text_config", "llm_config", "vision_config") if part in target.config}
    spelled = [key for key in DTYPE_KEYS if any(key in config for config in (target.config, *inside.values()))] or [DTYPE_KEYS[1]]
    parts = {part: {name: dtype if name in DTYPE_KEYS else value for name, value in config.items()} for part, config in inside.items()}
    return replace(target, config={**target.config, **parts, **dict.fromkeys(spelled, dtype)})


def _vision(folder: Path, vision: VisionConfig, names: tuple[str, ...], options: ExportOptions, image: ImageConfig) -> Target:
    origin = read_origin(folder, "vision", "vlm")
    config, extra = complete(vision, origin)
    written = _vision_json(config, origin, extra)
    family = hf_config.VISION.get(written["model_type"])
    return Target(
        kind="vision", config=written, table=family.table if family else hf.HF_VISION, extra=extra,
        names=tuple(name for name in names if name.startswith("vision.")),
        odd_names=origin.odd_names if origin.is_a("vision") and options.keys == "source" else {},
        files=_processor_files(vision, image, origin, vlm=False), vision=config,
    )  # fmt: skip


def _vision_json(config: VisionConfig, origin: Origin, extra: Mapping[str, Tensor]) -> dict[str, Any]:
    source = origin.config and (_part_of(origin.config, "vision_config") if "vision_config" in origin.config else origin.config)
    written = hf_config.vision_json(config, source if source and source.get("model_type") in hf_config.VISION else None)
    if written["model_type"] == "siglip_vision_model" and not any("head." in name for name in extra):
        written["vision_use_head"] = False
    return written


def complete(config: VisionConfig, origin: Origin) -> tuple[VisionConfig, dict[str, Tensor]]:
    """An encoder's config and the tensors to add so that transformers can build it whole.

    These are the layers and the norm behind the selected hidden state that the import kept. Where nothing was kept the encoder ends at the
    selected layer, and its final norm, which nothing reads, is one that changes nothing.
    """
    if config.backend == "hf":
        return config, {name: tensor for name, tensor in origin.unused.items() if name != "lm_head.weight"}
    described = (origin.config or {}).get("vision_config", origin.config or {})
    family = hf_config.VISION.get(described.get("model_type", ""))
    # Only the encoder's own: of a LLaVA there may be leftovers of its decoder, whose layers are counted from 0 too.
    kept = {name: tensor for name, tensor in origin.unused.items() if family and hf.ours_of(name, family.table)}
    spare = {int(match[1]) for name in kept if (match := re.search(r"layers?\.(\d+)\.", name))}
    if set(range(config.depth, config.layers)) - spare:
        config, kept = replace(config, layers=config.depth, select_layer=-1), {n: t for n, t in kept.items() if not re.search(r"layers?\.\d+\.", n)}
    normed = config.norm == "layernorm" and not config.layer_scale
    if normed and not any("post_layernorm" in name for name in kept):
        kept |= {"vision_model.post_layernorm.weight": torch.ones(config.width), "vision_model.post_layernorm.bias": torch.zeros(config.width)}
    return config, kept


def _llava(folder: Path, described: Mapping[str, Any], model: VLMConfig, names: tuple[str, ...], options: ExportOptions) -> Target:
    origin, seen = read_origin(folder, "vlm"), read_origin(folder, "vision", "vlm")
    source = origin.config if origin.config and origin.config.get("text_config") else None  # else the original repository's layout
    assert model.vision is not None
    vision, extra = complete(model.vision, seen)
    tokens, encoder = _text(folder, described, model, origin, images=True)
    vocab = model.decoder.vocab if tokens.size <= model.decoder.vocab else -(-tokens.size // 64) * 64
    matrices = ("decoder.embed.weight",) if model.decoder.tied else ("decoder.embed.weight", "head.weight")
    grow: dict[str, int] = {name: vocab for name in matrices if vocab > model.decoder.vocab}
    whole = replace(model, vision=vision, decoder=replace(model.decoder, vocab=vocab))
    written = hf_vlm.llava_json(whole, image_token=tokens.image_token, pad_token=tokens.pad_token, source=source)
    if source is None:
        text = hf_config.decoder_json(whole.decoder, _decoder_source(read_origin(folder, "decoder", "vlm")))
        written |= {"text_config": text, "vision_config": _vision_json(vision, seen, extra)}
    family = hf_config.VISION.get(written["vision_config"]["model_type"])
    table = hf.llava_table(hf_config.DECODERS[written["text_config"]["model_type"]].table, family.table if family else hf.HF_VISION)
    return Target(
        kind="vlm", config=written, table=table, names=names, grow=grow, model=whole, vision=vision,
        extra={f"vision_tower.{name}": tensor for name, tensor in extra.items()},
        odd_names=origin.odd_names if source and options.keys == "source" else {},
        files={**_processor_files(model.vision, model.image, origin if source else Origin(), vlm=True), **tokens.files}, encoder=encoder,
    )  # fmt: skip


JOINED = (
    "warning: the published code and vLLM tokenise tags with the text before them (image.tag_tokens=joined), this checkpoint by themselves: "
    "the ids before an image's first tile differ"
)


def _nvlm(folder: Path, described: Mapping[str, Any], model: VLMConfig, names: tuple[str, ...], options: ExportOptions) -> Target:
    """NVLM-D's layout, for vLLM and for NVIDIA's own code, which is not written here: copy it from nvidia/NVLM-D-72B."""
    origin = read_origin(folder, "vlm")
    source = origin.config if origin.config and origin.config.get("llm_config") else None
    written = hf_vlm.nvlm_json(model, source=source)
    table = hf.nvlm_table(hf_config.DECODERS[hf_vlm.nvlm_text(written)["model_type"]].table)
    tokens, encoder = _text(folder, described, model, origin, images=False)  # no class of transformers' makes its prompts with images
    return Target(
        kind="vlm", config=written, table=table, names=names, model=model, vision=model.vision, files=tokens.files, encoder=encoder,
        odd_names=origin.odd_names if source and options.keys == "source" else {}, note="" if model.image.tag_tokens == "joined" else JOINED,
    )  # fmt: skip


def _text(folder: Path, described: Mapping[str, Any], model: VLMConfig, origin: Origin, *, images: bool) -> tuple[Tokens, Encoder | None]:
    """Tokenizer, chat template and generation settings, and what makes prompts here. A decoder alone may go without; ValueError for a VLM."""
    where = store.tokenizer_folder(folder)
    if not where.is_dir():
        if not images:
            return Tokens(files={}, image_token=-1, pad_token=None, size=0), None
        raise ValueError(f"{folder} holds no tokenizer, which a LLaVA of transformers needs for <image>: import it with one beside its weights")
    layout = model.layout if images else ImageLayout(tile=1, tokens_per_tile=1, images=False)
    tokenizer = load_tokenizer(where)
    template = described.get("template") or ""
    own = find_template(template, tokenizer)
    if own.own and not images and model.vision is not None and not starts(own):
        # The whole model's prompts begin with the start token, which processors
        # put there by themselves.
        template = own.jinja
    encoder = Encoder(
        tokenizer=tokenizer,
        template=template,
        system=described.get("system"),
        layout=layout,
    )
    tokens = prepare_tokens(
        encoder,
        origin=origin.folder,
        length=model.decoder.reach,
        rows=model.decoder.vocab,
        ends=imported_ends(folder),
    )
    return tokens, encoder


def _processor_files(vision: VisionConfig, image: ImageConfig, origin: Origin, *, vlm: bool) -> dict[str, bytes]:
    """How images are brought to size: the source's files while they still say so, else ours."""
    names = ("preprocessor_config.json", "processor_config.json")
    if origin.folder is not None:
        found, pixels = folders.image_settings(origin.folder)
        same = found is not None and (not vlm or replace(image, prefix="", suffix="") == found)
        if same and all(getattr(vision, name) == value for name, value in pixels.items()):
            kept = {name: (origin.folder / name).read_bytes() for name in names if (origin.folder / name).is_file()}
            said = json.loads(kept.get("processor_config.json", b"{}"))
            if not vlm or all(said.get(name) == value for name, value in _feature_count(vision).items()):
                return kept
            whole = {"image_token": MARKER, **said, "processor_class": hf_vlm.processor_class(image.aspect), **_feature_count(vision)}
            return {**kept, "processor_config.json": json.dumps(whole, indent=2).encode() + b"\n"}
    written = {"preprocessor_config.json": hf_vlm.processor_json(image, vision)}
    if vlm:
        kind = hf_vlm.processor_class(image.aspect)
        written["preprocessor_config.json"]["processor_class"] = kind
        written["processor_config.json"] = {"processor_class": kind, "image_token": MARKER, **_feature_count(vision)}
    return {name: json.dumps(value, indent=2).encode() + b"\n" for name, value in written.items()}


def _feature_count(vision: VisionConfig) -> dict[str, Any]:
    """What transformers' LLaVA processor counts an image's features by."""
    strategy = "default" if vision.class_token and vision.feature == "patch" else "full"
    return {"patch_size": vision.patch, "num_additional_image_tokens": int(vision.class_token), "vision_feature_select_strategy": strategy}


def kept_dtype(stored: torch.dtype, options: ExportOptions) -> torch.dtype:
    return folders.DTYPES.get(options.dtype, stored)
