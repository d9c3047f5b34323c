"""Chat formats: turns -> pieces of text and images, with which of them carry loss. One mechanism, formats are its values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from neva.data.sample import MARKER, Turn


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat format. An exchange is rendered as `user` + message + `assistant` + `space` + answer + the end."""

    system: str = ""
    """Message before the first turn, where neither the caller nor the sample brings one; empty for none."""
    system_end: str = ""
    """After a system message."""
    user: str = ""
    assistant: str = ""
    """Ends the prompt of a generation; what follows it carries loss."""
    space: str = ""
    """Between `assistant` and the answer."""
    end: str | None = None
    """Text that ends an answer; None is the tokenizer's end token."""
    scope: Literal["chat", "caption"] = "chat"
    """`caption` takes the first exchange only, and of its question only the images."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which a generation stops, besides the tokenizer's end token."""
        return () if self.end is None else (self.end,)


TEMPLATES: dict[str, Template] = {
    "plain": Template(end="\n", scope="caption"),
    "v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system_end=" ",
        user="USER: ",
        assistant=" ASSISTANT:",
        space=" ",
    ),
}
"""LLaVA-1.5's formats: `plain` of its pretraining, and `v1` (conv_vicuna_v1) of its fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of the rendered conversation."""

    text: str = ""
    what: Literal["text", "image", "end"] = "text"
    """`end` is the tokenizer's end token."""
    loss: bool = False


def find_template(name: str) -> Template:
    """The template of a name. Raises ValueError for an unknown one."""
    if name not in TEMPLATES:
        raise ValueError(f"no template '{name}': there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(template: Template, turns: Sequence[Turn], *, system: str | None = None, answer: bool = True) -> tuple[Piece, ...]:
    """The conversation as pieces; with answer=False the prompt of a generation: the last answer gone, ends with `assistant`.

    The system message is the sample's own turn, else `system`, else the template's; an empty one is left out.
    Raises ValueError if the turns do not alternate, or nothing is left to answer.

    Example (v1, system=""): user "<image>\\nHi", assistant "Yes" gives
        "USER: " image "\\nHi ASSISTANT:" | " Yes" end      (what follows the bar carries loss)
    """
    own = turns[0].text if turns and turns[0].role == "system" else None
    talk = list(turns[1:] if own is not None else turns)
    if template.scope == "caption":
        talk = _caption(talk)
    if not answer and talk and talk[-1].role == "assistant":
        talk.pop()
    if [turn.role for turn in talk] != [("user", "assistant")[i % 2] for i in range(len(talk))] or len(talk) % 2 != (0 if answer else 1) or not talk:
        wanted = "end with an answer" if answer else "hold a question"
        raise ValueError(f"its turns are {', '.join(turn.role for turn in turns) or 'none'}: they must alternate, user first, and {wanted}")
    message = next(text for text in (own, system, template.system) if text is not None)
    pieces = [Piece(text=message + template.system_end)] if message else []
    for turn in talk:
        pieces += _question(template, turn.text) if turn.role == "user" else _answer(template, turn.text)
    return tuple(piece for piece in pieces if piece.text or piece.what != "text")


def _caption(talk: list[Turn]) -> list[Turn]:
    """The first exchange, its question reduced to its images; later turns go, with theirs."""
    return [Turn(role=turn.role, text=MARKER * turn.text.count(MARKER)) if turn.role == "user" else turn for turn in talk[:2]]


def _question(template: Template, text: str) -> list[Piece]:
    """A user turn up to the prompt's end.

    As in LLaVA's preprocess_multimodal, the image of a turn that holds one is moved to its front and followed by a newline.
    Where a turn holds several, LLaVA would lose all but one; here they stay where they stand.
    """
    if MARKER in text and template.scope == "chat":
        text = text.strip()
        if text.count(MARKER) == 1:
            text = (MARKER + "\n" + text.replace(MARKER, "").strip()).strip()
    pieces = [Piece(text=template.user)]
    for number, part in enumerate(text.split(MARKER)):
        pieces += ([Piece(what="image")] if number else []) + [Piece(text=part)]
    return [*pieces, Piece(text=template.assistant)]


def _answer(template: Template, text: str) -> list[Piece]:
    end = Piece(what="end", loss=True) if template.end is None else Piece(text=template.end, loss=True)
    return [Piece(text=template.space + text, loss=True), end]
