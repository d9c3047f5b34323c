"""Names of tensors in Hugging Face checkpoints <-> ours: per family one key table, read in both directions.

A line says "theirs": "ours". `{i}` is a layer number, `{p}` weight or bias, `[...]` a part of a name that a checkpoint may lack and that we
write where no source says otherwise (transformers 5 dropped it, the published files and vLLM have it). `{a|b|c}` on our side: theirs holds
the rows of the three, one after the other. `{e}` on their side: ours stacks their tensors of all experts. `^n` behind their name: theirs has
n leading dimensions of 1. `-`: our models do not compute it; it may be there, and nothing is missing without it. Tables speak of the names on
disk, not of those in transformers' memory.
Source of the layouts: the config.json and safetensors of the published models that each table names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

ATTENTION: dict[str, str] = {
    "[model.]layers.{i}.self_attn.q_proj.{p}": "decoder.blocks.{i}.attention.q.{p}",
    "[model.]layers.{i}.self_attn.k_proj.{p}": "decoder.blocks.{i}.attention.k.{p}",
    "[model.]layers.{i}.self_attn.v_proj.{p}": "decoder.blocks.{i}.attention.v.{p}",
    "[model.]layers.{i}.self_attn.o_proj.{p}": "decoder.blocks.{i}.attention.out.{p}",
}
ENDS: dict[str, str] = {
    "[model.]embed_tokens.weight": "decoder.embed.weight",
    "[model.]norm.weight": "head.norm.weight",
    "lm_head.weight": "head.weight",
}
NORMS: dict[str, str] = {
    "[model.]layers.{i}.input_layernorm.weight": "decoder.blocks.{i}.attention_norm.weight",
    "[model.]layers.{i}.post_attention_layernorm.weight": "decoder.blocks.{i}.mlp_norm.weight",
}

LLAMA: dict[str, str] = {
    **ENDS,
    **NORMS,
    **ATTENTION,
    "[model.]layers.{i}.mlp.gate_proj.{p}": "decoder.blocks.{i}.mlp.gate.{p}",
    "[model.]layers.{i}.mlp.up_proj.{p}": "decoder.blocks.{i}.mlp.up.{p}",
    "[model.]layers.{i}.mlp.down_proj.{p}": "decoder.blocks.{i}.mlp.down.{p}",
}
"""meta-llama's, 01-ai/Yi-34B, mistralai/Mistral-7B-v0.1, Qwen/Qwen2-7B."""

MIXTRAL: dict[str, str] = {
    **ENDS,
    **NORMS,
    **ATTENTION,
    "[model.]layers.{i}.block_sparse_moe.gate.weight": "decoder.blocks.{i}.mlp.router.weight",
    "[model.]layers.{i}.block_sparse_moe.experts.{e}.w1.weight": "decoder.blocks.{i}.mlp.experts.gate",
    "[model.]layers.{i}.block_sparse_moe.experts.{e}.w3.weight": "decoder.blocks.{i}.mlp.experts.up",
    "[model.]layers.{i}.block_sparse_moe.experts.{e}.w2.weight": "decoder.blocks.{i}.mlp.experts.down",
}
"""mistralai/Mixtral-8x7B-v0.1."""

NEMOTRON: dict[str, str] = {
    "[model.]embed_tokens.weight": "decoder.embed.weight",
    "[model.]norm.weight": "head.norm.offset",
    "[model.]norm.bias": "head.norm.bias",
    "lm_head.weight": "head.weight",
    "[model.]layers.{i}.input_layernorm.weight": "decoder.blocks.{i}.attention_norm.offset",
    "[model.]layers.{i}.input_layernorm.bias": "decoder.blocks.{i}.attention_norm.bias",
    "[model.]layers.{i}.post_attention_layernorm.weight": "decoder.blocks.{i}.mlp_norm.offset",
    "[model.]layers.{i}.post_attention_layernorm.bias": "decoder.blocks.{i}.mlp_norm.bias",
    **ATTENTION,
    "[model.]layers.{i}.mlp.up_proj.{p}": "decoder.blocks.{i}.mlp.up.{p}",
    "[model.]layers.{i}.mlp.down_proj.{p}": "decoder.blocks.{i}.mlp.down.{p}",
}
"""nvidia/Minitron-4B-Base."""

