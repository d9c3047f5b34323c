"""A recipe as it was asked for: overrides, what `init` brings, and what a run that goes on has."""

from collections.abc import Callable

from neva import config as tree
from neva import recipes
from neva.infer.generate import untrusted
from neva.job import NAMED, InitConfig, TrainConfig
from neva.recipes import going_on, inits
from neva.recipes.resolve import with_epochs


def chosen_stages(
    name: str,
    overrides: tree.Overrides,
    *,
    place: Callable[[InitConfig], inits.Places],
    is_gone: Callable[[str], bool],
    say: Callable[[str], None] | None,
    trust_code: bool,
    resume: str = "",
) -> tuple[TrainConfig, ...]:
    """The stages of `name` with the overrides applied, and what their `init` brings filled in.

    `place` says where the parts that an `init` names lie, `is_gone` whether one is not to be had,
    `resume` what the run goes on from. ValueError for a function to run that only a checkpoint
    names, unless `trust_code`.
    """
    changes = with_epochs(overrides)
    asked = tree.override(recipes.get(name), changes, named=NAMED)
    stages = asked
    folder = going_on.checkpoint_of(asked, resume)
    if folder is not None:
        stages = going_on.without_gone(asked, folder, is_gone=is_gone, say=say or _silent)
        changes = [(key, value) for key, value in changes if not _is_of_init(key)]
        stages = tree.override(stages, changes, named=NAMED)
        stages = going_on.with_kept_files(stages, folder)
        _check_trusted(asked, stages, trust_code=trust_code)
    if name.endswith((".yaml", ".yml")) or all(stage.init == InitConfig() for stage in stages):
        return inits.with_own(stages, place)
    # What was asked for comes before what init brings.
    filled = tree.override(inits.fill(stages, place), changes, named=NAMED)
    filled = inits.with_own(filled, place)
    if folder is not None:
        filled = going_on.with_kept_files(filled, folder)
    _check_trusted(asked, filled, trust_code=trust_code)
    if say is not None:
        _say_brought(asked, filled, place, say)
    return filled


def _is_of_init(key: str) -> bool:
    return key.rpartition(":")[2].strip().split(".")[0] == "init"


def _silent(text: str) -> None:
    """Says nothing."""


def _check_trusted(
    asked: tuple[TrainConfig, ...],
    filled: tuple[TrainConfig, ...],
    *,
    trust_code: bool,
) -> None:
    for before, stage in zip(asked, filled, strict=True):
        image = stage.model.image
        if image.process not in ("", before.model.image.process) and not trust_code:
            brought = f"stage {stage.name}: its init {untrusted(image)}"
            raise ValueError(f"{brought}, or leave it out with model.image.process=")


def _say_brought(
    asked: tuple[TrainConfig, ...],
    filled: tuple[TrainConfig, ...],
    place: Callable[[InitConfig], inits.Places],
    say: Callable[[str], None],
) -> None:
    own = None
    for before, stage in zip(asked, filled, strict=True):
        if line := inits.replaced(before, stage):
            say(line)
        if stage.init != InitConfig():  # else it goes on from the model of the stage before
            own = inits.own_format(stage, place) if stage.init.model else None
        if line := inits.said_of_format(before, stage, own):
            say(line)
