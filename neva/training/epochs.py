"""Passes over the data made steps, once, before a run begins: its schedule needs them."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from neva import config as tree
from neva.checkpoint import store
from neva.data.loader import Loader
from neva.data.survey import told as held
from neva.data.tokenizer import load_tokenizer
from neva.job import TrainConfig
from neva.parallel import mesh as ranks
from neva.training.stage import PATIENCE, make_loader

FEW = 5_000
"""Samples that are measured in the training process: to start workers would take longer."""


def with_steps(
    stages: tuple[TrainConfig, ...],
    *,
    found: Path | None,
    say: Callable[[str], None],
) -> tuple[TrainConfig, ...]:
    """The stages with the steps that their `epochs` mean. All ranks measure a share of the samples.

    A run that goes on from the checkpoint `found` keeps the steps that it began with, unless its
    data or batch are others now. Raises SampleError for a sample at which training would stop, and
    ValueError where the stage of `found` was begun with another number of rows in a step.
    """
    known = with_known_steps(stages, found)
    return tuple(stage if stage.steps else _measured(stage, say) for stage in known)


def with_known_steps(
    stages: tuple[TrainConfig, ...],
    found: Path | None,
) -> tuple[TrainConfig, ...]:
    """The stages, those with `epochs` with the steps that the run of `found` began them with;
    0 where it did not, or with other data or another batch. Raises as `with_steps`."""
    begun = ranks.share(_begun(found))[0]
    resolved = []
    for stage in stages:
        if stage.epochs:
            _check_rows(stage, found)
            counts = _what_counts(stage)
            steps = next((steps for before, steps in begun if before == counts), 0)
            stage = replace(stage, steps=steps)
        resolved.append(stage)
    return tuple(resolved)


def estimate(
    stage: TrainConfig,
    say: Callable[[str], None],
    *,
    told: set[str] | None = None,
) -> TrainConfig:
    """Says what the stage's steps hold, for a dry run; gives the stage with its steps. Keys of rows
    that are not read are said, and noted in `told`, unless they stand there.

    For `epochs` all samples are measured, or as many as a minute allows; else all if that takes
    less than a minute, or a sample of them.
    """
    with closing(_loader(stage)) as loader:
        if stage.epochs:
            survey = loader.survey(seconds=PATIENCE)
        else:
            survey = loader.look(patience=PATIENCE)
        volume = loader.volume(survey, steps=stage.steps, epochs=stage.epochs)
        say(f"Stage {stage.name}: {_asked(stage)}{held(volume, survey)}")
        say(f"Stage {stage.name}: {loader.told(survey)}")
        known = set() if told is None else told
        for line in loader.unread.lines:
            if line not in known:
                say(line)
        known.update(loader.unread.lines)
    return stage if volume is None else replace(stage, steps=volume.steps)


def _check_rows(stage: TrainConfig, found: Path | None) -> None:
    """Steps of another size were done: no number of steps in all comes to so many epochs."""
    saved = store.load_config(found).get("train") or {} if found is not None else {}
    if saved.get("name") != stage.name:
        return
    before = saved["batch"]["rows"]
    if before != stage.batch.rows:
        begun = f"stage {stage.name} was begun with batch.rows={before}"
        rows = stage.batch.rows
        now = f"epochs={stage.epochs:g} is no number of steps when others have {rows}"
        fix = "put batch.rows back, or in place of epochs set steps=N, those done included"
        raise ValueError(f"{begun}: {now}; {fix}")


def _measured(stage: TrainConfig, say: Callable[[str], None]) -> TrainConfig:
    with closing(_loader(stage)) as alone:
        count = alone.samples
    many = count > FEW * ranks.world()
    if many:
        asked = f"to know how many steps epochs={stage.epochs:g} means"
        say(f"Stage {stage.name}: measuring {count:,} samples, {asked}")
    with closing(_loader(stage, workers=many, shared=True)) as loader:
        survey = loader.survey()
        volume = loader.volume(survey, epochs=stage.epochs)
        assert volume is not None, "all samples were measured"
        say(f"Stage {stage.name}: {_asked(stage)}{volume}")
        say(f"Stage {stage.name}: {loader.told(survey)}")
    return replace(stage, steps=volume.steps)


def _asked(stage: TrainConfig) -> str:
    return f"epochs={stage.epochs:g}: " if stage.epochs else ""


def _loader(stage: TrainConfig, *, workers: bool = False, shared: bool = False) -> Loader:
    """The stage's loader, to measure with; `shared` by all ranks."""
    if not workers:
        stage = replace(stage, data=replace(stage.data, workers=0))
    tokenizer = load_tokenizer(stage.data.tokenizer)
    if not shared:
        return make_loader(stage, tokenizer)
    return make_loader(stage, tokenizer, rank=ranks.rank(), world=ranks.world())


def _begun(found: Path | None) -> list[tuple[dict, int]]:
    """Of each stage of the run that goes on: what its steps depend on, and the steps."""
    saved = found.resolve().parents[1] / "config.yaml" if found is not None else None
    if saved is None or not saved.is_file():
        return []
    try:
        return [(_what_counts(stage), stage.steps) for stage in tree.load(saved, TrainConfig)]
    except ValueError:
        return []  # of another version: the steps are found again


def _what_counts(stage: TrainConfig) -> dict:
    """The part of a stage's config from which its steps follow."""
    # A tokenizer may lie elsewhere once the folder that a run began from is gone.
    data = replace(stage.data, workers=0, prefetch=0, date="", tokenizer="")
    image = stage.model.layout
    return {
        "name": stage.name,
        "epochs": stage.epochs,
        "data": tree.to_dict(data),
        "batch": tree.to_dict(stage.batch),
        "seed": stage.seed,
        "image": str(image),
    }
