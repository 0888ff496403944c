import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.chat_template import MAX_RENDERED_CHARS, ChatTemplate, Message
from engine.errors import InvalidRequestError

MESSAGES = [
    Message("system", "Be <brief> & 'kind'."),
    Message("user", "Grüße 🙂\n\n{{ 7 * 7 }}"),
    Message("assistant", "ok"),
    Message("user", ""),
]
TEMPLATES = [
    "{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}\n  {%- if loop.first %}first {% endif %}\n{{ m | tojson }}\n{% endfor %}",
    "{% for m in messages %}\n    {% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents is none }}{{ dict(a=1).a }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}!{% if add_generation_prompt %}>{% endif %}",
    "{% if tools is defined and tools %}T{% endif %}{{ messages[1:] | length }}{{ '-' * 5 }}{{ 3 * 4 }}",
]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_transformers_renders_them(template: str, prompt: bool) -> None:
    plain: list[dict[str, Any]] = [{"role": message.role, "content": message.content} for message in MESSAGES]
    (expected,), _ = render_jinja_template(
        [plain], chat_template=template, add_generation_prompt=prompt, bos_token="<s>"
    )
    assert ChatTemplate(template, {"bos_token": "<s>"}).render(MESSAGES, add_generation_prompt=prompt) == expected


def test_json_is_written_without_html_escapes() -> None:
    template = ChatTemplate("{{ messages[0].content | tojson }}", {})
    assert json.loads(template.render([Message("user", "<ü&'>")])) == "<ü&'>"
    assert template.render([Message("user", "<ü&'>")]) == '"<ü&\'>"'


def test_the_year_can_be_asked_for() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(MESSAGES)
    assert len(year) == 4
    assert year.isdigit()


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "chat.messages"),
        ([Message("user", "a"), Message("root", "b")], "chat.messages[1].role"),
        ([Message("", "a")], "chat.messages[0].role"),
        ([Message("USER", "a")], "chat.messages[0].role"),
    ],
)
def test_bad_messages_are_refused_with_their_place(messages: list[Message], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate("x", {}).render(messages)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[99].content.x }}", "refuses"),
        ("{{ messages[0].content + 1 }}", "fails"),
        ("{{ 1 / 0 }}", "fails"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{{ cycler.__init__.__globals__.os }}", "refuses"),
        ("{{ 'a' * 10 ** 12 }}", "powers"),
        ("{{ 'a' * 1000000000000 }}", "too large"),
        ("{{ 1000000000000 * [1] }}", "too large"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}", "longer than"),
        ("{% for i in range(10**9) %}{% endfor %}", "powers"),
        ("{% for i in range(1000000000) %}{% endfor %}", "fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"),
        ("{% if %}", "not usable"),
        ("{% include 'x' %}", "fails"),
    ],
)
def test_a_template_that_fails_refuses_the_chat(template: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        ChatTemplate(template, {}).render(MESSAGES)
    assert caught.value.field.startswith("chat")


def test_a_long_chat_may_fill_the_bound() -> None:
    content = "x" * MAX_RENDERED_CHARS
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert len(template.render([Message("user", content)])) == MAX_RENDERED_CHARS
    with pytest.raises(InvalidRequestError, match="longer than"):
        template.render([Message("user", content + "x")])
