"""Chat templates that are not ours: what each takes and loses, and what is written with it, against
transformers' own rendering.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from neva.batch import IGNORE, IMAGE, ImageLayout
from neva.data import forms
from neva.data.drawing import compiled
from neva.data.encode import Encoder
from neva.data.forms import Form, find_form
from neva.data.sample import Sample, SampleError, Turn
from neva.data.source import LlavaSource
from neva.data.template import Template, check, render
from neva.data.templates import TEMPLATES, find_template
from neva.data.tokenizer import JsonTokenizer, load_tokenizer
from tests.published import PUBLISHED

DATA = Path(__file__).parents[1] / "data"
CASES = DATA / "cases"
TINY = load_tokenizer(DATA / "tiny.model")
LAYOUT = ImageLayout(tile=8, tokens_per_tile=3)
PICTURE = Image.new("RGB", (9, 5))
ALL = ("system", "user", "assistant")

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>")
WANTED: dict[str, tuple[dict[str, Any], str]] = {
    # Name -> what its form is besides the default, and what carries loss of the answers A and B;
    # {e} is the end token.
    "llava-1.5": ({"lists": ALL, "lead": -1, "adds_end": True}, " A{e}| B{e}"),
    "llava-v1.6-mistral": ({"lists": ALL}, " A</s>| B</s>"),
    "llava-v1.6-34b": ({"lists": ALL}, "A<|im_end|>|B<|im_end|>"),
    "llama3-llava-next": ({"lists": ALL}, "A<|eot_id|>|B<|eot_id|>"),
    "llava-interleave-qwen": (
        {"lists": ALL, "lead": -1, "tail": "<|im_end|>"},
        " \nA<|im_end|>| \nB<|im_end|>",
    ),
    "either": ({"either": True}, "A<|im_end|>|B<|im_end|>"),
    "qwen2.5": ({}, "A<|im_end|>|B<|im_end|>"),
    "llama-3.1": ({}, "A<|eot_id|>|B<|eot_id|>"),
    "gemma": ({}, "A<end_of_turn>|B<end_of_turn>"),
    "mistral": ({}, "A{e}|B{e}"),
    "zephyr": ({}, "A{e}|B{e}"),
    "marked chatml": ({"tail": "<|im_end|>"}, "A<|im_end|>|B<|im_end|>"),
}
NO_SYSTEM = {"gemma": "System role not supported", "mistral": "must alternate"}


def talk(system: bool = False, images: tuple[int, int] = (0, 0)) -> tuple[Turn, ...]:
    turns = [Turn(role="system", text="Be brief.")] if system else []
    for count, question, answer in zip(images, ("Q", "R"), ("A", "B"), strict=True):
        turns += [
            Turn(role="user", text="<image>\n" * count + question),
            Turn(role="assistant", text=answer),
        ]
    return tuple(turns)


def spelled(template: Template, turns: tuple[Turn, ...], **how: Any) -> str:
    names = {"image": "<image>", "start": "<s>", "end": "{e}"}
    return "".join(piece.text or names[piece.what] for piece in render(template, turns, system="", **how))


def labels(template: Template, turns: tuple[Turn, ...]) -> str:
    """What carries loss, a bar between stretches."""
    text, loss = "", False
    for piece in render(template, turns, system=""):
        text += "|" if piece.loss and not loss and text else ""
        text += (piece.text or "{" + piece.what[0] + "}") if piece.loss else ""
        loss = piece.loss
    return text


def theirs(
    jinja: str,
    turns: tuple[Turn, ...],
    lists: tuple[str, ...],
    *,
    prompt: bool = False,
) -> str:
    """transformers' rendering: images, then one text."""
    messages = []
    for turn in turns:
        *images, text = turn.text.split("<image>")
        text = text.removeprefix("\n") if turn.role in lists else turn.text
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        messages.append({"role": turn.role, "content": parts if turn.role in lists else text})
    told = {"bos_token": "<s>", "eos_token": "{e}", "add_generation_prompt": prompt}
    return render_jinja_template([messages], chat_template=jinja, **told)[0][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(name: str) -> None:
    """Each is found to take what it takes; what is written is transformers' text, and the answers
    carry loss with an end."""
    changed, learnt = WANTED[name]
    template = Template(jinja=PUBLISHED[name], specials=SPECIALS, own=True)
    form = template.form
    assert replace(form, no_system="") == Form(**changed)
    assert bool(form.no_system) == (name in NO_SYSTEM) and NO_SYSTEM.get(name, "") in form.no_system
    assert labels(template, talk()) == learnt
    for system in (False, *([True] if name not in NO_SYSTEM else [])):
        for images in ((0, 0), (1, 0), (2, 1)):
            turns = talk(system, images)
            written = spelled(template, turns)
            if form.adds_end:
                written = written.replace("{e}", "")
            assert written == theirs(template.jinja, turns, form.lists)
            prompt = spelled(template, turns[:-3], answer=False)
            assert prompt == theirs(template.jinja, turns[:-3], form.lists, prompt=True)
            assert written.startswith(prompt.rstrip())


KEPT = {
    "template-drops-user/good.jinja", "template-no-generation-prompt/right.jinja", "template-stop-outside/inside.jinja", "date-template/date.jinja",
}  # fmt: skip
MENDED: dict[str, dict[str, Any]] = {
    "template-drops-user/list.jinja": {"lists": ("system", "user"), "joint": "\n"},
    "template-stop-outside/outside.jinja": {"tail": "\ue002"},
    "template-stop-outside/nextrole.jinja": {"adds_end": True},
}
REFUSED = {
    "template-drops-user/first.jinja": "loses the question",
    "template-drops-user/tojson.jinja": "changes the question",
    "template-drops-user/twice.jinja": "repeats the question",
    "template-no-generation-prompt/marked.jinja": "loses the generation prompt: it writes '### assistant:'",
    "template-no-generation-prompt/unmarked.jinja": "loses the generation prompt: it writes '### assistant:'",
    "template-always-header/always.jinja": "does not heed add_generation_prompt",
    "template-always-header/always2.jinja": "does not heed add_generation_prompt: it writes '<assistant>' behind the last answer",
    "system-dropped/nosystem.jinja": "loses the system message",
}


def test_every_case_is_judged() -> None:
    found = {f"{path.parent.name}/{path.name}" for path in CASES.glob("*/*.jinja")}
    assert found == KEPT | MENDED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", sorted(KEPT | MENDED.keys()))
def test_cases_that_are_kept_or_mended(name: str) -> None:
    """The question, the image, the answer and an end are among the tokens, and only the last two
    carry loss."""
    jinja = (CASES / name).read_text()
    assert replace(find_form(jinja, (), False), no_system="") == Form(**MENDED.get(name, {}))
    folder = CASES / Path(name).parent
    source = LlavaSource(folder / "data.json", folder / "images")
    encoder = Encoder(TINY, jinja, None, LAYOUT)
    for index in range(len(source)):
        sample = source[index]
        encoded = encoder.encode(sample)
        tokens, learnt = encoded.tokens.tolist(), encoded.labels[encoded.labels != IGNORE].tolist()
        *_, question = sample.turns[0].text.split("<image>")
        assert question.strip() in TINY.decode([id for id in tokens if id >= 0])
        assert (tokens.count(IMAGE) > 0) == bool(sample.images)
        assert TINY.decode(learnt).strip() == sample.turns[1].text and learnt[-1] == TINY.eos
        asked = encoder.encode(sample, labels=False).tokens.tolist()
        assert tokens[: len(asked)] == asked


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_cases_that_are_refused(name: str) -> None:
    """Named by what is lost, where there are images and a system message."""
    template = Template(jinja=(CASES / name).read_text())
    with pytest.raises(ValueError, match=REFUSED[name]):
        check(template, images=True, system=True)
    with pytest.raises(ValueError, match=REFUSED[name]):
        Encoder(TINY, template.jinja, "Be brief.", LAYOUT)


CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}ANSWER{% endgeneration %}"
    "{% else %}QUESTION{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def variant(question: str = "{{ m.content }}", answer: str = "{{ m.content + eos_token }}") -> str:
    return CHAT.replace("QUESTION", question).replace("ANSWER", answer)


