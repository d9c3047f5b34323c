"""Weights written to a checkpoint some at a time, so that memory never holds more, and a write that was cut off goes on where it ended.

The folder is one that `store.load_weights` reads: DCP as if each unit had been a rank. What DCP says of a finished unit is kept beside it
until the last one is done.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from neva.checkpoint.manifest import FULL, MARK, CheckpointError, sync

UNIT = 2**30
"""Bytes of a unit; a larger tensor is one by itself."""
WHOLE = "whole\n"
"""How the mark of a folder begins that lacks nothing but its name."""
EVERY = 5.0
"""Seconds between two lines on how far a conversion is."""


class DiskError(CheckpointError):
    """A disk is full, or may not be written to: what is there stays, to go on from."""


class Staging:
    """The folder that becomes `out` when it is whole, or that `out` is made from.

    A context: an error that refuses what is made (a ValueError) removes the folder; what a kill or
    a full disk leaves stays, to go on from. Of two processes that make the same one, one is
    refused.
    """

    def __init__(self, out: Path, ending: str = ".tmp"):
        """ValueError if `out` is there already, or in the folder's place something that neva did
        not make."""
        _check_free(out)
        self.out = out
        self.folder = out.with_name(out.name + ending)
        self._lock: TextIO | None = None
        self._needs = 0
        _check_own(self.folder)

    def begin(self, of: str, *, needs: int = 0) -> None:
        """Make the folder, or go on with what a cut-off write of the same (`of`) left there.

        What one of something else left is removed. `needs`: bytes that will be written, for
        errors. ValueError for a folder that neva did not make, or is making in another process.
        """
        self._needs = needs
        _check_own(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / MARK
        self._lock = _locked(mark)
        held = mark.read_text(encoding="utf-8")
        if held.removeprefix(WHOLE) == of:
            return
        self._empty()
        mark.write_text(of, encoding="utf-8")

    def remove(self) -> None:
        """Remove the folder if `begin` made it; its mark last, so that a kill leaves it ours."""
        if self._lock is None:
            return
        self._empty()
        shutil.rmtree(self.folder)
        self._release()

    def finish(self) -> Path:
        """Make the folder durable, and give it its name. ValueError if that was taken meanwhile."""
        for path in [*self.folder.rglob("*"), self.folder]:
            sync(path)
        mark = self.folder / MARK
        mark.write_text(WHOLE + mark.read_text(encoding="utf-8"), encoding="utf-8")
        _check_free(self.out)
        # marked: after a kill here, the same command still knows the folder as its own
        self.folder.rename(self.out)
        (self.out / MARK).unlink()
        sync(self.out)
        sync(self.out.parent)
        self._release()
        return self.out

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        reason = _os_error(error)
        if isinstance(error, ValueError) and not isinstance(error, DiskError):
            self.remove()
        self._release()
        if reason is not None and self._concerns(reason):
            raise DiskError(self._explained(reason)) from None

    def _empty(self) -> None:
        """Remove all but the mark."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _concerns(self, error: OSError) -> bool:
        """Is it an error of writing here, and not of reading elsewhere?"""
        if error.errno in FULL:
            return True
        if not error.filename:
            return False
        path = Path(os.fsdecode(error.filename))
        return path.is_relative_to(self.folder) or path in (self.out, *self.folder.parents)

    def _explained(self, error: OSError) -> str:
        place = Path(os.fsdecode(error.filename)) if error.filename else self.folder
        what = f"Could not write {place}: {error.strerror}"
        if error.errno not in FULL:
            fix = "make it writable, or name another folder with --out"
            return f"{what}. Please {fix}; imports without --out go to NEVA_CACHE."
        there = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(there).free
        needs = f" {self.folder} needs {self._needs:,} bytes in all," if self._needs else ""
        fix = "Free some space, and the same command goes on; or name another disk's folder with --out"
        return f"{what}.{needs} {free:,} are free. {fix}."


def _check_free(out: Path) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    fix = "name another folder with --out, or remove it"
    mark = out / MARK
    if mark.is_file() and mark.read_text(encoding="utf-8").startswith(WHOLE):
        mark.unlink()
        raise ValueError(f"{out} is there, and whole: what made it was killed when all was done. Use it; else {fix}")
    raise ValueError(f"{out} exists already; {fix}")


def _check_own(folder: Path) -> None:
    if not (folder.is_symlink() or folder.exists()):
        return
    real = folder.is_dir() and not folder.is_symlink()
    if not real or not ((folder / MARK).is_file() or not any(folder.iterdir())):
        fix = "rename or remove it, or name another folder with --out"
        raise ValueError(f"{folder} is in the way, and neva did not make it: {fix}")


def _locked(mark: Path) -> TextIO:
    """The mark of a folder, open and locked as long as it is open; it ends with the process.

    ValueError if another process has it.
    """
    lock = mark.open("a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the other may have given the folder its name, or removed it, since
        mine = mark.exists() and os.path.samestat(os.fstat(lock.fileno()), mark.stat())
    except OSError as error:
        mine = error.errno not in (errno.EAGAIN, errno.EACCES)  # others: no locks on this disk
    if mine:
        return lock
    lock.close()
    fix = "wait until it is done, or name another folder with --out"
    raise ValueError(f"{mark.parent} is being written by another neva: {fix}")


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system that a library's error hides; None if it is of no such."""
    if isinstance(error, SafetensorError) and (match := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    return error if isinstance(error, OSError) else None


class Progress:
    """Says how much of a conversion is written, where it takes long."""

    def __init__(self, total: int, say: Callable[[str], None]):
        """`total`: bytes in all."""
        self.total = total
        self._say = say
        self._done = 0
        self._said_bytes = 0
        self._said_at = time.monotonic()

    def __call__(self, size: int) -> None:
        """So many bytes more are written."""
        self._done += size
        seconds = time.monotonic() - self._said_at
        if seconds < EVERY:
            return
        rate = max(1.0, (self._done - self._said_bytes) / seconds)
        left = (self.total - self._done) / rate
        amount = f"{self._done / 2**30:.1f} of {self.total / 2**30:.1f} GiB"
        self._say(f"  {amount}, {rate / 2**20:,.0f} MiB/s, {left:,.0f} s left")
        self._said_bytes = self._done
        self._said_at = time.monotonic()


class Writer(FileSystemWriter):
    """DCP's writer, but a full disk is an OSError.

    torch reports `unexpected pos 704 vs 598` and hides the reason in a chain of causes, which is
    dropped when DCP pickles the error for the other ranks.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, OSError):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
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
    writer = Writer(folder, thread_count=1)
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


def _write_unit(writer: Writer, plan: SavePlan, real: dict[str, Tensor], described: Mapping[str, Tensor]) -> Sequence[WriteResult]:
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
