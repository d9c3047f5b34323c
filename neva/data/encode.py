"""Sample -> tokens, labels and tiles: the one way in which training, evaluation and serving make them.

Shapes: t tokens, n tiles, h and w a tile's height and width.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from neva.batch import IGNORE, IMAGE, IMAGE_END, IMAGE_START, ImageLayout
from neva.data.image import image_size, open_image, to_tiles
from neva.data.sample import MARKER, Encoded, Picture, Sample, SampleError
from neva.data.template import Piece, check, ending, render
from neva.data.templates import find_template
from neva.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What packing must know of a sample."""

    tokens: int
    tiles: int


@dataclass(frozen=True)
class Encoder:
    """Turns samples into tokens and tiles for one model. Picklable. Raises ValueError for an unknown template, and for one that does not fit."""

    tokenizer: Tokenizer
    template: str
    """A name, a Jinja text, or empty for the tokenizer's own."""
    system: str | None
    """System message in place of the template's own."""
    layout: ImageLayout

    def __post_init__(self) -> None:
        check(find_template(self.template, self.tokenizer))

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which a generation stops, besides the tokenizer's end token."""
        template = find_template(self.template, self.tokenizer)
        own = ending(template)
        return template.stops or ((own,) if own else ())

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which a generation stops: the tokenizer's end token, and stop texts that are one token (special ones decode to nothing)."""
        spelled = [self.tokenizer.encode(text, first=False) for text in self.stops]
        return frozenset([self.tokenizer.eos, *(ids[0] for ids in spelled if len(ids) == 1)])

    def encode(self, sample: Sample, *, labels: bool = True) -> Encoded:
        """The sample's tokens, unshifted labels and tiles; labels=False gives the prompt to generate its last answer from.

        Labels stand on answers and what ends them. The ids of a prompt are those that training saw up to the answer.
        Raises SampleError if the turns do not fit the images or the template, or an image cannot be read.
        """
        try:
            tokens, marks = self._tokens(sample, answer=labels)
            tiles = [to_tiles(open_image(picture), self.layout) for picture in self._shown(sample, tokens)]
        except ValueError as error:
            raise _named(sample, error) from None
        ids = torch.tensor(tokens, dtype=torch.int64)
        return Encoded(
            tokens=ids,
            labels=torch.where(torch.tensor(marks, dtype=torch.bool), ids, IGNORE),
            tiles=torch.cat(tiles) if tiles else torch.zeros(0, 3, self.layout.tile, self.layout.tile, dtype=torch.uint8),
            group=sample.kind or sample.source,
            key=(sample.source, sample.id),
        )

    def measure(self, sample: Sample, *, length: int | None = None) -> Measure:
        """The lengths of `encode(sample)`, truncated to `length` if given, from turns and image headers alone. Raises as `encode`."""
        try:
            tokens, marks = self._tokens(sample, answer=True)
            for picture in self._shown(sample, tokens):
                image_size(picture)
        except ValueError as error:
            raise _named(sample, error) from None
        if length is not None:
            tokens = tokens[: _cut(tokens, length, self.layout)]
            if not any(marks[: len(tokens)]):
                raise SampleError(sample.source, sample.id, _no_label(length))
        return Measure(tokens=len(tokens), tiles=tokens.count(IMAGE) // self.layout.tokens_per_tile)

    def truncate(self, encoded: Encoded, length: int) -> Encoded:
        """The sample's first `length` tokens or fewer: an image that does not fit whole goes, and all behind it.

        Raises SampleError if no label is left.
        """
        cut = _cut(encoded.tokens.tolist(), length, self.layout)
        tokens, labels = encoded.tokens[:cut], encoded.labels[:cut]
        if not bool((labels != IGNORE).any()):
            raise SampleError(*encoded.key, _no_label(length))
        tiles = int((tokens == IMAGE).sum()) // self.layout.tokens_per_tile
        return replace(encoded, tokens=tokens, labels=labels, tiles=encoded.tiles[:tiles])

    def _tokens(self, sample: Sample, *, answer: bool) -> tuple[list[int], list[bool]]:
        """Ids, and whether each carries loss. Text between images and end tokens is tokenised in one go, as a server sees it."""
        markers = sum(turn.text.count(MARKER) for turn in sample.turns if turn.role == "user")
        if markers != len(sample.images):
            raise ValueError(f"its turns hold {markers} {MARKER} but it has {len(sample.images)} image(s): add or remove {MARKER}, or the image")
        if sample.images and not self.layout.images:
            raise ValueError("the model has no vision encoder: leave the image out, or use a model with one")
        template = find_template(self.template, self.tokenizer)
        if template.caption and not answer and not sample.images:
            raise ValueError(f"the template {self.template!r} asks with an image alone and this question has none: add one, or train with another")
        pieces = render(template, sample.turns, system=self.system, answer=answer)
        # The tokenizer's own template says itself how a text begins, but with images transformers' processors add the start token.
        start = [self.tokenizer.bos] if self.tokenizer.bos is not None and (self.template or self.layout.images) else []
        tokens = [] if pieces and pieces[0].what == "start" else start
        marks, begin = [False] * len(tokens), len(tokens)
        span: list[Piece] = []
        for piece in self._spelled(pieces):
            if piece.what == "text":
                span.append(piece)
                continue
            self._flush(span, tokens, marks, first=len(tokens) == begin)
            span = []
            added = self._image() if piece.what == "image" else self._special(piece)
            tokens += added
            marks += [piece.loss] * len(added)
        self._flush(span, tokens, marks, first=len(tokens) == begin)
        if answer and not any(marks):
            raise ValueError("no token carries loss: its answers are empty")
        return tokens, marks

    def _shown(self, sample: Sample, tokens: list[int]) -> tuple[Picture, ...]:
        """The images that the tokens have places for: a caption template leaves out those of later turns."""
        return sample.images[: tokens.count(IMAGE) // self.layout.tokens_per_tile]

    def _spelled(self, pieces: tuple[Piece, ...]) -> list[Piece]:
        """The pieces with the layout's text around each image."""
        around = (Piece(text=self.layout.image_prefix), Piece(text=self.layout.image_suffix))
        return [part for piece in pieces for part in ((around[0], piece, around[1]) if piece.what == "image" else (piece,))]

    def _special(self, piece: Piece) -> list[int]:
        """The start or the end token. A template may write the start of a tokenizer that adds none by itself, or has none."""
        id = self.tokenizer.eos if piece.what == "end" else self.tokenizer.start
        return [] if id is None else [id]

    def _image(self) -> list[int]:
        features = [IMAGE] * self.layout.tokens_per_tile
        return [IMAGE_START, *features, IMAGE_END] if self.layout.start_end else features

    def _flush(self, span: list[Piece], tokens: list[int], marks: list[bool], *, first: bool) -> None:
        """Appends the ids of text pieces tokenised together; `first` ones stand at the beginning.

        A piece starts at the first id in which the whole differs from the text before that piece tokenised alone: this is the
        prompt that a server would send, and it holds for any tokenizer, also where an id spans the border.
        """
        ids = self.tokenizer.encode("".join(piece.text for piece in span), first=first)
        flags, start, before = [False] * len(ids), 0, ""
        for number, piece in enumerate(span):
            if number and piece.loss != span[number - 1].loss:
                start = _common(ids, self.tokenizer.encode(before, first=first))
            flags[start:] = [piece.loss] * (len(ids) - start)
            before += piece.text
        tokens += ids
        marks += flags


def _named(sample: Sample, error: ValueError) -> SampleError:
    return SampleError(sample.source, sample.id, str(error))


def _no_label(length: int) -> str:
    return f"no label is left in its first {length} tokens: raise batch.seq_length, or leave over-long samples out with data.over_long=drop"


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cut(tokens: list[int], length: int, layout: ImageLayout) -> int:
    """Where to cut so that at most `length` tokens are left and no image is cut in two.

    Example with images of two features (i): of [1 5 i i i i 7] a length of 4 or 5 keeps [1 5 i i].
    """
    if len(tokens) <= length:
        return len(tokens)
    edge = 1 if layout.start_end else 0
    inside = tokens[:length].count(IMAGE) % layout.tokens_per_tile  # features of the image that the cut falls into
    if inside:
        return length - inside - edge
    if tokens[length] == IMAGE_END:
        return length - layout.tokens_per_tile - edge
    return length - 1 if length and tokens[length - 1] == IMAGE_START else length
