"""Packs samples into rows under a token and a tile budget, and rows into a `Batch`.

Shapes: b rows, s `seq_length`, n tiles, m inline tiles, k memory tiles, p tokens per tile, g longest tag, y keys, r runs.
"""

from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from neva.batch import IGNORE, IMAGE, Batch, ImageLayout
from neva.data.sample import Encoded


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The shape of a step. Raises ValueError for a size below 1."""

    seq_length: int
    """Tokens in a row."""
    rows: int = 1
    """Rows of a step over all ranks."""
    micro_rows: int = 1
    """Rows of a micro-batch."""
    max_tiles: int = 64
    """Image tiles in a row."""

    def __post_init__(self) -> None:
        for name in ("seq_length", "rows", "micro_rows", "max_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def max_documents(self) -> int:
        """Samples in a row: bounded, so that `cu_seqlens` is short and of one length (a kernel starts work for each entry)."""
        return min(self.seq_length, max(16, self.seq_length // 16))

    def fits(self, item: "Item") -> bool:
        """Whether the item fits an empty row."""
        return 0 < item.tokens <= self.seq_length and item.tiles <= self.max_tiles


POOL = 128
"""Samples, from the oldest waiting one on, that packing chooses from. On log-normal lengths as
LLaVA's, 32 leave 1.6 % of the rows empty, 128 leave 1.2 % and 512 leave 0.9 %; but with 512 a
sample may wait for as many rows."""
LEAD = 100
"""All sources together may be ahead of the order of drawing by one sample in so many packed: shares
stay within a percent."""


@dataclass(frozen=True, slots=True)
class Item:
    """A measured sample: its reference, its lengths, and which pass over which
    source it belongs to."""

    ref: Any
    tokens: int
    tiles: int = 0
    source: int = 0
    epoch: int = 0


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What a packer holds between two rows."""

    arrived: int
    """Items that came so far."""
    items: tuple[tuple[int, Item], ...]
    """Those that wait, each with its number of arrival, oldest first."""
    due: tuple[int, ...]
    """Sources of the latest arrivals, as many as wait: what would wait had all
    left in order of arrival."""


