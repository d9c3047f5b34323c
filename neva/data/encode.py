"""Sample -> tokens, labels and tiles: the one way in which training, evaluation and serving make them.

Shapes: t tokens, n tiles, k memory tiles, h and w a tile's height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from neva.batch import IGNORE, IMAGE, IMAGE_END, IMAGE_START, NEWLINE, ImageLayout
from neva.data.image import check_shape, image_size, open_image, to_tiles
from neva.data.sample import MARKER, Encoded, Sample, SampleError
from neva.data.template import Piece, Template, check, ending, render
from neva.data.templates import find_template
from neva.data.tiling import FEWER, Tiling, all_tags, anyres_slots, tags, tiling
from neva.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What packing must know of a sample."""

    tokens: int
    tiles: int
    max_tiles: int = 0
    """The limit on an image's tiles at which it was measured; 0 is the layout's own."""
    whole: int = 0
    """Its tokens before it was cut to a row; 0 if it was not."""
    images: int = 0
    unread: tuple[str, ...] = ()
    """`Sample.unread`."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An image among a sample's tokens."""

    start: int
    """Position of its first token (a tag, a feature, the start vector); text before and after an image is not counted."""
    end: int
    size: tuple[int, int]
    """Width and height in pixels."""
    tiling: Tiling
    slots: tuple[tuple[int, ...], ...]
    """Position of each feature of each inline tile; -1 is not placed."""
    tagged: tuple[tuple[int, int], ...]
    """Where the tags of memory tiles stand in the sequence, if they do."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked, in full."""

    tokens: tuple[int, ...]
    text: str
    """All that the tokens spell, special ones as the vocabulary has them; `<image>` where the
    features of a tile stand in the sequence."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each image in pixels, upright."""


@dataclass
class Draft:
    """A sample's tokens, whether each carries loss, and its images."""

    tokens: list[int] = field(default_factory=list)
    marks: list[bool] = field(default_factory=list)
    images: list[Placed] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """What the tokens spell, in parts: `Prompt.text`."""
    begin: int = 0
    """Where the text begins: behind a start token, unless the tokenizer's own template wrote it."""

    def add(self, ids: Sequence[int], *, loss: bool = False) -> None:
        """Append tokens."""
        self.tokens += ids
        self.marks += [loss] * len(ids)

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return sum(image.tiling.tiles for image in self.images)

    def cut(self, length: int) -> "Draft":
        """The first `length` tokens or fewer: an image that does not fit whole goes, and all behind it.

        ValueError if no label is left. Example with images of two features (i): of [1 5 i i i i 7] a length of 4 or 5 keeps [1 5 i i].
        """
        if len(self.tokens) <= length:
            return self
        length = next((image.start for image in self.images if image.start < length < image.end), length)
        kept = [image for image in self.images if image.end <= length and image.start < length]
        if not any(self.marks[:length]):
            raise ValueError(_no_label(length))
        return Draft(tokens=self.tokens[:length], marks=self.marks[:length], images=kept)


