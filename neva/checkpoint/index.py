"""DCP's index, read without letting it run code: torch keeps it as a pickle, of which only its own classes are built here."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from neva.checkpoint.manifest import CheckpointError

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
    """DCP's reader, but its index builds nothing else than an index. CheckpointError names what it would have run."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} is refused: besides an index it would run code ({error}).") from None
        except (EOFError, AttributeError, IndexError, ImportError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}).") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, on the meta device."""
    described = Reader(folder).read_metadata().state_dict_metadata
    tensors = {name: there for name, there in described.items() if isinstance(there, TensorStorageMetadata)}
    return {name: torch.empty(there.size, dtype=there.properties.dtype, device="meta") for name, there in tensors.items()}


def read(folder: Path, name: str) -> Tensor:
    """One tensor of a folder, in its dtype."""
    tensor = torch.empty_like(stored(folder)[name], device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load({name: tensor}, storage_reader=Reader(folder), no_dist=True)
    return tensor
