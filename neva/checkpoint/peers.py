"""Tensors of transformers vision models that run as they are: names in files <-> names in memory, by transformers itself, which renames some."""

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from neva.checkpoint.manifest import CheckpointError, few
from neva.checkpoint.shards import Entry, Shards
from neva.models.hf_vision import make


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldShards(Shards):
    """Tensors in memory beside those of files."""

    files_of: Shards
    held: Mapping[str, Tensor] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        return self.held[name].clone() if name in self.held else self.files_of.read(name)


def in_memory(shards: Shards, described: Mapping[str, Any], prefix: str = "") -> Shards:
    """The same tensors, those of the encoder (whose names begin with `prefix`) under the names that transformers' model gives them.

    CheckpointError naming tensors that are missing or too many.
    """
    import transformers

    own = [name for name in shards.entries if name.startswith(prefix)]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(dict(described)))
        state = {name.removeprefix(prefix): shards.read(name).contiguous() for name in own}
        save_file(state, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(dict(described))  # for its errors
            model, info = transformers.AutoModel.from_pretrained(
                scratch,
                output_loading_info=True,
                dtype=shards.dtype,
                trust_remote_code=False,
            )
    if wrong := [f"{name!r} is missing" for name in info["missing_keys"]] + [f"{name!r} is unexpected" for name in info["unexpected_keys"]]:
        raise CheckpointError(f"{shards.entries[own[0]].file if own else 'the folder'}: {few(sorted(wrong), '; ')}.")
    held = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    file = shards.entries[own[0]].file
    entries = {name: entry for name, entry in shards.entries.items() if name not in own}
    entries |= {name: Entry(file=file, shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in held.items()}
    return HeldShards(entries=entries, files_of=shards, held=held)


def on_disk(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of transformers' model under the names that it writes to files."""
    model = make(dict(described))
    model.to(next(iter(tensors.values())).dtype).load_state_dict(dict(tensors), strict=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)  # type: ignore[operator]
        return {name: tensor for file in sorted(Path(scratch).glob("*.safetensors")) for name, tensor in load_file(file).items()}
