"""Runs by epochs: resolved once to steps, saved, kept on resume; what a run, a dry run and its
metrics say of samples and epochs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from neva import api
from neva import config as tree
from neva.data.loader import Loader
from neva.data.source import LlavaSource
from neva.data.tokenizer import load_tokenizer
from neva.job import TrainConfig
from neva.recipes.resolve import resolve, with_epochs
from neva.training import epochs as resolution
from neva.training import loop
from neva.training.stage import make_loader
from tests import runs

SMALL = (
    "data.sources=[]", "model.decoder.layers=1", "model.vision.layers=2", "batch.seq_length=128", "batch.rows=2", "data.workers=0",
    "data.system=Be brief.",
    "log.tensorboard=false", "precision=fp32", "checkpoint.every=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for 24 samples."""
    path = runs.colour_data(tmp_path_factory.mktemp("data"))
    return [f"data.source={path}", f"data.image_folder={path.parent / 'images'}"]


def stages(name: str, out: Path, *overrides: str) -> tuple[TrainConfig, ...]:
    return resolve(api.recipe(name, [*SMALL, *overrides, f"out={out}"]))


def silent(_: str) -> None:
    pass


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[Loader]:
    """The loaders that measured all of their data."""
    seen: list[Loader] = []
    whole: Callable = Loader.survey

    def noted(self: Loader, **options: object) -> object:
        if options.get("most") is None:
            seen.append(self)
        return whole(self, **options)

    monkeypatch.setattr(Loader, "survey", noted)
    return seen


def test_epochs_become_steps_are_saved_and_trained(data: list[str], tmp_path: Path) -> None:
    told: list[str] = []
    config = stages("llava-tiny", tmp_path, *data, "epochs=2", "pretrain:epochs=1.5")
    assert [stage.steps for stage in config] == [0, 0]
    last = loop.train(config, say=told.append)
    saved = tree.load(tmp_path / "config.yaml", TrainConfig)
    lines = runs.metrics(tmp_path)
    assert [stage.epochs for stage in saved] == [1.5, 2]
    for stage in saved:
        mine = [line for line in lines if line["stage"] == stage.name]
        samples = [line["samples"] for line in mine]
        assert len(mine) == stage.steps
        assert samples[-1] >= 24 * stage.epochs > samples[-2]
        assert [line["epochs"] for line in mine] == [{"data": count / 24} for count in samples]
        assert mine[-1]["lr"] < mine[-2]["lr"]  # the schedule ends where the stage does
        held = f"{stage.steps} steps are {2 * stage.steps} rows, {samples[-1]} samples"
        assert any(line.startswith(f"Stage {stage.name}: epochs={stage.epochs:g}: {held}") for line in told)
    assert last.name == f"step_{sum(stage.steps for stage in saved)}"


def test_a_resumed_run_keeps_its_steps_and_measures_nothing(
    data: list[str],
    tmp_path: Path,
    surveys: list[Loader],
) -> None:
    plan = stages("llava-tiny", tmp_path / "whole", *data, "epochs=1.5")
    loop.train(plan, say=silent)
    assert len(surveys) == 2
    cut = stages("llava-tiny", tmp_path / "cut", *data, "epochs=1.5")

    class Enough(Exception):
        pass

    def stop(config: TrainConfig, folder: Path) -> dict:
        raise Enough

    source = [f"evaluate.{key.removeprefix('data.')}" for key in data]
    interrupted = stages(
        "llava-tiny",
        tmp_path / "cut",
        *data,
        "epochs=1.5",
        *source,
        "pretrain:evaluate.every=3",
    )
    with pytest.raises(Enough):
        loop.train(interrupted, on_evaluate=stop, say=silent)
    del surveys[:]
    loop.train(cut, resume="auto", say=silent)
    assert not surveys
    assert runs.learned(tmp_path / "cut") == runs.learned(tmp_path / "whole")


def test_a_stage_begun_with_other_rows_refuses_epochs(data: list[str], tmp_path: Path) -> None:
    """Its steps would train more or fewer samples than was said."""
    loop.train(stages("llava-tiny/finetune", tmp_path, *data, "epochs=1"), say=silent)
    lines = runs.metrics(tmp_path)
    other = stages("llava-tiny/finetune", tmp_path, *data, "epochs=3", "batch.rows=1")
    told = "stage finetune was begun with batch.rows=2: epochs=3 .* put batch.rows back, or"
    with pytest.raises(ValueError, match=told):
        loop.train(other, resume="auto", say=silent)
    assert runs.metrics(tmp_path) == lines
    steps = len(lines) + 2
    given = [*data, f"steps={steps}", "batch.rows=1"]
    loop.train(stages("llava-tiny/finetune", tmp_path, *given), resume="auto", say=silent)
    assert len(runs.metrics(tmp_path)) == steps


