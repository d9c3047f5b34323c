"""Which folders and bytes are a checkpoint: finding it, its manifest, the checks against that. No torch, no ranks.

Any changed byte of any file is found, the manifest's own included: it has one spelling and ends with a checksum of itself.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the folder's layout. A reader refuses any other."""

MANIFEST = "manifest.json"
MARK = ".neva-staging"
"""File by which neva knows a folder that it is making: no other is gone on with, or removed.

It goes last, when the folder has its name: a kill just before leaves it in a folder that is whole.
"""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a disk, or a file, that may not grow."""
STEP = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, trusted or matched to a model; the message names the path and the way out."""


@dataclass(frozen=True, kw_only=True)
class File:
    """What the manifest says of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a checkpoint, by path relative to its folder."""

    step: int
    files: dict[str, File]
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Size of the checkpoint without its manifest."""
        return sum(file.bytes for file in self.files.values())


def find(path: Path) -> Path:
    """The `step_N` folder that `path` means: itself, or of a run or its `checkpoints` folder the one that `latest` names.

    Without a usable `latest` (a kill can come between the rename and the symlink) it is the published one of the highest step.
    Nothing is read or verified. Raises CheckpointError that says what was expected and what is there.
    """
    path = Path(path)
    if path.is_dir() and ((path / MANIFEST).exists() or STEP.fullmatch(path.name)):
        return path
    for folder in (path / "checkpoints", path):
        latest = folder / "latest"
        if latest.is_dir():
            return folder / os.readlink(latest) if latest.is_symlink() else latest
        if steps := published(folder):
            return steps[0]
    expected = "Expected a step_N folder that holds manifest.json, or a run folder with checkpoints/step_N in it."
    if not path.exists():
        raise CheckpointError(f"No checkpoint at {path}: there is no such path. {expected}")
    if not path.is_dir():
        raise CheckpointError(f"No checkpoint at {path}: it is a file. {expected}")
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    names = sorted(entry.name for entry in inside.iterdir())
    found = f"{inside} holds {few(names)}" if names else f"{inside} is empty"
    advice = ""
    if "config.json" in names:
        advice = " This looks like a Hugging Face model: make a checkpoint of it with `neva import`."
    elif any(name.endswith(".tmp") for name in names):
        advice = " A .tmp folder is a save that was cut off; it cannot be used."
    raise CheckpointError(f"No checkpoint at {path}: {found}. {expected}{advice}")


def published(checkpoints: Path) -> list[Path]:
    """`step_N` folders, the highest step first."""
    folders = [path for path in checkpoints.glob("step_*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def listing(folder: Path) -> dict[str, int]:
    """Size of each file below a checkpoint's folder, without its manifest and a mark of its making.

    A link is refused: what it names can change.
    """
    sizes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise CheckpointError(f"{path} is a link or no plain file; a checkpoint holds copies. Put the file's content there.")
        if path.is_file() and name not in (MANIFEST, MARK):
            sizes[name] = path.stat().st_size
    return sizes


def digests(folder: Path, names: Iterable[str]) -> dict[str, File]:
    """Bytes and sha256 of files. hashlib releases the interpreter lock, so a few threads share the files."""

    def digest(name: str) -> File:
        with (folder / name).open("rb", buffering=0) as file:
            return File(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=file.tell())

    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def serialise(fields: dict[str, Any]) -> bytes:
    """The one spelling of a manifest. It ends with a checksum of itself: a changed byte breaks the spelling or the sum."""
    own = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps({**fields, "sha256": own}, indent=1, sort_keys=True).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so {folder} is not a complete checkpoint. {way_out(folder)}")
    raw = path.read_bytes()
    try:
        fields = json.loads(raw)
        del fields["sha256"]
        sound = serialise(fields) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        fields, sound = {}, False
    if not sound:
        raise CheckpointError(f"{path} is corrupt: it does not match its own checksum. {way_out(folder)}")
    if fields["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {fields['format']}; this version of neva reads {FORMAT}. Use the version that wrote it.")
    return Manifest(step=fields["step"], files={name: File(**file) for name, file in fields["files"].items()})


def check_listing(folder: Path) -> Manifest:
    """The manifest, after its files were found to be there, alone and of the right size."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {folder}.")
    manifest = read_manifest(folder)
    there = listing(folder)
    for name, file in manifest.files.items():
        if name not in there:
            raise CheckpointError(f"{folder / name} is missing. {way_out(folder)}")
        if there[name] != file.bytes:
            raise CheckpointError(f"{folder / name} is corrupt: it has {there[name]} bytes, the manifest says {file.bytes}. {way_out(folder)}")
    if extra := sorted(there.keys() - manifest.files.keys()):
        paths = few([str(folder / name) for name in extra])
        raise CheckpointError(f"{paths}: not in the manifest, so not part of the checkpoint. Move or delete what was added.")
    return manifest


def check_bytes(folder: Path, manifest: Manifest, rank: int, world: int) -> None:
    """Compare this rank's share of the files, dealt out by size."""
    loads, mine = [0] * world, []
    for name in sorted(manifest.files, key=lambda name: -manifest.files[name].bytes):
        least = loads.index(min(loads))
        loads[least] += manifest.files[name].bytes + 1
        if least == rank:
            mine.append(name)
    found = digests(folder, mine)
    if wrong := [str(folder / name) for name in mine if found[name] != manifest.files[name]]:
        raise CheckpointError(f"{few(wrong)}: corrupt, the checksum is not the manifest's. {way_out(folder)}")


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


# Words.


def few(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:8]) + (f"{separator}and {len(names) - 8} more" if len(names) > 8 else "")


def way_out(folder: Path) -> str:
    return f"Resume from an older checkpoint (--resume auto passes {folder.name} over), or bring back a sound copy of it."


def explain_reading(error: BaseException, *, folder: Path) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    where = getattr(error, "filename", None) or folder
    return f"{where} cannot be read ({type(error).__name__}: {error}). {way_out(folder)}"
