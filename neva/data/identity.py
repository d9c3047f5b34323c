"""What a loader's saved state belongs to: a run goes on with it only over the same samples, made
into the same tokens and tiles, in the same order."""

import reprlib
from collections.abc import Mapping
from typing import Any

from neva import config as tree
from neva.data.encode import Encoder
from neva.data.source import hashed
from neva.data.templates import TEMPLATES

Identity = Mapping[str, Any]
"""Key, or what a key stands for -> its value as JSON; one that is a mapping is compared entry by
entry."""

FIX = "Put it back, or start the stage anew from its weights: init.model=CHECKPOINT out=FOLDER"


def of_encoder(encoder: Encoder) -> dict[str, Any]:
    """What decides into which tokens and tiles a sample is made.

    Of a template's date and of a system message that the template brings itself the effect counts,
    not how it was asked for.
    """
    chosen = encoder.chosen
    tells_date = "strftime_now" in chosen.jinja
    return {
        "data.template": _named(chosen.jinja),
        "data.system": chosen.system if encoder.system is None else encoder.system,
        "data.date": encoder.date if tells_date else "",
        "data.tokenizer": _of_files(encoder.tokenizer.files),
        "image layout": tree.to_dict(encoder.layout),
    }


def compare(saved: Identity, mine: Identity) -> list[str]:
    """Keys of `mine` that `saved`, of an earlier version of neva, does not tell.

    Raises ValueError naming every key that differs.
    """
    before, now = _flat(saved), _flat(mine)
    changed = []
    for key, value in now.items():
        if key in before and before[key] != value:
            changed.append(f"{key} {_shown(before[key])} but this run has {_shown(value)}")
    if changed:
        told = "; ".join(changed)
        lost = "its samples would be lost or repeated"
        raise ValueError(f"the saved data state has {told}: {lost}. {FIX}")
    return [key for key in mine if key not in saved]


def _flat(identity: Identity) -> dict[str, Any]:
    flat = {}
    for key, value in identity.items():
        if isinstance(value, Mapping):
            flat |= {f"{key} {name}": one for name, one in value.items()}
        else:
            flat[key] = value
    return flat


def _named(jinja: str) -> str:
    """A chat format's name if it is one of ours, and the hash of its text, which may change."""
    names = (name for name, template in TEMPLATES.items() if template.jinja == jinja)
    return f"{next(names, 'a template of its own')} ({hashed(jinja.encode())})"


def _of_files(files: Mapping[str, bytes]) -> str:
    parts = [f"{name} {hashed(content)}" for name, content in sorted(files.items())]
    return hashed("\n".join(parts).encode())


_words = reprlib.Repr()
_words.maxstring = 80
_words.maxlist = 20
_words.maxlevel = 4


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value.startswith("sha256:") else _words.repr(value)
