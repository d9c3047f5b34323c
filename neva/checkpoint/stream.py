"""Weights written to a checkpoint some at a time, so that memory never holds more, and a write that was cut off goes on where it ended.

The folder is one that `store.load_weights` reads: DCP as if each unit had been a rank. What DCP says of a finished unit is kept beside it
until the last one is done.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from neva.checkpoint.manifest import MARK, sync

UNIT = 2**30
"""Bytes of a unit; a larger tensor is one by itself."""


def staging(out: Path, ending: str = ".tmp") -> Path:
    """The folder that becomes `out` when it is whole, or that `out` is made from.

    ValueError if `out` is there already, or in the folder's place something that neva did not make.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already; name another folder with --out, or remove it")
    folder = out.with_name(out.name + ending)
    _check_own(folder)
    return folder


def _check_own(folder: Path) -> None:
    if not (folder.is_symlink() or folder.exists()):
        return
    real = folder.is_dir() and not folder.is_symlink()
    if not real or not ((folder / MARK).is_file() or not any(folder.iterdir())):
        fix = "rename or remove it, or name another folder with --out"
        raise ValueError(f"{folder} is in the way, and neva did not make it: {fix}")


def begin(folder: Path, of: str) -> None:
    """Make the folder, or go on with what a cut-off write of the same (`of`) left there.

    What one of something else left is removed. ValueError for a folder that neva did not make.
    """
    _check_own(folder)
    mark = folder / MARK
    if folder.exists() and not (mark.is_file() and mark.read_text(encoding="utf-8") == of):
        remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(of, encoding="utf-8")


def remove(folder: Path) -> None:
    """Remove a folder of `begin`'s, if it is there; its mark last, so that a kill leaves it
    ours."""
    if not folder.exists():
        return
    _check_own(folder)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(folder)


def finish(folder: Path, out: Path) -> None:
    """Make a folder of `begin`'s durable, and give it the name `out`."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    # marked: after a kill here, the same command still knows the folder as its own
    folder.rename(out)
    (out / MARK).unlink()
    sync(out)
    sync(out.parent)


@contextmanager
def removed_if_refused(folder: Path) -> Iterator[None]:
    """Removes the folder where what is done within is refused (a ValueError); what a kill or a full disk leaves stays, to go on from."""
    try:
        yield
    except ValueError:
        remove(folder)
        raise


def units(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, cut into units of at most `UNIT` bytes."""
    cut: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not cut or size > room:
            cut.append([])
            room = UNIT
        cut[-1].append(name)
        room -= size
    return cut


def write(folder: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], *, tick: Callable[[int], None]) -> None:
    """Write the tensors that `tensors` describes (on the meta device) to `folder`, each from `read(name)`.

    Units of an earlier, cut-off write of the same tensors are kept: the caller answers for that. `tick` gets the bytes of each unit.
    """
    if not (folder / ".metadata").exists():
        _write_all(folder, tensors, read, tick=tick)
    for journal in folder.glob("unit_*.json"):
        journal.unlink()


def _write_all(
    folder: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    *,
    tick: Callable[[int], None],
) -> None:
    """Units, each with its journal, then the index of all."""
    named = units({name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()})
    writer = FileSystemWriter(folder, thread_count=1)
    writer.set_up_storage_writer(True)
    plans = [writer.prepare_local_plan(_planner({name: tensors[name] for name in unit}).create_local_plan()) for unit in named]
    plans, metadata = _planner({}).create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results = []
    for number, (unit, plan) in enumerate(zip(named, plans, strict=True)):
        journal = folder / f"unit_{number}.json"
        if not journal.exists():
            _replace(journal, [_plain(result) for result in _write_unit(writer, plan, {name: read(name) for name in unit}, tensors)])
        results.append([_result(fields) for fields in json.loads(journal.read_text())])
        tick(sum(tensors[name].numel() * tensors[name].element_size() for name in unit))
    writer.finish(metadata, results)


def _planner(state: Mapping[str, Tensor]) -> DefaultSavePlanner:
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(state), is_coordinator=True)
    return planner


def _write_unit(writer: FileSystemWriter, plan: SavePlan, real: dict[str, Tensor], described: Mapping[str, Tensor]) -> Sequence[WriteResult]:
    for name, tensor in real.items():
        assert tensor.shape == described[name].shape and tensor.dtype == described[name].dtype, name
    planner = _planner(real)
    return writer.write_data(planner.finish_plan(plan), planner).wait()


def _plain(result: WriteResult) -> dict[str, Any]:
    info = result.storage_data
    return {
        "name": result.index.fqn, "index": result.index.index, "offsets": list(result.index.offset or ()), "bytes": result.size_in_bytes,
        "file": info.relative_path, "start": info.offset, "length": info.length,
    }  # fmt: skip


def _result(fields: dict[str, Any]) -> WriteResult:
    index = MetadataIndex(fields["name"], torch.Size(fields["offsets"]), fields["index"])
    info = _StorageInfo(relative_path=fields["file"], offset=fields["start"], length=fields["length"])
    return WriteResult(index=index, size_in_bytes=fields["bytes"], storage_data=info)


def _replace(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)
