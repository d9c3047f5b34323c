"""The questions of a source, and what became of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from neva.data.image import image_size
from neva.data.sample import MARKER, Sample, SampleError
from neva.data.source import Source
from neva.infer.generate import Answer


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question to be answered, with all turns before it as they were given; or a row that cannot
    be read."""

    sample: Sample
    """Ends with the question. It has no turns where the row cannot be read."""
    truth: str | None
    """The right answer, None where the source holds none."""
    row: int = 0
    """Number of its row in the source, from 0."""
    error: SampleError | None = None
    """Why the row cannot be read."""

    @property
    def turn(self) -> int:
        """Number of the turn that answers it, from 0."""
        return len(self.sample.turns)

    @property
    def kind(self) -> str:
        """What its score is reported under: the sample's kind, else its source."""
        return self.sample.kind or self.sample.source


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A question with its answer."""

    question: Question
    answer: Answer
    right: bool
    """False where it could not be asked; where there is no truth it says nothing."""
    prompt: str = ""
    """All that the model was asked, as `Encoder.prompt` spells it."""
    prompt_tokens: int = 0
    image_sizes: tuple[tuple[int, int], ...] = ()
    """Width and height in pixels of the images in the prompt."""
    blank: bool = False
    """Were its images black?"""


def questions(source: Source, *, each: Literal["answer", "last"] = "answer") -> Iterator[Question]:
    """Every assistant turn of every sample as a question, and a question that nothing answers; or
    with "last" each sample's last question alone.

    The turns before it, true answers included, are its prompt. A row that cannot be read gives its
    error in place of its questions.
    """
    for row in range(len(source)):
        try:
            sample = source[row]
        except SampleError as error:
            unread = Sample(source=error.source, id=error.id, turns=())
            yield Question(sample=unread, truth=None, row=row, error=error)
            continue
        found = [n for n, turn in enumerate(sample.turns) if turn.role == "assistant"]
        if sample.turns and sample.turns[-1].role == "user":
            found.append(len(sample.turns))
        for number in found[-1:] if each == "last" else found:
            yield _question(sample, number, row)


def suited(asked: Iterable[Question], *, caption: bool) -> list[Question]:
    """The questions that a chat format asks: of a caption format only first ones with an image, as
    it trains on no others. Rows that cannot be read stay."""
    return [q for q in asked if not caption or q.error is not None or _is_caption(q)]


def _question(sample: Sample, number: int, row: int) -> Question:
    before = sample.turns[:number]
    shown = sum(turn.text.count(MARKER) for turn in before)
    truth = sample.turns[number].text if number < len(sample.turns) else None
    asked = replace(sample, turns=before, images=sample.images[:shown])
    return Question(sample=asked, truth=truth, row=row)


def _is_caption(question: Question) -> bool:
    users = sum(turn.role == "user" for turn in question.sample.turns)
    return users == 1 and bool(question.sample.images)


def blanked(sample: Sample) -> Sample:
    """The sample with black images of the same sizes: what a model answers then, it answers without
    looking. SampleError where an image's size cannot be read."""
    try:
        sizes = [image_size(picture) for picture in sample.images]
    except ValueError as error:
        raise SampleError(sample.source, sample.id, str(error)) from None
    black = (Image.new("RGB", size, (0, 0, 0)) for size in sizes)
    return replace(sample, images=tuple(black))
