"""Sources -> steps of packed micro-batches: blend, shuffle, measure, pack, deal to ranks, decode in workers, and an exact state.

One global order and one global packing, functions of the seed alone; ranks and workers only share the work. So any number of them
gives the same rows in each step, and a stopped run goes on bit for bit.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neva.batch import Batch
from neva.data import identity
from neva.data.draw import NAMED, Bad, Draws, item_of
from neva.data.encode import Encoder, Measure
from neva.data.order import Blend, Order, Ref
from neva.data.pack import POOL, Budget, Item, Packer, Waiting, collate
from neva.data.sample import Encoded, Sample, SampleError
from neva.data.seen import MOST_BROKEN, Unread
from neva.data.source import DataSet, MockSource
from neva.data.survey import PROBE, Survey, Volume, sample_order, volume
from neva.data.workers import Crew

TILE_COST = 1 << 20
"""A tile's cost in squared tokens: about what CLIP-L/336 computes for one, next to the attention of a 7B decoder."""
VERSION = 2
"""Of the saved state."""
BLOCK = 64
"""Least references that are measured and exchanged at once."""

Measured = tuple[Ref, Measure | Bad]
Block = tuple[list[tuple[int, Ref]], Callable[[], list[Measure | Bad]]]
"""References of streams that are being measured, and what waits for the result."""


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How the loader works. Ranks must agree on all of it; `workers` and `prefetch` do not change the data."""

    shuffle: bool = True
    seed: int = 0
    workers: int = 0
    """Processes that measure, read and decode; 0 does it in this process."""
    pool: int = POOL
    """Measured samples, from the oldest waiting one on, that packing chooses from."""
    prefetch: int = 2
    """Steps prepared ahead, or more if that keeps all workers busy; without workers none is."""
    on_error: Literal["stop", "skip"] = "stop"
    over_long: Literal["drop", "truncate", "error"] = "drop"
    """A sample longer than a row. One that truncation leaves without a label, or that has too many tiles, is dropped."""
    fewer_tiles: bool = False
    """Cut the images of a sample that is longer than a row, or has more tiles, into fewer tiles first: 12, 8, 6, 4, 2, 1; counted."""
    head_chunk: int = 64
    """`Batch.labelled` is padded to a multiple of this."""

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("prefetch", 0), ("pool", 1), ("head_chunk", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a worker's tasks need; sent once."""

    sources: tuple[DataSet, ...]
    encoder: Encoder
    budget: Budget
    options: LoaderOptions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step that is packed and handed to the workers."""

    waits: list[Callable[[], "Built"]]
    """This rank's micro-batches."""
    state: dict[str, Any]
    """The loader's state once this step is yielded."""
    left_out: list[Bad]
    """On the way from the step before."""


def alone(part: object) -> list[Any]:
    """The `share` of a single rank."""
    return [part]


def row_cost(row: Sequence[Item]) -> float:
    """What a row costs beyond its fixed length: attention within each sample, and its tiles."""
    return float(sum(item.tokens**2 + TILE_COST * item.tiles for item in row))