@pytest.mark.parametrize(
    ("jinja", "said"),
    [
        (variant("{{ m.content | upper }}"), "(changes|loses) the question"),
        (variant("{{ m.content | replace('\n', ' ') }}"), "changes the question"),
        (variant("{{ m.content[:20] }}"), "(changes|loses) the question"),
        (variant("{{ m.content if loop.last else '' }}"), "loses the question"),
        (variant("{% if loop.index0 == 0 %}{{ m.content }}{% endif %}"), "loses the question"),
        (variant(answer="{{ m.content | e }}"), "changes the answer"),
        (variant(answer="{{ m.content + m.content + eos_token }}"), "repeats the answer"),
        (variant(answer="{{ m.content if loop.last else '' }}{{ eos_token }}"), "loses the answer"),
        (variant(answer="{{ m.content }}{{ eos_token if loop.last else '' }}"), "ends some answers and not others"),
        (variant(answer="{{ 'So: ' + m.content + eos_token }}"), "loses the generation prompt"),
        (variant().replace("{{ '<assistant>' }}", "{{ '<model>' }}"), "otherwise once it is answered"),
        (variant("{% generation %}{{ m.content }}{% endgeneration %}"), "marks questions as answers"),
        (variant().replace("{% generation %}", "").replace("{% endgeneration %}", "").replace("{{ '<' + m.role", "{{ loop.length ~ '<' + m.role"),
         "otherwise once it is answered"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "order|otherwise"),
        (variant("{% generation %}###{% endgeneration %}{{ m.content }}"), "marks more than"),
        (variant(answer="{{ 'So: ' + m.content + eos_token }}").replace("ant>'", "ant>So: '"),
         "marks more than"),
        (variant(answer="{{ m.content | replace(eos_token, '') }}"), "loses the end of an answer"),
        (variant() + "{% if not add_generation_prompt %}{% generation %}###"
         "{% endgeneration %}{% endif %}", "marks more than"),
    ],
)  # fmt: skip
def test_what_is_lost_is_named(jinja: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_form(jinja, (), False)


def test_an_end_that_not_every_answer_has_is_no_end() -> None:
    """One behind the mark, where it is a special token: all must have it, and it is read whole."""
    jinja = PUBLISHED["marked chatml"]
    assert find_form(jinja, ("<|im", "<|im_end|>"), False) == Form(tail="<|im_end|>")
    last = "'' if loop.last and m.role == 'assistant' else "
    some = jinja.replace("'<|im_end|>\n'", last + "'<|im_end|>\n'")
    assert some != jinja
    with pytest.raises(ValueError, match="ends some answers and not others"):
        find_form(some, ("<|im_end|>",), False)


def test_an_end_that_a_system_message_takes_away() -> None:
    ended = "{{ m.content }}{% if messages[0].role != 'system' %}{{ eos_token }}{% endif %}"
    form = find_form(variant(answer=ended), (), False)
    assert "loses the end of an answer" in form.no_system


def test_a_mark_that_holds_the_space_of_the_prompt() -> None:
    """The label begins where the prompt ends."""
    jinja = variant(answer="{{ ' ' + m.content + eos_token }}").replace("ant>'", "ant> '")
    template = Template(jinja=jinja)
    assert template.form == Form(lead=1)
    assert labels(template, talk()) == "A{e}|B{e}"
    assert spelled(template, talk()).startswith(spelled(template, talk()[:1], answer=False) + "A")


def test_what_stands_behind_each_message_is_no_generation_prompt() -> None:
    jinja = "{% for m in messages %}{{ m.content + '###' }}{% endfor %}"
    assert labels(Template(jinja=jinja), talk()) == "A###|B###"


def test_a_form_in_which_answers_change_their_text_is_passed_over() -> None:
    """This template marks the last answer that is a list, so that the conversation's beginning is
    not what was written before; of texts it does not."""
    lists = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    lists += "{{ '!' if loop.last and m.role == 'assistant' }}"
    said = "{% if m.content is string %}{{ m.content }}{% else %}" + lists + "{% endif %}"
    jinja = "{% for m in messages %}{{ '[' + m.role + ']' }}" + said + "{{ eos_token }}{% endfor %}"
    jinja += "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert find_form(jinja, (), False) == Form()


LONG = (
    ("{{ '[long]' if messages|length > 4 }}", ""),
    ("{{ '[long]' if messages|length > 5 }}", ""),
    ("", "{{ '!' if loop.index0 == 4 and messages|length > 5 }}"),
    ("", "{{ '!' if loop.index0 == 0 and messages|length == 6 }}"),
)


@pytest.mark.parametrize(("front", "behind"), LONG)
def test_a_long_conversation_that_is_written_otherwise(front: str, behind: str) -> None:
    """The probes have two rounds; the third changes what was written before it."""
    said = "{{ '[' + m.role + ']' + m.content }}" + behind + "{{ eos_token }}"
    jinja = front + "{% for m in messages %}" + said + "{% endfor %}"
    template = Template(jinja=jinja + "{% if add_generation_prompt %}[assistant]{% endif %}")
    check(template, images=True)
    turns = (*talk(), *talk()[:2])
    assert labels(template, talk()) == "A{e}|B{e}"
    with pytest.raises(ValueError, match="otherwise once it is answered"):
        render(template, turns)
    if "4" in front:
        with pytest.raises(ValueError, match="otherwise once it is answered"):
            render(template, turns[:5], answer=False)


def test_a_template_that_never_ends_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting(jinja: str) -> Any:
        def draw(*given: Any) -> str:
            asked.append(given)
            return compiled(jinja)(*given)

        return draw

    monkeypatch.setattr(forms, "compiled", counting)
    with pytest.raises(ValueError, match="too long"):
        find_form("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, (), False)
    assert len(asked) == 1


IMAGE_PARTS = "{% for p in m.content %}{% if p.type == 'image' %}PICTURE{% else %}{{ p.text }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("", "loses an image: it writes 0 <image> for 3"),
        ("<image><image>", "repeats an image"),
        ("<|image_pad|>", "loses an image"),
    ],
)
def test_images_are_counted(picture: str, said: str) -> None:
    """A template that loses images is good for text, and refused for a model that sees."""
    template = Template(jinja=variant(IMAGE_PARTS.replace("PICTURE", picture)))
    assert template.form.lists == ("system", "user")
    check(template, system=True)
    with pytest.raises(ValueError, match=said):
        check(template, images=True)
    with pytest.raises(ValueError, match=said):
        render(template, talk(images=(1, 0)))
    assert labels(template, talk()) == "A{e}|B{e}"


