"""What is said of a stage's steps before the first of them, against the steps themselves."""

from collections import Counter
from threading import Barrier, Thread
from typing import Any

import pytest

from neva.data.loader import Loader
from neva.data.sample import SampleError
from neva.data.survey import PROBE, told
from tests.lengths import Lengths, draw, loader, with_holes

SOURCES = (
    Lengths("a", with_holes(draw("llava", 130), 5)),
    Lengths("b", draw("short", 37)),
    Lengths("c", draw("long", 60)),
)


def by_hand(one: Loader, steps: int) -> tuple[Counter, float]:
    """Samples of each source in so many steps, and the share of padding."""
    counts: Counter = Counter()
    used = 0
    for _ in range(steps):
        for batch in next(one):
            counts.update(name for name, _ in batch.keys)
            used += int(batch.segments.count_nonzero())
    return counts, 1 - used / (steps * one.budget.rows * one.budget.seq_length)


@pytest.mark.parametrize("weights", [None, (1, None, None), (3, 1, 2)])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("seed", [0, 5])
def test_steps_hold_what_is_said_of_them(weights: Any, rows: int, seed: int) -> None:
    def fresh() -> Loader:
        return loader(SOURCES, weights=weights, rows=rows, options={"seed": seed})

    one = fresh()
    survey = one.survey()
    volume = one.volume(survey, steps=9)
    counts, padding = by_hand(fresh(), 9)
    assert volume is not None
    assert (volume.steps, volume.rows, volume.measured) == (9, 9 * rows, 0)
    assert volume.samples == counts.total()
    assert volume.epochs == {source.name: counts[source.name] / len(source) for source in SOURCES}
    assert volume.padding == pytest.approx(padding, abs=1e-12)


@pytest.mark.parametrize("weights", [None, (3, 1, 2)])
@pytest.mark.parametrize(("epochs", "rows"), [(1, 1), (1, 7), (2.5, 4), (0.1, 2)])
def test_epochs_are_the_fewest_steps_that_train_so_many_samples(
    weights: Any,
    epochs: float,
    rows: int,
) -> None:
    one = loader(SOURCES, weights=weights, rows=rows)
    volume = one.volume(one.survey(), epochs=epochs)
    assert volume is not None and volume.measured == 0
    usable = sum(source.usable(2048) for source in SOURCES)
    steps = loader(SOURCES, weights=weights, rows=rows)
    counts, _ = by_hand(steps, volume.steps)
    assert counts.total() == volume.samples >= epochs * usable
    fewer, _ = by_hand(loader(SOURCES, weights=weights, rows=rows), volume.steps - 1)
    assert fewer.total() < epochs * usable
    if weights is None and epochs == 1:
        for source in SOURCES:
            assert counts[source.name] / source.usable(2048) == pytest.approx(1, abs=0.25)


def test_some_samples_give_an_estimate_and_it_says_so() -> None:
    sources = [Lengths("a", with_holes(draw("llava", 3000), 5)), Lengths("tiny", draw("short", 9))]
    one = loader(sources, rows=16)
    survey = one.survey(most=PROBE)
    assert survey.measured == PROBE and not survey.complete
    assert (survey.tokens[1] > 0).sum() >= 8  # the small source is seen
    estimate = one.volume(survey, steps=20)
    exact = one.volume(one.survey(), steps=20)
    assert estimate is not None and exact is not None
    assert estimate.samples == pytest.approx(exact.samples, rel=0.1)
    assert estimate.measured == PROBE and "estimated from 512 measured samples" in str(estimate)
    assert exact.measured == 0 and "estimated" not in str(exact)
    assert f"20 steps are 320 rows, {exact.samples:,} samples, epochs: " in str(exact)
    passes = one.volume(survey, epochs=2)
    assert passes is not None
    assert passes.steps == pytest.approx(one.volume(one.survey(), epochs=2).steps, rel=0.1)  # type: ignore[union-attr]


def test_beyond_what_is_tried_it_goes_on_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    one = loader(SOURCES, rows=4)
    survey = one.survey()
    exact = one.volume(survey, epochs=6)
    monkeypatch.setattr("neva.data.survey.FAR", (100, 300))
    near = one.volume(survey, epochs=6)
    assert exact is not None and near is not None
    assert near.steps == pytest.approx(exact.steps, rel=0.03) and near.measured > 0


def test_measuring_ends_when_its_time_is_over() -> None:
    one = loader([Lengths("a", draw("llava", 1000))])
    assert not one.survey(seconds=0).complete


@pytest.mark.parametrize("length", [0, 5000])
def test_data_without_a_usable_sample(length: int) -> None:
    one = loader(
        [Lengths("good", draw("llava", 30)), Lengths("bad", [length] * 400)],
        weights=(1, 1),
    )
    survey = one.survey(most=100)
    assert one.volume(survey, steps=3) is None
    assert "none of a source's samples can be used, of 100" in told(None, survey)
    with pytest.raises(ValueError, match="no sample of 'bad' can be used"):
        one.volume(one.survey(), steps=3)


@pytest.mark.parametrize(("policy", "length"), [({"on_error": "stop"}, 0), ({"over_long": "error"}, 5000)])
def test_a_sample_at_which_training_would_stop_is_an_error_at_once(
    policy: dict,
    length: int,
) -> None:
    one = loader([Lengths("a", [*draw("llava", 300), length])], options=policy)
    with pytest.raises(SampleError, match="sample '300' of 'a'"):
        one.survey()
    assert one.survey(strict=False).complete


def test_ranks_share_the_measuring_and_find_the_same() -> None:
    meeting = Barrier(3, timeout=20)
    board: list[Any] = [None] * 3
    found: list[Any] = [None] * 3

    def work(rank: int) -> None:
        def share(part: Any) -> list:
            board[rank] = part
            meeting.wait()
            parts = list(board)
            meeting.wait()
            return parts

        measured = []
        one = loader(
            SOURCES,
            rows=6,
            rank=rank,
            world=3,
            share=lambda part: measured.append(len(part)) or share(part),
        )
        found[rank] = (one.volume(one.survey(), epochs=1.5), sum(measured))

    threads = [Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = loader(SOURCES, rows=6)
    assert all(volume == alone.volume(alone.survey(), epochs=1.5) for volume, _ in found)
    assert sum(count for _, count in found) == 227
    assert max(count for _, count in found) <= 227 / 3 + 2


def test_measuring_does_not_touch_the_order() -> None:
    one, other = loader(SOURCES), loader(SOURCES)
    next(one)
    one.survey()
    next(other)
    assert [batch.keys for batch in next(one)] == [batch.keys for batch in next(other)]
    assert one.state_dict() == other.state_dict()
