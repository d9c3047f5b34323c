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

import errno
import gzip
import io
import math
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from neva.checkpoint import index
from neva.checkpoint.foreign import check_links, leads_outside
from neva.checkpoint.manifest import FULL, CheckpointError, few
from neva.checkpoint.nemo_config import (
    TEMPLATES,
    clip_config,
    decoder_config,
    llm,
    of_nemo2,
    read,
    section,
    size,
    vlm_config,
)
from neva.checkpoint.shards import Entry, Shards, load_torch, read_json
from neva.checkpoint.source import Kind, Source
from neva.config import YAML_BYTES, from_yaml
from neva.data.tokenizer import BESIDE, FILES, load_tokenizer
from neva.models.decoder import LIMITS as DECODER_LIMITS
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import VLMConfig

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
    if path.is_dir() and not (path / "model_config.yaml").is_file():
        return False
    try:
        described = read_config(path)
    except CheckpointError:
        return False  # what reads it whole says what is wrong with it
    return "mm_cfg" in (section(described, "model") or described)


def read_nemo(path: Path, scratch: Path) -> Source:
    """What a NeMo checkpoint holds; an archive is unpacked to `scratch`. CheckpointError for a damaged or unsafe one, ValueError for
    what neva does not compute."""
    folder = _unpacked(path, scratch) if path.is_file() else path
    described = _described(folder)
    source = _source(folder, described, path)
    two = (folder / "context" / "model.yaml").is_file()
    stored = _stored(folder / "weights" if two else folder)
    if isinstance(source.model, VisionConfig):
        tensors = _clip_tensors(stored, source.model, folder)
        return _with_tensors(source, tensors)
    decoder: Any = source.model.decoder if isinstance(source.model, VLMConfig) else source.model
    tensors = _ours(stored, decoder, folder)
    if "decoder.embed.weight" in tensors:
        decoder = replace(decoder, vocab=tensors["decoder.embed.weight"].entry.shape[0])
    if isinstance(source.model, VLMConfig):
        source = replace(source, model=replace(source.model, decoder=decoder))
        tensors = {_shifted(name, described["mm_cfg"]): piece for name, piece in tensors.items()}
    else:
        source = replace(source, model=decoder)
    return _with_tensors(source, tensors)


