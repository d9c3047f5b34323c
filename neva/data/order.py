"""The global order of samples: a blend of streams, each source shuffled anew in each epoch. A
function of the seed alone."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Ref(NamedTuple):
    """Which sample, and in which pass over its source."""

    source: int
    epoch: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Sources and their weights, as streams: all without a weight are one, which goes through them
    at one pace; each other is its own.

    Shares are those of *usable* samples: a stream replaces one that is left out by its next.
    Raises ValueError for no sources or a bad weight.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    weights: tuple[float | None, ...]
    """Relative shares. The stream of sources without a weight weighs as much
    as they have samples."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("there is no data source: set data.source or data.sources")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"two data sources have one name ({', '.join(self.names)}): give each its own `name`")
        if min(self.lengths) < 1:
            raise ValueError(f"the source '{self.names[self.lengths.index(min(self.lengths))]}' holds no sample: remove it")
        given = [weight for weight in self.weights if weight is not None]
        sound = all(0 < weight < float("inf") for weight in given)
        if len(self.weights) != len(self.names) or not sound:
            told = f"the sources {', '.join(self.names)} have the weights {list(self.weights)}"
            raise ValueError(
                f"{told}: each needs one above 0, or none; remove a source to leave it out",
            )

    @property
    def streams(self) -> tuple[tuple[int, ...], ...]:
        """The sources of each stream."""
        paced = tuple(source for source, weight in enumerate(self.weights) if weight is None)
        own = tuple((source,) for source, weight in enumerate(self.weights) if weight is not None)
        return (paced, *own) if paced else own

    @property
    def shares(self) -> tuple[float, ...]:
        """Each stream's share of the samples; they add up to 1."""
        each = [float(w or n) for w, n in zip(self.weights, self.lengths, strict=True)]
        sizes = [sum(each[source] for source in stream) for stream in self.streams]
        return tuple(size / sum(sizes) for size in sizes)


def furthest_behind(shares: Sequence[float], given: Sequence[int]) -> int:
    """Whose turn it is, after so many were `given` by each: the one whose share of one more
    is furthest above that."""
    number = sum(given) + 1
    behind = [share * number - count for share, count in zip(shares, given, strict=True)]
    return behind.index(max(behind))


@dataclass
class Order:
    """Draws references from each stream forever. `drawn`, how many each source has
    given, is its whole state."""

    blend: Blend
    seed: int
    shuffle: bool
    drawn: list[int] = field(init=False)
    _shuffled: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, init=False)
    """Source -> (epoch, its permutation)."""

    def __post_init__(self) -> None:
        self.drawn = [0] * len(self.blend.names)
        self._streams = self.blend.streams
        lengths = [[self.blend.lengths[source] for source in stream] for stream in self._streams]
        self._paces = [[length / sum(of) for length in of] for of in lengths]

    def draw(self, stream: int) -> Ref:
        """The stream's next reference: of its source that is furthest behind."""
        sources = self._streams[stream]
        source = sources[furthest_behind(self._paces[stream], [self.drawn[one] for one in sources])]
        epoch, place = divmod(self.drawn[source], self.blend.lengths[source])
        self.drawn[source] += 1
        return Ref(source, epoch, int(self._permutation(source, epoch)[place]) if self.shuffle else place)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        if self._shuffled.get(source, (-1,))[0] != epoch:
            seed = (self.seed, zlib.crc32(self.blend.names[source].encode()), epoch)
            self._shuffled[source] = epoch, permutation(self.blend.lengths[source], seed)
        return self._shuffled[source][1]


def permutation(length: int, seed: Sequence[int]) -> np.ndarray:
    """A shuffle of range(length) that is the same on every machine and numpy version: its bit generators are frozen, its `shuffle` is not."""
    return np.argsort(np.random.PCG64(list(seed)).random_raw(length), kind="stable")
