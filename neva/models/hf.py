"""Hugging Face checkpoints <-> ours: per family one key table, read in both directions.

`{i}` stands for a layer number, `{p}` for weight or bias; `[...]` is a part of a name that a checkpoint may lack and that we write: transformers 5
dropped it, the published files and vLLM have it. Tables speak of the names on disk, not of those in transformers' memory.
Source of the layouts: the config.json and safetensors of meta-llama, openai/clip-vit-large-patch14-336 and llava-hf/llava-1.5-7b-hf.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from neva.models.decoder import DecoderConfig
from neva.models.vit import Feature, VisionConfig
from neva.models.vlm import VLMConfig

LLAMA: dict[str, str] = {
    "model.embed_tokens.weight": "decoder.embed.weight",
    "model.layers.{i}.input_layernorm.weight": "decoder.blocks.{i}.attention_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "decoder.blocks.{i}.attention.q.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "decoder.blocks.{i}.attention.k.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "decoder.blocks.{i}.attention.v.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "decoder.blocks.{i}.attention.out.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "decoder.blocks.{i}.mlp_norm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "decoder.blocks.{i}.mlp.gate.weight",
    "model.layers.{i}.mlp.up_proj.weight": "decoder.blocks.{i}.mlp.up.weight",
    "model.layers.{i}.mlp.down_proj.weight": "decoder.blocks.{i}.mlp.down.weight",
    "model.norm.weight": "head.norm.weight",
    "lm_head.weight": "head.weight",
}

CLIP: dict[str, str] = {
    "[vision_model.]embeddings.class_embedding": "vision.class_token",
    "[vision_model.]embeddings.patch_embedding.weight": "vision.patch.weight",
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
}

LLAVA: dict[str, str] = {
    **{f"language_model.{theirs}": ours for theirs, ours in LLAMA.items()},
    **{f"vision_tower.{theirs}": ours for theirs, ours in CLIP.items()},
    "multi_modal_projector.linear_1.{p}": "projector.0.{p}",
    "multi_modal_projector.linear_2.{p}": "projector.2.{p}",
}


def _pattern(spelling: str) -> str:
    """A table's spelling as a regular expression."""
    parts = {r"\{i\}": r"(?P<i>\d+)", r"\{p\}": "(?P<p>weight|bias)", r"\[": "(?:", r"\]": ")?"}
    pattern = re.escape(spelling)
    for written, meant in parts.items():
        pattern = pattern.replace(written, meant)
    return pattern


def rename(name: str, table: Mapping[str, str], *, back: bool = False) -> str | None:
    """The other side's name of a parameter, or None where the table has none; `back` goes from ours to theirs.

    rename("model.layers.3.mlp.up_proj.weight", LLAMA) == "decoder.blocks.3.mlp.up.weight"
    """
    for theirs, ours in table.items():
        source, target = (ours, theirs) if back else (theirs, ours)
        match = re.fullmatch(_pattern(source), name)
        if match:
            return target.replace("[", "").replace("]", "").format(**match.groupdict())
    return None


def convert(state: Mapping[str, Tensor], table: Mapping[str, str], *, back: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict under the other side's names, and the names that the table does not know."""
    renamed = {name: rename(name, table, back=back) for name in state}
    return {new: state[name] for name, new in renamed.items() if new is not None}, [name for name, new in renamed.items() if new is None]


LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""What transformers means by a field that a config.json leaves out, as llava-1.5-7b-hf does with nearly all of them."""

CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

LLAVA_DEFAULTS = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}

FEATURES: dict[str, Feature] = {"default": "patch", "full": "cls_patch"}
"""transformers' strategy -> ours."""


def _must(config: Mapping, **legal: object) -> None:
    """ValueError where a field says something that our model does not compute."""
    for name, value in legal.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json says {name}={config[name]!r}, which this model does not compute; only {value!r} can be imported.")


def decoder_config(config: Mapping) -> DecoderConfig:
    """Ours from the config.json of a Llama. ValueError for a mechanism that we do not compute."""
    c = {**LLAMA_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    _must(c, model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
    _must({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, rope_type="default")
    return DecoderConfig(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
        ffn=c["intermediate_size"],
        head_width=c.get("head_dim"),
        eps=c["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", c["rope_theta"]),
        max_positions=c["max_position_embeddings"],
        tied=c.get("tie_word_embeddings", False),
    )


def vision_config(config: Mapping, *, select_layer: int = -2, feature: Feature = "patch") -> VisionConfig:
    """Ours from the config.json of a CLIP vision model, or of a whole CLIP."""
    c = {**CLIP_DEFAULTS, **config.get("vision_config", config)}
    return VisionConfig(
        image=c["image_size"],
        patch=c["patch_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        ffn=c["intermediate_size"],
        activation=c["hidden_act"],
        eps=c["layer_norm_eps"],
        select_layer=select_layer,
        feature=feature,
    )


def llava_config(config: Mapping) -> VLMConfig:
    """Ours from the config.json of a `llava` model. ValueError for a mechanism that we do not compute."""
    c = {**LLAVA_DEFAULTS, **config}
    _must(c, projector_hidden_act="gelu", multimodal_projector_bias=True)
    _must(c["vision_config"], model_type="clip_vision_model")
    if not isinstance(c["vision_feature_layer"], int):
        raise ValueError(f"config.json says vision_feature_layer={c['vision_feature_layer']}; one layer can be read, not several joined.")
    return VLMConfig(
        decoder=decoder_config({"tie_word_embeddings": c.get("tie_word_embeddings", False), **c["text_config"]}),
        vision=vision_config(c["vision_config"], select_layer=c["vision_feature_layer"], feature=FEATURES[c["vision_feature_select_strategy"]]),
        projector="mlp2x_gelu",
    )
