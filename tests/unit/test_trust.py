"""A checkpoint may name a function to run on images: it runs only where the caller says so.

The function's module writes a file when it is imported: the canary, whose
absence is what is tested.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from neva import api
from neva.checkpoint.hf import Options
from neva.checkpoint.target import ExportOptions
from neva.data.image import to_tiles
from neva.infer.generate import load
from tests.families import build, clip, llama
from tests.oracle.test_convert import SIZE, add_text
from tests.runs import run

MODULE = """
import os
from pathlib import Path
(Path(__file__).parent / f"ran_{{os.getpid()}}").write_text("the module was imported")
import torch
def shrink(image, layout):
    return torch.full((1, 3, layout.tile, layout.tile), {value}, dtype=torch.uint8)
"""
NAMED = "image.process=canary_module:shrink"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VLM whose neva.yaml names the function; nothing ran when it was made."""
    folder = tmp_path_factory.mktemp("strangers")
    text = llama(vocab_size=SIZE + 14, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
    build(text, folder / "decoder")
    add_text(folder / "decoder", image=False, pad=False)
    build(clip(), folder / "vision")
    options = Options(template="v1", overrides=(NAMED,))
    sources = [folder / "decoder", folder / "vision"]
    return api.import_checkpoint(sources, folder / "neva", options=options, parity=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of Python, here and in processes that are started, with the module."""
    (tmp_path / "canary_module.py").write_text(MODULE.format(value=7))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(api.__file__).parents[1]}")
    rows = [
        {
            "id": str(number),
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A red star."},
            ],
        }
        for number in range(8)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "a.png")
    yield tmp_path


def canaries(place: Path) -> int:
    return len(list(place.glob("ran_*")))


def command(name: str, checkpoint: Path, place: Path) -> tuple[object, ...]:
    """A command that would show an image to the checkpoint's model."""
    if name == "generate":
        picture = ("--image", place / "a.png")
        return ("generate", checkpoint, "--prompt", "What?", *picture, "--max-new-tokens", "2")
    data = ("--data", place / "data.json", "--image-folder", place)
    return ("eval", checkpoint, *data, "--max-new-tokens", "2")


def training(checkpoint: Path, place: Path, *more: str) -> tuple[object, ...]:
    return (
        "train", "llava-tiny/finetune", f"init.model={checkpoint}", f"data.source={place}/data.json",
        f"data.image_folder={place}", "data.workers=2", "batch.seq_length=256", "batch.rows=2", "steps=1",
        f"out={place}/run", "log.tensorboard=false", *more,
    )  # fmt: skip


def test_inspect_tells_of_it_and_runs_nothing(checkpoint: Path, place: Path) -> None:
    told = run("inspect", checkpoint, environment={"PYTHONPATH": str(place)})
    assert "the function canary_module:shrink" in told
    assert canaries(place) == 0


@pytest.mark.parametrize("name", ["generate", "eval"])
def test_a_checkpoints_function_runs_only_where_the_caller_trusts_it(
    name: str,
    checkpoint: Path,
    place: Path,
) -> None:
    asked = command(name, checkpoint, place)
    environment = {"PYTHONPATH": f"{place}"}
    refused = run(*asked, code=1, environment=environment)
    assert refused.startswith("error: ") and len(refused.splitlines()) == 1
    assert "canary_module:shrink" in refused and "--trust-code" in refused
    assert canaries(place) == 0
    run(*asked, "--trust-code", environment=environment)
    assert canaries(place) == 1


def test_load_refuses_it_unless_it_is_trusted(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="trust_code=True"):
        load(checkpoint)
    with pytest.raises(ValueError, match="trust_code=True"):
        list(api.generate(checkpoint, prompt="What?"))
    loaded = load(checkpoint, trust_code=True)
    assert loaded.encoder.layout.process == "canary_module:shrink"


def test_what_runs_is_the_function(
    checkpoint: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load(checkpoint, trust_code=True)
    monkeypatch.syspath_prepend(place)
    tiles = to_tiles(Image.new("RGB", (40, 30)), loaded.encoder.layout)
    assert torch.equal(tiles, torch.full_like(tiles, 7))


@pytest.mark.parametrize("more", [("--nproc", "2"), ()], ids=["ranks", "one"])
def test_training_from_it_is_refused(checkpoint: Path, place: Path, more: tuple[str, ...]) -> None:
    told = run(*training(checkpoint, place, *more), code=1, environment={"PYTHONPATH": str(place)})
    assert told.startswith("error: ") and "--trust-code" in told and len(told.splitlines()) == 1
    assert canaries(place) == 0 and not (place / "run").exists()


def test_show_does_not_put_it_into_a_recipe(checkpoint: Path, place: Path) -> None:
    """What `show` writes, `train FILE.yaml` runs as the user's own."""
    told = run("show", *training(checkpoint, place)[1:], code=1)
    assert "--trust-code" in told
    shown = yaml.safe_load(run("show", *training(checkpoint, place, "model.image.process=")[1:]))
    assert shown[0]["model"]["image"]["process"] == ""


@pytest.mark.multi
def test_training_goes_without_it_where_the_user_leaves_it_out(
    checkpoint: Path,
    place: Path,
) -> None:
    run(
        *training(checkpoint, place, "model.image.process="),
        environment={"PYTHONPATH": str(place)},
    )
    assert canaries(place) == 0
    assert load(place / "run").encoder.layout.process == ""


@pytest.mark.multi
@pytest.mark.parametrize("more", [("--trust-code",), ("model.image.process=canary_module:shrink",)])
def test_training_with_it_works_over_ranks_and_workers(
    checkpoint: Path,
    place: Path,
    more: tuple[str, ...],
) -> None:
    """Trusted, or named by the user: then two ranks and their data workers run it."""
    evaluate = (
        "evaluate.every=1",
        f"evaluate.source={place}/data.json",
        f"evaluate.image_folder={place}",
    )
    asked = training(checkpoint, place, "--nproc", "2", *evaluate, *more)
    run(*asked, environment={"PYTHONPATH": str(place)})
    assert canaries(place) >= 2


def test_export_runs_nothing(checkpoint: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image.process"):
        api.export_checkpoint(checkpoint, tmp_path / "whole")
    api.export_checkpoint(checkpoint, tmp_path / "text", options=ExportOptions(part="decoder"))
    assert canaries(place) == 0
