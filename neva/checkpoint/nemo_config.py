"""NeMo's configs -> ours: language models, NeVA, CLIP, and NeMo 2's words for them."""

from collections.abc import Mapping
from typing import Any

from neva.models.decoder import DecoderConfig
from neva.models.layers import RopeScaling
from neva.models.vit import VisionConfig
from neva.models.vlm import ImageConfig, VLMConfig

TEMPLATES = {"nvgpt": "nvgpt", "llama_2": "llama_2", "llama_3": "llama_3", "v1": "v1", "mistral": "mistral"}
"""`mm_cfg.llm.model_type` -> our chat format."""
PROJECTORS = {"linear": "linear", "mlp2x_gelu": "mlp2x_gelu", "mlp_downsample": "norm_mlp2x_gelu"}
"""`mm_cfg.mm_mlp_adapter_type` -> our projector."""


def decoder_config(c: Mapping[str, Any]) -> DecoderConfig:
    """Ours from a NeMo language model's config. ValueError for a mechanism that we do not compute."""
    activations = {"fast-swiglu": "swiglu", "swiglu": "swiglu", "fast-geglu": "geglu", "geglu": "geglu", "squared-relu": "squared_relu"}
    kind, bias = c.get("activation", "gelu"), c.get("bias", True)
    if kind == "gelu":  # Megatron's fusion of bias and GELU is the tanh approximation
        activations["gelu"] = "gelu_tanh" if c.get("openai_gelu") or (bias and c.get("bias_activation_fusion", True)) else "gelu"
    norms = {"layernorm": "layernorm", "low_precision_layernorm": "layernorm", "layernorm1p": "layernorm1p", "rmsnorm": "rmsnorm"}
    norm, position = c.get("normalization", "layernorm1p"), c.get("position_embedding_type", "learned_absolute")
    refused = {
        "activation": (kind, kind in activations), "normalization": (norm, norm in norms),
        "position_embedding_type": (position, position in ("rope", "learned_absolute")),
        "transformer_block_type": (c.get("transformer_block_type"), c.get("transformer_block_type", "pre_ln") == "pre_ln"),
        "headscale": (c.get("headscale"), not c.get("headscale")),
        "multi_query_attention": (c.get("multi_query_attention"), not c.get("multi_query_attention")),
        "kv_channels": (c.get("kv_channels"), True),
    }  # fmt: skip
    if wrong := [f"{name}={value!r}" for name, (value, fine) in refused.items() if not fine]:
        raise ValueError(f"model_config.yaml says {', '.join(wrong)}, which neva does not compute")
    window = c.get("window_size")
    factor = c.get("seq_len_interpolation_factor")
    heads = c["num_attention_heads"]
    return DecoderConfig(
        vocab=c.get("padded_vocab_size", 32000),
        width=c["hidden_size"],
        layers=c["num_layers"],
        heads=heads,
        kv_heads=c.get("num_query_groups") or heads,
        ffn=c["ffn_hidden_size"],
        head_width=c.get("kv_channels") if c.get("kv_channels") and c["kv_channels"] * heads != c["hidden_size"] else None,
        norm=norms[norm],  # type: ignore[arg-type]
        eps=float(c.get("layernorm_epsilon", 1e-5)),
        mlp=activations[kind],  # type: ignore[arg-type]
        qkv_bias=bool(bias or c.get("qkv_bias")),
        out_bias=bool(bias),
        mlp_bias=bool(bias),
        positions="rotary" if position == "rope" else "learned",
        rope_theta=float(c.get("rotary_base", 10000)),
        rotary_fraction=float(c.get("rotary_percentage", 1.0)) if position == "rope" else 1.0,
        rope_scaling=RopeScaling(kind="linear", factor=float(factor)) if factor else None,
        window=(window[0] + 1 if window else 0),
        max_positions=c.get("max_position_embeddings") or c["encoder_seq_length"],
        tied=bool(c.get("share_embeddings_and_output_weights", True)),
        experts=c.get("num_moe_experts") or 0,
        active_experts=c.get("moe_router_topk", 2),
        balance=float(c.get("moe_aux_loss_coeff") or 0.0),
        embedding_dropout=float(c.get("hidden_dropout", 0.0)),
        hidden_dropout=float(c.get("hidden_dropout", 0.0)),
        attention_dropout=float(c.get("attention_dropout", 0.0)),
        ffn_dropout=float(c.get("ffn_dropout", 0.0)),
    )