@dataclass(eq=False)
class Loader:
    """Yields steps forever, each the tuple of this rank's micro-batches. Close it when done.

    `share(object)` returns the list of all ranks' objects; it and the iteration are collective: every rank takes the same steps.
    Raises ValueError if the rows do not divide, the sources do not blend, or no sample can be used; SampleError for one that
    cannot be read (on_error "stop") or is too long (over_long "error").
    """

    sources: Sequence[DataSet]
    encoder: Encoder
    budget: Budget
    options: LoaderOptions
    _: KW_ONLY
    weights: Sequence[float | int | None] | None = None
    """Relative shares of the samples trained: `Blend.weights`. By default none has a weight."""
    rank: int = 0
    world: int = 1
    """Data ranks."""
    share: Callable[[Any], list[Any]] = alone
    row_cost: Callable[[Sequence[Item]], float] = row_cost
    """What rows are dealt by, so that ranks finish together."""
    skipped: list[Bad] = field(default_factory=list, init=False)
    """What was left out on the way to the last step yielded."""
    unread: Unread = field(default_factory=Unread, init=False)
    """Keys of rows that say nothing to their source."""
    _crew: Crew = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not one of {self.world} data ranks")
        unit = self.world * self.budget.micro_rows
        if self.budget.rows % unit:
            near = [x for x in (self.budget.rows // unit * unit, -(-self.budget.rows // unit) * unit) if x]
            raise ValueError(
                f"batch.rows is {self.budget.rows}, not a multiple of {self.world} data ranks x {self.budget.micro_rows} batch.micro_rows: "
                f"set it to {' or '.join(map(str, near))}"
            )
        self._names = tuple(source.name for source in self.sources)
        self._lengths = tuple(len(source) for source in self.sources)
        given = [None] * len(self.sources) if self.weights is None else self.weights
        weights = tuple(None if weight is None else float(weight) for weight in given)
        self._blend = Blend(names=self._names, lengths=self._lengths, weights=weights)
        self._shares = self._blend.shares
        self._micro = self.budget.rows // unit
        workers = self.options.workers
        self._ahead = max(self.options.prefetch, -(-workers // self._micro)) if workers else 0
        stops = {
            "long": self.options.over_long == "error",
            "broken": self.options.on_error == "stop",
        }
        self._stop_at = frozenset(why for why, stop in stops.items() if stop)
        self._begin()
        desk = Desk(sources=tuple(self.sources), encoder=self.encoder, budget=self.budget, options=self.options)
        self._crew = Crew(workers, desk)

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        return self

    def __next__(self) -> tuple[Batch, ...]:
        # A failure further ahead is kept until its step's turn, so that how much is prefetched does not matter.
        while len(self._planned) <= self._ahead and not (self._planned and isinstance(self._planned[-1], ValueError)):
            self._planned.append(self._plan())
        plan = self._planned[0]
        if isinstance(plan, ValueError):
            raise plan
        self._planned.popleft()
        before = self._state
        lost = len(self._undecoded)
        built = self._await(plan.waits)
        self._state = plan.state
        try:
            self._check_trained()
        except ValueError:  # the step is not yielded: the state is that of the last one that was
            self._state = before
            del self._undecoded[lost:]
            raise
        self.skipped = plan.left_out + self._undecoded_now
        return tuple(part.batch for part in built)

    def _check_trained(self) -> None:
        """Raise ValueError for a stream of which a whole pass was packed and no sample decoded."""
        failed = Counter(source for source, _, _ in self._undecoded)
        if not failed:
            return
        packed = dict(zip(self._names, self._state["trained"], strict=True))
        for stream in self._blend.streams:
            names = [self._names[source] for source in stream]
            count = sum(self._lengths[source] for source in stream)
            lost = sum(failed[name] for name in names)
            if lost >= count and lost == sum(packed[name] for name in names):
                last = next(one for one in reversed(self._undecoded) if one[0] in names)
                told = SampleError(*last)
                what = f"none of the samples of {', '.join(names)} can be decoded"
                raise ValueError(f"{what}; the last: {told}")

    def _await(self, waits: list[Callable[[], "Built"]]) -> list["Built"]:
        """This rank's micro-batches. If one rank fails all raise, or the others would wait for it in the step."""
        built, failure = [], ""
        try:
            built = [wait() for wait in waits]
        except ValueError as error:
            if self.world == 1:
                raise
            failure = str(error)
        told = self.share(([one for part in built for one in part.bad], failure))
        if failures := dict.fromkeys(text for _, text in told if text):
            raise ValueError("; ".join(failures))
        self._undecoded_now = [one for bad, _ in told for one in bad]
        self._undecoded += [(one.source, one.id, one.message) for one in self._undecoded_now]
        return built

    @property
    def samples(self) -> int:
        """Samples of all sources."""
        return sum(self._lengths)

    @property
    def counts(self) -> dict[str, Any]:
        """Up to the last step yielded, over all ranks: `samples` trained, and `epochs` of each
        source by name (its trained samples by its length); samples `dropped` as longer than a row,
        `skipped` as unreadable and `reduced` to fewer tiles."""
        state = self.state_dict()
        trained = dict(zip(self._names, state["trained"], strict=True))
        lengths = zip(self._names, self._lengths, strict=True)
        epochs = {name: trained[name] / length for name, length in lengths}
        draws = state["draws"]
        left_out = {"dropped": draws["left_out"]["long"], "skipped": draws["left_out"]["broken"]}
        return {
            "samples": sum(trained.values()),
            "epochs": epochs,
            "reduced": draws["reduced"],
            **left_out,
        }

    @property
    def left_out(self) -> tuple[SampleError, ...]:
        """The first `NAMED` samples that were dropped or skipped, with the reasons."""
        return tuple(SampleError(*one) for one in self.state_dict()["draws"]["names"])

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step yielded, as plain JSON; the same on every rank."""
        lost = [list(one) for one in self._undecoded]
        by_source = Counter(source for source, _, _ in self._undecoded)
        packed = zip(self._state["trained"], self._names, strict=True)
        draws = self._state["draws"]
        broken = draws["left_out"]["broken"] + len(lost)
        told = {
            "left_out": draws["left_out"] | {"broken": broken},
            "names": (draws["names"] + lost)[:NAMED],
        }
        trained = [count - by_source[name] for count, name in packed]
        return self._state | {"trained": trained, "draws": draws | told}

    def check_state(self, state: dict[str, Any]) -> list[str]:
        """Raise ValueError unless this loader can go on where the one that gave `state` stood.

        That is if the samples, what they are encoded with, their weights, the seed, the row length
        and what is done with long samples are the same, and the version that saved it packed as
        this one does. Gives keys of these that the state, of an earlier version, does not tell.
        """
        if state.get("version") != VERSION:
            why = "trained some samples more often than others: its order cannot be gone on with"
            says = f"the saved data state is of a version of neva that {why}"
            fix = "Finish the run with that version, or start the stage anew from its weights"
            raise ValueError(f"{says}. {fix}: init.model=CHECKPOINT out=FOLDER")
        untold = identity.compare(state, self._identity)
        for item in _waiting(state["packer"]).items:
            self._check_fits(item[1])
        return untold

    def _check_fits(self, item: Item) -> None:
        if not self.budget.fits(item):
            limit = f"batch.max_tiles={self.budget.max_tiles}"
            source = self._names[item.source]
            what = f"a sample of '{source}' with {item.tiles} tiles waits in the saved data state"
            raise ValueError(f"{what}, more than {limit}: put batch.max_tiles back")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the loader that gave `state` stood, whatever its ranks and workers.
        Raises as `check_state`."""
        self.check_state(state)
        self._begin()
        self._draws.restore(state["draws"])
        self._order.drawn = list(self._draws.drawn)
        self._packer.restore(_waiting(state["packer"]))
        self._trained = list(state["trained"])
        self._step = state["step"]
        self._state = self._snapshot()

    def survey(
        self,
        *,
        most: int | None = None,
        seconds: float | int = math.inf,
        strict: bool = True,
        begun: Survey | None = None,
    ) -> Survey:
        """Measures all samples, or `most` of them, or, alone, those of so many seconds; all ranks
        and workers share the work. `begun` goes on from an earlier survey.

        Collective. It does not touch the order. `strict` raises SampleError for samples at
        which training would stop, naming the first, once all are measured or a hundred are found.
        """
        assert self.world == 1 or seconds == math.inf, "ranks would stop at different samples"
        end = time.monotonic() + seconds
        found = Survey.begin(self._blend) if begun is None else begun
        wanted = sample_order(self._lengths, self.options.seed)[found.measured : most]
        block = BLOCK * self.world
        starts = iter(range(0, len(wanted), block))
        waits: deque[tuple[list[Ref], Callable[[], list[Measure | Bad]]]] = deque()
        while time.monotonic() < end:
            for start in islice(starts, 2 * self.options.workers + 1 - len(waits)):
                refs = [Ref(source, 0, index) for source, index in wanted[start : start + block]]
                waits.append((refs, self._crew.submit(measure, refs[self.rank :: self.world])))
            if not waits:
                break
            refs, wait = waits.popleft()
            parts = self._share_part(wait)
            for place, ref in enumerate(refs):
                outcome = parts[place % self.world][place // self.world]
                self.unread.add(self._names[ref.source], outcome.unread)
                found.add(ref.source, ref.index, outcome)
                if strict and isinstance(outcome, Bad) and outcome.why == "long":
                    self._stop_at_long(outcome)
            if found.seen.broken >= MOST_BROKEN and strict and "broken" in self._stop_at:
                break
        first = found.seen.first()
        if strict and first is not None and "broken" in self._stop_at:
            raise first
        return found

    def _stop_at_long(self, bad: Bad) -> None:
        if "long" in self._stop_at:
            raise SampleError(bad.source, bad.id, bad.message)

    def look(self, *, patience: float, strict: bool = True) -> Survey:
        """A survey of all samples if that takes less than so many seconds, else of `PROBE`, as of
        made-up data, in which nothing is to be found. Collective; raises as `survey`."""
        # Workers start up while they measure the first of them.
        begun = self.survey(most=BLOCK * self.world, strict=strict)
        warm = begun.measured
        since = time.monotonic()
        found = self.survey(most=PROBE, strict=strict, begun=begun)
        taken = max(self.share(time.monotonic() - since))
        left = sum(self._lengths) - found.measured
        if all(isinstance(source, MockSource) for source in self.sources):
            return found
        if taken / max(1, found.measured - warm) * left > patience:
            return found
        return self.survey(strict=strict, begun=found)

    def told(self, survey: Survey) -> str:
        """A line on what a survey found."""
        longest = survey.seen.longest
        clauses = survey.seen.told(
            total=sum(self._lengths),
            layout=self.encoder.layout,
            budget=self.budget,
            longest=self._called(longest.source, longest.index),
        )
        return "; ".join(clauses)

    def _called(self, source: int, index: int) -> str:
        try:
            id = self.sources[source][index].id
        except SampleError as error:
            id = error.id
        return f"sample '{id}' of '{self._names[source]}'"

    def volume(self, survey: Survey, *, steps: int = 0, epochs: float | int = 0) -> Volume | None:
        """What so many steps hold: `survey.volume`."""
        options = self.options
        return volume(
            survey,
            self.budget,
            pool=options.pool,
            seed=options.seed,
            shuffle=options.shuffle,
            steps=steps,
            epochs=epochs,
        )

    def close(self) -> None:
        """Ends the workers."""
        self._planned.clear()
        self._blocks.clear()
        self._crew.close()

    def _begin(self) -> None:
        """Stands before the first sample, with nothing in flight."""
        # ahead of the draws by what is being measured
        self._order = Order(self._blend, self.options.seed, self.options.shuffle)
        self._draws = Draws(self._blend, self._next_measured, self._stop_at)
        self._packer = Packer(self.budget, self._draws, pool=self.options.pool)
        self._trained = [0] * len(self._names)  # samples of each source that were packed
        self._planned: deque[Plan | ValueError] = deque()
        self._blocks: deque[Block] = deque()
        self._measured: tuple[deque[Measured], ...] = tuple(deque() for _ in self._shares)
        # of each stream: measured, or on the way there, but not yet taken
        self._ordered = [0] * len(self._shares)
        self._step, self._last_items = 0, 0
        self._undecoded: list[tuple[str, str, str]] = []
        self._undecoded_now: list[Bad] = []
        self._state = self._snapshot()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a state belongs to. Ranks, workers and the pool may change."""
        options = self.options
        lengths = zip(self._names, self._lengths, strict=True)
        # What decides how an item that waits was measured.
        tile_limit = self.budget.max_tiles if options.fewer_tiles else 0
        over_long = "truncate" if options.over_long == "truncate" else "drop or error"
        return {
            "version": VERSION,
            "sources": [[name, length] for name, length in lengths],
            "weights": list(self._blend.weights),
            "seed": options.seed,
            "shuffle": options.shuffle,
            "seq_length": self.budget.seq_length,
            **identity.of_encoder(self.encoder),
            "data.over_long": over_long,
            "data.fewer_tiles": options.fewer_tiles,
            "batch.max_tiles with data.fewer_tiles": tile_limit,
            "the data file of": {source.name: source.fingerprint for source in self.sources},
        }

    def _snapshot(self) -> dict[str, Any]:
        return self._identity | {
            "step": self._step,
            "draws": self._draws.state(),
            "packer": _plain(self._packer.state()),
            "trained": list(self._trained),
        }

    def _plan(self) -> Plan | ValueError:
        """Packs the next step and starts this rank's part of it."""
        try:
            rows = [self._packer.pop_row() for _ in range(self.budget.rows)]
            self._step += 1
            self._last_items = sum(len(row) for row in rows)
            for row in rows:
                for item in row:
                    self._trained[item.source] += 1
            dealt = deal([self.row_cost(row) for row in rows], self.world, self._micro)
            waits = []
            for ranks in dealt:
                any_tiles = any(item.tiles for rank in ranks for row in rank for item in rows[row])
                waits.append(self._crew.submit(build, [rows[row] for row in ranks[self.rank]], any_tiles))
        except ValueError as error:
            return error
        left_out = list(self._draws.fresh)
        self._draws.fresh.clear()
        return Plan(waits=waits, state=self._snapshot(), left_out=left_out)

    def _next_measured(self, stream: int) -> tuple[Ref, Measure | Bad]:
        while not self._measured[stream]:
            self._read_ahead()
            refs, wait = self._blocks.popleft()
            parts = self._share_part(wait)
            for place, (one, ref) in enumerate(refs):
                outcome = parts[place % self.world][place // self.world]
                self.unread.add(self._names[ref.source], outcome.unread)
                self._measured[one].append((ref, outcome))
        self._ordered[stream] -= 1
        return self._measured[stream].popleft()

    def _read_ahead(self) -> None:
        """Starts measuring: at least a block, with workers about as much as the last step took.

        The streams are kept in store by their shares. One that runs low since many of its samples
        are left out is filled up first.
        """
        block = max(BLOCK, BLOCK // 4 * self.world)
        least = 1 if not self.options.workers else max(2 * self.options.workers, -(-self._last_items // block)) + 1
        while len(self._blocks) < least:
            refs = []
            for _ in range(block):
                pairs = zip(self._ordered, self._shares, strict=True)
                stored = [count / share for count, share in pairs]
                stream = stored.index(min(stored))
                self._ordered[stream] += 1
                refs.append((stream, self._order.draw(stream)))
            mine = [ref for _, ref in refs[self.rank :: self.world]]
            self._blocks.append((refs, self._crew.submit(measure, mine)))

    def _share_part(self, wait: Callable[[], list[Measure | Bad]]) -> list[list[Measure | Bad]]:
        """Every rank's part of a block. A rank that failed says so in its part's place, or the others would wait for it."""
        try:
            mine: list[Measure | Bad] | str = wait()
        except Exception as error:
            if self.world == 1:
                raise
            mine = f"data rank {self.rank} failed ({type(error).__name__}: {error})"
        parts = self.share(mine)
        failed = [part for part in parts if isinstance(part, str)]
        if failed:
            raise ValueError("; ".join(failed))
        return parts


def _plain(state: Waiting) -> dict[str, Any]:
    """A packer's state as JSON can hold it."""
    items = [[number, *item.ref, item.tokens, item.tiles] for number, item in state.items]
    return {"arrived": state.arrived, "items": items, "due": list(state.due)}


def _waiting(plain: dict[str, Any]) -> Waiting:
    """The state that `_plain` was given."""
    items = []
    for number, source, epoch, index, tokens, tiles in plain["items"]:
        items.append((number, item_of(Ref(source, epoch, index), tokens, tiles)))
    return Waiting(arrived=plain["arrived"], items=tuple(items), due=tuple(plain["due"]))


def measure(desk: Desk, refs: Sequence[Ref]) -> list[Measure | Bad]:
    """A worker's task: the lengths of samples, or why they are left out."""
    return [_measure(desk, ref) for ref in refs]


def _measure(desk: Desk, ref: Ref) -> Measure | Bad:
    budget, cut = desk.budget, desk.options.over_long == "truncate"
    try:
        sample = desk.sources[ref.source][ref.index]
        whole = found = _fitted(desk, sample)
        if cut and found.tokens > budget.seq_length:
            try:
                found = desk.encoder.measure(sample, length=budget.seq_length, max_tiles=found.max_tiles)
                found = replace(found, whole=whole.tokens)
            except SampleError as error:
                return _too_long(sample, whole, error.message)
    except SampleError as error:
        return Bad("broken", error.source, error.id, error.message)
    if budget.fits(Item(ref, found.tokens, found.tiles)):
        return found
    too_long = found.tokens > budget.seq_length
    fixes = ["raise batch.seq_length"] if too_long else []
    if found.tiles > budget.max_tiles:
        fixes.append("raise batch.max_tiles")
    if found.tiles and desk.encoder.layout.max_tiles > 1 and not desk.options.fewer_tiles:
        fixes.append("set data.fewer_tiles=true")
    left = "to drop or truncate" if too_long else "to drop"
    fixes.append(f"set data.over_long {left}")
    has = f"it has {found.tokens} tokens and {found.tiles} tiles"
    limits = f"a row holds {budget.seq_length} and {budget.max_tiles}"
    return _too_long(sample, whole, f"{has} but {limits}: {', or '.join(fixes)}")


def _too_long(sample: Sample, found: Measure, message: str) -> Bad:
    return Bad(
        "long",
        sample.source,
        sample.id,
        message,
        tokens=found.tokens,
        tiles=found.tiles,
        unread=sample.unread,
    )


def _fitted(desk: Desk, sample: Sample) -> Measure:
    if not desk.options.fewer_tiles:
        return desk.encoder.measure(sample)
    return desk.encoder.fit(sample, length=desk.budget.seq_length, tiles=desk.budget.max_tiles)


@dataclass(frozen=True)
class Built:
    """A micro-batch, and the samples that failed on the way."""

    batch: Batch
    bad: list[Bad]

    def __reduce__(self) -> tuple[Callable[..., "Built"], tuple[dict[str, Any], list[Bad]]]:
        # A tensor in shared memory costs a handshake and a file descriptor: the pixels are worth it, the others travel as bytes.
        values = {f.name: getattr(self.batch, f.name) for f in fields(self.batch)}
        return _rebuilt, ({name: v.numpy() if isinstance(v, Tensor) and name != "tiles" else v for name, v in values.items()}, self.bad)


def _rebuilt(values: dict[str, Any], bad: list[Bad]) -> Built:
    restored: dict[str, Any] = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}
    return Built(Batch(**restored), bad)


def build(desk: Desk, rows: Sequence[Sequence[Item]], any_tiles: bool) -> Built:
    """A worker's task: rows read, decoded and collated. Under on_error "skip", samples that fail now leave padding."""
    bad: list[Bad] = []
    kept: list[list[Encoded]] = []
    for row in rows:
        kept.append([])
        for item in row:
            try:
                kept[-1].append(_encode(desk, item))
            except SampleError as error:
                if desk.options.on_error == "stop":
                    raise
                bad.append(Bad("broken", error.source, error.id, error.message))
    names = tuple(sorted({encoded.group for row in kept for encoded in row}))
    batch = collate(kept, desk.budget, layout=desk.encoder.layout, group_names=names, any_tiles=any_tiles, head_chunk=desk.options.head_chunk)
    return Built(batch, bad)


def _encode(desk: Desk, item: Item) -> Encoded:
    sample = desk.sources[item.ref.source][item.ref.index]
    most = _fitted(desk, sample).max_tiles if desk.options.fewer_tiles else 0
    length = desk.budget.seq_length if desk.options.over_long == "truncate" else None
    encoded = desk.encoder.encode(sample, length=length, max_tiles=most)
    if (len(encoded.tokens), len(encoded.tiles)) != (item.tokens, item.tiles):
        counts = f"{len(encoded.tokens)} tokens and {len(encoded.tiles)} tiles, not the {item.tokens} and {item.tiles} that were measured"
        raise SampleError(sample.source, sample.id, f"it has {counts}: its file has changed; leave the data alone during a run")
    return encoded


def deal(costs: Sequence[float | int], world: int, micro: int) -> list[list[list[int]]]:
    """Row numbers as [micro-batch][rank][row], all of equal size.

    Ranks wait for each other in each micro-batch, so rows of similar cost go to one, dealt like cards to and fro.
    Example: costs 1 9 5 2, world 2, micro 1: by cost 1 2 | 3 0, so rank 0 gets rows 1 and 0, rank 1 rows 2 and 3.
    """
    by_cost = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    size = len(costs) // micro
    dealt = []
    for start in range(0, len(costs), size):
        hands: list[list[int]] = [[] for _ in range(world)]
        for place, row in enumerate(by_cost[start : start + size]):
            lap, seat = divmod(place, world)
            hands[world - 1 - seat if lap % 2 else seat].append(row)
        dealt.append(hands)
    return dealt
