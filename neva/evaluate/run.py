"""Asks a model questions in batches, and scores its answers."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from neva import __version__
from neva.data.encode import Prompt
from neva.data.sample import MARKER, Encoded, Sample, SampleError
from neva.data.source import Source
from neva.evaluate.predictions import Predictions
from neva.evaluate.question import Judged, Question, blanked, questions, suited
from neva.evaluate.score import exact_match
from neva.infer.generate import Answer, Loaded, Sampling, generate_encoded, unanswerable

Progress = Callable[[int, int], None]
"""Called with the number of questions that are done, and of all."""
WORDING = 10
"""Questions in the same words from which on these have a best answer of their own: of fewer, the
commonest truth says more about chance than about the words."""


def ask(
    loaded: Loaded,
    asked: Sequence[Question],
    sampling: Sampling,
    *,
    batch_size: int,
    blank: bool = False,
    file: Predictions | None = None,
    progress: Progress | None = None,
) -> list[Judged]:
    """The questions' answers, in their order; those of like length share a batch.

    A question that cannot be asked has its error for an answer. With `blank` all images are black.
    What `file` holds already is not asked again, all else is written to it.
    """
    found: dict[int, Judged] = {}
    for number, question in enumerate(asked):
        if file is not None and (known := file.find(question, blank=blank)) is not None:
            found[number] = known
    order = sorted((n for n in range(len(asked)) if n not in found), key=lambda n: _size(asked[n]))
    if progress is not None:
        progress(len(found), len(asked))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        judged = _batch(loaded, [asked[n] for n in numbers], sampling, blank=blank)
        found |= dict(zip(numbers, judged, strict=True))
        if file is not None:
            file.add(judged)
        if progress is not None:
            progress(len(found), len(asked))
    return [found[number] for number in range(len(asked))]


def _size(question: Question) -> tuple[int, int]:
    turns = question.sample.turns
    return len(question.sample.images), sum(len(turn.text) for turn in turns)


def _batch(
    loaded: Loaded,
    asked: Sequence[Question],
    sampling: Sampling,
    *,
    blank: bool,
) -> list[Judged]:
    said: dict[int, Prompt] = {}
    prompts: dict[int, Encoded] = {}
    answers: dict[int, Answer] = {}
    for number, question in enumerate(asked):
        try:
            sample = _askable(question, blank=blank)
            said[number] = loaded.encoder.prompt(sample)
            prompts[number] = _encoded(loaded, sample, said[number])
        except SampleError as error:
            answers[number] = Answer(text="", tokens=(), finish="error", error=str(error))
    given = generate_encoded(loaded, list(prompts.values()), sampling)
    answers |= dict(zip(prompts, given, strict=True))
    judged = []
    for number, question in enumerate(asked):
        answer = answers[number]
        prompt = said.get(number, Prompt(tokens=(), text="", sizes=()))
        judged.append(
            Judged(
                question=question,
                answer=answer,
                right=not answer.error and exact_match(answer.text, question.truth or ""),
                prompt=prompt.text,
                prompt_tokens=len(prompt.tokens),
                image_sizes=prompt.sizes,
                blank=blank,
            )
        )
    return judged


def _askable(question: Question, *, blank: bool) -> Sample:
    """The sample to ask. SampleError for a row that cannot be read."""
    if question.error is not None:
        raise question.error
    return blanked(question.sample) if blank else question.sample


def _encoded(loaded: Loaded, sample: Sample, prompt: Prompt) -> Encoded:
    """A sample's prompt. SampleError for one that cannot be asked."""
    decoder = loaded.model.config.decoder
    if error := unanswerable(decoder, loaded.encoder.tokenizer, prompt.tokens):
        raise SampleError(sample.source, sample.id, error)
    return loaded.encoder.encode(sample, labels=False)


def evaluate(
    loaded: Loaded,
    source: Source,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    blank: bool = False,
    rank: int = 0,
    world: int = 1,
) -> list[Judged]:
    """Ask every question of the source and judge each answer.

    With ranks, every `world`-th question from number `rank` on. One that could not be asked counts
    as answered wrong; its answer's `error` says why.
    """
    caption = loaded.encoder.chosen.caption
    asked = suited(questions(source), caption=caption)[rank::world]
    chosen = sampling or Sampling(max_new_tokens=32)
    return ask(loaded, asked, chosen, batch_size=batch_size, blank=blank)


