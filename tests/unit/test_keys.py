"""The keys of a stage: what is said of them, where a wrong one is meant to lie, and values of
Python."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import neva
from docs import make_keys
from neva import api, config, job
from neva.cli import main
from neva.config import Key, override
from neva.job import NAMED, OptimConfig, TrainConfig, find_keys
from neva.models.layers import RopeScaling
from neva.models.presets import VLMS
from neva.recipes.resolve import with_epochs

STAGES = tuple(TrainConfig(name=name, model=VLMS["llava-tiny"]) for name in ("pretrain", "finetune"))


def test_the_page_of_keys_is_up_to_date() -> None:
    assert make_keys.PAGE.read_text(encoding="utf-8") == make_keys.page(), "run `make keys`"


def test_every_key_has_a_text_and_can_be_set_to_its_default() -> None:
    """Each is given to `override` as the page spells it."""
    found = {key.path: key for key in find_keys()}
    assert len(found) == len(find_keys()) > 150
    assert not [path for path, key in found.items() if not key.doc or not key.kind]
    data = job.DataConfig(sources=(job.SourceConfig(mock=job.MockConfig()),))
    scaled = dataclasses.replace(VLMS["llava-tiny"].decoder, rope_scaling=RopeScaling(kind="linear", factor=2.0))
    model = dataclasses.replace(VLMS["llava-tiny"], decoder=scaled)
    stage = dataclasses.replace(STAGES[0], data=data, model=model)
    for key in found.values():
        if key.default and key.path != "model.vision.hf_config":
            override((stage,), [f"{key.path}={key.default}"], named=NAMED)


def walked(value: object, prefix: str = "") -> set[str]:
    """Paths of a saved config, from its YAML alone."""
    found = set()
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {"0": value[0]}
    if not isinstance(value, dict):
        return found
    for name, inner in value.items():
        found |= {f"{prefix}{name}"} | walked(inner, f"{prefix}{name}.")
    return found


def test_the_keys_are_those_of_a_saved_config() -> None:
    tree = config.to_dict(STAGES[0])
    paths = {key.path for key in find_keys()}
    assert walked(tree) <= paths
    shown = {path for path in paths if not re.search(r"\.0\.|mock|rope_scaling\.", path)}
    assert shown <= walked(tree)


def test_a_key_says_its_kind_its_default_and_its_text() -> None:
    (lr,) = [key for key in find_keys("optim.lr") if key.path == "optim.lr"]
    assert lr == Key("optim.lr", "a float", "0.001", "Highest learning rate, which warm-up ends at.")
    (decoder,) = [key for key in find_keys("model.decoder") if key.path == "model.decoder"]
    assert "or a preset: llama2-7b" in decoder.kind and decoder.default == ""
    assert {key.path for key in find_keys("*.eps")} == {"optim.eps", "model.decoder.eps", "model.vision.eps"}
    by_text = find_keys("Jinja")
    assert [key.path for key in by_text] == ["data.template"]
    with pytest.raises(ValueError, match=r"no key's name or text has 'seq_lenght'\. Did you mean 'seq_length'\?"):
        find_keys("seq_lenght")


def test_the_command_prints_them() -> None:
    told = CliRunner().invoke(main, ["keys", "optim.lr"]).output
    assert told.splitlines()[0] == "optim.lr = 0.001" and "Highest learning rate" in told
    rows = json.loads(CliRunner().invoke(main, ["keys", "batch.*", "--json"]).output)
    assert [row["path"] for row in rows] == [f"batch.{name}" for name in ("seq_length", "rows", "micro_rows", "max_tiles")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr=3", "no field 'lr'. Did you mean 'optim.lr'?"),
        ("finetune:seq_length=3", "no field 'seq_length'. Did you mean 'batch.seq_length'?"),
        ("every=3", "no field 'every'. Did you mean 'checkpoint.every' or 'log.every' or 'evaluate.every'?"),
        ("model.width=3", "no field 'width' in model. Did you mean 'model.decoder.width' or 'model.vision.width'?"),
        ("decoder.layers=3", "no field 'decoder'. Did you mean 'model.decoder.layers'?"),
        ("data.rows=3", "no field 'rows' in data. Did you mean 'batch.rows'?"),
        ("seqlength=3", "no field 'seqlength'. Did you mean 'batch.seq_length'?"),
        ("optim.lrr=3", "no field 'lrr' in optim. Did you mean 'lr'?"),
        ("data.sourcs=3", "no field 'sourcs' in data. Did you mean 'sources'?"),
        ("log.xyzzy=3", "no field 'xyzzy' in log. Known: every"),
    ],
)
def test_a_key_of_the_wrong_place_is_told_its_own(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        override(STAGES, [text], named=NAMED)


def test_values_of_python_are_what_texts_are() -> None:
    texts = ["optim.lr=3e-4", "finetune:steps=7", "trainable=[a, !b]", "optim.betas=[0.5, 0.6]", "compile=true"]
    texts += ["data.system=null", "data.source=x/y.json", "model.decoder=llama2-7b", "optim={warmup: 3, clip: 0}"]
    texts += ["out=07", "log.every=5"]
    values = {
        "optim.lr": 3e-4,
        "finetune:steps": 7,
        "trainable": ("a", "!b"),
        "optim.betas": [0.5, 0.6],
        "compile": True,
        "data.system": None,
        "data.source": Path("x/y.json"),
        "model.decoder": "llama2-7b",
        "optim": {"warmup": 3, "clip": 0},
        "out": "07",
        "log.every": "5",
    }
    assert override(STAGES, values, named=NAMED) == override(STAGES, texts, named=NAMED)
    assert override(STAGES, list(values.items()), named=NAMED) == override(STAGES, texts, named=NAMED)
    changed = override(STAGES, {"optim": OptimConfig(lr=5.0)}, named=NAMED)
    assert [stage.optim.lr for stage in changed] == [5.0, 5.0]
    assert override(STAGES, with_epochs({"epochs": 2, "steps": 3}), named=NAMED)[0].epochs == 0


def test_neva_takes_a_dict_and_refuses_a_text() -> None:
    stages = neva.recipe("llava-tiny", {"optim.lr": 0.25, "finetune:steps": 7})
    assert [stage.optim.lr for stage in stages] == [0.25, 0.25] and stages[1].steps == 7
    for call in (neva.recipe, neva.train, api.dry_run, api.show):
        with pytest.raises(ValueError, match=r"not the text 'out=x': write \['out=x'\]"):
            call("llava-tiny", "out=x")
    with pytest.raises(ValueError, match="not the text 'out=x'"):
        api.demo("out=x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("out=x", "overrides are a list or a dict, not the text 'out=x': write ['out=x'] or {'out': 'x'}"),
        ("a=1 b.c=2", "overrides are a list or a dict, not the text 'a=1 b.c=2': write ['a=1', 'b.c=2'] or"),
        ({"lr": 3}, "no field 'lr'. Did you mean 'optim.lr'?"),
        ({"optim.lr": "fast"}, "optim.lr: 'fast' is not a float"),
        ({"steps": 2.5}, "steps: 2.5 is not an int"),
        ({"compile": 1}, "compile: 1 is not a bool"),
        ({"stage:steps": 1}, "override 'stage:steps': no stage 'stage'."),
        ({"": 1}, "override '('', 1)' is not of the form key=value"),
        ([""], "override '' is not of the form key=value"),
    ],
)
def test_overrides_of_the_wrong_form_are_told_the_right_one(overrides, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        override(STAGES, with_epochs(overrides), named=NAMED)
