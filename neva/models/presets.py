"""Published sizes by name: `model.decoder=llama3-8b` sets the whole sub-config.

Source: the config.json of the published checkpoints (meta-llama, mistralai, Qwen, 01-ai, nvidia, openai, google, OpenGVLab); Nemotron-4:
arXiv 2402.16819 and 2406.11704; NVGPT: the model cards of nvidia/GPT-2B-001 and nvidia/nemotron-3-8b-base-4k, and for 43b sizes that make
43 billion parameters, since none were published. A test compares parameter counts with the published ones.
"""

from dataclasses import replace
from typing import Any, Literal

from neva.models.decoder import DecoderConfig
from neva.models.layers import RopeScaling
from neva.models.vit import VisionConfig
from neva.models.vlm import ImageConfig, VLMConfig

_LLAMA31 = RopeScaling(kind="llama3", factor=8.0, low=1.0, high=4.0, original=8192)
_MISTRAL = DecoderConfig(vocab=32000, width=4096, layers=32, heads=32, kv_heads=8, ffn=14336, max_positions=32768)
_LLAMA3_8B = DecoderConfig(vocab=128256, width=4096, layers=32, heads=32, kv_heads=8, ffn=14336, rope_theta=5e5, max_positions=8192)
_LLAMA3_70B = DecoderConfig(vocab=128256, width=8192, layers=80, heads=64, kv_heads=8, ffn=28672, rope_theta=5e5, max_positions=8192)
_MIXTRAL = replace(_MISTRAL, rope_theta=1e6, experts=8, active_experts=2, balance=0.02)
_NEMOTRON = DecoderConfig(
    vocab=256000, width=6144, layers=32, heads=48, kv_heads=8, ffn=24576, norm="layernorm1p", mlp="squared_relu", rotary_fraction=0.5
)  # fmt: skip
_QWEN2 = DecoderConfig(
    vocab=152064, width=3584, layers=28, heads=28, kv_heads=4, ffn=18944, eps=1e-6, qkv_bias=True, rope_theta=1e6, max_positions=32768
)  # fmt: skip
_QWEN2_SMALL = replace(_QWEN2, vocab=151936, tied=True)
_NVGPT = DecoderConfig(
    vocab=256000, width=4096, layers=32, heads=32, kv_heads=32, ffn=16384, norm="layernorm1p", mlp="squared_relu", rotary_fraction=0.5
)  # fmt: skip

