"""What a look at samples and the headers of their images found, in words: lengths, samples that
are too long or cannot be read, keys that are not read."""

from dataclasses import dataclass, field

from neva.batch import ImageLayout
from neva.config import counted
from neva.data.draw import Bad
from neva.data.encode import Measure
from neva.data.pack import Budget
from neva.data.sample import SampleError
from neva.data.source import unread

MOST_BROKEN = 100
"""Samples that cannot be read which are remembered by name; the others are counted."""


@dataclass(kw_only=True)
class Longest:
    """The sample with the most tokens, or the most tiles of those."""

    source: int = 0
    index: int = 0
    tokens: int = 0
    tiles: int = 0


@dataclass(kw_only=True)
class Seen:
    """Counts over the samples that were looked at."""

    samples: int = 0
    images: int = 0
    tiles: int = 0
    """Of those that fit a row."""
    long: int = 0
    """Samples that no row can hold."""
    cut: int = 0
    """Samples that are cut to a row's length."""
    fewer: int = 0
    """Samples whose images are cut into fewer tiles."""
    broken: int = 0
    """Samples that cannot be read."""
    first_broken: dict[tuple[int, int], Bad] = field(default_factory=dict)
    """(source, index) -> why, of the first `MOST_BROKEN`."""
    longest: Longest = field(default_factory=Longest)

    def add(self, source: int, index: int, outcome: Measure | Bad) -> None:
        """Count one sample."""
        self.samples += 1
        tokens, tiles = outcome.tokens, outcome.tiles
        if isinstance(outcome, Measure):
            self.images += outcome.images
            self.tiles += tiles
            self.fewer += outcome.max_tiles > 0
            self.cut += outcome.whole > 0
            tokens = max(tokens, outcome.whole)
        elif outcome.why == "long":
            self.long += 1
        else:
            self.broken += 1
            if len(self.first_broken) < MOST_BROKEN:
                self.first_broken[source, index] = outcome
        if (tokens, tiles) > (self.longest.tokens, self.longest.tiles):
            self.longest = Longest(source=source, index=index, tokens=tokens, tiles=tiles)

    def first(self) -> SampleError | None:
        """The first sample that cannot be read, and how many others cannot; None if all can."""
        if not self.broken:
            return None
        bad = self.first_broken[min(self.first_broken)]
        others = self.broken - 1
        more = ""
        if others:
            more = f" ({others:,} more of the {self.samples:,} samples that were looked at cannot)"
        return SampleError(bad.source, bad.id, bad.message + more)

    def told(self, *, total: int, layout: ImageLayout, budget: Budget, longest: str) -> list[str]:
        """Clauses to print; `longest` is what the longest sample is called."""
        clauses = [_looked(self.samples, total)]
        if layout.images and self.images:
            clauses.append(self._image(layout))
        row = f"a row of {budget.seq_length:,} tokens and {budget.max_tiles} tiles"
        if self.long:
            clauses.append(f"{_count(self.long)} too long for {row} and left out")
        if self.cut:
            clauses.append(f"{_count(self.cut)} longer than a row and cut at the end")
        if self.fewer:
            clauses.append(f"{_count(self.fewer)} given fewer tiles to fit {row}")
        if (bad := self.first()) is not None:
            clauses.append(f"{_count(self.broken)} unreadable and left out, {bad}")
        if self.longest.tokens:
            size = f"{self.longest.tokens:,} tokens and {counted(self.longest.tiles, 'tile')}"
            clauses.append(f"the longest is {longest} with {size}")
        return clauses

    def _image(self, layout: ImageLayout) -> str:
        most = layout.tokens_per_image
        if layout.most_tiles == 1:
            return f"an image takes {most:,} tokens"
        mean = self.tiles / self.images
        whole = f"an image takes up to {most:,} tokens and {layout.most_tiles} tiles"
        return f"{whole}, {mean:.1f} tiles on average"


def _looked(samples: int, total: int) -> str:
    if samples == total:
        return f"looked at all {total:,} samples and the headers of their images"
    return f"looked at {samples:,} of {total:,} samples and the headers of their images"


def _count(samples: int) -> str:
    return f"{samples:,} is" if samples == 1 else f"{samples:,} are"


@dataclass
class Unread:
    """Keys of rows that are not read, each told once."""

    told: set[tuple[str, str]] = field(default_factory=set)
    """(source, key)."""
    lines: list[str] = field(default_factory=list)
    """What is to be told."""

    def add(self, source: str, keys: tuple[str, ...]) -> None:
        """Notes the keys of a row."""
        for key in keys:
            if (source, key) not in self.told and len(self.told) < MOST_KEYS:
                self.told.add((source, key))
                self.lines.append(f"a row of '{source}': {unread(key)}")


MOST_KEYS = 32
"""Keys that are told; a stranger's file may hold any number."""
