"""What a checkpoint or a Hugging Face folder is, in words."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from neva.checkpoint import index, store
from neva.checkpoint.foreign import is_foreign
from neva.checkpoint.hf import around, read_source
from neva.checkpoint.manifest import find
from neva.checkpoint.nemo import is_nemo, read_nemo_config, unpack_texts
from neva.data.tokenizer import load_tokenizer
from neva.models import cost
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import ProjectorConfig, VLMConfig, part_of


def inspect(path: Path) -> dict[str, Any]:
    """Family, sizes, dtypes, parameters of each part, image layout, tokenizer, template, origin and step.

    A neva checkpoint is verified against its manifest byte by byte; of a NeMo checkpoint the texts
    alone are read. ValueError for what is none of these, nor a folder that can be imported.
    """
    if is_nemo(path):
        return _nemo(path)
    if path.is_file():
        raise ValueError(f"{path} is a file, and no .nemo: give the folder that it lies in")
    if is_foreign(path):
        return _folder(path)
    folder = find(path)
    manifest = store.verify(folder)
    described = store.load_config(folder)
    tensors = index.stored(folder / "weights")
    model = store.model_of(folder, described)
    tokenizer = store.tokenizer_folder(folder)
    return {
        "checkpoint": str(folder),
        "step": manifest.step,
        "bytes": manifest.bytes,
        "verified": f"{len(manifest.files)} files against their checksums",
        **_model(model),
        **_tensors(tensors),
        "tokenizer": f"{load_tokenizer(tokenizer).size} tokens" if tokenizer.is_dir() else "none",
        "template": described.get("template") or "the tokenizer's own",
        "origin": _origin(described),
    }


def _nemo(path: Path) -> dict[str, Any]:
    """A NeMo checkpoint by its config and tokenizer; its weights, which may be unpacked for
    minutes, are left alone."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = path
        if path.is_file():
            folder = Path(scratch) / "texts"
            unpack_texts(path, folder)
        source = read_nemo_config(folder)
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        tokens = f"{load_tokenizer(source.tokenizer).size} tokens" if source.text else "none"
    model = source.model
    if isinstance(model, DecoderConfig):
        whole = VLMConfig(decoder=model, vision=None, projector="none")
    elif isinstance(model, VisionConfig):
        whole = around(model)
    else:
        assert isinstance(model, VLMConfig), "no NeMo checkpoint is a projector alone"
        whole = model
    counts = asdict(cost.parameters(whole))
    # A NeVA's encoder is a checkpoint of its own.
    own = [part for part in counts if (part == "vision") == (source.kind == "vision")]
    own = own if source.kind != "decoder" else ["decoder", "head"]
    return {
        "file" if path.is_file() else "folder": str(path),
        "format": source.format,
        "holds": source.kind,
        "bytes": sum(file.stat().st_size for file in files),
        **_model(model),
        "parameters": f"{sum(counts[part] for part in own):,} by its config",
        "weights": "not read; `neva import` reads and checks them",
        "tokenizer": tokens if source.kind != "vision" else "none",
    }


def _folder(path: Path) -> dict[str, Any]:
    source = read_source(path)
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in source.shards.entries.items()}
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    text = {} if source.kind in ("vision", "projector") else {"tokenizer": f"{load_tokenizer(path).size} tokens" if source.has_tokenizer else "none"}
    return {
        "folder": str(path),
        "format": source.format,
        "holds": source.kind,
        **_model(source.model),
        "parameters": f"{parameters:,}",
        "dtypes": _dtypes(tensors),
        "files": len(source.shards.files),
        "tensors": len(tensors),
        **text,
    }


def _model(model: VLMConfig | DecoderConfig | VisionConfig | ProjectorConfig) -> dict[str, str]:
    if isinstance(model, ProjectorConfig):
        return {"projector": f"{model.name}, from features of width {model.width} to {model.out}"}
    if isinstance(model, DecoderConfig):
        return {"decoder": _decoder(model)}
    if isinstance(model, VisionConfig):
        return {"vision": _vision(model)}
    shown = {"decoder": _decoder(model.decoder)}
    if model.vision is not None:
        shuffled = "" if model.pixel_shuffle == "none" else f", pixel shuffle {model.pixel_shuffle}"
        shown |= {
            "vision": _vision(model.vision),
            "projector": model.projector + shuffled,
            "images": _images(model),
        }
    return shown


def _images(model: VLMConfig) -> str:
    layout, image = model.layout, model.image
    grid = [f"at most {image.max_tiles}"] if image.max_tiles > 1 else []
    grid += [f"thumbnail {image.thumbnail}"] if image.max_tiles > 1 and image.thumbnail != "none" else []
    grid += [f"tags {image.tags}"] if image.tags != "none" else []
    crossed = f"cross-attention of layers {', '.join(map(str, model.decoder.cross_layers))} reads "
    tokens = f"{layout.tokens_per_image} tokens"
    where = {"all": tokens, "thumbnail": f"{tokens}, {crossed}the other tiles", "none": f"{crossed}{layout.tokens_per_tile} features a tile"}
    how = f"the function {image.process}" if image.process else layout.aspect
    return ", ".join(
        [f"{how} to {layout.tile} x {layout.tile}", *grid, where[model.inline], layout.resample],
    )


def _decoder(c: DecoderConfig) -> str:
    heads = f"{c.heads} heads" if c.heads == c.kv_heads else f"{c.heads} heads on {c.kv_heads} key-value heads"
    more = [f"{c.experts} experts, {c.active_experts} active"] if c.experts else []
    more += [f"window {c.window}"] if c.window else []
    more += [f"rope scaling {c.rope_scaling.kind} x{c.rope_scaling.factor:g}"] if c.rope_scaling else []
    sizes = [f"{c.layers} layers of width {c.width}", heads, f"{c.mlp} of {c.ffn}", c.norm, f"vocabulary {c.vocab}", f"{c.reach} positions", *more]
    return ", ".join(sizes)


def _vision(c: VisionConfig) -> str:
    kind = c.hf_config.get("model_type", "transformers") if c.backend == "hf" else c.norm
    return f"{c.layers} layers of width {c.width}, {c.heads} heads, patches of {c.patch} in {c.image} pixels, {kind}, reads layer {c.select_layer}"


def _tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = part_of(name)
        counts[part] = counts.get(part, 0) + tensor.numel()
    shown = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return {"parameters": f"{sum(counts.values()):,} ({shown})", "dtypes": _dtypes(tensors)}


def _dtypes(tensors: Mapping[str, torch.Tensor]) -> str:
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} ({count} tensors)" for kind, count in counts.items())


def _origin(described: Mapping[str, Any]) -> str:
    if "train" in described:
        try:
            data = described["train"]["data"]
            named = [source["path"] or source["name"] or "mock" for source in data["sources"]]
            named = [data["source"]] if data["source"] else named
            return f"trained, stage {described['train']['name']}, on {', '.join(named)}"
        except (KeyError, TypeError):
            return "trained; its config does not say on what"
    source = described.get("source") or {}
    parts = ", ".join(f"{part['kind']} from {part['path']} ({part['format']})" for part in source.get("parts", []))
    parity = source.get("parity")
    proved = f"largest difference to transformers {max(parity.values()):.1e}" if parity else "NOT compared with transformers"
    return f"imported: {parts}; {proved}"
