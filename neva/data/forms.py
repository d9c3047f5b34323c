"""What a chat template takes and writes, found by probing it: the form of `content`, where answers
begin and how they end.

A template comes from anywhere, and one that drops the question trains with a falling loss. So each
is asked to write conversations whose texts are known, and must give every text back once and
unchanged, images in their places, and answers that end. What one can be helped with (an end that it
lacks) is mended; what is lost otherwise is an error that names it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from neva.data.drawing import (
    CLOSE_SIGN,
    END_SIGN,
    IMAGE_SIGN,
    OPEN_SIGN,
    SPLIT_SIGN,
    Endless,
    Message,
    compiled,
)
from neva.data.sample import MARKER, Turn

SIGNS = re.compile(f"([{IMAGE_SIGN}-{SPLIT_SIGN}])")
MARKS = re.compile(f"([{OPEN_SIGN}{CLOSE_SIGN}])")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
LISTS: tuple[tuple[str, ...], ...] = (
    ("system", "user", "assistant"),
    ("system", "user"),
    ("user",),
    (),
)
"""The forms to try: roles whose content is a list of parts."""


class Lost(ValueError):
    """What a template does not say. `stage` counts the proofs that held before: of several forms,
    that which came furthest is told."""

    def __init__(self, stage: int, message: str) -> None:
        super().__init__(message)
        self.stage = stage


@dataclass(frozen=True, kw_only=True)
class Form:
    """How messages are handed to a template, and where in what it writes the labels begin and
    end."""

    lists: tuple[str, ...] = ()
    """Roles whose content is a list of parts ({type: image|text}); that of the others is a text."""
    either: bool = False
    """It takes texts, and writes the same where every content is a list."""
    joint: str = ""
    """What stands between a turn's images and its text where the template itself writes nothing;
    for lists of parts."""
    lead: int = 0
    """Characters of white space by which a label begins behind `{% generation %}`; negative for
    before it."""
    tail: str = ""
    """What follows `{% endgeneration %}` and ends the answer, so that it joins the label."""
    adds_end: bool = False
    """The template writes no end: the tokenizer's end token is put behind each answer."""
    as_marked: bool = False
    """The template's marks stand as they are, and are not moved to where its prompts and answers
    end."""
    no_system: str = ""
    """Why it cannot say a system message; empty if it can."""
    no_images: str = ""
    """Why it cannot say an image; empty if it can."""


# Writing.


def write(jinja: str, form: Form, turns: Sequence[Turn], *, prompt: bool, date: str = "") -> str:
    """The conversation as text with signs, what carries loss between two of them. With `prompt` the
    last turn is a question to answer.

    ValueError where the template refuses the turns, writes a conversation otherwise once it is
    answered, or the order of images would change.
    """
    draw, messages = partial(_draw, jinja, form, date), _messages(form, turns)
    if GENERATION.search(jinja) is None:
        return _by_prefixes(draw, messages, prompt=prompt)
    text = draw(messages, prompt)
    return text if form.as_marked else _adjusted(form, text)


def _draw(jinja: str, form: Form, date: str, messages: list[Message], prompt: bool) -> str:
    text = compiled(jinja)(messages, prompt, date)
    text = text.replace(MARKER, IMAGE_SIGN) if form.lists else text
    return text.replace(SPLIT_SIGN, "")


def _messages(form: Form, turns: Sequence[Turn]) -> list[Message]:
    """The turns as the template takes them."""
    made: list[Message] = []
    for turn in turns:
        images = 0
        text = clean(turn.text)
        if turn.role == "user":
            text = _inline(turn.text)
            if form.lists:
                images, text = _in_order(turn.text, form.joint)
        elif form.lists:  # no image, even if it is spelled so
            text = text.replace(MARKER, MARKER[0] + SPLIT_SIGN + MARKER[1:])
        if form.adds_end and turn.role == "assistant":
            text += END_SIGN
        if turn.role in form.lists:
            shown: list[dict[str, str]] = [{"type": "image"}] * images
            made.append(
                {
                    "role": turn.role,
                    "content": [
                        *shown,
                        *([{"type": "text", "text": text}] if text or not images else []),
                    ],
                }
            )
        else:
            made.append({"role": turn.role, "content": text})
    return made