DECODERS: dict[str, DecoderConfig] = {
    "llama2-7b": DecoderConfig(vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, ffn=11008),
    "llama2-13b": DecoderConfig(vocab=32000, width=5120, layers=40, heads=40, kv_heads=40, ffn=13824),
    "llama2-70b": DecoderConfig(vocab=32000, width=8192, layers=80, heads=64, kv_heads=8, ffn=28672),
    "llama3-8b": _LLAMA3_8B,
    "llama3-70b": _LLAMA3_70B,
    "llama3.1-8b": replace(_LLAMA3_8B, rope_scaling=_LLAMA31, max_positions=131072),
    "llama3.1-70b": replace(_LLAMA3_70B, rope_scaling=_LLAMA31, max_positions=131072),
    "mistral-7b-v0.1": replace(_MISTRAL, window=4096),
    "mistral-7b-v0.2": replace(_MISTRAL, rope_theta=1e6),
    "mistral-7b-v0.3": replace(_MISTRAL, rope_theta=1e6, vocab=32768),
    "mixtral-8x7b": _MIXTRAL,
    "mixtral-8x22b": replace(_MIXTRAL, width=6144, layers=56, heads=48, ffn=16384, max_positions=65536, balance=0.001),
    "nemotron4-15b": _NEMOTRON,
    "nemotron4-340b": replace(_NEMOTRON, width=18432, layers=96, heads=96, ffn=73728),
    "minitron-4b": replace(_NEMOTRON, width=3072, heads=24, ffn=9216, head_width=128),
    "minitron-8b": replace(_NEMOTRON, width=4096, heads=48, ffn=16384, head_width=128),
    "qwen2-0.5b": replace(_QWEN2_SMALL, width=896, layers=24, heads=14, kv_heads=2, ffn=4864),
    "qwen2-1.5b": replace(_QWEN2_SMALL, width=1536, heads=12, kv_heads=2, ffn=8960),
    "qwen2-7b": _QWEN2,
    "qwen2-72b": replace(_QWEN2, width=8192, layers=80, heads=64, kv_heads=8, ffn=29568),
    "qwen2.5-0.5b": replace(_QWEN2_SMALL, width=896, layers=24, heads=14, kv_heads=2, ffn=4864),
    "qwen2.5-1.5b": replace(_QWEN2_SMALL, width=1536, heads=12, kv_heads=2, ffn=8960),
    "qwen2.5-3b": replace(_QWEN2_SMALL, width=2048, layers=36, heads=16, kv_heads=2, ffn=11008),
    "qwen2.5-7b": _QWEN2,
    "qwen2.5-14b": replace(_QWEN2, width=5120, layers=48, heads=40, kv_heads=8, ffn=13824),
    "qwen2.5-32b": replace(_QWEN2, width=5120, layers=64, heads=40, kv_heads=8, ffn=27648),
    "qwen2.5-72b": replace(_QWEN2, width=8192, layers=80, heads=64, kv_heads=8, ffn=29568),
    "yi-34b": DecoderConfig(vocab=64000, width=7168, layers=60, heads=56, kv_heads=8, ffn=20480, rope_theta=5e6),
    "nvgpt-2b": replace(_NVGPT, width=2048, layers=24, heads=16, kv_heads=16, ffn=5440, mlp="swiglu"),
    "nvgpt-8b": _NVGPT,
    "nvgpt-43b": replace(_NVGPT, width=8192, layers=48, heads=64, kv_heads=64, ffn=32768),
    "llama-tiny": DecoderConfig(vocab=512, width=64, layers=2, heads=4, kv_heads=2, ffn=160, max_positions=2048),
}

_CLIP_L = VisionConfig(image=224, patch=14, width=1024, layers=24, heads=16, ffn=4096)
_HALF, _IMAGENET_MEAN, _IMAGENET_STD = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIGLIP = VisionConfig(
    image=384, patch=14, width=1152, layers=27, heads=16, ffn=4304, activation="gelu_tanh", eps=1e-6, class_token=False, pre_norm=False,
    patch_bias=True, mean=_HALF, std=_HALF,
)  # fmt: skip
_INTERNVIT_6B = VisionConfig(
    image=448, patch=14, width=3200, layers=45, heads=25, ffn=12800, activation="gelu", norm="rmsnorm", eps=1e-6, qkv_bias=False,
    qk_norm=True, layer_scale=True, pre_norm=False, patch_bias=True, select_layer=-1, mean=_IMAGENET_MEAN, std=_IMAGENET_STD,
)  # fmt: skip

VISION: dict[str, VisionConfig] = {
    "clip-b-32": VisionConfig(image=224, patch=32, width=768, layers=12, heads=12, ffn=3072),
    "clip-l-14": _CLIP_L,
    "clip-l-14-336": replace(_CLIP_L, image=336),
    "siglip-so400m-14-384": _SIGLIP,
    "siglip-base-16-224": replace(_SIGLIP, image=224, patch=16, width=768, layers=12, heads=12, ffn=3072),
    "internvit-300m-448": replace(_INTERNVIT_6B, width=1024, layers=24, heads=16, ffn=4096, norm="layernorm", qkv_bias=True, qk_norm=False),
    "internvit-6b-448": _INTERNVIT_6B,
    "internvit-6b-448-nvlm": replace(_INTERNVIT_6B, heads=32, head_width=128),
    "clip-tiny": VisionConfig(image=28, patch=7, width=64, layers=2, heads=2, ffn=128),
}

