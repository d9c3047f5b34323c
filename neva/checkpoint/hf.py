"""Hugging Face folders -> neva checkpoints: streamed, resumable, all or nothing.

    DIR/neva.yaml      the model's config, the chat template, and where all came from
        tokenizer/     the tokenizer's files
        weights/       DCP, in the dtype of the source unless another is asked for
        source/        what export gives back: configs, spelling of names, tensors that the model does not compute
        manifest.json

While it is written it is `DIR.tmp`; an import of the same files goes on from what is there.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from neva import config as tree
from neva.checkpoint import stream
from neva.checkpoint.foreign import check_folder, is_projector, leads_outside
from neva.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    digests,
    few,
    listing,
    serialise,
)
from neva.checkpoint.peers import in_memory
from neva.checkpoint.projectors import read_projector
from neva.checkpoint.shards import Shards, converted, open_shards, read_json
from neva.checkpoint.source import (
    Source,
    about_encoder,
    as_tied,
    check_wrappers,
    lost_heads,
    other_sets,
    tower,
    with_own_tower,
)
from neva.models import hf, hf_config, hf_vlm
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig, resize_positions
from neva.models.vlm import VLM, ImageConfig, ProjectorConfig, VLMConfig, fresh, part_of

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KEPT_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
"""Small files of a folder that export gives back where the model has not outgrown them."""
KEYS, UNUSED = "keys.json", "unused.safetensors"
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Type of a model with a text tower too -> that of its vision tower."""
NEXT_TEMPLATES = {"mistral": "mistral", "qwen2": "qwen"}
"""Family of a LLaVA-NeXT's decoder -> the chat format of the published one, where that is not LLaVA's `v1`."""
WITHOUT_ENCODER = ("llava-original", "nemo-neva")
"""Formats of a VLM whose encoder is a checkpoint of its own."""


def read_source(folder: Path) -> Source:
    """What a folder holds. CheckpointError for a damaged one, ValueError for a family or mechanism that neva does not compute."""
    if is_projector(folder):
        return read_projector(folder)
    check_folder(folder)
    config = read_json(folder / "config.json")
    try:
        if config.get("quantization_config"):
            raise ValueError("config.json says that the weights are quantised; import the plain ones.")
        return _read(folder, config)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:1000]
        if isinstance(error, KeyError):
            reason = f"config.json lacks {reason}"
        elif not isinstance(error, ValueError):
            reason = f"config.json holds a value of a kind that its field does not take ({reason})"
        raise CheckpointError(f"{folder} cannot be imported: {reason}") from None


