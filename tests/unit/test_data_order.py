"""Every sample once an epoch, sources in their shares, little padding: seen from outside the
loader, for several kinds of data."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neva
from neva.batch import ImageLayout
from neva.data.encode import Encoder
from neva.data.loader import Loader, LoaderOptions
from neva.data.pack import Budget
from neva.data.source import LlavaSource
from neva.data.tokenizer import load_tokenizer
from tests.lengths import Lengths, draw, loader, packer, trained, with_holes

torch.set_num_threads(1)


def check_epochs(
    keys: Sequence[tuple[int, int]],
    sources: Sequence[Lengths],
    seq_length: int,
) -> None:
    """After k times its usable samples, a source's samples were each trained k - 1 to k + 1 times:
    at every moment, k being a fraction."""
    for number, source in enumerate(sources):
        counts = {i: 0 for i, length in enumerate(source.lengths) if 0 < length <= seq_length}
        by_count = Counter({0: len(counts)})
        mine = [index for one, index in keys if one == number]
        for done, index in enumerate(mine, 1):
            by_count[counts[index]] -= 1
            counts[index] += 1
            by_count[counts[index]] += 1
            present = [count for count, samples in by_count.items() if samples]
            assert done // len(counts) - 1 <= min(present)
            assert max(present) <= -(-done // len(counts)) + 1


BLENDS: dict[str, tuple[list[list[int]], tuple[float, ...] | None]] = {
    "one small set": ([draw("llava", 100)], None),
    "500 long, 500 short": ([draw("middle", 500), draw("short", 500)], (1, 1)),
    "500 long, 500 short, no weights": ([draw("middle", 500), draw("short", 500)], None),
    "longer than half a row": ([draw("long", 500), draw("short", 500)], (1, 1)),
    "a small set beside a large one": ([draw("llava", 37), draw("llava", 1000, 1)], (1, 1)),
    "three to one": ([draw("long", 100), draw("llava", 1000)], (3, 1)),
    "three sizes": ([draw("short", 37), draw("llava", 1000), draw("long", 5)], None),
    "half is left out": ([with_holes(draw("llava", 400), 4), draw("llava", 300, 1)], (2, 1)),
    "half is left out, no weights": (
        [with_holes(draw("llava", 400), 4), draw("llava", 300, 1), draw("short", 50)],
        None,
    ),
    "one with a weight, two without": ([draw("llava", 300), with_holes(draw("short", 900), 3), draw("middle", 110)], (500, 0, 0)),
}


@pytest.mark.parametrize("pool", [1, 8, 128, 512])
@pytest.mark.parametrize("name", BLENDS)
def test_blends_keep_epochs_and_shares(name: str, pool: int) -> None:
    lengths, given = BLENDS[name]
    sources = [Lengths(f"s{number}", of) for number, of in enumerate(lengths)]
    weights = None if given is None else [weight or None for weight in given]
    usable = [source.usable(2048) for source in sources]
    shares = np.array(usable, dtype=float)
    if given is not None:
        paced = [number for number, weight in enumerate(given) if not weight]
        together = sum(len(sources[number]) for number in paced)
        for number, weight in enumerate(given):
            shares[number] = weight or together * usable[number] / sum(usable[n] for n in paced)
    shares /= shares.sum()
    smallest = int(np.argmin(usable / shares))
    for seed in range(2):
        total = int(2.5 * usable[smallest] / shares[smallest])
        keys = trained(packer(sources, weights=weights, pool=pool, seed=seed), total)
        check_epochs(keys, sources, 2048)
        mine = (np.array(keys)[:, :1] == np.arange(len(sources))).cumsum(0)
        after = mine[mine[:, smallest] >= usable[smallest]]
        count = after.sum(1, keepdims=True)
        off = np.abs(after / count - shares)
        assert (off <= np.maximum(0.02, 2 / count)).all(), f"off by {off.max()}, seed {seed}"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 70), min_size=1, max_size=25), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([None, 0.3, 1, 4]), min_size=3, max_size=3),
    pool=st.sampled_from([1, 2, 8, 32, 512]),
    seed=st.integers(0, 99),
)
def test_any_blend_keeps_its_epochs(
    lengths: list[list[int]],
    weights: list[Any],
    pool: int,
    seed: int,
) -> None:
    """Rows of 64 tokens: lengths of 0 and above 64 are left out."""
    sources = [Lengths(f"s{number}", [*of, 40]) for number, of in enumerate(lengths)]
    one = packer(sources, seq_length=64, weights=weights[: len(sources)], pool=pool, seed=seed)
    check_epochs(trained(one, 4 * sum(map(len, sources))), sources, 64)


@pytest.mark.parametrize("seed", range(3))
def test_sources_without_weights_go_at_one_pace(seed: int) -> None:
    """Whatever share of them is left out: none drifts away by passes."""
    lengths = [
        with_holes(draw("llava", 200), 3),
        draw("short", 37),
        draw("long", 5),
        draw("middle", 1000),
    ]
    sources = [Lengths(f"s{number}", of) for number, of in enumerate(lengths)]
    usable = [source.usable(2048) for source in sources]
    keys = trained(packer(sources, seed=seed), 6 * sum(usable))
    counts = Counter(source for source, _ in keys)
    passes = [counts[number] / count for number, count in enumerate(usable)]
    assert max(passes) - min(passes) < 0.5


@pytest.mark.parametrize("kind", ["llava", "short"])
def test_little_is_padding(kind: str) -> None:
    rows = [row for row, _ in zip(packer([Lengths("a", draw(kind, 5000))]).rows(), range(500), strict=False)]
    used = sum(item.tokens for row in rows for item in row)
    assert 1 - used / 500 / 2048 <= 0.02


def test_the_loader_trains_in_this_order() -> None:
    sources = [Lengths("a", draw("short", 60)), Lengths("b", with_holes(draw("llava", 40), 4))]
    one = loader(sources, weights=(3, 1))
    keys = [key for _ in range(30) for batch in next(one) for key in batch.keys]
    expected = trained(packer(sources, weights=(3, 1)), len(keys))
    assert keys == [(sources[source].name, str(index)) for source, index in expected]


def test_trained_samples_are_counted_by_source() -> None:
    """And those that fail only when they are decoded are not."""
    sources = [Lengths("a", draw("short", 60)), Lengths("b", with_holes(draw("llava", 40), 4))]
    one = loader(sources, rows=3)
    keys = [key for _ in range(7) for batch in next(one) for key in batch.keys]
    counts = Counter(name for name, _ in keys)
    assert one.counts["samples"] == len(keys)
    assert one.counts["epochs"] == {"a": counts["a"] / 60, "b": counts["b"] / 40}
    again = loader(sources, rows=3)
    again.load_state_dict(one.state_dict())
    assert again.counts == one.counts


def test_a_weighted_source_without_a_usable_sample_is_named() -> None:
    sources = [Lengths("good", draw("llava", 30)), Lengths("bad", [0, 5000, 0])]
    with pytest.raises(ValueError, match="none of the 3 samples of bad can be used"):
        next(loader(sources, weights=(1, 1)))
    # at one pace with others it has nothing to give
    steps = [next(loader(sources)) for _ in range(9)]
    assert {name for step in steps for batch in step for name, _ in batch.keys} == {"good"}


def test_a_small_set_is_trained_once_an_epoch() -> None:
    """Real files, the default pool, rows that hold some twenty samples."""
    case = Path(__file__).parents[1] / "data" / "cases" / "small-set-epoch"
    tokenizer = load_tokenizer(Path(neva.__file__).parent / "recipes" / "tokenizer")
    encoder = Encoder(tokenizer, "v1", "", ImageLayout(tile=28, tokens_per_tile=4))
    one = Loader(
        [LlavaSource(case / "data.json", case)],
        encoder,
        Budget(seq_length=2048),
        LoaderOptions(),
    )
    counts: Counter = Counter()
    while counts.total() < 100:
        counts.update(key for batch in next(one) for key in batch.keys)
    assert len(counts) >= 98
    assert max(counts.values()) <= 2
    assert one.counts["samples"] == counts.total()