CLIP: dict[str, str] = {
    "[vision_model.]embeddings.class_embedding": "vision.class_token",
    "[vision_model.]embeddings.patch_embedding.{p}": "vision.patch.{p}",
    "[vision_model.]embeddings.position_embedding.weight": "vision.positions",
    "[vision_model.]pre_layrnorm.{p}": "vision.pre_norm.{p}",
    "[vision_model.]encoder.layers.{i}.layer_norm1.{p}": "vision.blocks.{i}.attention_norm.{p}",
    "[vision_model.]encoder.layers.{i}.self_attn.q_proj.{p}": "vision.blocks.{i}.attention.q.{p}",
    "[vision_model.]encoder.layers.{i}.self_attn.k_proj.{p}": "vision.blocks.{i}.attention.k.{p}",
    "[vision_model.]encoder.layers.{i}.self_attn.v_proj.{p}": "vision.blocks.{i}.attention.v.{p}",
    "[vision_model.]encoder.layers.{i}.self_attn.out_proj.{p}": "vision.blocks.{i}.attention.out.{p}",
    "[vision_model.]encoder.layers.{i}.layer_norm2.{p}": "vision.blocks.{i}.mlp_norm.{p}",
    "[vision_model.]encoder.layers.{i}.mlp.fc1.{p}": "vision.blocks.{i}.mlp.up.{p}",
    "[vision_model.]encoder.layers.{i}.mlp.fc2.{p}": "vision.blocks.{i}.mlp.down.{p}",
    "[vision_model.]post_layernorm.{p}": "-",
    "[vision_model.]head.{*}": "-",
    "[vision_model.]embeddings.position_ids": "-",
}
"""openai/clip-vit-large-patch14-336; google/siglip-so400m-patch14-384, which has no class token and no pre-norm."""

INTERN_VIT: dict[str, str] = {
    "embeddings.class_embedding^2": "vision.class_token",
    "embeddings.patch_embedding.{p}": "vision.patch.{p}",
    "embeddings.position_embedding^1": "vision.positions",
    "encoder.layers.{i}.norm1.{p}": "vision.blocks.{i}.attention_norm.{p}",
    "encoder.layers.{i}.attn.qkv.{p}": "vision.blocks.{i}.attention.{q|k|v}.{p}",
    "encoder.layers.{i}.attn.q_norm.weight": "vision.blocks.{i}.attention.q_norm.weight",
    "encoder.layers.{i}.attn.k_norm.weight": "vision.blocks.{i}.attention.k_norm.weight",
    "encoder.layers.{i}.attn.proj.{p}": "vision.blocks.{i}.attention.out.{p}",
    "encoder.layers.{i}.ls1": "vision.blocks.{i}.attention_scale",
    "encoder.layers.{i}.norm2.{p}": "vision.blocks.{i}.mlp_norm.{p}",
    "encoder.layers.{i}.mlp.fc1.{p}": "vision.blocks.{i}.mlp.up.{p}",
    "encoder.layers.{i}.mlp.fc2.{p}": "vision.blocks.{i}.mlp.down.{p}",
    "encoder.layers.{i}.ls2": "vision.blocks.{i}.mlp_scale",
}
"""OpenGVLab/InternViT-6B-448px-V1-5 and InternViT-300M-448px-V2_5."""

INTERNVL_VISION: dict[str, str] = {
    "embeddings.cls_token^2": "vision.class_token",
    "embeddings.patch_embeddings.projection.{p}": "vision.patch.{p}",
    "embeddings.position_embeddings^1": "vision.positions",
    "encoder.layer.{i}.layernorm_before.{p}": "vision.blocks.{i}.attention_norm.{p}",
    "encoder.layer.{i}.attention.q_proj.{p}": "vision.blocks.{i}.attention.q.{p}",
    "encoder.layer.{i}.attention.k_proj.{p}": "vision.blocks.{i}.attention.k.{p}",
    "encoder.layer.{i}.attention.v_proj.{p}": "vision.blocks.{i}.attention.v.{p}",
    "encoder.layer.{i}.attention.q_norm.weight": "vision.blocks.{i}.attention.q_norm.weight",
    "encoder.layer.{i}.attention.k_norm.weight": "vision.blocks.{i}.attention.k_norm.weight",
    "encoder.layer.{i}.attention.projection_layer.{p}": "vision.blocks.{i}.attention.out.{p}",
    "encoder.layer.{i}.lambda_1": "vision.blocks.{i}.attention_scale",
    "encoder.layer.{i}.layernorm_after.{p}": "vision.blocks.{i}.mlp_norm.{p}",
    "encoder.layer.{i}.mlp.fc1.{p}": "vision.blocks.{i}.mlp.up.{p}",
    "encoder.layer.{i}.mlp.fc2.{p}": "vision.blocks.{i}.mlp.down.{p}",
    "encoder.layer.{i}.lambda_2": "vision.blocks.{i}.mlp_scale",
    "layernorm.{p}": "-",
    "embeddings.mask_token": "-",
}
"""transformers' own port of InternViT, OpenGVLab/InternVL3-1B-hf."""

