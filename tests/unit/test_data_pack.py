"""Packing: nothing lost, budgets kept, nobody starves, rows well filled; and collating against a brute-force oracle."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neva.batch import IGNORE, IMAGE, Batch, ImageLayout
from neva.data.pack import Budget, Item, Packer, check, collate
from neva.data.sample import Encoded

torch.set_num_threads(1)
LAYOUT = ImageLayout(tile=2, tokens_per_tile=3)


def packed(items: list[Item], budget: Budget) -> list[list[Item]]:
    packer = Packer(budget)
    for item in items:
        packer.put(item)
    rows = []
    while len(packer):
        rows.append(packer.pop_row())
    return rows


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=60),
    length=st.integers(50, 90),
    tiles=st.integers(4, 9),
)
def test_every_item_leaves_once_within_the_budgets(lengths: list[tuple[int, int]], length: int, tiles: int) -> None:
    budget = Budget(seq_length=length, max_tiles=tiles)
    rows = packed([Item(number, *sizes) for number, sizes in enumerate(lengths)], budget)
    assert sorted(item.ref for row in rows for item in row) == list(range(len(lengths)))
    for row in rows:
        assert 0 < sum(item.tokens for item in row) <= length and sum(item.tiles for item in row) <= tiles
        assert len(row) <= budget.max_documents


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=40))
def test_rows_are_filled_by_the_oldest_and_then_the_best_fit(lengths: list[tuple[int, int]]) -> None:
    """Against the plainest spelling of the rule: of those that fit, the longest, and of those the oldest."""
    budget = Budget(seq_length=40, max_tiles=3)
    left = [Item(number, *sizes) for number, sizes in enumerate(lengths)]
    for row in packed(left, budget):
        expected = [left.pop(0)]
        while True:
            tokens, tiles = (limit - sum(getattr(item, name) for item in expected) for limit, name in ((40, "tokens"), (3, "tiles")))
            fitting = [item for item in left if item.tokens <= tokens and item.tiles <= tiles]
            if not fitting or len(expected) == budget.max_documents:
                break
            best = max(fitting, key=lambda item: (item.tokens, -item.ref))
            left.remove(best)
            expected.append(best)
        assert row == expected


def test_no_item_starves() -> None:
    """The oldest leaves with the next row, however badly it fits and however many better ones arrive."""
    packer = Packer(Budget(seq_length=100, max_tiles=1))
    packer.put(Item("old", 51, 1))
    for number in range(50):
        packer.put(Item(number, 100))
    assert packer.pop_row() == [Item("old", 51, 1)]


@pytest.mark.parametrize("item", [Item("x", 101), Item("x", 5, 3), Item("x", 0)])
def test_an_item_that_no_row_can_hold_is_refused_and_cannot_hang(item: Item) -> None:
    packer = Packer(Budget(seq_length=100, max_tiles=2))
    with pytest.raises(ValueError, match=f"x has {item.tokens} tokens and {item.tiles} tiles but a row holds 100 tokens and 2 tiles"):
        packer.put(item)
    assert len(packer) == 0 and packer.pop_step() == []
    with pytest.raises(ValueError, match="nothing to pack"):
        packer.pop_row()


def test_a_row_of_tiny_items_is_bounded() -> None:
    budget = Budget(seq_length=1024)
    rows = packed([Item(number, 1) for number in range(100)], budget)
    assert budget.max_documents == 64 and [len(row) for row in rows] == [64, 36]


def test_a_step_has_the_rows_that_were_asked_for() -> None:
    packer = Packer(Budget(seq_length=10, rows=3))
    for number in range(5):
        packer.put(Item(number, 10))
    assert [len(packer.pop_step()) for _ in range(3)] == [3, 2, 0]


@pytest.mark.parametrize("field", ["seq_length", "rows", "micro_rows", "max_tiles"])
def test_an_impossible_budget_is_told(field: str) -> None:
    with pytest.raises(ValueError, match=f"batch.{field} is 0: it must be at least 1"):
        Budget(**{"seq_length": 8, field: 0})


def typical_lengths(count: int) -> list[int]:
    """Answers and questions as in LLaVA's 665K, with an image of 64 tokens."""
    drawn = np.random.default_rng(0).lognormal(5.3, 0.7, count)
    return [int(length) + 64 for length in np.clip(drawn, 30, 1500)]


