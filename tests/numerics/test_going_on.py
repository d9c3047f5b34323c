"""A run goes on only as the run that it was; what it began from may be gone. In process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from neva import api
from neva import config as tree
from neva.data.loader import Loader
from neva.job import TrainConfig
from tests import runs

CASES = runs.ROOT / "tests" / "data" / "cases"
ONE = (
    "model.decoder.layers=1", "model.vision.layers=2", "batch.seq_length=256", "batch.rows=4",
    "batch.micro_rows=2", "data.pool=8", "data.workers=0", "data.system=Be brief.",
    "log.tensorboard=false", "precision=fp32",
)  # fmt: skip


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """Samples of thirty lengths."""
    return Path(shutil.copytree(CASES / "resume-system", tmp_path / "case"))


def asked(case: Path, out: Path, *overrides: str) -> list[str]:
    source = (f"data.source={case / 'data.json'}", f"data.image_folder={case / 'images'}")
    return [*ONE, *source, f"out={out}", *overrides]


def train(recipe: str, overrides: list[str], **options: Any) -> list[str]:
    """What a run says."""
    said: list[str] = []
    api.train(recipe, overrides, say=said.append, **options)
    return said


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def other_tokenizer(folder: Path) -> str:
    """The same vocabulary, a byte of whose settings is another."""
    shutil.copytree(runs.TOKENIZER, folder)
    settings = folder / "tokenizer_config.json"
    told = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps({**told, "model_max_length": 77}))
    return str(folder)


CHANGES = {
    "system": (["data.system=Answer at length."], "data.system 'Be brief.' but this run has 'Ans"),
    "no system": (["data.system="], "data.system 'Be brief.' but this run has ''"),
    "template": (["data.template=llama_2"], r"data.template 'v1 \(sha256:.*has 'llama_2 \(sha256:"),
    "images": (["model.image.aspect=square"], "image layout aspect 'pad' but this run has 'sq"),
    "filter": (["model.image.resample=bilinear"], "image layout resample 'bicubic'"),
    "cut": (["data.over_long=truncate"], "data.over_long 'drop or error'"),
    "seed": (["seed=1"], "seed 0 but this run has 1"),
}


@pytest.mark.parametrize("change", [*CHANGES, "tokenizer", "edited data"])
def test_a_run_does_not_go_on_as_another(case: Path, tmp_path: Path, change: str) -> None:
    """Refused naming the key, in a dry run too, and no file of the run is changed."""
    out = tmp_path / "run"
    train("llava-tiny/finetune", asked(case, out, "steps=2"))
    overrides, message = CHANGES.get(change, ([], ""))
    if change == "tokenizer":
        overrides = [f"data.tokenizer={other_tokenizer(tmp_path / 'other')}"]
        message = "data.tokenizer sha256:"
    if change == "edited data":  # of the same length in samples, characters and tokens
        text = (case / "data.json").read_text()
        (case / "data.json").write_text(text.replace('"red"', '"der"', 1))
        message = "the data file of data sha256:"
    before = files(out)
    again = asked(case, out, "steps=4", *overrides)
    for start in (api.train, api.dry_run):
        with pytest.raises(ValueError, match=f"the saved data state has {message}"):
            start("llava-tiny/finetune", again, resume="auto", say=lambda text: None)
        assert files(out) == before


OTHERS = {
    "width": ("model.decoder.ffn=96", "another model: decoder.blocks.0.mlp.gate.weight is "),
    "layers": ("model.decoder.layers=2", "another model: decoder.blocks.1.*is absent there"),
    "trained": ("trainable=[projector.*]", "another trainable: decoder.* is trained there and fr"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_does_not_go_on(case: Path, tmp_path: Path, other: str) -> None:
    """Refused before a tensor is read, in a dry run too."""
    override, message = OTHERS[other]
    out = tmp_path / "run"
    train("llava-tiny/finetune", asked(case, out, "steps=1"))
    before = files(out)
    again = asked(case, out, "steps=2", override)
    for start in (api.train, api.dry_run):
        with pytest.raises(ValueError, match=f"step_1 was saved with {message}"):
            start("llava-tiny/finetune", again, resume="auto", say=lambda text: None)
        assert files(out) == before


def test_what_is_only_asked_for_otherwise_goes_on(case: Path, tmp_path: Path) -> None:
    """The chat format by its text, the tokenizer from elsewhere, more workers, another pool."""
    from neva.data.templates import TEMPLATES

    out = tmp_path / "run"
    train("llava-tiny/finetune", asked(case, out, "steps=2"))
    (tmp_path / "v1.jinja").write_text(TEMPLATES["v1"].jinja)
    moved = shutil.copytree(runs.TOKENIZER, tmp_path / "moved")
    more = (f"data.tokenizer={moved}", "data.pool=4", "data.over_long=error", "data.on_error=skip")
    said = train("llava-tiny/finetune", asked(case, out, "steps=3", *more), resume="auto")
    assert any(line.startswith("Resumed stage finetune at step 2") for line in said)
    assert not any("WARNING" in line for line in said)


def test_a_changed_key_is_said(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("llava-tiny/finetune", asked(case, out, "steps=2", "optim.lr=1e-3"))
    changed = asked(case, out, "steps=4", "optim.lr=2e-3", "optim.betas=[0.8,0.9]")
    told = "Changed since step 2: optim.lr 0.001 -> 0.002, optim.betas [0.9, 0.999] -> [0.8, 0.9], "
    rehearsed: list[str] = []
    api.dry_run("llava-tiny/finetune", changed, resume="auto", say=rehearsed.append)
    assert told + "steps 2 -> 4" in rehearsed
    last = out / "checkpoints" / "step_2"
    assert f"The run can go on from {last}" in rehearsed
    assert told + "steps 2 -> 4" in train("llava-tiny/finetune", changed, resume="auto")
    same = train("llava-tiny/finetune", changed, resume="auto")
    assert not any(line.startswith("Changed") for line in same)


def test_a_state_of_before_goes_on_with_a_warning(
    case: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that told sources, weights, seed, order and row length alone."""
    out = tmp_path / "run"
    told = ("version", "sources", "weights", "seed", "shuffle", "seq_length")
    now = Loader._identity.func  # type: ignore[attr-defined]
    with monkeypatch.context() as earlier:
        before = property(lambda self: {key: now(self)[key] for key in told})
        earlier.setattr(Loader, "_identity", before)
        train("llava-tiny/finetune", asked(case, out, "steps=2"))
    said = train("llava-tiny/finetune", asked(case, out, "steps=4"), resume="auto")
    warning = next(line for line in said if line.startswith("WARNING: "))
    for key in ("data.template", "data.system", "data.tokenizer", "image layout", "data file of"):
        assert key in warning
    # what it saves then tells all
    with pytest.raises(ValueError, match="data.system 'Be brief.'"):
        changed = asked(case, out, "steps=6", "data.system=x")
        train("llava-tiny/finetune", changed, resume="auto")


