"""NeMo checkpoints, read without NeMo or Megatron: `.nemo` archives, their unpacked folders, and NeMo 2 folders.

    model.nemo (tar)   model_config.yaml, tokenizer files, and one of
                         model_weights.ckpt                                     one rank
                         mp_rank_01/…, tp_rank_01_pp_rank_000/model_weights.ckpt   ranks of tensor and pipeline parallelism
                         model_weights/                                         distributed: zarr folders, or torch_dist
    NeMo 2 folder      context/model.yaml, weights/ (torch_dist)

Every tensor is given under our name: `mp_rank` files are joined (columns, rows, gated MLPs half by half), Megatron's fused qkv, group by
group [queries | key | value], is taken apart (REFERENCE: Megatron-LM's converters). Nothing is unpickled but tensors, plain containers and
the classes of DCP's index.
"""

import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from neva.checkpoint import index
from neva.checkpoint.hf import Source
from neva.checkpoint.manifest import CheckpointError, few
from neva.checkpoint.nemo_config import TEMPLATES, clip_config, decoder_config, llm, of_nemo2, section, vlm_config
from neva.checkpoint.shards import Entry, Shards, load_torch
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig

IDENTITY = {"{*}": "{*}"}
"""The table of a source whose tensors have our names already."""
# Megatron's names, both styles: NeMo's own GPT (`language_model.encoder`) and megatron.core (`decoder`). `{i}` is a layer, `{p}` weight or bias.
KEYS: dict[str, str] = {
    "embedding.word_embeddings.weight": "decoder.embed.weight",
    "embedding.position_embeddings.weight": "decoder.positions",
    "layers.{i}.input_layernorm.{p}": "decoder.blocks.{i}.attention_norm.{p}",
    "layers.{i}.self_attention.linear_qkv.layer_norm_{p}": "decoder.blocks.{i}.attention_norm.{p}",
    "layers.{i}.self_attention.query_key_value.{p}": "decoder.blocks.{i}.attention.qkv.{p}",
    "layers.{i}.self_attention.linear_qkv.{p}": "decoder.blocks.{i}.attention.qkv.{p}",
    "layers.{i}.self_attention.dense.{p}": "decoder.blocks.{i}.attention.out.{p}",
    "layers.{i}.self_attention.linear_proj.{p}": "decoder.blocks.{i}.attention.out.{p}",
    "layers.{i}.post_attention_layernorm.{p}": "decoder.blocks.{i}.mlp_norm.{p}",
    "layers.{i}.pre_mlp_layernorm.{p}": "decoder.blocks.{i}.mlp_norm.{p}",
    "layers.{i}.mlp.linear_fc1.layer_norm_{p}": "decoder.blocks.{i}.mlp_norm.{p}",
    "layers.{i}.mlp.dense_h_to_4h.{p}": "decoder.blocks.{i}.mlp.fc1.{p}",
    "layers.{i}.mlp.linear_fc1.{p}": "decoder.blocks.{i}.mlp.fc1.{p}",
    "layers.{i}.mlp.dense_4h_to_h.{p}": "decoder.blocks.{i}.mlp.down.{p}",
    "layers.{i}.mlp.linear_fc2.{p}": "decoder.blocks.{i}.mlp.down.{p}",
    "layers.{i}.mlp.router.weight": "decoder.blocks.{i}.mlp.router.weight",
    "layers.{i}.mlp.experts.local_experts.{e}.linear_fc1.weight": "decoder.blocks.{i}.mlp.experts.fc1.{e}",
    "layers.{i}.mlp.experts.local_experts.{e}.linear_fc2.weight": "decoder.blocks.{i}.mlp.experts.down.{e}",
    "final_layernorm.{p}": "head.norm.{p}",
    "output_layer.weight": "head.weight",
    "vision.conv1.{p}": "vision.patch.{p}",
    "vision.class_token": "vision.class_token",
    "vision.position_embeddings.weight": "vision.positions",
    "vision.ln_pre.{p}": "vision.pre_norm.{p}",
    "vision.layers.{i}.self_attention.linear_qkv.layer_norm_{p}": "vision.blocks.{i}.attention_norm.{p}",
    "vision.layers.{i}.self_attention.linear_qkv.{p}": "vision.blocks.{i}.attention.qkv.{p}",
    "vision.layers.{i}.self_attention.linear_proj.{p}": "vision.blocks.{i}.attention.out.{p}",
    "vision.layers.{i}.mlp.linear_fc1.layer_norm_{p}": "vision.blocks.{i}.mlp_norm.{p}",
    "vision.layers.{i}.mlp.linear_fc1.{p}": "vision.blocks.{i}.mlp.up.{p}",
    "vision.layers.{i}.mlp.linear_fc2.{p}": "vision.blocks.{i}.mlp.down.{p}",
}
COLUMNS = re.compile(r"\.(qkv|fc1|up|embed)\.|^head\.weight$|\.experts\.fc1\.|^vision\.patch")
"""Our tensors whose first dimension tensor parallelism cuts; biases of these too."""
ROWS = re.compile(r"\.(out|down)\.weight$|\.experts\.down\.")
"""Those whose second dimension it cuts; their biases are whole on every rank."""
IGNORED = re.compile(r"_extra_state|inv_freq|rotary_pos_emb|position_ids|^vision\.(final_layernorm|head)\.|^text_encoder\.|logit_scale")
PREFIXES = (
    (r"^(model|module)\.", ""),
    (r"^(module)\.", ""),
    (r"^language_model\.", ""),
    (r"^(encoder|decoder)\.", ""),
    (r"^embedding\.word_embeddings\.adapter_layer\.mm_(projector|linear)_adapter\.(mm_projector|linear)\.", "projector."),
    (r"^vision_encoder\.(decoder\.)?", "vision."),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """One of our tensors: of which stored ones it is made, and how."""

    entry: Entry
    make: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class NemoShards(Shards):
    """Tensors under our names."""

    pieces: Mapping[str, Piece] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        tensor = self.pieces[name].make()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self.entries[name].file}: {name!r} holds values that are not finite; the file is damaged.")
        return tensor.contiguous()


