"""Which chat format a foreign model has: its own template, or that which its
family is trained with."""

from collections.abc import Sequence
from dataclasses import dataclass

from neva.checkpoint.hf import Source
from neva.data.template import check
from neva.data.templates import UNPROVEN, find_template, recognise
from neva.data.tokenizer import Tokenizer

LLAVA = ("llava", "llava_next", "llava-original")
"""Formats of a whole LLaVA. Its own chat template, where it brings one, is the format that it was
trained with; other models that say a format (NVLM-D, NeMo's) are asked by code of their own."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A model's chat format."""

    template: str
    """A name, or empty for the template beside its tokenizer."""
    note: str = ""
    """What to say of the choice; empty if nothing."""


def chat_format(
    sources: Sequence[Source],
    tokenizer: Tokenizer | None,
    *,
    images: bool,
) -> ChatFormat:
    """The folder's own template if it says all of a conversation, else what such a model is trained
    with: LLaVA's `v1` for one that sees, and nothing around the text for one that does not.

    LLaVA's name is kept where the folder's template writes the prompts of that, as our exports do.
    """
    own = tokenizer is not None and bool(tokenizer.chat_template)
    given = next((source.template for source in sources if source.template), "")
    llava = any(source.format in LLAVA for source in sources)
    usual = given or ("v1" if images else "text")
    if tokenizer is None or not own or (given and not llava):
        return ChatFormat(template=usual)
    template = find_template("", tokenizer)
    if llava and (name := recognise(template, usual, *UNPROVEN)):
        return ChatFormat(template=name)
    try:
        check(template, images=images)
    except ValueError as error:
        if llava:
            taken = f"{usual} is taken in its place; --template takes another"
            return ChatFormat(template=usual, note=f"warning: {error} ({taken})")
        advice = "name another with --template"
        return ChatFormat(template="", note=f"warning: {error} ({advice})")
    note = "chat format: the folder's own template"
    if template.form.adds_end:
        note += "; it ends no answer, so the tokenizer's end token is put behind each"
    return ChatFormat(template="", note=note)
