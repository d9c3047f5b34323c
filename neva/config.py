"""Config trees: frozen dataclasses from YAML and from dotted overrides, with errors that name the key and the fix.

The dataclasses are the schema: their annotations say what a value may be, their defaults what it is when nobody sets
it. Unquoted YAML scalars are read by the type of the field they land in, so `lr: 1e-3` is a float (YAML 1.1 reads a
string), `name: 007` keeps its zeros and `system=A chat: be kind` needs no quotes.
"""

import ast
import difflib
import inspect
import itertools
import json
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

T = TypeVar("T")
Named = Mapping[type, Mapping[str, Any] | Callable[[str], Any]]
"""What a sub-config may be set to by one word: per dataclass, its presets, or a function of the word."""

Overrides = Sequence[str | tuple[str, Any]] | Mapping[str, Any]
"""Changes of a config: texts such as `a.b=c`, or keys with values of Python, as pairs or in a
dict."""

FilePath = Annotated[str, "path"]
"""A file, a folder, or a word in place of one. At its front `~` is the user's home: a shell does
not expand it in `key=~/file`."""

Limits = Mapping[str, tuple[int | float, int | float]]
"""Name of a number -> its least and most, both floats where it need not be whole."""

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


class _Plain(str):
    """An unquoted YAML scalar: the field that it lands in says what it means."""


class _Loader(yaml.SafeLoader):
    """YAML of nothing but lists, mappings and scalars. No tags, anchors or aliases: `[*, !vision.*]` is two wildcards."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own attribute; without resolvers every scalar stays text
    fetch_alias = fetch_anchor = fetch_tag = yaml.SafeLoader.fetch_plain


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back equal."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text that reads back equal: PyYAML folds odd line breaks unless they are escaped, and numbers as text need quotes."""
    style = "'" if _NUMBER.fullmatch(text) else None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    short = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=short)


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str | None:
    if node.style is not None:
        return node.value
    return None if node.value in ("", "~", "null") else _Plain(node.value)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str) or key in built:
            problem = f"key '{key}' stands twice" if isinstance(key, str) else f"'{key}' is no key"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        built[str(key)] = loader.construct_object(value_node, deep=True)
    return built


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that command a terminal, turn the direction of text, or cannot be encoded."""


def shown(text: str) -> str:
    r"""Text that does nothing to a terminal: each character that would is
    spelled as in JSON, \u001b."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def tell(text: str) -> None:
    """Print a line, which may hold names and texts of strangers' files."""
    print(shown(text))


def check_numbers(config: Any, limits: Limits) -> None:
    """ValueError for a field that is no number, or outside its (least, most); None, for fields
    that may be, is passed over.

    Sizes beyond all models are refused here, since what is built of them never
    ends or fills the memory.
    """
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = isinstance(least, float) or isinstance(value, int)
        if not number or not whole or not least <= value <= most:
            kind = "number" if isinstance(least, float) else "whole number"
            raise ValueError(f"{name}={value!r} must be a {kind} from {least:,} to {most:,}.")


def from_json(text: str | bytes) -> Any:
    """The value of a stranger's JSON. ValueError where it is none, or nests so deep
    that it is an attack."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


YAML_BYTES = 2**19
"""Largest YAML of a stranger's that is read."""
NODES = 10**5
"""Most values that one may hold, those that stand at an alias counted at each place."""


def from_yaml(text: str | bytes, loader: Any = yaml.SafeLoader) -> Any:
    """The value of a stranger's YAML. Where it is none: yaml.YAMLError, which knows
    the line, or ValueError.

    ValueError also where a few lines unfold to more than memory holds.
    """
    if len(text) > YAML_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, more than a config's {YAML_BYTES:,}")
    try:
        made = loader(text)
        try:
            node = made.get_single_node()
            if _unfolded(node, {}) > NODES:
                raise ValueError(f"its aliases unfold to more than {NODES:,} values")
            return made.construct_document(node) if node is not None else None
        finally:
            made.dispose()
    except RecursionError:
        raise ValueError("it nests too deep, or stands within itself") from None
    except (AttributeError, LookupError, TypeError) as error:  # `!!bool maybe`, `!!timestamp soon`
        raise ValueError(f"it holds a value that is not what its tag says ({error})") from None