def _read(folder: Path, config: dict[str, Any]) -> Source:
    if "mm_projector_type" in config and "model_type" not in config:
        return read_projector(folder)
    shards = open_shards(folder)
    check_wrappers(shards.entries)
    notes = other_sets(folder)
    config = {name: value for name, value in config.items() if name != "transformers_weights"}
    image, pixels = image_settings(folder)
    model_type, side = config.get("model_type", ""), 0
    if "mm_vision_tower" in config:
        encoder = VisionConfig(image=336, patch=14, width=config["mm_hidden_size"], layers=24, heads=16, ffn=4096)  # until it is given
        family = hf_config.DECODERS[hf_vlm.original_text(config)["model_type"]]
        table: Mapping[str, str] = hf.original_table(family.table, shards.entries)
        model: Any = hf_vlm.original_config(config, encoder)
        source = {"kind": "vlm", "format": "llava-original", "image": model.image}
    elif model_type == "NVLM_D":
        model = hf_vlm.nvlm_config(config, qkv_rows=_qkv_rows(shards))
        table = hf.nvlm_table(hf_config.DECODERS[hf_vlm.nvlm_text(config)["model_type"]].table)
        source = {"kind": "vlm", "format": "NVLM_D", "image": model.image, "template": "nvlm-chatml-hf"}
    elif model_type in ("llava", "llava_next"):
        model = hf_vlm.llava_config(config)
        family = hf_config.VISION.get(config["vision_config"]["model_type"])
        text = hf_config.DECODERS[config["text_config"].get("model_type", "llama")]
        table = hf.llava_table(text.table, family.table if family else hf.HF_VISION)
        seen, side = _with_pixels(model.vision, pixels, family)
        views = image.pinpoints if image else ()
        if model_type == "llava_next":
            if views and views != model.image.pinpoints:
                cut = [list(view) for view in views]
                joined = config.get("image_grid_pinpoints")
                raise ValueError(
                    f"its processor says image_grid_pinpoints={cut}, config.json {joined}: images "
                    f"are cut by one and their features joined by the other. Correct one of them."
                )
            resample = image.resample if image else model.image.resample
            model = replace(model, image=replace(model.image, resample=resample))
        elif views:
            raise ValueError(
                "its processor cuts an image into several views (image_grid_pinpoints), but "
                "config.json says model_type='llava', which takes one. Correct one of them."
            )
        if model_type == "llava":
            model = replace(model, image=image or ImageConfig(aspect="crop" if _is_clip(seen) else "square"))
        model = replace(model, vision=seen)
        source = {"kind": "vlm", "format": model_type, "image": image}
        if model_type == "llava_next":
            source |= {"image": model.image, "template": NEXT_TEMPLATES.get(config["text_config"].get("model_type", ""), "v1")}
    elif model_type in hf_config.DECODERS:
        model, table = hf_config.decoder_config(config), hf_config.DECODERS[model_type].table
        source = {"kind": "decoder", "format": model_type, "image": None}
    else:
        if "vision_config" in config and model_type not in WHOLE:
            raise ValueError(hf_config.unknown(config))
        described = {**config["vision_config"], "model_type": WHOLE[model_type]} if model_type in WHOLE else config
        family = hf_config.VISION.get(described.get("model_type", ""))
        layer = -1 if family in (hf_config.VISION["intern_vit_6b"], hf_config.VISION["internvl_vision"]) else -2
        model = hf_config.vision_config(described, select_layer=layer, qkv_rows=_qkv_rows(shards))
        if model.backend == "hf" and not {"mean", "std"} <= pixels.keys():
            raise ValueError(f"a {described['model_type']} needs a preprocessor_config.json beside it, for image_mean and image_std.")
        model, side = _with_pixels(model, pixels, family)
        table = family.table if family else hf.HF_VISION
        source = {"kind": "vision", "format": described["model_type"], "image": image}
        config = described
    seen = model.vision if isinstance(model, VLMConfig) else model
    if isinstance(seen, VisionConfig) and seen.backend == "hf":
        shards = in_memory(shards, seen.hf_config, prefix="vision_tower." if source["kind"] == "vlm" else "")
    spelled = hf.default_names(shards.entries, table, aliases=source["format"] in ("llava", "llava_next"))
    read = Source(
        folder=folder, config=config, model=model, shards=shards, table=table, spelled=spelled,
        side=side, notes=notes, **source,
    )  # fmt: skip
    return as_tied(read)


def _qkv_rows(shards: Shards) -> int:
    """Rows of an InternViT's joined projection, which show heads of zeros that its config does not."""
    return next((entry.shape[0] for name, entry in shards.entries.items() if name.endswith("attn.qkv.weight")), 0)


def _with_pixels(vision: VisionConfig, pixels: Mapping[str, Any], family: hf_config.Family | None) -> tuple[VisionConfig, int]:
    """An encoder with what its processor says, and the side that is yet to be compared with its own: transformers' own encoders take any."""
    if family is None:
        return replace(vision, **pixels), 0
    return replace(vision, **{name: value for name, value in pixels.items() if name != "image"}), pixels.get("image", 0)


def _is_clip(vision: VisionConfig) -> bool:
    return vision.class_token and vision.pre_norm


def image_settings(folder: Path) -> tuple[ImageConfig | None, dict[str, Any]]:
    """From the folder's processor files: settings, and the encoder's fields image, mean and std."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            processor = read_json(folder / name)
            if {"image_mean", "size"} & processor.get("image_processor", processor).keys():
                return hf_vlm.image_config(processor, name)
    return None, {}


# What the model is, and what each of its tensors is made of.


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an import is asked for."""

    projector: str = ""
    """Name of the projector of a composed model; it alone is new."""
    dtype: Literal["keep", "fp32", "fp16", "bf16"] = "keep"
    template: str = ""
    """Chat format; by default the family's, or the tokenizer's own."""
    overrides: tuple[str, ...] = ()
    """Changes of the model's config, such as `image.aspect=pad` or `vision.image=448`."""
    seed: int = 0
    """Seed of a new projector's weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """An import before anything is written."""

    model: VLMConfig | None
    """The whole model; None where only an encoder or a projector is imported."""
    vision: VisionConfig | None
    projector: ProjectorConfig | None
    """A projector that is imported by itself."""
    sources: tuple[Source, ...]
    tensors: Mapping[str, Tensor]
    """Every tensor of ours, on the meta device, in the dtype that it will have."""
    read: Callable[[str], Tensor]
    new: tuple[str, ...]
    """Names of the tensors that no source has."""
    unused: Mapping[str, tuple[Source, str]]
    """Part-relative name of each tensor that is kept though the model does not compute it -> its source and its name there."""
    warnings: tuple[str, ...]
    cast: torch.dtype | None
    """The dtype to convert to; None keeps each tensor's own."""
    seed: int
    """Seed that the new tensors are drawn from."""


