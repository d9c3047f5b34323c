"""The loader: one order and one packing for any ranks and workers, exact resume, and every way in which data can be bad."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from neva.batch import Batch, ImageLayout
from neva.data.encode import Encoder
from neva.data.loader import Loader, LoaderOptions, deal
from neva.data.order import Blend, Order, furthest_behind, permutation
from neva.data.pack import Budget
from neva.data.sample import SampleError
from neva.data.source import LlavaSource, MockSource
from neva.data.tokenizer import load_tokenizer
from neva.data.workers import Crew

torch.set_num_threads(1)
ENCODER = Encoder(load_tokenizer(Path(__file__).parents[1] / "data" / "tiny.model"), "v1", "", ImageLayout(tile=4, tokens_per_tile=5))
BUDGET = Budget(seq_length=256, rows=4, micro_rows=1, max_tiles=3)
SOURCES = (
    MockSource(samples=30, words=(2, 12), image_size=(6, 4), text_only_every=3, name="a"),
    MockSource(samples=11, words=(2, 20), images=2, image_size=(6, 4), seed=1, name="b"),
)


def options(**more: Any) -> LoaderOptions:
    return LoaderOptions(**{"pool": 12, **more})


@contextmanager
def loading(sources: Any = SOURCES, budget: Budget = BUDGET, **more: Any) -> Iterator[Loader]:
    place = {name: more.pop(name) for name in ("weights", "rank", "world", "share", "row_cost") if name in more}
    loader = Loader(sources, ENCODER, budget, options(**more), **place)
    try:
        yield loader
    finally:
        loader.close()


def content(batch: Batch) -> tuple:
    """All of a batch, comparable."""
    names = ("tokens", "labels", "positions", "segments", "groups", "tiles", "slots", "labelled", "cu_seqlens")
    return (*(getattr(batch, name).tolist() for name in names), batch.group_names, batch.keys, batch.any_tiles)


def steps(loader: Loader, count: int) -> list[list[tuple]]:
    return [[content(batch) for batch in next(loader)] for _ in range(count)]


def rows_of(step: tuple[Batch, ...]) -> list[tuple]:
    """A step's rows, each by its samples' keys, one to a row of a micro-batch."""
    rows = []
    for batch in step:
        keys = iter(batch.keys)
        rows += [tuple(next(keys) for _ in range(int(row.max()))) for row in batch.segments]
    return rows


def in_world(world: int, run: Callable[[int, Callable[[Any], list]], Any]) -> list[Any]:
    """Runs `run(rank, share)` of every rank in a thread; `share` exchanges JSON copies as a network would."""
    meeting, board, results = Barrier(world, timeout=10), [None] * world, [None] * world

    def sharing(rank: int) -> Callable[[Any], list]:
        def share(part: Any) -> list:
            board[rank] = part
            meeting.wait()
            parts = list(board)
            meeting.wait()
            return parts

        return share

    def work(rank: int) -> None:
        try:
            results[rank] = run(rank, sharing(rank))
        except Exception as error:
            results[rank] = error

    threads = [Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_steps_are_tuples_of_micro_batches() -> None:
    with loading(budget=Budget(seq_length=256, rows=4, micro_rows=2, max_tiles=3)) as loader:
        step = next(iter(loader))
        assert len(step) == 2 and all(batch.tokens.shape == (2, 256) for batch in step)
        assert all(len(batch.tiles) <= 6 for batch in step) and {name for batch in step for name in batch.group_names} <= {"a", "b"}


def blend(lengths: tuple[int, ...], *weights: float) -> Blend:
    names = tuple("abc"[: len(lengths)])
    return Blend(names=names, lengths=lengths, weights=weights or (None,) * len(lengths))


def test_shuffling_depends_on_seed_and_epoch() -> None:
    def order(seed: int, shuffle: bool = True) -> list[int]:
        source = Order(blend((10,)), seed, shuffle)
        return [source.draw(0).index for _ in range(20)]

    assert order(0, shuffle=False) == [*range(10), *range(10)]
    assert order(0) == order(0) != order(1)
    assert sorted(order(0)[:10]) == sorted(order(0)[10:]) == list(range(10)) and order(0)[:10] != order(0)[10:]
    # Written down: the order must not change with numpy, or a run could not be resumed after an update.
    assert permutation(8, (0, 1, 2)).tolist() == [3, 4, 7, 6, 1, 5, 2, 0]


@pytest.mark.parametrize(("weights", "shares"), [((1.0, 2.0, 5.0), (1, 2, 5)), ((), (5, 100, 7))])
def test_a_blend_keeps_its_shares_at_every_moment(weights: tuple, shares: tuple[int, ...]) -> None:
    """Of the samples drawn, without weights by length."""
    chosen = blend((5, 100, 7), *weights)
    order = Order(chosen, 0, True)
    drawn = Counter()
    given = [0] * len(chosen.shares)
    for count in range(1, 400):
        stream = furthest_behind(chosen.shares, given)
        given[stream] += 1
        drawn[order.draw(stream).source] += 1
        for source, share in enumerate(shares):
            assert abs(drawn[source] - count * share / sum(shares)) <= 1


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), world=st.sampled_from([2, 4]), rows=st.sampled_from([4, 8]), pool=st.integers(1, 30))
def test_any_world_has_the_same_rows_in_each_step(seed: int, world: int, rows: int, pool: int) -> None:
    budget = Budget(seq_length=256, rows=rows, micro_rows=1, max_tiles=3)

    def run(rank: int, share: Callable[[Any], list]) -> tuple[list, dict]:
        with loading(budget=budget, seed=seed, pool=pool, rank=rank, world=world, share=share) as loader:
            taken = [next(loader) for _ in range(4)]
            return [(rows_of(step), [batch.any_tiles for batch in step]) for step in taken], loader.state_dict()

    with loading(budget=budget, seed=seed, pool=pool) as loader:
        expected = [Counter(rows_of(next(loader))) for _ in range(4)]
        state = loader.state_dict()
    results = in_world(world, run)
    for number, rows in enumerate(expected):
        assert Counter(row for steps, _ in results for row in steps[number][0]) == rows
        assert len({tuple(steps[number][1]) for steps, _ in results}) == 1
    assert all(its == state for _, its in results)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), stop=st.integers(0, 5), pool=st.integers(1, 20))
def test_resume_is_exact_at_any_step(seed: int, stop: int, pool: int) -> None:
    with loading(seed=seed, pool=pool) as loader:
        expected = steps(loader, 8)
    with loading(seed=seed, pool=pool) as loader:
        assert steps(loader, stop) == expected[:stop]
        state = json.loads(json.dumps(loader.state_dict()))
        assert steps(loader, 1) == expected[stop : stop + 1]
        loader.load_state_dict(state)  # also back in time
        assert loader.state_dict() == state and steps(loader, 8 - stop) == expected[stop:]
    with loading(seed=seed, pool=pool) as loader:
        loader.load_state_dict(state)
        assert steps(loader, 8 - stop) == expected[stop:]


def test_resume_with_another_world_loses_and_repeats_nothing() -> None:
    def run(rank: int, share: Callable[[Any], list]) -> list:
        with loading(rank=rank, world=2, share=share) as loader:
            loader.load_state_dict(state)
            return [rows_of(next(loader)) for _ in range(4)]

    with loading() as loader:
        steps(loader, 3)
        state = loader.state_dict()
        expected = [Counter(rows_of(next(loader))) for _ in range(4)]
    first, second = in_world(2, run)
    assert [Counter(a + b) for a, b in zip(first, second, strict=True)] == expected


@pytest.mark.slow
@pytest.mark.multi
def test_workers_change_nothing_and_prefetched_steps_are_not_consumed() -> None:
    with loading() as loader:
        expected = steps(loader, 9)
    state = None
    for workers, prefetch in ((1, 0), (3, 2)):
        with loading(workers=workers, prefetch=prefetch) as loader:
            assert steps(loader, 4) == expected[:4]
            assert state is None or loader.state_dict() == state
            state = loader.state_dict()
    with loading(workers=2, prefetch=3) as loader:
        next(loader)
        loader.load_state_dict(state)
        assert steps(loader, 5) == expected[4:]
    with loading() as loader:
        loader.load_state_dict(state)
        assert steps(loader, 5) == expected[4:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": SOURCES[:1]}, "sources"),
        ({"sources": SOURCES[::-1]}, "sources"),
        ({"sources": (MockSource(samples=31, name="a"), SOURCES[1])}, "sources"),
        ({"seed": 1}, "seed 0 but this run has 1"),
        ({"weights": (1, 1)}, "weights"),
        ({"shuffle": False}, "shuffle"),
        ({"budget": Budget(seq_length=512, rows=4)}, "seq_length"),
    ],
)
def test_the_state_of_other_data_is_refused(change: dict, message: str) -> None:
    with loading() as loader:
        next(loader)
        state = loader.state_dict()
    with loading(**change) as loader, pytest.raises(ValueError, match=f"the saved data state has {message}"):
        loader.load_state_dict(state)


def test_the_state_of_a_version_that_trained_samples_unevenly_is_refused() -> None:
    """It held up to a pool of samples from any epoch, which this packing cannot make even again."""
    with loading() as loader:
        next(loader)
        state = loader.state_dict() | {"version": 1}
        with pytest.raises(
            ValueError,
            match="trained some samples more often than others.*init.model=CHECKPOINT",
        ):
            loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"world": 3}, r"batch.rows is 4, not a multiple of 3 data ranks x 1 batch.micro_rows: set it to 3 or 6"),
        ({"budget": Budget(seq_length=64, rows=4, micro_rows=8)}, "set it to 8"),
        ({"rank": 2, "world": 2}, "rank 2 is not one of 2"),
        ({"sources": ()}, "there is no data source"),
        ({"sources": (SOURCES[0], SOURCES[0])}, "two data sources have one name"),
        ({"weights": (1, 0)}, "each needs one above 0"),
        ({"weights": (1,)}, "each needs one above 0"),
        ({"workers": -1}, "data.workers is -1"),
        ({"pool": 0}, "data.pool is 0"),
    ],
)
def test_impossible_settings_are_told(more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), loading(**more):
        pass


@pytest.mark.parametrize(("world", "micro", "rows"), [(1, 1, 1), (2, 2, 1), (3, 1, 4), (4, 3, 2)])
def test_rows_are_dealt_evenly_and_completely(world: int, micro: int, rows: int) -> None:
    costs = [float((7 * i) % 13) for i in range(world * micro * rows)]
    dealt = deal(costs, world, micro)
    assert sorted(row for hands in dealt for hand in hands for row in hand) == list(range(len(costs)))
    assert all(len(hand) == rows for hands in dealt for hand in hands)
    ordered = [[costs[row] for hand in hands for row in hand] for hands in dealt]
    assert all(min(a) >= max(b) for a, b in pairwise(ordered))
    assert deal([1, 9, 5, 2], 2, 1) == [[[1, 0], [2, 3]]]


def llava(folder: Path, bad: dict[int, str], *, count: int = 12, words: int = 5) -> LlavaSource:
    """Image samples; `bad` makes some missing, cut (its header is whole) or long, or their text broken."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        path, what = folder / f"{number}.jpg", bad.get(number)
        Image.effect_noise((64, 64), 60).convert("RGB").save(path)
        if what == "cut":
            path.write_bytes(path.read_bytes()[:-700])
        if what == "missing":
            path.unlink()
        answer = "" if what == "silent" else "red " * (2000 if what == "long" else words)
        talk = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"n{number}", "image": path.name, "conversations": talk})
    (folder / "data.json").write_text(json.dumps(rows))
    return LlavaSource(folder / "data.json", folder)


