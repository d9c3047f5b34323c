"""The global order of samples: a blend of sources, each shuffled anew in each epoch. A function of the seed alone."""

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


@dataclass
class Order:
    """Draws references forever. `drawn`, how many each source has given, is its whole state.

    The blend takes, at each draw, the source that is furthest behind its share. Raises ValueError for no sources or a bad weight.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    weights: tuple[float, ...] | None
    seed: int
    shuffle: bool
    drawn: list[int] = field(init=False)
    _shuffled: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, init=False)
    """Source -> (epoch, its permutation)."""

    def __post_init__(self) -> None:
        weights = [float(length) for length in self.lengths] if self.weights is None else self.weights
        if not self.names:
            raise ValueError("there is no data source: set data.source or data.sources")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"two data sources have one name ({', '.join(self.names)}): give each its own `name`")
        if min(self.lengths) < 1:
            raise ValueError(f"the source '{self.names[self.lengths.index(min(self.lengths))]}' holds no sample: remove it")
        if len(weights) != len(self.names) or not all(0 < weight < float("inf") for weight in weights):
            given = f"the sources {', '.join(self.names)} have the weights {list(weights)}"
            raise ValueError(f"{given}: each needs one above 0; remove a source to leave it out")
        self._shares = [weight / sum(weights) for weight in weights]
        self.drawn = [0] * len(self.names)

    def draw(self) -> Ref:
        """The next reference."""
        number = sum(self.drawn) + 1
        behind = [share * number - drawn for share, drawn in zip(self._shares, self.drawn, strict=True)]
        source = behind.index(max(behind))
        epoch, place = divmod(self.drawn[source], self.lengths[source])
        self.drawn[source] += 1
        return Ref(source, epoch, int(self._permutation(source, epoch)[place]) if self.shuffle else place)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        if self._shuffled.get(source, (-1,))[0] != epoch:
            self._shuffled[source] = epoch, permutation(self.lengths[source], (self.seed, zlib.crc32(self.names[source].encode()), epoch))
        return self._shuffled[source][1]


def permutation(length: int, seed: Sequence[int]) -> np.ndarray:
    """A shuffle of range(length) that is the same on every machine and numpy version: its bit generators are frozen, its `shuffle` is not."""
    return np.argsort(np.random.PCG64(list(seed)).random_raw(length), kind="stable")