def test_rows_are_full_and_packing_is_fast() -> None:
    lengths = typical_lengths(40_000)
    packer, rows, used, packed = Packer(Budget(seq_length=2048, max_tiles=64)), 0, 0, 0
    start = time.perf_counter()
    for number, length in enumerate(lengths):
        packer.put(Item(number, length, 1))
        if len(packer) == 512:
            row = packer.pop_row()
            rows, used, packed = rows + 1, used + sum(item.tokens for item in row), packed + len(row)
    rate = packed / (time.perf_counter() - start)
    print(f"useful share {used / rows / 2048:.4f}, {rate:,.0f} samples/s")
    assert used / rows / 2048 >= 0.98
    assert rate > 5_000  # far below what a free core does


def encoded(sizes: list[int | str], *, group: str = "g", id: str = "0", start: int = 10) -> Encoded:
    """Text tokens by count, 'i' for an image; every second token from the end has a label."""
    tokens: list[int] = []
    for size in sizes:
        tokens += [IMAGE] * 3 if size == "i" else list(range(start + len(tokens), start + len(tokens) + int(size)))
    labels = [token if token != IMAGE and (len(tokens) - i) % 2 else IGNORE for i, token in enumerate(tokens)]
    images = sizes.count("i")
    tiles = torch.arange(images * 12, dtype=torch.uint8).view(images, 3, 2, 2) + start
    return Encoded.plain(torch.tensor(tokens), torch.tensor(labels), tiles, group=group, key=("src", id))


def brute_force(rows: list[list[Encoded]], budget: Budget, names: tuple[str, ...]) -> dict[str, list]:
    """The batch, one token at a time."""
    out: dict[str, list] = {name: [] for name in ("tokens", "labels", "positions", "segments", "groups", "slots", "labelled", "documents")}
    for r in range(budget.micro_rows):
        row = rows[r] if r < len(rows) else []
        used = 0
        for number, sample in enumerate(row):
            t = len(sample.tokens)
            out["documents"].append(t)
            for i in range(t):
                flat = len(out["tokens"])
                label = int(sample.labels[i + 1]) if i + 1 < t else IGNORE
                out["tokens"].append(int(sample.tokens[i]))
                out["labels"].append(label)
                out["positions"].append(i)
                out["segments"].append(number + 1)
                out["groups"].append(names.index(sample.group))
                out["slots"] += [flat] if sample.tokens[i] == IMAGE else []
                out["labelled"] += [flat] if label != IGNORE else []
            used += t
        rest = budget.seq_length - used
        out["documents"] += [rest] if rest else []
        for name, value in (("tokens", 0), ("labels", IGNORE), ("positions", 0), ("segments", 0), ("groups", 0)):
            out[name] += [value] * rest
    return out