HF_VISION: dict[str, str] = {"{*}": "vision.model.{*}"}
"""A transformers model that runs as it is: `{*}` is any name."""

LLAVA_PROJECTOR: dict[str, str] = {
    "multi_modal_projector.linear_1.{p}": "projector.0.{p}",
    "multi_modal_projector.linear_2.{p}": "projector.2.{p}",
    "image_newline": "image_newline",
}
"""llava-hf/llava-1.5-7b-hf; the newline is llava-hf/llava-v1.6-mistral-7b-hf's."""

ORIGINAL_PROJECTOR: dict[str, str] = {
    "model.mm_projector.{n}.{p}": "projector.{n}.{p}",
    "model.mm_projector.{p}": "projector.0.{p}",
}
"""liuhaotian/llava-v1.5-7b; the second line is the linear projector of liuhaotian/LLaVA-7b-v0."""

PROJECTOR_ALONE: dict[str, str] = {
    "[model.]mm_projector.{n}.{p}": "projector.{n}.{p}",
    "[model.]mm_projector.{p}": "projector.0.{p}",
    "[model.]image_newline": "image_newline",
    "[model.]image_vectors": "image_vectors",
}
"""A projector in a file of its own: LLaVA's mm_projector.bin, and ours. The vectors of start and
end are ours alone."""

NVLM_PROJECTOR: dict[str, str] = {
    "mlp1.0.{p}": "projector.0.{p}",
    "mlp1.1.weight": "projector.1.weight",
    "mlp1.3.weight": "projector.3.weight",
}
"""nvidia/NVLM-D-72B."""

TOWER = re.compile(r"model\.vision_tower\.(vision_tower\.)?")
"""How the names of an encoder begin in LLaVA's own layout; it is in the file where it was tuned."""

UNUSED = (r"(.*\.)?rotary_emb\.inv_freq", r"(visual|text)_projection\.weight", r"text_model\..*", r"logit_(scale|bias)")
"""Patterns of more tensors that our models do not compute: old buffers, and the text tower of a CLIP."""

ALIASES = (
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.vision_tower\.", "vision_tower."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"model\.image_newline", "image_newline"),
    (r"lm_head\.", "language_model.lm_head."),
)
"""Beginnings of names as transformers holds a LLaVA in memory, and some trainers save it -> those of the tables."""


def prefixed(table: Mapping[str, str], prefix: str) -> dict[str, str]:
    """A table whose checkpoint names begin with `prefix`."""
    return {prefix + theirs: ours for theirs, ours in table.items()}


def llava_table(decoder: Mapping[str, str], vision: Mapping[str, str]) -> dict[str, str]:
    """The layout of transformers' LLaVA around a decoder's and an encoder's. Inside it `model.` of a decoder is no option."""
    inside = {theirs.replace("[model.]", "model."): ours for theirs, ours in decoder.items()}
    return {**prefixed(inside, "language_model."), **prefixed(vision, "vision_tower."), **LLAVA_PROJECTOR}


def nvlm_table(decoder: Mapping[str, str]) -> dict[str, str]:
    """The layout of nvidia/NVLM-D-72B around a decoder's."""
    inside = {theirs.replace("[model.]", "model."): ours for theirs, ours in decoder.items()}
    return {**prefixed(inside, "language_model."), **prefixed(INTERN_VIT, "vision_model."), **NVLM_PROJECTOR}


