"""neva.yaml of a checkpoint is data: no tag of YAML runs code, wherever the file is read."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from neva import api
from neva import config as tree
from neva.checkpoint import store
from neva.checkpoint.inspect import inspect
from neva.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    digests,
    listing,
    serialise,
)
from neva.checkpoint.nemo import read_config
from neva.infer.generate import load
from neva.job import TrainConfig
from neva.recipes import inits, interpolation

TAGS = {
    "apply": "!!python/object/apply:os.mkdir ['{canary}']",
    "system": "!!python/object/apply:os.system ['touch {canary}']",
    "new": "!!python/object/new:subprocess.Popen [['touch', '{canary}']]",
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
}  # fmt: skip


def checkpoint(folder: Path, described: str) -> Path:
    """A checkpoint with this neva.yaml and a manifest that fits it, as a
    stranger would make one."""
    run = folder / "run"
    step = store.save(
        run, step=1, config={"model": {}}, write_files=lambda folder: None, weights={"x": torch.ones(2)},
        training=None, keep_last=0, keep_every=0,
    )  # fmt: skip
    (step / "neva.yaml").write_text(described)
    (step / MANIFEST).unlink()
    names = listing(step)
    (step / MANIFEST).write_bytes(
        serialise(asdict(Manifest(step=1, files=dict(sorted(digests(step, names).items()))))),
    )
    return step


def look(folder: Path) -> object:
    return inits.look(folder)


def exported(folder: Path) -> object:
    return api.export_checkpoint(folder, folder.parent / "out")


READERS = [store.load_config, store.open_checkpoint, load, inspect, look, exported]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("read", READERS)
def test_a_tag_that_would_run_code_runs_none(read, tag: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    step = checkpoint(tmp_path, "step: 1\nmodel: " + TAGS[tag].format(canary=canary) + "\n")
    with pytest.raises(CheckpointError, match=r"neva\.yaml cannot be read: .*python/") as error:
        read(step)
    assert not canary.exists() and "\n" not in str(error.value)


UNFIT = ["!!bool maybe", "!!int ''", "!!int many", "!!float some", "!!timestamp soon", "2026-99-99",
         "!!binary ü", "!!set [a]", "!!omap {a: 1}", "!neva x", "{[a]: 1}", "[", "&a [*b]", "\x01"]  # fmt: skip
"""Values that are none, of their tag or at all."""


@pytest.mark.parametrize("value", UNFIT)
@pytest.mark.parametrize("read", [store.load_config, inspect])
def test_a_value_that_is_none_is_an_error_of_one_line(read, value: str, tmp_path: Path) -> None:
    """PyYAML's own errors for some of these are a KeyError, an IndexError and an AttributeError."""
    step = checkpoint(tmp_path, f"step: 1\nmodel: {value}\n")
    with pytest.raises(CheckpointError, match=r"neva\.yaml cannot be read: .+") as error:
        read(step)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [*UNFIT, *TAGS.values()])
def test_in_a_nemo_config_too(value: str, tmp_path: Path) -> None:
    value = value.replace("2026-99-99", "!!timestamp 2026-99")  # a plain date is text there
    path = tmp_path / "model_config.yaml"
    path.write_text(f"name: {value}\n")
    readers = ((lambda: interpolation.load(path), path), (lambda: read_config(tmp_path), tmp_path))
    for read, told in readers:
        with pytest.raises(ValueError, match="cannot be read") as error:
            read()
        assert str(told) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", TAGS.values())
def test_a_recipe_has_no_tags(value: str, tmp_path: Path) -> None:
    """In a recipe of YAML an exclamation mark is text."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"- name: {value}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
        tree.load(path, TrainConfig)
    assert "\n" not in str(error.value) and not (tmp_path / "canary").exists()


def test_the_tags_would_run_under_an_unsafe_loader(tmp_path: Path) -> None:
    """So that the canary is one: the same texts, loaded as they must not be."""
    for tag in ("apply", "system"):
        canary = tmp_path / tag
        yaml.unsafe_load(TAGS[tag].format(canary=canary))
        assert canary.exists()


def test_a_plain_config_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    config = {"step": 1, "model": {"tags": ["<image>", "ü"], "eps": 1e-05, "nothing": None}}
    step = checkpoint(tmp_path, yaml.safe_dump(config, allow_unicode=True))
    assert store.load_config(step) == config == json.loads(json.dumps(config))
    assert store.open_checkpoint(step).config == config