def _inline(text: str) -> str:
    """A user's turn with signs for its images.

    As in LLaVA's preprocess_multimodal, the image of a turn that holds one is moved to its front
    and followed by a newline. Where a turn holds several, LLaVA would lose all but one; here they
    stay where they stand.
    """
    if MARKER in text:
        text = text.strip()
        if text.count(MARKER) == 1:
            text = (MARKER + "\n" + text.replace(MARKER, "").strip()).strip()
    return IMAGE_SIGN.join(clean(part) for part in text.split(MARKER))


def _in_order(text: str, joint: str) -> tuple[int, str]:
    """Number of a turn's images, and its text. ValueError where several images do not all come
    first, since that order would be lost."""
    images = text.count(MARKER)
    if not images:
        return 0, clean(text)
    *before, rest = text.split(MARKER)
    if images > 1 and any(part.strip() for part in before):
        raise ValueError(
            "the chat template takes a turn's images before its text, and this turn has text "
            "between them: put its images first, or choose a template that takes texts"
        )
    rest = clean("".join([*before, rest])).strip()
    return images, joint + rest if rest else ""


def clean(text: str) -> str:
    """Text without the signs, should it hold any."""
    return SIGNS.sub("", text)


def _adjusted(form: Form, text: str) -> str:
    """What a marking template wrote, with labels from where its prompt ends to the answer's end."""
    made = ""
    spans = MARKS.split(text)
    for number in range(2, len(spans) - 1, 4):  # text, sign, label, sign, text, ...
        before, label, behind = spans[number - 2], spans[number], spans[number + 2]
        if form.lead < 0:
            label = before[form.lead :] + label
            before = before[: form.lead]
        lead = max(0, form.lead)
        before += label[:lead]
        label = label[lead:]
        if form.tail and behind.startswith(form.tail):
            label += form.tail
            behind = behind.removeprefix(form.tail)
        ended = len(label.rstrip())
        made += before + OPEN_SIGN + label[:ended] + CLOSE_SIGN
        spans[number + 2] = label[ended:] + behind
    return made + spans[-1]


_OTHERWISE = (
    "the chat template writes a conversation otherwise once it is answered, so what carries loss "
    "cannot be told: mark the answers in it with {% generation %} and {% endgeneration %}, "
    "or choose a template with data.template"
)


def _by_prefixes(draw: "partial[str]", messages: list[Message], *, prompt: bool) -> str:
    """The rendered conversation with signs around what each answer adds to the prompt before it.
    ValueError if one is no prefix of the next."""
    text, before = "", ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = draw(messages[:number], True), draw(messages[: number + 1], False)
        begin = _reach(asked, answered)
        if begin is None or not answered.startswith(before):
            raise ValueError(_OTHERWISE)
        said = answered[begin:]
        kept = said.rstrip()  # a model that has stopped never writes the white space behind its end
        text += answered[len(before) : begin] + OPEN_SIGN + kept + CLOSE_SIGN + said[len(kept) :]
        before = answered
    if not prompt:
        return text
    asked = draw(messages, True)
    if not asked.startswith(before):
        raise ValueError(_OTHERWISE)
    return text + asked[len(before) :]


def _reach(prompt: str, whole: str) -> int | None:
    """Where in a conversation the answer begins to which a prompt asks: at the prompt's end, or,
    where white space is written otherwise there, before that."""
    asked = prompt if whole.startswith(prompt) else prompt.rstrip()
    return len(asked) if whole.startswith(asked) else None


# Proofs.

_ODD = "{word} \"q\" 'a' \\ <b>&amp; {{x}} 50%\n  two  spaces, é — 日本 {word}z"
_NAMES = {"system": "system message", "user": "question", "assistant": "answer"}
_FIX = "; mend the template, or choose another with data.template"


_BETWEEN = "between {% generation %} and {% endgeneration %}"


def _answers(turns: Sequence[Turn]) -> list[str]:
    return [turn.text for turn in turns if turn.role == "assistant"]


def _talk(*, system: bool = False, images: Sequence[int] = (0, 0)) -> tuple[Turn, ...]:
    """Two rounds of odd text, so many images before each question."""
    turns = [Turn(role="system", text=_odd("Sy0"))] if system else []
    for number, count in enumerate(images):
        turns.append(Turn(role="user", text=f"{MARKER}\n" * count + _odd(f"Qu{number}")))
        turns.append(Turn(role="assistant", text=_odd(f"An{number}")))
    return tuple(turns)


def _odd(word: str) -> str:
    return _ODD.replace("{word}", word)


