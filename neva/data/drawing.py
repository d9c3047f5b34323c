"""Jinja as transformers runs it: messages in, text out, in a sandbox, with private signs for what
is not text.

A template may come with a downloaded tokenizer: whatever goes wrong while it runs is its refusal,
and what it writes is bounded.
"""

import json
import re
from collections.abc import Callable
from datetime import date as day
from datetime import datetime, time
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

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

Message = dict[str, Any]
Draw = Callable[[list[Message], bool, str], str]
"""Messages, `add_generation_prompt` and a date (empty: today) -> text. ValueError where the
template refuses."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its text between two signs."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return OPEN_SIGN + caller() + CLOSE_SIGN


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which no single product, sum or power is larger than what a template may
    write."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        repeated = _length(left) * _count(right) + _length(right) * _count(left)
        if operator == "*" and repeated > MOST_WRITTEN:
            raise OverflowError("it repeats a text too often")
        if operator == "**" and _count(right) * max(1, _bits(left)) > MOST_WRITTEN:
            raise OverflowError("it computes too large a power")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise OverflowError("it pads a text too far")
        if operator == "+" and _length(left) + _length(right) > 100 * MOST_WRITTEN:
            raise OverflowError("it joins texts that are too long")
        return super().call_binop(context, operator, left, right)


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
    environment.filters["tojson"] = _tojson
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
        try:
            for part in template.generate(values):
                written.append(part)
                room -= len(part)
                if room < 0:
                    beyond = f"{MOST_WRITTEN:,} characters more than its messages have"
                    raise OverflowError(f"it writes over {beyond}")
        except Exception as error:  # a stranger's program: any error is its refusal
            refusal = f"the chat template refuses the conversation: {_reason(error)}"
            raise ValueError(refusal) from None
        return "".join(written)

    return draw


def _reason(error: Exception) -> str:
    """An error in one line; by its name where it says nothing, or means nothing to a reader."""
    told = " ".join(str(error).split())[:300]
    if isinstance(error, (jinja2.TemplateError, OverflowError)) and told:
        return told
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
