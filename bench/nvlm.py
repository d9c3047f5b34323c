"""What tiles cost: NVLM-D, -X and -H side by side at 1, 3, 5 and 7 tiles, and how fast images are cut into tiles.

* `step`: seconds and counted operations of one training step (forward, backward, frozen encoder, decoder and connectors trained) per sample of one
  image and 128 words. `ratio` is D's over this model's; `flops_ratio` the same of operations. The article measured 1.75 for X and 1.26 for H at seven
  tiles on 128 GPUs (table 3); operations of its 34B models give 2.0-2.2 and 1.7-1.8.
* `prefill`, `decode`: seconds to the first token of a request, and per token after it, from a whole request of 33 tokens.
* `paper`: operations of the article's own 34B models at these tiles, counted, not run.
* `tiling`: images per second cut to 448-pixel tiles, at most 12 and a thumbnail, beside transformers' GotOcr2 processor on Pillow, which
  does the same and also normalises; `normalised` adds that to ours, which does it on the device. Pictures of 1200 x 900 and 900 x 1600.

The models share an encoder of 4 x 192 at 224 px / 14 (64 features a tile) and a decoder of 12 x 256; X and H have cross-attention in layers 6
and 12, the article's every sixth. A repeat runs each model once, in turn; figures are medians. Prints JSON lines; progress goes to stderr.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from pair import emit, machine
from PIL import Image

from neva.batch import Batch, ImageLayout
from neva.data.encode import Encoder
from neva.data.image import to_tiles
from neva.data.pack import Budget, collate
from neva.data.sample import Encoded, Sample, Turn
from neva.data.tokenizer import load_tokenizer
from neva.infer.generate import Loaded, Sampling, generate_encoded, lay_out_for_decoding
from neva.models import cost
from neva.models.decoder import DecoderConfig
from neva.models.presets import VLMS
from neva.models.vit import VisionConfig, normalise
from neva.models.vlm import VLM, ImageConfig, VLMConfig, build
from neva.recipes.demo import TOKENIZER

TILES = (1, 3, 5, 7)
SIZES = {1: (224, 224), 3: (448, 224), 5: (448, 448), 7: (672, 448)}
"""Tiles, the thumbnail counted -> an image that makes so many."""
WORDS, SAMPLES, NEW = 128, 4, 33
IMAGE = ImageConfig(aspect="tiles", max_tiles=6, tags="1d", prefix="<Image>", suffix="</Image>", thumbnail_tag="<tile_global>")
DECODER = DecoderConfig(vocab=8192, width=256, layers=12, heads=4, kv_heads=2, ffn=704, max_positions=4096)
VISION = VisionConfig(image=224, patch=14, width=192, layers=4, heads=3, ffn=768, select_layer=-1)
D = VLMConfig(decoder=DECODER, vision=VISION, projector="norm_ffn_gelu", pixel_shuffle="v2", image=IMAGE)
CROSSED = replace(DECODER, cross_layers=(5, 11))
MODELS: dict[str, VLMConfig] = {
    "D": D,
    "H": replace(D, decoder=CROSSED, inline="thumbnail"),
    "X": replace(D, decoder=CROSSED, inline="none", projector="norm_linear"),
}
TRAINED = frozenset({"projector", "cross", "decoder", "head"})


def request(config: VLMConfig, tiles: int, *, answer: bool) -> Encoded:
    """A sample of one image and `WORDS` words; as a prompt it has no answer."""
    pixels = np.random.default_rng(tiles).integers(0, 256, (*SIZES[tiles][::-1], 3), dtype=np.uint8)
    words = " ".join(["it"] * (WORDS // 2))
    turns = (Turn(role="user", text=f"<image>\n{words}"), Turn(role="assistant", text=words))
    encoder = Encoder(load_tokenizer(TOKENIZER), "text", None, config.layout)
    return encoder.encode(Sample(source="bench", id="0", turns=turns, images=(Image.fromarray(pixels),)), labels=answer)


def batch_of(config: VLMConfig, tiles: int) -> Batch:
    """`SAMPLES` of them in one row without padding."""
    one = request(config, tiles, answer=True)
    assert len(one.tiles) == tiles
    budget = Budget(seq_length=SAMPLES * len(one.tokens), max_tiles=SAMPLES * tiles)
    return collate([[one] * SAMPLES], budget, layout=config.layout, group_names=(one.group,), any_tiles=True)


def work_of(batch: Batch) -> cost.Work:
    """What a step on the batch computes."""
    lengths, runs = batch.cu_seqlens.diff(), batch.runs
    documents = lengths[lengths > 0].tolist()
    pairs = int(((runs[:, 1] - runs[:, 0]) * (runs[:, 3] - runs[:, 2])).sum())
    return cost.Work(
        documents=documents, tiles=len(batch.tiles), labelled=batch.label_count, memory=len(batch.memory_tokens), pairs=pairs, crossing=sum(documents)
    )  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def step(model: VLM, batch: Batch) -> None:
    """Forward and backward."""
    losses = model(batch).losses
    assert losses is not None
    losses.sum().backward()
    model.zero_grad()


def models() -> dict[str, VLM]:
    """The three, gates open a little, with a frozen encoder."""
    made = {name: build(config) for name, config in MODELS.items()}
    with torch.no_grad():
        for model in made.values():
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith("vision."))
                if name.endswith("gate"):
                    parameter.fill_(0.1)
    return made


def steps(made: dict[str, VLM], repeats: int) -> None:
    """Training steps."""
    for tiles in TILES:
        batches = {name: batch_of(config, tiles) for name, config in MODELS.items()}
        times: dict[str, list[float]] = {name: [] for name in MODELS}
        for repeat in range(repeats + 1):
            for name, model in made.items():
                took = seconds(lambda model=model, batch=batches[name]: step(model, batch)) / SAMPLES
                if repeat:  # the first warms up
                    times[name].append(took)
        flops = {name: cost.step_flops(MODELS[name], work_of(batch), trained=TRAINED).total / SAMPLES for name, batch in batches.items()}
        for name in MODELS:
            tokens, ratio = batches[name].tokens.numel() // SAMPLES, statistics.median(d / t for d, t in zip(times["D"], times[name], strict=True))
            row = {"name": "step", "model": name, "tiles": tiles, "tokens": tokens, "seconds": statistics.median(times[name])}
            emit({**row, "gflop": flops[name] / 1e9, "ratio": ratio, "flops_ratio": flops["D"] / flops[name]})
        print(f"step: {tiles} tiles done", file=sys.stderr)


def requests(made: dict[str, VLM], repeats: int) -> None:
    """Prefill and decoding of one request."""
    loaded = {}
    for name, model in made.items():
        encoder = Encoder(load_tokenizer(TOKENIZER), "text", None, MODELS[name].layout)
        lay_out_for_decoding(model.eval().requires_grad_(False))
        loaded[name] = Loaded(model=model, encoder=encoder, device=torch.device("cpu"), folder=None)  # type: ignore[arg-type]
    for tiles in TILES:
        prompts = {name: request(config, tiles, answer=False) for name, config in MODELS.items()}
        first: dict[str, list[float]] = {name: [] for name in MODELS}
        rest: dict[str, list[float]] = {name: [] for name in MODELS}
        for repeat in range(repeats + 1):
            for name in MODELS:
                one, whole = (seconds(partial(generate_encoded, loaded[name], [prompts[name]], Sampling(max_new_tokens=new))) for new in (1, NEW))
                if repeat:
                    first[name].append(one)
                    rest[name].append((whole - one) / (NEW - 1))
        for name in MODELS:
            for row, times in (("prefill", first), ("decode", rest)):
                ratio = statistics.median(d / t for d, t in zip(times["D"], times[name], strict=True))
                emit({"name": row, "model": name, "tiles": tiles, "seconds": statistics.median(times[name]), "ratio": ratio})
        print(f"requests: {tiles} tiles done", file=sys.stderr)


def paper() -> None:
    """The article's 34B models in SFT: a sample of one image and so much text that at seven tiles D's decoder sees the 2816 tokens of table 3."""
    text = 2816 - 7 * 261
    for tiles in TILES:
        totals = {}
        for kind in "dhx":
            config = VLMS[f"nvlm-{kind}-34b"]
            inline = {"d": tiles, "h": 1, "x": 0}[kind]
            memory = tiles - inline
            length = text + 5 * (tiles if kind != "h" else 1) + 256 * inline
            keys = memory * (256 + (5 if kind == "h" else 0))
            work = cost.Work(documents=[length], tiles=tiles, labelled=text, memory=keys, pairs=length * keys, crossing=length * (kind != "d"))
            totals[kind] = cost.step_flops(config, work, trained=TRAINED, recompute=False).total
        emit({"name": "paper", "tiles": tiles, **{f"{kind}_tflop": totals[kind] / 1e12 for kind in totals}} | {
            f"d_over_{kind}": totals["d"] / totals[kind] for kind in "hx"
        })  # fmt: skip


def tiling(repeats: int) -> None:
    """Cutting images."""
    import transformers

    random = np.random.default_rng(0)
    pictures = []
    for width, height in ((1200, 900), (900, 1600)):  # smooth, as photographs are: noise would only favour nobody
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pictures.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    layout = ImageLayout(tile=448, tokens_per_tile=256, aspect="tiles", max_tiles=12)
    peer = transformers.GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12)
    fast = replace(layout, resize="fast")
    norm = (VLMS["nvlm-d-34b"].vision.mean, VLMS["nvlm-d-34b"].vision.std)  # type: ignore[union-attr]
    sides: dict[str, Callable[[Image.Image], object]] = {
        "peer": lambda image: peer(image)["pixel_values"],
        "exact": lambda image: to_tiles(image, layout),
        "fast": lambda image: to_tiles(image, fast),
        "exact, normalised": lambda image: normalise(to_tiles(image, layout), *norm),
        "fast, normalised": lambda image: normalise(to_tiles(image, fast), *norm),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            took = seconds(lambda run=run: [run(image) for image in pictures])
            if repeat:
                rates[name].append(len(pictures) / took)
    for name in sides:
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["peer"], strict=True))
        goal = {"exact": 2, "fast": 8}.get(name)
        emit({"name": "tiling", "side": name, "images_per_s": statistics.median(rates[name]), "ratio": ratio} | ({"goal": goal} if goal else {}))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--only", nargs="*", choices=("step", "requests", "paper", "tiling"), default=["step", "requests", "paper", "tiling"])
    given = parser.parse_args()
    emit(machine())
    made = models()
    if "step" in given.only:
        steps(made, given.repeats)
    if "requests" in given.only:
        requests(made, given.repeats)
    if "paper" in given.only:
        paper()
    if "tiling" in given.only:
        tiling(2 * given.repeats)


if __name__ == "__main__":
    main()
