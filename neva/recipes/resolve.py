"""What depends on files: fills it in, checks it, and makes the data sets that recipes bring themselves."""

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from operator import attrgetter
from pathlib import Path
from typing import Any

from neva.config import Overrides, nearest, pairs
from neva.data.sample import SampleError
from neva.data.template import check
from neva.data.templates import OWN, find_template
from neva.data.tiling import all_tags
from neva.data.tokenizer import load_tokenizer
from neva.job import DataConfig, SourceConfig, TrainConfig
from neva.recipes import digits, pages
from neva.recipes.demo import TOKENIZER
from neva.training.stage import make_source

MAKERS: dict[str, Callable[[Path], None]] = {"digits": digits.write, "pages": pages.write}
"""`SourceConfig.make` -> the function that writes a data set into a folder."""


LEAST: dict[str, float] = {
    "epochs": 0, "seed": 0,
    "optim.lr": 0, "optim.min_lr": 0, "optim.warmup": 0, "optim.weight_decay": 0, "optim.clip": 0,
    "checkpoint.every": 0, "checkpoint.keep_last": 0, "checkpoint.keep_every": 0, "log.every": 0, "evaluate.every": 0,
}  # fmt: skip
"""Key of a stage -> its least value."""


def resolve(stages: tuple[TrainConfig, ...]) -> tuple[TrainConfig, ...]:
    """The stages with `{out}` filled in. Raises ValueError for what cannot train, with the stage, the key and the fix.

    Reads the tokenizer files; writes nothing.
    """
    if not stages:
        raise ValueError("there is no stage to train")
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise ValueError(f"two stages have one name: {', '.join(names)}; give each its own")
    for key in ("out", "parallel"):
        if len({repr(getattr(stage, key)) for stage in stages}) > 1:
            raise ValueError(f"the stages differ in {key}; a run has one: set {key}=… without a stage's name before it")
    return tuple(_stage(stage) for stage in stages)


def with_epochs(overrides: Overrides) -> list[tuple[str, Any]]:
    """The overrides as keys and values, of which the later of `steps=` and `epochs=` counts: steps
    take back the epochs that a recipe may have."""
    changed: list[tuple[str, Any]] = []
    for key, value in pairs(overrides):
        stage, colon, path = key.rpartition(":")
        changed.append((key, value))
        if path.strip() == "steps":
            changed.append((f"{stage}{colon}epochs", 0))
    return changed


def say_mock(stages: tuple[TrainConfig, ...], say: Callable[[str], None]) -> None:
    """Say first, and plainly, which stages would train on made-up samples."""
    made_up = [stage.name for stage in stages if all(source.mock for source in stage.data.blend)]
    if made_up:
        say(f"data.source and data.folder are not set: {', '.join(made_up)} will train on made-up text and images, to see that it runs and how fast")


def say_templates(stages: tuple[TrainConfig, ...], say: Callable[[str], None]) -> None:
    """Say once of each chat format what is added to it."""
    lacking: dict[str, list[str]] = {}
    for stage in stages:
        template = find_template(stage.data.template, load_tokenizer(stage.data.tokenizer))
        if template.form.adds_end:
            lacking.setdefault(template.jinja, []).append(stage.name)
    for names in lacking.values():
        where = f"the chat template of {', '.join(names)} ends no answer"
        learnt = "the tokenizer's end token is put behind each and learnt"
        say(f"{where}: {learnt}; an export writes the template with it")


def check_systems(stages: tuple[TrainConfig, ...]) -> None:
    """ValueError naming the first sample whose system message its stage's chat template would lose.

    Reads turns, of stages whose template takes none; where bad samples are left out it is for them.
    """
    for stage in stages:
        tokenizer = load_tokenizer(stage.data.tokenizer)
        fault = find_template(stage.data.template, tokenizer).form.no_system
        if not fault or stage.data.on_error == "skip":
            continue
        for config in stage.data.blend:
            source = make_source(config, links=stage.data.links)
            for index in range(len(source)):
                try:
                    turns = source[index].turns
                except SampleError:
                    continue  # named when it is read for training
                if turns and turns[0].role == "system":
                    raise ValueError(f"stage {stage.name}: row {index} of '{source.name}': {fault}")


