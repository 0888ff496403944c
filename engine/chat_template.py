"""Renders a model's chat template (a Jinja program that comes with the model) in jinja2's immutable sandbox.

The helpers a template may call are those that Hugging Face documents: raise_exception, strftime_now, tojson.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.errors import InvalidRequestError

ROLES = ("system", "user", "assistant", "tool")
MAX_RENDERED_CHARS = 16 << 20


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of ROLES."""
    content: str


class ChatTemplate:
    """A compiled template. One that does not compile is kept, and refuses each chat with the reason."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are variables of the template: bos_token, eos_token, ..."""
        self._special_tokens = dict(special_tokens)
        self._broken: str | None = None
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            self._broken = str(error)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, ending where the assistant's answer begins.

        Raises InvalidRequestError naming the message where a role is unknown, and for whatever the template refuses.
        """
        if self._broken is not None:
            raise InvalidRequestError(f"this model's chat template is not usable: {self._broken}", field="chat")
        check_messages(messages)
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(variables):
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise InvalidRequestError(
                        f"the rendered chat is longer than {MAX_RENDERED_CHARS} characters", field="chat.messages"
                    )
                pieces.append(piece)
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"this model's chat template refuses these messages: {error}", field="chat.messages"
            ) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            raise InvalidRequestError(
                f"this model's chat template fails on these messages: {error}", field="chat.messages"
            ) from error
        return "".join(pieces)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InvalidRequestError unless there is a message and every role is one of ROLES."""
    if not messages:
        raise InvalidRequestError("a chat needs at least one message", field="chat.messages")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequestError(
                f"the role must be one of {', '.join(ROLES)}, got {message.role[:64]!r}",
                field=f"chat.messages[{index}].role",
            )


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, with a bound on what multiplication and powers may make."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.exceptions.SecurityError("powers are not allowed in a chat template")
        for sized, times in ((left, right), (right, left)):
            if hasattr(sized, "__len__") and isinstance(times, int) and len(sized) * times > MAX_RENDERED_CHARS:
                raise jinja2.exceptions.SecurityError("the chat template makes a value that is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, by which templates mark the assistant's words for training: rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
