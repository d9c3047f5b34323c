"""NeMo checkpoints as NeMo writes them, made of our tensors: both key styles, ranks of tensor and pipeline parallelism, distributed formats."""

import io
import json
import re
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor

from neva.models.decoder import DecoderConfig

ACTIVATIONS = {"swiglu": "fast-swiglu", "geglu": "geglu", "gelu": "gelu", "gelu_tanh": "gelu", "squared_relu": "squared-relu"}
NORMS = {"rmsnorm": "rmsnorm", "layernorm": "layernorm", "layernorm1p": "layernorm1p"}


def config_of(c: DecoderConfig) -> dict[str, Any]:
    """The `model_config.yaml` of a decoder."""
    return {
        "num_layers": c.layers, "hidden_size": c.width, "ffn_hidden_size": c.ffn, "num_attention_heads": c.heads, "num_query_groups": c.kv_heads,
        "kv_channels": c.head, "normalization": NORMS[c.norm], "layernorm_epsilon": c.eps, "activation": ACTIVATIONS[c.mlp], "bias": c.mlp_bias,
        "bias_activation_fusion": c.mlp == "gelu_tanh", "position_embedding_type": "rope" if c.positions == "rotary" else "learned_absolute",
        "rotary_percentage": c.rotary_fraction, "rotary_base": c.rope_theta, "encoder_seq_length": c.max_positions,
        "max_position_embeddings": c.max_positions, "share_embeddings_and_output_weights": c.tied, "num_moe_experts": c.experts or None,
        "moe_router_topk": c.active_experts, "tokenizer": {"library": "sentencepiece"}, "transformer_block_type": "pre_ln",
        "hidden_dropout": c.hidden_dropout, "attention_dropout": c.attention_dropout, "ffn_dropout": c.ffn_dropout,
    }  # fmt: skip


def fuse(q: Tensor, k: Tensor, v: Tensor, c: Any) -> Tensor:
    """Megatron's rows, written as a loop over groups and heads."""
    groups, share, head = getattr(c, "kv_heads", c.heads), c.heads // getattr(c, "kv_heads", c.heads), c.head
    rows = []
    for group in range(groups):
        for number in range(share):
            first = (group * share + number) * head
            rows.append(q[first : first + head])
        rows += [k[group * head : (group + 1) * head], v[group * head : (group + 1) * head]]
    return torch.cat(rows)


CORE = (
    ("self_attention.linear_qkv", "self_attention.linear_proj"),
    ("mlp.linear_fc1", "mlp.linear_fc2"),
    ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"),
)
CLASSIC = (
    ("self_attention.query_key_value", "self_attention.dense"),
    ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ("input_layernorm.", "post_attention_layernorm."),
)
"""Names of megatron.core, and of NeMo's own GPT: attention's in and out, the MLP's, the norms'."""
Place = tuple[int, int]
"""Number of a rank, and how many there are."""


