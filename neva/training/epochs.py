"""Passes over the data made steps, once, before a run begins: its schedule needs them."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from neva import config as tree
from neva.checkpoint import store
from neva.data.loader import Loader
from neva.data.survey import PROBE, told
from neva.data.tokenizer import load_tokenizer
from neva.job import TrainConfig
from neva.parallel import mesh as ranks
from neva.training.stage import make_loader

FEW = 5_000
"""Samples that are measured in the training process: to start workers would take longer."""
PATIENCE = 60.0
"""Seconds that a dry run measures."""


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
    begun = ranks.share(_begun(found))[0]
    resolved = []
    for stage in stages:
        if stage.epochs:
            _check_rows(stage, found)
            counts = _what_counts(stage)
            steps = next((steps for before, steps in begun if before == counts), 0)
            stage = replace(stage, steps=steps) if steps else _measured(stage, say)
        resolved.append(stage)
    return tuple(resolved)


def estimate(stage: TrainConfig, say: Callable[[str], None]) -> TrainConfig:
    """Says what the stage's steps hold, for a dry run; gives the stage with its steps.

    For `epochs` all samples are measured, or as many as a minute allows; else a sample of them.
    """
    with closing(_loader(stage)) as loader:
        survey = loader.survey(most=None if stage.epochs else PROBE, seconds=PATIENCE)
        volume = loader.volume(survey, steps=stage.steps, epochs=stage.epochs)
    say(f"Stage {stage.name}: {_asked(stage)}{told(volume, survey)}")
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
        volume = loader.volume(loader.survey(), epochs=stage.epochs)
    assert volume is not None, "all samples were measured"
    say(f"Stage {stage.name}: {_asked(stage)}{volume}")
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
    data = replace(stage.data, workers=0, prefetch=0, date="")
    image = stage.model.layout
    return {
        "name": stage.name,
        "epochs": stage.epochs,
        "data": tree.to_dict(data),
        "batch": tree.to_dict(stage.batch),
        "seed": stage.seed,
        "image": str(image),
    }
