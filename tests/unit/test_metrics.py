"""The printed line: means since the line before, and that it fits a terminal."""

from dataclasses import replace
from pathlib import Path

import pytest

from neva.job import LogConfig, TrainConfig
from neva.models.presets import VLMS
from neva.training.metrics import Reporter, StepReport, duration, printed

STEP = StepReport(
    stage="finetune", step=700, loss=1.5, losses={"colour": 1.0, "copy": 2.0}, balance=None, grad_norm=0.5, lr=2e-5,
    tokens=900, labels=300, padding=0.1, tokens_per_s=450.0, tiles_per_s=3.0, flops_per_s=5e12, mfu=0.4, memory_gib=71.25,
    seconds=2.0, samples=12_345, epochs={}, skipped_samples=0, reduced_samples=0, skipped_steps=0,
)  # fmt: skip
LARGE = replace(
    STEP,
    step=123_456,
    losses={f"docmatix-{n}": 1.0 for n in range(86)},
    grad_norm=12345.678,
    tokens=2_000_000,
    samples=98_765_432,
    skipped_samples=12_345,
    reduced_samples=54_321,
    skipped_steps=321,
)
"""Every number long, and 86 kinds."""


def line(*reports: StepReport, columns: int = 400, lines: int = 1, left: float = 9000.0, flops: bool = False) -> str:
    return printed(reports, last_step=720, left=left, columns=columns, lines=lines, flops=flops)


def test_a_line_tells_the_means_since_the_one_before() -> None:
    other = replace(STEP, step=701, loss=2.5, losses={"colour": 3.0}, grad_norm=1.5, lr=1e-5, tokens=300, seconds=1.0, padding=0.7, samples=13_000)
    told = line(STEP, other)
    assert told.split("  ") == [
        "finetune 701/720", "loss 2.0000", "grad 1.0000", "lr 1.00e-05", "ETA 2.5 h", "400 tok/s", "MFU 40.0%", "71.25 GiB",
        "colour 2.000 copy 2.000", "13,000 samples", "40.0% padding", "3.0 tiles/s",
    ]  # fmt: skip
    assert "GFLOP" not in told and "5,000.0 GFLOP/s" in line(STEP, flops=True)


def test_steps_without_a_finite_loss_are_told() -> None:
    left_out = replace(STEP, loss=None, losses={}, grad_norm=None, skipped_steps=1)
    assert "loss 1.5000  grad 0.5000" in line(STEP, left_out) and "1 step left out" in line(left_out)
    assert "loss not finite  grad not finite" in line(left_out)
    assert "loss none  grad none" in line(replace(left_out, labels=0))
    assert "1 sample skipped" in line(replace(STEP, skipped_samples=1)) and "skipped" not in line(STEP)


@pytest.mark.parametrize("columns", [80, 100, 140])
@pytest.mark.parametrize("report", [STEP, LARGE], ids=["usual", "large"])
def test_a_terminal_shows_two_lines_at_most(report: StepReport, columns: int) -> None:
    rows = line(report, columns=columns, lines=2, flops=True).split("\n")
    assert len(rows) <= 2 and all(len(row) <= columns for row in rows)
    text = "\n".join(rows)
    assert all(word in text for word in ("loss", "grad", "lr", "ETA", "tok/s"))
    assert len(line(report, columns=160).split("\n")) == 1 and len(line(report, columns=160)) <= 160
    assert line(STEP, columns=140, lines=2).count("\n") <= 1


def test_many_kinds_are_counted() -> None:
    told = line(LARGE)
    assert "docmatix-0 1.000 docmatix-1 1.000 +84" in told and "docmatix-2 " not in told


def test_times_are_hours_from_one_on() -> None:
    assert [duration(seconds) for seconds in (9.0, 90.0, 3599.0, 3600.0, 4e5)] == ["9 s", "2 min", "60 min", "1.0 h", "111.1 h"]


@pytest.mark.parametrize(("every", "wanted"), [(2, ["2/5", "4/5", "5/5"]), (0, [])])
def test_a_log_holds_a_line_of_each_so_many_steps(tmp_path: Path, every: int, wanted: list[str]) -> None:
    said: list[str] = []
    config = TrainConfig(name="a", model=VLMS["llava-tiny"], log=LogConfig(every=every, tensorboard=False))
    reporter = Reporter(out=tmp_path, config=config, last_step=5, say=said.append)
    for step in range(1, 6):
        reporter.write(replace(STEP, step=step, loss=float(step)))
    reporter.close()
    assert [text.split()[1] for text in said] == wanted
    assert [text.split()[3] for text in said] == [f"{mean:.4f}" for mean in (1.5, 3.5, 5.0)][: len(wanted)]
    assert reporter.since == []
