"""Accuracy of a model on a source's questions, in batches."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from neva.data.image import image_size
from neva.data.sample import MARKER, Encoded, Sample, SampleError
from neva.data.source import Source
from neva.evaluate.score import exact_match
from neva.infer.generate import Answer, Loaded, Sampling, generate_encoded, unanswerable


@dataclass(frozen=True, kw_only=True)
class Question:
    """One assistant turn to be answered, with all turns before it as they were given."""

    sample: Sample
    """Ends with the question."""
    truth: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A question with its answer."""

    question: Question
    answer: Answer
    right: bool


def questions(source: Source) -> Iterator[Question]:
    """Every assistant turn of every sample; the turns before it, true answers included, are its prompt."""
    for index in range(len(source)):
        sample = source[index]
        for number, turn in enumerate(sample.turns):
            if turn.role == "assistant":
                before = sample.turns[:number]
                shown = sum(t.text.count(MARKER) for t in before)
                yield Question(sample=replace(sample, turns=before, images=sample.images[:shown]), truth=turn.text)


def answer_in_batches(loaded: Loaded, samples: Sequence[Sample], sampling: Sampling, *, batch_size: int) -> list[Answer]:
    """The samples' answers, in their order; those of like length share a batch.

    A sample that cannot be encoded, or is too long for the model, has its error for an answer.
    """
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].images), sum(len(turn.text) for turn in samples[i].turns)))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        prompts: dict[int, Encoded] = {}
        for number in order[start : start + batch_size]:
            try:
                prompts[number] = _encode(loaded, samples[number])
            except SampleError as error:
                answers[number] = Answer(text="", tokens=(), finish="error", error=str(error))
        given = generate_encoded(loaded, list(prompts.values()), sampling)
        answers |= dict(zip(prompts, given, strict=True))
    return [answers[i] for i in range(len(samples))]


def _encode(loaded: Loaded, sample: Sample) -> Encoded:
    """A sample's prompt. SampleError for one that cannot be asked."""
    prompt = loaded.encoder.encode(sample, labels=False)
    if error := unanswerable(loaded, prompt):
        raise error
    return prompt


def evaluate(
    loaded: Loaded,
    source: Source,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    score: Callable[[str, str], bool] = exact_match,
    rank: int = 0,
    world: int = 1,
) -> list[Judged]:
    """Ask every question of the source and judge each answer.

    With ranks, every `world`-th question from number `rank` on. One that could not be asked counts
    as answered wrong; its answer's `error` says why.
    """
    asked = list(questions(source))[rank::world]
    answers = answer_in_batches(loaded, [q.sample for q in asked], sampling or Sampling(max_new_tokens=32), batch_size=batch_size)
    judged = []
    for question, answer in zip(asked, answers, strict=True):
        right = not answer.error and score(answer.text, question.truth)
        judged.append(Judged(question=question, answer=answer, right=right))
    return judged


def accuracy(judged: Sequence[Judged]) -> dict[str, float]:
    """Share of right answers per kind of sample (per source where samples have none)."""
    rights: dict[str, list[bool]] = defaultdict(list)
    for j in judged:
        rights[j.question.sample.kind or j.question.sample.source].append(j.right)
    return {kind: sum(row) / len(row) for kind, row in sorted(rights.items())}


def errors(judged: Sequence[Judged]) -> list[str]:
    """Why each question that could not be asked was not."""
    return [j.answer.error for j in judged if j.answer.error]


def best_blind(judged: Sequence[Judged]) -> dict[str, float]:
    """Per kind, the score of always giving that kind's commonest truth: what can be had without looking."""
    truths: dict[str, list[str]] = defaultdict(list)
    for j in judged:
        truths[j.question.sample.kind or j.question.sample.source].append(j.question.truth)
    return {kind: max(row.count(truth) for truth in set(row)) / len(row) for kind, row in sorted(truths.items())}


class Blanked:
    """A source whose images are black: what a model scores on it, it does without looking."""

    def __init__(self, source: Source):
        self.source, self.name = source, source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return replace(sample, images=tuple(Image.new("RGB", image_size(picture), (0, 0, 0)) for picture in sample.images))
