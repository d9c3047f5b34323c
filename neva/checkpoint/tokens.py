"""The files beside exported weights that text goes through: tokenizer with `<image>`, chat template, generation settings."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from neva.checkpoint.shards import read_json
from neva.data.encode import Encoder
from neva.data.forms import LISTS, Form
from neva.data.sample import MARKER
from neva.data.template import starts
from neva.data.tokenizer import IMAGE_PARTS, JsonTokenizer, SentencePieceTokenizer, Tokenizer
from neva.models.hf_vlm import processor_class

PAD = "<pad>"
TEXT_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Files to write, and what the model's config must say of the tokens."""

    files: dict[str, bytes]
    image_token: int
    """Id of `<image>`; -1 where the model sees none."""
    pad_token: int | None
    size: int
    """One more than the largest id."""


def imported_ends(checkpoint: Path) -> list[int]:
    """The ids at which the folder that was imported ends its answers, for transformers as for us.

    generation_config.json lists them; where there is none, config.json or the
    config of its text model does.
    """
    for kind in ("vlm", "decoder"):
        folder = checkpoint / "source" / kind
        if (folder / "generation_config.json").is_file():
            return _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
        if (folder / "config.json").is_file():
            whole = read_json(folder / "config.json")
            parts = (whole, whole.get("text_config"), whole.get("llm_config"))
            listed = (_ids(part.get("eos_token_id")) for part in parts if isinstance(part, dict))
            return next((ids for ids in listed if ids), [])
    return []


def _ids(value: Any) -> list[int]:
    """One id or several, as configs spell them."""
    values = value if isinstance(value, list) else [value]
    return [id for id in values if type(id) is int]


def prepare_tokens(
    encoder: Encoder,
    *,
    origin: Path | None,
    length: int,
    rows: int,
    ends: Sequence[int] = (),
) -> Tokens:
    """Tokenizer files in which `<image>` is a token if the model sees images; those of the source in `origin` where it has them.

    `length`: the model's positions; `rows`: tokens that its embedding knows; `ends`: ids that end
    an answer besides the tokenizer's and the template's.
    ValueError for a tokenizer that transformers has no form for.
    """
    tokenizer, images = encoder.tokenizer, encoder.layout.images
    own = tokenizer.files.get("tokenizer.json")
    # The source's while it is the tokenizer that was trained with: that may have been another.
    if origin is not None and own is not None and (origin / "tokenizer.json").is_file() and (origin / "tokenizer.json").read_bytes() == own:
        files = {name: (origin / name).read_bytes() for name in TEXT_FILES if (origin / name).is_file()}
    elif isinstance(tokenizer, JsonTokenizer):
        files = {name: content for name, content in tokenizer.files.items() if name in TEXT_FILES and name != "added_tokens.json"}
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        files = tokenizer.as_json()
    model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **json.loads(files.get("tokenizer_config.json", b"{}"))}
    config = {"model_max_length": length, **config} | ({"processor_class": processor_class(encoder.layout.aspect)} if images else {})
    names = {"bos_token": tokenizer.start, "eos_token": tokenizer.eos}
    config |= {role: model.id_to_token(id) for role, id in names.items() if id is not None and not config.get(role)}
    before = model.to_str()
    if images and model.token_to_id(MARKER) is None:
        _add(model, [MARKER, *([PAD] if not config.get("pad_token") and model.token_to_id(PAD) is None else [])])
        config["pad_token"] = config.get("pad_token") or PAD
    # A batch of prompts is filled up in front: behind a prompt of unlike length its
    # answer would begin wrongly.
    config["padding_side"] = "left"
    # One beyond the embedding, where nothing makes that larger, would end the batch with an error.
    if not config.get("pad_token") or (not images and tokenizer.pad >= rows):
        config["pad_token"] = model.id_to_token(
            tokenizer.pad if tokenizer.pad < rows else tokenizer.eos,
        )
    if images and tokenizer.image_parts and tokenizer.gap:
        config[IMAGE_PARTS] = True
    _start(model, tokenizer)
    if model.to_str() != before:
        files["tokenizer.json"] = model.to_str(pretty=True).encode()
    pad: Any = config["pad_token"]
    pad_id = model.token_to_id(pad["content"] if isinstance(pad, dict) else pad)
    size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    files |= _chat(encoder, config)
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    files |= _generation(encoder, pad_id, origin, ends)
    image = model.token_to_id(MARKER) if images else None
    return Tokens(files=files, image_token=-1 if image is None else image, pad_token=pad_id, size=size)


