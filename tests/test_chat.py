"""Chat templates: exact prompts, and messages that are checked.

Ids J4 to J10 are rows of the project's catalogue of bad inputs.
"""

import json
from datetime import datetime

import pytest
from chatting import SMOLLM2, TALK
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny import write_tiny

import edgellama
from edgellama.chat import ChatTemplate, template_from_gguf
from edgellama.errors import ParameterError, TemplateError

TURNS = (
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n"
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
)
USER = [{"role": "user", "content": "hi"}]

LLAMA3 = (  # written for this test, in the style that such files use
    "{%- set loop_messages = messages -%}\n"
    "{%- for message in loop_messages %}\n"
    "    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}\n"
    "    {%- if loop.index0 == 0 %}\n        {%- set content = bos_token + content %}\n"
    "    {%- endif %}\n    {{- content }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content']"
    " if loop.first and system is defined else message['content'] %}"
    "{{ bos_token ~ '[INST] ' ~ content.strip() ~ ' [/INST]' if message['role'] == 'user'"
    " else ' ' ~ content.strip() ~ ' ' ~ eos_token }}{% endfor %}"
)


def render(source, messages=USER, **options):
    return ChatTemplate(source, **options).render(messages)


def test_smollm2_exactly():
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    default = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n"
    )
    assert render(SMOLLM2, TALK) == system + TURNS
    assert render(SMOLLM2, TALK[1:]) == default + TURNS
    without = ChatTemplate(SMOLLM2).render(TALK[:3], add_generation_prompt=False)
    assert without == system + TURNS.partition("<|im_start|>user\nWhat")[0]


def test_llama3_exactly():
    assert render(LLAMA3, TALK[:2], bos="<|begin_of_text|>") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Hello!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_llama2_exactly():
    assert render(LLAMA2, TALK, bos="<s>", eos="</s>") == (
        "<s>[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\nHello! [/INST] Hi there. "
        "</s><s>[INST] What is 2+2? [/INST]"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% filter trim %} a{{ 1 }} {% endfilter %}|", "a1|"),
        ("{% set x %}{% filter upper %}b{% endfilter %}{% endset %}{{ x }}", "B"),
        ("{{ tools|selectattr('type', 'equalto', 'x')|list|length }}{{ tools|map('upper')|list }}"
         "{{ tools|rejectattr('x')|list }}{{ tools|select|list }}", "0[][][]"),
        ("{{ messages[0].content.content is defined }}{{ messages[0]['content']|string }}",
         "Falsehi"),
        ("{{ 'é<&'|tojson(ensure_ascii=true) }}{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}",
         '"\\u00e9<&"{"a": 2, "b": 1}'),
        ("{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%}"
         "{% if true %}{% break %}{% endif %}{% endfor %}", "hi"),
        ("{% macro f() -%}{% set n.x = n.x + 1 %}{% endmacro -%}", ""),
        ("{% if messages[0].role not in ['tool', 'tool_results'] and not messages[0].get('calls') "
         "%}a{% endif %}{{ 'b' if messages[0] == messages[-1] }}", "ab"),
        ("{{ messages | length }}{{ messages|map(attribute='role')|join(',') }}", "1user"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content|upper }}{% endfor %}", "HI"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
        ("{{ messages|rejectattr('role', 'eq', 'user')|list }}", "[]"),
        ("{{ messages[0].name is defined }}{{ tools is none }}{{ nothing }}", "FalseTrue"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in '012' %}{% if i == '1' %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% set ns = namespace(n=0) %}{% for m in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}"
         "{{ ns.n }}", "3"),
        ("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('ab') }}", "abab"),
        ("{{ {'b': [1, none], 'a': 'é<'} | tojson }}", '{"b": [1, null], "a": "é<"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%d %b %Y') }}", "05 Mar 2024"),
        ("{% set x %}a {{ 1 + 1 }}{% endset %}{{ x }}", "a 2"),
        ("{{ '-' * 3 }}{{ 'a,b'.split(',')[-1] }}{{ 'abc'[::-1] }}{{ 7 // 2 }}", "---bcba3"),
        ("{{ 'aXbX'.replace('X', 'YY') }}{{ ['1', '2']|join('+') }}{{ ' a '|trim }}", "aYYbYY1+2a"),
        ("{{ x|default('d') }}{{ 'a' if messages[0]['content'].startswith('h') else 'b' }}", "da"),
        ("{% for c in 'ab' %}{{ c.replace('a', 'x') + '-'.join([c, c]) }}{% endfor %}", "xa-abb-b"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),  # trim_blocks and lstrip_blocks
    ],
)  # fmt: skip
def test_what_templates_use(source, expected):
    """As Hugging Face's own environment renders it, which models were trained with; J4, J10."""
    clock = lambda: datetime(2024, 3, 5)  # noqa: E731
    assert render(source, clock=clock) == expected
    theirs = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    theirs.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    given = {"messages": USER, "tools": None, "strftime_now": clock().strftime}
    assert theirs.from_string(source).render(given) == expected


