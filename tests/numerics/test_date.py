"""A chat template that tells the date: a run has one, also where it goes on another day."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from neva import api
from neva.infer.generate import load
from neva.training import loop
from tests import runs

torch.set_num_threads(1)
CASE = Path(__file__).parents[1] / "data" / "cases" / "date-template"


class Later(loop.date):
    """Another day."""

    @classmethod
    def today(cls) -> "Later":
        return cls(2031, 5, 17)


def train(out: Path, *more: str, resume: str | None = None) -> Path:
    overrides = (
        *runs.SMALL, f"data.source={CASE / 'data.json'}", f"data.image_folder={CASE / 'images'}", f"data.template={CASE / 'date.jinja'}",
        "data.workers=0", "batch.seq_length=128", "steps=4", "checkpoint.every=2", "checkpoint.keep_last=0", f"out={out}", *more,
    )  # fmt: skip
    return api.train("llava-tiny/finetune", overrides, resume=resume, say=lambda _: None)


def test_a_run_that_goes_on_another_day_is_the_undisturbed_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The date is in config.yaml and in each checkpoint, where an answer to a
    question takes it too."""
    whole = train(tmp_path / "whole")
    train(tmp_path / "cut")
    for name in ("step_4", "latest"):
        place = tmp_path / "cut" / "checkpoints" / name
        place.unlink() if place.is_symlink() else shutil.rmtree(place)
    (tmp_path / "cut" / "checkpoints" / "latest").symlink_to("step_2")
    monkeypatch.setattr(loop, "date", Later)
    resumed = train(tmp_path / "cut", resume="auto")
    assert runs.learned(tmp_path / "cut") == runs.learned(tmp_path / "whole")
    assert runs.digests(resumed) == runs.digests(whole)
    today = yaml.safe_load((resumed / "neva.yaml").read_text())["date"]
    assert yaml.safe_load((tmp_path / "cut" / "config.yaml").read_text())[0]["data"]["date"] == today != "2031-05-17"
    assert load(resumed).encoder.date == today
    other = train(tmp_path / "later")
    assert yaml.safe_load((other / "neva.yaml").read_text())["date"] == "2031-05-17"
    assert runs.learned(tmp_path / "later") != runs.learned(tmp_path / "whole")


def test_a_date_of_ones_own(tmp_path: Path) -> None:
    last = train(tmp_path / "run", "data.date=2024-07-26", "steps=1")
    assert load(last).encoder.date == "2024-07-26"
    with pytest.raises(ValueError, match="data.date=26 July is no day: write it as YYYY-MM-DD"):
        train(tmp_path / "other", "data.date=26 July")
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
