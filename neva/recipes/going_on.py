"""A run that goes on from its checkpoint, which holds what `init` once brought: the folders named
there may be gone."""

import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from neva import config as tree
from neva.checkpoint import store
from neva.checkpoint.manifest import CheckpointError, find
from neva.data.templates import OWN
from neva.job import InitConfig, TrainConfig

Stages = tuple[TrainConfig, ...]


def checkpoint_of(stages: Stages, resume: str) -> Path | None:
    """The folder that `--resume` most likely goes on from; None for a new start. Nothing is
    verified."""
    if not resume:
        return None
    try:
        return find(Path(stages[0].out if resume == "auto" else resume))
    except CheckpointError:
        return None  # a new start, or an error that the loop says


def without_gone(
    stages: Stages,
    folder: Path,
    *,
    is_gone: Callable[[str], bool],
    say: Callable[[str], None],
) -> Stages:
    """The stages without an `init` that is gone and is needed no more: of those up to the one that
    the checkpoint `folder` is of, and of later ones that name the same.

    Their model, tokenizer and chat format are those that the run began with.
    """
    done = stage_of(folder)
    names = [stage.name for stage in stages]
    if done not in names:
        return stages
    begun = {stage.name: stage for stage in _begun(folder)}
    made: list[TrainConfig] = []
    told: dict[str, None] = {}
    from_run = False
    for number, stage in enumerate(stages):
        inherited = number > 0 and stage.init in (InitConfig(), stages[number - 1].init)
        settled = number <= names.index(done) or (inherited and from_run)
        gone = [path for path in _paths(stage.init) if is_gone(path)] if settled else []
        told |= dict.fromkeys(gone)
        from_run = bool(gone) or (inherited and from_run)
        if from_run and stage.name in begun:
            stage = _as_begun(stage, begun[stage.name])
        if gone:
            stage = replace(stage, init=InitConfig())
        made.append(stage)
    if told:
        missing = ", ".join(told)
        say(f"init: {missing} is not there any more: what it brought is taken from {folder}")
    return tuple(made)


def with_kept_files(stages: Stages, folder: Path) -> Stages:
    """The stages with the checkpoint's tokenizer where theirs is gone, and with the chat format
    that their run began with where they ask for the model's `own`."""
    done = stage_of(folder)
    begun = {stage.name: stage.data.template for stage in _begun(folder)}
    asked = next((stage.data.tokenizer for stage in stages if stage.name == done), "")
    made = []
    for stage in stages:
        data = stage.data
        if data.tokenizer and data.tokenizer == asked and not Path(asked).exists():
            data = replace(data, tokenizer=str(store.tokenizer_folder(folder)))
        if data.template == OWN and stage.name in begun:
            data = replace(data, template=begun[stage.name])
        made.append(replace(stage, data=data))
    return tuple(made)


def with_begun_init(stages: Stages, folder: Path | None) -> Stages:
    """The stages, those without an `init` with the one that their run began with: config.yaml goes
    on to say where the weights came from."""
    if folder is None:
        return stages
    begun = {stage.name: stage.init for stage in _begun(folder)}
    made = []
    for stage in stages:
        init = stage.init if stage.init != InitConfig() else begun.get(stage.name, stage.init)
        made.append(replace(stage, init=init))
    return tuple(made)


def _as_begun(stage: TrainConfig, begun: TrainConfig) -> TrainConfig:
    data = replace(
        stage.data,
        tokenizer=begun.data.tokenizer,
        template=begun.data.template,
        system=begun.data.system,
    )
    return replace(stage, model=begun.model, data=data)


def _paths(init: InitConfig) -> list[str]:
    named = [getattr(init, field.name) for field in fields(init)]
    return [path for path in named if path not in ("", "fresh")]


def stage_of(folder: Path) -> str:
    """Name of the stage that a checkpoint is of; empty if it does not say."""
    try:
        return str((store.load_config(folder).get("train") or {}).get("name", ""))
    except (CheckpointError, OSError):
        return ""


def _begun(folder: Path) -> Stages:
    """The run's config.yaml beside the checkpoint, else the stage that the checkpoint tells."""
    saved = folder.resolve().parent.parent / "config.yaml"
    try:
        if saved.is_file():
            return tree.load(saved, TrainConfig)
        return (tree.from_dict(TrainConfig, store.load_config(folder).get("train")),)
    except ValueError:
        return ()  # of another version of neva


def next_commands(checkpoint: Path) -> str:
    """What to type when a run has ended: to ask its model, and to score it."""
    run = checkpoint.parent.parent
    stage = tree.load(run / "config.yaml", TrainConfig)[-1]
    held_out = stage.evaluate
    source = held_out.source or "FILE.json"
    folder = held_out.image_folder or "FOLDER"
    shown = [] if stage.model.vision is None else ["--image", "FILE.png"]
    scored = [] if stage.model.vision is None else ["--image-folder", folder]
    ask = ["neva", "generate", str(run), *shown, "--prompt", "QUESTION"]
    score = ["neva", "eval", str(run), "--data", source, *scored]
    return f"Ask it: {shlex.join(ask)}\nScore it: {shlex.join(score)}"


def stopped_demo(message: str, overrides: tree.Overrides) -> str:
    """A stop's message with the command that goes on with the demo, which needs no `--resume`."""
    given = [f"{key}={value}" for key, value in tree.pairs(overrides)]
    command = shlex.join(["neva", "demo", *given])
    return f"{message.partition(' Go on with')[0]} Go on with: {command}"