class Generation(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def test_the_templates_own_refusal_is_escaped_and_names_the_roles():
    """J5 and J7."""
    with pytest.raises(TemplateError) as caught:
        render(LLAMA2, TALK[2:], path="/models/tiny.gguf")
    assert str(caught.value) == (
        "tiny.gguf: chat template: it refuses the messages: 'roles must alternate user/assistant'. "
        "The roles were: assistant, user"
    )
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('\x1b]0;x\u202e' * 999) }}")
    assert str(caught.value).isprintable() and str(caught.value).isascii()


def test_a_damaged_template_is_found_when_rendered_not_before():
    """J4."""
    template = template_from_gguf({"tokenizer.chat_template": "{% if %}"})
    assert template is not None
    for _ in range(2):
        with pytest.raises(TemplateError, match="line 1"):
            template.render(USER)
    number = template_from_gguf({"tokenizer.chat_template": 7})
    with pytest.raises(TemplateError, match="expected text, found int"):
        number.render(USER)


def test_from_gguf_knows_the_special_tokens():
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert template_from_gguf(metadata).render(USER) == "<s>|</s>"
    for strange in (3, -1, True, "1", None):
        changed = metadata | {"tokenizer.ggml.bos_token_id": strange}
        assert template_from_gguf(changed).render(USER) == "|</s>"
    assert template_from_gguf({}) is None


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is []"),
        ("hi", "messages is 'hi'"),
        ([1], r"messages[0] is 1"),
        ([{"role": "root", "content": "x"}], "messages[0]['role'] is 'root'"),
        ([{"content": "x"}], "messages[0]['role'] is None"),
        ([{"role": ["user"], "content": "x"}], "messages[0]['role'] is ['user']"),
        ([{"role": "user"}], "messages[0]['content'] is None"),
        ([*USER, {"role": "user", "content": None}], "messages[1]['content'] is None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0]['content']"),
        ([{"role": "user", "content": b"x"}], "messages[0]['content'] is bytes"),
        ([{"role": "user", "content": "x", "a": object()}], "messages[0]['a'] is object"),
        ([{"role": "user", "content": "x", "a": {1: 2}}], "messages[0]['a'] is dict"),
        ([{"role": "user", "content": "x" * (8 * 2**20)}], "too long"),
        ([{"role": "user", "content": "x", "a": [[]] * 100_001}], "too large"),
    ],
)
def test_messages_are_checked(messages, message):
    """J8."""
    with pytest.raises(ParameterError) as caught:
        render(SMOLLM2, messages)
    assert message in str(caught.value)


def test_deep_messages_are_refused():
    deep = []
    for _ in range(9999):
        deep = [deep]
    with pytest.raises(ParameterError, match="too large"):
        render(SMOLLM2, [{"role": "user", "content": "x", "a": deep}])


def test_messages_are_copied():
    nested = {"__class__": "x", "content": "y"}
    messages = [{"role": "user", "content": "a", "extra": nested}]
    assert render("{{ messages[0].extra['__class__'] }}", messages) == "x"
    assert messages == [{"role": "user", "content": "a", "extra": nested}]


def test_a_left_out_system_message_is_an_error():
    """J7."""
    user_only = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert render(user_only) == "hi"
    with pytest.raises(ParameterError, match="leaves the system message out; roles: system, user"):
        render(user_only, TALK[:2])
    switch = (
        "{% set think = '/no_think' not in messages[0].content %}"
        "{{ messages[0].content.replace('/no_think', '') }}{{ think }}"
    )
    for text in ("Be brief. /no_think now", "/no_think"):  # taken out, and heeded
        talk = [{"role": "system", "content": text}, *USER]
        assert render(switch, talk) == text.replace("/no_think", "") + "False"


def test_a_damaged_template_keeps_no_model_from_continuing_text(tmp_path):
    """J4: only a chat needs it, and another can be named."""
    path = write_tiny(tmp_path / "x.gguf", metadata={"tokenizer.chat_template": "{% if %}"})
    with edgellama.load(path, runtime="reference") as model:
        assert [chunk.finish_reason for chunk in model.generate("a", max_tokens=1)] == ["length"]
        with pytest.raises(TemplateError, match=r"x\.gguf: chat template: line 1"):
            model.chat(USER)
        chunks = model.chat(USER, template="{{ messages[0].content }}", max_tokens=1)
        assert [chunk.finish_reason for chunk in chunks] == ["length"]
