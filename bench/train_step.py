"""Training speed and memory of neva next to transformers: the same model, weights, samples and optimiser on both sides.

Work: 512 random samples, one image (64 tokens) and log-normal(5.3, 0.7) text tokens clipped to 30..1500 each, loss on the second half
of the text. All parameters train: fused AdamW at a constant rate, gradients clipped to norm 1.

* peer: transformers' LLaVA with SDPA and no cache, micro-batches of 4 samples padded to their longest, an optimiser step per 8 of them
  (32 samples). `shuffled` takes the samples in random order; `sorted` sorts them all by length and shuffles the micro-batches. bf16 is
  torch.autocast over fp32 weights, as the Trainer's bf16=True.
* ours: the product's path: Packer and collate over the same samples, rows of 2048 tokens, 5 rows to a step so that it averages 32
  samples; mesh and FSDP2 on one gloo rank; `train_step` with its metrics. bf16 is precision="bf16" (fp32 master weights).

Each side lives in a process of its own, which waits while the other works: in one process the peer's large blocks spoil our allocator,
and ours theirs. Batches are made before the clock starts. A repeat is one pass of each side over all samples, in turn; `ours` and
`peer` are medians in useful tokens (text and image, no padding) per second, `ratio` is the median of the repeats' ratios. Before that
the first loss of both sides is compared. `memory` is the peak resident memory of a process that makes one fp32 pass (the peer's
shuffled) in MiB, each side in a process of its own; `ours_above` and `peer_above` are what training adds to the loaded model.

Prints JSON lines; progress goes to stderr.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from pair import IMAGE_ID, IMAGE_TOKENS, VISION, emit, load_ours, load_peer, machine, write
from torch import Tensor

from neva.batch import IGNORE, IMAGE, ImageLayout
from neva.data.pack import Budget, Item, Packer, collate
from neva.data.sample import Encoded
from neva.models.vit import VisionConfig, normalise

LR, CLIP = 1e-4, 1.0
MICRO, STEP = 4, 32
BUDGET = Budget(seq_length=2048, rows=5, micro_rows=1)
LAYOUT = ImageLayout(tile=VISION["image_size"], tokens_per_tile=IMAGE_TOKENS)
SPEED = [f"{order} {precision}" for precision in ("fp32", "bf16") for order in ("shuffled", "sorted")]
Padded = dict[str, Tensor]


def make_samples(count: int) -> list[Encoded]:
    """The work, in random order: a start token, the image, text."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.rint(rng.lognormal(5.3, 0.7, count)), 30, 1500).astype(int)
    samples = []
    for number, length in enumerate(lengths.tolist()):
        text = torch.from_numpy(rng.integers(3, IMAGE_ID, length))
        tokens = torch.cat((text[:1], torch.full((IMAGE_TOKENS,), IMAGE), text[1:]))
        labels = torch.where(torch.arange(len(tokens)) >= len(tokens) - length // 2, tokens, IGNORE)
        tiles = torch.from_numpy(rng.integers(0, 256, (1, 3, LAYOUT.tile, LAYOUT.tile), dtype=np.uint8))
        samples.append(Encoded.plain(tokens, labels, tiles, group="bench", key=("bench", str(number))))
    return samples


def pack(samples: Sequence[Encoded]) -> Iterator[tuple]:
    """Our optimiser steps: tuples of packed micro-batches."""
    items = [Item(ref=number, tokens=len(sample.tokens), tiles=1) for number, sample in enumerate(samples)]
    packed = Packer(BUDGET, items).rows()
    while step := list(islice(packed, BUDGET.rows)):
        rows = [[samples[item.ref] for item in row] for row in step]
        yield tuple(collate([row], BUDGET, layout=LAYOUT, group_names=("bench",), any_tiles=True) for row in rows)


def pad(samples: Sequence[Encoded]) -> Padded:
    """A micro-batch of the peer: padded on the right to its longest sample, pixels normalised."""
    tokens = torch.nn.utils.rnn.pad_sequence([sample.tokens for sample in samples], batch_first=True, padding_value=-1)
    labels = torch.nn.utils.rnn.pad_sequence([sample.labels for sample in samples], batch_first=True, padding_value=IGNORE)
    pixels = normalise(torch.cat([sample.tiles for sample in samples]), VisionConfig.mean, VisionConfig.std)
    ids = tokens.masked_fill(tokens == IMAGE, IMAGE_ID).clamp_min(0)
    return {"input_ids": ids, "attention_mask": (tokens != -1).long(), "labels": labels, "pixel_values": pixels}


def in_fours(samples: Sequence[Encoded], order: str) -> Iterator[list[Padded]]:
    """The peer's optimiser steps: lists of padded micro-batches."""
    ordered = sorted(samples, key=lambda sample: len(sample.tokens)) if order == "sorted" else samples
    micro = [ordered[at : at + MICRO] for at in range(0, len(ordered), MICRO)]
    if order == "sorted":
        random.Random(0).shuffle(micro)
    for at in range(0, len(micro), STEP // MICRO):
        yield [pad(part) for part in micro[at : at + STEP // MICRO]]


class Ours:
    """neva: a stage of one gloo rank."""

    def __init__(self, folder: Path, precision: str):
        from torch.distributed.tensor import distribute_tensor

        from neva.job import BatchConfig, DataConfig, MockConfig, OptimConfig, SourceConfig, TrainConfig
        from neva.parallel import mesh
        from neva.parallel.wrap import logical_parameters
        from neva.training import stage

        model, weights = load_ours(folder)
        tokenizer = Path(stage.__file__).parents[1] / "recipes" / "tokenizer"
        config = TrainConfig(
            name="bench", model=model, precision=precision, steps=10**6,
            data=DataConfig(sources=(SourceConfig(mock=MockConfig()),), tokenizer=str(tokenizer), template="v1", workers=0),  # a stage must have some
            batch=BatchConfig(seq_length=BUDGET.seq_length, rows=BUDGET.rows, micro_rows=BUDGET.micro_rows),
            optim=OptimConfig(lr=LR, schedule="constant", warmup=0, weight_decay=0.0, clip=CLIP),
        )  # fmt: skip
        device = mesh.start()
        self.stage = stage.prepare(config, mesh=mesh.make(config.parallel, device), device=device, say=log)
        with torch.no_grad():
            for name, parameter in logical_parameters(self.stage.model):
                parameter.copy_(distribute_tensor(weights.pop(name), parameter.device_mesh, parameter.placements))
        assert not weights, f"not in our model: {list(weights)}"
        self.train_step = stage.train_step

    def loss(self, samples: Sequence[Encoded]) -> float:
        """Mean over the label tokens."""
        batch = next(pack(samples))[0]
        with torch.no_grad():
            return float(self.stage.model(batch).losses.sum()) / batch.label_count

    def step(self, batches: tuple) -> None:
        """One optimiser step."""
        self.train_step(self.stage, batches)


class Peer:
    """transformers."""

    def __init__(self, folder: Path, precision: str):
        self.model = load_peer(folder).train()
        self.autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def loss(self, samples: Sequence[Encoded]) -> float:
        """Mean over the label tokens."""
        with torch.no_grad(), self.autocast:
            return float(self.model(**pad(samples), use_cache=False).loss)

    def step(self, batches: list[Padded]) -> None:
        """One optimiser step, as the Trainer makes it."""
        labels = sum((batch["labels"] != IGNORE).sum() for batch in batches)
        for batch in batches:
            with self.autocast:
                loss = self.model(**batch, use_cache=False, num_items_in_batch=labels).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


HERE: dict = {}
"""In a side's process: the side, and its batches per order."""


def set_up(side: str, folder: Path, precision: str, count: int, orders: Sequence[str]) -> tuple[float, int]:
    """In a new process: make a side and its batches, and take a step of each order. The first loss and the steps of a pass."""
    samples = make_samples(count)
    made = HERE["side"] = Ours(folder, precision) if side == "ours" else Peer(folder, precision)
    loss = made.loss(samples[:4])
    HERE["work"] = {order: list(pack(samples) if side == "ours" else in_fours(samples, order)) for order in orders}
    for batches in HERE["work"].values():
        made.step(batches[0])
    return loss, len(batches)


def go_through(order: str) -> float:
    """Seconds of a pass over all samples."""
    started = time.perf_counter()
    for batch in HERE["work"][order]:
        HERE["side"].step(batch)
    return time.perf_counter() - started


def speed(folder: Path, count: int, precision: str, orders: Sequence[str], repeats: int) -> Iterator[dict]:
    """The rows of one precision: a repeat is ours, then the peer in each order."""
    alone = get_context("spawn")
    tokens = sum(len(sample.tokens) for sample in make_samples(count))
    with ProcessPoolExecutor(1, mp_context=alone) as ours, ProcessPoolExecutor(1, mp_context=alone) as peer:
        first, steps = ours.submit(set_up, "ours", folder, precision, count, ["ours"]).result()
        theirs, _ = peer.submit(set_up, "peer", folder, precision, count, orders).result()
        assert precision == "bf16" or abs(first - theirs) < 1e-3, f"the first losses differ: {first}, {theirs}"
        log(f"{precision}: first loss {first:.5f} ours, {theirs:.5f} peer; {tokens} tokens, {steps} steps ours")
        rates: dict[str, list[float]] = {name: [] for name in ("ours", *orders)}
        for repeat in range(repeats):
            for name in rates:
                rates[name].append(tokens / (ours if name == "ours" else peer).submit(go_through, name).result())
            log(f"{precision} {repeat + 1}/{repeats}: " + ", ".join(f"{name} {rate[-1]:.0f} tokens/s" for name, rate in rates.items()))
    for order in orders:
        ratios = [a / b for a, b in zip(rates["ours"], rates[order], strict=True)]
        yield {
            "name": f"{order} {precision}", "ours": round(statistics.median(rates["ours"]), 1), "peer": round(statistics.median(rates[order]), 1),
            "ratio": round(statistics.median(ratios), 3), "unit": "useful tokens/s", "ratios": [round(r, 3) for r in ratios],
            "samples": count, "samples_per_step": round(count / steps, 2), "first_losses": [round(first, 5), round(theirs, 5)],
        }  # fmt: skip


def memory(folder: Path, count: int) -> dict:
    """The `memory` row."""
    sides = {}
    for side in ("ours", "peer"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            sides[side] = fresh.submit(peak, side, folder, count).result()
        log(f"memory {side}: {sides[side]}")
    (ours, ours_before), (peer, peer_before) = sides["ours"], sides["peer"]
    return {
        "name": "memory", "ours": ours, "peer": peer, "ratio": round(ours / peer, 3), "unit": "MiB, peak of the process",
        "ours_above": ours - ours_before, "peer_above": peer - peer_before, "ratio_above": round((ours - ours_before) / (peer - peer_before), 3),
        "samples": count,
    }  # fmt: skip


def peak(side: str, folder: Path, count: int) -> tuple[int, int]:
    """Peak resident MiB of this process after one pass, and what was resident before it."""
    samples = make_samples(count)
    made = Ours(folder, "fp32") if side == "ours" else Peer(folder, "fp32")
    before = resident("VmRSS")
    for batches in pack(samples) if side == "ours" else in_fours(samples, "shuffled"):
        made.step(batches)
    return resident("VmHWM"), before


def resident(field: str) -> int:
    """A field of /proc/self/status in MiB. Not ru_maxrss, which a process inherits from its parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) // 1024


def log(text: str) -> None:
    """Progress, with the machine's load."""
    print(f"{time.strftime('%H:%M:%S')} load {os.getloadavg()[0]:.2f}  {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="passes of each side")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--only", action="append", choices=[*SPEED, "memory"], help="measure this row; may be given several times")
    chosen = parser.parse_args()
    wanted = chosen.only or [*SPEED, "memory"]
    emit(machine())
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write(folder)
        for precision in ("fp32", "bf16"):
            orders = [name.split()[0] for name in SPEED if name in wanted and name.endswith(precision)]
            if orders:
                for row in speed(folder, chosen.samples, precision, orders, chosen.repeats):
                    emit(row)
        if "memory" in wanted:
            emit(memory(folder, chosen.samples))


if __name__ == "__main__":
    main()
