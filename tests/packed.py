"""Batches packed by brute force, one token at a time: an oracle that is independent of `neva/data/pack.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from neva.batch import IGNORE, IMAGE, Batch, ImageLayout

CHUNK = 8
"""`Batch.labelled` is padded to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample: ids with `IMAGE` once per feature, labels that are not shifted, and the tiles in order."""

    tokens: list[int]
    labels: list[int]
    tiles: list[Tensor] = field(default_factory=list)


def item(layout: ImageLayout, *, text: int, images: int = 0, vocab: int = 60, seed: int = 0) -> Item:
    """A random sample: `images` images spread among `text` random ids, about half of which carry a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (text,), generator=generator).tolist()
    kept = torch.rand(text, generator=generator).lt(0.5).tolist()
    tokens, labels = [], []
    for number, (token, keep) in enumerate(zip(ids, kept, strict=True)):
        if number < images:
            tokens += [IMAGE] * layout.tokens_per_tile
            labels += [IGNORE] * layout.tokens_per_tile
        tokens.append(token)
        labels.append(token if keep or number == text - 1 else IGNORE)
    tiles = [torch.randint(0, 256, (3, layout.tile, layout.tile), dtype=torch.uint8, generator=generator) for _ in range(images)]
    return Item(tokens=tokens, labels=labels, tiles=tiles)


def pack(layout: ImageLayout, rows: Sequence[Sequence[Item]], length: int, *, bounds: int | None = None, any_tiles: bool | None = None) -> Batch:
    """Rows of `length` tokens, samples one after another, padding at the end; `bounds` is the fixed length of `cu_seqlens`."""
    tokens, labels, positions, segments = (torch.full((len(rows), length), value) for value in (0, IGNORE, 0, 0))
    cu, tiles, places = [0], [], []
    for r, row in enumerate(rows):
        at = 0
        for number, sample in enumerate(row):
            for i, token in enumerate(sample.tokens):
                tokens[r, at], positions[r, at], segments[r, at] = token, i, number + 1
                if i + 1 < len(sample.tokens):
                    labels[r, at] = sample.labels[i + 1]
                if token == IMAGE:
                    places.append(r * length + at)
                at += 1
            tiles += sample.tiles
            cu.append(r * length + at)
        if at < length:
            cu.append((r + 1) * length)
    longest = max(b - a for a, b in pairwise(cu))
    cu += [len(rows) * length] * ((bounds or len(cu)) - len(cu))
    flat = labels.flatten()
    labelled = [i for i in range(flat.numel()) if flat[i] != IGNORE]
    labelled += [-1] * (-len(labelled) % CHUNK)
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch(
        tokens=tokens, labels=labels, positions=positions, segments=segments,
        cu_seqlens=torch.tensor(cu, dtype=torch.int32), max_len=longest, labelled=torch.tensor(labelled, dtype=torch.int64),
        groups=torch.zeros_like(tokens), group_names=("all",),
        tiles=torch.stack(tiles) if tiles else torch.zeros(0, 3, layout.tile, layout.tile, dtype=torch.uint8),
        inline=torch.arange(len(tiles)), slots=torch.tensor(places, dtype=torch.int64).view(len(tiles), layout.tokens_per_tile),
        memory=empty, memory_tags=empty.view(0, 0), memory_tokens=empty, memory_positions=empty,
        sees=torch.zeros(len(rows), length, 2, dtype=torch.int64), runs=empty.view(0, 4), run_sizes=(0, 0, 0, 0),
        any_tiles=bool(tiles) if any_tiles is None else any_tiles,
    )  # fmt: skip


def real(batch: Batch) -> Tensor:
    """Flat positions that are not padding."""
    return (batch.segments.flatten() > 0).nonzero()[:, 0]
