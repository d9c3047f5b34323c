"""The held-out samples on which a stage of training is evaluated: found wanting before it
begins."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from neva.config import nearest
from neva.data.encode import Encoder
from neva.data.sample import SampleError
from neva.data.source import LlavaSource
from neva.data.tokenizer import load_tokenizer
from neva.evaluate.question import Question, questions, suited
from neva.infer.generate import unanswerable
from neva.job import EvaluateConfig, TrainConfig

SECONDS = 60.0
"""Longest look at the questions before a run begins; of more a random part is looked at."""
NAMED = 3
"""Questions that cannot be asked are named, so many at most."""


def open_source(config: EvaluateConfig, *, links: bool = False) -> LlavaSource:
    """The held-out file; `links` as in `data.links`. ValueError, naming its key, where it or the
    image folder is not there."""
    path, folder = Path(config.source), config.image_folder
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        names = [other.name for other in beside if other.suffix in (".json", ".jsonl")]
        near = nearest(path.name, names)
        raise ValueError(f"evaluate.source={path}: the data file is missing.{near}")
    if folder and not Path(folder).is_dir():
        raise ValueError(f"evaluate.image_folder={folder}: the image folder is missing")
    try:
        return LlavaSource(path, folder, questions=True, links=links)
    except ValueError as error:
        raise ValueError(f"evaluate.source: {error}") from None


def check(stage: TrainConfig, say: Callable[[str], None]) -> None:
    """Say how many questions of `evaluate.source` cannot be asked, and which; nothing if all can.

    Looks at rows and image headers, of all questions where that takes under a minute. ValueError
    for a source that is not there, and for one of which no question can be asked and scored.
    """
    if not stage.evaluate.every:
        return
    try:
        _check(stage, say)
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from None


def _check(stage: TrainConfig, say: Callable[[str], None]) -> None:
    source = open_source(stage.evaluate, links=stage.data.links)
    encoder = Encoder(
        tokenizer=load_tokenizer(stage.data.tokenizer),
        template=stage.data.template,
        system=stage.data.system,
        layout=stage.model.layout,
        date=stage.data.date,
    )
    every = list(questions(source))
    asked = suited(every, caption=encoder.chosen.caption)
    where = f"evaluate.source={stage.evaluate.source}"
    if not any(question.truth is not None for question in asked):
        what = "holds no question with an answer"
        if left_out := len(every) - len(asked):
            template = stage.data.template or "own"
            what = f"holds none of the first questions of images that template {template!r} asks"
            what = f"{what}, but {left_out} others"
        raise ValueError(f"{where} {what}")
    looked, faults = _look(stage, encoder, asked)
    if len(faults) == looked:
        raise ValueError(f"{where}: no question can be asked, the first since {faults[0]}")
    for line in _told(stage, asked, looked=looked, faults=faults, left_out=len(every) - len(asked)):
        say(line)


def _look(stage: TrainConfig, encoder: Encoder, asked: list[Question]) -> tuple[int, list[str]]:
    """How many questions were looked at, and why some of them cannot be asked, in their order."""
    end = time.monotonic() + SECONDS
    faults: dict[int, str] = {}
    looked = 0
    for number in random.Random(0).sample(range(len(asked)), len(asked)):
        if looked and time.monotonic() > end:
            break
        looked += 1
        if fault := _fault(stage, encoder, asked[number]):
            faults[number] = fault
    return looked, [faults[number] for number in sorted(faults)]


def _fault(stage: TrainConfig, encoder: Encoder, question: Question) -> str:
    """Why a question cannot be asked, as far as its row and image headers tell; empty if it can."""
    if question.error is not None:
        return str(question.error)
    sample = question.sample
    try:
        tokens = encoder.prompt(sample).tokens
    except SampleError as error:
        return str(error)
    fault = unanswerable(stage.model.decoder, encoder.tokenizer, tokens)
    return str(SampleError(sample.source, sample.id, fault)) if fault else ""


def _told(
    stage: TrainConfig,
    asked: list[Question],
    *,
    looked: int,
    faults: list[str],
    left_out: int,
) -> Iterator[str]:
    where = f"Stage {stage.name}: evaluate.source"
    if left_out:
        does = "asks first questions of images alone"
        yield f"{where}: template {stage.data.template!r} {does}: {left_out} others are left out"
    if looked < len(asked):
        yield f"{where}: {looked} of {len(asked)} questions were looked at"
    if faults:
        count = f"{len(faults)} of {looked} questions cannot be asked"
        yield f"{where}: {count}; they are skipped and counted at each evaluation:"
        yield from (f"  {fault}" for fault in faults[:NAMED])
    if len(faults) > NAMED:
        yield f"  and {len(faults) - NAMED} more"
