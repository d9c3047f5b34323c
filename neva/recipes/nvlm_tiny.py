"""NVLM-D, -X and -H at toy size: pages of handwritten digits, read tile by tile, in minutes on a laptop CPU with nothing prepared."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from neva.job import BatchConfig, CheckpointConfig, DataConfig, EvaluateConfig, OptimConfig, SourceConfig, TrainConfig
from neva.models.decoder import CrossConfig, DecoderConfig
from neva.models.vlm import ImageConfig, VLMConfig
from neva.recipes.demo import MODEL

TOKENIZER = str(Path(__file__).with_name("tokenizer_nvlm"))
"""A byte-level BPE tokenizer of 390 tokens, trained on the questions of `pages`; a tag has five tokens, as NVLM's do."""

DECODER = DecoderConfig(vocab=512, width=128, layers=4, heads=4, kv_heads=2, ffn=352, max_positions=1024)
IMAGE = ImageConfig(aspect="tiles", max_tiles=6, tags="1d", prefix="<Image>", suffix="</Image>", thumbnail_tag="<tile_global>")
_D = VLMConfig(decoder=DECODER, vision=MODEL.vision, projector="norm_ffn_gelu", pixel_shuffle="v2", image=IMAGE)
_CROSSED = replace(DECODER, cross_layers=(1, 3))
MODELS: dict[str, VLMConfig] = {
    "d": _D,
    "x": replace(_D, decoder=_CROSSED, inline="none", projector="norm_linear"),
    "h": replace(_D, decoder=replace(_CROSSED, cross=CrossConfig(rotary=True)), inline="thumbnail", tag_binding="rotary"),
}
"""H's keys have positions: without, as in the article, tags among them name no tile (docs/nvlm.md)."""


SEQ_LENGTH = {"d": 1024, "x": 768, "h": 512}
"""Rows of about as many samples: X and H have fewer tokens for a page."""


def _source(name: str, weight: float) -> SourceConfig:
    return SourceConfig(path=f"{{out}}/data/{name}.json", image_folder="{out}/data/images", name=name, weight=weight, make="pages")


def _stages(kind: Literal["d", "x", "h"]) -> tuple[TrainConfig, ...]:
    """Both stages train everything, the first all but the embedding: there are no pretrained weights to ship.

    Pages of one digit in two hands give cross-attention a memory in the first: a picture of one tile is its own thumbnail, which H has inline.
    """
    model = MODELS[kind]
    pretrain = TrainConfig(
        name="pretrain",
        model=model,
        trainable=("*", "!decoder.embed.*"),
        data=DataConfig(
            sources=(_source("captions", 0.35), _source("alike", 0.35), _source("text", 0.3)),
            tokenizer=TOKENIZER,
            template="v1",
            system="",
            workers=0,
        ),
        batch=BatchConfig(seq_length=SEQ_LENGTH[kind], rows=4, micro_rows=1, max_tiles=128),
        optim=OptimConfig(lr=1e-3, warmup=10.0, betas=(0.9, 0.95), weight_decay=0.05),
        steps=200,
        precision="fp32",  # at these sizes bf16 is slower, also on CPUs that have it
        checkpoint=CheckpointConfig(every=0, keep_last=0),
        out=f"runs/nvlm-{kind}-tiny",
    )
    finetune = replace(
        pretrain,
        name="finetune",
        trainable=("*",),
        data=replace(pretrain.data, sources=(_source("pages", 0.85), _source("text", 0.15))),
        optim=OptimConfig(lr=1e-3, min_lr=2e-5, warmup=20.0, betas=(0.9, 0.98), weight_decay=0.05),
        steps=800,
        evaluate=EvaluateConfig(every=0, source="{out}/data/heldout.json", image_folder="{out}/data/images"),
    )
    return pretrain, finetune


def nvlm_d_tiny() -> tuple[TrainConfig, ...]:
    """NVLM-D from scratch on pages of digits, a quarter of an hour on a CPU thread: 96 % of held-out pages, 12 % of the unseen layout."""
    return _stages("d")


def nvlm_x_tiny() -> tuple[TrainConfig, ...]:
    """NVLM-X from scratch on pages of digits, a quarter of an hour on a CPU thread: 93 % of held-out pages, 27 % of the unseen layout."""
    return _stages("x")


def nvlm_h_tiny() -> tuple[TrainConfig, ...]:
    """NVLM-H from scratch on pages of digits, a quarter of an hour on a CPU thread: 94 % of held-out pages, 93 % of the unseen layout."""
    return _stages("h")
