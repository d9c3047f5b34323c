"""Which files the tensors of a Hugging Face folder are read from: never one outside it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.shards import open_shards

TENSORS = {"a": torch.ones(3), "b": torch.zeros(2, 2)}


def folder_with_index(tmp_path: Path, place: str, kind: str) -> Path:
    """A folder whose index names a sound file, which is there, by this path."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    target = folder / place
    if kind == "safetensors":
        save_file(TENSORS, target)
    else:
        torch.save(TENSORS, target)
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, place)}))
    return folder


def places(tmp_path: Path, ending: str) -> list[str]:
    (tmp_path / "model-2").mkdir()
    return [
        f"../stray.{ending}",
        str(tmp_path / f"stray.{ending}"),
        f"../model-2/stray.{ending}",
        f"sub/../../stray.{ending}",
        f"sub/inner.{ending}",
        f"./here.{ending}",
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(("kind", "ending"), [("safetensors", "safetensors"), ("torch", "bin")])
def test_an_index_that_names_files_outside_its_folder_is_refused(
    kind: str,
    ending: str,
    number: int,
    tmp_path: Path,
) -> None:
    """The files are there and hold what the index says: only where they lie is wrong."""
    place = places(tmp_path, ending)[number]
    folder = folder_with_index(tmp_path, place, kind)
    with pytest.raises(CheckpointError, match="names files outside its folder") as error:
        open_shards(folder)
    assert place in str(error.value)


@pytest.mark.parametrize(("kind", "name"), [("safetensors", "one.safetensors"), ("torch", "one.bin")])
def test_the_same_index_with_a_file_inside_is_read(kind: str, name: str, tmp_path: Path) -> None:
    shards = open_shards(folder_with_index(tmp_path, name, kind))
    assert {name: shards.read(name).tolist() for name in shards.entries} == {name: tensor.tolist() for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("listed", [["a"], ["a", "b", "c"]])
def test_an_index_that_lists_other_tensors_than_its_file_holds_is_refused(
    listed: list[str],
    tmp_path: Path,
) -> None:
    """Fewer: part of the model would be left out. More: a part is missing."""
    folder = folder_with_index(tmp_path, "one.safetensors", "safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(listed, "one.safetensors")}))
    with pytest.raises(
        CheckpointError,
        match="also hold b" if len(listed) == 1 else "lists 'c' in one.safetensors",
    ):
        open_shards(folder)
