"""What is another in a run's config than when its checkpoint was saved."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neva import config as tree
from neva.checkpoint import store
from neva.job import TrainConfig

UNTOLD = ("out", "init")
"""Keys that mean nothing to a stage that goes on."""
MOST = 20
"""Keys that a line names."""


def changed_keys(folder: Path, config: TrainConfig) -> str:
    """A line on the keys of the stage that differ from those it was saved with; empty if none.

    A key that only one version of neva has is passed over.
    """
    saved = store.load_config(folder)
    before = _flat(saved.get("train") or {})
    now = _flat(tree.to_dict(config))
    changed = []
    for key, value in now.items():
        if key in before and before[key] != value and key.split(".")[0] not in UNTOLD:
            changed.append(f"{key} {_shown(before[key])} -> {_shown(value)}")
    if not changed:
        return ""
    named = changed[:MOST]
    if len(changed) > MOST:
        named.append(f"and {len(changed) - MOST} more")
    return f"Changed since step {saved['step']}: {', '.join(named)}"


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values."""
    flat = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and 0 < len(value) < 60 else reprlib.repr(value)
