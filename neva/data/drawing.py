"""Jinja as transformers runs it: messages in, text out, in a sandbox, with private signs for what
is not text.

A template may come with a downloaded tokenizer: whatever goes wrong while it runs is its refusal,
and what it writes is bounded.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date as day
from datetime import datetime, time
from functools import cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# What stands for an image, the start and the end token, the bounds of an answer, and what splits a
# word that must not be read as an image:
# characters for private use.
IMAGE_SIGN, START_SIGN, END_SIGN, OPEN_SIGN, CLOSE_SIGN, SPLIT_SIGN = (
    "\ue000",
    "\ue001",
    "\ue002",
    "\ue003",
    "\ue004",
    "\ue005",
)
MOST_WRITTEN = 1_000_000
"""Characters that a template may add to its messages."""
MOST_WORK = 200_000
"""Steps that a template may take beside ten for each character of its messages: an item of a loop
or a list and 100 characters are one, a call is ten."""
WIDEST = 10_000
"""Largest number that a filter or a method takes: others fill lines, or lists, up to a number."""

Message = dict[str, Any]
Draw = Callable[[list[Message], bool, str], str]
"""Messages, `add_generation_prompt` and a date (empty: today) -> text. ValueError where the
template refuses."""


class Endless(ValueError):
    """A template was stopped, which might not have ended. It is not asked again."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its text between two signs."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return OPEN_SIGN + caller() + CLOSE_SIGN


class _Meter(threading.local):
    """What the template that is being drawn may still do."""

    left = MOST_WORK

    def take(self, work: int) -> None:
        """OverflowError where a template has done too much."""
        self.left -= work
        if self.left < 0:
            raise OverflowError("it computes too long")


_METER = _Meter()