def plan(sources: Sequence[Source], options: Options) -> Plan:
    """Compose the model of its sources (a VLM; a decoder and an encoder; or one of them) and find each of its tensors.

    ValueError where they do not make a model; CheckpointError naming every tensor that is missing, unexpected, or of another shape.
    """
    model, vision, warnings = compose(sources, options)
    kept = [source.folder / name for source in sources for name in KEPT_FILES]
    for link in (file for file in kept if file.is_file() and leads_outside(file)):
        warnings.append(f"{link} is left out: it is a link that leads out of its folder")
    sources = with_own_tower(sources)
    alone = sources[0].model if isinstance(sources[0].model, ProjectorConfig) else None
    shapes = alone.shapes() if alone is not None else _shapes(model, vision)
    composed = model is not None and not any(source.kind == "vlm" for source in sources)
    givers: dict[str, tuple[Source, hf.Origin]] = {}
    new, faults = [], []
    experts = model.decoder.experts if model is not None else 0
    for name, shape in shapes.items():
        giver = _giver(name, sources, experts)
        if giver is not None:
            givers[name] = giver
            made = _shape(*giver)
            if name == "vision.positions":
                shape = _own_positions(giver[0], vision, shape)
            if made != tuple(shape):
                faults.append(f"{giver[0].spelled[giver[1].theirs[0]]!r} gives {list(made)}, the config wants {list(shape)} for {name!r}")
        elif composed and part_of(name) in ("projector", "cross"):
            new.append(name)
        else:
            faults.append(f"{_wanted(name, sources, experts)} is missing")
    faults += _unexpected(sources, givers.values(), vision)
    faults += lost_heads(sources, model)
    if faults:
        raise CheckpointError(f"{', '.join(str(source.folder) for source in sources)} does not fit its config: {few(faults, '; ')}.")
    dtype = DTYPES.get(options.dtype) or sources[0].shards.dtype
    kinds = {name: _dtype(givers.get(name), options, dtype) for name in shapes}
    tensors = {name: torch.empty(shape, dtype=kinds[name], device="meta") for name, shape in shapes.items()}
    reader = _Reader(
        givers=givers, tensors=tensors, seed=options.seed, grid=vision.grid if vision else 0, class_token=bool(vision and vision.class_token)
    )
    return Plan(
        model=model, vision=vision, projector=alone, sources=tuple(sources), tensors=tensors, read=reader.read, new=tuple(new),
        unused=_unused(sources, givers.values()), warnings=tuple(warnings), cast=DTYPES.get(options.dtype), seed=options.seed,
    )  # fmt: skip


def _shapes(model: VLMConfig | None, vision: VisionConfig | None) -> dict[str, torch.Size]:
    """Shape of each parameter of a whole model, or of an encoder by itself."""
    with torch.device("meta"):
        modules = VLM(model if model is not None else around(vision))
    parts = ("",) if model is not None else ("vision.",)
    return {name: p.shape for name, p in modules.named_parameters() if name.startswith(parts)}