def is_nemo(path: Path) -> bool:
    """Is this a NeMo checkpoint, by its looks?"""
    return path.suffix == ".nemo" or (path / "model_config.yaml").is_file() or (path / "context" / "model.yaml").is_file()


def is_neva(path: Path) -> bool:
    """Is this NeMo checkpoint a NeVA, whose encoder is a checkpoint of its own? An archive is not unpacked for the answer."""
    if not path.is_file():
        described = _yaml(path / "model_config.yaml") if (path / "model_config.yaml").is_file() else {}
    else:
        try:
            with tarfile.open(path) as archive:
                member = next((m for m in archive if Path(m.name).name == "model_config.yaml" and m.isfile()), None)
                described = yaml.safe_load(archive.extractfile(member)) if member else {}  # type: ignore[arg-type]
        except (tarfile.TarError, OSError, EOFError, yaml.YAMLError):
            return False  # what reads it whole says what is wrong with it
    return isinstance(described, dict) and "mm_cfg" in described.get("model", described)


def read_nemo(path: Path, scratch: Path) -> Source:
    """What a NeMo checkpoint holds; an archive is unpacked to `scratch`. CheckpointError for a damaged or unsafe one, ValueError for
    what neva does not compute."""
    folder = _unpacked(path, scratch) if path.is_file() else path
    two = (folder / "context" / "model.yaml").is_file()
    config = _yaml(folder / "context" / "model.yaml" if two else folder / "model_config.yaml")
    described = of_nemo2(config.get("config", config)) if two else section(config, "model") or config
    try:
        if "vision" in described and "text" in described:
            return _clip(folder, section(described, "vision"))
        decoder = decoder_config(described)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: model_config.yaml lacks {error}") from None
    stored = _stored(folder / "weights" if two else folder)
    tensors = _ours(stored, decoder, folder)
    decoder = replace(decoder, vocab=tensors["decoder.embed.weight"].entry.shape[0] if "decoder.embed.weight" in tensors else decoder.vocab)
    model: Any = decoder
    kind = "decoder"
    if described.get("mm_cfg"):
        model, kind = vlm_config(described, decoder), "vlm"
        tensors = {_shifted(name, described["mm_cfg"]): piece for name, piece in tensors.items()}
    shards = NemoShards(entries={name: piece.entry for name, piece in tensors.items()}, pieces=tensors)
    return Source(
        folder=_with_tokenizer(folder), kind=kind, format="nemo-neva" if kind == "vlm" else "nemo", config={}, model=model, image=None,
        shards=shards, table=IDENTITY, spelled={name: name for name in tensors}, template=TEMPLATES.get(llm(described).get("model_type", ""), ""),
    )  # fmt: skip