def _unfolded(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values below a node of YAML. RecursionError where it stands within itself."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [one for pair in node.value for one in pair]
        known[id(node)] = 1 + sum(_unfolded(child, known) for child in children)
    return known[id(node)]


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 step, 2,000 steps."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def nearest(word: str, options: Iterable[str]) -> str:
    """The end of a message: that the option closest to `word` may be meant, else all options; empty if there are none."""
    options = list(options)
    close = difflib.get_close_matches(word, options, n=1)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(options)}." if options else ""


def to_dict(config: Any) -> Any:
    """The config as YAML holds it: dataclasses as dicts, tuples as lists."""
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[T], data: Any, *, named: Named | None = None) -> T:
    """The dataclass `cls` built from `to_dict`'s form, sub-configs included; the inverse of `to_dict`.

    A sub-config may also be a word that `named` knows. Raises ValueError with the full dotted key.
    """
    try:
        return _build(cls, data, "", named or {})
    except _NoField as error:
        raise ValueError(error.said(cls)) from None


def override(stages: tuple[T, ...], overrides: Overrides, *, named: Named | None = None) -> tuple[T, ...]:
    """The stages with `a.b=c` (all of them) and `NAME:a.b=c` (one of them) applied from left to right.

    A value is text for the field to read, a YAML list `[a, b]`, mapping `{lr: 1e-3}` (merged into the sub-config) or
    quoted string, or for a sub-config a word that `named` knows. In a dict it is a value of Python.
    Only the result is validated, not the way there.
    """
    trees = [to_dict(stage) for stage in stages]
    for key, value in pairs(overrides):
        stage, colon, path = key.rpartition(":")
        names = [str(tree.get("name", "")) for tree in trees]
        if colon and stage not in names:
            raise ValueError(f"override '{key}': no stage '{stage}'.{nearest(stage, names)}")
        for i, (one, tree) in enumerate(zip(stages, trees, strict=True)):
            if not colon or names[i] == stage:
                trees[i] = _assigned(type(one), tree, path, value, named or {})
    built = tuple(from_dict(type(one), tree, named=named) for one, tree in zip(stages, trees, strict=True))
    _check_names(trees)
    return built


def pairs(overrides: Overrides) -> list[tuple[str, Any]]:
    """Overrides as keys, each `a.b` or `STAGE:a.b`, and values. ValueError for what is none, such
    as one text in place of a list."""
    if isinstance(overrides, str):
        texts = overrides.split() or ["key=value"]
        asdict = {key: value for key, _, value in (text.partition("=") for text in texts)}
        raise ValueError(f"overrides are a list or a dict, not the text {overrides!r}: write {texts!r} or {asdict!r}")
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    found = []
    for item in items:
        if isinstance(item, str):
            key, equals, text = item.partition("=")
            value = _value(text, item) if equals else None
        else:
            key, equals = str(item[0]), True
            value = _of_python(item[1])
        if not equals or not key.rpartition(":")[2].strip():
            raise ValueError(f"override '{item}' is not of the form key=value or STAGE:key=value")
        found.append((key, value))
    return found


def _of_python(value: Any) -> Any:
    """A value as `to_dict` gives it."""
    return os.fspath(value) if isinstance(value, os.PathLike) else to_dict(value)


def _assigned(cls: type, tree: Any, path: str, value: Any, named: Named) -> Any:
    """A stage's tree with a value put at a dotted path. ValueError that names the key, and where an
    unknown one may be meant to lie."""
    parts = tuple(path.strip().split("."))
    try:
        return _assign(cls, tree, parts, value, "", named)
    except _NoField as error:
        raise ValueError(error.said(cls, parts)) from None