@pytest.mark.parametrize(("what", "message"), [("missing", "is missing"), ("cut", "truncated"), ("silent", "is empty")])
def test_a_bad_sample_stops_and_is_named(tmp_path: Path, what: str, message: str) -> None:
    with loading([llava(tmp_path, {5: what})]) as loader, pytest.raises(SampleError, match=message) as error:
        steps(loader, 5)
    assert (error.value.source, error.value.id) == ("data", "n5")


def test_bad_samples_are_skipped_counted_and_named(tmp_path: Path) -> None:
    source = llava(tmp_path, {2: "missing", 5: "silent", 8: "cut"})
    with loading([source], on_error="skip") as loader:
        keys: Counter = Counter()
        while loader.counts["epochs"]["data"] < 3:
            step = next(loader)
            keys.update(id for batch in step for _, id in batch.keys)
        names = Counter(error.id for error in loader.left_out)
        assert not {"n2", "n5", "n8"} & set(keys) and len(keys) == 9
        assert set(names) == {"n2", "n5", "n8"} and loader.counts["skipped"] == sum(names.values())
        assert all("sample 'n" in str(error) for error in loader.left_out)
        state = json.loads(json.dumps(loader.state_dict()))
        loader.load_state_dict(state)
        assert loader.counts["skipped"] == sum(names.values())


