"""Chat formats: turns -> pieces of text and images, with which of them carry loss.

One mechanism: a format is a Jinja template, ours (`templates.py`) or a tokenizer's own, in which `{% generation %}` marks what the assistant
says. Where a template marks nothing, the same is found by rendering the conversation turn by turn: what an answer adds to the prompt
before it carries loss. That needs each prompt to be the beginning of the next, which is checked for every conversation.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from neva.data.sample import MARKER, Turn

# What stands for an image, the start and the end token, and the bounds of an answer while a template is rendered: characters for private use.
IMAGE_SIGN, START_SIGN, END_SIGN, OPEN_SIGN, CLOSE_SIGN = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004"
SIGNS = re.compile(f"([{IMAGE_SIGN}-{CLOSE_SIGN}])")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat format."""

    jinja: str
    """Gets `messages` ({"role", "content"}), `add_generation_prompt`, `bos_token` and `eos_token`, as transformers' templates do."""
    system: str = ""
    """Message before the first turn, where neither the caller nor the sample brings one; empty for none."""
    stops: tuple[str, ...] = ()
    """Texts at which a generation stops, besides the tokenizer's end token."""
    caption: bool = False
    """Take the first exchange only, and of its question only the images."""

    @property
    def marked(self) -> bool:
        """Does the template itself mark what carries loss?"""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.jinja) is not None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of the rendered conversation."""

    text: str = ""
    what: Literal["text", "image", "start", "end"] = "text"
    """`start` and `end` are the tokenizer's own tokens."""
    loss: bool = False


def render(template: Template, turns: Sequence[Turn], *, system: str | None = None, answer: bool = True) -> tuple[Piece, ...]:
    """The conversation as pieces; with answer=False the prompt of a generation: the last answer is gone.

    The system message is the sample's own turn, else `system`, else the template's; an empty one is left out.
    Raises ValueError if the turns do not alternate, nothing is left to answer, or the template refuses or does not fit.

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
    message = next(text for text in (own, system, template.system) if text is not None)
    messages = [{"role": "system", "content": _clean(message)}] if message else []
    messages += [{"role": t.role, "content": _question(template, t.text) if t.role == "user" else _clean(t.text)} for t in talk]
    draw = _compiled(template.jinja)
    text = draw(messages, not answer) if template.marked or not answer else _by_prefixes(draw, messages)
    return _pieces(text)


def check(template: Template) -> None:
    """ValueError unless the template keeps every message, marks what carries loss, and its prompts are beginnings of what training saw."""
    turns = (Turn(role="user", text="Aa?"), Turn(role="assistant", text="Bb."), Turn(role="user", text="Cc?"), Turn(role="assistant", text="Dd."))
    turns = turns[:2] if template.caption else turns
    whole, prompt = render(template, turns), render(template, turns, answer=False)
    learnt = "".join(piece.text for piece in whole if piece.loss)
    if any(turn.text not in learnt for turn in turns if turn.role == "assistant"):
        raise ValueError("the chat template marks no answer, or not all of it: put the answers between {% generation %} and {% endgeneration %}")
    if any(turn.text in learnt for turn in turns if turn.role == "user"):
        raise ValueError("the chat template marks questions as answers: put only answers between {% generation %} and {% endgeneration %}")
    if not _spelled(whole).startswith(_spelled(prompt)):
        raise ValueError(_NO_PREFIX)


def ending(template: Template) -> str:
    """The text that the template ends an answer with, without line breaks; empty if that is the tokenizer's end token."""
    turns = (Turn(role="user", text="Aa?"), Turn(role="assistant", text="Bb."))
    learnt = _spelled([piece for piece in render(template, turns) if piece.loss])
    tail = learnt[learnt.rfind("Bb.") + len("Bb.") :]
    return "" if END_SIGN in tail else tail.strip()


def starts(template: Template) -> bool:
    """Does the template write the tokenizer's start token itself?"""
    turns = (Turn(role="user", text="Aa?"), Turn(role="assistant", text="Bb."))
    return render(template, turns)[0].what == "start"


_NO_PREFIX = (
    "the chat template writes a conversation otherwise once it is answered, so what carries loss cannot be told: "
    "mark the answers in it with {% generation %} and {% endgeneration %}, or choose a template with data.template"
)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its text between two signs."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return OPEN_SIGN + caller() + CLOSE_SIGN


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@cache
def _compiled(jinja: str) -> Callable[[list[dict[str, str]], bool], str]:
    """The template as a function of messages and `add_generation_prompt`. It runs in a sandbox: it may come with a downloaded tokenizer."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        template = environment.from_string(jinja)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from None

    def draw(messages: list[dict[str, str]], prompt: bool) -> str:
        values: dict[str, Any] = {"bos_token": START_SIGN, "eos_token": END_SIGN, "tools": None, "documents": None}
        try:
            return template.render(messages=messages, add_generation_prompt=prompt, **values)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None

    return draw


def _by_prefixes(draw: Callable[[list[dict[str, str]], bool], str], messages: list[dict[str, str]]) -> str:
    """The rendered conversation with signs around what each answer adds to the prompt before it. ValueError if one is no prefix of the next."""
    text, before = "", ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = draw(messages[:number], True), draw(messages[: number + 1], False)
        if not answered.startswith(prompt) or not prompt.startswith(before):
            raise ValueError(_NO_PREFIX)
        said, content = answered[len(prompt) :], message["content"].strip()
        # A line break behind the text that ends an answer belongs to the format: a model that has stopped never writes it.
        ended = said[said.rfind(content) + len(content) :].strip()
        kept = said.rstrip("\n") if ended else said
        text += prompt[len(before) :] + OPEN_SIGN + kept + CLOSE_SIGN + said[len(kept) :]
        before = answered
    return text


def _pieces(text: str) -> tuple[Piece, ...]:
    kinds: dict[str, Literal["image", "start", "end"]] = {IMAGE_SIGN: "image", START_SIGN: "start", END_SIGN: "end"}
    pieces, loss = [], False
    for part in SIGNS.split(text):
        if part in (OPEN_SIGN, CLOSE_SIGN):
            loss = part == OPEN_SIGN
        elif part in kinds:
            pieces.append(Piece(what=kinds[part], loss=loss and part != IMAGE_SIGN))
        elif part:
            pieces.append(Piece(text=part, loss=loss))
    return tuple(pieces)


def _spelled(pieces: Sequence[Piece]) -> str:
    signs = {"image": IMAGE_SIGN, "start": START_SIGN, "end": END_SIGN}
    return "".join(signs.get(piece.what, piece.text) for piece in pieces)


def _caption(talk: list[Turn]) -> list[Turn]:
    """The first exchange, its question reduced to its images; later turns go, with theirs."""
    return [Turn(role=turn.role, text=MARKER * turn.text.count(MARKER)) if turn.role == "user" else turn for turn in talk[:2]]


def _question(template: Template, text: str) -> str:
    """A user's turn with signs for its images.

    As in LLaVA's preprocess_multimodal, the image of a turn that holds one is moved to its front and followed by a newline.
    Where a turn holds several, LLaVA would lose all but one; here they stay where they stand.
    """
    if MARKER in text and not template.caption:
        text = text.strip()
        if text.count(MARKER) == 1:
            text = (MARKER + "\n" + text.replace(MARKER, "").strip()).strip()
    return IMAGE_SIGN.join(_clean(part) for part in text.split(MARKER))


def _clean(text: str) -> str:
    """Text without the signs, should it hold any."""
    return SIGNS.sub("", text)
