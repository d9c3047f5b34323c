"""A projector in a file of its own: LLaVA's `mm_projector.bin`, which its first stage leaves, and
our `--part projector` export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neva.checkpoint.foreign import PROJECTOR, check_links
from neva.checkpoint.manifest import CheckpointError, few
from neva.checkpoint.shards import open_shards, read_json
from neva.checkpoint.source import Source
from neva.models import hf
from neva.models.vlm import ProjectorConfig

WHOLE = "model.safetensors"
"""The file of our export."""


def read_projector(path: Path) -> Source:
    """A projector and its learned vectors, of a file or of the folder that holds it.

    CheckpointError for a file without one.
    """
    described: Mapping[str, Any] = {}
    file = path
    if path.is_dir():
        file = path / PROJECTOR if (path / PROJECTOR).is_file() else path / WHOLE
        if (path / "config.json").is_file():
            check_links(path / "config.json")
            described = read_json(path / "config.json")
    shards = open_shards(file.parent, files=(file.name,))
    numbered = hf.is_numbered(shards.entries)
    table = hf.one_spelling(hf.PROJECTOR_ALONE, numbered=numbered)
    spelled = hf.default_names(shards.entries, table)
    shapes = {}
    for default, name in spelled.items():
        shapes[hf.ours_of(default, table)] = shards.entries[name].shape
    model = _config(file, shapes, str(described.get("mm_projector_type") or ""))
    return Source(
        folder=path,
        kind="projector",
        format="projector",
        config=described,
        model=model,
        image=None,
        shards=shards,
        table=table,
        spelled=spelled,
    )


def _config(file: Path, shapes: Mapping[str, tuple[int, ...]], said: str) -> ProjectorConfig:
    """The projector that these tensors are of; config.json may say its name."""
    layers: dict[int, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.startswith("projector.") and name.endswith(".weight"):
            layers[int(name.split(".")[1])] = shape
    matrices = [number for number in sorted(layers) if len(layers[number]) == 2]
    if not matrices:
        wanted = "expected names such as model.mm_projector.0.weight"
        raise CheckpointError(f"{file} holds no projector: {wanted}, found {few(sorted(shapes)) or 'others'}.")
    first, last = layers[matrices[0]], layers[matrices[-1]]
    normed = 0 not in matrices
    biased = f"projector.{matrices[0]}.bias" in shapes
    if normed and not biased:
        name = "norm_linear" if len(matrices) == 1 else "norm_ffn_gelu"
    else:
        deep = f"mlp{len(matrices)}x_gelu"
        name = f"norm_{deep}" if normed else "linear" if len(matrices) == 1 else deep
    return ProjectorConfig(
        name=said or name,
        width=first[1],
        out=last[0],
        ffn=first[0],
        start_end="image_vectors" in shapes,
        newline="image_newline" in shapes,
    )