@dataclass(frozen=True)
class Encoder:
    """Turns samples into tokens and tiles for one model. Picklable.

    Raises ValueError for an unknown template, for one that does not fit, and for tags that the tokenizer cannot spell.
    """

    tokenizer: Tokenizer
    template: str
    """A name, a Jinja text, or empty for the tokenizer's own."""
    system: str | None
    """System message in place of the template's own."""
    layout: ImageLayout
    date: str = ""
    """Day that a template's `strftime_now` tells, as YYYY-MM-DD; empty for today."""

    def __post_init__(self) -> None:
        check(self.chosen, images=self.layout.images, system=bool(self.system))
        check_tags(self.tokenizer, self.layout)

    @cached_property
    def chosen(self) -> Template:
        """The chat format."""
        return replace(find_template(self.template, self.tokenizer), date=self.date)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which a generation stops, besides the tokenizer's end token."""
        own = ending(self.chosen)
        return self.chosen.stops or ((own,) if own else ())

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which a generation stops: the tokenizer's end token, and stop texts that are one token (special ones decode to nothing)."""
        spelled = [self.tokenizer.encode(text, first=False) for text in self.stops]
        return frozenset([self.tokenizer.eos, *(ids[0] for ids in spelled if len(ids) == 1)])

    def encode(self, sample: Sample, *, labels: bool = True, length: int | None = None, max_tiles: int = 0) -> Encoded:
        """The sample's tokens, unshifted labels and tiles; labels=False gives the prompt to generate its last answer from.

        Labels stand on answers and what ends them. The ids of a prompt are those that training saw up to the answer.
        A sample of more than `length` tokens is cut; `max_tiles` is a stricter limit on an image's tiles than the layout's.
        Raises SampleError if the turns do not fit the images or the template, an image cannot be read, or no label is left.
        """
        try:
            draft = self._draft(sample, answer=labels, max_tiles=max_tiles)
            draft = draft if length is None else draft.cut(length)
            tiles = []
            for picture, placed in zip(sample.images, draft.images, strict=False):  # a caption template leaves out those of later turns
                image = open_image(picture)
                if image.size != placed.size:
                    raise ValueError(f"an image decodes to {image.size} but its header says {placed.size}: it is damaged; replace it")
                tiles.append(to_tiles(image, self.layout, max_tiles=max_tiles))
        except ValueError as error:
            raise _named(sample, error) from None
        ids = torch.tensor(draft.tokens, dtype=torch.int64)
        empty = torch.zeros(0, 3, self.layout.tile, self.layout.tile, dtype=torch.uint8)
        return Encoded(
            tokens=ids, labels=torch.where(torch.tensor(draft.marks, dtype=torch.bool), ids, IGNORE), tiles=torch.cat(tiles) if tiles else empty,
            group=sample.kind or sample.source, key=(sample.source, sample.id), **self._places(draft),
        )  # fmt: skip

    def prompt(self, sample: Sample) -> Prompt:
        """What `encode(sample, labels=False)` asks, from turns and image headers alone. Raises as
        `encode`."""
        try:
            draft = self._draft(sample, answer=False, max_tiles=0)
        except ValueError as error:
            raise _named(sample, error) from None
        return Prompt(
            tokens=tuple(draft.tokens),
            text="".join(draft.texts),
            sizes=tuple(image.size for image in draft.images),
        )

    def measure(self, sample: Sample, *, length: int | None = None, max_tiles: int = 0) -> Measure:
        """The lengths of `encode(sample)` with the same arguments, from turns and image headers alone. Raises as `encode`."""
        try:
            draft = self._draft(sample, answer=True, max_tiles=max_tiles)
            draft = draft if length is None else draft.cut(length)
        except ValueError as error:
            raise _named(sample, error) from None
        return Measure(
            tokens=len(draft.tokens),
            tiles=draft.tiles,
            max_tiles=max_tiles,
            images=len(draft.images),
            unread=sample.unread,
        )

    def fit(self, sample: Sample, *, length: int, tiles: int) -> Measure:
        """The sample measured with as many tiles an image as let it have at most `length` tokens and `tiles` tiles in all.

        Where none do, with the fewest that still bring it nearer: tiles of a memory take no tokens, and are not given up for some.
        """
        beyond = lambda m: (max(m.tokens - length, 0), max(m.tiles - tiles, 0))  # noqa: E731
        best = self.measure(sample)
        for most in (limit for limit in FEWER if self.layout.min_tiles <= limit < self.layout.max_tiles):
            if not any(beyond(best)):
                break
            found = self.measure(sample, max_tiles=most)
            best = found if beyond(found) < beyond(best) else best
        return best

    def _draft(self, sample: Sample, *, answer: bool, max_tiles: int) -> Draft:
        """Ids, whether each carries loss, and where images stand. Text between images and end tokens is tokenised in one go, as a server sees it."""
        markers = sum(turn.text.count(MARKER) for turn in sample.turns if turn.role == "user")
        if markers != len(sample.images):
            raise ValueError(f"its turns hold {markers} {MARKER} but it has {len(sample.images)} image(s): add or remove {MARKER}, or the image")
        if sample.images and not self.layout.images:
            raise ValueError("the model has no vision encoder: leave the image out, or use a model with one")
        if self.chosen.caption and not answer and not sample.images:
            raise ValueError(f"the template {self.template!r} asks with an image alone and this question has none: add one, or train with another")
        if self.chosen.caption and not answer and sum(turn.role == "user" for turn in sample.turns) > 1:
            asks = f"the template {self.template!r} asks with the images of a first question alone"
            raise ValueError(f"{asks} and this is a later one: ask it by itself, or train with another")
        pieces = render(self.chosen, sample.turns, system=self.system, answer=answer)
        draft, span = Draft(), []
        # The tokenizer's own template says itself how a text begins, but with images transformers' processors add the start token.
        if self.tokenizer.bos is not None and (self.template or self.layout.images) and not (pieces and pieces[0].what == "start"):
            draft.add([self.tokenizer.bos])
            draft.texts.append(self.tokenizer.spell(self.tokenizer.bos))
        draft.begin = len(draft.tokens)
        for piece in pieces:
            if piece.what == "text":
                span.append(piece)
            elif piece.what == "image":
                span.append(Piece(text=self.layout.image_prefix))
                size = image_size(sample.images[len(draft.images)])
                check_shape(size, self.layout)
                self._image(draft, span, size, tiling(size, self.layout, max_tiles=max_tiles))
                span = [Piece(text=self.layout.image_suffix)]
            else:
                self._flush(draft, span)
                ids = self._special(piece)
                draft.add(ids, loss=piece.loss)
                draft.texts += map(self.tokenizer.spell, ids)
                span = []
                if piece.what == "start" and piece is pieces[0] and self.template:
                    draft.begin = len(draft.tokens)
        self._flush(draft, span)
        if answer and not any(draft.marks):
            raise ValueError("no token carries loss: its answers are empty")
        return draft

    def _image(self, draft: Draft, span: list[Piece], size: tuple[int, int], found: Tiling) -> None:
        """Appends the text before an image, then its tags, features and vectors."""
        layout, p = self.layout, self.layout.tokens_per_tile
        texts = tags(found, layout)
        if layout.tag_tokens == "joined" and texts[0]:
            span = [*span, Piece(text=texts[0])]
        self._flush(draft, span)
        start, slots, tagged = len(draft.tokens), [], []
        if layout.aspect == "anyres":
            places, features = anyres_slots(size, found, layout)
            slots = torch.where(places < 0, -1, places + start).tolist()
            draft.add([IMAGE if feature else NEWLINE for feature in features])
            draft.texts.append(MARKER)
        else:
            draft.add([IMAGE_START] if layout.start_end else [])
            for number, text in enumerate(texts):
                inline = self._inline(found, number)
                # Beside memory tiles that have company inline, tags are keys; else they are what a token names a tile by.
                if text and (inline or layout.inline == "none") and not (layout.tag_tokens == "joined" and number == 0):
                    draft.add(self._tag(text))
                    draft.texts.append(text)
                if inline:
                    draft.texts.append(MARKER)
                    slots.append(range(len(draft.tokens), len(draft.tokens) + p))
                    draft.add([IMAGE] * p)
                else:
                    tagged.append((len(draft.tokens) - len(self._tag(text)), len(draft.tokens)))
            draft.add([IMAGE_END] if layout.start_end else [])
        draft.images.append(
            Placed(start=start, end=len(draft.tokens), size=size, tiling=found, slots=tuple(map(tuple, slots)), tagged=tuple(tagged))
        )  # fmt: skip

    def _inline(self, found: Tiling, number: int) -> bool:
        """Does a tile stand in the sequence?"""
        return self.layout.inline == "all" or (self.layout.inline == "thumbnail" and number == found.whole)

    def _tag(self, text: str) -> list[int]:
        """A tag's ids, tokenised by itself."""
        if text not in self._tags:
            self._tags[text] = self.tokenizer.encode(text) if text else []
        return self._tags[text]

    @cached_property
    def _tags(self) -> dict[str, list[int]]:
        return {}

    def _places(self, draft: Draft) -> dict[str, Any]:
        """Where tiles go: fields of `Encoded`."""
        layout, first = self.layout, 0
        inline: list[int] = []
        memory: list[int] = []
        names: list[list[int]] = []
        starts: list[int] = []
        sees = torch.zeros(len(draft.tokens) + 1, 2, dtype=torch.int64)
        for image in draft.images:
            texts, before = tags(image.tiling, layout), len(memory)
            starts.append(before)
            for number, text in enumerate(texts):
                (inline if self._inline(image.tiling, number) else memory).append(first + number)
                if layout.inline == "thumbnail" and number != image.tiling.whole:
                    names.append(self._tag(text))
            first += len(texts)
            # In NVLM-H an image's own tokens see its tiles; in NVLM-X its tags see their own tile, and what follows sees all.
            sees[image.end if layout.inline == "none" else image.start :] = torch.tensor(
                [before if layout.cross_visible == "latest" else 0, len(memory)]
            )
            for number, (start, end) in enumerate(image.tagged if layout.inline == "none" else ()):
                sees[start:end] = torch.tensor([before + number, before + number + 1])
        sees = torch.where(sees[:, :1] < sees[:, 1:], sees, 0)
        longest = max(map(len, names), default=0)
        slots = [places for image in draft.images for places in image.slots]
        return {
            "inline": torch.tensor(inline, dtype=torch.int64),
            "slots": torch.tensor(slots, dtype=torch.int64).view(len(inline), layout.tokens_per_tile),
            "memory": torch.tensor(memory, dtype=torch.int64),
            "memory_starts": torch.tensor([start for start, end in pairwise([*starts, len(memory)]) for _ in range(start, end)], dtype=torch.int64),
            "memory_tags": torch.tensor([ids + [-1] * (longest - len(ids)) for ids in names], dtype=torch.int64).view(len(memory), longest),
            "sees": sees[:-1],
            "next_sees": (int(sees[-1, 0]), int(sees[-1, 1])),
        }

    def _special(self, piece: Piece) -> list[int]:
        """The start or the end token. A template may write the start of a tokenizer that adds none by itself, or has none."""
        id = self.tokenizer.eos if piece.what == "end" else self.tokenizer.start
        return [] if id is None else [id]

    def _flush(self, draft: Draft, span: list[Piece]) -> None:
        """Appends the ids of text pieces tokenised together.

        A label starts behind the ids of the text before it tokenised alone: this is the prompt that
        a server would send. Where an id would span that border the label is tokenised by itself, so
        that for any tokenizer training sees the ids of the prompt.
        """
        at = len(draft.tokens)
        behind_image = bool(draft.images) and draft.images[-1].end == at
        first = at == draft.begin or (behind_image and self.tokenizer.image_parts)
        for number in range(1, len(span)):
            if span[number].loss and not span[number - 1].loss:
                before = self.tokenizer.encode(
                    "".join(piece.text for piece in span[:number]),
                    first=first,
                )
                whole = self.tokenizer.encode("".join(piece.text for piece in span), first=first)
                if whole[: len(before)] != before:
                    self._flush(draft, span[:number])
                    self._flush(draft, span[number:])
                    return
        ids = self.tokenizer.encode("".join(piece.text for piece in span), first=first)
        flags, start, before = [False] * len(ids), 0, ""
        for number, piece in enumerate(span):
            if number and piece.loss != span[number - 1].loss:
                start = _common(ids, self.tokenizer.encode(before, first=first))
            flags[start:] = [piece.loss] * (len(ids) - start)
            before += piece.text
        draft.tokens += ids
        draft.marks += flags
        draft.texts.append(before)


def check_tags(tokenizer: Tokenizer, layout: ImageLayout) -> None:
    """ValueError for text around images and tiles that the tokenizer cannot tell apart from other text: unknown tokens would stand for all tags."""
    names = [text for text in all_tags(layout) if text]
    for text in filter(None, (*names, layout.image_prefix, layout.image_suffix)):
        ids = tokenizer.encode(text)
        spelled = tokenizer.decode(ids)
        alike = next((other for other in names if other != text and tokenizer.encode(other) == ids), "")
        if alike or (len(ids) != 1 and spelled.strip() != text.strip()):  # one id: a token of its own, which decoding leaves out
            fix = "image.tags=none" if text in names else "image.prefix= image.suffix="
            why = f"it has the ids of {alike!r}" if alike else f"it comes back as {spelled!r}"
            raise ValueError(f"the tokenizer cannot spell {text!r}, which stands beside images: {why}; set {fix}, or take one that knows its letters")


def _named(sample: Sample, error: ValueError) -> SampleError:
    return SampleError(sample.source, sample.id, str(error))


def _no_label(length: int) -> str:
    return f"no label is left in its first {length} tokens: raise batch.seq_length, or leave over-long samples out with data.over_long=drop"


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