def compose(sources: Sequence[Source], options: Options) -> tuple[VLMConfig | None, VisionConfig | None, list[str]]:
    """The whole model's config (None for an encoder or a projector alone), the encoder's, and
    warnings.

    ValueError where the sources make no model.
    """
    kinds = [source.kind for source in sources]
    by_kind = dict(zip(kinds, sources, strict=True))
    if sorted(kinds) not in (["vlm"], ["decoder"], ["vision"], ["projector"], ["decoder", "vision"], ["vision", "vlm"]):
        raise ValueError(f"{' and '.join(kinds)} do not make one model: give a whole VLM, or a decoder and an encoder, or one of them.")
    warnings = [note for source in sources for note in source.notes]
    if kinds == ["projector"]:
        if options.overrides:
            raise ValueError(f"{sources[0].folder} is a projector alone, of which {', '.join(options.overrides)} changes nothing: leave it out")
        return None, None, warnings
    if kinds == ["vision"]:
        (vision,) = tree.override((sources[0].model,), options.overrides)
        _check_side(sources, vision, "image", options)  # type: ignore[arg-type]
        return None, vision, warnings  # type: ignore[return-value]
    image = next((source.image for source in sources if source.image), None)
    seen: Any = by_kind["vision"].model if "vision" in by_kind else None
    if "vlm" in by_kind:
        whole = by_kind["vlm"]
        model: Any = whole.model
        if whole.format in WITHOUT_ENCODER:
            if seen is None:
                lacks = "lacks the config of" if tower(whole) else "does not hold"
                held = f"{whole.folder} ({whole.format}) {lacks} its encoder"
                raise ValueError(f"{held}: give the encoder's folder with --vision, in a recipe with init.vision=FOLDER")
            warnings += about_encoder(whole, by_kind["vision"])
            own: Any = whole.model.vision  # type: ignore[union-attr]
            seen = replace(seen, select_layer=own.select_layer, feature=own.feature if seen.class_token else "patch")
            brought = by_kind["vision"].image
            model = replace(whole.model, vision=seen)  # type: ignore[type-var]
            if brought is not None:  # LLaVA makes squares itself, and has the processor resize them
                model = replace(model, image=replace(model.image, resample=brought.resample))
        elif seen is not None:
            raise ValueError(f"{whole.folder} brings its own encoder; --vision goes with --decoder, or with a LLaVA of the original repository")
    else:
        decoder: Any = by_kind["decoder"].model
        settings = image or ImageConfig(aspect="pad" if seen is not None and _is_clip(seen) else "square")
        model = VLMConfig(decoder=decoder, vision=seen, projector=options.projector or ("mlp2x_gelu" if seen is not None else "none"), image=settings)
    if model.vision is not None and image is None:
        warnings.append(f"no preprocessor_config.json: images are treated as the encoder's family does (aspect={model.image.aspect})")
    (model,) = tree.override((model,), options.overrides)
    _check_side(sources, model.vision, "vision.image", options)
    return model, model.vision, warnings


def _check_side(sources: Sequence[Source], vision: VisionConfig | None, key: str, options: Options) -> None:
    """ValueError where a processor gives the encoder images of another size than it takes, and nobody said which of the two is meant."""
    said = any(text.partition("=")[0].strip() == key for text in options.overrides)
    for source in sources:
        if vision is not None and source.side not in (0, vision.image) and not said:
            raise ValueError(
                f"{source.folder}: its processor brings images to {source.side} pixels, its encoder takes {vision.image}: say {key}={source.side} to "
                f"`neva import` to resize the position embeddings, or {key}={vision.image} to bring images to that"
            )


def around(vision: VisionConfig | None) -> VLMConfig:
    """A model around an encoder, for its names."""
    decoder = DecoderConfig(vocab=8, width=8, layers=1, heads=1, kv_heads=1, ffn=8)
    return VLMConfig(decoder=decoder, vision=vision, projector="linear" if vision else "none")


def _own_positions(
    source: Source,
    vision: VisionConfig | None,
    shape: torch.Size,
) -> tuple[int, ...]:
    """The shape of the position embeddings that a folder must hold: of its own resolution."""
    own = source.model.vision if isinstance(source.model, VLMConfig) else source.model
    if not isinstance(own, VisionConfig) or vision is None:
        return tuple(shape)
    if source.format == "NVLM_D":  # its `force_image_size` resizes those that its encoder holds
        own = replace(own, image=hf_vlm.stored_side(source.config))
    return (own.patches + own.class_token, *shape[1:])


def _giver(name: str, sources: Sequence[Source], experts: int) -> tuple[Source, hf.Origin] | None:
    for source in reversed(sources):
        made = hf.origin(name, source.table, experts=experts)
        if made is not None and all(theirs in source.spelled for theirs in made.theirs):
            return source, made
    return None