def read_nemo_config(path: Path) -> Source:
    """What a NeMo folder, or the texts of an archive, say of a model, without its weights.

    The vocabulary, of which the config alone may say nothing, is then the
    tokenizer's, padded as NeMo does.
    """
    described = _described(path)
    source = _source(path, described, path)
    keys = ("override_vocab_size", "padded_vocab_size")
    said = any(described.get(key) is not None for key in keys)
    if said or source.text is None or isinstance(source.model, VisionConfig):
        return source
    multiple = 1
    for key, usual in (("make_vocab_size_divisible_by", 128), ("tensor_model_parallel_size", 1)):
        multiple *= read({key: usual, **described}, key, size)
    vocab = -(-load_tokenizer(source.text).size // multiple) * multiple
    if isinstance(source.model, VLMConfig):
        decoder = replace(source.model.decoder, vocab=vocab)
        return replace(source, model=replace(source.model, decoder=decoder))
    return replace(source, model=replace(source.model, vocab=vocab))


def unpack_texts(path: Path, folder: Path) -> None:
    """Write an archive's config and tokenizer files to a folder; its weights are passed over."""
    with _archive(path) as (archive, members):
        for member in members:
            if member.isfile() and Path(member.name).suffix in TEXTS and member.size <= LONGEST:
                archive.extract(member, folder, filter="data")
    if not (folder / "model_config.yaml").is_file():
        raise CheckpointError(f"{path} holds no model_config.yaml: it is no NeMo checkpoint.")


def _described(folder: Path) -> Mapping[str, Any]:
    """A model's config in NeMo 1's words."""
    two = folder / "context" / "model.yaml"
    if two.is_file():
        config = _yaml(two)
        inner = config.get("config", config)
        return of_nemo2(inner if isinstance(inner, Mapping) else config)
    config = _yaml(folder / "model_config.yaml")
    return section(config, "model") or config


def _source(folder: Path, described: Mapping[str, Any], path: Path) -> Source:
    """A source without tensors."""
    model: Any
    kind: Kind = "decoder"
    try:
        if "vision" in described and "text" in described:
            kind = "vision"
            model = clip_config(section(described, "vision"))
        else:
            model = decoder_config(described)
            if described.get("mm_cfg"):
                model = vlm_config(described, model)
                kind = "vlm"
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: model_config.yaml lacks {error}") from None
    template = ""
    if kind != "vision":
        template = TEMPLATES.get(str(llm(described).get("model_type", "")), "")
    return Source(
        folder=folder,
        text=None if kind == "vision" else _tokenizer(folder),
        kind=kind,
        format="nemo-neva" if kind == "vlm" else "nemo",
        config={},
        model=model,
        image=None,
        shards=Shards(entries={}),
        table=IDENTITY,
        spelled={},
        template=template,
    )


def _with_tensors(source: Source, tensors: Mapping[str, Piece]) -> Source:
    entries = {name: piece.entry for name, piece in tensors.items()}
    shards = NemoShards(entries=entries, pieces=tensors)
    return replace(source, shards=shards, spelled={name: name for name in tensors})


def _shifted(name: str, mm: Mapping[str, Any]) -> str:
    """NeMo counts the step that joins patches as layer 0 of its projector, and a linear one has no number."""
    match = re.fullmatch(r"projector\.(?:(\d+)\.)?(weight|bias)", name)
    if not match:
        return name
    number = int(match[1] or 0) - (mm.get("mm_mlp_adapter_type") == "mlp_downsample")
    return f"projector.{number}.{match[2]}"


def _clip_tensors(stored: "Ranks", vision: VisionConfig, folder: Path) -> dict[str, Piece]:
    """An encoder's tensors, without the blocks behind the features that are read."""
    numbers = "|".join(map(str, range(vision.depth, vision.layers))) or "x"
    unread = re.compile(rf"vision\.blocks\.({numbers})\.")
    tensors = _ours(stored, vision, folder)
    return {name: piece for name, piece in tensors.items() if not unread.match(name)}


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
    tensors = index.Tensors(folder)
    found = {}
    for name, t in tensors.described.items():
        if not name.startswith(("optimizer", "chained")):
            read = partial(tensors.read, name)
            found[name] = Stored(shape=tuple(t.shape), dtype=t.dtype, file=folder, read=read)
    return found


def _of_zarr(folder: Path) -> Iterator[tuple[str, Stored]]:
    for described in sorted(folder.glob("*/.zarray")):
        place = described.parent
        if not place.name.startswith("optimizer"):
            array = _zarr_header(described)
            dtype = torch.bfloat16
            if not _is_half(array):
                dtype = torch.from_numpy(np.zeros(1, array["dtype"])).dtype
            yield place.name, Stored(shape=tuple(array["shape"]), dtype=dtype, file=place, read=lambda place=place, a=array: _zarr(place, a))


def _is_half(array: Mapping[str, Any]) -> bool:
    return "bfloat16" in str(array["dtype"])


def _zarr_header(file: Path) -> dict[str, Any]:
    """A .zarray, of which nothing is made but numbers in files beside it.
    CheckpointError for any other."""
    array = read_json(file)
    try:
        kind = np.dtype("<i2" if _is_half(array) else array["dtype"])
        sizes = [*array["shape"], *array["chunks"]]
        numbers = all(type(size) is int and size >= 0 for size in sizes)
        numbers = numbers and 0 not in array["chunks"]
        separators = array.get("dimension_separator", ".") in (".", "/")
        held = math.prod(array["shape"]) * kind.itemsize
        there = sum(path.stat().st_size for path in file.parent.rglob("*") if path.is_file())
        sound = numbers and separators and kind.kind in "fiu" and held <= there
        sound = sound and len(array["shape"]) == len(array["chunks"]) and not leads_outside(file)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{file} is refused: it describes no array of numbers in the files beside it.",
        )
    return array


def _zarr(folder: Path, array: Mapping[str, Any]) -> Tensor:
    """A zarr v2 array without compression, as Megatron writes them."""
    if array.get("compressor") is not None or array.get("order", "C") != "C" or array.get("filters"):
        raise CheckpointError(f"{folder}: compressed zarr arrays are not read; Megatron writes plain ones.")
    half = _is_half(array)
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
        most = DECODER_LIMITS["layers"][1]
        if not one.shape or one.shape[0] > most:
            shape = list(one.shape)
            raise CheckpointError(
                f"{one.file}: {name!r} {shape} is no stack of 0 to {most} layers.",
            )
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


