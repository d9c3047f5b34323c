"""Tensors of a Hugging Face folder, read one at a time from safetensors or torch shards, and refused where a file is not what it says.

Nothing in a folder is executed: torch files are unpickled with tensors and plain containers alone.
"""

import math
import pickle
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neva.checkpoint.manifest import CheckpointError, few
from neva.config import from_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Name of a dtype in a safetensors header -> torch's."""
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where a folder's weights are looked for, in transformers' order: the first there counts."""
SAFE = ".safetensors"
POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that Git leaves in place of a large file where LFS did not run."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str = ""
    """Its name in the file, where it is called otherwise here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """The tensors of some files by name."""

    entries: Mapping[str, Entry]
    _open: dict[Path, Any] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """A tensor, copied out of its file. CheckpointError if it holds a NaN or an infinity: such a file is damaged."""
        entry = self.entries[name]
        name = entry.stored or name
        if entry.file.suffix == ".safetensors":
            # Opened anew each time: an open file keeps every page in memory that was ever read from it.
            with _named(entry.file), safe_open(entry.file, framework="pt") as file:
                tensor = file.get_tensor(name).clone()
        else:
            if entry.file not in self._open:
                self._open.clear()
                self._open[entry.file] = load_torch(entry.file)
            tensor = self._open[entry.file][name].clone()
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{entry.file}: {name!r} holds values that are not finite; the file is damaged. Download it again.")
        return tensor

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in order of their names."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the bytes."""
        weights: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            weights[entry.dtype] = weights.get(entry.dtype, 0) + entry.dtype.itemsize * math.prod(entry.shape)
        return max(weights, key=lambda kind: weights[kind]) if weights else torch.float32


def open_shards(folder: Path, *, files: tuple[str, ...] = ()) -> Shards:
    """The tensors of a folder: those of the first of its `weight_sets`, or of the named `files`.

    CheckpointError with the file and the reason for a missing or damaged file, and for an index
    that is wrong.
    """
    if files:
        return Shards(entries=_merged([folder / name for name in files]))
    if sets := weight_sets(folder):
        first = folder / sets[0]
        return Shards(entries=_indexed(first) if first.suffix == ".json" else _merged([first]))
    there = few(sorted(path.name for path in folder.iterdir())) or "nothing"
    wanted = ", ".join(WEIGHTS)
    raise CheckpointError(f"{folder} holds no weights: expected one of {wanted}, found {there}.")


def weight_sets(folder: Path) -> list[str]:
    """The files, a model or an index each, that a folder's weights could be read from.

    transformers reads the first and does not look at the others. The file that config.json names
    as `transformers_weights` comes before all.
    """
    return _sets(folder, {path.name for path in folder.iterdir() if path.is_file()})


def weight_files(folder: Path, names: Collection[str]) -> list[str]:
    """The files of the first set among `names`, those of a repository whose texts, config.json and
    indices with them, lie in `folder` already; none if it holds no set."""
    sets = _sets(folder, names)
    if not sets or not sets[0].endswith(".json"):
        return sets[:1]
    return [sets[0], *_shards_of(folder / sets[0])[1]]


def _sets(folder: Path, names: Collection[str]) -> list[str]:
    found = [name for name in WEIGHTS if name in names]
    described = folder / "config.json"
    named = read_json(described).get("transformers_weights") if described.is_file() else None
    if not named:
        return found
    said = f"{described} says transformers_weights={named!r}"
    if Path(str(named)).name != named or not str(named).endswith((SAFE, SAFE + ".index.json")):
        legal = f"a {SAFE} file, or the {SAFE}.index.json of several, in the same folder"
        raise CheckpointError(f"{said}, which must be {legal}.")
    if named not in names:
        raise CheckpointError(f"{said}, which is not there. Download it.")
    return [named, *(name for name in found if name != named)]


