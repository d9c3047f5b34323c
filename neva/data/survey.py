"""How much the steps of a stage hold: samples are measured, then order and packing gone through as
training will. No image is decoded."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from neva.config import counted
from neva.data.draw import Bad, Draws
from neva.data.encode import Measure
from neva.data.order import Blend, Order, Ref, permutation
from neva.data.pack import Budget, Item, Packer
from neva.data.sample import SampleError
from neva.data.seen import Seen

PROBE = 512
"""Samples that are measured for an estimate: with lengths as LLaVA's, the samples of a row are
right within about 4 %."""
FAR = (20_000, 1_000_000)
"""Samples that are packed on trial where some, or all, were measured: beyond that the packing is
taken to go on in proportion."""


def sample_order(lengths: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """All (source, index) in random order, but for eight of each source that come first: so that
    each is seen, however small."""
    shuffled = [permutation(length, (seed, number)) for number, length in enumerate(lengths)]
    first = []
    for place in range(8):
        for source, order in enumerate(shuffled):
            if place < len(order):
                first.append((source, int(order[place])))
    rest = [(source, int(index)) for source, order in enumerate(shuffled) for index in order[8:]]
    return first + [rest[place] for place in permutation(len(rest), (seed, len(lengths)))]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was measured of the sources' samples."""

    blend: Blend
    tokens: tuple[np.ndarray, ...]
    """Of each source: a sample's tokens, 0 for one that is left out, -1 for one
    that was not measured."""
    tiles: tuple[np.ndarray, ...]
    bad: dict[int, Bad] = field(default_factory=dict)
    """The last sample of each source that is left out."""
    seen: Seen = field(default_factory=Seen)

    @staticmethod
    def begin(blend: Blend) -> "Survey":
        """One of nothing."""
        tokens = tuple(np.full(length, -1, dtype=np.int32) for length in blend.lengths)
        return Survey(blend=blend, tokens=tokens, tiles=tuple(np.zeros_like(of) for of in tokens))

    def add(self, source: int, index: int, outcome: Measure | Bad) -> None:
        """Notes what measuring a sample found."""
        self.seen.add(source, index, outcome)
        if isinstance(outcome, Bad):
            self.tokens[source][index] = 0
            self.bad[source] = outcome
        else:
            self.tokens[source][index] = outcome.tokens
            self.tiles[source][index] = outcome.tiles

    @property
    def measured(self) -> int:
        """Samples that were."""
        return sum(int((tokens >= 0).sum()) for tokens in self.tokens)

    @property
    def complete(self) -> bool:
        """Whether all were."""
        return self.measured == sum(self.blend.lengths)

    @property
    def usable(self) -> float:
        """Samples of all sources that can be trained: counted, or judged by those measured."""
        shares = [(tokens > 0).sum() / max(1, (tokens >= 0).sum()) for tokens in self.tokens]
        return float(
            sum(share * length for share, length in zip(shares, self.blend.lengths, strict=True)),
        )

    def barren(self) -> Bad | None:
        """Why a sample of a stream is left out of which none was found usable; None if
        there is no such stream."""
        for stream in self.blend.streams:
            if not any((self.tokens[source] > 0).any() for source in stream):
                return next((self.bad[source] for source in stream if source in self.bad), None)
        return None

    def items(self, *, seed: int, shuffle: bool) -> Iterator[Item]:
        """What the loader's packer gets, in its order; in place of a sample that was not measured,
        another of its source."""
        order = Order(self.blend, seed, shuffle)
        known = [np.flatnonzero(tokens >= 0) for tokens in self.tokens]

        def measured(stream: int) -> tuple[Ref, Measure | Bad]:
            ref = order.draw(stream)
            like = ref.index
            if self.tokens[ref.source][like] < 0:
                like = int(known[ref.source][like % len(known[ref.source])])
            tokens = int(self.tokens[ref.source][like])
            if not tokens:
                return ref, self.bad[ref.source]
            return ref, Measure(tokens=tokens, tiles=int(self.tiles[ref.source][like]))

        return iter(Draws(self.blend, measured))


@dataclass(frozen=True, kw_only=True)
class Volume:
    """What a stage's steps hold."""

    steps: int
    rows: int
    samples: int
    epochs: dict[str, float]
    """Source -> its samples among those, by its length."""
    padding: float
    """Share of the rows that holds no token."""
    measured: int
    """Samples from which this is estimated; 0 if it is exact."""

    def __str__(self) -> str:
        about = "about " if self.measured else ""
        shown = [f"{epochs:.3g} of {name}" for name, epochs in self.epochs.items()]
        if len(shown) > MOST_SHOWN:
            shown = [*shown[:MOST_SHOWN], f"… ({len(shown)} sources)"]
        passes = f"epochs: {', '.join(shown)}"
        if len(shown) == 1:
            number = f"{next(iter(self.epochs.values())):.3g}"
            passes = f"{number} epoch{'s' * (number != '1')}"
        samples = f"{about}{counted(self.samples, 'sample')}, {about}{passes}"
        are = "is" if self.steps == 1 else "are"
        held = f"{counted(self.steps, 'step')} {are} {counted(self.rows, 'row')}, {samples}"
        estimated = f"; estimated from {self.measured:,} measured samples" if self.measured else ""
        return f"{held}; {self.padding:.1%} padding{estimated}"


def told(found: Volume | None, survey: Survey) -> str:
    """One line of it, to print."""
    if found is not None:
        return str(found)
    none = f"none of a source's samples can be used, of {survey.measured:,} that were measured"
    return f"what its steps hold is not known: {none}"


MOST_SHOWN = 6
"""Sources whose epochs a line tells."""


def volume(
    survey: Survey,
    budget: Budget,
    *,
    pool: int,
    seed: int,
    shuffle: bool,
    steps: int = 0,
    epochs: float | int = 0,
) -> Volume | None:
    """What so many steps hold, or as many as train `epochs` times the usable samples
    (rounded up to whole steps).

    None if too little was measured to tell. Raises ValueError if all was and a source, or all
    without a weight, has no usable sample.
    """
    if bad := survey.barren():
        if survey.complete:
            last = SampleError(bad.source, bad.id, bad.message)
            raise ValueError(f"no sample of '{bad.source}' can be used; the last was {last}")
        return None
    rows = Packer(budget, survey.items(seed=seed, shuffle=shuffle), pool=pool).rows()
    far = FAR[survey.complete and not steps]
    counts = [0] * len(survey.blend.names)
    tokens, done = 0, 0
    wanted = epochs * survey.usable
    while sum(counts) < far:
        # The rows up to the end of the step in which the wanted samples are reached.
        reached = sum(counts) >= wanted and done % budget.rows == 0
        if steps:
            reached = done == steps * budget.rows
        if reached:
            break
        row = next(rows)
        done += 1
        tokens += sum(item.tokens for item in row)
        for item in row:
            counts[item.source] += 1
    trained = sum(counts)
    steps = steps or math.ceil(done / budget.rows * max(1.0, wanted / trained))
    scale = steps * budget.rows / done
    trials = zip(survey.blend.names, counts, survey.blend.lengths, strict=True)
    return Volume(
        steps=steps,
        rows=steps * budget.rows,
        samples=round(trained * scale),
        epochs={name: count * scale / length for name, count, length in trials},
        padding=1 - tokens / (done * budget.seq_length),
        measured=0 if survey.complete and scale == 1 else survey.measured,
    )
