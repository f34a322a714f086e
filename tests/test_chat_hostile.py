"""Hostile chat templates: no way out of the sandbox, and none to take the machine's time.

Ids J1 to J10 are rows of the project's catalogue of bad inputs.
"""

import time

import pytest

from edgellama.chat import ChatTemplate
from edgellama.errors import TemplateError

USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER, **options):
    return ChatTemplate(source, **options).render(messages)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages|attr('__class__') }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner }}{{ joiner() }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__class__}'|string).format(1) }}",
    "{{ ['{0.__class__}']|map('format', 1)|list }}",
    "{% set f = ''.format %}{{ f(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ loop }}{{ range.__self__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].pop('role') }}",
    "{% for m in messages %}{{ loop._iterable.append }}{% endfor %}",
    "{{ messages|map(attribute='__class__.__mro__')|first }}",
    "{{ strftime_now.__closure__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func }}",
    "{% macro m() %}{% endmacro %}{{ m['_func'].x }}",
    "{{ messages|pprint }}",
    "{{ dict.mro() }}",
    "{{ raise_exception }}",
    "{{ ''.encode('utf-8') }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_are_refused(source):
    """J1."""
    with pytest.raises(TemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''['__class__'] }}",
        "{% for m in messages %}{{ loop['__init__'] }}{{ loop['_iterable'] }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m['_func'] }}",
        "{{ raise_exception['__globals__'] }}{{ range['__self__'] }}{{ dict['__code__'] }}",
        "{{ messages['__class__'] }}{{ messages[0]['__class__'] }}{{ 1['real'] }}",
        "{{ messages|map(attribute='__class__')|join }}",
    ],
)
def test_private_items_do_not_exist(source):
    """J1."""
    assert render(source + ".") == "."


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "nested printing loops": "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}"
    "{% endfor %}",
    "range": "{{ range(10**9)|list }}",
    "huge range": "{% for a in range(1000000000000000000) %}{% endfor %}",
    "string times number": "{{ 'x' * 1000000000 }}",
    "number times string": "{{ 1000000000 * 'x' }}",
    "list times number": "{{ [0] * 1000000000 }}",
    "power": "{{ 9**9**9 }}",
    "growing integer": "{% set n = namespace(x=3) %}{% for a in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling text": "{% set n = namespace(x='x') %}{% for a in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling text with ~": "{% set n = namespace(x='x') %}{% for a in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling text in a block": "{% set n = namespace(x='x') %}{% for a in range(99) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubling list": "{% set n = namespace(x=[1]) %}{% for a in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "shared list": "{% set n = namespace(x=[1]) %}{% for a in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "shared dict": "{% set n = namespace(x={}) %}{% for a in range(99) %}"
    "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x|tojson }}",
    "shared through calls": "{% set n = namespace(x=1) %}{% for a in range(99) %}"
    "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x == n.x|list }}",
    "replace": "{% set n = namespace(x='aa') %}{% for a in range(99) %}"
    "{% set n.x = n.x|replace('a', n.x) %}{% endfor %}",
    "replace method": "{% set n = namespace(x='aa') %}{% for a in range(99) %}"
    "{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "join": "{% set n = namespace(x='aaaaa') %}{% for a in range(99) %}"
    "{% set n.x = n.x|join(n.x) %}{% endfor %}",
    "join method": "{% set n = namespace(x='aaaaa') %}{% for a in range(99) %}"
    "{% set n.x = n.x.join(n.x) %}{% endfor %}",
    "formatting": "{{ '%1000000000d' % 1 }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "center": "{{ 'x'|center(1000000000) }}",
    "center method": "{{ 'x'.center(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ 'x\ny'|indent(1000000000) }}",
    "json indent": "{{ [1]|tojson(indent=1000000000) }}",
    "json separators": "{{ range(9999)|list|tojson(separators=['x' * 999999, ':']) }}",
    "indent of a block": "{% filter indent(1000000000) %}x\ny{% endfilter %}",
    "doubling text in a filter": "{% set n = namespace(x='a') %}{% for a in range(99) %}"
    "{% set y %}{% filter replace('a', 'aa') %}{{ n.x }}{% endfilter %}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "unknown filter of a block": "{% filter pprint %}x{% endfilter %}",
    "batch": "{{ [1]|batch(1000000000, 1)|list }}",
    "slices": "{% set x = 'x' * 4000000 %}{% for a in range(9999) %}"
    "{{ x[:-1]|length }}{% endfor %}",
    "comparisons": "{% set x = 'x' * 4000000 ~ 'a' %}{% set y = 'x' * 4000000 ~ 'b' %}"
    "{% for a in range(99999) %}{% if x == y %}{% endif %}{% endfor %}",
    "searches": "{% set x = 'x' * 4000000 %}{% for a in range(99999) %}"
    "{% if 'xy' in x %}{% endif %}{% endfor %}",
    "macro recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "call block": "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}x{% endcall %}",
    "spread": "{{ range(*range(3)) }}",
    "date": "{{ strftime_now('%999999999Y') }}",
    "long date": "{{ strftime_now('%Y' * 99) }}",
    "parentheses": "{{ " + "(" * 6000 + "1" + ")" * 6000 + " }}",
    "brackets": "{{ " + "[" * 3000 + "1" + "]" * 3000 + " }}",
    "nested ifs": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "nested fors": "{% for a in [1] %}" * 90 + "{% endfor %}" * 90,
    "long sum": "{{ 1" + " + 1" * 9000 + " }}",
    "long not": "{{ " + "not " * 9000 + "1 }}",
    "long path": "{{ a" + ".a" * 9000 + " }}",
    "size": "x" * (2**20 + 1),
    "many statements": "{{ 1 }}" * 99_999,
    "many comments": "{# #}" * 99_999,
    "many operators": "{{ 1" + " == 1" * 99_999 + " }}",
    "includes": "{% include 'a' %}",
    "imports": "{% import 'a' as b %}",
    "from imports": "{% from 'a' import b %}",
    "extends": "{% extends 'a' %}",
    "blocks": "{% block a %}{% endblock %}",
    "unknown tag": "{% run 'rm' %}",
    "unknown filter": "{{ 1|filesizeformat }}",
    "unknown test": "{{ 1 is callable }}",
    "syntax error": "{% if %}",
    "unfinished": "{{ 'abc",
    "type error": "{{ 1 + 'a' }}",
    "division by zero": "{{ 1 / 0 }}",
    "missing item": "{{ messages[9].content.x }}",
    "undefined call": "{{ nothing() }}",
    "surprise type": "{{ messages[0].content.items() }}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon_in_a_template_error(name):
    """J2, J3, J4, J10: loops, nesting, tags that are not known, formats of dates and of JSON."""
    start = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        render(BOMBS[name])
    assert time.thread_time() - start < 30  # a hang, not a speed
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_the_budget_grows_with_the_messages():
    long = [{"role": "user", "content": "x" * 4_000_000}] * 2
    source = "{% for m in messages %}{{ m.role ~ m.content | trim }}{% endfor %}"
    assert len(render(source, long)) > 8_000_000
