"""What lies at a path, by its looks: a model to import, or something that is only taken for one, and then what to do with it."""

import os
from collections.abc import Collection
from pathlib import Path

from neva.checkpoint.manifest import MANIFEST, CheckpointError, few, published
from neva.data.tokenizer import BESIDE, FILES, PAIRS

LORA = "adapter_config.json"
BESIDE_LORA = "non_lora_trainables.bin"
"""What LLaVA trained beside the adapter: the projector, which peft does not know."""
PROJECTOR = "mm_projector.bin"
"""The projector that LLaVA's first stage leaves."""
FILES_OF_TENSORS = (".bin", ".pt", ".pth", ".safetensors")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


def is_projector(path: Path) -> bool:
    """Is this a projector by itself, a file or a folder with LLaVA's and no whole model?"""
    if path.is_file():
        return path.suffix in FILES_OF_TENSORS
    return (path / PROJECTOR).is_file() and not (path / LORA).is_file() and not _whole(path)


def _whole(folder: Path) -> list[Path]:
    """The files of a folder that are weights of a model, of which an adapter is a part alone."""
    return [file for pattern in WEIGHTS for file in folder.glob(pattern) if not file.name.startswith("adapter_model")]


def is_foreign(path: Path) -> bool:
    """Is this for an import to read, or to refuse, and no checkpoint of ours?"""
    if is_projector(path):
        return True
    looks = any((path / name).is_file() for name in ("config.json", LORA)) or any(path.glob("*.gguf"))
    return looks and not (path / MANIFEST).is_file()


READ = (
    "config.json", "preprocessor_config.json", "processor_config.json",
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "model_config.yaml",
    *FILES, *PAIRS.values(), *BESIDE,
)  # fmt: skip
"""Texts of a folder that an import reads, and so puts into the checkpoint."""


def leads_outside(file: Path) -> bool:
    """Is it a link out of its folder? A Hub cache's links into its own blobs/ are none."""
    try:
        real, folder = file.resolve(), file.parent.resolve()
    except RuntimeError:  # before Python 3.13: a link that leads to itself
        return True
    cache = next((path.parent for path in folder.parents if path.name == "snapshots"), None)
    own = real.is_relative_to(folder)
    return not (own or (cache is not None and real.is_relative_to(cache / "blobs")))


def check_links(*files: Path) -> None:
    """CheckpointError for a text that is a link out of its folder: it would be
    copied and passed on."""
    for file in files:
        if file.is_symlink() and leads_outside(file):
            leads = f"{file} is a link that leads out of its folder, to {os.path.realpath(file)}"
            raise CheckpointError(
                f"{leads}: if it is meant, put a copy of the file in its place (cp -L).",
            )


def check_folder(folder: Path) -> None:
    """CheckpointError, with what to do, for what is no folder of Hugging Face's making with a whole model in it."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise CheckpointError(f"{folder} {what}: give the folder that holds config.json and the weights, or hf:org/name.")
    described = (folder / "config.json").is_file()
    if not described and ((folder / MANIFEST).is_file() or (folder / "checkpoints").is_dir() or published(folder)):
        raise CheckpointError(f"{folder} is a checkpoint of neva already: give it to train (init=PATH), generate or export as it is.")
    if not _whole(folder) and (advice := no_model({path.name for path in folder.iterdir()})):
        raise CheckpointError(f"{folder} {advice}")
    check_links(*(folder / name for name in READ))
    if not described:
        there = few(sorted(path.name for path in folder.iterdir()))
        raise CheckpointError(
            f"{folder} has no config.json, it {f'holds {there}' if there else 'is empty'}: give a Hugging Face folder with a model."
        )


def no_model(names: Collection[str]) -> str:
    """What the files of a folder without weights of a whole model are instead, and what to do;
    empty if they say nothing."""
    if BESIDE_LORA in names:
        held = f"holds a LoRA adapter of LLaVA's and the projector trained beside it ({BESIDE_LORA})"
        merge = "merge both into the base with LLaVA's own scripts/merge_lora_weights.py"
        return f"{held}, not a model: {merge} (peft alone would lose the projector), and import the result."
    if LORA in names:
        return (
            f"holds a LoRA adapter ({LORA}), not a model: merge it into its base with peft "
            f"(merge_and_unload, then save_pretrained) and import the result."
        )
    if any(name.endswith(".gguf") for name in names):
        return "holds GGUF files, which neva does not read: import the folder of safetensors that they were made from."
    return ""
