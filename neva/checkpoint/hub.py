"""One model of the Hugging Face Hub in its cache: the texts of its top folder, and one set of its
weights.

A repository may hold its weights two or three times: as safetensors, as torch files, and in folders
of other programs. What transformers would read is downloaded, and nothing else.
"""

from functools import cache
from glob import escape
from pathlib import Path

from neva.checkpoint.foreign import PROJECTOR, no_model
from neva.checkpoint.manifest import few
from neva.checkpoint.shards import weight_files

TEXTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.bpe")
"""Config, processor, tokenizer and indices; by their endings."""
BELOW = "*/*"
"""Files of folders in the repository, of which none is read."""


@cache
def download(name: str) -> Path:
    """The folder in the Hub's cache of `org/name` or `org/name@revision`, its files there.

    Of one process all calls get the same commit. Without a network it is what the cache holds.
    ValueError with the reason and what to do.
    """
    try:
        return _download(name)
    except Exception as error:  # the Hub's library and that of its network raise many
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "check the name and the network, or give a local folder"
        raise ValueError(f"hf:{name} could not be fetched ({reason}): {fix}") from None


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    repository, at, revision = name.partition("@")
    if at and not revision:
        raise ValueError("there is no revision behind the @")
    texts = [*TEXTS]
    first = snapshot_download(repository, revision=revision or None, allow_patterns=texts, ignore_patterns=[BELOW])
    folder = Path(first)
    try:
        listed = HfApi().model_info(repository, revision=folder.name).siblings or []
    except Exception:
        # the network may be gone, and the cache may hold all that is needed
        there = {path.name for path in folder.iterdir()}
        kept = weight_files(folder, there) or ([PROJECTOR] if PROJECTOR in there else [])
        if kept and there.issuperset(kept):
            return folder
        raise
    names = {file.rfilename for file in listed if "/" not in file.rfilename}
    wanted = weight_files(folder, names)
    if PROJECTOR in names and not wanted:
        wanted = [PROJECTOR]
    if not wanted:
        held = f"it holds no weights of a model, but {few(sorted(names))}"
        raise ValueError(no_model(names) or held)
    exactly = [escape(file) for file in wanted]
    snapshot_download(repository, revision=folder.name, allow_patterns=exactly, ignore_patterns=[BELOW])
    return folder