SIZES = st.lists(st.integers(1, 4) | st.just("i"), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.lists(SIZES, max_size=3), max_size=3))
def test_collating_equals_brute_force(sizes: list[list[list[int | str]]]) -> None:
    names = ("a", "b")
    rows = [[encoded(s, group=names[i % 2], id=f"{r}.{i}", start=10 * (r + i + 1)) for i, s in enumerate(row)] for r, row in enumerate(sizes)]
    budget = Budget(seq_length=40, micro_rows=3)
    batch = collate(rows, budget, layout=LAYOUT, group_names=names, any_tiles=True, head_chunk=4)
    expected = brute_force(rows, budget, names)
    for name in ("tokens", "labels", "positions", "segments", "groups", "slots"):
        assert getattr(batch, name).flatten().tolist() == expected[name], name
        assert name == "slots" or getattr(batch, name).shape == (3, 40)
    labelled = batch.labelled.tolist()
    assert [place for place in labelled if place >= 0] == expected["labelled"]
    assert len(labelled) % 4 == 0 and 0 < len(labelled) <= len(expected["labelled"]) + 4
    assert [length for length in batch.cu_seqlens.diff().tolist() if length] == expected["documents"]
    assert len(batch.cu_seqlens) == 3 * (budget.max_documents + 1) + 1 and batch.cu_seqlens[-1] == 120 and batch.cu_seqlens.dtype == torch.int32
    flat = [sample for row in rows for sample in row]
    assert torch.equal(batch.tiles, torch.cat([sample.tiles for sample in flat] or [torch.zeros(0, 3, 2, 2, dtype=torch.uint8)]))
    assert batch.inline.tolist() == list(range(len(batch.tiles))) and batch.keys == tuple(sample.key for sample in flat)
    assert batch.max_len == 40 and batch.any_tiles and batch.group_names == names
    assert (batch.memory.shape, batch.memory_tags.shape, batch.runs.shape, batch.sees.any()) == ((0,), (0, 0), (0, 4), False)


def test_more_samples_than_a_packer_puts_in_a_row_fit_too() -> None:
    """As in a server's prefill: many short prompts in one row."""
    budget = Budget(seq_length=512)
    batch = collate([[encoded([1])] * 300], budget, layout=LAYOUT, group_names=("g",), any_tiles=False)
    assert len(batch.cu_seqlens) == 302 and int(batch.segments.max()) == 300


def whole() -> Batch:
    return collate([[encoded([2, "i", 3])]], Budget(seq_length=16), layout=LAYOUT, group_names=("g",), any_tiles=True)


def test_placeholders_must_match_tiles() -> None:
    broken = replace(encoded([2, "i", 3]), tokens=torch.tensor([1, 2, IMAGE, IMAGE, 5, 6, 7, 8]))
    with pytest.raises(ValueError, match="The batch holds 2 image placeholders but its tiles make 3. Each of its 1 inline tiles has 3: encode"):
        collate([[broken]], Budget(seq_length=16), layout=LAYOUT, group_names=("g",), any_tiles=True)
    check(whole(), LAYOUT)
    with pytest.raises(ValueError, match="The batch holds 3 image placeholders but its tiles make 4"):
        check(whole(), replace(LAYOUT, tokens_per_tile=4))
    with pytest.raises(ValueError, match="slots do not point"):
        check(replace(whole(), slots=whole().slots + 1), LAYOUT)
    with pytest.raises(ValueError, match="slots do not point"):
        check(replace(whole(), slots=torch.tensor([[2, 2, 3]])), LAYOUT)


def test_rows_that_do_not_fit_are_told() -> None:
    budget = Budget(seq_length=8)
    with pytest.raises(ValueError, match=r"a row has 9 tokens but batch.seq_length is 8"):
        collate([[encoded([4]), encoded([5])]], budget, layout=LAYOUT, group_names=("g",), any_tiles=False)
    with pytest.raises(ValueError, match="2 rows but batch.micro_rows is 1"):
        collate([[], []], budget, layout=LAYOUT, group_names=("g",), any_tiles=False)
    with pytest.raises(ValueError, match=r"\['h'\] are not in group_names"):
        collate([[encoded([4], group="h")]], budget, layout=LAYOUT, group_names=("g",), any_tiles=False)


def test_the_same_lengths_pack_the_same_whatever_they_stand_for() -> None:
    lengths = [random.Random(0).randint(1, 40) for _ in range(200)]
    budget = Budget(seq_length=64)
    first = packed([Item(number, length) for number, length in enumerate(lengths)], budget)
    again = packed([Item(("s", number), length) for number, length in enumerate(lengths)], budget)
    assert [[item.ref for item in row] for row in first] == [[item.ref[1] for item in row] for row in again]
