"""NVLM-D, -X and -H in two stages, with the hyper-parameters of arXiv 2409.11402, tables 10 and 11, and its data of tables 4 and 6.

What the article leaves open is a field here:
- Rows: it counts samples (2048 in stage 1; 128 to 512 in SFT), one to a sequence. Packed, N samples are N * mean length / seq_length rows. Means
  assumed: D 330 and 1500 tokens, X 80 and 250 (images take no place in its sequence), H 330 and 500. `ROWS` holds the results, in multiples of 8.
- Released scripts differ from the article (beta2 .95 in both stages, 256 samples for the 72B SFT, a dropout of .1 in stage 1): the article counts.
- Stage 1 of D and X shows one tile without a tag; H has six and the thumbnail.
- Sizes and shares of the data sets are not published: by default each counts by its number of samples (`weight`). The names are those of the
  article; put NAME.jsonl (or .json, LLaVA's format) and its images in NAME/ into one folder, and give data.folder=FOLDER.
- Which decoder layers get cross-attention, its heads, norms and positions: `models/presets.py`, `models/cross.py`.
Table 9's frozen decoder in SFT: finetune:trainable=[projector.*,decoder.blocks.*.cross.*].
Weights: init.decoder=NousResearch/Nous-Hermes-2-Yi-34B's or Qwen/Qwen2-72B-Instruct's folder, init.vision=InternViT-6B-448px-V1-5's.
"""

from dataclasses import replace
from typing import Literal

from neva.job import BatchConfig, CheckpointConfig, DataConfig, MockConfig, OptimConfig, SourceConfig, TrainConfig
from neva.models.presets import VLMS

Kind = Literal["d", "x", "h"]

PRETRAIN = [
    "coco-captions", "cc3m", "sbu", "laion-115m", "vqav2", "visual-genome", "dvqa", "docmatix", "ocr-vqa", "coco-text", "textocr", "rects",
    "rrc-art", "rrc-lsvt", "rctw", "synthdog-en", "pdfa-eng-wds", "clevr-math",
]  # fmt: skip
"""Table 4."""
SFT = [
    "coco-captions", "textcaps", "sharegpt-4o", "vqav2", "visual-genome", "tallyqa", "visual7w", "vizwiz", "ok-vqa", "a-okvqa", "gqa",
    "super-clevr", "raven", "vsr", "dvqa", "plotqa", "mmc-instruction", "chartqa", "infographicvqa", "figureqa", "iconqa", "chart2text",
    "diagram-image2text", "wikitablequestions", "robut-wtq", "robut-wikisql", "robut-sqa", "hitab", "docvqa", "docmatix", "dude", "visualmrc",
    "tat-dqa", "ureader-ie", "ureader-kg", "ureader-qa", "ocr-vqa", "textvqa", "st-vqa", "screenqa", "slideqa", "pdf-vqa", "vqa-cd", "vqaonbd",
    "poie", "sroie", "orand", "est-vqa", "funsd", "squad-rendered", "wordart", "iam", "iiit5k", "hme100k", "synthdog-en", "bentham-qa",
    "hw-squad", "websight", "chromewriting", "k12-printing", "coco-text", "textocr", "rects", "pdfa-eng-wds", "clevr-math", "geoqa-plus",
    "geometry3k", "tabmwp", "gsm8k-rendered", "metamathqa-rendered", "mavis-caption", "mavis-qa", "geo170k-align", "geo170k-qa", "geomverse",
    "geos", "unigeo", "ai2d", "scienceqa", "tqa", "arxivqa", "textbook", "lrv", "llava-158k", "llavar",
]  # fmt: skip
"""Table 6, images."""
TEXT = [
    "slimorca", "sharegpt", "evolinstruct", "gpteacher", "alpaca-gpt4", "ultrainteract", "orca-math", "mathinstruct", "metamath",
    "glaive-code-assistant", "magicoder", "wizardcoder",
]  # fmt: skip
"""Table 6, text alone: general, math and code. It is what keeps the decoder's skills."""

ROWS: dict[Kind, tuple[int, int]] = {"d": (168, 48), "x": (80, 64), "h": (168, 32)}
"""Rows of a step in stage 1 and in SFT, of `LENGTH` tokens."""
LENGTH: dict[Kind, int] = {"d": 4096, "x": 2048, "h": 4096}
TILES: dict[Kind, tuple[int, int]] = {"d": (64, 64), "x": (64, 80), "h": (112, 80)}
"""Tiles that a row may hold: enough that tokens are what fills it."""