def test_images_behind_their_text_are_in_another_order() -> None:
    parts = IMAGE_PARTS.replace("m.content", "m.content | reverse").replace("PICTURE", "<image>")
    template = Template(jinja=variant(parts))
    check(template)
    with pytest.raises(ValueError, match="changes the order of messages and images"):
        check(template, images=True)


USER_ALONE = variant(IMAGE_PARTS.replace("PICTURE", "<image>{{ '\\n' }}")).replace(
    "{% else %}{% for p",
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}{% for p",
)
"""It takes a list from the user alone, and loses a system message that is one."""
TEXT_OR = "{% if m.content is string %}{{ m.content }}{% else %}"
USER_TOO = USER_ALONE.replace("{% for p", TEXT_OR + "{% for p", 1).replace(
    "{% endfor %}{% endif %}{% endfor %}",
    "{% endfor %}{% endif %}{% endif %}{% endfor %}",
)
"""It takes a text from the user too."""


def test_the_form_that_loses_least_is_taken() -> None:
    assert find_form(USER_ALONE, (), False) == Form(lists=("user",))
    # One that takes texts too is given those: in them images may stand among the words.
    # Lists for all, which transformers' processor hands over, it does not take.
    assert USER_TOO != USER_ALONE and find_form(USER_TOO, (), False) == Form(either=False)