def save(stages: Sequence[Any], path: str | Path) -> None:
    """Write the stages as a YAML list that `load` reads back equal. The file appears whole or not at all."""
    write_whole(Path(path), dumps(stages))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, a text as UTF-8: at `path` it appears whole or not at all."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def dumps(stages: Sequence[Any]) -> str:
    """The stages as the YAML text that `save` writes."""
    return yaml.dump([to_dict(stage) for stage in stages], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def load(path: str | Path, cls: type[T], *, named: Named | None = None) -> tuple[T, ...]:
    """The stages of a YAML file: a list of mappings, or one mapping. Raises ValueError with the path and the line."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except RecursionError:
        raise ValueError(f"{path}: it nests too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    trees = data if isinstance(data, list) else [data]
    try:
        built = tuple(from_dict(cls, tree, named=named) for tree in trees)
        _check_names([to_dict(stage) for stage in built])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return built


def _check_names(trees: Sequence[Mapping[str, Any]]) -> None:
    names = [str(tree["name"]) for tree in trees if "name" in tree]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two stages are named '{name}'; rename one with STAGE:name=OTHER")


def _value(value: str, text: str) -> Any:
    """An override's value: YAML where it starts as a list, a mapping or a quoted string, else text for the field to read."""
    value = value.strip()
    if value[:1] not in ("[", "{", '"', "'"):
        return None if value in ("~", "null") else _Plain(value) if value else ""
    try:
        return yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"override '{text}': the value is not valid YAML ({problem}); quote it to mean it as text") from error


def _assign(kind: Any, node: Any, path: tuple[str, ...], value: Any, key: str, named: Named) -> Any:
    """`node`, the value of an annotation `kind` in `to_dict`'s form, with `value` put at `path` below it."""
    cls = next((k for k in _members(kind) if isinstance(k, type) and is_dataclass(k)), None)
    if not path and not (cls and isinstance(value, dict)):
        return value
    if cls:
        if isinstance(node, str):
            node = to_dict(_preset(cls, node, key, named))
        tree, hints = dict(node or {}), _hints(cls)
        for name, (rest, new) in ({path[0]: (path[1:], value)} if path else {k: ((), v) for k, v in value.items()}).items():
            _check_field(cls, name, key)
            tree[name] = _assign(hints[name], tree.get(name), rest, new, _join(key, name), named)
        return tree
    if isinstance(node, list):
        items = list(node)
        if not path[0].isdigit() or int(path[0]) >= len(items):
            raise ValueError(f"{key}: no element '{path[0]}' in a list of {len(items)}; set the whole list with {key}=[…]")
        i = int(path[0])
        element = next((e for k in _members(kind) if (e := _element(k, i)) is not None), Any)
        items[i] = _assign(element, items[i], path[1:], value, _join(key, path[0]), named)
        return items
    if isinstance(node, dict):
        return {**node, path[0]: _assign(Any, node.get(path[0]), path[1:], value, _join(key, path[0]), named)}
    raise ValueError(f"{key} is {_wanted(kind)} and has no field '{path[0]}'")