RATES: dict[Kind, tuple[OptimConfig, OptimConfig]] = {
    "d": (
        OptimConfig(lr=1e-4, min_lr=2.5e-5, warmup=500.0, betas=(0.9, 0.95), weight_decay=0.1, clip=10.0),
        OptimConfig(lr=2e-6, min_lr=2.5e-7, warmup=1000.0, betas=(0.9, 0.98), weight_decay=0.1, clip=10.0),
    ),
    "x": (
        OptimConfig(lr=1e-4, min_lr=1e-5, warmup=1000.0, betas=(0.9, 0.95), weight_decay=0.05, clip=1.0),
        OptimConfig(lr=1e-5, min_lr=1e-6, warmup=500.0, betas=(0.9, 0.98), weight_decay=0.05, clip=1.0),
    ),
    "h": (
        OptimConfig(lr=1e-4, min_lr=1e-5, warmup=1000.0, betas=(0.9, 0.98), weight_decay=0.05, clip=1.0),
        OptimConfig(lr=1e-5, min_lr=1e-7, warmup=1000.0, betas=(0.9, 0.98), weight_decay=0.05, clip=1.0),
    ),
}
STEPS: dict[Kind, tuple[int, int]] = {"d": (20_000, 40_000), "x": (20_000, 20_000), "h": (20_000, 40_000)}
CONNECTOR: dict[Kind, tuple[str, ...]] = {
    "d": ("projector.*",),
    "x": ("projector.*", "decoder.blocks.*.cross.*"),
    "h": ("projector.*", "decoder.blocks.*.cross.*"),
}
"""What stage 1 trains; SFT trains all but the encoder."""


def _sources(images: list[str], text: list[str]) -> tuple[SourceConfig, ...]:
    """Sources to be given by name, made up until data.folder is."""
    seen = MockConfig(samples=1000, words=(20, 120), image_size=(1344, 896))
    read = MockConfig(samples=1000, words=(60, 400), images=0)
    return tuple(SourceConfig(name=name, mock=seen) for name in images) + tuple(SourceConfig(name=name, mock=read) for name in text)


def _stages(kind: Kind, size: Literal["34b", "72b"]) -> tuple[TrainConfig, ...]:
    model, length, rows = VLMS[f"nvlm-{kind}-{size}"], LENGTH[kind], ROWS[kind]
    pretrain = TrainConfig(
        name="pretrain",
        model=model if kind == "h" else replace(model, image=replace(model.image, max_tiles=1, tags="none")),
        trainable=CONNECTOR[kind],
        # Samples of a third of a row fill it from a larger pool: of 128, NVLM-D's SFT loses 4 %.
        data=DataConfig(
            sources=_sources(PRETRAIN, []),
            template="nvlm-pretrain",
            workers=8,
            pool=256,
        ),
        batch=BatchConfig(seq_length=length, rows=rows[0], micro_rows=1, max_tiles=TILES[kind][0]),
        optim=RATES[kind][0],
        steps=STEPS[kind][0],
        checkpoint=CheckpointConfig(every=500),
        out=f"runs/nvlm-{kind}-{size}",
    )
    optim = RATES[kind][1]
    if kind == "x" and size == "72b":
        rows, optim = (rows[0], rows[1] // 2), replace(optim, min_lr=1e-7)  # 256 samples in place of 512
    finetune = replace(
        pretrain,
        name="finetune",
        model=model,
        trainable=("projector.*", "decoder.*", "head.*"),
        data=replace(pretrain.data, sources=_sources(SFT, TEXT), template="nvlm-chatml"),
        batch=BatchConfig(seq_length=length, rows=rows[1], micro_rows=1, max_tiles=TILES[kind][1]),
        optim=optim,
        steps=STEPS[kind][1],
        recompute="block",
    )
    return pretrain, finetune


def nvlm_d_34b() -> tuple[TrainConfig, ...]:
    """NVLM-D on Yi-34B and InternViT-6B: all tiles in the sequence, each behind its tag."""
    return _stages("d", "34b")


def nvlm_d_72b() -> tuple[TrainConfig, ...]:
    """NVLM-D on Qwen2-72B and InternViT-6B: all tiles in the sequence, each behind its tag."""
    return _stages("d", "72b")


def nvlm_x_34b() -> tuple[TrainConfig, ...]:
    """NVLM-X on Yi-34B and InternViT-6B: tiles in ten gated cross-attention layers, tags in the sequence."""
    return _stages("x", "34b")


def nvlm_x_72b() -> tuple[TrainConfig, ...]:
    """NVLM-X on Qwen2-72B and InternViT-6B: tiles in ten gated cross-attention layers, tags in the sequence."""
    return _stages("x", "72b")


def nvlm_h_34b() -> tuple[TrainConfig, ...]:
    """NVLM-H on Yi-34B and InternViT-6B: the thumbnail in the sequence, other tiles with their tags in cross-attention."""
    return _stages("h", "34b")


def nvlm_h_72b() -> tuple[TrainConfig, ...]:
    """NVLM-H on Qwen2-72B and InternViT-6B: the thumbnail in the sequence, other tiles with their tags in cross-attention."""
    return _stages("h", "72b")
