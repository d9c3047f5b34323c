"""What a stage's `init` brings besides weights: the model's config, its tokenizer and its chat format, read without loading a tensor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neva import config as tree
from neva.checkpoint import store
from neva.checkpoint.foreign import is_foreign
from neva.checkpoint.hf import Options, Source, compose, read_source
from neva.checkpoint.manifest import find
from neva.job import InitConfig, TrainConfig
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import ImageConfig, VLMConfig

Places = Mapping[str, tuple[Path, ...]]
"""Part of a model -> the checkpoint that it comes from, or the folders that are imported together for it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a checkpoint or a Hugging Face folder says of itself."""

    model: VLMConfig | None = None
    decoder: DecoderConfig | None = None
    vision: VisionConfig | None = None
    image: ImageConfig | None = None
    tokenizer: str = ""
    template: str = ""


def look(path: Path, *more: Path) -> Found:
    """Read what lies at `path`, of folders what an import of them together makes. ValueError for what is no checkpoint and cannot be imported."""
    if more or is_foreign(path):
        return _of_sources([read_source(folder) for folder in (path, *more)])
    folder = find(path)
    described: dict[str, Any] = store.load_config(folder)
    tokenizer = store.tokenizer_folder(folder)
    text = {"tokenizer": str(tokenizer) if tokenizer.is_dir() else "", "template": described.get("template") or ""}
    if "model" not in described:
        return Found(vision=tree.from_dict(VisionConfig, described["vision"]))
    model = tree.from_dict(VLMConfig, described["model"])
    return Found(model=model, decoder=model.decoder, vision=model.vision, image=model.image if model.vision else None, **text)


def _of_sources(sources: list[Source]) -> Found:
    model, vision, _ = compose(sources, Options())
    if model is None:
        return Found(vision=vision, image=sources[0].image)
    tokenizer = str(sources[0].folder) if sources[0].has_tokenizer else ""
    if sources[0].kind == "decoder":
        return Found(decoder=model.decoder, tokenizer=tokenizer)
    return Found(model=model, decoder=model.decoder, vision=model.vision, image=model.image, tokenizer=tokenizer, template="v1")


def fill(stages: tuple[TrainConfig, ...], place: Callable[[InitConfig], Places]) -> tuple[TrainConfig, ...]:
    """The stages with `model`, `data.tokenizer` and `data.template` taken from what their `init` names, which lies where `place` says.

    A stage without `init` of its own goes on from the one before, and has its model. What a recipe says of the projector, of how images
    are brought to size and of which features are read stays, unless a whole model is named.
    """
    filled: list[TrainConfig] = []
    for number, stage in enumerate(stages):
        if stage.init == InitConfig() and number:
            before = filled[-1]
            kept = {"decoder": before.model.decoder, "vision": before.model.vision} if before.model != stages[number - 1].model else {}
            stage = replace(
                stage, model=replace(stage.model, **kept), data=replace(stage.data, tokenizer=before.data.tokenizer or stage.data.tokenizer)
            )
            filled.append(stage)
            continue
        filled.append(_filled(stage, place))
    return tuple(filled)


def _filled(stage: TrainConfig, place: Callable[[InitConfig], Places]) -> TrainConfig:
    model, tokenizer, template = stage.model, stage.data.tokenizer, stage.data.template
    places = place(stage.init)
    for part in ("model", "decoder", "vision"):
        if part not in places:
            continue
        found = look(*places[part])
        what = getattr(found, part)
        if what is None:
            raise ValueError(f"stage {stage.name}: init.{part}={getattr(stage.init, part)} holds no {part if part != 'model' else 'whole model'}")
        if part == "model":
            model = found.model or model
        elif part == "decoder":
            assert found.decoder is not None
            kept = {} if found.decoder.cross_layers else {"cross_layers": model.decoder.cross_layers, "cross": model.decoder.cross}
            model = replace(model, decoder=replace(found.decoder, **kept))
        else:
            assert found.vision is not None
            model = _with_vision(model, found.vision)
        tokenizer, template = found.tokenizer or tokenizer, template or found.template
    return replace(stage, model=model, data=replace(stage.data, tokenizer=tokenizer, template=template))


def _with_vision(model: VLMConfig, vision: VisionConfig) -> VLMConfig:
    if model.vision is not None and model.vision.layers == vision.layers:
        vision = replace(vision, select_layer=model.vision.select_layer, feature=model.vision.feature if vision.class_token else "patch")
    return replace(model, vision=vision)