def scored(judged: Iterable[Judged]) -> list[Judged]:
    """Those that a score counts: the question is known, and its right answer."""
    return [j for j in judged if j.question.truth is not None]


def accuracy(judged: Iterable[Judged]) -> dict[str, float]:
    """Share of right answers per kind of sample (per source where samples have none)."""
    return {kind: share(rows) for kind, rows in by_kind(judged).items()}


def share(judged: Sequence[Judged]) -> float:
    """Share of right answers of all."""
    return sum(j.right for j in judged) / len(judged)


def by_kind(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    """The scored ones of each kind."""
    found: dict[str, list[Judged]] = defaultdict(list)
    for j in scored(judged):
        found[j.question.kind].append(j)
    return dict(sorted(found.items()))


def errors(judged: Iterable[Judged]) -> list[str]:
    """Why each question that could not be asked was not."""
    return [j.answer.error for j in judged if j.answer.error]


def best_blind(judged: Iterable[Judged]) -> dict[str, float]:
    """Per kind, the score of the best answers that can be given without looking.

    These are, of questions in the same words, always their commonest truth; questions whose words
    are asked fewer than `WORDING` times in the kind share one answer.
    """
    return {kind: _guessed(rows) / len(rows) for kind, rows in by_kind(judged).items()}


def summary(
    judged: Sequence[Judged],
    blank: Sequence[Judged] = (),
    *,
    left_out: int = 0,
) -> dict[str, Any]:
    """What an evaluation found, as JSON.

    Shares of right answers per kind (`accuracy`, `baselines` for `best_blind`, and of `blank`
    `blank_image`) and of all (`overall`, null where nothing is scored), with the numbers of scored
    questions (`counts`, `n`). `answered` counts answers, `without_truth` those of them that nothing
    is compared with, `left_out` questions that the chat format does not ask; `errors` says why
    others were not asked.
    """
    kinds = by_kind(judged)
    counts = {kind: len(rows) for kind, rows in kinds.items()}
    n = sum(counts.values())
    best = best_blind(judged)
    guessed = sum(_guessed(rows) for rows in kinds.values())
    overall = {"accuracy": share(scored(judged)), "baseline": guessed / n} if n else None
    told: dict[str, Any] = {"accuracy": accuracy(judged), "baselines": best}
    if blank:
        told["blank_image"] = accuracy(blank)
        overall = overall and overall | {"blank_image": share(scored(blank))}
    failed = errors(judged)
    unscored = sum(j.question.truth is None and not j.answer.error for j in judged)
    return {
        **told,
        "counts": counts,
        "overall": overall,
        "n": n,
        "answered": len(judged) - len(failed),
        "without_truth": unscored,
        "left_out": left_out,
        "errors": failed,
    }


def settings(
    command: str,
    loaded: Loaded,
    sampling: Sampling,
    data: str | Path,
    image_folder: str | Path,
) -> dict[str, Any]:
    """All that answers hang on: where the questions are, the model, how it is asked, and how it
    answers."""
    encoder = loaded.encoder
    format = encoder.chosen
    dated = "strftime_now" in format.jinja
    manifest = (loaded.folder / "manifest.json").read_bytes()
    return {
        "neva": __version__,
        "command": command,
        "data": str(Path(data).resolve()),
        "image_folder": str(Path(image_folder).resolve()) if str(image_folder) else "",
        "checkpoint": str(loaded.folder.resolve()),
        "checkpoint_sha256": hashlib.sha256(manifest).hexdigest(),
        "template": encoder.template or "the tokenizer's own",
        "chat_template": format.jinja,
        "system": format.system if encoder.system is None else encoder.system,
        "date": (encoder.date or date.today().isoformat()) if dated else "",
        "images": asdict(encoder.layout),
        "precision": str(loaded.model.decoder.embed.weight.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        **asdict(sampling),
        "score": "exact match",
    }


def _guessed(judged: Sequence[Judged]) -> int:
    """How many of one kind's questions the best answers without looking get right."""
    worded: dict[str, list[str]] = defaultdict(list)
    for j in judged:
        worded[_words(j.question)].append(j.question.truth or "")
    rare = [truth for truths in worded.values() if len(truths) < WORDING for truth in truths]
    groups = [truths for truths in worded.values() if len(truths) >= WORDING]
    return sum(max(Counter(truths).values()) for truths in [*groups, rare] if truths)


def _words(question: Question) -> str:
    turns = question.sample.turns
    return " ".join(turns[-1].text.replace(MARKER, " ").split()).lower() if turns else ""
