"""A vision-language model from scratch on 10,000 handwritten digits, in minutes on a laptop CPU."""

from dataclasses import replace
from pathlib import Path

from neva.job import BatchConfig, CheckpointConfig, DataConfig, OptimConfig, SourceConfig, TrainConfig
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import ImageConfig, VLMConfig

TOKENIZER = str(Path(__file__).with_name("tokenizer"))
"""A byte-level tokenizer of 512 tokens: any text can be written with it."""

GREY, SPREAD = 0.1307, 0.3081
"""Mean and deviation of the digits' pixels."""

MODEL = VLMConfig(
    decoder=DecoderConfig(vocab=512, width=128, layers=2, heads=4, kv_heads=2, ffn=352, max_positions=1024),
    vision=VisionConfig(
        image=28,
        patch=7,
        width=128,
        layers=4,
        heads=4,
        ffn=384,
        activation="gelu",
        select_layer=-1,
        mean=(GREY, GREY, GREY),
        std=(SPREAD, SPREAD, SPREAD),
    ),
    projector="mlp2x_gelu",
    image=ImageConfig(aspect="square"),
)


def demo() -> tuple[TrainConfig, ...]:
    """Handwritten digits: two stages from scratch, minutes on a laptop CPU.

    `pretrain` trains the projector alone on captions, as LLaVA does. There are no pretrained weights to ship, so its frozen encoder
    and decoder are random and it can learn little; `finetune` then trains everything, which LLaVA's second stage does for all but
    the encoder. With your own data: data.source=FILE data.image_folder=FOLDER.
    """
    pretrain = TrainConfig(
        name="pretrain",
        model=MODEL,
        trainable=("projector.*",),
        data=DataConfig(sources=(_digits("captions"),), tokenizer=TOKENIZER, template="plain", workers=0),
        batch=BatchConfig(seq_length=512, rows=8, micro_rows=2, max_tiles=32),
        optim=OptimConfig(lr=2e-3, warmup=5.0),
        steps=20,
        precision="fp32",  # at these sizes bf16 is slower, also on CPUs that have it
        checkpoint=CheckpointConfig(every=0, keep_last=0),
        out="runs/demo",
    )
    finetune = replace(
        pretrain,
        name="finetune",
        trainable=("*",),
        data=replace(pretrain.data, sources=(_digits("train"),), template="v1", system=""),
        optim=OptimConfig(lr=1e-3, min_lr=2e-5, warmup=20.0, betas=(0.9, 0.98), weight_decay=0.1),
        steps=700,
    )
    return pretrain, finetune


def _digits(name: str) -> SourceConfig:
    return SourceConfig(path=f"{{out}}/data/{name}.json", image_folder="{out}/data/images", name=name, make="digits")
