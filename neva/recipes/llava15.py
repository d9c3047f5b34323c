"""LLaVA-1.5's two stages as published: haotian-liu/LLaVA scripts/v1_5/{pretrain,finetune}.sh, arXiv 2310.03744 table 9.

A paper's batch of N samples is rows = N * mean sample length / seq_length. 558K captions have about 600 tokens with their image, so that 72
rows of 2048 hold about 246 samples (paper: 256) and 2270 steps are one epoch; the 665K mix has about 800, so that 48 rows hold about 123
(paper: 128) and 5400 steps are one epoch. Give the real data with data.source=FILE data.image_folder=FOLDER, per stage, and the weights
with init.decoder=lmsys/vicuna's folder and init.vision=CLIP's.
"""

from dataclasses import replace

from neva.job import BatchConfig, CheckpointConfig, DataConfig, MockConfig, OptimConfig, SourceConfig, TrainConfig
from neva.models.presets import VLMS


def mock(images: tuple[int, int]) -> tuple[SourceConfig, ...]:
    """Made-up samples of a recipe's own sizes, until data.source is given."""
    return (SourceConfig(mock=MockConfig(samples=10_000, words=(20, 300), image_size=images)),)


def _stages(model: str, out: str) -> tuple[TrainConfig, ...]:
    pretrain = TrainConfig(
        name="pretrain",
        model=VLMS[model],
        trainable=("projector.*",),
        data=DataConfig(sources=mock((640, 480)), template="plain", workers=8),
        batch=BatchConfig(seq_length=2048, rows=72, micro_rows=1),
        optim=OptimConfig(lr=1e-3, warmup=0.03),
        steps=2270,
        checkpoint=CheckpointConfig(every=500),
        out=out,
    )
    finetune = replace(
        pretrain,
        name="finetune",
        trainable=("projector.*", "decoder.*", "head.*"),
        data=replace(pretrain.data, template="v1"),
        batch=BatchConfig(seq_length=2048, rows=48, micro_rows=1),
        optim=OptimConfig(lr=2e-5, warmup=0.03),
        steps=5400,
        recompute="block",
    )
    return pretrain, finetune


def llava15_7b() -> tuple[TrainConfig, ...]:
    """LLaVA-1.5 7B: Vicuna-7B and CLIP-L/14-336; the projector first, then projector and decoder."""
    return _stages("llava-1.5-7b", "runs/llava15-7b")


def llava15_13b() -> tuple[TrainConfig, ...]:
    """LLaVA-1.5 13B: Vicuna-13B and CLIP-L/14-336; the projector first, then projector and decoder."""
    return _stages("llava-1.5-13b", "runs/llava15-13b")
