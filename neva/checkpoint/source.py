"""A folder of somebody else's making, read but for its tensors, and which of its weights count.

A folder may hold more than one set of weights, a head beside the embedding that it is tied to, or
the encoder of a LLaVA that was tuned. What transformers (for LLaVA's own layout its conversion)
would take is taken, and said.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from neva.checkpoint.shards import Shards, weight_sets
from neva.data.tokenizer import FILES, PAIRS
from neva.models import hf, hf_vlm
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import ImageConfig, ProjectorConfig, VLMConfig

Kind = Literal["vlm", "decoder", "vision", "projector"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A folder of Hugging Face's or LLaVA's making, read but for its tensors."""

    folder: Path
    kind: Kind
    format: str
    """Its `model_type`; `llava-original` is the layout of LLaVA's own repository, `projector` a
    projector by itself."""
    config: Mapping[str, Any]
    """Its config.json."""
    model: VLMConfig | DecoderConfig | VisionConfig | ProjectorConfig
    image: ImageConfig | None
    """How images are brought to size; None where the folder does not say."""
    shards: Shards
    table: Mapping[str, str]
    template: str = ""
    """Chat format that it was trained with, where the folder says so."""
    spelled: Mapping[str, str]
    """Default spelling of each tensor that the table knows -> its name here."""
    side: int = 0
    """Side that its processor brings images to; 0 where none says, or where the encoder takes
    that side for its own."""
    text: Path | None = None
    """Where its tokenizer is, if not in its folder under a name of its own."""
    notes: tuple[str, ...] = ()
    """What was found beside what is read, or otherwise than its config says."""

    @property
    def decoder(self) -> DecoderConfig | None:
        """The decoder in it."""
        if isinstance(self.model, VLMConfig):
            return self.model.decoder
        return self.model if isinstance(self.model, DecoderConfig) else None

    @property
    def tokenizer(self) -> Path:
        """What `load_tokenizer` reads, if there is one."""
        return self.text or self.folder

    @property
    def has_tokenizer(self) -> bool:
        """Is there one that `load_tokenizer` reads?"""
        if self.text is not None:
            return True
        for name in FILES:
            beside = PAIRS.get(name, name)
            if (self.folder / name).is_file() and (self.folder / beside).is_file():
                return True
        return False


WRAPPERS = (
    (re.compile(r"(^|\.)_orig_mod\."), "torch.compile", "save model._orig_mod, or the model before it is compiled"),
    (re.compile(r"(^|\.)_fsdp_wrapped_module\."), "FSDP", "save its full state_dict, or through save_pretrained of its trainer"),
    (re.compile(r"(^|\.)_checkpoint_wrapped_module\."), "activation checkpointing", "save the model that it wraps"),
    (re.compile(r"^module\."), "DataParallel or DeepSpeed", "save model.module"),
    (re.compile(r"^base_model\.model\."), "PEFT", "merge the adapter with model.merge_and_unload() and save the result"),
    (re.compile(r"\.(lora_[AB]|base_layer)\."), "PEFT", "merge the adapter with model.merge_and_unload() and save the result"),
)
"""What stands in the names of a model that was saved inside a wrapper, who wrote it, and what to
do."""


def check_wrappers(names: Iterable[str]) -> None:
    """ValueError for weights that were saved inside a wrapper: the names of their tensors are not a
    model's."""
    for name in names:
        for pattern, wrapper, fix in WRAPPERS:
            if match := pattern.search(name):
                what = f"the names of its tensors have {match[0].strip('.')!r} in them ({name!r})"
                raise ValueError(f"{what}: it was saved inside the wrapper of {wrapper}. {fix[0].upper()}{fix[1:]}.")


def other_sets(folder: Path) -> tuple[str, ...]:
    """A note on the sets of weights in a folder that are not read; none if there is one set."""
    first, *others = weight_sets(folder)
    if not others:
        return ()
    held = f"{folder} holds {len(others) + 1} sets of weights"
    return (f"{held}: {first} is read, as transformers does, and {', '.join(others)} ignored",)


