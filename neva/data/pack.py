"""Packs samples into rows under a token and a tile budget, and rows into a `Batch`.

Shapes: b rows, s `seq_length`, n tiles, m inline tiles, p tokens per tile.
"""

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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
        return min(self.seq_length, max(16, self.seq_length // 32))

    def fits(self, item: "Item") -> bool:
        """Whether the item fits an empty row."""
        return 0 < item.tokens <= self.seq_length and item.tiles <= self.max_tiles


@dataclass(frozen=True, slots=True)
class Item:
    """A measured sample: its reference and its lengths."""

    ref: Any
    tokens: int
    tiles: int = 0


@dataclass
class Packer:
    """A pool of items, from which rows are filled: the oldest item first, then whatever fits best.

    The oldest always leaves with the next row, so none starves, and each row takes at least one: it cannot loop forever.
    """

    budget: Budget
    _pool: dict[int, Item] = field(default_factory=dict, init=False)
    """By age: number of arrival -> item."""
    _lengths: list[tuple[int, int]] = field(default_factory=list, init=False)
    """(tokens, -number), sorted: the last that fits is the longest, and the oldest of its length."""
    _arrived: int = field(default=0, init=False)

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def items(self) -> tuple[Item, ...]:
        """The pool, oldest first."""
        return tuple(self._pool.values())

    def put(self, item: Item) -> None:
        """Adds an item. Raises ValueError for one that no row can hold."""
        if not self.budget.fits(item):
            limits = f"a row holds {self.budget.seq_length} tokens and {self.budget.max_tiles} tiles"
            raise ValueError(f"{item.ref} has {item.tokens} tokens and {item.tiles} tiles but {limits}: leave it out, or raise the batch's limits")
        self._pool[self._arrived] = item
        insort(self._lengths, (item.tokens, -self._arrived))
        self._arrived += 1

    def pop_row(self) -> list[Item]:
        """The next row's items, oldest first of all. Raises ValueError if the pool is empty."""
        if not self._pool:
            raise ValueError("there is nothing to pack: put items first")
        number = next(iter(self._pool))
        row = [self._take(bisect_right(self._lengths, (self._pool[number].tokens, -number)) - 1)]
        tokens, tiles = self.budget.seq_length - row[0].tokens, self.budget.max_tiles - row[0].tiles
        place = len(self._lengths)
        while len(row) < self.budget.max_documents:
            # All behind the last place were too long or had too many tiles, and the room only shrinks.
            place = bisect_right(self._lengths, (tokens, 1), hi=place) - 1
            while place >= 0 and self._pool[-self._lengths[place][1]].tiles > tiles:
                place -= 1
            if place < 0:
                break
            row.append(self._take(place))
            tokens, tiles = tokens - row[-1].tokens, tiles - row[-1].tiles
        return row

    def pop_step(self) -> list[list[Item]]:
        """The next `budget.rows` rows, fewer if the pool runs out."""
        rows: list[list[Item]] = []
        while self._pool and len(rows) < self.budget.rows:
            rows.append(self.pop_row())
        return rows

    def _take(self, place: int) -> Item:
        _, negative = self._lengths.pop(place)
        return self._pool.pop(-negative)


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
    ends = [0]
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
            at += t
            ends.append(r * s + at)
        ends += [(r + 1) * s] if at < s else []
    ends += [x * s for x in range(len(rows) + 1, b + 1)]
    samples = [encoded for row in rows for encoded in row]
    tiles = torch.cat([encoded.tiles for encoded in samples] or [torch.zeros(0, 3, layout.tile, layout.tile, dtype=torch.uint8)])
    n, flat = len(tiles), labels.flatten()
    labelled = torch.nonzero(flat != IGNORE).flatten()
    chunks = max(1, -(-len(labelled) // head_chunk))
    slots = torch.nonzero(tokens.flatten() == IMAGE).flatten()
    _check_placeholders(len(slots), n, layout)
    none = torch.zeros(0, dtype=torch.int64)
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
        tiles=tiles,
        inline=torch.arange(n),
        slots=slots.view(n, layout.tokens_per_tile),
        memory=none,
        memory_tags=none.view(0, 0),
        sees=torch.zeros(b, s, 2, dtype=torch.int64),
        runs=none.view(0, 4),
        any_tiles=any_tiles,
        keys=tuple(encoded.key for encoded in samples),
    )
    check(batch, layout)
    return batch


def check(batch: Batch, layout: ImageLayout) -> None:
    """Raises ValueError unless placeholders == inline tiles x tokens per tile, and each feature's slot is a placeholder."""
    flat = batch.tokens.flatten()
    _check_placeholders(int((flat == IMAGE).sum()), len(batch.inline), layout)
    placed = batch.slots[batch.slots >= 0]
    if len(placed.unique()) != len(placed) or not bool((flat[placed] == IMAGE).all()):
        raise ValueError("The batch's slots do not point at its image placeholders, one each. Make the batch with neva.data.pack.collate.")


def _check_placeholders(placeholders: int, tiles: int, layout: ImageLayout) -> None:
    features = tiles * layout.tokens_per_tile
    if placeholders != features:
        raise ValueError(
            f"The batch holds {placeholders} image placeholders but its tiles make {features}. Each of its {tiles} tiles needs "
            f"{layout.tokens_per_tile}: encode samples with the model's image layout (VLMConfig.layout), and cut them only with Encoder.truncate."
        )


def _check_row(row: Sequence[Encoded], budget: Budget, group_names: tuple[str, ...]) -> None:
    tokens = sum(len(encoded.tokens) for encoded in row)
    if tokens > budget.seq_length:
        raise ValueError(f"a row has {tokens} tokens but batch.seq_length is {budget.seq_length}: put fewer samples in it, or raise it")
    unknown = {encoded.group for encoded in row} - set(group_names)
    if unknown:
        raise ValueError(f"the groups {sorted(unknown)} are not in group_names {group_names}: name them")
