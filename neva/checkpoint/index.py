"""DCP's index, read without letting it run code: torch keeps it as a pickle, of which only its own classes are built here."""

import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from neva.checkpoint.foreign import leads_outside
from neva.checkpoint.manifest import CheckpointError, few

_DCP = "torch.distributed.checkpoint."
ALLOWED = {
    (_DCP + "metadata", "Metadata"), (_DCP + "metadata", "TensorStorageMetadata"), (_DCP + "metadata", "BytesStorageMetadata"),
    (_DCP + "metadata", "TensorProperties"), (_DCP + "metadata", "ChunkStorageMetadata"), (_DCP + "metadata", "MetadataIndex"),
    (_DCP + "metadata", "StorageMeta"), (_DCP + "metadata", "_MEM_FORMAT_ENCODING"), (_DCP + "filesystem", "_StorageInfo"),
    (_DCP + "filesystem", "_StoragePrefix"), ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib", "Path"),
}  # fmt: skip
"""What an index may name: DCP's records, sizes, layouts, paths. dtypes are attributes of torch."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format) or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class Reader(FileSystemReader):
    """DCP's reader of tensors alone, from an index that is checked.

    The index builds nothing else than an index, and names files of its own folder. Other records
    than tensors, which DCP would unpickle, are left out of it: `records` tells their names.
    """

    records: tuple[str, ...] = ()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. CheckpointError names what it would have run, and what is wrong with it."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} is refused: besides an index it would run code ({error}).") from None
        except Exception as error:  # a damaged pickle raises errors of a dozen types
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}).") from None
        try:
            tensors = _checked(path, metadata)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{path} is no index ({type(error).__name__}: {error}).",
            ) from None
        self.records = tuple(sorted(metadata.state_dict_metadata.keys() - tensors.keys()))
        metadata.state_dict_metadata = tensors
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _checked(path: Path, metadata: Metadata) -> dict[str, Any]:
    """The records of an index that are tensors.

    CheckpointError where it names files outside its folder, or tensors that its files cannot hold:
    DCP stores a tensor as its bytes, so sizes beyond those of the files are made up.
    """
    folder, described = path.parent, metadata.state_dict_metadata
    names = {info.relative_path for info in metadata.storage_data.values()}
    if outside := sorted(repr(name) for name in names if not _is_inside(folder, name)):
        raise CheckpointError(
            f"{path} is refused: it names files outside its folder: {few(outside)}.",
        )
    tensors: dict[str, Any] = {}
    for name, record in described.items():
        if isinstance(record, TensorStorageMetadata):
            tensors[name] = record
    there = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    sizes = []
    for record in tensors.values():
        sizes.append(record.properties.dtype.itemsize * math.prod(record.size))
    if any(size < 0 for size in sizes) or sum(sizes) > there:
        says = f"tensors of {sum(sizes):,} bytes, its files have {there:,}"
        raise CheckpointError(f"{path} is damaged: it speaks of {says}.")
    return tensors


def _is_inside(folder: Path, name: Any) -> bool:
    """Is this the name of a file in the folder, and no link out of it?"""
    plain = isinstance(name, str) and Path(name).name == name
    return plain and not ((folder / name).is_symlink() and leads_outside(folder / name))


class Tensors:
    """The tensors of a folder, whose index is read once: thousands of tensors make it large."""

    def __init__(self, folder: Path):
        self._reader = _Opened(folder)
        described: dict[str, Any] = self._reader.metadata.state_dict_metadata
        self.described: dict[str, Tensor] = {}
        """Each tensor by name, on the meta device."""
        for name, there in described.items():
            dtype = there.properties.dtype
            self.described[name] = torch.empty(there.size, dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """One tensor, in its dtype."""
        tensor = torch.empty_like(self.described[name], device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


class _Opened(Reader):
    """A reader that has read its index."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index again: DCP asks for it in each `load`."""
        return self.metadata


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, on the meta device."""
    return Tensors(folder).described


def read(folder: Path, name: str) -> Tensor:
    """One tensor of a folder, in its dtype. Of many, `Tensors` reads the index once."""
    return Tensors(folder).read(name)