def test_a_sample_that_fails_to_decode_leaves_padding_in_its_place(tmp_path: Path) -> None:
    good = llava(tmp_path / "good", {})
    bad = llava(tmp_path / "bad", dict.fromkeys(range(13), "cut"), count=13)  # a step holds 12
    with loading([good], on_error="skip") as a, loading([bad], on_error="skip") as b:
        assert all(len(batch.keys) for batch in next(a))
        step = next(b)
    for batch in step:
        assert not batch.keys and not batch.segments.any() and len(batch.tiles) == 0 and batch.any_tiles and batch.label_count == 0
    assert b.counts["skipped"] > 0


@pytest.mark.parametrize("over_long", ["drop", "truncate", "error"])
def test_over_long_samples(tmp_path: Path, over_long: Any) -> None:
    source = llava(tmp_path, {3: "long", 4: "long"})
    with loading([source], over_long=over_long) as loader:
        if over_long == "error":
            with pytest.raises(SampleError, match=r"it has \d+ tokens and 1 tiles but a row holds 256 and 3: raise batch.seq_length"):
                steps(loader, 4)
            return
        keys: Counter = Counter()
        while loader.counts["epochs"]["data"] < 4:
            keys.update(id for batch in next(loader) for _, id in batch.keys)
        assert len(keys) == (10 if over_long == "drop" else 12) and (loader.counts["dropped"] > 0) == (over_long == "drop")


