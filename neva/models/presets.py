"""Published sizes by name: `model.decoder=llama2-7b` sets the whole sub-config."""

from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import VLMConfig

DECODERS: dict[str, DecoderConfig] = {
    "llama2-7b": DecoderConfig(vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, ffn=11008),
    "llama2-13b": DecoderConfig(vocab=32000, width=5120, layers=40, heads=40, kv_heads=40, ffn=13824),
    "llama-tiny": DecoderConfig(vocab=512, width=64, layers=2, heads=4, kv_heads=2, ffn=160, max_positions=2048),
}

VISION: dict[str, VisionConfig] = {
    "clip-l-14": VisionConfig(image=224, patch=14, width=1024, layers=24, heads=16, ffn=4096),
    "clip-l-14-336": VisionConfig(image=336, patch=14, width=1024, layers=24, heads=16, ffn=4096),
    "clip-b-32": VisionConfig(image=224, patch=32, width=768, layers=12, heads=12, ffn=3072),
    "clip-tiny": VisionConfig(image=28, patch=7, width=64, layers=2, heads=2, ffn=128),
}

VLMS: dict[str, VLMConfig] = {
    "llava-1.5-7b": VLMConfig(decoder=DECODERS["llama2-7b"], vision=VISION["clip-l-14-336"]),
    "llava-1.5-13b": VLMConfig(decoder=DECODERS["llama2-13b"], vision=VISION["clip-l-14-336"]),
    "llava-tiny": VLMConfig(decoder=DECODERS["llama-tiny"], vision=VISION["clip-tiny"]),
}
