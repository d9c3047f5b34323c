"""Checkpoints on disk: written whole or not at all, refused when a single bit is wrong, loadable under any layout.

    run/checkpoints/latest -> step_20        relative symlink, replaced atomically
    run/checkpoints/step_20/neva.yaml        resolved config
                            tokenizer/       the tokenizer's files
                            source/          what an import kept for export: configs, spelling of names, tensors that are not computed
                            weights/         DCP: logical name -> tensor, without any parallel layout
                            training/        DCP: optimiser tensors, each rank's random state; state.json. Absent after an import
                            manifest.json    format, step, bytes and sha256 of each file, and a sha256 of itself; written last

A save writes `step_20.tmp`, syncs it and renames it: whatever has the name `step_20` was
complete. `step_N.tmp`, `step_N.old.tmp` and `latest.tmp` are leftovers of a process that was
killed; the next save removes them.

With a process group, `save`, `verify`, `newest_good`, `open_checkpoint`, `load_weights` and `load_training` are collective: every
rank calls them with the same folder, the work is shared out, and if one rank fails all of them raise. `find`, `load_config`
and `tokenizer_folder` are local.

Safety: DCP keeps its index as a pickle; `index.Reader` builds nothing of it but DCP's own records, so that a checkpoint cannot run code.
`verify` finds damage, it does not authenticate: a stranger can write a matching manifest.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor, distribute_tensor

from neva import config as tree
from neva.checkpoint.index import Reader
from neva.checkpoint.manifest import (
    FULL,
    MANIFEST,
    CheckpointError,
    File,
    Manifest,
    check_bytes,
    check_listing,
    digests,
    explain_reading,
    few,
    find,
    listing,
    published,
    serialise,
    step_of,
    sync,
    way_out,
)
from neva.checkpoint.stream import Writer
from neva.config import from_json, from_yaml
from neva.models.vit import VisionConfig
from neva.models.vlm import VOCABULARY, ProjectorConfig, VLMConfig, grown

LEFTOVER = re.compile(r"(step_\d+(\.old)?|latest)\.tmp")
"""What a save that was killed leaves in `checkpoints/`."""
OWN = re.compile(r"rank(\d+)/")
"""Prefix under which `training/` keeps what belongs to one rank."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run needs, besides weights, to go on as if it had never stopped."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Optimiser state under logical names: the same on every rank (DTensors), or each pipeline rank its part."""
    per_rank: dict[str, Tensor] = field(default_factory=dict)
    """What this rank alone owns, such as random states."""
    state: dict[str, Any] = field(default_factory=dict)
    """Schedule, step, data state, stage: the same on every rank; JSON must give it back equal (so lists, not tuples)."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What `load_training` returns beside the tensors that it filled."""

    state: dict[str, Any]
    skipped: tuple[str, ...]
    """`per_rank` names left as they were: the checkpoint has none of that shape for this rank (saved by fewer ranks)."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found and verified."""

    folder: Path
    manifest: Manifest
    config: dict[str, Any]


def save(
    run: Path,
    *,
    step: int,
    config: dict[str, Any],
    write_files: Callable[[Path], None],
    weights: dict[str, Tensor],
    training: Training | None,
    keep_last: int,
    keep_every: int,
) -> Path:
    """Write `run/checkpoints/step_N`, publish it, point `latest` at it and remove checkpoints that need not be kept.

    `write_files` is called on rank 0 with the folder, and writes `tokenizer/` and `source/` into it. Kept are the newest `keep_last`
    whole checkpoints (0: all), those
    whose step is a multiple of `keep_every` (0: none) and always the one just written. A published checkpoint of the same step
    is never overwritten: it is renamed `step_N.corrupt`, or `step_N.replaced` if it is sound, with a warning.

    Raises CheckpointError on every rank if any of them fails; then the partial folder is gone and older ones are untouched.
    """
    checkpoints = Path(run) / "checkpoints"
    temporary = checkpoints / f"step_{step}.tmp"
    rank, _ = _place()
    owned = {f"rank{rank}/{name}": tensor for name, tensor in training.per_rank.items()} if training else {}
    tensors = {**training.tensors, **owned} if training else {}
    explain = partial(_explain, folder=temporary, weights=weights, training=tensors)
    try:
        _together(lambda: _check_arguments(step, keep_last, keep_every, weights, training), explain=explain)
        _together(lambda: _begin(temporary, config, write_files, training), explain=explain, first_only=True)
        _together(lambda: _write_tensors(temporary / "weights", weights), explain=explain)
        if training is not None:
            _together(lambda: _write_tensors(temporary / "training", tensors), explain=explain)
        shares = _together(lambda: digests(temporary, _written_here(temporary)), explain=explain)
        files = {name: file for share in shares for name, file in share.items()}
        folder = _together(lambda: _publish(temporary, step, files), explain=explain, first_only=True)[0]
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank == 0:
        _retain(checkpoints, newest=folder, keep_last=keep_last, keep_every=keep_every)
    return folder


