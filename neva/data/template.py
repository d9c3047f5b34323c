"""Chat formats: turns -> pieces of text and images, with which of them carry loss.

One mechanism: a format is a Jinja template, ours (`templates.py`) or a tokenizer's own, in which
`{% generation %}` marks what the assistant says. Where a template marks nothing, the same is found
by rendering the conversation turn by turn: what an answer adds to the prompt before it carries
loss. That needs each prompt to be the beginning of the next, which is checked for every
conversation. What a template that is not ours takes and loses is found by probing it (`forms.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from neva.data.drawing import CLOSE_SIGN, END_SIGN, IMAGE_SIGN, OPEN_SIGN, START_SIGN
from neva.data.forms import MARKS, SIGNS, Form, find_form, write
from neva.data.sample import MARKER, Turn


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat format."""

    jinja: str
    """Gets `messages` ({"role", "content"}), `add_generation_prompt`, `bos_token` and `eos_token`,
    as transformers' templates do."""
    system: str = ""
    """Message before the first turn, where neither the caller nor the sample brings one; empty for
    none."""
    stops: tuple[str, ...] = ()
    """Texts at which a generation stops, besides the tokenizer's end token."""
    caption: bool = False
    """Take the first exchange only, and of its question only the images."""
    ours: bool = False
    """It takes texts and is right as it is: tests hold it to its makers' own ids. Any other is
    probed."""
    own: bool = False
    """It came with the tokenizer or the model, which saw prompts as transformers makes them with
    it."""
    specials: tuple[str, ...] = ()
    """Texts that are one token of the tokenizer each: such a one ends an answer."""
    date: str = ""
    """Day that `strftime_now` tells, as YYYY-MM-DD; empty for today."""

    @property
    def form(self) -> Form:
        """How it takes messages. ValueError naming what it loses."""
        return Form(as_marked=True) if self.ours else find_form(self.jinja, self.specials, self.own)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of the rendered conversation."""

    text: str = ""
    what: Literal["text", "image", "start", "end"] = "text"
    """`start` and `end` are the tokenizer's own tokens."""
    loss: bool = False


def render(template: Template, turns: Sequence[Turn], *, system: str | None = None, answer: bool = True) -> tuple[Piece, ...]:
    """The conversation as pieces; with answer=False the prompt of a generation: the last answer is
    gone.

    The system message is the sample's own turn, else `system`, else the template's; an empty one is
    left out. Raises ValueError if the turns do not alternate, nothing is left to answer, or the
    template refuses, loses one of them or does not fit.

    Example (v1, system=""): user "<image>\\nHi", assistant "Yes" gives
        "USER: " image "\\nHi ASSISTANT:" | " Yes" end      (what follows the bar carries loss)
    """
    own = turns[0].text if turns and turns[0].role == "system" else None
    talk = list(turns[1:] if own is not None else turns)
    if template.caption:
        talk = _caption(talk)
    if not answer and talk and talk[-1].role == "assistant":
        talk.pop()
    if [turn.role for turn in talk] != [("user", "assistant")[i % 2] for i in range(len(talk))] or len(talk) % 2 != (0 if answer else 1) or not talk:
        wanted = "end with an answer" if answer else "hold a question"
        raise ValueError(f"its turns are {', '.join(turn.role for turn in turns) or 'none'}: they must alternate, user first, and {wanted}")
    form = template.form
    images = sum(turn.text.count(MARKER) for turn in talk if turn.role == "user")
    message = next(text for text in (own, system, template.system) if text is not None)
    if message:
        talk.insert(0, Turn(role="system", text=message))
    for fault in (form.no_system if message else "", form.no_images if images else ""):
        if fault:
            raise ValueError(fault)
    pieces = _pieces(write(template.jinja, form, talk, prompt=not answer, date=template.date))
    there = sum(piece.what == "image" for piece in pieces)
    if there != images:
        fault = f"the chat template writes {there} image(s) of its {images}"
        raise ValueError(f"{fault}; choose another with data.template")
    return pieces


def check(template: Template, *, images: bool = False, system: bool = False) -> None:
    """ValueError, naming what is lost, unless the template keeps every message and labels its
    answers and an end of each.

    With `images` and `system` also where it loses those: not every model and recipe has them.
    Proven on probes, see `forms.py`.
    """
    form = template.form
    for fault in (
        form.no_images if images else "",
        form.no_system if system else "",
    ):
        if fault:
            raise ValueError(fault)


def prompts(template: Template, talks: Sequence[Sequence[Turn]], form: Form) -> list[str]:
    """What is written, in a form that need not be proven, to ask for an answer in each
    conversation: images and end tokens as signs, no start token at the front.
    ValueError where it refuses."""
    if template.ours:
        drawn = [_spelled(render(template, turns, answer=False)) for turns in talks]
    else:
        drawn = [write(template.jinja, form, turns, prompt=True) for turns in talks]
    return [MARKS.sub("", text).lstrip(START_SIGN) for text in drawn]


def ending(template: Template) -> str:
    """The text that the template ends an answer with, without line breaks; empty if that is the
    tokenizer's end token."""
    turns = (Turn(role="user", text="Aa?"), Turn(role="assistant", text="Bb."))
    learnt = _spelled([piece for piece in render(template, turns, system="") if piece.loss])
    tail = learnt[learnt.rfind("Bb.") + len("Bb.") :]
    return "" if END_SIGN in tail else tail.strip()


def starts(template: Template) -> bool:
    """Does the template write the tokenizer's start token itself?"""
    turns = (Turn(role="user", text="Aa?"), Turn(role="assistant", text="Bb."))
    return render(template, turns, system="")[0].what == "start"


def _pieces(text: str) -> tuple[Piece, ...]:
    kinds: dict[str, Literal["image", "start", "end"]] = {
        IMAGE_SIGN: "image",
        START_SIGN: "start",
        END_SIGN: "end",
    }
    pieces, loss = [], False
    for part in SIGNS.split(text):
        if part in (OPEN_SIGN, CLOSE_SIGN):
            loss = part == OPEN_SIGN
        elif part in kinds:
            pieces.append(Piece(what=kinds[part], loss=loss))
        elif part:
            pieces.append(Piece(text=part, loss=loss))
    return tuple(pieces)


def _spelled(pieces: Sequence[Piece]) -> str:
    signs = {"image": IMAGE_SIGN, "start": START_SIGN, "end": END_SIGN}
    return "".join(signs.get(piece.what, piece.text) for piece in pieces)


def _caption(talk: list[Turn]) -> list[Turn]:
    """The first exchange, its question reduced to its images; later turns go, with theirs."""
    return [Turn(role=turn.role, text=MARKER * turn.text.count(MARKER)) if turn.role == "user" else turn for turn in talk[:2]]
