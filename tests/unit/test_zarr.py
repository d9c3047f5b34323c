"""A zarr array of a NeMo checkpoint is numbers in files beside its description, no more."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.nemo import _zarr, _zarr_header

SOUND = {
    "shape": [3, 2],
    "chunks": [2, 2],
    "dtype": "<f4",
    "compressor": None,
    "order": "C",
    "filters": None,
}


def array(folder: Path, **changes: Any) -> Path:
    """3 x 2 numbers in two chunks, of which the second is half empty."""
    folder.mkdir(exist_ok=True)
    (folder / ".zarray").write_text(json.dumps({**SOUND, **changes}))
    for number in range(2):
        (np.arange(4, dtype="<f4") + 4 * number).tofile(folder / f"{number}.0")
    return folder / ".zarray"


def test_a_sound_array_is_read(tmp_path: Path) -> None:
    header = _zarr_header(array(tmp_path / "a"))
    assert _zarr(tmp_path / "a", header).tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [10**6, 2]},
        {"shape": [-3, 2]},
        {"shape": [3.0, 2]},
        {"shape": [True, 2]},
        {"chunks": [0, 2]},
        {"chunks": [2]},
        {"dtype": "|O"},
        {"dtype": "<U1"},
        {"dimension_separator": "/../"},
    ],
    ids=str,
)
def test_what_describes_no_such_array_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="describes no array of numbers"):
        _zarr_header(array(tmp_path / "a", **changes))


def test_a_description_that_is_a_link_elsewhere_is_refused(tmp_path: Path) -> None:
    file = array(tmp_path / "a")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="describes no array of numbers"):
        _zarr_header(file)


PACKED = ({"compressor": {"id": "zlib"}}, {"order": "F"}, {"filters": [1]})


@pytest.mark.parametrize("changes", PACKED, ids=str)
def test_what_is_not_plain_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    header = _zarr_header(array(tmp_path / "a", **changes))
    with pytest.raises(CheckpointError, match="compressed zarr arrays are not read"):
        _zarr(tmp_path / "a", header)


def test_a_chunk_that_is_cut_off_is_named(tmp_path: Path) -> None:
    header = _zarr_header(array(tmp_path / "a"))
    chunk = tmp_path / "a" / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:8])
    with pytest.raises(CheckpointError, match=r"1\.0 is missing or cut off"):
        _zarr(tmp_path / "a", header)
