"""An import and an export that are killed while they write: nothing under the name that was asked
for, and the same command goes on."""

import signal
from pathlib import Path

import pytest
import torch

from neva import api
from neva.checkpoint import store, stream
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import MANIFEST, MARK
from neva.checkpoint.target import ExportOptions
from tests.families import build, llama, on_disk
from tests.killing import Moment, run
from tests.oracle.test_convert import SIZE, add_text, same_bits

pytestmark = pytest.mark.slow
WRITE, JOURNAL, SAVE = "neva.checkpoint.stream:_write_unit", "neva.checkpoint.stream:_replace", "torch:save"
FINISH = "torch.distributed.checkpoint.filesystem:FileSystemWriter.finish"
SHARD = "neva.checkpoint.export:save_file"
UNITS, FILES = 7, 8
"""In how many parts the model below is imported, and in how many files it is exported."""


def source(folder: Path, seed: int = 0) -> Path:
    """A decoder with a tokenizer; another seed gives other weights of the same shapes."""
    torch.manual_seed(seed)
    build(llama(vocab_size=SIZE), folder)
    add_text(folder, image=False, pad=False)
    if seed:
        state = {name: tensor + 1 for name, tensor in on_disk(folder).items()}
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def imported(folder: Path, out: Path, parity: bool = False) -> None:
    """`neva import` with small units."""
    stream.UNIT = 60_000
    api.import_checkpoint([folder], out, options=Options(), parity=parity, say=lambda line: None)


def exported(checkpoint: Path, out: Path, parity: bool = False) -> None:
    """`neva export` in many files."""
    options = ExportOptions(shard=40_000)
    api.export_checkpoint(checkpoint, out, options=options, parity=parity, say=lambda line: None)


