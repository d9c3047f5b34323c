"""NVLM-D, -X and -H through the real command line: a blend of tiled, one-tile and text samples, on one rank and two, stopped and resumed."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from neva.data.pack import Budget, collate
from neva.models.vlm import VLM, fresh
from neva.parallel import wrap
from tests import runs
from tests.oracle import test_cross

ROOT = Path(__file__).resolve().parents[2]

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
    """Rows so short that a rank has no image where the other has one (in D, whole micro-batches have none); connectors alone train first."""
    trained = "pretrain:trainable=[projector.*]" if kind == "d" else "pretrain:trainable=[projector.*,decoder.blocks.*.cross.*]"
    given = (*plan(kind, TILED, PLAIN, READ), trained, "batch.seq_length=128", "batch.rows=4", "batch.micro_rows=1", "model.image.max_tiles=3")
    runs.run("train", *given, f"out={tmp_path / 'one'}")
    runs.run("train", *given, f"out={tmp_path / 'two'}", "--nproc", 2)
    one, two = runs.metrics(tmp_path / "one"), runs.metrics(tmp_path / "two")
    assert len(one) == len(two) == 10
    for a, b in zip(one, two, strict=True):
        assert (a["tokens"], a["labels"], a["padding"]) == (b["tokens"], b["labels"], b["padding"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def gradients(world: int, out: str) -> None:
    """Write the gradients of four micro-batches, of X and H, with connectors or all but the encoder trained: as one rank, or as one of two."""
    dist.init_process_group("gloo")
    found = {}
    for name, trained in product(("X", "H"), (("projector.*", "decoder.blocks.*.cross.*"), ("*", "!vision.*"))):
        config = test_cross.CONFIGS[name]
        with torch.device("meta"):
            model = VLM(config)
        wrap.freeze(model, trained)
        wrap.parallelize(model, init_device_mesh("cpu", (world,)), precision="fp32", recompute="block")
        wrap.fill(model, torch.device("cpu"), lambda name, shape: torch.full(shape, 0.7) if name.endswith("gate") else fresh(name, shape, 0))
        for number, images in enumerate(((2, 0), (0, 0), (1, 3), (0, 0))):
            rows = [[test_cross.sample(config, 10 * number + row, images=count)] for row, count in enumerate(images)]
            mine = rows if world == 1 else [rows[dist.get_rank()]]
            budget = Budget(seq_length=150, rows=2, micro_rows=len(mine), max_tiles=99)
            losses = model(collate(mine, budget, layout=config.layout, group_names=("g",), any_tiles=any(images))).losses.sum()
            if losses.requires_grad:
                losses.backward()
        whole = {name: wrap.whole(p.grad) for name, p in wrap.logical_parameters(model) if p.grad is not None}
        found[name, trained[0]] = whole
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    os._exit(0)  # see tests/runs.py: gloo's threads


def test_gradients_of_two_ranks_with_open_gates(tmp_path: Path) -> None:
    """Micro-batches in which one rank, both or neither have images."""
    for world in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__, str(world)]
        subprocess.run([*command, str(tmp_path / f"{world}.pt")], check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    for case, expected in one.items():
        assert expected.keys() == two[case].keys() and any(".cross." in name for name in expected)
        for name, gradient in expected.items():
            assert (two[case][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), (case, name)


@pytest.mark.parametrize("kind", ["d", "x", "h"])
def test_a_step_without_an_image(kind: str, tmp_path: Path) -> None:
    """Text alone, with the encoder and the connectors in the trainable set: no rank waits for another."""
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


if __name__ == "__main__":
    gradients(int(sys.argv[1]), sys.argv[2])