def rank_state(ours: Mapping[str, Tensor], c: DecoderConfig, *, core: bool, tp: Place, pp: Place, prefix: str) -> dict[str, Tensor]:
    """One rank's tensors. Column-parallel ones are cut by rows, row-parallel ones by columns, gated ones half by half."""
    rank, ranks = tp

    def column(x: Tensor) -> Tensor:
        return x.chunk(ranks)[rank]

    def row(x: Tensor) -> Tensor:
        return x.chunk(ranks, dim=1)[rank]

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return torch.cat((column(gate), column(up)))

    layers = range(c.layers)[pp[0] * c.layers // pp[1] : (pp[0] + 1) * c.layers // pp[1]]
    top = f"{prefix}" if core else f"{prefix}language_model."
    stack = "decoder" if core else "encoder"
    state: dict[str, Tensor] = {}
    if pp[0] == 0:
        state[f"{top}embedding.word_embeddings.weight"] = column(ours["decoder.embed.weight"])
        if c.positions == "learned":
            state[f"{top}embedding.position_embeddings.weight"] = ours["decoder.positions"]
    weight = "offset" if c.norm == "layernorm1p" else "weight"
    for local, number in enumerate(layers):
        at, of = f"{top}{stack}.layers.{local}.", f"decoder.blocks.{number}."
        attention, mlp = (CORE if core else CLASSIC)[:2]
        names = dict(zip(("attention_norm", "mlp_norm"), (CORE if core else CLASSIC)[2], strict=True))
        if core and c.experts:
            names["mlp_norm"] = "pre_mlp_layernorm."
        for norm, name in names.items():
            state[f"{at}{name}weight"] = ours[f"{of}{norm}.{weight}"]
            if f"{of}{norm}.bias" in ours:
                state[f"{at}{name}bias"] = ours[f"{of}{norm}.bias"]
        for p in ("weight", "bias"):
            if f"{of}attention.q.{p}" in ours:
                fused = fuse(*(ours[f"{of}attention.{n}.{p}"] for n in "qkv"), c)
                state[f"{at}{attention[0]}.{p}"] = column(fused)
            if f"{of}attention.out.{p}" in ours:
                x = ours[f"{of}attention.out.{p}"]
                state[f"{at}{attention[1]}.{p}"] = row(x) if p == "weight" else x
            if f"{of}mlp.up.{p}" in ours:
                up = ours[f"{of}mlp.up.{p}"]
                state[f"{at}{mlp[0]}.{p}"] = gated(ours[f"{of}mlp.gate.{p}"], up) if f"{of}mlp.gate.{p}" in ours else column(up)
                down = ours[f"{of}mlp.down.{p}"]
                state[f"{at}{mlp[1]}.{p}"] = row(down) if p == "weight" else down
        if c.experts:
            state[f"{at}mlp.router.weight"] = ours[f"{of}mlp.router.weight"]
            for e in range(c.experts):
                one = f"{at}mlp.experts.local_experts.{e}."
                state[f"{one}linear_fc1.weight"] = gated(ours[f"{of}mlp.experts.gate"][e], ours[f"{of}mlp.experts.up"][e])
                state[f"{one}linear_fc2.weight"] = row(ours[f"{of}mlp.experts.down"][e])
    if pp[0] == pp[1] - 1:
        last = f"{top}{stack}.final_layernorm."
        state[f"{last}weight"] = ours[f"head.norm.{weight}"]
        if "head.norm.bias" in ours:
            state[f"{last}bias"] = ours["head.norm.bias"]
        if not c.tied:
            state[f"{top}output_layer.weight"] = column(ours["head.weight"])
        if core:
            state[f"{top}{stack}.layers.0.self_attention._extra_state"] = torch.zeros(0)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def write(path: Path, ours: Mapping[str, Tensor], c: DecoderConfig, *, core: bool, tp: int = 1, pp: int = 1, more: dict | None = None) -> Path:
    """A `.nemo` archive. `more` goes into its config; tensors of ours that begin with projector. become NeVA's adapter."""
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        add("model_config.yaml", yaml.safe_dump({**config_of(c), **(more or {})}).encode())
        for p in range(pp):
            for t in range(tp):
                state = rank_state(ours, c, core=core, tp=(t, tp), pp=(p, pp), prefix="model.")
                if p == 0:
                    place = "model.embedding" if core else "model.language_model.embedding"
                    adapter = f"{place}.word_embeddings.adapter_layer.mm_projector_adapter.mm_projector"
                    state |= {name.replace("projector", adapter, 1): x for name, x in ours.items() if name.startswith("projector.")}
                folder = "" if tp * pp == 1 else f"mp_rank_{t:02d}/" if pp == 1 else f"tp_rank_{t:02d}_pp_rank_{p:03d}/"
                buffer = io.BytesIO()
                torch.save(state, buffer)
                add(f"{folder}model_weights.ckpt", buffer.getvalue())
    return path


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers on top of each other, as Megatron's distributed checkpoints hold them."""
    done: dict[str, Any] = {}
    for name, tensor in state.items():
        match = re.match(r"(.*\.layers)\.(\d+)\.(.*)", name)
        if match and "_extra_state" not in name:
            done.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
        elif "_extra_state" not in name:
            done[name] = tensor
    return {n: torch.stack([x[i] for i in sorted(x)]) if isinstance(x, dict) else x for n, x in done.items()}


def save_dcp(state: Mapping[str, Tensor], folder: Path) -> None:
    """torch_dist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=folder, no_dist=True)


def write_distributed(folder: Path, ours: Mapping[str, Tensor], c: DecoderConfig, kind: str) -> Path:
    """An unpacked checkpoint in Megatron's distributed formats: `torch_dist`, or `zarr` with chunks that do not divide the array."""
    state = stacked(rank_state(ours, c, core=True, tp=(0, 1), pp=(0, 1), prefix="model."))
    weights = folder / "model_weights"
    weights.mkdir(parents=True)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config_of(c)))
    if kind == "torch_dist":
        save_dcp(state, weights)
        return folder
    for name, tensor in state.items():
        place = weights / name
        place.mkdir()
        array = tensor.to(torch.bfloat16).view(torch.int16).numpy() if kind == "zarr bf16" else tensor.numpy()
        chunks = [max(1, size // 2 + 1) for size in array.shape]
        dtype = "bfloat16" if kind == "zarr bf16" else "<f4"
        (place / ".zarray").write_text(json.dumps({"zarr_format": 2, "shape": list(array.shape), "chunks": chunks, "dtype": dtype, "compressor": None,
                                                   "fill_value": None, "order": "C", "filters": None}))  # fmt: skip
        for index in np.ndindex(*[-(-n // m) for n, m in zip(array.shape, chunks, strict=True)]):
            part = np.zeros(chunks, array.dtype)
            have = array[tuple(slice(i * m, (i + 1) * m) for i, m in zip(index, chunks, strict=True))]
            part[tuple(slice(0, n) for n in have.shape)] = have
            part.tofile(place / ".".join(map(str, index)))
    return folder
