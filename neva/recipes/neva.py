"""NeVA's two stages with the hyper-parameters of the NeMo Framework Launcher (conf/{training,fine_tuning}/neva).

256 and 128 samples a step there; with about 600 and 800 tokens a sample these are 38 and 25 rows of 4096, or 19 and 13 of 8192; here the
next multiples of 8, so that 8 GPUs share them evenly. Betas are .9 and .95, the rate falls to a least one along a cosine. Weights come from
init.decoder and init.vision, data from data.source and data.image_folder.
"""

from dataclasses import replace

from neva.job import BatchConfig, CheckpointConfig, DataConfig, OptimConfig, TrainConfig
from neva.models.presets import VISION, VLMS
from neva.models.vlm import ImageConfig, VLMConfig
from neva.recipes.llava15 import mock

_BETAS = (0.9, 0.95)
ROWS = {4096: (40, 24), 8192: (24, 16)}
"""Length of a row -> rows of a step in pretrain and in finetune."""


def _stages(model: VLMConfig, out: str, *, template: str, plain: str = "plain", length: int = 4096, rate: float = 2e-5) -> tuple[TrainConfig, ...]:
    rows, fewer = ROWS[length]
    pretrain = TrainConfig(
        name="pretrain",
        model=replace(model, image=ImageConfig(aspect="square")),
        trainable=("projector.*",),
        data=DataConfig(sources=mock((640, 480)), template=plain, workers=8),
        batch=BatchConfig(seq_length=length, rows=rows, micro_rows=1),
        optim=OptimConfig(lr=1e-3, min_lr=2e-5, warmup=70.0, betas=_BETAS),
        steps=2170,
        checkpoint=CheckpointConfig(every=500),
        out=out,
    )
    finetune = replace(
        pretrain,
        name="finetune",
        model=replace(model, image=ImageConfig(aspect="pad")),
        trainable=("projector.*", "decoder.*", "head.*"),
        data=replace(pretrain.data, template=template),
        batch=BatchConfig(seq_length=length, rows=fewer, micro_rows=1),
        optim=OptimConfig(lr=rate, min_lr=rate / 100, warmup=150.0, betas=_BETAS),
        steps=5190,
        recompute="block",
    )
    return pretrain, finetune


def neva_llama2_7b() -> tuple[TrainConfig, ...]:
    """NeVA on Llama-2-7B-Chat and CLIP-L with a linear projector."""
    return _stages(VLMS["neva-llama2-7b"], "runs/neva-llama2-7b", template="llama_2")


def neva_llama2_13b() -> tuple[TrainConfig, ...]:
    """NeVA on Llama-2-13B-Chat and CLIP-L with a linear projector."""
    return _stages(VLMS["neva-llama2-13b"], "runs/neva-llama2-13b", template="llama_2")


def neva_llama3_8b() -> tuple[TrainConfig, ...]:
    """NeVA on Llama-3-8B and CLIP-L/14-336, rows of 8192 tokens."""
    return _stages(VLMS["llava-llama3-8b"], "runs/neva-llama3-8b", template="llama_3", length=8192, rate=2e-6)


def neva_mixtral() -> tuple[TrainConfig, ...]:
    """NeVA on Mixtral-8x7B and CLIP-L/14-336, whose features are joined four to one (NeMo's mlp_downsample)."""
    model = replace(VLMS["llava-mixtral-8x7b"], vision=VISION["clip-l-14-336"], pixel_shuffle="v1", projector="norm_mlp2x_gelu")
    return _stages(model, "runs/neva-mixtral", template="mistral", plain="mistral")