def _shifted(name: str, mm: Mapping[str, Any]) -> str:
    """NeMo counts the step that joins patches as layer 0 of its projector, and a linear one has no number."""
    match = re.fullmatch(r"projector\.(?:(\d+)\.)?(weight|bias)", name)
    if not match:
        return name
    number = int(match[1] or 0) - (mm.get("mm_mlp_adapter_type") == "mlp_downsample")
    return f"projector.{number}.{match[2]}"


def _clip(folder: Path, v: Mapping[str, Any]) -> Source:
    vision = clip_config(v)
    tensors = {
        name: piece
        for name, piece in _ours(_stored(folder), vision, folder).items()
        if not re.match(rf"vision\.blocks\.({'|'.join(map(str, range(vision.depth, vision.layers))) or 'x'})\.", name)
    }
    shards = NemoShards(entries={name: piece.entry for name, piece in tensors.items()}, pieces=tensors)
    return Source(
        folder=folder, kind="vision", format="nemo", config={}, model=vision, image=None, shards=shards, table=IDENTITY,
        spelled={name: name for name in tensors},
    )  # fmt: skip


# Weights.


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """One tensor of one rank's file, or of all ranks together."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]


Ranks = dict[tuple[int, int], dict[str, Stored]]
"""(pipeline rank, tensor rank) -> that rank's tensors by name."""


def _stored(folder: Path) -> Ranks:
    files = sorted(folder.glob("**/model_weights.ckpt"))
    if files:
        return {_rank(file): dict(_of_file(file)) for file in files}
    for place in (folder / "model_weights", folder):
        if (place / ".metadata").is_file():
            return {(0, 0): _unstacked(_of_dcp(place))}
        if any(place.glob("*/.zarray")):
            return {(0, 0): _unstacked(dict(_of_zarr(place)))}
    raise CheckpointError(f"{folder} holds no weights: expected model_weights.ckpt, mp_rank_* folders, or a distributed model_weights/")


def _rank(file: Path) -> tuple[int, int]:
    """(pipeline, tensor) rank of a file by its folder's name."""
    name = file.parent.name
    if match := re.fullmatch(r"tp_rank_(\d+)_pp_rank_(\d+)", name):
        return int(match[2]), int(match[1])
    if match := re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", name):
        return int(match[2] or 0), int(match[1])
    return 0, 0


def _of_file(file: Path) -> Iterator[tuple[str, Stored]]:
    for name, tensor in load_torch(file).items():
        yield name, Stored(shape=tuple(tensor.shape), dtype=tensor.dtype, file=file, read=lambda tensor=tensor: tensor)


def _of_dcp(folder: Path) -> dict[str, Stored]:
    kept = {name: tensor for name, tensor in index.stored(folder).items() if not name.startswith(("optimizer", "chained"))}
    return {
        name: Stored(shape=tuple(t.shape), dtype=t.dtype, file=folder, read=lambda name=name: index.read(folder, name)) for name, t in kept.items()
    }  # fmt: skip


def _of_zarr(folder: Path) -> Iterator[tuple[str, Stored]]:
    for described in sorted(folder.glob("*/.zarray")):
        place = described.parent
        if not place.name.startswith("optimizer"):
            array = json.loads(described.read_text())
            dtype = torch.bfloat16 if "bfloat16" in str(array["dtype"]) else torch.from_numpy(np.zeros(1, array["dtype"])).dtype
            yield place.name, Stored(shape=tuple(array["shape"]), dtype=dtype, file=place, read=lambda place=place, a=array: _zarr(place, a))


