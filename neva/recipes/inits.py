"""What a stage's `init` brings besides weights: the model's config, its tokenizer and its chat format, read without loading a tensor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from neva.checkpoint import store
from neva.checkpoint.chat import chat_format
from neva.checkpoint.foreign import is_foreign
from neva.checkpoint.hf import Options, Source, compose, read_source
from neva.checkpoint.manifest import find
from neva.checkpoint.nemo import is_nemo, read_nemo_config
from neva.data.templates import OWN, TEMPLATES
from neva.data.tokenizer import load_tokenizer
from neva.job import InitConfig, TrainConfig
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import VLM, VOCABULARY, ImageConfig, ProjectorConfig, VLMConfig, part_of
from neva.training.stage import PARTS

Places = Mapping[str, tuple[Path, ...]]
"""Part of a model -> the checkpoint that it comes from, or the folders that are imported together for it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a checkpoint or a Hugging Face folder says of itself."""

    model: VLMConfig | None = None
    decoder: DecoderConfig | None = None
    vision: VisionConfig | None = None
    image: ImageConfig | None = None
    projector: ProjectorConfig | None = None
    """A projector by itself."""
    tokenizer: str = ""
    template: str = ""
    """Its chat format: a name, a Jinja text, or empty for its tokenizer's own."""
    system: str | None = None


def look(path: Path, *more: Path) -> Found:
    """Read what lies at `path`, of folders what an import of them together makes. ValueError for what is no checkpoint and cannot be imported."""
    if more or is_nemo(path) or is_foreign(path):
        return _of_sources([_source(folder) for folder in (path, *more)])
    folder = find(path)
    described: dict[str, Any] = store.load_config(folder)
    tokenizer = store.tokenizer_folder(folder)
    text = {
        "tokenizer": str(tokenizer) if tokenizer.is_dir() else "",
        "template": described.get("template") or "",
        "system": described.get("system"),
    }
    model = store.model_of(folder, described)
    if isinstance(model, ProjectorConfig):
        return Found(projector=model)
    if isinstance(model, VisionConfig):
        return Found(vision=model)
    return Found(model=model, decoder=model.decoder, vision=model.vision, image=model.image if model.vision else None, **text)


def _source(folder: Path) -> Source:
    return read_nemo_config(folder) if is_nemo(folder) else read_source(folder)


def _of_sources(sources: list[Source]) -> Found:
    model, vision, _ = compose(sources, Options())
    if isinstance(sources[0].model, ProjectorConfig):
        return Found(projector=sources[0].model)
    if model is None:
        return Found(vision=vision, image=sources[0].image)
    tokenizer = str(sources[0].tokenizer) if sources[0].has_tokenizer else ""
    if sources[0].kind == "decoder":
        return Found(decoder=model.decoder, tokenizer=tokenizer, template=sources[0].template)
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    template = chat_format(sources, loaded, images=True).template
    return Found(model=model, decoder=model.decoder, vision=model.vision, image=model.image, tokenizer=tokenizer, template=template)


def fill(stages: tuple[TrainConfig, ...], place: Callable[[InitConfig], Places]) -> tuple[TrainConfig, ...]:
    """The stages with `model`, `data.tokenizer` and `data.template` taken from what their `init` names, which lies where `place` says.

    A stage without `init` of its own goes on from the one before, and has its model. What a recipe says of the projector, of how images
    are brought to size and of which features are read stays, unless a whole model is named.

    A stage that asks questions does it in the chat format of the whole model that the stages start
    from. One that trains on captions keeps its format, and a model trained on captions alone
    (LLaVA's first stage) brings none.
    """
    filled: list[TrainConfig] = []
    chat: tuple[str, str | None] | None = None
    for number, stage in enumerate(stages):
        follows = stage.init == InitConfig() and number
        if not follows:
            chat = _chat_format(place(stage.init))
        if chat is not None and not _is_caption(stage.data.template):
            template, system = chat
            stage = replace(stage, data=replace(stage.data, template=template, system=system))
        if follows:
            before, asked = filled[-1], stages[number - 1].model
            brought = {f.name: getattr(before.model, f.name) for f in fields(VLMConfig)}
            kept = {name: value for name, value in brought.items() if value != getattr(asked, name)}
            data = replace(stage.data, tokenizer=before.data.tokenizer or stage.data.tokenizer)
            stage = replace(stage, model=replace(stage.model, **kept), data=data)
            filled.append(stage)
            continue
        filled.append(_filled(stage, place))
    return tuple(filled)