def staged(tmp_path: Path) -> Path:
    """The one folder that the killed process left."""
    (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    return left


def weights(checkpoint: Path) -> dict[str, bytes]:
    """The DCP files, which hold a unit each."""
    return {path.name: path.read_bytes() for path in sorted((checkpoint / "weights").glob("*.distcp"))}


IMPORT_MOMENTS = [
    (Moment(function=WRITE, when="before"), 0),
    (Moment(function=SAVE, call=3, when="after"), 1),  # within the second file
    # the file is there, the note that it is whole is not
    (Moment(function=WRITE, call=3, when="after"), 2),
    (Moment(function=JOURNAL, call=4, when="after"), 4),
    (Moment(function=FINISH, when="before"), UNITS),
    (Moment(function=FINISH, when="after"), UNITS),
    (Moment(function="neva.checkpoint.hf:_write_source", when="after"), UNITS),
    (Moment(function="neva.checkpoint.gate:compare", when="after"), UNITS),
    (Moment(function="neva.checkpoint.hf:publish", when="before"), UNITS),
    (Moment(function="neva.checkpoint.hf:listing", when="after"), UNITS),  # begins to be published
    (Moment(function="pathlib:Path.rename", call=2, when="before"), UNITS),  # lacks only its name
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hf/, a model, whole/, its import, and out/, its export again;
    nothing disturbed them."""
    place = tmp_path_factory.mktemp("undisturbed")
    ended = run(
        imported,
        source(place / "hf"),
        place / "whole",
        notes=place / "notes",
        counted=[WRITE],
    )
    assert (ended.code, ended.calls[WRITE]) == (0, UNITS)
    ended = run(exported, place / "whole", place / "out", notes=place / "notes", counted=[SHARD])
    assert (ended.code, ended.calls[SHARD]) == (0, FILES)
    return place


@pytest.mark.parametrize(("moment", "kept"), IMPORT_MOMENTS, ids=str)
def test_killed_import(moment: Moment, kept: int, undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 leaves no checkpoint under the name; the same command writes what was
    missing, and no unit twice."""
    hf, out = undisturbed / "hf", tmp_path / "neva"
    parity = "gate" in moment.function
    ended = run(imported, hf, out, parity, notes=tmp_path / "notes", moment=moment)
    assert ended.code == -signal.SIGKILL and not out.exists()
    before = {path: path.stat().st_mtime_ns for path in staged(tmp_path).rglob("*.distcp")}
    again = run(imported, hf, out, notes=tmp_path / "notes", counted=[WRITE])
    assert (again.code, again.calls[WRITE]) == (0, UNITS - kept)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["neva"]
    assert store.verify(out).step == 0 and (out / MANIFEST).exists()
    assert weights(out) == weights(undisturbed / "whole")
    files = {path.relative_to(out) for path in out.rglob("*")}
    assert not list(out.rglob("unit_*"))  # the notes of finished units are gone
    assert files == {path.relative_to(undisturbed / "whole") for path in (undisturbed / "whole").rglob("*")}
    untouched = [path for path, when in before.items() if (out / "weights" / path.name).stat().st_mtime_ns == when]
    assert len(untouched) == kept


def test_killed_between_the_name_and_the_mark(undisturbed: Path, tmp_path: Path) -> None:
    """The folder has its name and is whole, though the mark of its making is still in it."""
    hf, out = undisturbed / "hf", tmp_path / "neva"
    moment = Moment(function="pathlib:Path.rename", call=2, when="after")
    assert run(imported, hf, out, notes=tmp_path / "notes", moment=moment).code == -signal.SIGKILL
    assert (out / MARK).is_file()
    assert store.verify(out).step == 0 and weights(out) == weights(undisturbed / "whole")
    moment = Moment(function="pathlib:Path.rename", when="after")
    ended = run(exported, out, tmp_path / "out", notes=tmp_path / "notes", moment=moment)
    assert ended.code == -signal.SIGKILL
    assert same_bits(on_disk(tmp_path / "out"), on_disk(hf))


def test_leftovers_of_another_model_are_not_taken(undisturbed: Path, tmp_path: Path) -> None:
    """The source has other weights by the time that the import is started again."""
    hf, out = source(tmp_path / "hf"), tmp_path / "neva"
    moment = Moment(function=JOURNAL, call=4, when="after")
    assert run(imported, hf, out, notes=tmp_path / "notes", moment=moment).code == -signal.SIGKILL
    source(hf, seed=1)
    again = run(imported, hf, out, notes=tmp_path / "notes", counted=[WRITE])
    assert (again.code, again.calls[WRITE]) == (0, UNITS)
    api.export_checkpoint(out, tmp_path / "out")
    assert same_bits(on_disk(hf), on_disk(tmp_path / "out"))
    assert not same_bits(on_disk(undisturbed / "hf"), on_disk(hf))


EXPORT_MOMENTS = [
    (Moment(function=SHARD, when="before"), 0),
    (Moment(function=SHARD, call=3, when="after"), 2),
    (Moment(function="pathlib:Path.replace", call=4, when="after"), 4),
    (Moment(function="neva.checkpoint.export:compare_prompts", when="after"), FILES),
    (Moment(function="pathlib:Path.rename", when="before"), FILES),  # lacks only its name
]


@pytest.mark.parametrize(("moment", "kept"), EXPORT_MOMENTS, ids=str)
def test_killed_export(moment: Moment, kept: int, undisturbed: Path, tmp_path: Path) -> None:
    """The same for the way out: `kept` files are not written again."""
    checkpoint, out = undisturbed / "whole", tmp_path / "out"
    parity = "compare" in moment.function
    ended = run(exported, checkpoint, out, parity, notes=tmp_path / "notes", moment=moment)
    assert ended.code == -signal.SIGKILL and not out.exists()
    assert staged(tmp_path).is_dir()
    again = run(exported, checkpoint, out, notes=tmp_path / "notes", counted=[SHARD])
    assert (again.code, again.calls[SHARD]) == (0, FILES - kept)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
    assert same_bits(on_disk(out), on_disk(undisturbed / "hf"))
    assert {path.name for path in out.iterdir()} == {path.name for path in (undisturbed / "out").iterdir()}