def test_a_template_that_writes_texts_and_lists_otherwise_is_given_lists() -> None:
    """They are what transformers' processor hands to it."""
    otherwise = PUBLISHED["either"].replace("<image>\n", "<image> | ")
    assert otherwise != PUBLISHED["either"]
    assert find_form(otherwise, (), False) == Form(lists=ALL)


def test_a_sample_whose_images_are_written_otherwise_is_named() -> None:
    """Also where the probes were not met: this template writes no image of a long conversation."""
    picture = "{{ '<image>' if messages | length < 6 else '' }}"
    encoder = Encoder(TINY, variant(IMAGE_PARTS.replace("PICTURE", picture)), None, LAYOUT)
    short, long = talk(images=(1, 0)), talk(images=(1, 0)) + talk()
    assert IMAGE in encoder.encode(Sample(source="s", id="0", turns=short, images=(PICTURE,))).tokens.tolist()
    with pytest.raises(
        SampleError,
        match=r"sample '1' of 's': the chat template writes 0 image\(s\) of its 1",
    ):
        encoder.encode(Sample(source="s", id="1", turns=long, images=(PICTURE,)))


def test_images_among_words() -> None:
    """A template of lists takes images before the text: one is moved there, as in LLaVA; several
    among words are refused by sample."""
    encoder = Encoder(TINY, PUBLISHED["llava-1.5"], None, LAYOUT)
    front, behind = (
        encoder.encode(
            Sample(
                source="s",
                id="0",
                turns=(Turn(role="user", text=text), Turn(role="assistant", text="A")),
                images=(PICTURE,),
            )
        )
        for text in ("<image>\nWhat?", "What?\n<image>")
    )
    assert front.tokens.tolist() == behind.tokens.tolist()
    turns = (Turn(role="user", text="Of <image> and <image>?"), Turn(role="assistant", text="A"))
    with pytest.raises(SampleError, match="put its images first"):
        encoder.encode(Sample(source="s", id="0", turns=turns, images=(PICTURE, PICTURE)))
    # writes texts too, images where they stand
    texts = Encoder(TINY, PUBLISHED["either"], None, LAYOUT)
    assert texts.encode(Sample(source="s", id="0", turns=turns, images=(PICTURE, PICTURE))).tokens.tolist().count(IMAGE) == 6