def _filled(stage: TrainConfig, place: Callable[[InitConfig], Places]) -> TrainConfig:
    model, data = stage.model, stage.data
    tokenizer = data.tokenizer
    template = data.template
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
            crossed = found.decoder.cross_layers and model.decoder.cross_layers  # where one has none, the recipe says which layers
            kept = {} if crossed else {"cross_layers": model.decoder.cross_layers, "cross": model.decoder.cross}
            model = replace(model, decoder=replace(found.decoder, **kept))
        else:
            assert found.vision is not None
            model = _with_vision(model, found.vision)
        tokenizer = found.tokenizer or tokenizer
        if part == "decoder" and template in ("", OWN):
            template = found.template
    data = replace(data, tokenizer=tokenizer, template=template)
    return replace(stage, model=model, data=data)


def _chat_format(places: Places) -> tuple[str, str | None] | None:
    """Template and system message of a whole model, None where there is none that asks
    questions."""
    if "model" not in places:
        return None
    found = look(*places["model"])
    return None if _is_caption(found.template) else (found.template, found.system)


def _is_caption(template: str) -> bool:
    """Is it a format for captions, whose questions are images alone?"""
    return template in TEMPLATES and TEMPLATES[template].caption


def own_format(stage: TrainConfig, place: Callable[[InitConfig], Places]) -> str | None:
    """The chat format of the model that a stage starts from; None where its
    `init` names no text."""
    places = place(stage.init)
    part = next((part for part in ("model", "decoder") if part in places), "")
    return look(*places[part]).template if part else None


def with_own(
    stages: tuple[TrainConfig, ...],
    place: Callable[[InitConfig], Places],
) -> tuple[TrainConfig, ...]:
    """The stages with the model's chat format in place of the word `own`.

    A stage without `init` goes on from the model of the stage before.
    """
    if all(stage.data.template != OWN for stage in stages):
        return stages
    made: list[TrainConfig] = []
    own = ""
    for stage in stages:
        found = own_format(stage, place)
        own = own if found is None else found
        data = replace(stage.data, template=own) if stage.data.template == OWN else stage.data
        made.append(replace(stage, data=data))
    return tuple(made)


def said_of_format(asked: TrainConfig, stage: TrainConfig, own: str | None) -> str:
    """A line where a stage's chat format is not the one of the whole model that it starts from, and
    where it is that in place of the recipe's; empty if there is nothing to say."""
    if own is None or _is_caption(own):
        return ""
    recipes = asked.data.template
    mine = stage.data.template
    if mine != own:
        kept = f"data.template={OWN} takes that"
        trains = f"trains in the chat format {_called(mine)} and not in its model's, {_called(own)}"
        return f"Stage {stage.name} {trains}: {kept}"
    if recipes in (own, OWN, ""):
        return ""
    kept = "name it with data.template to keep it"
    if recipes in TEMPLATES:
        kept = f"say so with data.template={recipes} to keep it"
    brings = f"init.model brings its chat format, {_called(own)}"
    return f"Stage {stage.name}: {brings} (the recipe has {_called(recipes)}; {kept})"


def _called(template: str) -> str:
    return template if template in TEMPLATES else "a template of its own"


