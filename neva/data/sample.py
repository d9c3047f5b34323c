"""The stages of one sample: turns and undecoded images, then tokens and tiles.

Shapes: t tokens, n tiles, h and w a tile's height and width, m inline tiles, k memory tiles, p tokens per tile, g longest tag.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from neva.batch import IMAGE
from neva.config import shown

MARKER = "<image>"
"""What stands in a turn's text where an image belongs."""

Picture = Path | bytes | Image.Image
"""An image that is not decoded yet: a file, a file's content, or a Pillow image."""


class SampleError(ValueError):
    """A sample that cannot be used. Says which one, why, and the fix."""

    def __init__(self, source: str, id: str, message: str) -> None:
        super().__init__(source, id, message)
        self.source, self.id, self.message = source, id, message

    def __str__(self) -> str:
        id, source = (shown(name).replace("\n", "\\n") for name in (self.id, self.source))
        return f"sample '{id}' of '{source}': {self.message}"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side says; `text` holds `<image>` where an image stands."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation as a source gives it: nothing tokenised, no image decoded."""

    source: str
    """Name of the data set."""
    id: str
    kind: str = ""
    """What the sample's loss is reported under; empty: the source's name."""
    turns: tuple[Turn, ...]
    images: tuple[Picture, ...] = ()
    """In the order of the turns' `<image>` markers."""
    unread: tuple[str, ...] = ()
    """Keys of its row that say nothing to the source, in which something stands."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A sample as the model takes it, image placeholders at their final count."""

    tokens: Int64[Tensor, " t"]
    """Ids; `IMAGE` at image features, `VECTORS - v` at learned vectors."""
    labels: Int64[Tensor, " t"]
    """Not shifted: the token itself where it carries loss, else `IGNORE`."""
    tiles: UInt8[Tensor, "n 3 h w"]
    inline: Int64[Tensor, " m"]
    """Tiles whose features stand in the sequence."""
    slots: Int64[Tensor, "m p"]
    """Position of each of their features; -1 is not placed."""
    memory: Int64[Tensor, " k"]
    """Tiles that are cross-attention memory."""
    memory_starts: Int64[Tensor, " k"]
    """Which of these is the first of its image."""
    memory_tags: Int64[Tensor, "k g"]
    """Ids of their tags, -1 pads; g is 0 where tags stand in the sequence."""
    sees: Int64[Tensor, "t 2"]
    """Half-open range of memory tiles that each token may attend to."""
    next_sees: tuple[int, int]
    """The range of a token that would follow, as in a generation."""
    group: str
    """What the loss is reported under: the sample's kind, or its source."""
    key: tuple[str, str]
    """(source, id)."""

    @staticmethod
    def plain(tokens: Tensor, labels: Tensor, tiles: Tensor, *, group: str = "", key: tuple[str, str] = ("", "")) -> "Encoded":
        """A sample with all its tiles in the sequence, at `IMAGE` one after another."""
        none, n = torch.zeros(0, dtype=torch.int64), len(tiles)
        slots = torch.nonzero(tokens == IMAGE).view(n, -1) if n else none.view(0, 0)
        return Encoded(
            tokens=tokens, labels=labels, tiles=tiles, inline=torch.arange(n), slots=slots, memory=none, memory_starts=none,
            memory_tags=none.view(0, 0), sees=torch.zeros(len(tokens), 2, dtype=torch.int64), next_sees=(0, 0), group=group, key=key,
        )  # fmt: skip
