"""Two gloo ranks train as one process does: losses, resumes with other numbers of ranks, signals, errors. Through the real command line."""

import json
import re
import signal
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests import runs

pytestmark = [pytest.mark.slow, pytest.mark.multi]

PLAN = (
    "llava-tiny", *runs.SMALL, "precision=fp32", "steps=5", "checkpoint.every=2", "checkpoint.keep_last=0", "data.workers=0", "batch.rows=2",
    "pretrain:trainable=[projector.*]", "finetune:trainable=[*]", "optim.lr=5e-3",
    "data.sources.0.mock.text_only_every=2", "data.sources.0.mock.words=[14,20]",
)  # fmt: skip
"""Every second document has no image, and in the second stage one fills a row: there a rank has none where the other has, or no rank has one."""


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = (tmp_path_factory.mktemp(name) / "run" for name in ("one", "two"))
    runs.run("train", *PLAN, f"out={one}")
    runs.run("train", *PLAN, f"out={two}", "--nproc", 2)
    return one, two


COUNTS = ("stage", "step", "lr", "tokens", "labels", "padding", "skipped_samples", "skipped_steps")


def check_close(out: Path, other: Path) -> None:
    """The same samples in every step, and losses that differ by rounding alone."""
    assert len(runs.metrics(out)) == len(runs.metrics(other)) == 10
    worst = 0.0
    for a, b in zip(runs.metrics(out), runs.metrics(other), strict=True):
        assert {key: a[key] for key in COUNTS} == {key: b[key] for key in COUNTS}
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-9)
        worst = max(worst, abs(a["loss"] / b["loss"] - 1))
    print(f"largest relative difference of a loss: {worst:.1e}")
    states = [json.loads((run / "checkpoints" / "step_10" / "training" / "state.json").read_text()) for run in (out, other)]
    assert states[0] == states[1]


def test_two_ranks_give_the_losses_of_one(one_and_two: tuple[Path, Path]) -> None:
    one, two = one_and_two
    check_close(two, one)
    images = [round(line["tiles_per_s"] * line["seconds"]) for line in runs.metrics(one)]
    assert {0, 1} <= set(images), images  # of two ranks one had an image, or none had


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_resume_with_another_number_of_ranks_sees_the_same_samples(one_and_two: tuple[Path, Path], tmp_path: Path, first: int, then: int) -> None:
    start = one_and_two[first - 1] / "checkpoints" / "step_7"
    ranks = ("--nproc", then) if then > 1 else ()
    runs.run("train", *PLAN, f"out={tmp_path / 'run'}", "--resume", start, *ranks)
    whole = one_and_two[0]
    head = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)[:7]
    lines = tmp_path / "run" / "metrics.jsonl"
    lines.write_text("".join(head) + lines.read_text())  # in a folder of its own, it holds the steps from 8 on
    check_close(tmp_path / "run", whole)


def test_experts_on_two_ranks(tmp_path: Path) -> None:
    """A mixture of experts, its balance loss and dropout-free window attention give on two ranks what they give on one."""
    plan = (*PLAN, "steps=3", "model.decoder.experts=4", "model.decoder.balance=0.3", "model.decoder.window=16", "batch.rows=4")
    runs.run("train", *plan, f"out={tmp_path / 'one'}")
    runs.run("train", *plan, f"out={tmp_path / 'two'}", "--nproc", 2)
    one, two = (runs.metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["balance"] == pytest.approx(b["balance"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-9)


def test_sigterm_to_the_launcher_saves(one_and_two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("train", *PLAN, f"out={out}")
    process = runs.start(*command, "--nproc", 2)
    assert runs.wait_for(process, lambda: runs.steps_done(out) >= 3)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    said = runs.finish(process)
    stopped = re.search(r"Stopped at step (\d+) of 10, saved in \S+step_\1\. Go on with the same command and --resume auto\.", said)
    assert process.returncode == 143 and stopped, said
    assert runs.steps_kept(out)[-1] == int(stopped[1]) == len(runs.metrics(out))
    assert runs.survivors(started) == []
    runs.run(*command, "--nproc", 2, "--resume", "auto")
    assert runs.learned(out) == runs.learned(one_and_two[1])


def test_a_rank_that_is_killed_ends_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    process = runs.start("train", *PLAN, f"out={tmp_path / 'run'}", "steps=1000", "data.workers=1", "--nproc", 2)
    assert runs.wait_for(process, lambda: runs.steps_done(tmp_path / "run") >= 2)
    ranks = [child for child in psutil.Process(process.pid).children() if "train" in child.cmdline()]
    assert len(ranks) == 2
    family = psutil.Process(ranks[0].pid).children(recursive=True)
    ranks[0].kill()  # one rank dies: the launcher ends the other, and the run fails
    said = runs.finish(process)
    assert process.returncode == 137, said
    assert runs.survivors([*ranks, *family]) == []


def test_an_unreadable_sample_ends_both_ranks_and_is_named(tmp_path: Path) -> None:
    rows = []
    for n in range(8):
        Image.effect_noise((60, 60), 90).convert("RGB").save(tmp_path / f"{n}.png")
        rows.append(runs.row(f"s{n}", "<image>\nWhat is shown here, in one word and no more than that?", "noise " * 8, image=f"{n}.png"))
    content = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(content[: len(content) // 2])  # found by the rank that decodes it
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = (f"data.source={tmp_path / 'data.json'}", f"data.image_folder={tmp_path}", f"out={tmp_path / 'run'}")
    said = runs.run("train", *PLAN, *data, "--nproc", 2, code=1)
    assert re.search(r"error: .*sample 's5' of 'data': the image \S+5.png cannot be read", said)
    assert "Traceback" not in said, said


def test_ranks_share_an_evaluation_in_training(tmp_path: Path) -> None:
    data = runs.colour_data(tmp_path)
    images = tmp_path / "images"
    source = (f"data.source={data}", f"data.image_folder={images}", f"evaluate.source={data}", f"evaluate.image_folder={images}")
    plan = ("train", "llava-tiny/finetune", *runs.SMALL, *source, "precision=fp32", "data.workers=0", "steps=4", "evaluate.every=2", "optim.lr=1e-2")
    runs.run(*plan, f"out={tmp_path / 'one'}")
    runs.run(*plan, f"out={tmp_path / 'two'}", "--nproc", 2)
    one, two = ([json.loads(line) for line in (tmp_path / name / "evaluations.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert one == two and [line["step"] for line in two] == [2, 4]


def test_rows_that_do_not_divide_over_the_ranks_are_said_once_each_with_near_values(tmp_path: Path) -> None:
    said = runs.run("train", *PLAN, "batch.rows=3", f"out={tmp_path / 'run'}", "--nproc", 2, code=1)
    assert "batch.rows is 3, not a multiple of 2 data ranks x 1 batch.micro_rows: set it to 2 or 4" in said and "Traceback" not in said