def test_other_data_is_measured_anew_on_resume(data: list[str], tmp_path: Path) -> None:
    last = loop.train(stages("llava-tiny/finetune", tmp_path, *data, "epochs=1"), say=silent)
    told: list[str] = []
    more = stages("llava-tiny/finetune", tmp_path, *data, "epochs=3")
    loop.train(more, resume="auto", say=told.append)
    assert any(line.startswith("Stage finetune: epochs=3: ") for line in told)
    lines = runs.metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["samples"] >= 72 > lines[-2]["samples"]
    assert int(last.name.removeprefix("step_")) < len(lines)


def test_the_later_of_steps_and_epochs_counts(data: list[str], tmp_path: Path) -> None:
    changes = [("steps", "3"), ("epochs", 0), ("a:epochs", "2"), ("a:steps", "7"), ("a:epochs", 0)]
    assert with_epochs(["steps=3", "a:epochs=2", "a:steps=7"]) == changes
    assert with_epochs({"steps": "3", "a:epochs": "2", "a:steps": "7"}) == changes

    def chosen(*overrides: str) -> list[tuple[int, float]]:
        return [(stage.steps, stage.epochs) for stage in stages("llava-tiny", tmp_path, *data, *overrides)]

    assert chosen("steps=3", "epochs=2") == [(0, 2), (0, 2)]
    assert chosen("epochs=2", "steps=3") == [(3, 0), (3, 0)]
    assert chosen("epochs=2", "finetune:steps=3") == [(0, 2), (3, 0)]


@pytest.mark.parametrize("given", ["epochs=-1", "epochs=nan", "epochs=inf", "steps=0"])
def test_impossible_lengths_are_told(given: str, data: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{given.partition('=')[0]}=.* must be"):
        stages("llava-tiny/finetune", tmp_path, *data, given)


def test_a_run_and_a_dry_run_say_first_what_the_steps_hold(data: list[str], tmp_path: Path) -> None:
    told: list[str] = []
    loop.train(stages("llava-tiny/finetune", tmp_path / "run", *data, "steps=4"), say=told.append)
    held = runs.metrics(tmp_path / "run")[-1]["samples"]
    line = f"Stage finetune: 4 steps are 8 rows, {held} samples, {held / 24:.3g} epochs; "
    assert told[0].startswith("1 rank on ")
    assert told[1].startswith(line) and "estimated" not in told[1]
    told = []
    api.dry_run(
        "llava-tiny/finetune",
        [*SMALL, *data, f"out={tmp_path / 'dry'}", "steps=4"],
        say=told.append,
    )
    assert told[0].startswith(line)
    told = []
    api.dry_run(
        "llava-tiny/finetune",
        [*SMALL, *data, f"out={tmp_path / 'dry'}", "epochs=2"],
        say=told.append,
    )
    assert told[0].startswith("Stage finetune: epochs=2: ")
    assert told[1].startswith("Stage finetune: looked at all 24 samples and the headers of their")
    steps = int(told[0].split("epochs=2: ")[1].split()[0])
    assert f"Stage finetune (fp32), {steps} steps" in told[2]


def test_a_dry_run_whose_time_is_over_estimates(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [runs.row(f"r{n}", "Write it. " * (n % 7), "red " * (n % 5 + 1)) for n in range(2000)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    monkeypatch.setattr(resolution, "PATIENCE", 0.15)
    given = [*SMALL, f"data.source={tmp_path / 'data.json'}", f"out={tmp_path / 'dry'}", "epochs=2"]
    told: list[str] = []
    api.dry_run("llava-tiny/finetune", given, say=told.append)
    assert "estimated from " in told[0]
    (stage,) = stages(
        "llava-tiny/finetune",
        tmp_path,
        f"data.source={tmp_path / 'data.json'}",
        "epochs=2",
    )
    loader = make_loader(stage, load_tokenizer(stage.data.tokenizer))
    exact = loader.volume(loader.survey(), epochs=2)
    assert exact is not None
    assert int(told[0].split("epochs=2: ")[1].split()[0].replace(",", "")) == pytest.approx(exact.steps, rel=0.15)


def test_epochs_count_usable_samples(tmp_path: Path) -> None:
    """Those too long for a row are no part of N times all."""
    rows = [runs.row(f"r{n}", "Write it.", "red " * (500 if n % 2 else 3)) for n in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    loop.train(
        stages(
            "llava-tiny/finetune",
            tmp_path,
            f"data.source={tmp_path / 'data.json'}",
            "epochs=3",
        ),
        say=silent,
    )
    lines = runs.metrics(tmp_path)
    assert lines[-1]["samples"] >= 60 > lines[-2]["samples"]
    assert len(LlavaSource(tmp_path / "data.json")) == 40
    assert lines[-1]["epochs"] == {"data": lines[-1]["samples"] / 40}
