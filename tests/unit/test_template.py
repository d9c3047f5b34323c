"""Chat formats: what they write, what carries loss, and what is refused."""

import pytest

from neva.data.sample import Turn
from neva.data.template import Template, check, render
from neva.data.templates import TEMPLATES, find_template
from neva.data.tokenizer import JsonTokenizer

TALK = (
    Turn(role="system", text="Be brief."), Turn(role="user", text="<image>\nHi?"), Turn(role="assistant", text="Yes."),
    Turn(role="user", text="Why?"), Turn(role="assistant", text="So."),
)  # fmt: skip
LABELS = "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"
# What carries loss stands between [ and ]; {i} an image, {s} and {e} the start and the end token.
WRITTEN = {
    "plain": "{i}[Yes.\n]",
    "v0": "Be brief.\n\n[###] Human: {i}\nHi?\n[### Assistant: Yes.\n][###] Human: Why?\n[### Assistant: So.\n][### ]",
    "v1": "Be brief. USER: {i}\nHi? ASSISTANT:[ Yes.{e}]USER: Why? ASSISTANT:[ So.{e}]",
    "llama_2": "{s}(INST) <<SYS>>\nBe brief.\n<</SYS>>\n\n{i}\nHi? (/INST)[ Yes. {e}]{s}(INST) Why? (/INST)[ So. {e}]",
    "llama_3": "{s}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{i}\nHi?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[Yes.<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[So.<|eot_id|>]",
    "mistral": "{s}(INST) Be brief.\n\n{i}\nHi? (/INST)[ Yes.{e}](INST) Why? (/INST)[ So.{e}]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{i}\nHi?<|im_end|>\n<|im_start|>assistant\n[Yes.<|im_end|>]\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[So.<|im_end|>]\n",
    "nvlm-chatml-hf": "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n{i}\nHi?<|im_end|><|im_start|>assistant\n[Yes.<|im_end|>]"
    "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n[So.<|im_end|>]",
    "nvgpt": "<extra_id_0>System\nBe brief.<extra_id_1>User\n{i}\nHi?\n<extra_id_1>Assistant\n[Yes.\n<extra_id_1>]User\nWhy?\n"
    "<extra_id_1>Assistant\n[So.\n<extra_id_1>]",
    "nv_steerlm": f"<extra_id_0>System\nBe brief.<extra_id_1>User\n{{i}}\nHi?\n<extra_id_1>Assistant\n<extra_id_2>{LABELS}\n[Yes.\n<extra_id_1>]"
    f"User\nWhy?\n<extra_id_1>Assistant\n<extra_id_2>{LABELS}\n[So.\n<extra_id_1>]",
    "gemma": "{s}<start_of_turn>user\nBe brief.\n\n{i}\nHi?<end_of_turn>\n<start_of_turn>model\n[Yes.<end_of_turn>]\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n[So.<end_of_turn>]\n",
    "nvlm-pretrain": "Be brief.\n{i}\nHi?\n[Yes.<|im_end|>]Why?\n[So.<|im_end|>]",
    "text": "Be brief.{i}\nHi?[Yes.{e}]Why?[So.{e}]",
}
SAME = {"qwen": "chatml", "nvlm-chatml": "chatml", "nvlm-chatml-paper": "chatml", "nv_dpo": "nvgpt"}
"""Templates that differ from another in their own system message alone."""


def written(template: Template, turns=TALK, **how) -> str:
    """A rendered conversation in the notation of `WRITTEN`."""
    text, loss = "", False
    for piece in render(template, turns, **how):
        if piece.loss != loss:
            text, loss = text + ("[" if piece.loss else "]"), piece.loss
        text += piece.text if piece.what == "text" else "{" + piece.what[0] + "}"
    return text + ("]" if loss else "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_written(name):
    """Every format's text, and which of it carries loss; the prompt of a generation is its beginning."""
    expected = WRITTEN[SAME.get(name, name)].replace("(INST)", "[INST]").replace("(/INST)", "[/INST]")
    got = written(TEMPLATES[name])
    if name == "v0":  # adjoining stretches that carry loss are one
        expected = expected.replace("][", "")
    assert got == expected
    check(TEMPLATES[name])
    turns = TALK[:3] if TEMPLATES[name].caption else TALK
    prompt = written(TEMPLATES[name], turns, answer=False)
    plain = got.replace("[INST]", "(INST)").replace("[/INST]", "(/INST)").replace("[", "").replace("]", "")
    assert plain.startswith(prompt.replace("[INST]", "(INST)").replace("[/INST]", "(/INST)").replace("[", "").replace("]", ""))


def test_systems():
    """A sample's own system message goes before the caller's, that before the template's; an empty one is left out."""
    talk = (Turn(role="user", text="Q"), Turn(role="assistant", text="A"))
    assert written(TEMPLATES["qwen"], talk).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    assert written(TEMPLATES["nvlm-chatml-paper"], talk).startswith(
        "<|im_start|>system\nFollow the user's instruction and answer questions.<|im_end|>"
    )
    assert written(TEMPLATES["qwen"], talk, system="").startswith("<|im_start|>user")
    assert written(TEMPLATES["qwen"], TALK, system="Other.").startswith("<|im_start|>system\nBe brief.")


PLAIN_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_unmarked_template():
    """What a template without {% generation %} adds with an answer is found turn by turn."""
    assert written(Template(jinja=PLAIN_CHATML)) == written(TEMPLATES["chatml"])


@pytest.mark.parametrize(
    ("jinja", "said"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% if loop.last %}!{% endif %}{% endfor %}", "writes a conversation otherwise"),
        ("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}", "writes a conversation otherwise"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "marks questions as answers"),
        ("{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}", "marks no answer"),
        ("{% for m in messages %}{{ m.content }", "not valid Jinja"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}{% generation %}{% endgeneration %}", "refuses|unsafe"),
    ],
)
def test_refused_templates(jinja, said):
    """A template whose loss cannot be told, that is broken, or that reaches for Python's insides, is refused and not guessed."""
    with pytest.raises(ValueError, match=said):
        check(Template(jinja=jinja))


def test_precedence():
    """A given template, else the tokenizer's own, else an error that says both ways out."""
    own = JsonTokenizer({"tokenizer.json": b"{}", "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'})
    none = JsonTokenizer({"tokenizer.json": b"{}"})
    assert find_template("v1", own) is TEMPLATES["v1"]
    assert find_template("", own).jinja == "{{ messages }}"
    assert find_template("{{ mine }}", own).jinja == "{{ mine }}"
    with pytest.raises(ValueError, match=r"name one with data.template .*tokenizer that has one"):
        find_template("", none)
    with pytest.raises(ValueError, match="Did you mean 'llama_2'"):
        find_template("llama-2")


def test_signs_in_text_are_no_images():
    """Text of a user cannot forge an image or an end token."""
    answer = Turn(role="assistant", text="d\ue003e\ue004\ue002f")
    talk = (Turn(role="user", text="a\ue000b\ue002c"), answer)
    assert written(TEMPLATES["v1"], talk, system="") == "USER: abc ASSISTANT:[ def{e}]"
