"""Writes docs/keys.md from the fields of `neva/job.py:TrainConfig` and their texts: `make keys`."""

from pathlib import Path

from neva.config import Key
from neva.job import find_keys

PAGE = Path(__file__).with_name("keys.md")
HEAD = """# Keys

Every key of a training stage: `neva train RECIPE KEY=VALUE` sets it for all stages, `STAGE:KEY=VALUE` for one. `neva keys PATTERN` prints
those that match, `neva show RECIPE` the values of a recipe, which differ from the defaults here. An element of a list has its number in
its name: `data.sources.0.weight=2`.

This page is made by `make keys` from the fields' own texts.
"""


def page() -> str:
    """The page's text: a section for each part of a stage, and a line for each of its keys."""
    sections: dict[str, list[Key]] = {"": []}
    for key in find_keys():
        parent = key.path.rpartition(".")[0]
        if _has_keys(key):
            sections[f"{key.path}.0" if key.path in LISTS else key.path] = [key]
        else:
            sections[parent].append(key)
    parts = [HEAD]
    for path, keys in sections.items():
        parts.append(f"\n## {path.removesuffix('.0') or 'A stage'}\n")
        if path:
            parts.append(f"{_text(keys.pop(0))}\n")
        parts += [f"- `{key.path}`: {_text(key)}" for key in keys]
    return "\n".join(parts) + "\n"


LISTS = ("data.sources",)
"""Parts that are lists of mappings."""


def _has_keys(key: Key) -> bool:
    return "a mapping of" in key.kind


def _text(key: Key) -> str:
    default = f" (default `{key.default}`)" if key.default else ""
    kind = key.kind[0].upper() + key.kind[1:]
    return f"{kind}{default}. {key.doc}".strip()


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
