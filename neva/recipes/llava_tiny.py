"""LLaVA's two stages at toy size on made-up samples: to see that everything runs."""

from dataclasses import replace

from neva.job import BatchConfig, CheckpointConfig, DataConfig, MockConfig, OptimConfig, SourceConfig, TrainConfig
from neva.models.presets import VLMS
from neva.recipes.demo import TOKENIZER


def llava_tiny() -> tuple[TrainConfig, ...]:
    """LLaVA's two stages at toy size on made-up samples, in seconds.

    `pretrain` trains the projector, `finetune` the projector and the decoder; the encoder stays frozen, as in LLaVA-1.5.
    """
    pretrain = TrainConfig(
        name="pretrain",
        model=VLMS["llava-tiny"],
        trainable=("projector.*",),
        data=DataConfig(sources=(SourceConfig(mock=MockConfig(samples=400, words=(5, 50))),), tokenizer=TOKENIZER, template="plain", workers=0),
        batch=BatchConfig(seq_length=512, rows=4, micro_rows=1),
        optim=OptimConfig(lr=1e-3),
        steps=20,
        checkpoint=CheckpointConfig(every=10),
        out="runs/llava-tiny",
    )
    finetune = replace(
        pretrain,
        name="finetune",
        trainable=("projector.*", "decoder.*", "head.*"),
        data=replace(pretrain.data, template="v1"),
        optim=OptimConfig(lr=5e-4),
    )
    return pretrain, finetune