def make_data(stages: tuple[TrainConfig, ...], say: Callable[[str], None]) -> None:
    """Write the data sets that resolved stages want made."""
    for source in dict.fromkeys(s for stage in stages for s in stage.data.blend if s.make):
        folder = Path(source.path).parent
        if not folder.exists():
            say(f"Writing the {source.make} data set to {folder}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            MAKERS[source.make](folder)


def _stage(stage: TrainConfig) -> TrainConfig:
    try:
        data = replace(stage.data, sources=tuple(_place(source, stage.out) for source in stage.data.sources), template=_template(stage.data.template))
        data = replace(data, sources=_in_folder(data)) if data.folder else data
        if not data.tokenizer and data.blend and all(source.mock for source in data.blend):
            data = replace(data, tokenizer=TOKENIZER)  # made-up text needs no other
        if data.image_folder and not data.source:
            raise ValueError("data.image_folder is set but data.source is not; name the data file: data.source=FILE")
        if not data.blend:
            raise ValueError("there is no data; name a LLaVA-format file: data.source=FILE data.image_folder=FOLDER")
        for source in data.blend:
            _check_files(source)
        if stage.evaluate.every and not stage.evaluate.source:
            raise ValueError("evaluate.every is set but evaluate.source is not; name a LLaVA-format file of held-out samples: evaluate.source=FILE")
        _check_sizes(replace(stage, data=data))
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from None
    held_out = replace(stage.evaluate, source=_within(stage.evaluate.source, stage.out), image_folder=_within(stage.evaluate.image_folder, stage.out))
    return replace(stage, data=data, evaluate=held_out, steps=0 if stage.epochs else stage.steps)


def _template(template: str) -> str:
    """A file's text in place of its name."""
    if template == OWN:
        return ""  # of a model whose format is its tokenizer's
    if not template.endswith((".jinja", ".j2")):
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the chat template {template} cannot be read: {error.strerror}") from None


def _place(source: SourceConfig, out: str) -> SourceConfig:
    return replace(source, path=_within(source.path, out), image_folder=_within(source.image_folder, out))


def _in_folder(data: DataConfig) -> tuple[SourceConfig, ...]:
    """The named sources with their files of `data.folder`; ValueError naming those that it does not hold, unless they may be left out."""
    folder, found, absent = Path(data.folder), [], []
    for source in data.sources:
        if source.path or not source.name:
            found.append(source)
            continue
        file = next((path for path in (folder / f"{source.name}.jsonl", folder / f"{source.name}.json") if path.is_file()), None)
        if file is None:
            absent.append(source.name)
            continue
        images = folder / source.name
        found.append(replace(source, path=str(file), image_folder=str(images) if images.is_dir() else "", mock=None))
    if not found or (absent and data.absent == "stop"):
        fix = "put NAME.jsonl and the folder NAME of its images there, or set data.absent=skip to train without them"
        raise ValueError(f"{folder} holds {len(found)} of {len(found) + len(absent)} data sets and not {', '.join(absent)}; {fix}")
    return tuple(found)


def _within(path: str, out: str) -> str:
    return path.replace("{out}", out)


def _check_files(source: SourceConfig) -> None:
    if bool(source.path) == (source.mock is not None):
        raise ValueError(f"the source {source.name or source.path!r} needs either a path or mock")
    if source.mock is not None or source.make:
        return
    path = Path(source.path)
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir() if p.suffix in (".json", ".jsonl")] if path.parent.is_dir() else []
        raise ValueError(f"the data file {path} is not there.{nearest(path.name, beside)}")
    if source.image_folder and not Path(source.image_folder).is_dir():
        raise ValueError(f"the image folder {source.image_folder} is not there")


def _check_date(text: str) -> None:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"data.date={text} is no day: write it as YYYY-MM-DD") from None


def _check_sizes(stage: TrainConfig) -> None:
    if not stage.data.tokenizer:
        raise ValueError("there is no tokenizer; name a tokenizer.json, a SentencePiece .model or their folder: data.tokenizer=PATH")
    tokenizer, decoder = load_tokenizer(stage.data.tokenizer), stage.model.decoder
    if stage.data.date:
        _check_date(stage.data.date)
    template = find_template(stage.data.template, tokenizer)
    check(template, images=stage.model.layout.images, system=bool(stage.data.system))
    size = tokenizer.size
    if size > decoder.vocab:
        rows = -(-size // 64) * 64
        has = f"the tokenizer has {size} tokens but model.decoder.vocab={decoder.vocab}"
        fix = f"set model.decoder.vocab={rows}"
        then = "weights that init names get new rows, each the mean of the others"
        raise ValueError(f"{has}; {fix}; {then}")
    if stage.batch.seq_length > decoder.reach:
        limit = f"model.decoder.max_positions={decoder.max_positions}" + (
            " stretched by rope_scaling" if decoder.reach > decoder.max_positions else ""
        )
        raise ValueError(f"batch.seq_length={stage.batch.seq_length} is beyond {limit}; lower the one or raise the other")
    layout, fewer = stage.model.layout, stage.data.fewer_tiles
    if fewer:
        layout = replace(layout, max_tiles=layout.min_tiles)
    texts = all_tags(layout) if layout.inline != "thumbnail" else [layout.thumbnail_tag] * (layout.tags != "none")
    tags = sum(len(tokenizer.encode(text)) for text in texts)
    if layout.tokens_per_image + tags >= stage.batch.seq_length:
        takes = f"an image takes {layout.tokens_per_image + tags} tokens" + (f", {tags} of them its tags" if tags else "")
        raise ValueError(f"{takes}: all of batch.seq_length={stage.batch.seq_length}; raise it")
    if layout.images and layout.most_tiles > stage.batch.max_tiles:
        hint = "" if fewer or layout.max_tiles == 1 else ", lower model.image.max_tiles, or set data.fewer_tiles=true"
        raise ValueError(f"an image makes {layout.most_tiles} tiles, more than batch.max_tiles={stage.batch.max_tiles}: raise it{hint}")
    if stage.data.fewer_tiles and stage.model.image.aspect != "tiles":
        raise ValueError(f"data.fewer_tiles has no effect on model.image.aspect={stage.model.image.aspect}, which cuts no grid; leave it out")
    if not stage.epochs and stage.steps < 1:
        raise ValueError(f"steps={stage.steps} must be at least 1, or set epochs")
    if not math.isfinite(stage.epochs):
        raise ValueError(f"epochs={stage.epochs} must be a finite number")
    for key, least in LEAST.items():
        value = attrgetter(key)(stage)
        if value < least:
            raise ValueError(f"{key}={value} must be at least {least}")