def _wanted(name: str, sources: Sequence[Source], experts: int) -> str:
    """What a missing tensor is called by the sources, ours where no table knows it."""
    for source in sources:
        made = hf.origin(name, source.table, experts=experts)
        if made is not None:
            return repr(next(theirs for theirs in made.theirs if theirs not in source.spelled))
    return repr(name)


def _shape(source: Source, made: hf.Origin) -> tuple[int, ...]:
    shape = source.shards.entries[source.spelled[made.theirs[0]]].shape[made.leading :]
    if made.part:
        shape = (shape[0] // made.part[1], *shape[1:])
    return (len(made.theirs), *shape) if made.stacked else shape


def _dtype(giver: tuple[Source, hf.Origin] | None, options: Options, main: torch.dtype) -> torch.dtype:
    if giver is None:
        return main
    source, made = giver
    entry = source.shards.entries[source.spelled[made.theirs[0]]]
    if entry.dtype not in FLOATS:
        raise CheckpointError(f"{entry.file}: {source.spelled[made.theirs[0]]!r} is {entry.dtype}; weights must be floating-point numbers.")
    return DTYPES.get(options.dtype) or entry.dtype


def _unexpected(sources: Sequence[Source], givers: Iterable[tuple[Source, hf.Origin]], vision: VisionConfig | None) -> list[str]:
    """Tensors that nobody takes, and that no model of the family may have."""
    taken = {(source.folder, theirs) for source, made in givers for theirs in made.theirs}
    faults = []
    for source in sources:
        known = {name: default for default, name in source.spelled.items()}
        for name in source.shards.entries:
            default = known.get(name, "")
            if (source.folder, default) not in taken and not _excused(source, default or name, vision):
                faults.append(f"{name!r} is unexpected")
    return faults


def _excused(source: Source, name: str, vision: VisionConfig | None) -> bool:
    """May a folder hold this tensor though the model has no use for it?"""
    ours = hf.ours_of(name, source.table)
    block = re.match(r"vision\.blocks\.(\d+)\.", ours)
    if block and vision is not None and vision.depth <= int(block[1]) < vision.layers:  # behind the selected hidden state
        return True
    if ours == "-":
        return True
    if ours == "head.weight":  # a tied model's second copy; an untied one takes it
        return True
    return is_left_behind(name)


def is_left_behind(name: str) -> bool:
    """Is it a tensor that no reader misses: an old buffer, or of a text tower?"""
    return any(re.fullmatch(pattern, relative(name)) for pattern in hf.UNUSED)


def _unused(sources: Sequence[Source], givers: Iterable[tuple[Source, hf.Origin]]) -> dict[str, tuple[Source, str]]:
    """Tensors to keep for an export: those of vision towers."""
    taken = {(source.folder, theirs) for source, made in givers for theirs in made.theirs}
    kept = {}
    for source in sources:
        known = {name: default for default, name in source.spelled.items()}
        for name in source.shards.entries:
            default = known.get(name, name)
            ours = hf.ours_of(default, source.table)
            if (source.folder, default) in taken or (not ours and is_left_behind(default)):
                continue
            if ours == "head.weight":  # equal to the embedding, and stale once that is trained
                continue
            kept[relative(default)] = (source, name)
    return kept


def relative(name: str) -> str:
    """A name without what stands before it in a LLaVA."""
    return re.sub(r"^(model\.)?(vision_tower\.)+|^language_model\.", "", name)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reader:
    """Makes each of our tensors."""

    givers: Mapping[str, tuple[Source, hf.Origin]]
    tensors: Mapping[str, Tensor]
    seed: int
    grid: int
    class_token: bool
    last: dict[str, Tensor] = field(default_factory=dict)
    """The tensor read last: the parts of one of theirs are asked for one after the other."""

    def read(self, name: str) -> Tensor:
        wanted = self.tensors[name]
        if name not in self.givers:
            return fresh(name, wanted.shape, self.seed).to(wanted.dtype)
        source, made = self.givers[name]
        if made.part is None:
            self.last.clear()
            found = [source.shards.read(source.spelled[theirs]) for theirs in made.theirs]
        else:
            key = f"{source.folder}/{made.theirs[0]}"
            if key not in self.last:
                self.last.clear()
                self.last[key] = source.shards.read(source.spelled[made.theirs[0]])
            found = [self.last[key]]
        tensor = made.gather(found)
        if name == "vision.positions" and tensor.shape != wanted.shape:
            tensor = resize_positions(tensor, self.grid, class_token=self.class_token)
        return converted(tensor, wanted.dtype, source.spelled[made.theirs[0]]).contiguous()


# Writing.


def write(
    chosen: Plan,
    staging: stream.Staging,
    *,
    described: Mapping[str, Any],
    write_tokenizer: Callable[[Path], None] | None,
    say: Callable[[str], None],
) -> None:
    """Write the checkpoint, going on from a cut-off import of the same. `publish` gives it its
    name; `say` gets lines on how far it is."""
    temporary = staging.folder
    total = sum(tensor.numel() * tensor.element_size() for tensor in chosen.tensors.values())
    staging.begin(_fingerprint(chosen), needs=total)
    if total > stream.UNIT:
        say(f"Writing {total / 2**30:.1f} GiB to {temporary}")
    (temporary / "weights").mkdir(exist_ok=True)
    tick = stream.Progress(total, say)
    stream.write(temporary / "weights", chosen.tensors, chosen.read, tick=tick)
    for name in ("source", "tokenizer"):  # small, and made anew: files of a source that has lost them since would stay
        shutil.rmtree(temporary / name, ignore_errors=True)
    _write_source(chosen, temporary / "source")
    if write_tokenizer is not None:
        write_tokenizer(temporary / "tokenizer")
    write_config(temporary, described)


def write_config(folder: Path, described: Mapping[str, Any]) -> None:
    """neva.yaml."""
    (folder / "neva.yaml").write_text(yaml.safe_dump(dict(described), sort_keys=False, allow_unicode=True), encoding="utf-8")


def publish(staging: stream.Staging) -> Path:
    """The finished import under its name, with its manifest."""
    folder = staging.folder
    files = digests(folder, listing(folder).keys())
    manifest = Manifest(step=0, files=dict(sorted(files.items())))
    (folder / MANIFEST).write_bytes(serialise(asdict(manifest)))
    return staging.finish()


def describe(chosen: Plan, options: Options, template: str) -> dict[str, Any]:
    """`neva.yaml` of an import."""
    sources = [{"path": str(source.folder), "kind": source.kind, "format": source.format} for source in chosen.sources]
    name, config = _what(chosen)
    shape: dict[str, Any] = {name: config}
    return {"step": 0, **shape, "template": template, "system": None, "source": {"parts": sources, "new": list(chosen.new), "dtype": options.dtype}}


def _what(chosen: Plan) -> tuple[str, dict[str, Any]]:
    """What an import makes, by its key in neva.yaml, and the config of that."""
    for name in ("model", "vision", "projector"):
        if (config := getattr(chosen, name)) is not None:
            return name, tree.to_dict(config)
    raise AssertionError("an import makes something")


def _fingerprint(chosen: Plan) -> str:
    """What an import is of: another of the same may go on from its leftovers."""
    named = [file for source in chosen.sources for place in source.shards.files for file in (place.rglob("*") if place.is_dir() else [place])]
    files = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in named if file.is_file())
    tensors = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in chosen.tensors.items()]
    _, config = _what(chosen)
    new = [list(chosen.new), chosen.seed] if chosen.new else []
    return hashlib.sha256(json.dumps([files, tensors, config, new]).encode()).hexdigest()


def _write_source(chosen: Plan, folder: Path) -> None:
    """What export gives back, a folder for each source."""
    for source in chosen.sources:
        own = folder / source.kind
        own.mkdir(parents=True, exist_ok=True)
        for name in KEPT_FILES:
            file = source.folder / name
            if file.is_file() and not leads_outside(file):
                shutil.copyfile(file, own / name)
        (own / "config.json").write_text(json.dumps(dict(source.config), indent=2))
        odd = {default: name for default, name in source.spelled.items() if default != name}
        (own / KEYS).write_text(json.dumps(odd, indent=1))
        unused = {name: giver.shards.read(stored) for name, (giver, stored) in chosen.unused.items() if giver is source}
        if unused:
            kept = {name: converted(tensor, chosen.cast, name) for name, tensor in unused.items()}
            save_file({name: tensor.contiguous() for name, tensor in kept.items()}, own / UNUSED)
