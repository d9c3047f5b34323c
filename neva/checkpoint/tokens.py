"""The files beside exported weights that text goes through: tokenizer with `<image>`, chat template, generation settings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from neva.data.sample import MARKER
from neva.data.templates import find_template
from neva.data.tokenizer import JsonTokenizer, Tokenizer
from neva.data.vocabularies import from_sentencepiece

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


def prepare_tokens(tokenizer: Tokenizer, template: str, system: str | None, *, origin: Path | None, images: bool, length: int) -> Tokens:
    """Tokenizer files in which `<image>` is a token if the model sees `images`; those of the source in `origin` where it has them.

    ValueError for a tokenizer that transformers has no form for.
    """
    own = tokenizer.files.get("tokenizer.json")
    # The source's while it is the tokenizer that was trained with: that may have been another.
    if origin is not None and own is not None and (origin / "tokenizer.json").is_file() and (origin / "tokenizer.json").read_bytes() == own:
        files = {name: (origin / name).read_bytes() for name in TEXT_FILES if (origin / name).is_file()}
    elif isinstance(tokenizer, JsonTokenizer):
        files = {name: content for name, content in tokenizer.files.items() if name in TEXT_FILES}
    else:
        files = from_sentencepiece(tokenizer.files["tokenizer.model"])
    model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **json.loads(files.get("tokenizer_config.json", b"{}"))}
    config = {"model_max_length": length, **config} | ({"processor_class": "LlavaProcessor"} if images else {})
    names = {"bos_token": tokenizer.start, "eos_token": tokenizer.eos}
    config |= {role: model.id_to_token(id) for role, id in names.items() if id is not None and not config.get(role)}
    new = []
    if images and model.token_to_id(MARKER) is None:
        new.append(MARKER)
        if not config.get("pad_token"):
            new += [PAD] if model.token_to_id(PAD) is None else []
            config["pad_token"] = PAD
    if new:
        taken = set(model.get_vocab(with_added_tokens=True).values())
        model.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in new])
        if any(model.token_to_id(name) in taken for name in new):
            raise ValueError(f"the tokenizer's ids have gaps, so {', '.join(new)} cannot be added; add them to it and train with that tokenizer")
        files["tokenizer.json"] = model.to_str(pretty=True).encode()
    elif "tokenizer.json" not in files:
        files["tokenizer.json"] = model.to_str(pretty=True).encode()
    pad = config.get("pad_token")
    pad_id = model.token_to_id(pad["content"] if isinstance(pad, dict) else pad) if pad else None
    size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    files |= _chat(tokenizer, template, system, config)
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    files |= _generation(tokenizer, template, model, pad_id, origin)
    image = model.token_to_id(MARKER) if images else None
    return Tokens(files=files, image_token=-1 if image is None else image, pad_token=pad_id, size=size)


def _chat(tokenizer: Tokenizer, template: str, system: str | None, config: dict[str, Any]) -> dict[str, bytes]:
    """The chat template that gives the prompts of `neva generate`; the tokenizer's own stays as it is."""
    if not template:
        return {"chat_template.jinja": tokenizer.chat_template.encode()}
    config.pop("chat_template", None)
    chosen = find_template(template, tokenizer)
    message = chosen.system if system is None else system
    return {"chat_template.jinja": (_flattened(message, caption=chosen.caption) + chosen.jinja.strip("\n")).encode()}


def _flattened(system: str, *, caption: bool) -> str:
    """Jinja that makes of transformers' messages, whose content may be a list of texts and images, what our templates take.

    The images of a user's turn come first, then a line break, as in LLaVA; several stay where they stand.
    """
    lines = [
        "{%- set flat = namespace(messages=[]) %}",
        "{%- for message in messages %}",
        "{%- set part = namespace(text='', images=0) %}",
        "{%- if message.content is string %}{% set part.text = message.content %}",
        "{%- else %}",
        "{%- for item in message.content if item.type == 'image' %}{% set part.images = part.images + 1 %}{% endfor %}",
        "{%- for item in message.content %}",
        "{%- if item.type == 'text' %}{% set part.text = part.text + item.text %}",
        "{%- elif part.images > 1 CAPTION%}{% set part.text = part.text + '<image>' %}{% endif %}",
        "{%- endfor %}",
        "{%- if part.images == 1 CHAT%}{% set part.text = ('<image>\\n' + part.text.strip()).strip() %}{% endif %}",
        "{%- endif %}",
        "{%- set flat.messages = flat.messages + [{'role': message.role, 'content': part.text}] %}",
        "{%- endfor %}",
        "{%- set messages = flat.messages %}",
    ]
    if system:
        first = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
        lines.append(f"{{%- if messages[0].role != 'system' %}}{{% set messages = {first} + messages %}}{{% endif %}}")
    text = "\n".join(lines)
    return text.replace("CAPTION", "or true " if caption else "").replace("CHAT", "and false " if caption else "")


def _generation(tokenizer: Tokenizer, template: str, model: tokenizers.Tokenizer, pad: int | None, origin: Path | None) -> dict[str, bytes]:
    """generation_config.json: the source's, or one that stops where `neva generate` stops, as far as a stop is a token."""
    if origin is not None and (origin / "generation_config.json").is_file():
        return {"generation_config.json": (origin / "generation_config.json").read_bytes()}
    stops = [tokenizer.eos, *(id for stop in find_template(template, tokenizer).stops if (id := model.token_to_id(stop)) is not None)]
    ends = list(dict.fromkeys(stops))
    written: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    if tokenizer.start is not None:
        written["bos_token_id"] = tokenizer.start
    if pad is not None:
        written["pad_token_id"] = pad
    return {"generation_config.json": json.dumps(written, indent=2).encode() + b"\n"}
