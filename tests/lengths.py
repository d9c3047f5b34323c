"""Samples that are nothing but lengths, and the loader's order and packing of
them without its batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neva.batch import IGNORE, ImageLayout
from neva.data.draw import Bad, Draws
from neva.data.encode import Encoder, Measure
from neva.data.loader import Loader, LoaderOptions
from neva.data.order import Blend, Order, Ref
from neva.data.pack import Budget, Packer
from neva.data.sample import Encoded, Sample, SampleError, Turn
from neva.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Lengths:
    """A source whose samples are lengths in tokens; 0 is a sample that cannot be read."""

    name: str
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not self.lengths[index]:
            raise SampleError(self.name, str(index), "it cannot be read")
        turns = (Turn(role="user", text="x"), Turn(role="assistant", text=str(self.lengths[index])))
        return Sample(source=self.name, id=str(index), turns=turns, images=())

    @property
    def fingerprint(self) -> str:
        return str(list(self.lengths))

    def usable(self, seq_length: int) -> int:
        return sum(0 < length <= seq_length for length in self.lengths)


class LengthEncoder(Encoder):
    """Makes samples of the lengths that they say."""

    def measure(self, sample: Sample, **_: Any) -> Measure:
        return Measure(tokens=int(sample.turns[-1].text), tiles=0)

    def encode(self, sample: Sample, **_: Any) -> Encoded:
        tokens = torch.ones(int(sample.turns[-1].text), dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE)
        tiles = torch.zeros(0, 3, 2, 2, dtype=torch.uint8)
        return Encoded.plain(tokens, labels, tiles, group="", key=(sample.source, sample.id))


ENCODER = LengthEncoder(
    load_tokenizer(Path(__file__).parent / "data" / "tiny.model"),
    "v1",
    "",
    ImageLayout(tile=2, tokens_per_tile=3),
)


def loader(
    sources: Sequence[Lengths],
    *,
    rows: int = 1,
    weights: Any = None,
    **more: Any,
) -> Loader:
    options = LoaderOptions(**{"on_error": "skip", **more.pop("options", {})})
    return Loader(
        sources,
        ENCODER,
        Budget(seq_length=2048, rows=rows),
        options,
        weights=weights,
        **more,
    )


def packer(
    sources: Sequence[Lengths],
    *,
    seq_length: int = 2048,
    weights: Any = None,
    pool: int = 128,
    seed: int = 0,
) -> Packer:
    """The loader's order and packing, without its batches."""
    names = tuple(source.name for source in sources)
    sizes = tuple(map(len, sources))
    given = tuple(weight and float(weight) for weight in weights or [None] * len(sources))
    blend = Blend(names=names, lengths=sizes, weights=given)
    order = Order(blend, seed, True)

    def measured(stream: int) -> tuple[Ref, Measure | Bad]:
        ref = order.draw(stream)
        length = sources[ref.source].lengths[ref.index]
        usable = 0 < length <= seq_length
        return ref, Measure(tokens=length, tiles=0) if usable else Bad("long", "", "", "")

    return Packer(Budget(seq_length=seq_length), Draws(blend, measured), pool=pool)


def trained(one: Packer, count: int) -> list[tuple[int, int]]:
    """The (source, index) of the first `count` samples or a few more, in the order of training."""
    keys: list[tuple[int, int]] = []
    while len(keys) < count:
        keys += [(item.ref.source, item.ref.index) for item in one.pop_row()]
    return keys


def draw(kind: str, count: int, seed: int = 0) -> list[int]:
    """Lengths in rows of 2,048."""
    rng = np.random.default_rng(seed)
    if kind == "llava":
        return (np.clip(rng.lognormal(5.3, 0.7, count), 30, 1500).astype(int) + 64).tolist()
    low, high = {"long": (1100, 1300), "middle": (600, 900), "short": (60, 200)}[kind]
    return rng.integers(low, high, count, endpoint=True).tolist()


def with_holes(lengths: list[int], every: int) -> list[int]:
    """Every n-th is too long, and the one after it cannot be read."""
    return [(3000, 0)[i % every] if i % every < 2 else length for i, length in enumerate(lengths)]
