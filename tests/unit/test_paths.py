"""`~` in keys that name files, and what scripts and stopped demos are told."""

import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from neva import api
from neva import config as tree
from neva.config import FilePath
from neva.job import NAMED, TrainConfig
from neva.recipes import get
from neva.training import loop
from tests import runs

NOT_FILES = {"name", "data.sources.name", "data.date", "data.system"}
"""Texts of a stage's own keys that name no file."""


def texts(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Keys below a config that hold text, and whether that is a file's name; the model's apart."""
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        union = typing.get_origin(kind) in (typing.Union, types.UnionType)
        many = typing.get_origin(kind) is tuple
        members = typing.get_args(kind) if union or many else ()
        for one in (kind, *members):
            if is_dataclass(one) and isinstance(one, type) and name not in ("model", "parallel"):
                yield from texts(one, f"{prefix}{name}.")
        if kind == FilePath or kind is str or (union and str in members):
            yield f"{prefix}{name}", kind == FilePath


def test_the_home_folder_is_expanded_in_every_key_of_a_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = dict(texts(TrainConfig))
    assert {key for key, file in keys.items() if not file} == NOT_FILES
    named = [key for key, file in keys.items() if file and not key.startswith("data.sources")]
    assert {"out", "data.source", "data.tokenizer", "init.model", "evaluate.source"} <= set(named)
    given = [f"{key}=~/{key}" for key in named]
    given.append("data.sources=[{path: ~/a.json, image_folder: ~/images}]")
    (stage,) = tree.override(get("llava-tiny/finetune"), given, named=NAMED)
    for key in named:
        value = stage
        for name in key.split("."):
            value = getattr(value, name)
        assert value == str(tmp_path / key), key
    assert stage.data.sources[0].path == str(tmp_path / "a.json")
    assert stage.data.sources[0].image_folder == str(tmp_path / "images")
    given = ["init=~/x", "data.system=~/x"]
    (stage,) = tree.override(get("llava-tiny/finetune"), given, named=NAMED)
    assert stage.init.model == str(tmp_path / "x") and stage.data.system == "~/x"
    (tmp_path / "a.yaml").write_text(tree.dumps([stage]).replace("out: runs", "out: ~/runs"))
    assert tree.load(tmp_path / "a.yaml", TrainConfig)[0].out.startswith(f"{tmp_path}/runs")


SCRIPT = """
import sys
import neva
overrides = sys.argv[1:]
{guard}neva.train("llava-tiny/finetune", overrides)
"""
SMALL = (
    "model.decoder.layers=1", "model.vision.layers=1", "data.sources.0.mock.words=[4,20]",
    "log.tensorboard=false", "batch.seq_length=128", "batch.rows=2", "data.system=", "steps=1",
    "data.workers=2",
)  # fmt: skip


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_without_a_guard_is_told_what_to_write(tmp_path: Path, guarded: bool) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.format(guard='if __name__ == "__main__": ' if guarded else ""))
    done = subprocess.run(
        [sys.executable, str(script), *SMALL, f"out={tmp_path / 'run'}"],
        cwd=tmp_path,
        env=runs.ENVIRONMENT | {"PYTHONPATH": str(runs.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=runs.SECONDS,
    )
    if guarded:
        assert done.returncode == 0, done.stdout
        return
    assert done.returncode == 1, done.stdout
    error = done.stdout.strip().splitlines()[-1]
    assert "ValueError: each data worker runs the script that started it" in error
    assert 'if __name__ == "__main__":' in error and "data.workers=0" in error


def test_a_stopped_demo_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = "Stopped at step 3 of 720, saved in X. Go on with the same command and --resume auto."

    def stop(*_: object, **__: object) -> None:
        raise loop.Stopped(told, 130)

    monkeypatch.setattr(api, "train", stop)
    with pytest.raises(loop.Stopped) as stopped:
        api.demo([f"out={tmp_path / 'my run'}", "finetune:steps=9"])
    said = f"Go on with: neva demo 'out={tmp_path / 'my run'}' finetune:steps=9"
    assert stopped.value.message == f"Stopped at step 3 of 720, saved in X. {said}"
    assert stopped.value.exit_code == 130


def test_the_end_of_a_run_says_what_it_made_and_what_to_type(tmp_path: Path) -> None:
    """And both commands are commands: they parse."""
    data = runs.colour_data(tmp_path)
    out = tmp_path / "run"
    small = [one for one in SMALL if not one.startswith(("data.sources", "data.workers"))]
    images = tmp_path / "images"
    given = (f"data.source={data}", f"data.image_folder={images}", f"evaluate.source={data}")
    more = (f"evaluate.image_folder={images}", f"out={out}", "data.workers=0")
    said = runs.run("train", "llava-tiny/finetune", *small, *given, *more).splitlines()
    last = runs.metrics(out)[-1]
    ending = next(line for line in said if line.startswith("Done: step 1 after 0m "))
    assert ending.endswith(f"loss {last['loss']:.4f}, saved in {out / 'checkpoints' / 'step_1'}")
    assert said[-2] == f"Ask it: neva generate {out} --image FILE.png --prompt QUESTION"
    assert said[-1] == f"Score it: neva eval {out} --data {data} --image-folder {images}"
    score = said[-1].removeprefix("Score it: neva ").split()
    assert "accuracy" in runs.run(*score, "--max-new-tokens", "2")