@pytest.mark.parametrize("name", ["llava-1.5", "either", "llava-v1.6-34b"])
def test_a_text_cannot_forge_what_is_no_text(name: str) -> None:
    """Images, ends and bounds of labels are characters for private use while a template runs."""
    forged = "\ue000b\ue001c\ue002d\ue003e\ue004f\ue005g"
    turns = (
        Turn(role="system", text="S" + forged),
        Turn(role="user", text="<image>\nQ" + forged),
        Turn(role="assistant", text="A" + forged),
        Turn(role="user", text="R" + forged),
        Turn(role="assistant", text="B" + forged),
    )
    plain = tuple(replace(turn, text=turn.text.replace(forged, "bcdefg")) for turn in turns)
    template = Template(jinja=PUBLISHED[name], specials=SPECIALS)
    assert render(template, turns) == render(template, plain)


def test_an_image_that_is_only_spelled_is_text() -> None:
    turns = (Turn(role="user", text="<image>\nQ"), Turn(role="assistant", text="It says <image>."))
    pieces = render(Template(jinja=PUBLISHED["llava-1.5"]), turns)
    assert sum(piece.what == "image" for piece in pieces) == 1
    assert "It says <image>." in "".join(piece.text for piece in pieces if piece.loss)


def test_the_line_break_behind_an_image() -> None:
    """A template that writes none gets the one of LLaVA's data, but for a model's own: it saw what
    transformers makes of a list of parts."""
    jinja = (CASES / "template-drops-user/list.jinja").read_text()
    assert spelled(Template(jinja=jinja), talk(images=(1, 0))[:2]) == "USER: <image>\nQ\nASSISTANT: A{e}"
    assert spelled(Template(jinja=jinja, own=True), talk(images=(1, 0))[:2]) == "USER: <image>Q\nASSISTANT: A{e}"


