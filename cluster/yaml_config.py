"""Reads a YAML into a tree of dataclasses, strictly, and says what is wrong with its line.

Nothing is guessed: an unknown key, a key given twice, a value of another type are all errors, and all
of a file's errors are listed at once. Knows no particular configuration; `cluster.config` composes one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
Location = tuple[str | int, ...]

MAX_FILE_BYTES = 1024 * 1024


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` has one line for each thing wrong with it."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))
        self.source = source
        self.problems = list(problems)


@dataclass(frozen=True)
class _Document:
    """A file's plain data, and the line on which each key stands (1-based)."""

    data: Any
    lines: dict[Location, int]


class _Loader(yaml.SafeLoader):
    """Safe loading, where a date stays the text that was written."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(path: Path, kind: type[T]) -> T:
    """The configuration in a file, or ConfigError with all that is wrong with it."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(str(path), [f"the file has {size} bytes; at most {MAX_FILE_BYTES} are read"])
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(str(path), [f"cannot read the file: {reason}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"the file is not UTF-8 text (byte {error.start})"]) from error
    return parse(text, str(path), kind)


def parse(text: str, source: str, kind: type[T]) -> T:
    """The configuration in a text; `source` stands for the file's name in errors."""
    document = _read(text, source)
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    try:
        return adapter.validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        raise ConfigError(source, _Explainer(source, document, kind).explain(error)) from error


def _read(text: str, source: str) -> _Document:
    """Text to plain data and lines; refuses duplicate keys, anchors that loop, and non-mappings."""
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return _Document({}, {})
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(source, ["the file must be a mapping of sections, such as `model:`"])
            lines: dict[Location, int] = {}
            problems = list(_walk(root, (), lines, ancestors=frozenset()))
            if problems:
                raise ConfigError(source, [f"{source}:{line}: {what}" for line, what in problems])
            return _Document(_without_empty_sections(loader.construct_document(root)), lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(source, [f"{line}: not valid YAML: {error.problem or error.context}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"not valid YAML: {error}"]) from error


def _walk(
    node: yaml.Node, path: Location, lines: dict[Location, int], *, ancestors: frozenset[int]
) -> Iterator[tuple[int, str]]:
    """Note the line of every key below `node` in `lines`; yields what is wrong with the tree itself."""
    if id(node) in ancestors:
        yield node.start_mark.line + 1, "an anchor refers to itself"
        return
    ancestors |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                yield line, "a key must be a single word"
                continue
            here = (*path, str(key_node.value))
            if here in lines:
                yield line, f"{_dotted(here)} is given twice (first on line {lines[here]})"
            lines[here] = line
            yield from _walk(value_node, here, lines, ancestors=ancestors)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            here = (*path, index)
            lines[here] = item.start_mark.line + 1
            yield from _walk(item, here, lines, ancestors=ancestors)


def _without_empty_sections(data: Any) -> Any:
    """A section with nothing under it (`cache:`) means its defaults."""
    if not isinstance(data, dict):
        return data
    return {key: value for key, value in data.items() if value is not None}


class _Explainer:
    """Words for pydantic's errors: where, what was got, what was expected, what to do."""

    def __init__(self, source: str, document: _Document, kind: type) -> None:
        self._source = source
        self._document = document
        self._kind = kind

    def explain(self, error: ValidationError) -> list[str]:
        """One line per problem, in the order of the file."""
        found: dict[str, int] = {}
        for item in error.errors(include_url=False):
            path = self._known_path(item["loc"])
            if item["type"] == "value_error":
                path = self._named_key(path, str(item["ctx"]["error"]))
            line = self._line(path)
            where = f"{self._source}:{line}" if line else self._source
            found.setdefault(f"{where}: {self._describe(path, item)}", line)
        return sorted(found, key=lambda problem: found[problem])

    def _known_path(self, location: Location) -> Location:
        """The part of a pydantic location that names keys of the file (not branches of a union)."""
        path: Location = ()
        data = self._document.data
        for part in location:
            if isinstance(data, dict):
                path = (*path, part)
                if part not in data:
                    break
                data = data[part]
            elif isinstance(data, list) and isinstance(part, int) and part < len(data):
                path = (*path, part)
                data = data[part]
        return path

    def _named_key(self, section: Location, message: str) -> Location:
        """The key of the section that a rule's message begins with, where the file has it; else the section."""
        named = (*section, *message.partition(" ")[0].split("."))
        return named if named in self._document.lines else section

    def _line(self, path: Location) -> int:
        while path:
            if path in self._document.lines:
                return self._document.lines[path]
            path = path[:-1]
        return 0

    def _describe(self, path: Location, item: Any) -> str:
        name = _dotted(path)
        match item["type"]:
            case "unexpected_keyword_argument":
                return f"{name}: unknown key{self._suggest(path)}"
            case "missing" | "missing_argument" | "missing_keyword_only_argument":
                return f"{name} is missing: {self._hint(path)}"
            case "value_error":
                message = str(item["ctx"]["error"])
                subject, _, rest = message.partition(" ")
                if name.endswith(subject):
                    return f"{name} {rest}"
                return f"{name}: {message}" if name else message
            case "literal_error":
                return f"{name} must be one of {item['ctx']['expected']}, got {_shown(item['input'])}"
            case _:
                return f"{name} must be {self._expected(item)}, got {_shown(item['input'])}"

    def _expected(self, item: Any) -> str:
        known = {
            "int_type": "a whole number",
            "int_from_float": "a whole number",
            "int_parsing": "a whole number",
            "float_type": "a number",
            "float_parsing": "a number",
            "finite_number": "a finite number",
            "bool_type": "true or false",
            "bool_parsing": "true or false",
            "string_type": "text (in quotes if it looks like a number)",
            "dataclass_type": "a section (a mapping of keys)",
            "dataclass_exact_type": "a section (a mapping of keys)",
            "dict_type": "a mapping of keys",
            "list_type": "a list",
            "tuple_type": "a list",
        }
        message = str(item["msg"])
        return known.get(str(item["type"]), message.removeprefix("Input should be ").lower())

    def _suggest(self, path: Location) -> str:
        siblings = _keys_at(self._kind, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), siblings, n=1, cutoff=0.6)
        if close:
            return f"; did you mean `{close[0]}`?"
        return f"; known here: {', '.join(sorted(siblings))}" if siblings else ""

    def _hint(self, path: Location) -> str:
        if path and path[0] == "model":
            return "write `model: {path: demo}`, or the path of a .gguf file or a Hugging Face directory"
        return "this key has no default"


def _keys_at(kind: type, path: Location) -> list[str]:
    """Keys that the section at `path` knows."""
    current: Any = kind
    for part in path:
        hints = _hints(current)
        if part not in hints:
            return []
        current = hints[str(part)]
    return list(_hints(current))


def _hints(kind: Any) -> dict[str, Any]:
    if isinstance(kind, UnionType):  # a section that may be left out: X | None
        kind = next((each for each in get_args(kind) if is_dataclass(each)), None)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return {}
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _dotted(path: Location) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shown(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case dict():
            return "a section"
        case list():
            return "a list"
        case str():
            return f"the text {value[:60]!r}"
        case bool():
            return str(value).lower()
        case _:
            return str(value)