def _spend(*values: Any) -> int:
    """Take what it costs to go through values once, lists within lists too, and give their size.

    OverflowError for values that no template needs.
    """
    items = 0
    characters = 0
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        items += 1
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        if items + len(waiting) + characters // 100 > _METER.left:
            break
    _METER.take(items + len(waiting) + characters // 100)
    return items + characters


def _counted(values: Any) -> Iterator[Any]:
    """What a loop goes through."""
    for value in values:
        _METER.take(1)
        yield value


def _checked(value: Any) -> Any:
    """A list or a text that was just put together."""
    if isinstance(value, Iterator):
        return _counted(value)
    if isinstance(value, (str, list, tuple, dict)):
        _spend(value)
    return value


def _check_call(name: str, values: Sequence[Any]) -> None:
    """OverflowError for a filter or a method of texts, its text first, that would make too much."""
    if any(isinstance(v, (int, float)) and abs(v) > WIDEST for v in values[1:]):
        raise OverflowError(f"it gives {name} a number beyond {WIDEST:,}")
    text = values[0] if values else None
    if name in ("format", "format_map") and isinstance(text, str) and re.search(r"\d{5}|\*", text):
        raise OverflowError("it pads a text too far")
    sizes = sorted(map(_spend, values))
    if name in REPEATING and math.prod(sizes[-2:]) > 100 * MOST_WRITTEN:
        raise OverflowError("it repeats a text too often")


REPEATING = (
    "format", "format_map", "indent", "join", "replace", "sum", "tojson", "translate", "urlize",
    "wordwrap", "xmlattr",
)  # fmt: skip
"""Filters and methods that write one of their values once for each piece of another."""
QUICK = ("count", "d", "default", "first", "last", "length")
"""Filters that take no longer for longer values."""
INSIDES = (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext)


def _bounded(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes no more than a template may."""

    @wraps(filter)
    def call(*given: Any, **named: Any) -> Any:
        _METER.take(1)
        if name in QUICK:
            return filter(*given, **named)
        values = (*given, *named.values())
        _check_call(name, [value for value in values if not isinstance(value, INSIDES)])
        return _checked(filter(*given, **named))

    return call


def _through(name: str, value: Any) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None)


class _Measuring(NodeTransformer):
    """Sends through `_counted` what a loop goes through, and through `_checked` what is put
    together, compared or written."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("_counted", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        kept = (nodes.TemplateData, nodes.Filter)
        node.nodes = [one if isinstance(one, kept) else _through("_checked", one) for one in node.nodes]
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _through("_checked", node.filter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _through("_checked", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("_checked", node) if isinstance(node.arg, nodes.Slice) else node

    def _built(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _through("_checked", node)

    visit_Concat = visit_Dict = visit_List = _built

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("_checked", node) if node.ctx == "load" else node


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which loops, calls and values are bounded by what a template may do."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum")
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(name, made) for name, made in self.filters.items()}
        self.filters |= {"_counted": _counted, "_checked": _checked}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Measuring().visit(super()._parse(source, name, filename))

    def call(*given: Any, **named: Any) -> Any:  # a template may well name one `self`
        self: Any = given[0]
        context, function, *others = given[1:]
        _METER.take(10)
        if isinstance(function, LoopContext):
            others = [_counted(one) for one in others]
        method: Any = getattr(function, "__wrapped__", function)  # Jinja wraps `format`
        own = getattr(method, "__self__", None)
        if isinstance(own, str):
            _check_call(method.__name__, (own, *others, *named.values()))
        call = ImmutableSandboxedEnvironment.call
        return _checked(call(self, context, function, *others, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        repeated = _length(left) * _count(right) + _length(right) * _count(left)
        if operator == "*" and repeated > MOST_WRITTEN:
            raise OverflowError("it repeats a text too often")
        if operator == "*" and _bits(left) + _bits(right) > WIDEST:
            raise OverflowError("it computes too large a product")
        if operator == "**" and _count(right) * max(1, _bits(left)) > WIDEST:
            raise OverflowError("it computes too large a power")
        if operator == "%" and isinstance(left, str):
            _check_call("format", (left, right))
        return _checked(super().call_binop(context, operator, left, right))


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with `_`: those lead to Python's insides, and the sandbox does not
    look here."""

    def __init__(*args: Any, **given: Any) -> None:  # a template may well name one `self`
        for name in dict(*args[1:], **given):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        refused = f"a namespace takes no name that begins with _: {name[:40]!r}"
        raise jinja2.exceptions.SecurityError(refused)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _count(value: Any) -> int:
    return max(0, value) if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    """As transformers writes JSON: without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)


@cache
def compiled(jinja: str) -> Draw:
    """The template as a function. ValueError if it is not valid Jinja."""
    extensions: list[Any] = [_Generation, "jinja2.ext.loopcontrols"]
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": _refuse, "namespace": _Namespace}
    _METER.left = MOST_WORK  # what is constant in a template is computed here
    try:
        template = environment.from_string(jinja)
    except Exception as error:  # RecursionError too, of a deep nest
        raise ValueError(f"the chat template is not valid Jinja: {_reason(error)}") from None

    def draw(messages: list[Message], prompt: bool, date: str) -> str:
        now = datetime.combine(day.fromisoformat(date), time()) if date else datetime.now()
        values = {
            "messages": messages,
            "add_generation_prompt": prompt,
            "bos_token": START_SIGN,
            "eos_token": END_SIGN,
            "tools": None,
            "documents": None,
            "strftime_now": now.strftime,
        }
        room = MOST_WRITTEN + sum(len(str(message)) for message in messages)
        written: list[str] = []
        _METER.left = MOST_WORK + 10 * (room - MOST_WRITTEN)
        try:
            for part in template.generate(values):
                written.append(part)
                room -= len(part)
                if room < 0:
                    beyond = f"{MOST_WRITTEN:,} characters more than its messages have"
                    raise OverflowError(f"it writes over {beyond}")
        except Exception as error:  # a stranger's program: any error is its refusal
            refusal = f"the chat template refuses the conversation: {_reason(error)}"
            raise (Endless if _METER.left < 0 else ValueError)(refusal) from None
        return "".join(written)

    return draw


def _reason(error: Exception) -> str:
    """An error in one line; by its name where it says nothing, or means nothing to a reader."""
    told = " ".join(str(error).split())[:300]
    if isinstance(error, (jinja2.TemplateError, OverflowError)) and told:
        return told
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