def test_a_system_message_that_is_lost_is_an_error_where_there_is_one() -> None:
    jinja = (CASES / "system-dropped/nosystem.jinja").read_text()
    encoder = Encoder(TINY, jinja, None, LAYOUT)
    encoder.encode(Sample(source="s", id="0", turns=talk()))
    with pytest.raises(SampleError, match="loses the system message"):
        encoder.encode(LlavaSource(CASES / "system-dropped/data.json", "")[0])
    for name, said in NO_SYSTEM.items():
        Encoder(TINY, PUBLISHED[name], None, LAYOUT)
        with pytest.raises(ValueError, match=f"system message.*{said}"):
            Encoder(TINY, PUBLISHED[name], "Be brief.", LAYOUT)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("plain", "v0")])
def test_our_own_formats_pass_the_proofs(name: str) -> None:
    """All but LLaVA's `plain`, a caption, and `v0`, which labels its own header: its ids are held
    by LLaVA's."""
    assert find_form(TEMPLATES[name].jinja, (), False) == Form()


def specials_tokenizer() -> JsonTokenizer:
    """The demo's tokenizer, which knows ChatML's tokens."""
    import tokenizers

    model = tokenizers.Tokenizer.from_file(
        str(Path(__file__).parents[2] / "neva/recipes/tokenizer/tokenizer.json"),
    )
    model.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")],
    )
    return JsonTokenizer(
        {
            "tokenizer.json": model.to_str().encode(),
            "tokenizer_config.json": json.dumps({"eos_token": "</s>"}).encode(),
        }
    )


def test_a_special_token_behind_the_mark_joins_the_label() -> None:
    """Where the tokenizer knows it as one; else the tokenizer's own end token is learnt. Either way
    a generation stops there."""
    tokenizer = specials_tokenizer()
    sample = Sample(source="s", id="0", turns=talk())
    known = Encoder(tokenizer, PUBLISHED["marked chatml"], None, LAYOUT)
    end = tokenizer.encode("<|im_end|>")
    encoded = known.encode(sample)
    assert len(end) == 1 and encoded.labels[encoded.labels != IGNORE].tolist().count(end[0]) == 2
    assert end[0] in known.stop_ids and not find_template(known.template, tokenizer).form.adds_end
    unknown = Encoder(TINY, PUBLISHED["marked chatml"], None, LAYOUT).encode(sample)
    assert unknown.labels[unknown.labels != IGNORE].tolist().count(TINY.eos) == 2


HOSTILE = {
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "remainder": ("{{ 1 % 0 }}", "ZeroDivisionError"),
    "overflow": ("{{ 2.0 ** 100000 }}", "OverflowError|too large|out of range"),
    "power": ("{{ 9 ** (9 ** 9) }}", "too large a power"),
    "memory": ("{{ 'x' * 10 ** 12 }}", "repeats a text too often"),
    "list": ("{{ ([0] * 10 ** 9) | length }}", "repeats a text too often"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError|recursion"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not valid Jinja"),
    "runaway": (
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "characters more",
    ),
    "doubling": (
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        "too long",
    ),
    "padding": ("{{ '%999999999d' % 1 }}", "pads a text"),
    "index": ("{{ messages[7].content }}", "refuses|loses"),
    "key": ("{{ {}['a'].b }}", "refuses|undefined"),
    "insides": ("{{ ''.__class__.__mro__ }}", "unsafe|undefined|refuses|loses"),
    "namespace": ("{% set n = namespace(_x=1) %}", "begins with _"),
    "many": ("{% set a, b = 1 %}", "refuses"),
    "change": ("{{ messages.append(messages[0]) }}", "unsafe"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_template_does_is_an_error_in_one_line(name: str) -> None:
    jinja, said = HOSTILE[name]
    with pytest.raises(ValueError, match=said) as error:
        check(Template(jinja=jinja))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_the_date_is_the_encoders() -> None:
    jinja = (CASES / "date-template/date.jinja").read_text()
    sample = LlavaSource(CASES / "date-template/data.json", CASES / "date-template/images")[0]
    one, other, same = (Encoder(TINY, jinja, None, LAYOUT, date) for date in ("2024-07-26", "2025-01-02", "2024-07-26"))
    assert "Today: 26 July 2024" in TINY.decode([id for id in one.encode(sample).tokens.tolist() if id >= 0])
    assert one.encode(sample).tokens.tolist() == same.encode(sample).tokens.tolist() != other.encode(sample).tokens.tolist()
