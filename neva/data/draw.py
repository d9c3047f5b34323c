"""Usable samples in the global order: of each stream the next that is not left out. Says what was
left out, and what remains to be drawn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from neva.data.encode import Measure
from neva.data.order import Blend, Ref, furthest_behind
from neva.data.pack import Item
from neva.data.sample import SampleError

NAMED = 100
"""Samples left out that are remembered by name; all are counted."""


@dataclass(frozen=True)
class Bad:
    """Why a sample is left out. Crosses processes and ranks in place of its measure."""

    why: Literal["long", "broken"]
    source: str
    id: str
    message: str
    tokens: int = 0
    """Its length if it is too long, and its tiles."""
    tiles: int = 0
    unread: tuple[str, ...] = ()
    """`Sample.unread`."""


@dataclass
class Draws:
    """Gives items forever, from what measuring found of each stream's samples, in order.

    Raises SampleError for a sample that may not be left out, and ValueError for a
    stream without a usable one.
    """

    blend: Blend
    measured: Callable[[int], tuple[Ref, Measure | Bad]]
    """The next sample of a stream, and its measure."""
    stop_at: frozenset[str] = frozenset()
    """Kinds of `Bad` that are errors."""
    drawn: list[int] = field(init=False)
    """Samples of each source so far, those left out too."""
    given: list[int] = field(init=False)
    """Usable samples of each stream so far."""
    left_out: dict[str, int] = field(default_factory=lambda: {"long": 0, "broken": 0}, init=False)
    names: list[list[str]] = field(default_factory=list, init=False)
    """The first `NAMED` that were left out: source, id and message."""
    reduced: int = field(default=0, init=False)
    """Samples whose images were cut into fewer tiles."""
    fresh: list[Bad] = field(default_factory=list, init=False)
    """What was left out since this list was last cleared."""

    def __post_init__(self) -> None:
        self._streams = self.blend.streams
        self._shares = self.blend.shares
        self.drawn = [0] * len(self.blend.names)
        self.given = [0] * len(self._streams)
        self._barren = [0] * len(self.blend.names)

    def __iter__(self) -> Iterator[Item]:
        while True:
            stream = furthest_behind(self._shares, self.given)
            item = self._usable(stream)
            self.given[stream] += 1
            yield item

    def state(self) -> dict[str, Any]:
        """Plain JSON for `restore`."""
        return {
            "drawn": list(self.drawn),
            "given": list(self.given),
            "left_out": dict(self.left_out),
            "names": list(self.names),
            "reduced": self.reduced,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where the one that gave `state` stood; `measured` must, too."""
        self.drawn = list(state["drawn"])
        self.given = list(state["given"])
        self.left_out = dict(state["left_out"])
        self.names = [list(one) for one in state["names"]]
        self.reduced = state["reduced"]
        self.fresh.clear()

    def _usable(self, stream: int) -> Item:
        while True:
            ref, outcome = self.measured(stream)
            self.drawn[ref.source] += 1
            if isinstance(outcome, Measure):
                for source in self._streams[stream]:
                    self._barren[source] = 0
                self.reduced += outcome.max_tiles > 0
                return item_of(ref, outcome.tokens, outcome.tiles)
            self._set_aside(ref, outcome, stream)

    def _set_aside(self, ref: Ref, bad: Bad, stream: int) -> None:
        if bad.why in self.stop_at:
            raise SampleError(bad.source, bad.id, bad.message)
        self.left_out[bad.why] += 1
        self.fresh.append(bad)
        if len(self.names) < NAMED:
            self.names.append([bad.source, bad.id, bad.message])
        self._barren[ref.source] += 1
        sources = self._streams[stream]
        lengths = self.blend.lengths
        # So many in a row hold a whole pass; `length` of them can be the end of one and
        # the start of the next.
        if all(self._barren[source] >= 2 * lengths[source] - 1 for source in sources):
            names = ", ".join(self.blend.names[source] for source in sources)
            count = sum(lengths[source] for source in sources)
            counts = f"{self.left_out['long']} too long, {self.left_out['broken']} unreadable"
            last = f"the last was {SampleError(bad.source, bad.id, bad.message)}"
            raise ValueError(
                f"none of the {count} samples of {names} can be used ({counts}); {last}",
            )


def item_of(ref: Ref, tokens: int, tiles: int) -> Item:
    """A drawn sample for the packer."""
    return Item(ref, tokens, tiles, source=ref.source, epoch=ref.epoch)