def test_samples_with_too_many_tiles_are_over_long() -> None:
    source = MockSource(samples=10, words=(2, 4), images=4, image_size=(4, 4), text_only_every=2)
    with loading([source], over_long="truncate") as loader:
        batches = [batch for _ in range(3) for batch in next(loader)]
        assert all(len(batch.tiles) == 0 and not batch.any_tiles for batch in batches) and loader.counts["dropped"] > 0
        told = "tiles but a row holds 256 and 3: raise batch.max_tiles, or set data.over_long to drop"
        assert str(loader.left_out[0]).endswith(told)


@pytest.mark.parametrize("what", ["long", "missing"])
def test_data_of_which_nothing_can_be_used_ends_with_an_error(tmp_path: Path, what: str) -> None:
    source = llava(tmp_path, dict.fromkeys(range(4), what), count=4)
    with loading([source], on_error="skip") as loader, pytest.raises(ValueError, match=r"none of the 4 samples of data can be used \(.*the last was"):
        next(loader)


def test_data_of_which_nothing_can_be_decoded_ends_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    fine = MockSource(samples=30, words=(2, 12), image_size=(6, 4), name="fine")
    broken = llava(tmp_path / "bad", dict.fromkeys(range(13), "cut"), count=13)
    told = "none of the samples of data can be decoded; the last: sample 'n.*' of 'data'.*truncated"
    for sources, weights in (([broken], None), ([fine, broken], (1, 1))):
        with loading(sources, on_error="skip", weights=weights) as loader:
            next(loader)
            state = json.loads(json.dumps(loader.state_dict()))
            with pytest.raises(ValueError, match=told):
                steps(loader, 9)
        with loading(sources, on_error="skip", weights=weights) as loader:
            loader.load_state_dict(state)
            with pytest.raises(ValueError, match=told):
                steps(loader, 9)


def test_one_sample_that_can_be_decoded_is_enough_to_go_on(tmp_path: Path) -> None:
    broken = llava(tmp_path, dict.fromkeys(range(12), "cut"), count=13)
    with loading([broken], on_error="skip") as loader:
        steps(loader, 9)
        assert loader.counts["samples"] >= 8


def test_data_that_changes_during_the_run_is_told(tmp_path: Path) -> None:
    llava(tmp_path, {}, words=5)
    with loading([llava(tmp_path, {}, words=5)], pool=30) as loader:
        next(loader)
        text = (tmp_path / "data.json").read_text()
        (tmp_path / "data.json").write_text(text.replace("red ", "a b ", 30))
        with pytest.raises(SampleError, match="its file has changed"):
            steps(loader, 4)


