"""NVLM-D, -X and -H through the real command line: a blend of tiled, one-tile and text samples, on one rank and two, stopped and resumed."""

from pathlib import Path

import pytest

from tests import runs

pytestmark = [pytest.mark.slow, pytest.mark.multi]

TILED = "{name: tiled, weight: 2, mock: {samples: 300, words: [4, 20], images: 1, image_size: [84, 56]}}"
PAIRS = "{name: pairs, weight: 1, mock: {samples: 300, words: [4, 20], images: 2, image_size: [56, 28]}}"
PLAIN = "{name: plain, weight: 1, mock: {samples: 300, words: [4, 20], images: 1, image_size: [30, 28]}}"
READ = "{name: read, weight: 2, mock: {samples: 300, words: [4, 40], images: 0}}"
SMALL = (
    "model.vision.layers=2", "data.pool=64", "log.tensorboard=false", "precision=fp32", "evaluate.source=", "evaluate.image_folder=",
    "optim.warmup=3", "checkpoint.every=2", "checkpoint.keep_last=0", "steps=5", "data.workers=0",
)  # fmt: skip


def plan(kind: str, *sources: str) -> tuple[str, ...]:
    return (f"nvlm-{kind}-tiny", *SMALL, f"data.sources=[{', '.join(sources)}]")


@pytest.mark.parametrize("kind", ["d", "x", "h"])
def test_two_ranks_give_the_losses_of_one(kind: str, tmp_path: Path) -> None:
    """Rows so short that a rank has no image where the other has one, and whole micro-batches have none; connectors alone train first."""
    trained = "pretrain:trainable=[projector.*]" if kind == "d" else "pretrain:trainable=[projector.*,decoder.blocks.*.cross.*]"
    given = (*plan(kind, TILED, PLAIN, READ), trained, "batch.seq_length=128", "batch.rows=4", "batch.micro_rows=1", "model.image.max_tiles=3")
    runs.run("train", *given, f"out={tmp_path / 'one'}")
    runs.run("train", *given, f"out={tmp_path / 'two'}", "--nproc", 2)
    one, two = runs.metrics(tmp_path / "one"), runs.metrics(tmp_path / "two")
    assert len(one) == len(two) == 10
    for a, b in zip(one, two, strict=True):
        assert (a["tokens"], a["labels"], a["padding"]) == (b["tokens"], b["labels"], b["padding"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["d", "x", "h"])
def test_a_step_without_an_image(kind: str, tmp_path: Path) -> None:
    """Text alone, with the encoder and the connectors in the trainable set: no rank waits, and the encoder does not move."""
    given = (*plan(kind, READ), "batch.seq_length=128", "batch.rows=4", "batch.micro_rows=1")
    runs.run("train", *given, f"out={tmp_path / 'run'}", "--nproc", 2)
    assert len(runs.metrics(tmp_path / "run")) == 10


@pytest.mark.parametrize("kind", ["d", "x", "h"])
def test_stopped_and_resumed_bit_for_bit_and_packed_full(kind: str, tmp_path: Path) -> None:
    """The blend of the three kinds of samples: at least 98 % of the rows is useful, and a run that goes on equals one that never stopped."""
    given = (*plan(kind, TILED, PAIRS, PLAIN, READ), "batch.seq_length=1024", "batch.rows=4", "batch.micro_rows=1", "data.pool=512")
    runs.run("train", *given, f"out={tmp_path / 'run'}")
    lines = runs.learned(tmp_path / "run")
    assert sum(line["padding"] for line in lines) / len(lines) <= 0.02
    runs.run("train", *given, f"out={tmp_path / 'again'}", "--resume", tmp_path / "run" / "checkpoints" / "step_7")
    assert runs.learned(tmp_path / "again") == lines[7:]
    last = (folder / "checkpoints" / "step_10" for folder in (tmp_path / "run", tmp_path / "again"))
    first, second = map(runs.digests, last)
    assert first == second


@pytest.mark.parametrize("kind", ["x", "h"])
def test_compiled_and_recomputed(kind: str, tmp_path: Path) -> None:
    """Blocks compiled and computed again in backward give the losses of plain ones."""
    given = (*plan(kind, TILED, READ), "batch.seq_length=256", "batch.rows=2", "batch.micro_rows=1")
    runs.run("train", *given, f"out={tmp_path / 'plain'}")
    runs.run("train", *given, "compile=true", "recompute=block", f"out={tmp_path / 'other'}")
    for a, b in zip(runs.metrics(tmp_path / "plain"), runs.metrics(tmp_path / "other"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