class Packer:
    """Fills rows from a stream of items: the oldest first, then whatever fits best of the `pool`
    items that begin with the oldest waiting.

    What is promised, whatever the lengths, for sources whose items come epoch by epoch:

    * No item waits for more than 2 * `pool` rows: each row takes one of the `pool` that begin with
      the oldest.
    * A source's items leave at most one epoch ahead of its oldest waiting, those of the oldest
      epoch preferred. So once k times its samples have left, each has left k - 1 to k + 1 times.
    * All sources together are ahead of the order in which items came by no more than a hundredth of
      all that left, or by one item less than there are sources. An item whose source is too far
      ahead waits, even if it is the oldest.

    Raises ValueError for a `pool` below 1, and from `pop_row` for an item that no row can hold.
    """

    def __init__(self, budget: Budget, items: Iterable[Item], *, pool: int = POOL) -> None:
        if pool < 1:
            raise ValueError(f"data.pool is {pool}: it must be at least 1")
        self.budget = budget
        self.pool = pool
        self._items = iter(items)
        self._arrived = 0
        self._waiting: dict[int, Item] = {}  # number of arrival -> item, oldest first
        self._due: deque[int] = deque()  # see `Waiting.due`
        # source -> items that left beyond those that would have left in order
        self._lead: dict[int, int] = {}
        self._leading = 0  # the sum of leads above 0
        self._epochs: dict[int, dict[int, int]] = {}  # source -> epoch -> items waiting
        # Keys (tokens, -number) of waiting items, sorted, by how many epochs they are ahead of
        # their source's oldest: 0, 1, more.
        self._ahead: tuple[list[tuple[int, int]], ...] = ([], [], [])

    def pop_row(self) -> list[Item]:
        """The next row's items, the oldest first; empty when the stream has
        ended and all have left."""
        row: list[Item] = []
        tokens = self.budget.seq_length
        tiles = self.budget.max_tiles
        while len(row) < self.budget.max_documents:
            self._refill()
            number = self._best_fit(tokens, tiles) if row else self._oldest()
            if number is None:
                break
            item = self._take(number)
            row.append(item)
            tokens -= item.tokens
            tiles -= item.tiles
        return row

    def rows(self) -> Iterator[list[Item]]:
        """All rows until the stream ends."""
        while row := self.pop_row():
            yield row

    def state(self) -> Waiting:
        """What a new packer needs to go on, with a stream that goes on."""
        return Waiting(
            arrived=self._arrived,
            items=tuple(self._waiting.items()),
            due=tuple(self._due),
        )

    def restore(self, state: Waiting) -> None:
        """Makes a new packer stand where the one that gave `state` stood."""
        assert not self._arrived, "restored before its first row"
        for number, item in state.items:
            self._arrived = number
            self._put(item)
        self._arrived = state.arrived
        self._due = deque(state.due)
        ahead = Counter(state.due)
        ahead.subtract(item.source for _, item in state.items)
        self._lead = dict(ahead)
        self._leading = sum(max(0, lead) for lead in ahead.values())

    def _refill(self) -> None:
        while not self._waiting or self._arrived - next(iter(self._waiting)) < self.pool:
            item = next(self._items, None)
            if item is None:
                return
            self._put(item)

    def _put(self, item: Item) -> None:
        if not self.budget.fits(item):
            budget = self.budget
            limits = f"a row holds {budget.seq_length} tokens and {budget.max_tiles} tiles"
            has = f"{item.ref} has {item.tokens} tokens and {item.tiles} tiles"
            raise ValueError(f"{has} but {limits}: leave it out, or raise the batch's limits")
        waiting = self._epochs.setdefault(item.source, {})
        waiting[item.epoch] = waiting.get(item.epoch, 0) + 1
        self._waiting[self._arrived] = item
        insort(self._ahead[min(2, item.epoch - min(waiting))], (item.tokens, -self._arrived))
        self._due.append(item.source)
        self._lead.setdefault(item.source, 0)
        self._arrived += 1

    def _oldest(self) -> int | None:
        """The oldest item whose source may have its turn. As long as any waits there is one: all
        sources cannot be ahead."""
        return next(
            (number for number, item in self._waiting.items() if self._in_turn(item.source)),
            None,
        )

    def _best_fit(self, tokens: int, tiles: int) -> int | None:
        """The longest item that fits, and of those the oldest; one of its source's
        oldest epoch if any fits."""
        for keys in self._ahead[:2]:
            for place in range(bisect_right(keys, (tokens, 1)) - 1, -1, -1):
                number = -keys[place][1]
                item = self._waiting[number]
                if item.tiles <= tiles and self._in_turn(item.source):
                    return number
        return None

    def _in_turn(self, source: int) -> bool:
        """Whether one more of this source leaves the sources together no further ahead than they
        may be, or than they are."""
        due = self._due[0]
        if source == due or self._lead[source] < 0 or self._lead[due] > 0:
            return True
        left = self._arrived - len(self._waiting)
        return self._leading < max(len(self._lead) - 1, left // LEAD)

    def _take(self, number: int) -> Item:
        item = self._waiting.pop(number)
        waiting = self._epochs[item.source]
        oldest = min(waiting)
        keys = self._ahead[min(2, item.epoch - oldest)]
        del keys[bisect_left(keys, (item.tokens, -number))]
        self._change_lead(item.source, 1)
        self._change_lead(self._due.popleft(), -1)
        waiting[item.epoch] -= 1
        if not waiting[item.epoch]:
            del waiting[item.epoch]
            if item.epoch == oldest and waiting:
                self._advance(item.source, min(waiting))
        return item

    def _change_lead(self, source: int, change: int) -> None:
        before = self._lead[source]
        self._lead[source] = before + change
        self._leading += max(0, before + change) - max(0, before)

    def _advance(self, source: int, oldest: int) -> None:
        """Sorts a source's items anew when its oldest epoch has left."""
        for keys in self._ahead[1:]:
            keys[:] = [key for key in keys if self._waiting[-key[1]].source != source]
        for number, item in self._waiting.items():
            if item.source == source:
                insort(self._ahead[min(2, item.epoch - oldest)], (item.tokens, -number))


def collate(
    rows: Sequence[Sequence[Encoded]], budget: Budget, *, layout: ImageLayout, group_names: tuple[str, ...], any_tiles: bool, head_chunk: int = 64
) -> Batch:
    """A micro-batch of `budget.micro_rows` rows, empty ones added, from encoded samples. Also checks it.

    `cu_seqlens` has one length for all rows that a Packer makes (it grows for rows of more samples). `labelled` has at least one
    chunk, so that the head always runs.
    Raises ValueError if a row is over-full, a group is not in `group_names`, or placeholders and tiles disagree.
    """
    b, s = budget.micro_rows, budget.seq_length
    if len(rows) > b:
        raise ValueError(f"there are {len(rows)} rows but batch.micro_rows is {b}: give fewer rows or raise it")
    tokens, positions, segments, groups = (torch.zeros(b, s, dtype=torch.int64) for _ in range(4))
    labels = torch.full((b, s), IGNORE, dtype=torch.int64)
    ends, starts = [0], []
    for r, row in enumerate(rows):
        _check_row(row, budget, group_names)
        at = 0
        for segment, encoded in enumerate(row, 1):
            t = len(encoded.tokens)
            tokens[r, at : at + t] = encoded.tokens
            labels[r, at : at + t - 1] = encoded.labels[1:]  # the label at t is the token after t
            positions[r, at : at + t] = torch.arange(t)
            segments[r, at : at + t] = segment
            groups[r, at : at + t] = group_names.index(encoded.group)
            starts.append(r * s + at)
            at += t
            ends.append(r * s + at)
        ends += [(r + 1) * s] if at < s else []
    ends += [x * s for x in range(len(rows) + 1, b + 1)]
    samples = [encoded for row in rows for encoded in row]
    labelled = torch.nonzero(labels.flatten() != IGNORE).flatten()
    chunks = max(1, -(-len(labelled) // head_chunk))
    batch = Batch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        segments=segments,
        cu_seqlens=torch.tensor(ends + [b * s] * (b * (budget.max_documents + 1) + 1 - len(ends)), dtype=torch.int32),
        max_len=s,
        labelled=torch.cat([labelled, torch.full((chunks * head_chunk - len(labelled),), -1)]),
        groups=groups,
        group_names=group_names,
        **place_tiles(samples, starts, (b, s), layout),
        any_tiles=any_tiles,
        keys=tuple(encoded.key for encoded in samples),
    )
    check(batch, layout)
    return batch


def place_tiles(samples: Sequence[Encoded], starts: Sequence[int], shape: tuple[int, int], layout: ImageLayout) -> dict[str, Any]:
    """The samples' tiles and where they go: fields of a `Batch` of this shape, in which each sample begins at its flat position."""
    none, p = torch.zeros(0, dtype=torch.int64), layout.tokens_per_tile
    sees = torch.zeros(shape[0] * shape[1], 2, dtype=torch.int64)
    inline, slots, memory, tiles = [none], [none.view(0, p)], [none], 0
    keys = _Keys.of(samples, layout)
    for encoded, start, held in zip(samples, starts, keys.held, strict=True):
        places = encoded.slots.view(-1, p)
        inline.append(encoded.inline + tiles)
        slots.append(torch.where(places < 0, places, places + start))
        memory.append(encoded.memory + tiles)
        sees[start : start + len(encoded.tokens)] = torch.where(encoded.sees[:, :1] < encoded.sees[:, 1:], encoded.sees + held, 0)
        tiles += len(encoded.tiles)
    runs = _runs(keys.bounds[sees])
    return {
        "tiles": torch.cat([encoded.tiles for encoded in samples] or [torch.zeros(0, 3, layout.tile, layout.tile, dtype=torch.uint8)]),
        "inline": torch.cat(inline),
        "slots": torch.cat(slots),
        "memory": torch.cat(memory),
        "memory_tags": keys.tags,
        "memory_tokens": keys.tokens,
        "memory_positions": keys.positions,
        "sees": sees.view(*shape, 2),
        "runs": runs,
        "run_sizes": run_sizes(runs),
    }


def next_runs(samples: Sequence[Encoded], layout: ImageLayout) -> Int64[Tensor, "r 4"]:
    """`Batch.runs` of one more token for each of these samples, which were packed together: what it sees of their memory."""
    keys = _Keys.of(samples, layout)
    ranges = torch.tensor([encoded.next_sees for encoded in samples], dtype=torch.int64)
    held = torch.tensor(keys.held)[:, None]
    return _runs(keys.bounds[torch.where(ranges[:, :1] < ranges[:, 1:], ranges + held, 0)])


@dataclass(frozen=True)
class _Keys:
    """The memory tiles of samples as keys of attention."""

    tags: Int64[Tensor, "k g"]
    """`Batch.memory_tags`."""
    tokens: Int64[Tensor, " y"]
    """`Batch.memory_tokens`."""
    positions: Int64[Tensor, " y"]
    """`Batch.memory_positions`."""
    bounds: Int64[Tensor, " k1"]
    """Keys before each memory tile, and all of them."""
    held: list[int]
    """Memory tiles before each sample's."""

    @staticmethod
    def of(samples: Sequence[Encoded], layout: ImageLayout) -> "_Keys":
        held = [0, *accumulate(len(encoded.memory) for encoded in samples)]
        longest = max((encoded.memory_tags.shape[1] for encoded in samples), default=0)
        tags = torch.cat([
            torch.zeros(0, longest, dtype=torch.int64),
            *(F.pad(e.memory_tags, (0, longest - e.memory_tags.shape[1]), value=-1) for e in samples if len(e.memory)),
        ])  # fmt: skip
        beside = tags if layout.tag_binding != "added" else tags[:, :0]
        real = torch.cat((beside >= 0, torch.ones(len(tags), layout.tokens_per_tile, dtype=torch.bool)), dim=1)
        bounds = F.pad(real.sum(1).cumsum(0), (1, 0))
        tokens = torch.nonzero(real.flatten()).flatten()
        firsts = torch.cat([torch.zeros(0, dtype=torch.int64), *(e.memory_starts + start for e, start in zip(samples, held[:-1], strict=True))])
        begins = bounds[firsts.repeat_interleave(real.sum(1))]
        return _Keys(tags=tags, tokens=tokens, positions=torch.arange(len(tokens)) - begins, bounds=bounds, held=held[:-1])


def _runs(ranges: Int64[Tensor, "t 2"]) -> Int64[Tensor, "r 4"]:
    """Neighbouring tokens that see the same keys, from each token's. Padding sees none; no two samples share a range, so runs end where they do."""
    changes = torch.nonzero((ranges[1:] != ranges[:-1]).any(1)).flatten() + 1
    starts, ends = F.pad(changes, (1, 0)), F.pad(changes, (0, 1), value=len(ranges))
    runs = torch.cat((starts[:, None], ends[:, None], ranges[starts]), dim=1)
    return runs[runs[:, 2] < runs[:, 3]]


def run_sizes(runs: Int64[Tensor, "r 4"]) -> tuple[int, int, int, int]:
    """`Batch.run_sizes`."""
    if not len(runs):
        return 0, 0, 0, 0
    queries, keys = runs[:, 1] - runs[:, 0], runs[:, 3] - runs[:, 2]
    return int(queries.sum()), int(keys.sum()), int(queries.max()), int(keys.max())


def check(batch: Batch, layout: ImageLayout) -> None:
    """Raises ValueError unless each placeholder is the slot of one feature, each tile has its place, and memory is seen within bounds."""
    flat = batch.tokens.flatten()
    placed = batch.slots[batch.slots >= 0]
    wanted, features = int((flat == IMAGE).sum()), len(batch.inline) * layout.tokens_per_tile - int((batch.slots < 0).sum())
    fix = "encode samples with the model's image layout (VLMConfig.layout), and cut them only with Encoder.encode(length=...)."
    if wanted != features or batch.slots.shape != (len(batch.inline), layout.tokens_per_tile):
        raise ValueError(
            f"The batch holds {wanted} image placeholders but its tiles make {features}. Each of its {len(batch.inline)} inline tiles has "
            f"{layout.tokens_per_tile}: {fix}"
        )
    if len(placed.unique()) != features or not bool((flat[placed] == IMAGE).all()):
        raise ValueError("The batch's slots do not point at its image placeholders, one each. Make the batch with neva.data.pack.collate.")
    used = torch.cat((batch.inline, batch.memory)).sort().values
    if not torch.equal(used, torch.arange(len(batch.tiles))):
        raise ValueError(f"The batch's {len(batch.tiles)} tiles do not each stand in the sequence or in the memory: {fix}")
    if bool((batch.sees < 0).any()) or int(batch.sees.max()) > len(batch.memory):
        raise ValueError(f"A token sees memory tile {int(batch.sees.max()) - 1} but the batch has {len(batch.memory)}: {fix}")


def _check_row(row: Sequence[Encoded], budget: Budget, group_names: tuple[str, ...]) -> None:
    tokens = sum(len(encoded.tokens) for encoded in row)
    if tokens > budget.seq_length:
        raise ValueError(f"a row has {tokens} tokens but batch.seq_length is {budget.seq_length}: put fewer samples in it, or raise it")
    unknown = {encoded.group for encoded in row} - set(group_names)
    if unknown:
        raise ValueError(f"the groups {sorted(unknown)} are not in group_names {group_names}: name them")