def test_a_rank_that_fails_stops_all() -> None:
    class Fails(MockSource):
        def __getitem__(self, index: int):
            raise RuntimeError("the disk is gone")

    def run(rank: int, share: Callable[[Any], list]) -> None:
        sources = [Fails(samples=5)] if rank else [MockSource(samples=5)]
        with loading(sources, rank=rank, world=2, share=share) as loader:
            next(loader)

    for error in in_world(2, run):
        assert isinstance(error, ValueError) and "data rank 1 failed (RuntimeError: the disk is gone)" in str(error)


SCRIPT = """
import os, signal, sys, time
import torch
from pathlib import Path
from neva.batch import ImageLayout
from neva.data.encode import Encoder
from neva.data.loader import Loader, LoaderOptions
from neva.data.pack import Budget
from neva.data.source import MockSource
from neva.data.tokenizer import load_tokenizer


def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


if __name__ == "__main__":
    tokenizer = load_tokenizer(sys.argv[1])
    encoder = Encoder(tokenizer, "v1", "", ImageLayout(tile=4, tokens_per_tile=5))
    loader = Loader([MockSource(samples=50)], encoder, Budget(seq_length=1024), LoaderOptions(workers=2, pool=4))
    next(loader)
    # The workers are children of the forkserver, which is one of ours.
    workers = [w for c in children() for w in Path(f"/proc/{c}/task/{c}/children").read_text().split()]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(*workers, flush=True)
    for line in sys.stdin:
        try:
            next(loader)
            print("step", flush=True)
        except ValueError as error:
            print("error", error, flush=True)
    loader.close()
    print("closed", flush=True)
"""


@contextmanager
def running(folder: Path) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    (folder / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    model = root / "tests" / "data" / "tiny.model"
    process = subprocess.Popen(
        [sys.executable, str(folder / "script.py"), str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    with process:
        try:
            yield process, [int(pid) for pid in process.stdout.readline().split()]
        finally:
            process.kill()


def gone(pid: int) -> bool:
    """Ended, or a zombie that nobody has waited for yet."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True


def all_gone(pids: list[int], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.05)
    return all(map(gone, pids))


def asked(process: subprocess.Popen) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def ask(_desk: None, question: str) -> Any:
    """A worker's task that goes wrong."""
    if question == "half a message":  # killed while it answers, as when memory runs out

        def half(_pipe: Connection, data: bytes) -> None:
            os.write(_pipe.fileno(), data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send = half
    elif question == "no pickle":
        return lambda: None
    elif question == "raise":
        raise SampleError("a", "1", "is bad")
    return b"1" * 100_000


@pytest.mark.slow
@pytest.mark.multi
def test_a_worker_that_dies_in_the_middle_of_an_answer_is_told() -> None:
    crew = Crew(2, None)
    try:
        assert len(crew.submit(ask, "")()) == 100_000
        with pytest.raises(SampleError, match="is bad") as raised:
            crew.submit(ask, "raise")()
        assert "In a data worker:" in raised.value.__notes__[0] and 'SampleError("a", "1", "is bad")' in raised.value.__notes__[0]
        with pytest.raises(AttributeError, match="pickle"):
            crew.submit(ask, "no pickle")()
        with pytest.raises(ValueError, match="a data worker died"):
            crew.submit(ask, "half a message")()
        with pytest.raises(ValueError, match="a data worker died"):  # nor does the other work on
            crew.submit(ask, "")()
    finally:
        crew.close()


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers through Linux's /proc")
def test_workers_follow_their_process_and_no_other(tmp_path: Path) -> None:
    """A signal to the group is the parent's to answer; a killed worker is told; killing the parent ends the workers."""
    with running(tmp_path) as (process, workers):
        assert len(workers) >= 2
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(process.pid, number)
            assert [asked(process) for _ in range(4)] == ["step\n"] * 4
        assert not any(map(gone, workers))
        process.kill()
        assert all_gone(workers)
    with running(tmp_path) as (process, workers):
        os.kill(workers[0], signal.SIGKILL)
        answers = [asked(process)]
        while answers[-1] == "step\n" and len(answers) < 1000:  # the pool's own thread may need a moment to notice
            answers.append(asked(process))
        assert "error a data worker died" in answers[-1] and all_gone(workers)
        process.stdin.close()
        assert process.stdout.readline() == "closed\n" and process.wait(10) == 0
