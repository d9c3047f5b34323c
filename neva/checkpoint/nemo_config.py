"""NeMo's configs -> ours: language models, NeVA, CLIP, and NeMo 2's words for them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from neva.models.decoder import DecoderConfig
from neva.models.layers import RopeScaling
from neva.models.vit import VisionConfig
from neva.models.vlm import ImageConfig, VLMConfig

T = TypeVar("T")
TEMPLATES = {"nvgpt": "nv_steerlm", "llama_2": "llama_2", "llama_3": "llama_3", "v1": "v1", "mistral": "mistral"}
"""`mm_cfg.llm.model_type` -> our chat format; NeMo writes SteerLM's labels for `nvgpt` too (neva_dataset.py:preprocess_nvgpt)."""
PROJECTORS = {"linear": "linear", "mlp2x_gelu": "mlp2x_gelu", "mlp_downsample": "norm_mlp2x_gelu"}
"""`mm_cfg.mm_mlp_adapter_type` -> our projector."""
ACTIVATIONS = {
    "fast-swiglu": "swiglu", "swiglu": "swiglu", "fast-geglu": "geglu", "geglu": "geglu", "squared-relu": "squared_relu", "gelu": "gelu",
}  # fmt: skip
NORMS = {"layernorm": "layernorm", "low_precision_layernorm": "layernorm", "layernorm1p": "layernorm1p", "rmsnorm": "rmsnorm"}
POSITIONS = {"rope": "rotary", "learned_absolute": "learned"}
DEFAULTS: Mapping[str, Any] = {
    "normalization": "layernorm", "layernorm_epsilon": 1e-5, "activation": "gelu", "openai_gelu": False, "bias_activation_fusion": True,
    "bias": True, "qkv_bias": False, "position_embedding_type": "learned_absolute", "rotary_base": 10000, "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": True, "hidden_dropout": 0.1, "attention_dropout": 0.1, "ffn_dropout": 0.0, "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.0, "moe_router_load_balancing_type": "aux_loss",
    "transformer_block_type": "pre_ln", "normalize_attention_scores": True, "headscale": False,
    "multi_query_attention": False, "padded_vocab_size": 32000,
}  # fmt: skip
"""What NeMo's models take for a key that is null or not there; the vocabulary's size, which they have of the tokenizer, is Llama-2's."""
MOST = 2**24
"""No size of a model is larger; torch cannot even describe much larger ones."""


def number(value: Any, least: float = -math.inf) -> float:
    """A finite number, also one that stands as text. ValueError for anything else."""
    try:
        read = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        read = math.nan
    if not math.isfinite(read):
        raise ValueError(f"{value!r} is not a number")
    if read < least:
        raise ValueError(f"{value!r} is less than {least}")
    return read


def amount(value: Any) -> float:
    return number(value, 0.0)


def whole(value: Any, least: int = 0, most: int = 2**62) -> int:
    """A whole number, also one that stands as text. ValueError for anything else."""
    exact = isinstance(value, int) and not isinstance(value, bool)  # a float would round large ones
    read = value if exact else number(value)
    if read != int(read) or not least <= read <= most:
        raise ValueError(f"{value!r} is not a whole number of at least {least}{f' and at most {most}' if most < 2**62 else ''}")
    return int(read)


def size(value: Any) -> int:
    return whole(value, 1, MOST)


def flag(value: Any) -> bool:
    """True or false, also as text, which the environment gives. ValueError for anything else."""
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, dict | list) or str(value).lower() not in known:
        raise ValueError(f"{value!r} is neither true nor false")
    return known[str(value).lower()]


def square(value: Any) -> int:
    """The side of `[height, width]`, which must be equal, or of one number."""
    sides = [size(side) for side in (value if isinstance(value, list | tuple) else [value, value])]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(f"{value!r} is no square, [side, side]; neva's encoders see squares")
    return sides[0]


def window(value: Any) -> int:
    """Ours from Transformer Engine's `[left, right]`, tokens on either side of a token, -1 for all."""
    sides = [whole(side, -1) for side in value] if isinstance(value, list | tuple) else []
    if len(sides) != 2 or sides[1] > 0:
        raise ValueError(f"{value!r} is no window of a causal model, [tokens before, 0]")
    return sides[0] + 1


