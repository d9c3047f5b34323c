"""A stranger's template ends soon, whatever it computes, and fills no memory."""

import resource
import time
from collections.abc import Iterator

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from neva.data.drawing import compiled

GROWS = "{% set n = namespace(a='x' * 1000) %}{% for i in range(40) %}"
LENGTH = "{% endfor %}{{ n.a|length }}"
ALIKE = """{% set n = namespace(a=1, b=1) %}
{% for i in range(60) %}{% set n.a = A %}{% set n.b = B %}{% endfor %}{{ n.a is eq(n.b) }}"""
"""Two values, each of which holds the one before twice, compared."""
LARGE = (
    "{% set n = namespace(a='x' * 999999 + 'y', b='x' * 999999 + 'y', c='') %}"
    "{% for i in range(99999) %}{% for j in range(9) %}SMALL{% endfor %}{% endfor %}"
)
"""A large text, gone through again and again."""
HARMFUL = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "tilde": GROWS + "{% set n.a = n.a ~ n.a %}" + LENGTH,
    "block": GROWS + "{% set q %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = q %}" + LENGTH,
    "join": GROWS + "{% set n.a = [n.a, n.a]|join %}" + LENGTH,
    "product": "{% set n = namespace(a=3) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "lists": "{% set n = namespace(a=[]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
    "equal lists": ALIKE.replace("A", "[n.a, n.a]").replace("B", "[n.b, n.b]"),
    "equal tuples": ALIKE.replace("A", "(n.a, n.a)").replace("B", "(n.b, n.b)"),
    "equal mappings": ALIKE.replace("A", "{1: n.a, 2: n.a}").replace("B", "{1: n.b, 2: n.b}"),
    "comparisons": LARGE.replace("SMALL", "{% if n.a != n.b %}{% endif %}"),
    "parts": LARGE.replace("SMALL", "{% set n.c = n.a[1:] %}"),
    "sum": "{{ ([['x' * 1000000] * 1000] * 1000)|sum(start=[])|length }}",
    "center": "{{ 'x'|center(5000000000)|length }}",
    "ljust": "{{ 'x'.ljust(5000000000)|length }}",
    "percent": "{{ '%2000000000d'|format(1)|length }}",
    "braces": "{{ '{:2000000000d}'.format(1)|length }}",
    "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list|length }}",
    "replace": "{{ ('x' * 1000000)|replace('x', 'y' * 1000000)|length }}",
    "lipsum": "{{ lipsum(100000, false, 10000, 20000)|length }}",
    "indent": "{{ ('x\\ny'|indent(2000000000))|length }}",
    "tojson": "{{ [1]|tojson(indent=2000000000)|length }}",
    "tabs": "{{ '\\t'.expandtabs(2000000000)|length }}",
}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What is allocated beyond 2 GB more than now is an error."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", HARMFUL)
def test_it_is_refused_before_it_takes_long(name: str, little_memory: None) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="too|beyond|undefined"):
        compiled(HARMFUL[name])([{"role": "user", "content": "What?"}], True, "")
    assert time.process_time() - started < 10


def test_long_conversations_are_drawn() -> None:
    """Ten thousand turns, each gone through by filters, methods and macros."""
    each = "{{ say(m.content.strip()|replace('a', 'b')) }}{{ m.role ~ ': ' }}{% if 'b' in m.content %}!{% endif %}"
    jinja = "{% macro say(x) %}{{ x }}{% endmacro %}{% for m in messages[::1] %}" + each + "{% endfor %}{{ messages|length }}"
    messages = [{"role": "user", "content": "ab" * 20}] * 10_000
    drawn = compiled(jinja)(messages, True, "")
    assert drawn == ("bb" * 20 + "user: !") * 10_000 + "10000"


def test_a_long_message_is_drawn() -> None:
    content = "50% of {100000} <image> " * 50_000
    jinja = "{% for m in messages %}{{ m.content.strip().split('</think>')[-1]|replace('<image>', '')|trim }}{% endfor %}"
    drawn = compiled(jinja)([{"role": "user", "content": content}], True, "")
    assert drawn == content.strip().replace("<image>", "").strip()


@pytest.mark.parametrize(
    "shown",
    [
        "m.content|tojson",
        "m|tojson",
        "m|tojson(indent=2)",
        "m.content|tojson(ensure_ascii=true)",
        "m.content|trim ~ m.content|length ~ loop.index0",
        "m.content.split()[-1]|upper|replace('<', '[')",
        "m.items()|list",
        "m.content|default('x')|string|capitalize",
    ],
)
def test_it_draws_what_transformers_draws(shown: str) -> None:
    """Filters, methods, line breaks and blocks cut as there."""
    jinja = (
        "{% for m in messages %}\n    {% if loop.first %}\nFirst: {% endif %}\n"
        f"{{{{- {shown} }}}}\n{{% endfor %}}\n{{% if add_generation_prompt %}}A:{{% endif %}}\n"
    )
    messages = [
        {"role": "user", "content": " Is <b>'1' & \"2\"</b> > é 漢 ?\n"},
        {"role": "assistant", "content": "Ja </s>"},
    ]
    for prompt in (True, False):
        (theirs,), _ = render_jinja_template(
            [messages],
            chat_template=jinja,
            add_generation_prompt=prompt,
        )
        assert compiled(jinja)(messages, prompt, "") == theirs
