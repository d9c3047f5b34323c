"""Hugging Face config.json <-> our configs: the sizes and mechanisms of a checkpoint, in both directions.

To read, a family says which of its fields mean which of ours, what its missing fields mean, and what it always does. To write,
the same is read backwards, and the result is read again: what does not come back is something that the format cannot hold.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from neva import config as tree
from neva.models import hf
from neva.models.cross import CrossConfig
from neva.models.decoder import DecoderConfig
from neva.models.layers import RopeScaling
from neva.models.vit import Feature, VisionConfig

Json = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` of transformers spells a config of ours."""

    architecture: str
    """transformers' class of the model that is exported."""
    table: Mapping[str, str]
    """Names of its tensors."""
    fields: Mapping[str, str | tuple[str, ...]]
    """Their field -> ours; a bias flag may be several of ours at once."""
    defaults: Json
    """What transformers means by a field that a config.json leaves out."""
    always: Json
    """Fields of ours that the family does not choose."""
    must: Json = field(default_factory=dict)
    """Their fields that may have one value only: others name mechanisms that we do not compute."""


SIZES: dict[str, str] = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tied",
    "attention_dropout": "attention_dropout",
}
LLAMA_SIZES: Json = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048, "tie_word_embeddings": False, "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
MISTRAL_SIZES: Json = {**LLAMA_SIZES, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}