@cache
def find_form(jinja: str, specials: tuple[str, ...], own: bool) -> Form:
    """The form in which a template says all that a conversation holds.

    `specials` are the texts that the tokenizer knows as one token each; an `own` template is a
    model's, which was trained with what transformers hands to it: images, then the text, nothing
    between. ValueError naming what is lost where no form is whole.
    """
    compiled(jinja)
    found: list[Form] = []
    faults: list[Lost] = []
    for lists in LISTS:
        try:
            found.append(_proven(jinja, Form(lists=lists), specials, own))
        except Lost as error:
            faults.append(error)
    if not found:
        raise ValueError(str(max(reversed(faults), key=lambda fault: fault.stage)))
    best = min(found, key=lambda form: (bool(form.no_images), bool(form.no_system)))
    texts = replace(best, lists=(), joint="")
    if best.lists and texts in found and not best.no_images and _alike(jinja, texts, best):
        # Texts keep images where they stand among the words.
        return replace(texts, either=best.lists == LISTS[0])
    return best


def _alike(jinja: str, one: Form, other: Form) -> bool:
    talk = _talk(images=(2, 1))
    return write(jinja, one, talk, prompt=False) == write(jinja, other, talk, prompt=False)


def _proven(jinja: str, form: Form, specials: tuple[str, ...], own: bool) -> Form:
    """The form, filled in. Lost where it is not whole without a system message and images."""
    form = _measured(jinja, form, _talk(), specials)
    _prove(jinja, form, _talk())
    pictures = _talk(images=(2, 1))
    try:
        if form.lists and not own:
            drawn = _plain(jinja, form, pictures)
            touching = IMAGE_SIGN + pictures[0].text.split(MARKER)[-1].strip()
            form = replace(
                form,
                joint="\n" if touching in drawn else "",
            )
        _prove(jinja, form, pictures)
    except Lost as error:
        form = replace(form, joint="", no_images=_about("image", error))
    try:
        _prove(jinja, form, _talk(system=True))
    except Lost as error:
        form = replace(form, no_system=_about("system message", error))
    return form


def _about(what: str, error: Lost) -> str:
    told = str(error)
    return told if what in told else f"with a{'n' if what == 'image' else ''} {what}: {told}"


def _plain(jinja: str, form: Form, turns: Sequence[Turn], *, prompt: bool = False) -> str:
    """What the template writes, without marks."""
    try:
        return MARKS.sub("", _draw(jinja, form, "", _messages(form, turns), prompt))
    except Endless:
        raise
    except ValueError as error:
        raise Lost(0, str(error)) from None


def _measured(jinja: str, form: Form, turns: Sequence[Turn], specials: tuple[str, ...]) -> Form:
    """The form with `lead`, `tail` and `adds_end` as a conversation without anything special shows
    them. Lost where answers do not come out."""
    _check_texts(_plain(jinja, form, turns), turns)
    _check_prompts(jinja, form, turns)
    if GENERATION.search(jinja) is not None:
        form = replace(form, lead=_lead(jinja, form, turns))
    spans = list(_spans(jinja, form, turns))
    _check_spans(spans, turns)
    answers = _answers(turns)
    inside = [label.partition(text)[2] for (label, _), text in zip(spans, answers, strict=True)]
    if all(text.strip() for text in inside):
        return form
    names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    token = re.compile(rf"\s*({END_SIGN}|{names})" if names else rf"\s*{END_SIGN}")
    tails = [match.group() if (match := token.match(behind)) else "" for _, behind in spans]
    ended = any(text.strip() for text in inside)
    if not ended and tails[0] and len(set(tails)) == 1:
        return replace(form, tail=tails[0])
    if ended or any(tails):
        raise Lost(6, f"the chat template loses the end: it ends some answers and not others{_FIX}")
    return replace(form, adds_end=True)


def _prove(jinja: str, form: Form, turns: Sequence[Turn]) -> None:
    """Lost, naming what, unless the template says all of a conversation and labels its answers, and
    an end of each."""
    _check_texts(_plain(jinja, form, turns), turns)
    _check_prompts(jinja, form, turns)
    spans = list(_spans(jinja, form, turns))
    _check_spans(spans, turns)
    for (label, _), text in zip(spans, _answers(turns), strict=True):
        behind = label.partition(text)[2]
        if not behind.strip():
            raise Lost(6, f"the chat template loses the end of an answer{_FIX}")


