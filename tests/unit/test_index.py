"""DCP's index is a pickle: nothing is built of it but an index of tensors that are there."""

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from neva.checkpoint import index
from neva.checkpoint.manifest import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tensors of three numbers."""
    tensors = {"a": torch.ones(3), "b": torch.zeros(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a save without a process group
        save(tensors, storage_writer=FileSystemWriter(tmp_path / "weights"), no_dist=True)
    return tmp_path / "weights"


def changed(folder: Path, size: int) -> None:
    """Give `a` another size."""
    found: Any = pickle.loads((folder / ".metadata").read_bytes())
    found.state_dict_metadata["a"].size = torch.Size([size])
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def test_a_sound_index_is_read(folder: Path) -> None:
    assert index.stored(folder).keys() == {"a", "b"}
    assert index.read(folder, "a").tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["set_default_device", "compile", "load"])
def test_functions_of_torch_are_no_part_of_an_index(folder: Path, name: str) -> None:
    """Its dtypes are named as they are; this pickle calls a function of that module."""
    (folder / ".metadata").write_bytes(b"ctorch\n" + name.encode() + b"\n(Vmeta\ntR.")
    with pytest.raises(CheckpointError, match=rf"would run code \(torch\.{name}\)"):
        index.stored(folder)
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("size", [-3, -(10**6), 10**6])
def test_sizes_that_no_file_holds_are_refused(folder: Path, size: int) -> None:
    changed(folder, size)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged: it speaks of tensors"):
        index.stored(folder)


def test_a_damaged_index_is_named(folder: Path) -> None:
    sound = (folder / ".metadata").read_bytes()
    for length in range(0, len(sound), 17):
        (folder / ".metadata").write_bytes(sound[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata is (damaged|refused)"):
            index.stored(folder)


def test_what_is_no_index_is_named(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(OrderedDict()))
    with pytest.raises(CheckpointError, match=r"\.metadata is no index"):
        index.stored(folder)


def test_a_file_that_is_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (file,) = folder.glob("*.distcp")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        index.stored(folder)