def replaced(asked: TrainConfig, stage: TrainConfig) -> str:
    """A line on what a whole model brought in place of what the recipe and its overrides say of images; empty if nothing."""
    names = ("inline", "tag_binding", "projector", "pixel_shuffle", "image")
    changed = [name for name in names if getattr(asked.model, name) != getattr(stage.model, name)]
    if not stage.init.model or not changed:
        return ""
    if stage.model.vision is None:
        says = "init.model is a model of text, which trains without images"
        fix = "to build a model that sees on it name it as init.decoder"
        return f"Stage {stage.name}: {says}; {fix}" if asked.model.vision is not None else ""
    brought = ", ".join(f"{name}={_short(getattr(stage.model, name), getattr(asked.model, name))}" for name in changed)
    return f"Stage {stage.name}: init.model brings {brought} (the recipe has otherwise; say so with model.… to keep it)"


def _short(value: Any, asked: Any) -> str:
    if not isinstance(value, ImageConfig):
        return str(value)
    return "(" + ", ".join(f"{f.name}={getattr(value, f.name)}" for f in fields(value) if getattr(value, f.name) != getattr(asked, f.name)) + ")"


def check_fit(stage: TrainConfig, places: Places) -> None:
    """ValueError where weights that `init` names do not fit the stage's model: seen from configs, before a tensor is read."""
    mine, layers = _shapes(stage.model), stage.model.decoder.cross_layers
    if stage.init.cross and not layers:
        raise ValueError(f"stage {stage.name}: init.cross={stage.init.cross}, but the model has no cross-attention: leave it out")
    own = {part for field in PARTS if getattr(stage.init, field) for part in PARTS[field]}
    for field, paths in places.items():
        found = look(*paths)
        parts = {part for each in PARTS.values() for part in each} - own if field == "model" else set(PARTS[field])
        theirs = _shapes(found.model) if found.model is not None else _part_shapes(stage.model, found)
        crossed = found.decoder.cross_layers if found.decoder is not None else ()
        if "cross" in parts and layers and crossed not in ((), layers):
            fix = f"set model.decoder.cross_layers={list(crossed)}, or init.cross=fresh"
            raise ValueError(f"stage {stage.name}: init.{field} has cross-attention in layers {list(crossed)}, the model in {list(layers)}: {fix}")
        parts -= set() if crossed and layers else {"cross"}
        named = [name for name in mine if part_of(name) in parts]
        wrong = [name for name in named if not _fits(name, theirs.get(name), mine[name])]
        wrong += [name for name in theirs if part_of(name) in parts and name not in mine]
        if wrong:
            one = f"{wrong[0]} has {theirs.get(wrong[0], 'nothing')} there and {mine.get(wrong[0], 'nothing')} here"
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            fix = "leave out the overrides of its sizes, or take it from a model of these"
            if found.projector is not None and found.projector.name != stage.model.projector:
                fix = f"say model.projector={found.projector.name}, or take another"
            raise ValueError(f"stage {stage.name}: init.{field} is of another model: {one}{more}; {fix}")


def _fits(name: str, theirs: tuple[int, ...] | None, mine: tuple[int, ...]) -> bool:
    """Can a weight of this shape be taken? The vocabulary may grow."""
    if theirs is None or name not in VOCABULARY:
        return theirs == mine
    return theirs[0] <= mine[0] and theirs[1:] == mine[1:]


def _shapes(model: VLMConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in VLM(model).named_parameters()}


def _part_shapes(model: VLMConfig, found: Found) -> dict[str, tuple[int, ...]]:
    """Of a decoder, an encoder or a projector by itself."""
    if found.projector is not None:
        return {name: tuple(shape) for name, shape in found.projector.shapes().items()}
    if found.decoder is not None:
        return _shapes(VLMConfig(decoder=found.decoder, vision=None, projector="none"))
    return _shapes(replace(model, vision=found.vision)) if model.vision is not None else {}


def _with_vision(model: VLMConfig, vision: VisionConfig) -> VLMConfig:
    if model.vision is not None and model.vision.layers == vision.layers:
        vision = replace(vision, select_layer=model.vision.select_layer, feature=model.vision.feature if vision.class_token else "patch")
    return replace(model, vision=vision)
