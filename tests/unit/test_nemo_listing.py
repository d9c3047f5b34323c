"""A published NeMo checkpoint's headers (tests/data/nemo): names, shapes, dtype and config are
read as what they are."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from neva.checkpoint import hf
from neva.checkpoint.hf import Options
from neva.checkpoint.nemo import read_nemo
from neva.models.presets import DECODERS
from neva.models.vlm import VLM, VLMConfig

LISTING = yaml.safe_load(
    (Path(__file__).parents[1] / "data" / "nemo" / "nemotron-4-340b.yaml").read_text(),
)
PRESET = DECODERS["nemotron4-340b"]
UNLISTED = {
    "model.decoder.layers.self_attention.linear_qkv.weight": [96, (96 + 2 * 8) * 192, 18432],
    "model.decoder.layers.self_attention.linear_qkv.layer_norm_weight": [96, 18432],
    "model.decoder.layers.self_attention.linear_qkv.layer_norm_bias": [96, 18432],
    "model.decoder.layers.mlp.linear_fc1.layer_norm_weight": [96, 18432],
    "model.decoder.layers.mlp.linear_fc1.layer_norm_bias": [96, 18432],
    "model.decoder.final_layernorm.weight": [18432],
    "model.decoder.final_layernorm.bias": [18432],
    "model.output_layer.weight": [256000, 18432],
}
"""The other arrays of such a model: not quoted, but named by Megatron and sized by the config."""


def headers(folder: Path, arrays: dict[str, list[int]]) -> Path:
    """The folder, its weights as holes: files of the right size that take no room on the disk."""
    weights = folder / "model_weights"
    for name, shape in arrays.items():
        (weights / name).mkdir(parents=True)
        header: dict[str, Any] = {
            "zarr_format": 2,
            "shape": shape,
            "chunks": shape,
            "dtype": LISTING["dtype"],
        }
        header |= {"compressor": None, "fill_value": None, "filters": None, "order": "C"}
        (weights / name / ".zarray").write_text(json.dumps(header))
        with (weights / name / ".".join("0" for _ in shape)).open("wb") as file:
            file.truncate(2 * math.prod(shape))
    for name in LISTING["objects"]:
        (weights / name).parent.mkdir(parents=True)
        (weights / name).write_bytes(b"")
    (weights / "metadata.json").write_text(json.dumps(LISTING["metadata"]))
    (folder / "model_config.yaml").write_text(yaml.safe_dump(LISTING["config"]))
    return folder


def ours() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the preset's tensors."""
    with torch.device("meta"):
        model = VLM(VLMConfig(decoder=PRESET, vision=None, projector="none"))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_the_config_is_the_presets(tmp_path: Path) -> None:
    source = read_nemo(
        headers(tmp_path / "nemo", LISTING["arrays"] | UNLISTED),
        tmp_path / "scratch",
    )
    assert source.model == PRESET


def test_the_listed_arrays_are_the_presets_tensors_of_each_layer(tmp_path: Path) -> None:
    """The four arrays that were quoted, by themselves."""
    source = read_nemo(headers(tmp_path / "nemo", LISTING["arrays"]), tmp_path / "scratch")
    found = {name: entry.shape for name, entry in source.shards.entries.items()}
    wanted = ours()
    assert len(found) == 1 + 3 * 96
    assert found == {name: wanted[name] for name in found}
    assert {entry.dtype for entry in source.shards.entries.values()} == {torch.bfloat16}
    kinds = {name.replace(".95.", ".N.") for name in found if ".95." in name}
    assert kinds == {f"decoder.blocks.N.{part}.weight" for part in ("attention.out", "mlp.up", "mlp.down")}


def test_all_of_it_makes_the_model(tmp_path: Path) -> None:
    """Nothing is missing, nothing is left over, and it has the published 340 billion parameters."""
    source = read_nemo(headers(tmp_path / "nemo", LISTING["arrays"] | UNLISTED), tmp_path / "scratch")
    chosen = hf.plan([source], Options())
    assert {name: tuple(tensor.shape) for name, tensor in chosen.tensors.items()} == ours()
    assert sum(math.prod(shape) for shape in ours().values()) == pytest.approx(340e9, rel=0.01)


@pytest.mark.parametrize("name", [*LISTING["arrays"], *UNLISTED])
def test_an_array_that_is_missing_or_of_another_shape_is_named(name: str, tmp_path: Path) -> None:
    arrays = LISTING["arrays"] | UNLISTED
    said: list[str] = []
    for number, changed in enumerate(({}, {name: [*arrays[name][:-1], 64]})):
        rest = {other: shape for other, shape in arrays.items() if other != name}
        folder = headers(tmp_path / str(number), rest | changed)
        with pytest.raises(ValueError, match=r"decoder\.|head\.") as error:
            hf.plan([read_nemo(folder, tmp_path / "scratch")], Options())
        said.append(str(error.value))
    assert "missing" in said[0] and "is refused" not in "".join(said)
