"""Filters of chat templates against jinja2's own, which models were trained with."""

import pytest
from jinja2.exceptions import UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgellama.chat import ChatTemplate
from edgellama.errors import TemplateError

TALK = [
    {"role": "user", "content": "it's the\n end\n"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "a"},
    {"role": "tool", "content": "A"},
    {"role": "tool", "content": "b"},
]
SORTED = [
    "['b', 'A', 'a', 'B', 'ä', 'Ä', 'ß', 'SS']|sort",
    "['b', 'A', 'a', 'B']|sort(true)",
    "['b', 'A', 'a', 'B']|sort(false, true)",
    "['b', 'A', 'a', 'B']|sort(case_sensitive=true, reverse=true)",
    "[3, 1, 2]|sort",
    "[[1, 'a'], [0, 'B'], [0, 'a']]|sort",
    "[[1, 'a'], [0, 'B'], [0, 'a']]|sort(attribute=1)",
    "[[1, 'a'], [0, 'B'], [0, 'a']]|sort(attribute='1,0')",
    "[{'a': {'b': 'y'}}, {'a': {'b': 'X'}}]|sort(attribute='a.b')",
    "messages|map(attribute='content')|sort|join(',')",
    "messages|sort(attribute='content')|map(attribute='content')|join(',')",
    "messages|sort(attribute='role,content')|map(attribute='content')|join(',')",
    "messages|sort(false, false, 'content')|map(attribute='content')|join(',')",
    "messages|sort(attribute='content', case_sensitive=true)|map(attribute='content')|join(',')",
    "messages|sort(true, attribute='role')|map(attribute='content')|join(',')",
    "{'b': 1, 'A': 2}|sort",
    "'bAaB'|sort",
    "[]|sort",
]
TEXTS = [
    *(
        "it's",
        "IT'S o'clock",
        "a-b c_d (e) [f] {g} <h> 1st",
        "  two  words\n",
        "",
        "ß ǆ",
        "-",
        "é\te",
    ),
    *("a\nb\n", "a\n\nb", "\n", "\na", "a\r\nb", "a\x0bb", "a\n\n"),
]
ACTS = [
    *(
        "title",
        "capitalize",
        "upper",
        "trim",
        "indent",
        "indent(2)",
        "indent(0)",
        "indent(2, true)",
    ),
    *("indent(first=true)", "indent(3, blank=true)", "indent(3, true, true)", "length", "list"),
]
SOURCES = [
    *(f"{{{{ {source} }}}}" for source in SORTED),
    *(f"{{{{ {text!r}|{act} }}}}|" for text in TEXTS for act in ACTS),
    "{{ messages[0].content|title }}{{ messages[0].content|indent }}|",
]


def test_filters_do_what_jinja2_s_do() -> None:
    theirs = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for source in SOURCES:
        wanted = theirs.from_string(source).render(messages=TALK)
        assert ChatTemplate(source).render(TALK) == wanted, source


@pytest.mark.parametrize(
    "source", ["[1, 'a']|sort", "['a', x]|sort", "[{'a': 1}, {}]|sort(attribute='a')"]
)
def test_what_cannot_be_sorted_is_an_error_as_there(source: str) -> None:
    with pytest.raises((TypeError, UndefinedError)):
        ImmutableSandboxedEnvironment().from_string(f"{{{{ {source} }}}}").render(TALK[0])
    with pytest.raises(TemplateError):
        ChatTemplate(f"{{{{ {source} }}}}").render(TALK)


@pytest.mark.parametrize(
    "source",
    [
        "{% set text = 'a\n' * 100000 %}{% for n in range(99) %}{{ text|indent(64) }}{% endfor %}",
        "{% set text = 'a ' * 1000000 %}{% set text = text|title %}",
        "{% for n in range(9999) %}{% set x = range(9999)|sort(attribute='a,a,a') %}{% endfor %}",
    ],
)
def test_what_they_make_is_paid_for(source: str) -> None:
    with pytest.raises(TemplateError, match="more work than a chat needs"):
        ChatTemplate(source).render(TALK)