DECODERS: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        table=hf.LLAMA,
        fields={**SIZES, "rms_norm_eps": "eps", "attention_bias": ("qkv_bias", "out_bias"), "mlp_bias": "mlp_bias"},
        defaults={**LLAMA_SIZES, "attention_bias": False, "mlp_bias": False},
        always={"norm": "rmsnorm", "mlp": "swiglu"},
        must={"hidden_act": "silu"},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        table=hf.LLAMA,
        fields={**SIZES, "rms_norm_eps": "eps", "sliding_window": "window"},
        defaults={**MISTRAL_SIZES, "sliding_window": 4096},
        always={"norm": "rmsnorm", "mlp": "swiglu"},
        must={"hidden_act": "silu"},
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        table=hf.MIXTRAL,
        fields={
            **SIZES, "rms_norm_eps": "eps", "sliding_window": "window", "num_local_experts": "experts",
            "num_experts_per_tok": "active_experts", "router_aux_loss_coef": "balance",
        },
        defaults={
            **MISTRAL_SIZES, "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        always={"norm": "rmsnorm", "mlp": "swiglu"},
        must={"hidden_act": "silu", "router_jitter_noise": 0.0},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        table=hf.LLAMA,
        fields={theirs: ours for theirs, ours in SIZES.items() if theirs != "head_dim"} | {"rms_norm_eps": "eps"},
        defaults={**LLAMA_SIZES, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768},
        always={"norm": "rmsnorm", "mlp": "swiglu", "qkv_bias": True},
        must={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "nemotron": Family(
        architecture="NemotronForCausalLM",
        table=hf.NEMOTRON,
        fields={**SIZES, "norm_eps": "eps", "attention_bias": ("qkv_bias", "out_bias"), "mlp_bias": "mlp_bias"},
        defaults={
            **LLAMA_SIZES, "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48,
            "max_position_embeddings": 4096, "norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, "hidden_act": "relu2",
            "partial_rotary_factor": 0.5,
        },
        always={"norm": "layernorm1p", "mlp": "squared_relu"},
        must={"hidden_act": "relu2"},
    ),
}  # fmt: skip

VISION_SIZES: dict[str, str] = {
    "image_size": "image", "patch_size": "patch", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "ffn", "hidden_act": "activation", "layer_norm_eps": "eps",
}  # fmt: skip
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
INTERN_SIZES: Json = {
    "image_size": 448, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "norm_type": "layer_norm",
}  # fmt: skip

VISION: dict[str, Family] = {
    "clip_vision_model": Family(
        architecture="CLIPVisionModel",
        table=hf.CLIP,
        fields=VISION_SIZES,
        defaults={
            "image_size": 224, "patch_size": 32, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        },
        always={"class_token": True, "pre_norm": True, "patch_bias": False, "norm": "layernorm", "mean": CLIP_MEAN, "std": CLIP_STD},
    ),
    "siglip_vision_model": Family(
        architecture="SiglipVisionModel",
        table=hf.CLIP,
        fields=VISION_SIZES,
        defaults={
            "image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        },
        always={"class_token": False, "pre_norm": False, "patch_bias": True, "norm": "layernorm", "mean": HALF, "std": HALF},
    ),
    "intern_vit_6b": Family(
        architecture="InternVisionModel",
        table=hf.INTERN_VIT,
        fields={**VISION_SIZES, "norm_type": "norm", "qkv_bias": "qkv_bias", "qk_normalization": "qk_norm"},
        defaults={**INTERN_SIZES, "norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True, "hidden_size": 3200,
                  "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25, "image_size": 224},
        always={"class_token": True, "pre_norm": False, "patch_bias": True, "layer_scale": True, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        must={"num_channels": 3},
    ),
    "internvl_vision": Family(
        architecture="InternVLVisionModel",
        table=hf.INTERNVL_VISION,
        fields={**VISION_SIZES, "norm_type": "norm", "attention_bias": "qkv_bias", "use_qk_norm": "qk_norm"},
        defaults={**INTERN_SIZES, "attention_bias": False, "use_qk_norm": False},
        always={"class_token": True, "pre_norm": False, "patch_bias": True, "layer_scale": True, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        must={"num_channels": 3, "use_mask_token": False, "use_absolute_position_embeddings": True},
    ),
}  # fmt: skip

WORDS = {"gelu_pytorch_tanh": "gelu_tanh", "rms_norm": "rmsnorm", "layer_norm": "layernorm"}
"""Their name of a mechanism -> ours, where they differ."""


def decoder_config(config: Json) -> DecoderConfig:
    """Ours from the config.json of a decoder. ValueError for a family or a mechanism that we do not compute."""
    family = _family(config, DECODERS)
    c = {**family.defaults, **config}
    rotary = _rotary(c)
    values = {name: value for name, value in _values(family, c).items() if not (name == "kv_heads" and value is None)}
    return _built(DecoderConfig, family, {"kv_heads": c["num_attention_heads"], **values, **rotary})


def vision_config(config: Json, *, select_layer: int = -2, feature: Feature | None = None, qkv_rows: int = 0) -> VisionConfig:
    """Ours from the config.json of a vision model, or of a whole CLIP or SigLIP. ValueError for what neither we nor transformers compute.

    `feature` is by default the patches'. `qkv_rows`, of a stored InternViT, shows heads that NVLM pads with zeros. A family that we do not
    know runs as transformers' model.
    """
    config = config.get("vision_config", config)
    feature = feature or "patch"
    if config.get("model_type") not in VISION:
        return _peer_vision(config, select_layer, feature)
    family = _family(config, VISION)
    values = _values(family, {**family.defaults, **config})
    values |= {name: _square(values[name]) for name in ("image", "patch")}
    # for its errors: what follows computes with these
    _built(VisionConfig, family, {**values, "select_layer": 0})
    head = values["width"] // values["heads"]
    if qkv_rows and qkv_rows != 3 * values["width"]:
        values |= {"heads": qkv_rows // (3 * head), "head_width": head}
    return _built(
        VisionConfig,
        family,
        {**values, "select_layer": select_layer, "feature": feature},
    )


def _peer_vision(config: Json, select_layer: int, feature: Feature) -> VisionConfig:
    """A transformers vision model that runs as it is."""
    missing = [name for name in ("model_type", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if name not in config]
    if missing:
        raise ValueError(f"{unknown(config)} (which need {', '.join(missing)} in their config.json)")
    patch, patches = _square(config["patch_size"]), config.get("num_patches")
    image = _square(config["image_size"]) if "image_size" in config else int(patches**0.5) * patch if patches else 224
    values = {
        "backend": "hf",
        "hf_config": dict(config),
        "image": image,
        "patch": patch,
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "ffn": config.get(
            "intermediate_size",
            int(config["hidden_size"] * config.get("mlp_ratio", 4)),
        ),
        "class_token": not config["model_type"].startswith("siglip"),
        "select_layer": select_layer,
        "feature": feature,
    }
    return tree.from_dict(VisionConfig, values)


def unknown(config: Json) -> str:
    """What to say of a model that none of ours computes."""
    whole = "llava, llava_next, NVLM_D"
    known = f"{whole}, the decoders {', '.join(DECODERS)}, the encoders clip, siglip, {', '.join(VISION)}, and other vision models of transformers"
    return f"config.json says model_type={config.get('model_type')!r}, which is not supported yet; there are {known}"


# Writing.


def decoder_json(config: DecoderConfig, source: Json | None = None) -> dict[str, Any]:
    """A config.json for a decoder: the source's, changed where the model was, or that of the first family that holds it.

    ValueError naming the fields that no family holds.
    """
    types = [source["model_type"]] if source and source.get("model_type") in DECODERS else list(DECODERS)
    plain = _untrained(config)
    failures: list[list[str]] = []
    for model_type in types:
        family = DECODERS[model_type]
        c = {**family.defaults, **(source or {})}
        written = {"architectures": [family.architecture], "model_type": model_type, **_json(family, plain), **_rotary_json(plain, c)}
        if source is not None:
            old = _untrained(decoder_config(source))
            before = _json(family, old)
            written = {**source, **{name: value for name, value in _json(family, plain).items() if before[name] != value}}
            if {"rope_theta", "rope_scaling", "rotary_fraction"} & {*differing(old, plain)}:
                # `rope_parameters`, as transformers 5 spells them, would be read in place of the others.
                written = {name: value for name, value in written.items() if name != "rope_parameters"} | _rotary_json(plain, c)
        failures.append(differing(plain, _untrained(decoder_config(written))))
        if not failures[-1]:
            return written
    least = min(failures, key=len)
    raise ValueError(
        f"no decoder of transformers that neva writes ({', '.join(types)}) holds {', '.join(f'{name}={getattr(config, name)!r}' for name in least)}"
    )


def vision_json(config: VisionConfig, source: Json | None = None) -> dict[str, Any]:
    """A config.json for a vision encoder, as `decoder_json`."""
    if config.backend == "hf":
        return dict(config.hf_config)
    types = [source["model_type"]] if source and source.get("model_type") in VISION else ["clip_vision_model", "siglip_vision_model", "intern_vit_6b"]
    plain, failures = _unread(config), []
    for model_type in types:
        family = VISION[model_type]
        real = replace(plain, heads=plain.width // plain.head, head_width=None)  # NVLM's heads of zeros are not in its config
        written = {"architectures": [family.architecture], "model_type": model_type, **_json(family, real)}
        if source is not None:
            before = _json(family, replace(_unread(vision_config(source)), head_width=None))
            written = {**source, **{name: value for name, value in _json(family, real).items() if before[name] != value}}
        rows = 3 * plain.heads * plain.head
        failures.append(differing(plain, _unread(vision_config(written, qkv_rows=rows))))
        if not failures[-1]:
            return written
    least = min(failures, key=len)
    raise ValueError(
        f"no encoder of transformers that neva writes ({', '.join(types)}) holds {', '.join(f'{name}={getattr(config, name)!r}' for name in least)}"
    )


# Between the two.


def _family(config: Json, families: Mapping[str, Family]) -> Family:
    model_type = str(config.get("model_type"))
    if model_type not in families:
        raise ValueError(f"config.json says model_type={model_type!r}; there are {', '.join(families)}.")
    must(config, families[model_type].must)
    return families[model_type]


def must(config: Json, legal: Json, file: str = "config.json") -> None:
    """ValueError where a field says something that our model does not compute."""
    for name, value in legal.items():
        if config.get(name, value) != value and config[name] is not None:
            raise ValueError(f"{file} says {name}={config[name]!r}, which this model does not compute; only {value!r} can be imported.")


def _values(family: Family, c: Json) -> dict[str, Any]:
    """Our fields from theirs."""
    values: dict[str, Any] = dict(family.always)
    for theirs, ours in family.fields.items():
        value = c.get(theirs)
        if ours == "window":
            if value == 0:
                raise ValueError(
                    f"config.json says {theirs}=0, in which no token sees any; null is no window.",
                )
            value = value or 0
        for name in (ours,) if isinstance(ours, str) else ours:
            values[name] = WORDS.get(value, value) if isinstance(value, str) else value
    return values


def _json(family: Family, config: DecoderConfig | VisionConfig) -> dict[str, Any]:
    """Their fields from ours, those that the family has."""
    words = {ours: theirs for theirs, ours in WORDS.items()}
    written = {}
    for theirs, ours in family.fields.items():
        value = getattr(config, ours if isinstance(ours, str) else ours[0])
        written[theirs] = words.get(value, value) if isinstance(value, str) else None if ours == "window" and not value else value
    return written


def _built(cls: type[T], family: Family, values: Mapping[str, Any]) -> T:
    """Our config of these values, each checked. ValueError in the words of config.json."""
    try:
        return tree.from_dict(cls, values)
    except ValueError as error:
        ours = re.match(r"(\w+)[:=]", str(error))
        spelled = {}
        for theirs, names in family.fields.items():
            spelled |= dict.fromkeys(_tupled(names), theirs)
        theirs = spelled.get(ours[1]) if ours else None
        if not (ours and theirs):
            raise ValueError(str(error)) from None
        raise ValueError(f"config.json says {theirs}={values[ours[1]]!r}: {error}") from None


def _tupled(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _rotary(c: Json) -> dict[str, Any]:
    """Our rotary fields. transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {
        "rope_theta": float(rope.get("rope_theta", c["rope_theta"])),
        "rotary_fraction": rope.get("partial_rotary_factor", c.get("partial_rotary_factor", c.get("rope_percent", 1.0))),
    }
    if kind in ("linear", "dynamic"):
        found["rope_scaling"] = RopeScaling(kind=kind, factor=rope["factor"])
    elif kind == "llama3":
        found["rope_scaling"] = RopeScaling(
            kind="llama3", factor=rope["factor"], low=rope["low_freq_factor"], high=rope["high_freq_factor"],
            original=rope["original_max_position_embeddings"],
        )  # fmt: skip
    elif kind != "default":
        raise ValueError(f"config.json says rope_type={kind!r}; default, linear, dynamic and llama3 can be imported.")
    return found


def _rotary_json(config: DecoderConfig, c: Json) -> dict[str, Any]:
    """The spelling that every version of transformers and vLLM reads; `c` is what is said already."""
    s = config.rope_scaling
    written: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rotary_fraction != 1 or "partial_rotary_factor" in c:
        written["partial_rotary_factor"] = config.rotary_fraction
    if s is not None:
        written["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            written["rope_scaling"] |= {"low_freq_factor": s.low, "high_freq_factor": s.high, "original_max_position_embeddings": s.original}
    return written


def _untrained(config: DecoderConfig) -> DecoderConfig:
    """Without what training alone looks at or nothing does, and with the head's width in one spelling."""
    width, scaling = None if config.head * config.heads == config.width else config.head, config.rope_scaling
    if scaling is not None and scaling.kind != "llama3":
        scaling = RopeScaling(kind=scaling.kind, factor=scaling.factor)  # the others are llama3's
    dropouts = ("embedding_dropout", "hidden_dropout", "attention_dropout", "ffn_dropout")
    plain = replace(config, **dict.fromkeys(dropouts, 0.0))
    if not config.experts:  # nothing to balance
        plain = replace(plain, balance=0.0)
    return replace(plain, head_width=width, rope_scaling=scaling, cross_layers=(), cross=CrossConfig())  # which is no part of a text model


def _unread(config: VisionConfig) -> VisionConfig:
    """Without what a vision model's own config.json does not tell: which features are read, and how pixels are normalised."""
    width = None if config.head * config.heads == config.width else config.head
    return replace(config, select_layer=-1, feature="patch", mean=CLIP_MEAN, std=CLIP_STD, head_width=width)


def differing(a: Any, b: Any) -> list[str]:
    """Names of the fields in which two configs differ."""
    return [f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)]


def _square(size: int | Sequence[int]) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"config.json has a size of {list(size)}; only squares can be imported.")
    return size[0]