def verify(step_folder: Path) -> Manifest:
    """Read every byte of a checkpoint and compare it to the manifest: all files there, no others, sizes and sha256 equal.

    Collective. Raises CheckpointError that names the files that are wrong and what to do.
    """
    folder = Path(step_folder)
    explain = partial(explain_reading, folder=folder)
    manifest = _together(lambda: check_listing(folder), explain=explain, first_only=True)[0]
    _together(lambda: check_bytes(folder, manifest, *_place()), explain=explain)
    return manifest


def newest_good(run: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of `run` that verifies, for `--resume auto`; None if none was ever published.

    Collective; needs no second `verify`. `warn` gets one message per corrupt checkpoint that was passed over (on every rank).
    Raises CheckpointError if there are checkpoints and all are corrupt: a run never silently starts from nothing.
    """
    checkpoints = Path(run) / "checkpoints"
    # Rank 0 lists: ranks that saw different folders would verify different ones and wait for each other for ever.
    explain = partial(explain_reading, folder=checkpoints)
    steps = _together(lambda: published(checkpoints), explain=explain, first_only=True)[0]
    faults = []
    for number, folder in enumerate(steps):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            faults.append(str(error))
            older = steps[number + 1].name if number + 1 < len(steps) else "nothing older"
            warn(f"CORRUPT CHECKPOINT {folder} IS PASSED OVER; trying {older}, and its training is repeated. {error}")
    if faults:
        raise CheckpointError(
            f"All {len(faults)} checkpoints in {checkpoints} are corrupt. Bring back a sound copy of one, or start again in a "
            "new out folder.\n" + "\n".join(faults)
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint and verify it once. Collective. Raises CheckpointError as `find` and `verify` do."""
    explain = partial(explain_reading, folder=Path(path))
    folder = _together(lambda: find(path), explain=explain, first_only=True)[0]
    return Checkpoint(folder=folder, manifest=verify(folder), config=load_config(folder))


def load_config(step_folder: Path) -> dict[str, Any]:
    """The resolved config that the checkpoint was saved with, as a plain dict. CheckpointError
    if it cannot be read."""
    path = Path(step_folder) / "neva.yaml"
    try:
        described = from_yaml(path.read_bytes())
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(described, dict):
        raise CheckpointError(f"{path} holds no keys of a config.")
    return described


def model_of(
    step_folder: Path,
    described: Mapping[str, Any],
) -> VLMConfig | VisionConfig | ProjectorConfig:
    """What a checkpoint holds by its config: a model, an encoder or a projector by itself.

    CheckpointError where the config names none.
    """
    kinds: dict[str, Any] = {"model": VLMConfig, "vision": VisionConfig, "projector": ProjectorConfig}
    for name, kind in kinds.items():
        if isinstance(described.get(name), Mapping):
            return tree.from_dict(kind, described[name])
    path = Path(step_folder) / "neva.yaml"
    raise CheckpointError(f"{path} describes no model (it has none of the keys {', '.join(kinds)}). {way_out(path.parent)}")


def tokenizer_folder(step_folder: Path) -> Path:
    """The folder of the checkpoint's tokenizer files."""
    return Path(step_folder) / "tokenizer"


def load_weights(
    step_folder: Path,
    *,
    into: dict[str, Tensor],
    only: Callable[[str], bool] | None = None,
    grow: bool = False,
) -> None:
    """Fill the tensors and DTensors of `into`, in place, from a verified checkpoint saved under any layout.

    A floating dtype that differs is converted as `Tensor.copy_` does (rounded to nearest even). `only` leaves out, on both
    sides, the names for which it is false. With `grow` the checkpoint's vocabulary may be smaller:
    the rows of new tokens are the mean of the others.
    Collective; pipeline ranks may each pass their part.
    Raises CheckpointError naming every missing, unexpected or differently shaped tensor; then nothing was changed.
    """
    chosen = {name: tensor for name, tensor in into.items() if only is None or only(name)}
    folder = Path(step_folder) / "weights"
    stored = {name: found for name, found in _stored(folder).items() if only is None or only(name)}
    small: dict[str, Tensor] = {}
    for name in VOCABULARY if grow else ():
        if name in chosen and name in stored and stored[name].size[0] < chosen[name].shape[0]:
            small[name] = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
    read = {**chosen, **small}
    _match(stored, read, folder)
    _read_tensors(folder, read)
    for name, tensor in small.items():
        _copy(chosen[name], grown(tensor, chosen[name].shape[0]))


def _copy(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor that every rank holds; of a sharded target each rank its part."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            there = whole.to(target.device, target.dtype)
            part = distribute_tensor(
                there,
                target.device_mesh,
                target.placements,
                src_data_rank=None,
            )
            target.copy_(part)
        else:
            target.copy_(whole)


def load_training(step_folder: Path, *, into: Training) -> Resumed:
    """Fill `into`'s tensors in place from a verified checkpoint and return its state; `into.state` is not used.

    Collective. `tensors` are matched as strictly as weights. `per_rank` is filled where the checkpoint has it for this rank.
    Raises CheckpointError for a mismatch, and for a checkpoint without training state.
    """
    state = load_state(step_folder)
    folder = Path(step_folder) / "training"
    stored = _stored(folder)
    rank, _ = _place()
    owned = {f"rank{rank}/{name}": tensor for name, tensor in into.per_rank.items()}
    kinds = {name: (there.size, there.properties.dtype) for name, there in stored.items()}
    filled = {name: tensor for name, tensor in owned.items() if kinds.get(name) == (tensor.shape, tensor.dtype)}
    _match({name: stored[name] for name in stored if not OWN.match(name)}, into.tensors, folder)
    _read_tensors(folder, {**into.tensors, **filled})
    return Resumed(state=state, skipped=tuple(OWN.sub("", name) for name in owned if name not in filled))


def load_state(step_folder: Path) -> dict[str, Any]:
    """What `Training.state` was when the checkpoint was saved. Local. CheckpointError for one
    without training state, or whose state cannot be read."""
    folder = Path(step_folder) / "training"
    if not folder.is_dir():
        raise CheckpointError(
            f"{step_folder} holds weights but no training state (it was imported), so a run cannot be resumed from it. "
            f"Start a new run from its weights: init.model={step_folder}"
        )
    try:
        return from_json((folder / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(explain_reading(error, folder=folder)) from None


# Ranks. Without a process group this is one rank and no communication.


def _place() -> tuple[int, int]:
    """Rank and number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _together(work: Callable[[], Any], *, explain: Callable[[BaseException], str], first_only: bool = False) -> list[Any]:
    """Run `work` on every rank, or on rank 0 alone, and give each rank all results; if one fails, all raise CheckpointError.

    A rank that raised by itself would leave the others waiting in the next collective. Text crosses, not exceptions: those may
    not pickle, and lose their cause when they do.
    """
    rank, world = _place()
    result, failure, cause = None, "", None
    try:
        result = work() if rank == 0 or not first_only else None
    except Exception as error:
        failure, cause = explain(error), error
    reports = [(result, failure)] * world
    if dist.is_initialized():
        dist.all_gather_object(reports, (result, failure))
    failures = {text: number for number, (_, text) in reversed(list(enumerate(reports))) if text}
    if failures:
        told = [text if world == 1 else f"Rank {number}: {text}" for text, number in failures.items()]
        raise CheckpointError("\n".join(reversed(told[-3:]))) from cause
    return [value for value, _ in reports]


# Writing.


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Silence DCP's warning about one process, and undo its bundling of errors.

    DCP gives every rank the errors of all. Only the rank that failed raises here; `_together` stops the others.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:  # a BaseException, so `except Exception` does not see it
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        for failure in failures.values():
            if not isinstance(failure, Exception):
                raise failure from None  # Ctrl-C on one rank: `_together` would not pass it on, so all ranks raise it
        if _place()[0] in failures:
            raise failures[_place()[0]] from None


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    # One thread: DCP's further threads lose their exceptions, and the tensors of a failed one would be missing.
    with _dcp_errors():
        save_tensors(dict(tensors), storage_writer=Writer(folder, thread_count=1), no_dist=not dist.is_initialized())
    sync(folder)


def _check_arguments(step: int, keep_last: int, keep_every: int, weights: dict[str, Tensor], training: Training | None) -> None:
    for name, number in (("step", step), ("keep_last", keep_last), ("keep_every", keep_every)):
        if number < 0:
            raise CheckpointError(f"{name} is {number}; it must be 0 or more.")
    parts = (weights, training.tensors, training.per_rank) if training else (weights,)
    for name, tensor in (item for part in parts for item in part.items()):
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            kind = "on the meta device, without data" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{name!r} is {kind}; a checkpoint stores tensors with data. Other values belong in `state`.")
        if OWN.match(name):
            raise CheckpointError(f"{name!r}: names that begin with rankN/ are kept for `per_rank`. Rename the tensor.")
    if training is not None and json.loads(json.dumps(training.state)) != training.state:
        raise CheckpointError("Training.state is not what JSON gives back: use lists, not tuples; string keys; no NaN.")


def _begin(temporary: Path, config: dict[str, Any], write_files: Callable[[Path], None], training: Training | None) -> None:
    """Remove what killed saves left behind and write all but the tensors."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob("*.tmp"):
        if not LEFTOVER.fullmatch(leftover.name):
            continue  # the user's
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    temporary.mkdir(parents=True)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (temporary / "neva.yaml").write_text(text, encoding="utf-8")
    write_files(temporary)
    if training is not None:
        (temporary / "training").mkdir()
        (temporary / "training" / "state.json").write_text(json.dumps(training.state, indent=1), encoding="utf-8")


def _written_here(folder: Path) -> list[str]:
    """The files that this rank wrote and so has cached: its own DCP files, and on rank 0 the rest."""
    rank, world = _place()
    owners = ((name, re.search(r"/__(\d+)_\d+\.distcp$", name)) for name in listing(folder))
    return [name for name, owner in owners if (int(owner[1]) % world if owner else 0) == rank]


def _publish(temporary: Path, step: int, files: dict[str, File]) -> Path:
    """Write the manifest, make everything durable, give the folder its name, and point `latest` at it."""
    if {name: file.bytes for name, file in files.items()} != listing(temporary):
        raise CheckpointError(f"Ranks see different files in {temporary}. All must write to one shared file system: set out= to a folder on it.")
    manifest = Manifest(step=step, files=dict(sorted(files.items())))
    (temporary / MANIFEST).write_bytes(serialise(asdict(manifest)))
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    folder = temporary.with_suffix("")
    moved = _move_aside(folder) if folder.is_symlink() or folder.exists() else ""
    temporary.rename(folder)
    sync(folder.parent)
    # A symlink cannot be changed in place: make a new one and rename it over the old.
    link = folder.parent / "latest.tmp"
    link.symlink_to(folder.name)
    link.replace(folder.parent / "latest")
    sync(folder.parent)
    if moved:
        warnings.warn(moved, stacklevel=2)
    return folder


def _move_aside(folder: Path) -> str:
    """Rename a published checkpoint that is in the way, and say so. Nothing is deleted."""
    try:
        check_bytes(folder, check_listing(folder), 0, 1)
        ending = "replaced"
    except (CheckpointError, OSError):
        ending = "corrupt"
    names = (folder.with_name(f"{folder.name}.{ending}" + (f"-{n}" if n > 1 else "")) for n in range(1, 10_000))
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    state = "a sound checkpoint" if ending == "replaced" else "a corrupt checkpoint"
    return f"{folder} was {state}; it is now {aside.name}. Delete it when you no longer need it."


def _retain(checkpoints: Path, *, newest: Path, keep_last: int, keep_every: int) -> None:
    """Delete what need not be kept. A checkpoint with a missing or cut file does not count as one of the last, and stays.

    Sizes are compared, not checksums: reading all kept checkpoints again at each save would cost more than the save.
    """
    if keep_last == 0:
        return
    whole = [folder for folder in published(checkpoints) if folder == newest or _looks_whole(folder)]
    for folder in whole[keep_last:]:
        if folder == newest or (keep_every and step_of(folder) % keep_every == 0):
            continue
        # Under its own name a half deleted folder would be a corrupt checkpoint.
        doomed = folder.with_name(folder.name + ".old.tmp")
        try:
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"Old checkpoint {folder} could not be removed: {error}. Delete it by hand.", stacklevel=2)


def set_newer_aside(step_folder: Path) -> list[str]:
    """Rename the run's checkpoints of later steps (`.replaced` or `.corrupt`): a run that goes on from this one makes them anew.

    Local. Gives a message for each.
    """
    folder = Path(step_folder)
    return [_move_aside(newer) for newer in published(folder.parent) if step_of(newer) > step_of(folder)]


# Reading and checking.


def _looks_whole(folder: Path) -> bool:
    try:
        return bool(check_listing(folder))
    except (CheckpointError, OSError):
        return False


def _stored(folder: Path) -> dict[str, Any]:
    """DCP's metadata by tensor name."""
    found: dict[str, Any] = {}
    reader = Reader(folder)

    def read() -> None:
        found.update(reader.read_metadata().state_dict_metadata)
        if reader.records:
            held = few(list(reader.records))
            says = f"besides tensors it holds {held}, whose reading would run code"
            raise CheckpointError(
                f"{folder / '.metadata'} is refused: {says}. neva writes no such checkpoint.",
            )

    _together(read, explain=partial(explain_reading, folder=folder))
    return found


def _match(stored: dict[str, Any], targets: dict[str, Tensor], folder: Path) -> None:
    """Raise, on all ranks, unless names, shapes and kinds of dtype agree and every stored tensor has a taker on some rank."""

    def unused() -> set[str]:
        faults = []
        for name, tensor in targets.items():
            if name not in stored:
                near = get_close_matches(name, stored, n=1)
                faults.append(f"{name!r} is missing in it" + (f" (it has {near[0]!r})" if near else ""))
            elif tensor.is_meta:
                faults.append(f"{name!r} is on the meta device: materialise the model first (to_empty)")
            elif tuple(stored[name].size) != tuple(tensor.shape):
                faults.append(f"{name!r} has shape {list(stored[name].size)} in it, {list(tensor.shape)} in the model")
            elif (kind := stored[name].properties.dtype) != tensor.dtype and not (kind.is_floating_point and tensor.is_floating_point()):
                faults.append(f"{name!r} is {kind} in it, {tensor.dtype} in the model")
        if faults:
            raise CheckpointError(f"{folder} does not fit the model: {few(faults, '; ')}. {_fits(folder)}")
        return stored.keys() - targets.keys()

    shares = _together(unused, explain=str)
    if left := sorted(set.intersection(*shares)):
        raise CheckpointError(f"{folder} does not fit the model: {few(left)}: unexpected, the model has none. {_fits(folder)}")


def _read_tensors(folder: Path, targets: dict[str, Tensor]) -> None:
    def read() -> None:
        with _dcp_errors():
            load_tensors(dict(targets), storage_reader=Reader(folder), no_dist=not dist.is_initialized())

    _together(read, explain=partial(explain_reading, folder=folder))


# Words.


def _fits(folder: Path) -> str:
    return f"Build the model from the checkpoint's own config, {folder.parent / 'neva.yaml'}."


def _explain(error: BaseException, *, folder: Path, weights: dict[str, Tensor], training: dict[str, Tensor]) -> str:
    """What went wrong in a save, and what to do. Needed bytes count what this rank knows of, whole tensors, not its shards."""
    if isinstance(error, CheckpointError):
        return str(error)
    kept = "Older checkpoints are untouched."
    if isinstance(error, OSError) and error.errno in FULL:
        needed = sum(tensor.numel() * tensor.element_size() for part in (weights, training) for tensor in part.values())
        partly = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free + partly
        return (
            f"Could not save {folder}: {error.strerror}. It needs {needed:,} bytes or more; {free:,} are free with the partial "
            f"save removed. Free some space, lower checkpoint.keep_last, or set out= to a larger disk. {kept}"
        )
    if isinstance(error, OSError):
        return f"Could not save {folder}: {error.strerror} ({error.filename or folder}). Make it writable, or set out= to a folder that is. {kept}"
    return f"Could not save {folder}: {type(error).__name__}: {error}. {kept}"