def _zarr(folder: Path, array: Mapping[str, Any]) -> Tensor:
    """A zarr v2 array without compression, as Megatron writes them."""
    if array.get("compressor") is not None or array.get("order", "C") != "C" or array.get("filters"):
        raise CheckpointError(f"{folder}: compressed zarr arrays are not read; Megatron writes plain ones.")
    half = "bfloat16" in str(array["dtype"])
    kind = np.dtype("<i2") if half else np.dtype(array["dtype"])
    whole, chunk = np.zeros(array["shape"], kind), array["chunks"]
    counts = [-(-size // part) for size, part in zip(array["shape"], chunk, strict=True)]
    for place in np.ndindex(*counts):
        file = folder / array.get("dimension_separator", ".").join(map(str, place or (0,)))
        if not file.is_file() or file.stat().st_size != int(np.prod(chunk)) * kind.itemsize:
            raise CheckpointError(f"{file} is missing or cut off.")
        part = np.fromfile(file, kind).reshape(chunk)
        where = tuple(slice(i * n, min((i + 1) * n, size)) for i, n, size in zip(place, chunk, array["shape"], strict=True))
        whole[where] = part[tuple(slice(0, w.stop - w.start) for w in where)]
    tensor = torch.from_numpy(whole)
    return tensor.view(torch.bfloat16) if half else tensor


def _unstacked(stored: dict[str, Stored]) -> dict[str, Stored]:
    """Distributed checkpoints hold a tensor of all layers where ours are one by one: `decoder.layers.mlp…` [layers, …]."""
    apart = {}
    for name, one in stored.items():
        match = re.match(r"(.*\blayers)\.(?!\d)(.*)", name)
        if not match:
            apart[name] = one
            continue
        for number in range(one.shape[0]):
            read = lambda one=one, number=number: one.read()[number]  # noqa: E731
            apart[f"{match[1]}.{number}.{match[2]}"] = replace(one, shape=one.shape[1:], read=read)
    return apart


def _ours(ranks: Ranks, config: DecoderConfig | VisionConfig, folder: Path) -> dict[str, Piece]:
    """Tensors of all ranks under our names, put together. CheckpointError for names that Megatron's models do not have."""
    pipeline = sorted({p for p, _ in ranks})
    tensor = sorted({t for _, t in ranks})
    if len(ranks) != len(pipeline) * len(tensor) or pipeline != [*range(len(pipeline))] or tensor != [*range(len(tensor))]:
        raise CheckpointError(f"{folder} holds the files of {len(ranks)} ranks, {len(tensor)} x {len(pipeline)} are wanted: some are missing.")
    pieces: dict[str, Piece] = {}
    stacks: dict[str, dict[int, list[Stored]]] = {}
    unknown, begin = [], 0
    for p in pipeline:
        names = [name for name in ranks[p, 0] if not IGNORED.search(_plain(name))]
        layers = {int(m[1]) for name in names if (m := re.search(r"\blayers\.(\d+)\.", name))}
        for name in names:
            ours = _renamed(_plain(name), begin)
            if ours is None:
                unknown.append(name)
                continue
            parts = [ranks[p, t][name] for t in tensor if name in ranks[p, t]]
            if match := re.fullmatch(r"(.*\.experts\.(?:fc1|down))\.(\d+)", ours):
                stacks.setdefault(match[1], {})[int(match[2])] = parts
                continue
            if config.tied and ours == "head.weight" if isinstance(config, DecoderConfig) else False:
                continue
            pieces |= _taken_apart(_normed(ours, config), parts, config)
        begin += len(layers)
    if unknown:
        raise CheckpointError(f"{folder} holds tensors that neva does not know: {few(sorted(unknown))}.")
    for name, experts in stacks.items():
        pieces |= _stacked(name, [experts[number] for number in sorted(experts)])
    return pieces


def _plain(name: str) -> str:
    for pattern, instead in PREFIXES:
        name = re.sub(pattern, instead, name)
    return name


def _renamed(name: str, begin: int) -> str | None:
    if name.startswith("projector."):
        return name
    for theirs, ours in KEYS.items():
        pattern = re.escape(theirs).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>weight|bias)").replace(r"\{e\}", r"(?P<e>\d+)")
        if match := re.fullmatch(pattern, name):
            groups = match.groupdict()
            groups |= {"i": str(int(groups["i"]) + begin)} if "i" in groups else {}
            return ours.format(**groups)
    return None


def _normed(name: str, config: DecoderConfig | VisionConfig) -> str:
    """A norm's weight is our offset where it is stored minus 1."""
    return name.replace("norm.weight", "norm.offset") if config.norm == "layernorm1p" else name


def _piece(parts: list[Stored], shape: tuple[int, ...], make: Callable[[list[Tensor]], Tensor]) -> Piece:
    return Piece(entry=Entry(file=parts[0].file, shape=shape, dtype=parts[0].dtype), make=lambda: make([part.read() for part in parts]))


def _taken_apart(name: str, parts: list[Stored], config: DecoderConfig | VisionConfig) -> dict[str, Piece]:
    """Our tensors of one of Megatron's, of which each tensor rank has a part."""
    shape, n = parts[0].shape, len(parts)
    if ".attention.qkv." in name:
        heads, groups, head = config.heads, getattr(config, "kv_heads", config.heads), config.head
        wide = {"q": heads * head, "k": groups * head, "v": groups * head}
        return {
            name.replace("qkv", part): _piece(
                parts, (wide[part], *shape[1:]), lambda tensors, part=part: _unfuse(torch.cat(tensors), heads, groups, head)[part]
            )
            for part in "qkv"
        }
    if ".mlp.fc1." in name:
        gated = isinstance(config, DecoderConfig) and config.mlp in ("swiglu", "geglu")
        if not gated:
            return {name.replace("fc1", "up"): _piece(parts, (shape[0] * n, *shape[1:]), torch.cat)}
        half = (shape[0] * n // 2, *shape[1:])
        return {
            name.replace("fc1", part): _piece(parts, half, lambda tensors, at=at: torch.cat([t.chunk(2)[at] for t in tensors]))
            for at, part in enumerate(("gate", "up"))
        }
    if name in ("vision.class_token",):
        return {name: _piece(parts[:1], (shape[-1],), lambda tensors: tensors[0].reshape(-1))}
    if ROWS.search(name):
        return {name: _piece(parts, (shape[0], shape[1] * n), lambda tensors: torch.cat(tensors, dim=1))}
    if COLUMNS.search(name) and not name.startswith("vision.patch"):
        return {name: _piece(parts, (shape[0] * n, *shape[1:]), torch.cat)}
    return {name: _piece(parts[:1], shape, lambda tensors: tensors[0])}


def _stacked(name: str, experts: list[list[Stored]]) -> dict[str, Piece]:
    """A block's experts on top of each other."""
    parts, count, n = [part for one in experts for part in one], len(experts), len(experts[0])
    rows, columns = experts[0][0].shape
    if name.endswith("down"):
        join = lambda tensors: torch.stack([torch.cat(tensors[e * n : (e + 1) * n], dim=1) for e in range(count)])  # noqa: E731
        return {name: _piece(parts, (count, rows, columns * n), join)}
    cut = lambda tensors, at: torch.stack([torch.cat([t.chunk(2)[at] for t in tensors[e * n : (e + 1) * n]]) for e in range(count)])  # noqa: E731
    shape = (count, rows * n // 2, columns)
    return {name.replace("fc1", part): _piece(parts, shape, lambda tensors, at=at: cut(tensors, at)) for at, part in enumerate(("gate", "up"))}


def _unfuse(fused: Tensor, heads: int, groups: int, head: int) -> dict[str, Tensor]:
    """Queries, keys and values of Megatron's rows: for each group its queries, its key, its value."""
    share = heads // groups
    x = fused.unflatten(0, (groups, (share + 2), head))
    return {"q": x[:, :share].flatten(0, 2), "k": x[:, share].flatten(0, 1), "v": x[:, share + 1].flatten(0, 1)}


# Files.


def _unpacked(path: Path, scratch: Path) -> Path:
    """An archive's files, in `scratch`; members that would land elsewhere are refused by tarfile's data filter."""
    done, stamp = scratch / "unpacked", f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    if done.is_file() and done.read_text() == stamp:
        return scratch
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(path) as archive:
            archive.extractall(scratch, filter="data")
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if not archive.fileobj.read(tarfile.BLOCKSIZE):  # tarfile takes the end of a file between two members for the archive's end
                raise EOFError("it has no end")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be unpacked ({type(error).__name__}: {error}): it is damaged or cut off.") from None
    done.write_text(stamp)
    return scratch


def read_config(path: Path) -> dict[str, Any]:
    """The model_config.yaml of an archive or its unpacked folder; no weights are read. CheckpointError where there is none."""
    if path.is_dir():
        return _yaml(path / "model_config.yaml")
    try:
        with tarfile.open(path) as archive:
            member = next((m for m in archive if m.isfile() and Path(m.name).name == "model_config.yaml"), None)
            file = archive.extractfile(member) if member else None
            if file is None:
                raise CheckpointError(f"{path} holds no model_config.yaml: it is no NeMo checkpoint.")
            return _mapping(path, file.read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be unpacked ({type(error).__name__}: {error}): it is damaged or cut off.") from None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return _mapping(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _mapping(path: Path, text: bytes) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no mapping.")
    return loaded


def _with_tokenizer(folder: Path) -> Path:
    """The folder in which the tokenizer lies: NeMo prefixes an archive's files with a hash; NeMo 2 keeps them in context/."""
    for place in (folder / "context" / "nemo_tokenizer", folder / "context", folder):
        for file in sorted(place.glob("*.model")) if place.is_dir() else []:
            target = place / "tokenizer.model"
            if not target.exists():
                target.symlink_to(file.name)
            return place
    return folder