def read(c: Mapping[str, Any], key: str, kind: Callable[[Any], T]) -> T:
    """A key's value as `kind` reads it. ValueError with the key's name."""
    if key not in c:
        raise ValueError(f"the config lacks {key}, without which there is no model")
    try:
        return kind(c[key])
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def section(c: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The keys below a key; none where it is null or not there. ValueError where it is no mapping."""
    found = c.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{name}: {found!r} is no mapping of keys")
    return {key: value for key, value in (found or {}).items() if value is not None}


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Ours from a NeMo language model's config. ValueError for a mechanism that we do not compute, and for a value that is none."""
    c = {**DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    kind, norm, position = str(c["activation"]), str(c["normalization"]).lower(), str(c["position_embedding_type"])
    experts = read(c, "num_moe_experts", whole) if "num_moe_experts" in c else 0
    balancing = str(c["moe_router_load_balancing_type"])
    refused = {
        "moe_router_load_balancing_type": not experts or balancing in ("aux_loss", "none"),
        "activation": kind in ACTIVATIONS, "normalization": norm in NORMS, "position_embedding_type": position in POSITIONS,
        "transformer_block_type": c["transformer_block_type"] == "pre_ln", "headscale": not read(c, "headscale", flag),
        "multi_query_attention": not read(c, "multi_query_attention", flag),
        "normalize_attention_scores": read(c, "normalize_attention_scores", flag),
    }  # fmt: skip
    if wrong := [f"{name}={c[name]!r}" for name, fine in refused.items() if not fine]:
        raise ValueError(f"NeMo's config says {', '.join(wrong)}, which neva does not compute")
    width, heads, bias = read(c, "hidden_size", size), read(c, "num_attention_heads", size), read(c, "bias", flag)
    head = read(c, "kv_channels", size) if "kv_channels" in c else None
    factor = read(c, "seq_len_interpolation_factor", number) if "seq_len_interpolation_factor" in c else None
    if factor is not None and factor <= 0:
        raise ValueError(f"seq_len_interpolation_factor: {factor} must be more than 0")
    layers = read(c, "num_layers", size)
    chosen = read(c, "moe_router_topk", size)
    # Megatron adds up the layers' balance losses, each divided by the experts of a token.
    # Ours is the mean over layers.
    balance = read(c, "moe_aux_loss_coeff", amount) * layers / chosen
    if balancing == "none":
        balance = 0.0
    return DecoderConfig(
        vocab=read(c, "override_vocab_size" if "override_vocab_size" in c else "padded_vocab_size", size),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=read(c, "num_query_groups", size) if "num_query_groups" in c else heads,
        ffn=read(c, "ffn_hidden_size", size) if "ffn_hidden_size" in c else 4 * width,
        head_width=head if head is not None and head * heads != width else None,
        norm=NORMS[norm],  # type: ignore[arg-type]
        eps=read(c, "layernorm_epsilon", amount),
        mlp="gelu_tanh" if kind == "gelu" and tanh_gelu(c) else ACTIVATIONS[kind],  # type: ignore[arg-type]
        qkv_bias=bias or read(c, "qkv_bias", flag),
        out_bias=bias,
        mlp_bias=bias,
        positions=POSITIONS[position],  # type: ignore[arg-type]
        rope_theta=read(c, "rotary_base", lambda value: number(value, 1.0)),
        rotary_fraction=read(c, "rotary_percentage", number) if position == "rope" else 1.0,
        rope_scaling=RopeScaling(kind="linear", factor=factor) if factor is not None else None,
        window=read(c, "window_size", window) if "window_size" in c else 0,
        max_positions=read(c, "max_position_embeddings" if "max_position_embeddings" in c else "encoder_seq_length", size),
        tied=read(c, "share_embeddings_and_output_weights", flag),
        experts=experts,
        active_experts=chosen,
        balance=balance,
        embedding_dropout=read(c, "hidden_dropout", amount),
        hidden_dropout=read(c, "hidden_dropout", amount),
        attention_dropout=read(c, "attention_dropout", amount),
        ffn_dropout=read(c, "ffn_dropout", amount),
    )


def tanh_gelu(c: Mapping[str, Any]) -> bool:
    """Is GELU its tanh approximation? OpenAI's is, and so is Megatron's fusion of bias and GELU."""
    return read(c, "openai_gelu", flag) or (read(c, "bias", flag) and read(c, "bias_activation_fusion", flag))


def llm(c: Mapping[str, Any]) -> Mapping[str, Any]:
    return section(section(c, "mm_cfg"), "llm")


def aspect(word: Any, vision: VisionConfig) -> Literal["square", "pad", "crop"]:
    """Ours of `image_aspect_ratio`: `square` is what the encoder's own processor does, CLIP's crops and SigLIP's squashes. ValueError for others."""
    words: dict[str, Literal["square", "pad", "crop"]] = {"square": "crop" if vision.class_token else "square", "pad": "pad"}
    if str(word) not in words:
        raise ValueError(f"image_aspect_ratio={word!r} is not built; there are square and pad")
    return words[str(word)]


def vlm_config(c: Mapping[str, Any], decoder: DecoderConfig) -> VLMConfig:
    """Ours from a NeVA's config. Its encoder is a guess by the sizes that NeMo names: the real one comes from its own folder."""
    mm = section(c, "mm_cfg")
    seen, kind = section(mm, "vision_encoder"), str(mm.get("mm_mlp_adapter_type", "linear"))
    if kind not in PROJECTORS:
        raise ValueError(f"NeMo's config says mm_mlp_adapter_type={kind!r}; there are {', '.join(PROJECTORS)}")
    if mm.get("use_lita") or mm.get("use_im_start_end"):
        raise ValueError("NeMo's config says use_lita or use_im_start_end, whose tokens NeMo takes from its own tokenizer; they cannot be imported")
    seen = {"crop_size": 224, "patch_dim": 14, "hidden_size": 1024, "vision_select_layer": -2, "vision_select_feature": "patch", **seen}
    if seen["vision_select_feature"] not in ("patch", "cls_patch"):
        raise ValueError(f"vision_select_feature: {seen['vision_select_feature']!r} is neither patch nor cls_patch")
    width = read(seen, "hidden_size", size)
    vision = VisionConfig(
        image=read(seen, "crop_size", square), patch=read(seen, "patch_dim", size), width=width, layers=24, heads=16, ffn=4 * width,
        select_layer=read(seen, "vision_select_layer", lambda value: whole(value, -MOST)), feature=seen["vision_select_feature"],
    )  # fmt: skip
    return VLMConfig(
        decoder=decoder, vision=vision, projector=PROJECTORS[kind], pixel_shuffle="v1" if kind == "mlp_downsample" else "none",
        image=ImageConfig(aspect=aspect(section(c, "data").get("image_aspect_ratio", "square"), vision)),
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
        "bias": c.get("add_bias_linear") or False,
        "qkv_bias": c.get("add_qkv_bias") or False,
        "encoder_seq_length": c.get("seq_length", 4096),
        "share_embeddings_and_output_weights": c.get("share_embeddings_and_output_weights", False),
        "bias_activation_fusion": False,
        **{name: c.get(name) or 0.0 for name in ("hidden_dropout", "attention_dropout")},  # its model classes say 0 where its folder is silent
    }


def clip_config(v: Mapping[str, Any]) -> VisionConfig:
    """Ours from the `vision` part of a NeMo CLIP's config. ValueError for more class tokens than one."""
    if v.get("class_token_length") not in (None, 1):
        raise ValueError(f"NeMo's config says class_token_length={v['class_token_length']}; neva's encoders have one class token")
    kinds: dict[str, Literal["quick_gelu", "gelu"]] = {"quick-gelu": "quick_gelu", "gelu": "gelu"}
    kind = str(v.get("activation", "quick-gelu"))
    if kind not in kinds:
        raise ValueError(f"NeMo's config says activation={kind!r}; there are {', '.join(kinds)}")
    width = read(v, "hidden_size", size)
    return VisionConfig(
        image=square([v.get("img_h"), v.get("img_w", v.get("img_h"))]), patch=read(v, "patch_dim", size), width=width,
        layers=read(v, "num_layers", size), heads=read(v, "num_attention_heads", size), activation=kinds[kind],
        ffn=read(v, "ffn_hidden_size", size) if v.get("ffn_hidden_size") else 4 * width, eps=number(v.get("layernorm_epsilon", 1e-5)),
    )  # fmt: skip