MOST_RATIO = 20
"""An archive may unpack to so many times its size: weights are hardly compressed, so that more is
no model."""
ALWAYS = 2**28
"""Bytes to which an archive may unpack whatever its size."""
TEXTS = (".yaml", ".model", ".json", ".jinja", ".txt")
"""Endings of an archive's files that are no weights."""
LONGEST = 2**26
"""Most bytes that are unpacked at once: of a header, which tarfile reads whole."""


class _Bounded(io.BufferedReader):
    """The unpacked bytes of an archive. CheckpointError where they are more than a model's."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        unpacked: Any = gzip.GzipFile(path) if packed else path.open("rb", buffering=0)
        super().__init__(unpacked)
        self.path = path
        self.most = max(ALWAYS, MOST_RATIO * path.stat().st_size)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LONGEST:
            says = f"a header of it would unpack to more than {LONGEST:,} bytes"
            raise CheckpointError(f"{self.path} is refused: {says}.")
        self.check(self.tell() + size)
        return super().read(size)

    def check(self, unpacked: int) -> None:
        """CheckpointError for more bytes than an archive of this size may unpack to."""
        if unpacked > self.most:
            most = f"more than {self.most:,} bytes, {MOST_RATIO} times its size"
            says = f"it would unpack to {most}. No model is packed so."
            raise CheckpointError(f"{self.path} is refused: {says}")


@contextmanager
def _archive(path: Path) -> Iterator[tuple[tarfile.TarFile, Iterator[tarfile.TarInfo]]]:
    """An archive and its members, one by one, which stop where they are too many bytes.
    CheckpointError for a damaged one."""
    try:
        with _Bounded(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:

            def members() -> Iterator[tarfile.TarInfo]:
                total = 0
                for member in archive:
                    total += tarfile.BLOCKSIZE + member.size
                    unpacked.check(total)
                    yield member

            yield archive, members()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno in (*FULL, errno.EACCES, errno.EROFS):
            raise  # of the disk that it is unpacked to
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} cannot be unpacked ({reason}): it is damaged or cut off.",
        ) from None


def _unpacked(path: Path, scratch: Path) -> Path:
    """An archive's files, in `scratch`; members that would land elsewhere are refused by tarfile's data filter."""
    done, stamp = scratch / "unpacked", f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    if done.is_file() and done.read_text() == stamp:
        return scratch
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    with _archive(path) as (archive, members):
        for member in members:
            archive.extract(member, scratch, filter="data")
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        # tarfile takes the end of a file between two members for the archive's end
        if not archive.fileobj.read(tarfile.BLOCKSIZE):
            raise CheckpointError(
                f"{path} cannot be unpacked (it has no end): it is damaged or cut off.",
            )
    done.write_text(stamp)
    return scratch


def read_config(path: Path) -> dict[str, Any]:
    """The model_config.yaml of an archive or its unpacked folder; no weights are read. CheckpointError where there is none."""
    if path.is_dir():
        return _yaml(path / "model_config.yaml")
    with _archive(path) as (archive, members):
        named = (m for m in members if m.isfile() and Path(m.name).name == "model_config.yaml")
        member = next(named, None)
        file = archive.extractfile(member) if member else None
        if member is None or file is None:
            raise CheckpointError(f"{path} holds no model_config.yaml: it is no NeMo checkpoint.")
        return _mapping(path, file.read(min(member.size, YAML_BYTES + 1)))


def _yaml(path: Path) -> dict[str, Any]:
    check_links(path)
    try:
        return _mapping(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _mapping(path: Path, text: bytes) -> dict[str, Any]:
    try:
        loaded = from_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no mapping.")
    return loaded


def _tokenizer(folder: Path) -> Path | None:
    """What `load_tokenizer` reads: NeMo prefixes an archive's files with a hash, and NeMo 2
    keeps them in context/."""
    for place in (folder / "context" / "nemo_tokenizer", folder / "context", folder):
        named = [place / name for name in FILES if (place / name).is_file()]
        other = sorted(place.glob("*.model")) if place.is_dir() else []
        if found := [*named, *other]:
            check_links(*found, *(place / name for name in BESIDE))
            return place if named else other[0]
    return None
