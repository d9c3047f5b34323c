"""A YAML file as OmegaConf reads it, and its `${…}` replaced by what they mean, without OmegaConf.

`${a.b}` and `${.b}` are other keys of the file, `${oc.env:NAME,default}` and `${multiply:2,4}` are functions. They nest, follow each
other, and may stand within text. REFERENCE: omegaconf/grammar/*.g4; the functions are OmegaConf's, NeMo's and its Launcher's.
"""

import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neva.config import NODES, from_yaml

Place = tuple[str, ...]
"""The names on the way from the top of the file to a value."""
PACKAGES = ("training", "fine_tuning", "peft")
"""Where the Launcher puts such a file: there `${training.model.x}` is what the file itself calls `model.x`."""


@dataclass(frozen=True, kw_only=True)
class Unresolved:
    """A value that neither the file nor the environment gives."""

    raw: str
    """What the file says."""
    why: str

    def __str__(self) -> str:
        return self.raw


LONGEST = 2**16
"""Most characters of a text with interpolations in it."""
_MISSING = object()
_OPENING = re.compile(r"(\\*)\$\{")


class _Unknown(Exception):
    """Why a value is unresolved."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with OmegaConf's changes: 1e-5 is a number, a date is text, and no key stands twice."""


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF|nan|NaN|NAN))")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":timestamp", ":float"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+0123456789."))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"the key {twice} stands twice",
            node.start_mark,
        )
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. ValueError with path and line for a file that is something else."""
    try:
        found = from_yaml(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{path}{f':{mark.line + 1}' if mark else ''} cannot be read as YAML: {problem}") from None
    if not isinstance(found, dict):
        kind = {list: "a list", str: "text", type(None): "nothing"}.get(type(found), "one value")
        raise ValueError(f"{path} holds {kind}, not the keys of a config")
    return found


def resolve(root: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[dict[str, Any], set[str]]:
    """The tree with each `${…}` replaced, or `Unresolved`, and the keys that others refer to. ValueError for a value that refers to itself."""
    resolver = _Resolver(root, environment)
    try:
        found = resolver.value(dict(root), ())
        if _values(found, {}) > NODES:
            raise ValueError(f"its values refer to each other and unfold to more than {NODES:,}")
        return found, resolver.referred
    except RecursionError:
        raise ValueError("its values refer to each other, or nest, without end") from None


def _values(found: Any, known: dict[int, int]) -> int:
    """Values of a tree, those that stand at several places counted at each."""
    if not isinstance(found, dict | list):
        return 1
    if id(found) not in known:
        below = found.values() if isinstance(found, dict) else found
        known[id(found)] = 1 + sum(_values(one, known) for one in below)
    return known[id(found)]


class _Resolver:
    def __init__(self, root: Mapping[str, Any], environment: Mapping[str, str]):
        self.root, self.environment = root, environment
        self.done: dict[Place, Any] = {}
        self.under_way: list[Place] = []
        self.referred: set[str] = set()
        self.functions: dict[str, Callable[..., Any]] = {
            "oc.env": self._env, "oc.decode": self._decode, "oc.select": self._select,
            "multiply": lambda x, y: _numbers(x, y) and _small(x * y),
            "divide_ceil": lambda x, y: _numbers(x, y) and math.ceil(x / y),
            "divide_floor": lambda x, y: _numbers(x, y) and math.floor(x / y),
        }  # fmt: skip

    def value(self, raw: Any, place: Place) -> Any:
        """What stands at a place, with all below it."""
        if isinstance(raw, Mapping):
            return {key: self.value(one, (*place, str(key))) for key, one in raw.items()}
        if isinstance(raw, list):
            items = [self.value(one, (*place, str(number))) for number, one in enumerate(raw)]
            lost = next((item for item in items if isinstance(item, Unresolved)), None)
            return items if lost is None else Unresolved(raw=str(raw), why=lost.why)
        if not isinstance(raw, str) or ("${" not in raw and raw != "???"):
            return raw
        if place in self.under_way:
            way = " -> ".join(".".join(p) for p in (*self.under_way[self.under_way.index(place) :], place))
            raise ValueError(f"{'.'.join(place)}={raw} refers to itself: {way}")
        if place not in self.done:
            self.under_way.append(place)
            try:
                self.done[place] = self._text(raw, place)
            except _Unknown as why:
                self.done[place] = Unresolved(raw=raw, why=str(why))
            self.under_way.pop()
        return self.done[place]

    def _text(self, raw: str, place: Place) -> Any:
        """A value of its own type where an interpolation stands alone, else text."""
        if len(raw) > LONGEST:
            raise _Unknown(f"it has more than {LONGEST:,} characters")
        if raw == "???":
            raise _Unknown("??? stands for a value that must be given")
        found: list[Any] = [piece if isinstance(piece, str) else self._inner(piece[0], place) for piece in _pieces(raw)]
        if len(found) == 1:
            return found[0]
        if odd := [one for one in found if not isinstance(one, str | int | float)]:
            raise _Unknown(
                f"{'null' if odd[0] is None else reprlib.repr(odd[0])} cannot stand within text",
            )
        text = list(map(str, found))
        if sum(map(len, text)) > LONGEST:
            raise _Unknown(f"it becomes a text of more than {LONGEST:,} characters")
        return "".join(text)

    def _inner(self, content: str, place: Place) -> Any:
        """What stands between the braces: a key, or a function and its arguments."""
        name, *rest = _cut(content, ":")
        name = str(self._text(name.strip(), place))
        if not rest:
            return self._key(name, place)
        if name not in self.functions:
            raise _Unknown(f"{name} is none of the functions that neva knows ({', '.join(self.functions)})")
        arguments = [self._argument(one.strip(), place) for one in _cut(":".join(rest), ",")]
        try:
            return self.functions[name](*arguments)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise _Unknown(f"{name} cannot be computed ({error})") from None

    def _argument(self, text: str, place: Place) -> Any:
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            return str(self._text(text[1:-1].replace(f"\\{text[0]}", text[0]), place))
        if "${" in text:
            return self._text(text, place)
        if text[:1] in ("[", "{"):
            raise _Unknown(f"{text} is a list or mapping, which neva does not read here")
        return _scalar(text)

    def _key(self, name: str, place: Place) -> Any:
        """The value of another key, `name` seen from the top of the file or, with leading dots, from `place`."""
        up = len(name) - len(name.lstrip("."))
        names = tuple(re.findall(r"[^.\[\]\s]+", name))
        if up > len(place) or not names:
            raise _Unknown(f"{name or 'an empty name'} is no key")
        if not up and len(names) > 1 and names[0] in PACKAGES and names[0] not in self.root:
            names = names[1:]
        at, node, given = (), self.root, True  # `given`: the node is what the file says, not yet resolved
        for one in (*place[: len(place) - up], *names) if up else names:
            if given and isinstance(node, str):
                node, given = self.value(node, at), False
            if isinstance(node, Unresolved):
                raise _Unknown(node.why)
            at = (*at, one)
            children = dict(enumerate(node)) if isinstance(node, list) else node if isinstance(node, Mapping) else {}
            node = next((child for key, child in children.items() if str(key) == one), _MISSING)
            if node is _MISSING:
                raise _Unknown(f"{name} is not in the file")
        self.referred.add(".".join(at))
        found = self.value(node, at) if given else node
        if isinstance(found, Unresolved):
            raise _Unknown(found.why)
        return found

    def _env(self, name: str, *default: Any) -> str | None:
        if name not in self.environment and not default:
            raise _Unknown(f"the environment has no {name}")
        found = self.environment.get(name, *default)
        return None if found is None else str(found)

    def _decode(self, text: Any) -> Any:
        return self._argument(text.strip(), ()) if isinstance(text, str) else text

    def _select(self, name: str, default: Any = None) -> Any:
        try:
            return self._key(name, ())
        except _Unknown:
            return default


def _numbers(*values: Any) -> bool:
    if odd := [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise TypeError(f"{reprlib.repr(odd[0])} is not a number")
    return True


def _small(product: int | float) -> int | float:
    """A number of a config: products of products would else fill the memory with digits."""
    if isinstance(product, int) and product.bit_length() > 128:
        raise ArithmeticError("the product is no size of a model")
    return product


def _pieces(text: str) -> list[str | tuple[str]]:
    r"""Text, and the insides of `${…}` as tuples of one, in their order; `\${` is text."""
    pieces: list[str | tuple[str]] = []
    start = 0
    while match := _OPENING.search(text, start):
        before = text[start : match.start()] + "\\" * (len(match[1]) // 2)
        if len(match[1]) % 2:
            pieces.append(before + "${")
            start = match.end()
            continue
        end = next((at for at, depth, _ in _walk(text, match.end()) if depth < 0), None)
        if end is None:
            raise _Unknown("its braces do not close")
        pieces += [before, (text[match.end() : end],)]
        start = end + 1
    pieces.append(text[start:])
    return [piece for piece in pieces if piece] or [""]


def _cut(text: str, separator: str) -> list[str]:
    """Parts between separators that stand outside braces, brackets and quotes."""
    places = [at for at, depth, quoted in _walk(text, 0) if depth == 0 and not quoted and text[at] == separator]
    return [text[a + 1 : b] for a, b in zip([-1, *places], [*places, len(text)], strict=True)]


def _walk(text: str, start: int) -> list[tuple[int, int, bool]]:
    """Each place, how many braces and brackets are open behind it, and whether it is within quotes; ends where one closes that never opened."""
    seen, depth, quote = [], 0, ""
    for at in range(start, len(text)):
        one = text[at]
        if quote:
            quote = "" if one == quote and text[at - 1] != "\\" else quote
        elif one in "'\"":
            quote = one
        elif one in "{[":
            depth += 1
        elif one in "}]":
            depth -= 1
        seen.append((at, depth, bool(quote)))
        if depth < 0:
            break
    return seen


def _scalar(text: str) -> Any:
    """An argument by OmegaConf's grammar: a number, true, false, null, or text."""
    if re.fullmatch(r"[-+]?(0|[1-9](_?\d)*)", text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)