def _build(kind: Any, value: Any, key: str, named: Named) -> Any:
    """`value` as the annotation `kind` wants it."""
    if isinstance(kind, type) and is_dataclass(kind):
        return _build_dataclass(kind, value, key, named)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _build_union(kind, value, key, named)
    if typing.get_origin(kind) is tuple:
        elements = typing.get_args(kind)
        fixed = elements[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (fixed and len(value) != len(elements)):
            hint = f"; write [{value}]" if isinstance(value, str) and not fixed else ""
            raise _wrong(key, value, kind, hint)
        return tuple(_build(_element(kind, i), item, _join(key, str(i)), named) for i, item in enumerate(value))
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        for choice in choices:
            if str(choice) == str(value) and isinstance(choice, bool) == isinstance(value, bool):
                return choice
        raise _wrong(key, value, kind, "." + nearest(str(value), map(str, choices)))
    return _build_leaf(kind, value, key)


def _build_dataclass(cls: type, value: Any, key: str, named: Named) -> Any:
    if isinstance(value, cls):
        return value
    if isinstance(value, str):
        return _preset(cls, value, key, named)
    if not isinstance(value, Mapping):
        raise _wrong(key, value, cls)
    hints, known = _hints(cls), {}
    for name, item in value.items():
        _check_field(cls, str(name), key)
        known[str(name)] = _build(hints[name], item, _join(key, str(name)), named)
    for f in fields(cls):
        if f.init and f.name not in known and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{_join(key, f.name)}: no value, and it has no default")
    try:
        return cls(**known)
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from error


def _build_union(kind: Any, value: Any, key: str, named: Named) -> Any:
    members = [k for k in _members(kind) if k is not types.NoneType]
    if value is None:
        if len(members) == len(_members(kind)):
            raise _wrong(key, value, kind)
        return None
    if type(value) is str and str in members:
        return value
    errors = []
    for member in sorted(members, key=lambda k: k is str):  # text can always be a string: the others first
        try:
            return _build(member, value, key, named)
        except ValueError as error:
            errors.append(error)
    inside = [e for k, e in zip(members, errors, strict=True) if is_dataclass(k) and isinstance(value, Mapping)]
    raise inside[0] if inside else errors[0] if len(errors) == 1 else _wrong(key, value, kind)


def _build_leaf(kind: Any, value: Any, key: str) -> Any:
    import pydantic  # 0.1 s that `neva --help` need not pay

    boolean = {"true": True, "false": False}.get(str(value).lower()) if isinstance(value, _Plain) else value
    if kind is bool and isinstance(boolean, bool):
        return boolean
    if kind is bool or (isinstance(value, bool) and kind is not Any) or value is None:
        raise _wrong(key, value, kind)
    if kind is float and isinstance(value, str):
        value = re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", value, flags=re.I)  # YAML's spelling
    if kind == FilePath and isinstance(value, str | int | float):
        return os.path.expanduser(str(value))
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    try:
        return _adapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        hint = "" if kind in (int, float, str) else f" ({error.errors()[0]['msg']})"
        raise _wrong(key, value, kind, hint) from error


@cache
def _adapter(kind: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(kind)


def _preset(cls: type, word: str, key: str, named: Named) -> Any:
    presets = named.get(cls)
    if presets is None:
        raise _wrong(key, word, cls)
    if callable(presets):
        try:
            return presets(str(word))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    if word not in presets:
        raise ValueError(f"{key}: no preset '{word}'.{nearest(word, presets)}")
    return presets[word]


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _element(kind: Any, i: int) -> Any:
    """Annotation of element `i` of a tuple; None for what is no tuple."""
    elements = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    return None if not elements else elements[0] if elements[-1] is Ellipsis else elements[i]


def _check_field(cls: type, name: str, key: str) -> None:
    names = [f.name for f in fields(cls) if f.init]
    if name not in names:
        raise _NoField(name, key, names)


class _NoField(ValueError):
    """A key that a config does not have."""

    def __init__(self, name: str, key: str, names: list[str]):
        self.name, self.names = name, names
        self.what = f"no field '{name}'{f' in {key}' if key else ''}."
        self.depth = len(key.split(".")) if key else 0
        super().__init__(self.what + nearest(name, names))

    def said(self, root: type, path: tuple[str, ...] = ()) -> str:
        """The error with the key that may be meant: one that ends in the same words elsewhere below
        `root`, else one of a name that is near, first beside the unknown one."""
        asked = ".".join(path[self.depth :]) or self.name
        below = [one.path for one in _walk(root)]
        there = [one for one in below if one.endswith(f".{asked}")] or [one for one in below if one.endswith(f".{self.name}")]
        if not there and not difflib.get_close_matches(self.name, self.names, n=1):
            lasts = {one.rpartition(".")[2] for one in below}
            near = difflib.get_close_matches(self.name, lasts, n=1, cutoff=0.75)
            there = [one for one in below if near and one.endswith(f".{near[0]}")]
        if not there:
            return str(self)
        return f"{self.what} Did you mean {' or '.join(repr(one) for one in there[:MOST_MEANT])}?"


MOST_MEANT = 4
"""Keys that an error offers."""


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


@dataclass(frozen=True)
class Key:
    """A key of a config: a field, or a sub-config as a whole."""

    path: str
    """Dotted; an element of a list is number 0."""
    kind: str
    """What a value may be, in words."""
    default: str
    """Its value where nobody sets it, as an override spells it; empty where there is none."""
    doc: str


def keys(cls: type, named: Named | None = None) -> Iterator[Key]:
    """Every key of a config tree, in the order of its fields, each sub-config before what it
    holds."""
    for place in _walk(cls):
        words = (named or {}).get(place.inner) if place.inner and not place.many else None
        yield Key(
            path=place.path,
            kind=_choices(place.kind, place.inner, words),
            default=_default(place.field, place.inner),
            doc=_field_docs(place.owner).get(place.field.name, ""),
        )


@dataclass(frozen=True)
class _Place:
    """A field in a tree of configs."""

    path: str
    owner: type
    field: Field
    kind: Any
    """Its annotation."""
    inner: type | None
    """The dataclass that it holds, if any."""
    many: bool
    """Does it hold a list of them?"""


def _walk(cls: type, prefix: str = "") -> Iterator[_Place]:
    for field in fields(cls):
        if not field.init:
            continue
        path, kind = _join(prefix, field.name), _hints(cls)[field.name]
        inner, many = _inner(kind)
        yield _Place(path, cls, field, kind, inner, many)
        if inner:
            yield from _walk(inner, f"{path}.0" if many else path)


def _inner(kind: Any) -> tuple[type | None, bool]:
    """The dataclass that an annotation holds, if any, and whether it is a list of them."""
    for member in _members(kind):
        if isinstance(member, type) and is_dataclass(member):
            return member, False
        element = _element(member, 0)
        if isinstance(element, type) and is_dataclass(element):
            return element, True
    return None, False


def _choices(kind: Any, inner: type | None, words: Any) -> str:
    if inner is None or not isinstance(words, Mapping):
        return _wanted(kind)
    null = " or null" if types.NoneType in _members(kind) else ""
    return f"{_wanted(inner)}, or a preset: {', '.join(words)}{null}"


def _default(field: Field, inner: type | None) -> str:
    """A default as an override spells it; a sub-config's is told by its own keys."""
    value = field.default
    if value is MISSING and inner is None and field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING or (inner and value not in ((), None)):
        return ""
    text = yaml.dump(to_dict(value), Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


@cache
def _field_docs(cls: type) -> dict[str, str]:
    """Field -> the text below it, in one line. A base class's come first."""
    found = {name: doc for base in cls.__bases__ if is_dataclass(base) for name, doc in _field_docs(base).items()}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for field, below in itertools.pairwise(tree.body):
        text = below.value if isinstance(below, ast.Expr) else None
        if not isinstance(text, ast.Constant) or not isinstance(field, ast.AnnAssign):
            continue
        if isinstance(field.target, ast.Name):
            found[field.target.id] = " ".join(str(text.value).split())
    return found


def _wrong(key: str, value: Any, kind: Any, hint: str = "") -> ValueError:
    text = "null" if value is None else str(value) if isinstance(value, _Plain) and _NUMBER.fullmatch(value) else repr(value)
    return ValueError(f"{key or 'the config'}: {text} is not {_wanted(kind)}{hint}")


def _wanted(kind: Any) -> str:
    """The annotation in words: "a float", "one of 'pad', 'crop'"."""
    if kind is types.NoneType:
        return "null"
    if kind == FilePath:
        return "a path"
    if isinstance(kind, type) and is_dataclass(kind):
        return f"a mapping of {kind.__name__}'s fields"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(k) for k in args)
    if origin is tuple:
        of = args[0] if args[-1] is Ellipsis or len(set(args)) == 1 else None
        count = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
        return f"{count} (each {_wanted(of)})" if of else f"{count} ({', '.join(_wanted(k) for k in args)})"
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
