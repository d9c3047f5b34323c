"""The commands of models: import, export, inspect, templates, convert-config."""

import json
from pathlib import Path

import pytest

from tests.families import build, clip, llama, on_disk
from tests.oracle.test_convert import SIZE, add_text, same_bits, whole
from tests.runs import run

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[1] / "data" / "neva_config.yaml"


def test_in_and_out(tmp_path):
    """A LLaVA comes in, says what it is, answers, and goes out as it was."""
    whole(tmp_path / "hf")
    said = run("import", tmp_path / "hf", "--out", tmp_path / "neva")
    assert "Parity with transformers" in said and "logits with an image" in said and said.rstrip().endswith("neva")
    shown = json.loads(run("inspect", tmp_path / "neva", "--json"))
    assert shown["template"] == "v1" and "files against their checksums" in shown["verified"] and "largest difference" in shown["origin"]
    assert "vision" in shown["parameters"] and "378 tokens" in shown["tokenizer"]
    assert "llava" in run("inspect", tmp_path / "hf")
    assert run("generate", tmp_path / "neva", "--prompt", "Hello?", "--max-new-tokens", 4, "--json").startswith('{"id"')
    run("export", tmp_path / "neva", "--out", tmp_path / "out")
    assert same_bits(on_disk(tmp_path / "hf"), on_disk(tmp_path / "out"))
    assert "error: " in run("export", tmp_path / "neva", "--out", tmp_path / "out", code=1)
    assert "error: " in run("import", tmp_path / "hf", "--out", tmp_path / "neva", code=1)


def test_composed_by_command(tmp_path):
    """--decoder and --vision, with a change of the config on the way; --no-parity is said and remembered."""
    build(llama(vocab_size=SIZE), tmp_path / "text")
    add_text(tmp_path / "text", image=False, pad=False)
    build(clip(), tmp_path / "seen")
    parts = [
        "import",
        "--decoder",
        tmp_path / "text",
        "--vision",
        tmp_path / "seen",
        "--no-parity",
        "--projector",
        "linear",
        "vision.select_layer=-1",
    ]
    said = run(*parts, environment={"NEVA_CACHE": str(tmp_path / "cache")})
    assert "NOT COMPARED" in said and "new, drawn from seed 0: projector.0.weight" in said
    place = Path(said.strip().splitlines()[-1])
    assert place.parent == tmp_path / "cache" / "imports"
    assert "reads layer -1" in run("inspect", place) and "NOT compared with transformers" in run("inspect", place)
    assert run(*parts, environment={"NEVA_CACHE": str(tmp_path / "cache")}).strip() == str(place)
    assert "give one SRC" in run("import", tmp_path / "text", "--decoder", tmp_path / "text", code=2)


def test_lists(tmp_path):
    """templates and convert-config."""
    names = [row["name"] for row in json.loads(run("templates", "--json"))]
    assert {"plain", "v0", "v1", "llama_2", "llama_3", "mistral", "chatml", "nvgpt"} <= {*names} and "qwen" in run("templates")
    said = run("convert-config", CONFIG, "--out", tmp_path / "ours.yaml")
    assert "model.fp8=False NOT SUPPORTED" in said and (tmp_path / "ours.yaml").exists()
    assert "rows: 25" in run("show", tmp_path / "ours.yaml", "data.source=", "data.image_folder=", "data.sources=[{mock: {samples: 10}}]",
                             "data.tokenizer=neva/recipes/tokenizer", "data.template=v1", "init.vision=", "init.decoder=")  # fmt: skip