def original_table(decoder: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The layout of LLaVA's own repository around a decoder's, without an encoder (`TOWER`)."""
    return {**decoder, **one_spelling(ORIGINAL_PROJECTOR, numbered=is_numbered(names))}


def is_numbered(names: Iterable[str]) -> bool:
    """Do the layers of LLaVA's projector have numbers among these names? A linear one has none."""
    return any(re.search(r"mm_projector\.\d+\.", name) for name in names)


def one_spelling(table: Mapping[str, str], *, numbered: bool) -> dict[str, str]:
    """A table with one of LLaVA's two spellings of a projector: for one of ours it must name one of
    theirs."""
    dropped = "mm_projector.{p}" if numbered else "mm_projector.{n}.{p}"
    return {theirs: ours for theirs, ours in table.items() if not theirs.endswith(dropped)}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The tensors of theirs that one of ours is made of."""

    theirs: tuple[str, ...]
    """Names as the table spells them; several only where they are stacked."""
    stacked: bool = False
    """Is ours a stack of theirs, an expert each?"""
    part: tuple[int, int] | None = None
    """(k, n): ours is rows k of n equal parts of theirs."""
    leading: int = 0
    """Leading dimensions of 1 that theirs has."""

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """Ours, of theirs."""
        x = torch.stack(tensors) if self.stacked else tensors[0]
        if self.leading:
            x = x.reshape(x.shape[self.leading :])
        return x.chunk(self.part[1])[self.part[0]] if self.part else x


@cache
def _compiled(side: str) -> re.Pattern[str]:
    """One side's spelling as a regular expression."""
    parts = {
        r"\{i\}": r"(?P<i>\d+)", r"\{n\}": r"(?P<n>\d+)", r"\{e\}": r"(?P<e>\d+)", r"\{p\}": "(?P<p>weight|bias)",
        r"\{\*\}": "(?P<any>.+)", r"\[": "(?:", r"\]": ")?",
    }  # fmt: skip
    pattern = re.escape(re.sub(r"\^\d$", "", side))
    for written, meant in parts.items():
        pattern = pattern.replace(written, meant)
    return re.compile(re.sub(r"\\\{([a-z\\|]+)\\\}", lambda match: f"(?P<part>{match[1].replace(chr(92), '')})", pattern))


def _filled(side: str, groups: Mapping[str, str]) -> str:
    """A spelling with its fields filled in, optional parts written."""
    text = re.sub(r"\^\d$", "", side).replace("{*}", groups.get("any") or "").replace("[", "").replace("]", "")
    return re.sub(r"\{([a-z])\}", lambda match: groups[match[1]], text)


def origin(name: str, table: Mapping[str, str], *, experts: int = 0) -> Origin | None:
    """What the tensor `name` of ours is made of, or None where the table does not know it.

    origin("decoder.blocks.3.mlp.up.weight", LLAMA).theirs == ("model.layers.3.mlp.up_proj.weight",)
    """
    for theirs, ours in table.items():
        match = _compiled(ours).fullmatch(name)
        if not match:
            continue
        groups = match.groupdict()
        parts = re.search(r"\{([a-z]+(?:\|[a-z]+)+)\}", ours)
        leading = re.search(r"\^(\d)$", theirs)
        order = parts[1].split("|") if parts else []
        return Origin(
            theirs=tuple(_filled(theirs, {**groups, "e": str(e)}) for e in range(experts if "{e}" in theirs else 1)),
            stacked="{e}" in theirs,
            part=(order.index(groups["part"]), len(order)) if parts else None,
            leading=int(leading[1]) if leading else 0,
        )
    return None


def default_names(names: Iterable[str], table: Mapping[str, str], *, aliases: bool = False) -> dict[str, str]:
    """Default spelling -> the name on disk, for the names that the table knows, however they are spelled.

    `aliases` also takes the names of a LLaVA in transformers' memory.
    """
    found = {}
    for name in names:
        asked = name
        for beginning, instead in ALIASES if aliases else ():
            if re.match(beginning, name) and not name.startswith("language_model."):
                asked = re.sub("^" + beginning, instead, name)
                break
        for theirs in table:
            match = _compiled(theirs).fullmatch(asked)
            if match:
                found[_filled(theirs, match.groupdict())] = name
                break
    return found


def ours_of(name: str, table: Mapping[str, str]) -> str:
    """Our name of a tensor in the default spelling of theirs, `{a|b|c}` and the like as the table writes it; empty if unknown."""
    for theirs, ours in table.items():
        match = _compiled(theirs).fullmatch(name)
        if match:
            for field, value in match.groupdict().items():
                ours = ours.replace(f"{{{field}}}", value)
            return ours
    return ""


def to_theirs(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of ours under the default spelling of theirs. ValueError for one that the table does not know.

    The parts of one of their tensors must be given together.
    """
    pieces: dict[str, dict[int, Tensor]] = {}
    done: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        made = origin(name, table, experts=tensor.shape[0] if tensor.ndim == 3 else 0)
        if made is None:
            raise ValueError(f"{name} has no place in this format")
        if made.part:
            pieces.setdefault(made.theirs[0], {})[made.part[0]] = tensor
            if len(pieces[made.theirs[0]]) == made.part[1]:
                tensor = torch.cat([part for _, part in sorted(pieces.pop(made.theirs[0]).items())])
            else:
                continue
        if made.stacked:
            done |= dict(zip(made.theirs, tensor, strict=True))
        else:
            done[made.theirs[0]] = tensor.reshape((1,) * made.leading + tuple(tensor.shape))
    assert not pieces, f"only a part of {sorted(pieces)} was given"
    return done
