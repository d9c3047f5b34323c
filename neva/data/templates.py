"""The chat formats by name, as Jinja.

Sources: LLaVA's conversation.py (`plain`, `v0`, `v1`, `llama_2`), the chat templates that Meta, Mistral, Alibaba and Google publish with their
tokenizers, NVIDIA/Megatron-LM and nvidia/NVLM-D-72B (`nvlm-chatml*`, three that differ), NeMo's NeVA (`nvgpt`, `nv_steerlm`, `nv_dpo`).
A test compares `plain`, `v0`, `v1` and `llama_2` with LLaVA's own token ids and labels.
"""

from contextlib import suppress
from dataclasses import replace

from neva.config import nearest
from neva.data.forms import LISTS, Form
from neva.data.sample import MARKER, Turn
from neva.data.template import Template, prompts
from neva.data.tokenizer import Tokenizer

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers should not "
    "include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAMA_3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the "
    "user with a variety of tasks using natural language."
)
_STEERLM = "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"

_PLAIN = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '\\n' }}{% endgeneration %}
{%- elif message.role == 'user' %}{{ message.content }}
{%- endif %}
{%- endfor %}"""

_TEXT = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{ message.content }}
{%- endif %}
{%- endfor %}"""

_NVLM_PRETRAIN = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '\\n' }}
{%- endif %}
{%- endfor %}"""

_V0 = """
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{% generation %}{{ '###' }}{% endgeneration %}{{ ' Human: ' + message.content + '\\n' }}
{%- else %}{% generation %}{{ '### Assistant: ' + message.content + '\\n' }}{% endgeneration %}
{%- endif %}
{%- if loop.last %}
{%- if add_generation_prompt %}{{ '### Assistant:' }}{% else %}{% generation %}{{ '### ' }}{% endgeneration %}{% endif %}
{%- endif %}
{%- endfor %}"""

_V1 = """
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + ' ' }}
{%- elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ASSISTANT:' }}
{%- else %}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}"""

_INST = """
{%- set system = namespace(text='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set system.text = SYSTEM %}
{%- elif message.role == 'user' %}{{ START + '[INST] ' + system.text + message.content + ' [/INST]' }}{% set system.text = '' %}
{%- else %}{% generation %}{{ ' ' + message.content + SPACE + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}"""

_HEADERS = """
{%- for message in messages %}
{%- if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_CHATML = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ BREAK }}
{%- else %}{{ message.content + '<|im_end|>' + BREAK }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_GEMMA = """
{%- set system = namespace(text='') %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set system.text = message.content + '\\n\\n' %}
{%- elif message.role == 'user' %}{{ '<start_of_turn>user\\n' + system.text + message.content + '<end_of_turn>\\n' }}{% set system.text = '' %}
{%- else %}{{ '<start_of_turn>model\\n' }}{% generation %}{{ message.content + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_NVGPT = """
{{- '<extra_id_0>System\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}{{ '\\n' }}{% endif %}
{{- '<extra_id_1>' }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ 'User\\n' + message.content + '\\n<extra_id_1>Assistant\\n' + LABELS }}
{%- elif message.role == 'assistant' %}{% generation %}{{ message.content + '\\n<extra_id_1>' }}{% endgeneration %}
{%- endif %}
{%- endfor %}"""


def _chatml(line_break: str) -> str:
    return _CHATML.replace("BREAK", repr(line_break))


def _inst(*, system: str, start: str, space: str) -> str:
    return _INST.replace("SYSTEM", system).replace("START", start).replace("SPACE", repr(space))


TEMPLATES: dict[str, Template] = {
    "plain": Template(jinja=_PLAIN, stops=("\n",), caption=True),
    "v0": Template(jinja=_V0, system=_VICUNA.replace("user", "human"), stops=("###",)),
    "v1": Template(jinja=_V1, system=_VICUNA),
    "llama_2": Template(jinja=_inst(system="'<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n'", start="bos_token", space=" "), system=_LLAMA_2),
    "llama_3": Template(jinja=_HEADERS, system=_LLAMA_3, stops=("<|eot_id|>",)),
    "mistral": Template(jinja=_inst(system="message.content + '\\n\\n'", start="('' if loop.index0 > 1 else bos_token)", space="")),
    "chatml": Template(jinja=_chatml("\n"), stops=("<|im_end|>",)),
    "qwen": Template(jinja=_chatml("\n"), system="You are a helpful assistant.", stops=("<|im_end|>",)),
    "nvlm-chatml": Template(jinja=_chatml("\n"), system="Answer the questions.", stops=("<|im_end|>",)),
    "nvlm-chatml-paper": Template(jinja=_chatml("\n"), system="Follow the user's instruction and answer questions.", stops=("<|im_end|>",)),
    "nvlm-chatml-hf": Template(jinja=_chatml(""), system="Answer the questions.", stops=("<|im_end|>",)),
    "nvlm-pretrain": Template(jinja=_NVLM_PRETRAIN, stops=("<|im_end|>",)),
    "nvgpt": Template(jinja=_NVGPT.replace("LABELS", "''"), system=_VICUNA + "\n\n", stops=("<extra_id_1>",)),
    "nv_steerlm": Template(jinja=_NVGPT.replace("LABELS", f"'<extra_id_2>{_STEERLM}\\n'"), system=_VICUNA + "\n\n", stops=("<extra_id_1>",)),
    "nv_dpo": Template(jinja=_NVGPT.replace("LABELS", "''"), stops=("<extra_id_1>",)),
    "gemma": Template(jinja=_GEMMA, stops=("<end_of_turn>",)),
    "text": Template(jinja=_TEXT),
}
TEMPLATES = {name: replace(template, ours=True) for name, template in TEMPLATES.items()}
"""`text` adds nothing to what is said: a base model goes on with the text.
`nvlm-chatml` is Megatron-LM's, `-paper` has the system message of the article's figure 12, `-hf` is the released model's: no line breaks.
`nvlm-pretrain` has no roles (figure 11): image, instruction, answer; the line break between the last two is ours."""


UNPROVEN = ("plain", "v0")
"""Formats that no proof of `forms.py` fits: captions drop the question, and LLaVA's oldest format
learns its own header."""
OWN = "own"
"""The word for the model's own chat format: the checkpoint's that a stage starts from, else that of
the tokenizer."""


def recognise(template: Template, *names: str) -> str:
    """Which of these formats of ours asks with the same prompts; empty if none does."""
    return next((name for name in names if _asks_alike(TEMPLATES[name], template)), "")


def _asks_alike(ours: Template, other: Template) -> bool:
    """Do both write one prompt for one question, with and without images, rounds, a system message?

    But for a start token at the front, which transformers' processors put there by themselves.
    """
    asked = Turn(role="user", text=f"{MARKER}\nWhat is  it?")
    later = (Turn(role="assistant", text="A cat."), Turn(role="user", text="Why?"))
    system = Turn(role="system", text="Be brief.")
    talks = [(asked,)] if ours.caption else [(asked,), (asked, *later), (system, asked)]
    for form in (Form(lists=LISTS[0]), Form()):
        with suppress(ValueError):
            if prompts(other, talks, form) == prompts(ours, talks, form):
                return True
    return False


def find_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """The template of a name, or of a Jinja text; for an empty name, or `own`, the tokenizer's own.

    ValueError for an unknown one, and where nothing was given and the tokenizer has none.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    specials = tokenizer.specials if tokenizer is not None else ()
    if "{%" in name or "{{" in name:
        return Template(jinja=name, specials=specials)
    if name not in ("", OWN):
        raise ValueError(f"no template '{name}'.{nearest(name, TEMPLATES)}")
    own = tokenizer.chat_template if tokenizer is not None else ""
    if not own:
        raise ValueError(f"the tokenizer has no chat template: name one with data.template ({', '.join(TEMPLATES)}), or use a tokenizer that has one")
    return Template(jinja=own, specials=specials, own=True)