def converted(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """A floating-point tensor in another dtype, if one is given; other numbers as they are.

    CheckpointError naming the tensor where a value is beyond what the dtype can hold.
    """
    if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not bool(made.isfinite().all()):
        kind = str(dtype).removeprefix("torch.")
        most = float(tensor.abs().max())
        raise CheckpointError(
            f"{name!r} has values up to {most:.3g}, but {kind} holds none over "
            f"{torch.finfo(dtype).max:.3g}: keep its dtype, or convert to bf16 or fp32."
        )
    return made


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError if the file is missing, damaged, or holds something else."""
    try:
        value = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(lfs_pointer(path) or f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object of names and values.")
    return value


def lfs_pointer(path: Path) -> str:
    """What to say of a file in whose place lies a Git-LFS pointer; empty for any other."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        if file.read(len(POINTER)) != POINTER:
            return ""
    return f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the file."


def load_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, mapped from disk where its format allows. CheckpointError for anything but tensors in plain containers."""
    with _named(path), warnings.catch_warnings():
        _check_packed(path)
        warnings.simplefilter("ignore")  # of odd pickles, which are read or refused
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # written by torch before 1.6
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} does not hold a dict of tensors.")
    _check_held(path, loaded)
    return loaded


def _check_packed(path: Path) -> None:
    """CheckpointError for a torch file with compressed records: torch writes none, and they
    may unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
            raise CheckpointError(
                f"{path} is refused: its records are compressed, which torch writes none of.",
            )


SHARED = 4
"""How many times the bytes of a torch file its tensors may have together: some, as
tied ones, share theirs."""


def _check_held(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError for tensors that a torch file does not hold: a few bytes, read again and
    again, would fill any memory and disk."""
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name!r} is no plain tensor with data (it is sparse, quantized or on the meta device).")
        size = tensor.numel() * tensor.element_size()
        total += size
        if size > tensor.untyped_storage().nbytes() or total > SHARED * path.stat().st_size:
            raise CheckpointError(f"{path} is refused: {name!r} has {size:,} bytes, of which the file does not hold as many.")


def _shards_of(index: Path) -> tuple[dict[str, Any], list[str]]:
    """What an index lists: the file of each tensor, and the files."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no weight_map; it is damaged.")
    names = sorted({str(name) for name in listed.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names files outside its folder: {few(outside)}.")
    return listed, names


def _indexed(index: Path) -> dict[str, Entry]:
    listed, names = _shards_of(index)
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index} lists files that are not there: {few(missing)}. Download them.")
    found = _merged([index.parent / name for name in names])
    if wrong := sorted(name for name, file in listed.items() if name not in found or found[name].file.name != file):
        where = [f"{name!r} in {listed[name]}" for name in wrong]
        raise CheckpointError(f"{index} is wrong: it lists {few(where)}, which is not there. Download the index and the files again.")
    if extra := sorted(found.keys() - listed.keys()):
        raise CheckpointError(f"{index} is wrong: its files also hold {few(extra)}. Download the index and the files again.")
    return found


def _merged(files: list[Path]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in _entries(file):
            if name in found:
                raise CheckpointError(f"{name!r} stands in {found[name].file} and in {file}: keep one.")
            found[name] = entry
    return found


def _entries(file: Path) -> Iterator[tuple[str, Entry]]:
    if file.suffix == ".safetensors":
        with _named(file), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dict
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise CheckpointError(f"{file}: {name!r} has the dtype {part.get_dtype()}, which neva does not read.")
                yield name, Entry(file=file, shape=tuple(part.get_shape()), dtype=DTYPES[part.get_dtype()])
    else:
        for name, tensor in load_torch(file).items():
            yield name, Entry(file=file, shape=tuple(tensor.shape), dtype=tensor.dtype)


class _named:
    """Turns what a library raises about a file into a CheckpointError that names the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and (pointer := lfs_pointer(self.path)):
            raise CheckpointError(pointer) from None
        if isinstance(error, pickle.UnpicklingError):
            reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error).splitlines()[0])
            raise CheckpointError(f"{self.path} is refused: besides tensors it would run code ({reason.strip()}).") from None
        if isinstance(error, SafetensorError | RuntimeError | EOFError | OSError | ValueError | KeyError) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"{self.path} cannot be read ({type(error).__name__}: {error}): it is damaged or cut off. Download it again."
            ) from None