def test_a_date_counts_where_the_template_tells_it(case: Path, tmp_path: Path) -> None:
    template = f"data.template={CASES / 'date-template' / 'date.jinja'}"
    for name, chosen in (("tells", [template]), ("does not", [])):
        out = tmp_path / name
        train("llava-tiny/finetune", asked(case, out, *chosen, "steps=1", "data.date=2024-01-01"))
        later = asked(case, out, *chosen, "steps=2", "data.date=2024-01-02")
        if chosen:
            with pytest.raises(ValueError, match="data.date '2024-01-01' but this run has"):
                train("llava-tiny/finetune", later, resume="auto")
        else:
            train("llava-tiny/finetune", later, resume="auto")


@pytest.mark.parametrize("by", ["recipe", "config.yaml"])
def test_the_folder_that_a_run_began_from_may_be_gone(case: Path, tmp_path: Path, by: str) -> None:
    """Model, tokenizer and chat format are the run's own, and it goes on bit for bit."""
    begun_from = tmp_path / "first"
    wide = ("model.decoder.ffn=96", "data.template=llama_2")
    other = f"data.tokenizer={other_tokenizer(tmp_path / 'other')}"
    train("llava-tiny/finetune", asked(case, begun_from, "steps=1", *wide, other))
    init = f"init={begun_from}"
    chain = [*asked(case, tmp_path / "whole", "checkpoint.every=2", "steps=3"), init]
    chain = [one for one in chain if not one.startswith("data.system")]
    train("llava-tiny", chain)
    stopped = [one.replace("/whole", "/stopped") for one in chain]
    last = api.train("llava-tiny", stopped, say=lambda text: None)
    shutil.rmtree(last)  # as a kill in the second stage leaves it
    last.with_name("latest").unlink()
    last.with_name("latest").symlink_to("step_5")
    shutil.rmtree(begun_from)
    shutil.rmtree(tmp_path / "other")
    recipe = "llava-tiny" if by == "recipe" else str(tmp_path / "stopped" / "config.yaml")
    given = stopped if by == "recipe" else []
    api.dry_run(recipe, given, resume="auto", say=lambda text: None)
    said = train(recipe, given, resume="auto")
    gone = f"init: {begun_from} is not there any more: what it brought is taken from "
    assert any(line.startswith(gone) for line in said)
    assert runs.learned(tmp_path / "stopped") == runs.learned(tmp_path / "whole")
    kept = tree.load(tmp_path / "stopped" / "config.yaml", TrainConfig)
    assert [stage.init.model for stage in kept] == [str(begun_from)] * 2
    # To start anew without it would be to start from nothing.
    with pytest.raises(ValueError, match="first"):
        train(str(tmp_path / "stopped" / "config.yaml"), [f"out={tmp_path / 'new'}"])


def test_a_later_stages_own_folder_must_be_there(case: Path, tmp_path: Path) -> None:
    other = tmp_path / "first"
    train("llava-tiny/finetune", asked(case, other, "steps=1"))
    chain = asked(case, tmp_path / "run", "steps=2", f"finetune:init={other}")
    train("llava-tiny/pretrain", asked(case, tmp_path / "run", "steps=2"))
    shutil.rmtree(other)
    with pytest.raises(ValueError, match="first"):
        train("llava-tiny", chain, resume="auto")