def as_tied(source: Source) -> Source:
    """The source with its head as transformers takes it where config.json ties it to the embedding.

    A head that differs is a head of its own. A head alone is the embedding too.
    """
    decoder = source.decoder
    if decoder is None or not decoder.tied:
        return source
    embed, head = _ends(source)
    if head in source.spelled and embed not in source.spelled:
        spelled = {**source.spelled, embed: source.spelled[head]}
        del spelled[head]
        return replace(source, spelled=spelled)
    if head not in source.spelled or _equal_ends(source):
        return source
    assert isinstance(source.model, VLMConfig | DecoderConfig)
    untied = replace(decoder, tied=False)
    model = replace(source.model, decoder=untied) if isinstance(source.model, VLMConfig) else untied
    note = (
        f"{source.folder}: config.json says tie_word_embeddings=true, but {source.spelled[head]!r} "
        f"differs from {source.spelled[embed]!r}: both are taken, untied, as transformers 5 does"
    )
    return replace(source, model=model, notes=(*source.notes, note))


def _ends(source: Source) -> tuple[str, str]:
    """Default spelling of the embedding and of the head."""
    found = [hf.origin(name, source.table) for name in ("decoder.embed.weight", "head.weight")]
    embed, head = (made.theirs[0] if made else "" for made in found)
    return embed, head


def _equal_ends(source: Source) -> bool:
    embed, head = (source.shards.read(source.spelled[name]) for name in _ends(source))
    widest = torch.promote_types(embed.dtype, head.dtype)
    return embed.shape == head.shape and torch.equal(embed.to(widest), head.to(widest))


def lost_heads(sources: Sequence[Source], model: VLMConfig | None) -> list[str]:
    """Heads that a model tied by an override would lose."""
    if model is None or not model.decoder.tied:
        return []
    own = [source for source in sources if source.decoder is not None and not source.decoder.tied]
    full = [source for source in own if all(name in source.spelled for name in _ends(source))]
    heads = [source.spelled[_ends(source)[1]] for source in full if not _equal_ends(source)]
    return [f"{name!r} differs from the embedding although decoder.tied=true" for name in heads]


def about_encoder(whole: Source, seen: Source) -> list[str]:
    """Warnings on the encoder that is given beside a LLaVA of the original repository."""
    said = []
    encoder = seen.model
    name = str(whole.config.get("mm_vision_tower", ""))
    side = hf_vlm.named_side(name)
    if side and isinstance(encoder, VisionConfig) and encoder.image != side:
        said.append(
            f"{whole.folder} was trained with {name}, {side} pixels a side; the encoder of "
            f"{seen.folder} takes {encoder.image}: its features are others"
        )
    if tower(whole):
        taken = f"they are taken, {seen.folder} gives config and processor"
        held = f"{whole.folder} holds the weights of its encoder (model.vision_tower.*)"
        said.append(f"{held}: {taken}")
    return said


def tower(source: Source) -> dict[str, str]:
    """The encoder's tensors in LLaVA's own layout: name in an encoder by itself -> name there."""
    if source.format != "llava-original":
        return {}
    found = ((name, hf.TOWER.match(name)) for name in source.shards.entries)
    return {name[match.end() :]: name for name, match in found if match}


def with_own_tower(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sources, the encoder's weights replaced by those that a LLaVA's own file holds of it.

    LLaVA's own layout holds its encoder where that was tuned. ValueError for an encoder that runs
    as transformers' model: the names in the file are not those that it is read by.
    """
    whole = next((source for source in sources if tower(source)), None)
    seen = next((source for source in sources if source.kind == "vision"), None)
    if whole is None or seen is None:
        return tuple(sources)
    if isinstance(seen.model, VisionConfig) and seen.model.backend == "hf":
        raise ValueError(
            f"{whole.folder} holds the weights of its encoder (model.vision_tower.*), of a "
            f"{seen.format}: with such a LLaVA a tuned CLIP or SigLIP can be imported."
        )
    inside = tower(whole)
    entries = whole.shards.entries
    own = {name: replace(entries[stored], stored=stored) for name, stored in inside.items()}
    rest = {name: entry for name, entry in entries.items() if name not in inside.values()}
    tuned = replace(seen, shards=Shards(entries=own), spelled=hf.default_names(own, seen.table))
    alone = replace(whole, shards=Shards(entries=rest))
    instead = {id(whole): alone, id(seen): tuned}
    return tuple(instead.get(id(source), source) for source in sources)