def llm(c: Mapping[str, Any]) -> Mapping[str, Any]:
    return c.get("mm_cfg", {}).get("llm", {})


def vlm_config(c: Mapping[str, Any], decoder: DecoderConfig) -> VLMConfig:
    mm = c["mm_cfg"]
    seen, kind = mm["vision_encoder"], mm.get("mm_mlp_adapter_type", "linear")
    if kind not in PROJECTORS:
        raise ValueError(f"model_config.yaml says mm_mlp_adapter_type={kind!r}; there are {', '.join(PROJECTORS)}")
    if mm.get("use_lita") or mm.get("use_im_start_end"):
        raise ValueError(
            "model_config.yaml says use_lita or use_im_start_end, whose tokens NeMo takes from its own tokenizer; they cannot be imported"
        )
    crop = seen.get("crop_size", [224, 224])
    width = seen.get("hidden_size", 1024)
    vision = VisionConfig(
        image=crop[0], patch=seen.get("patch_dim", 14), width=width, layers=24, heads=16, ffn=4 * width,
        select_layer=seen.get("vision_select_layer", -2), feature="cls_patch" if seen.get("vision_select_feature") == "cls_patch" else "patch",
    )  # fmt: skip
    aspects = {"square": "crop", "pad": "pad"}
    aspect = c.get("data", {}).get("image_aspect_ratio", "square")
    return VLMConfig(
        decoder=decoder, vision=vision, projector=PROJECTORS[kind], pixel_shuffle="v1" if kind == "mlp_downsample" else "none",
        image=ImageConfig(aspect=aspects.get(aspect, "pad")),  # type: ignore[arg-type]
    )  # fmt: skip


def of_nemo2(config: Mapping[str, Any]) -> dict[str, Any]:
    """A NeMo 2 model config in NeMo 1's words."""
    c = {name: value for name, value in config.items() if name != "_target_"}
    language = c.get("language_transformer_config")
    if language:
        raise ValueError("a NeMo 2 folder of a VLM: import its language model with --decoder, its encoder with --vision")
    activation = (
        str((c.get("activation_func") or {}).get("_target_", "")) if isinstance(c.get("activation_func"), dict) else str(c.get("activation_func"))
    )
    kind = "squared-relu" if "squared_relu" in activation or "relu" in activation else "swiglu" if c.get("gated_linear_unit") else "gelu"
    norm = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm1p" if c.get("layernorm_zero_centered_gamma") else "layernorm"}
    return {
        **c,
        "activation": kind,
        "normalization": norm[c.get("normalization", "LayerNorm")],
        "position_embedding_type": c.get("position_embedding_type", "rope"),
        "rotary_percentage": c.get("rotary_percent", 1.0),
        "bias": c.get("add_bias_linear", False),
        "qkv_bias": c.get("add_qkv_bias", False),
        "encoder_seq_length": c.get("seq_length", 4096),
        "share_embeddings_and_output_weights": c.get("share_embeddings_and_output_weights", False),
        "bias_activation_fusion": False,
    }


def clip_config(v: Mapping[str, Any]) -> VisionConfig:
    """Ours from the `vision` part of a NeMo CLIP's config."""
    return VisionConfig(
        image=v["img_h"], patch=v["patch_dim"], width=v["hidden_size"], layers=v["num_layers"], heads=v["num_attention_heads"],
        ffn=v.get("ffn_hidden_size") or 4 * v["hidden_size"], eps=float(v.get("layernorm_epsilon", 1e-5)),
        activation="quick_gelu" if v.get("activation", "quick-gelu") == "quick-gelu" else "gelu",
    )  # fmt: skip