def _add(model: tokenizers.Tokenizer, names: list[str]) -> None:
    """Add special tokens behind all others."""
    taken = set(model.get_vocab(with_added_tokens=True).values())
    model.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in names])
    if any(model.token_to_id(name) in taken for name in names):
        raise ValueError(f"the tokenizer's ids have gaps, so {', '.join(names)} cannot be added; add them to it and train with that tokenizer")


def _start(model: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Let the file itself put the start token before a text, where we do and it does not."""
    if tokenizer.bos is not None and model.encode("a").ids[:1] != [tokenizer.bos]:
        name = model.id_to_token(tokenizer.bos)
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B:1", special_tokens=[(name, tokenizer.bos)]
        )  # fmt: skip


def _chat(encoder: Encoder, config: dict[str, Any]) -> dict[str, bytes]:
    """The chat template that gives the prompts of `neva generate`: the model's own where it does.

    `config` is tokenizer_config.json, which loses its own: another file holds it.
    """
    tokenizer, images, chosen = encoder.tokenizer, encoder.layout.images, encoder.chosen
    form = chosen.form
    message = chosen.system if encoder.system is None else encoder.system
    around = encoder.layout.image_prefix, encoder.layout.image_suffix
    config.pop("chat_template", None)
    # A processor hands lists to it, a tokenizer texts.
    takes = form.either or (form.lists == LISTS[0] if images else not form.lists)
    spaced = images and tokenizer.gap and tokenizer.image_parts
    amended = bool(message) or form.adds_end or (images and any(around)) or spaced
    if chosen.own and takes and not amended:
        return {"chat_template.jinja": chosen.jinja.encode()}
    text = chosen.jinja.strip("\n")
    if images:
        # Behind a start token of its own a model's template writes no first text: it stays there.
        begins = starts(chosen) and not (chosen.own and tokenizer.gap)
        text = _for_processor(text, tokenizer, starts=begins)
    elif encoder.template:
        text = _for_tokenizer(text, tokenizer, starts=starts(chosen))
    if form.lists and any(around):
        framed = "".join((around[0], MARKER, around[1]))
        shown = f"{{{{- drawn | replace({MARKER!r}, {framed!r}) }}}}"
        text = "{%- set drawn %}\n" + text + "{%- endset %}\n" + shown
    given = _flattened(message, form, around, caption=chosen.caption)
    return {"chat_template.jinja": (given + text).encode()}


def _for_processor(text: str, tokenizer: Tokenizer, *, starts: bool) -> str:
    """A template whose text a processor takes: it puts the start token before it, and `<image>` is
    a special token there."""
    begins = starts and tokenizer.bos is not None
    spaced = tokenizer.gap and tokenizer.image_parts
    if not begins and not spaced:
        return text
    whole = "whole[bos_token | length:]" if begins else "whole"
    text = "{%- set whole %}\n" + text + "{%- endset %}\n"
    if not spaced:
        return text + "{{- " + whole + " }}"
    lines = (
        "{%- for part in (" + whole + f").split({MARKER!r}) %}}",
        f"{{%- if not loop.first %}}{{{{ {MARKER!r} }}}}",
        f"{{%- if part and {_needs_gap('part', text, tokenizer)} %}}{{{{ ' ' }}}}{{% endif %}}",
        "{%- endif %}",
        "{{- part }}",
        "{%- endfor %}",
    )
    return text + "\n".join(lines)


def _for_tokenizer(text: str, tokenizer: Tokenizer, *, starts: bool) -> str:
    """A template whose text a tokenizer takes as it is: the template writes
    the start token itself."""
    if tokenizer.bos is None or (starts and not tokenizer.gap):
        return text
    if not tokenizer.gap:
        return "{{- bos_token }}" + text
    whole = "whole[bos_token | length:]" if starts else "whole"
    need = _needs_gap("whole", text, tokenizer)
    text = "{%- set whole %}\n" + text + "{%- endset %}\n"
    text += "{%- set whole = " + whole + " %}\n"
    return text + "{{- bos_token + (' ' if " + need + " else '') + whole }}"


def _needs_gap(name: str, template: str, tokenizer: Tokenizer) -> str:
    """The Jinja condition that the text of this name must have a space between it and a
    special token before it.

    None stands before another special token. Before a space a tokenizer.json wants none,
    and SentencePiece one more.
    """
    begins = [token for token in tokenizer.specials if token in template]
    begins += [" "] if isinstance(tokenizer, JsonTokenizer) else []
    return f"not {name}.startswith({tuple(begins)!r})"


_CHAT = (
    "{%- for item in message.content %}",
    "{%- if item.type == 'text' %}{% set part.text = part.text + item.text %}",
    "{%- elif part.images > 1 %}{% set part.text = part.text + IMAGE + '\\n' %}{% endif %}",
    "{%- endfor %}",
    "{%- if part.images == 1 %}{% set part.text = (IMAGE + '\\n' + part.text.strip()).strip() %}{% endif %}",
)
_TEXTS = (
    "{%- for item in message.content if item.type == 'text' %}",
    "{%- set part.text = part.text + item.text %}",
    "{%- endfor %}",
)
_CAPTION = (
    "{%- if message.role == 'user' %}{% set part.text = IMAGE * part.images %}",
    "{%- else %}",
    *_TEXTS,
    "{%- endif %}",
)
_LIST = (*_TEXTS, "{%- if part.images %}{% set part.text = part.text.strip() %}{% endif %}")
"""The content of a turn as one text, IMAGE for what stands for one. A caption's question is its
images alone; where a template takes lists, its images stand apart."""


def _flattened(system: str, form: Form, around: tuple[str, str], *, caption: bool) -> str:
    """Jinja that makes of transformers' messages, a text or a list of texts and images each, what
    the template takes: a text for those that take one, with the system message, line breaks and end
    tokens that `neva generate` puts there and the template does not.

    In a text the image of a user's turn comes first, then a line break, as in LLaVA; several stay
    where they stand, a line break behind each.
    """
    image = repr(f"{around[0]}{MARKER}{around[1]}")
    content = _LIST if form.lists else _CAPTION if caption else _CHAT
    lines = [
        "{%- set flat = namespace(messages=[]) %}",
        "{%- for message in messages %}",
        "{%- set part = namespace(text='', images=0, list=[]) %}",
        "{%- if message.content is string %}{% set part.text = message.content %}",
        "{%- else %}",
        "{%- for item in message.content if item.type == 'image' %}",
        "{%- set part.images = part.images + 1 %}",
        "{%- set part.list = part.list + [item] %}",
        "{%- endfor %}",
        *(line.replace("IMAGE", image) for line in content),
        "{%- endif %}",
    ]
    if form.joint:
        joined = f"{{% set part.text = {form.joint!r} + part.text %}}"
        lines.append(f"{{%- if part.images and part.text %}}{joined}{{% endif %}}")
    if form.adds_end:
        ended = "{% set part.text = part.text + eos_token %}"
        lines.append(f"{{%- if message.role == 'assistant' %}}{ended}{{% endif %}}")
    lines += [
        "{%- set content = part.text %}",
        *_listed(form),
        "{%- set flat.messages = flat.messages + [{'role': message.role, 'content': content}] %}",
        "{%- endfor %}",
        "{%- set messages = flat.messages %}",
    ]
    if system:
        spelled = json.dumps(system, ensure_ascii=False)
        listed = f"[{{'type': 'text', 'text': {spelled}}}]"
        content_of = listed if "system" in form.lists else spelled
        first = f"[{{'role': 'system', 'content': {content_of}}}]"
        lines.append(f"{{%- if messages[0].role != 'system' %}}{{% set messages = {first} + messages %}}{{% endif %}}")
    return "\n".join(lines)


def _listed(form: Form) -> tuple[str, ...]:
    """Lines that make a list of a turn's images and its text, where the template takes lists."""
    if not form.lists:
        return ()
    return (
        f"{{%- if message.role in {list(form.lists)} %}}",
        "{%- set content = part.list %}",
        "{%- if part.text or not part.images %}",
        "{%- set content = content + [{'type': 'text', 'text': part.text}] %}",
        "{%- endif %}",
        "{%- endif %}",
    )


def _generation(
    encoder: Encoder,
    pad: int | None,
    origin: Path | None,
    ends: Sequence[int],
) -> dict[str, bytes]:
    """generation_config.json: the source's if there is one, and that it stops where `neva generate` stops, as far as a stop is a token."""
    file = origin / "generation_config.json" if origin is not None else None
    given = file.read_bytes() if file is not None and file.is_file() else b""
    written: dict[str, Any] = json.loads(given or b"{}")
    known = _ids(written.get("eos_token_id"))
    listed = list(dict.fromkeys([*known, *ends, encoder.tokenizer.eos, *sorted(encoder.stop_ids)]))
    if written and listed == known:
        return {"generation_config.json": given}
    written["eos_token_id"] = listed if len(listed) > 1 else listed[0]
    if encoder.tokenizer.start is not None:
        written.setdefault("bos_token_id", encoder.tokenizer.start)
    if pad is not None:
        written.setdefault("pad_token_id", pad)
    return {"generation_config.json": json.dumps(written, indent=2).encode() + b"\n"}