def _check_texts(drawn: str, turns: Sequence[Turn]) -> None:
    """Every message's text comes once and unchanged, and every image, in their order."""
    wanted: list[str] = []
    for turn in turns:
        *images, text = turn.text.split(MARKER)
        text = text.strip()
        wanted += [IMAGE_SIGN] * len(images) + [text]
        if drawn.count(text) > 1:
            raise Lost(2, f"the chat template repeats the {_NAMES[turn.role]}{_FIX}")
        if text not in drawn:
            verb = "changes" if text.split()[0] in drawn and text.split()[-1] in drawn else "loses"
            raise Lost(1, f"the chat template {verb} the {_NAMES[turn.role]}{_FIX}")
    there, images = drawn.count(IMAGE_SIGN), wanted.count(IMAGE_SIGN)
    if there != images:
        verb = "loses" if there < images else "repeats"
        raise Lost(
            3,
            f"the chat template {verb} an image: it writes {there} {MARKER} for {images}{_FIX}",
        )
    pattern = re.compile("|".join(re.escape(text) for text in {IMAGE_SIGN, *wanted}))
    if pattern.findall(drawn) != wanted:
        raise Lost(3, f"the chat template changes the order of messages and images{_FIX}")


def _check_prompts(jinja: str, form: Form, turns: Sequence[Turn]) -> None:
    """Each prompt reaches to where its answer begins, and nothing behind an answer asks for
    another."""
    whole = _plain(jinja, form, turns)
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        asked = _plain(jinja, form, turns[:number], prompt=True).rstrip()
        if not whole.startswith(asked):
            raise Lost(4, _OTHERWISE)
        gap = whole[len(asked) : whole.index(turn.text)].strip()
        if gap:
            raise Lost(
                4,
                f"the chat template loses the generation prompt: it writes {_shown(gap)} before "
                f"an answer, and not where add_generation_prompt asks for an answer{_FIX}",
            )
        said = _plain(jinja, form, turns[: number + 1])
        header = asked.rpartition(turns[number - 1].text.split(MARKER)[-1].strip())[2].strip()
        if header and said.rstrip().endswith(header) and not whole.startswith(said.rstrip()):
            raise Lost(
                4,
                "the chat template does not heed add_generation_prompt: it writes "
                f"{_shown(header)} behind the last answer too, as if another had to follow{_FIX}",
            )


def _shown(text: str) -> str:
    return repr(text.replace(END_SIGN, "eos_token"))


def _lead(jinja: str, form: Form, turns: Sequence[Turn]) -> int:
    """By how much labels begin behind the mark: they begin where the prompt ends, or where it
    writes other white space with the answer."""
    marked = _draw(jinja, form, "", _messages(form, turns), False)
    whole = MARKS.sub("", marked)
    found = set()
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        asked = _plain(jinja, form, turns[:number], prompt=True)
        begin = _reach(asked, whole) or 0
        opened = marked[: marked.index(turn.text)].rfind(OPEN_SIGN)
        if opened >= 0:
            place = len(MARKS.sub("", marked[:opened]))
            label = whole[min(place, begin) : max(place, begin)]
            found.add(begin - place if not label.strip() else 0)
    return found.pop() if len(found) == 1 else 0


def _spans(jinja: str, form: Form, turns: Sequence[Turn]) -> Iterator[tuple[str, str]]:
    """Each label, and what stands between it and the next."""
    try:
        written = write(jinja, form, turns, prompt=False)
    except ValueError as error:
        raise Lost(4, str(error)) from None
    parts = MARKS.split(written)
    for number in range(2, len(parts) - 1, 4):
        yield parts[number], parts[number + 2]


def _check_spans(spans: Sequence[tuple[str, str]], turns: Sequence[Turn]) -> None:
    """One label for each answer, which begins it."""
    answers = _answers(turns)
    labels = [label for label, _ in spans]
    others = [turn.text.split(MARKER)[-1].strip() for turn in turns if turn.role != "assistant"]
    if any(text in label for text in others for label in labels):
        raise Lost(
            5,
            f"the chat template marks questions as answers: put only answers {_BETWEEN}",
        )
    if any(all(text not in label for label in labels) for text in answers):
        raise Lost(
            5,
            f"the chat template marks no answer, or not all of it: put the answers {_BETWEEN}",
        )
    pairs = zip(labels, answers, strict=False)
    before = [label.partition(text)[0].strip() for label, text in pairs]
    if len(labels) != len(answers) or any(before):
        more = "the chat template marks more than answers and what ends them"
        raise Lost(5, f"{more}: put only those {_BETWEEN}")
