"""neva.yaml of a checkpoint is data: no tag of YAML runs code, wherever the file is read."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from neva.checkpoint import store
from neva.checkpoint.inspect import inspect
from neva.checkpoint.manifest import MANIFEST, Manifest, digests, listing, serialise
from neva.infer.generate import load

TAGS = {
    "apply": "!!python/object/apply:os.mkdir ['{canary}']",
    "system": "!!python/object/apply:os.system ['touch {canary}']",
    "new": "!!python/object/new:subprocess.Popen [['touch', '{canary}']]",
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
}  # fmt: skip


def checkpoint(folder: Path, described: str) -> Path:
    """A checkpoint with this neva.yaml and a manifest that fits it, as a stranger would make one."""
    run = folder / "run"
    step = store.save(
        run, step=1, config={"model": {}}, write_files=lambda folder: None, weights={"x": torch.ones(2)},
        training=None, keep_last=0, keep_every=0,
    )  # fmt: skip
    (step / "neva.yaml").write_text(described)
    (step / MANIFEST).unlink()
    names = listing(step)
    (step / MANIFEST).write_bytes(serialise(asdict(Manifest(step=1, files=dict(sorted(digests(step, names).items()))))))
    return step


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("read", [store.load_config, store.open_checkpoint, load, inspect])
def test_a_tag_that_would_run_code_runs_none(read, tag: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    step = checkpoint(tmp_path, "step: 1\nmodel: " + TAGS[tag].format(canary=canary) + "\n")
    with pytest.raises((ValueError, yaml.YAMLError)) as error:
        read(step)
    assert not canary.exists() and ("python/" in str(error.value) or "neva.yaml" in str(error.value))


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