_SQUARE = ImageConfig(aspect="square")
_CLIP_336 = VISION["clip-l-14-336"]
_NEXT = ImageConfig(aspect="anyres", pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))

_NVLM_TILES = ImageConfig(aspect="tiles", max_tiles=6, tags="1d", prefix="<Image>", suffix="</Image>")
_YI_TILES = replace(_NVLM_TILES, thumbnail_tag="<tile_global>")
_INTERNVIT = VISION["internvit-6b-448"]


def _nvlm(kind: Literal["d", "x", "h"], decoder: DecoderConfig, every: int, image: ImageConfig) -> VLMConfig:
    """NVLM-D, -X or -H (arXiv 2409.11402, table 10): cross-attention in every 6th or 8th layer, behind its self-attention.

    The article does not say which layers these are, nor whether cross-attention has fewer key-value heads; here the last of each group of
    layers, and as many as query heads.
    """
    crossed = replace(decoder, cross_layers=tuple(range(every - 1, decoder.layers, every)))
    common: dict[str, Any] = {"vision": _INTERNVIT, "pixel_shuffle": "v2", "image": image}
    if kind == "d":
        return VLMConfig(decoder=decoder, projector="norm_ffn_gelu", **common)
    if kind == "x":
        return VLMConfig(decoder=crossed, projector="norm_linear", inline="none", **common)
    return VLMConfig(decoder=crossed, projector="norm_ffn_gelu", inline="thumbnail", **common)


VLMS: dict[str, VLMConfig] = {
    "llava-1.5-7b": VLMConfig(decoder=DECODERS["llama2-7b"], vision=_CLIP_336),
    "llava-1.5-13b": VLMConfig(decoder=DECODERS["llama2-13b"], vision=_CLIP_336),
    "neva-llama2-7b": VLMConfig(decoder=DECODERS["llama2-7b"], vision=_CLIP_L, projector="linear", image=_SQUARE),
    "neva-llama2-13b": VLMConfig(decoder=DECODERS["llama2-13b"], vision=_CLIP_L, projector="linear", image=_SQUARE),
    "llava-llama3-8b": VLMConfig(decoder=DECODERS["llama3-8b"], vision=_CLIP_336),
    "llava-mistral-7b": VLMConfig(decoder=DECODERS["mistral-7b-v0.1"], vision=_CLIP_336),
    "llava-mixtral-8x7b": VLMConfig(decoder=DECODERS["mixtral-8x7b"], vision=_CLIP_336),
    "llava-nemotron4-15b": VLMConfig(decoder=DECODERS["nemotron4-15b"], vision=_CLIP_336),
    "llava-nemotron4-340b": VLMConfig(decoder=DECODERS["nemotron4-340b"], vision=_CLIP_336),
    "nvlm-d-34b": _nvlm("d", DECODERS["yi-34b"], 6, _YI_TILES),
    "nvlm-x-34b": _nvlm("x", DECODERS["yi-34b"], 6, _YI_TILES),
    "nvlm-h-34b": _nvlm("h", DECODERS["yi-34b"], 6, _YI_TILES),
    "nvlm-d-72b": _nvlm("d", DECODERS["qwen2-72b"], 8, _NVLM_TILES),
    "nvlm-x-72b": _nvlm("x", DECODERS["qwen2-72b"], 8, _NVLM_TILES),
    "nvlm-h-72b": _nvlm("h", DECODERS["qwen2-72b"], 8, _NVLM_TILES),
    "llava-v1.6-mistral-7b": VLMConfig(decoder=DECODERS["mistral-7b-v0.2"], vision=_CLIP_336, image=_NEXT),
    "llava-v1.6-vicuna-7b": VLMConfig(decoder=DECODERS["llama2-7b"], vision=_CLIP_336, image=_NEXT),
    "llava-v1.6-vicuna-13b": VLMConfig(decoder=DECODERS["llama2-13b"], vision=_CLIP_336, image=_NEXT),
    "llava-tiny": VLMConfig(decoder=DECODERS["llama-tiny"], vision=VISION["clip-tiny"]),
}
