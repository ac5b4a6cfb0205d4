"""Bodies of requests that are as large as a server accepts, one for each way to fill each field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from pydantic import BaseModel

_SIMPLE: dict[str, Any] = {"string": "a", "integer": 1, "number": 1, "boolean": True, "null": None}
_DEPTH = 900  # levels, which json still reads
# What a list may be full of, and an object's values.
_ELEMENTS: dict[str, Any] = {"numbers": -1, "texts": "", "lists": [], "objects": {}, "nulls": None}


class LargeBody(NamedTuple):
    """A body, and what its field is full of."""

    name: str
    content: bytes


_Around = Callable[[Any], Any]


class _Part(NamedTuple):
    """A part of a body: its schema, and what makes a body around its value."""

    path: str
    schema: dict[str, Any]
    around: _Around


class _Schema:
    """A model's JSON schema, and the least values that are valid under its parts."""

    def __init__(self, model: type[BaseModel]):
        self.root = model.model_json_schema()

    def resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        ref = schema.get("$ref")
        return schema if ref is None else self.root["$defs"][ref.rpartition("/")[2]]

    def value(self, schema: dict[str, Any]) -> Any:
        """Make the least value that is valid."""
        schema = self.resolve(schema)
        for choices in (schema.get("anyOf"), schema.get("oneOf")):
            if choices:
                return self.value(choices[0])
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][0]
        if schema.get("type") == "array":
            return [self.value(schema["items"])]
        if schema.get("type") == "object":
            properties = schema.get("properties", {})
            return {name: self.value(properties[name]) for name in schema.get("required", ())}
        return _SIMPLE.get(schema.get("type", ""), "a")

    def parts(self, schema: dict[str, Any], path: str, around: _Around) -> Iterator[_Part]:
        """Yield each part that a body may have, with the least values around it."""
        schema = self.resolve(schema)
        yield _Part(path or "body", schema, around)
        for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            yield from self.parts(choice, path, around)
        if schema.get("type") == "array":
            yield from self.parts(schema["items"], f"{path}.0", lambda value: around([value]))
        for name, part in schema.get("properties", {}).items():
            others = self.value(schema)
            within = partial(_set, around, others, name)
            yield from self.parts(part, f"{path}.{name}".lstrip("."), within)


def paths_of(model: type[BaseModel]) -> list[str]:
    """Name the parts of a body."""
    schema = _Schema(model)
    return list(dict.fromkeys(part.path for part in schema.parts(schema.root, "", _as_it_is)))


def large_bodies(
    model: type[BaseModel], num_bytes: int, path: str | None = None, /, **fields: str
) -> Iterator[LargeBody]:
    """Yield bodies whose parts, or one of them, are wide, deep, long, wrong or repeated."""
    schema = _Schema(model)
    names = set()
    for part in schema.parts(schema.root, "", _as_it_is):
        if path not in (None, part.path):
            continue
        fillings = dict(_fillings(num_bytes))
        if part.schema.get("type") == "array":
            fillings["valid elements"] = _repeat(schema.value(part.schema["items"]), num_bytes)
        body = part.around("FILLING")
        if isinstance(body, dict):
            body = {
                **body,
                **{name: value for name, value in fields.items() if body.get(name) == "a"},
            }
        content = json.dumps(body, separators=(",", ":")).encode()
        for name, filling in fillings.items():
            title = f"{part.path}: {name}"
            if title not in names:  # kinds of a union are filled alike
                names.add(title)
                yield LargeBody(title, content.replace(b'"FILLING"', filling))


def _as_it_is(body: Any) -> Any:
    return body


def _set(around: _Around, others: Mapping[str, Any], name: str, value: Any) -> Any:
    return around({**others, name: value})


def _fillings(num_bytes: int) -> Iterator[tuple[str, bytes]]:
    for name, element in _ELEMENTS.items():
        yield f"a list of {name}", _repeat(element, num_bytes)
        yield f"an object of {name}", _object(element, num_bytes)
    yield "a list of lists of numbers", _repeat([-1], num_bytes)
    yield "deep lists", _repeat_text(b"[" * _DEPTH + b"]" * _DEPTH, num_bytes)
    yield "deep objects", _repeat_text(b'{"a":' * _DEPTH + b"1" + b"}" * _DEPTH, num_bytes)
    yield "a long text", b'"' + b"a" * num_bytes + b'"'
    yield "a text of spaces", b'"a' + b" " * num_bytes + b'a"'
    yield "a text of brackets", b'"' + b"[{<" * (num_bytes // 3) + b'"'
    yield "a text of parents", b'"' + b"../" * (num_bytes // 3) + b'"'
    yield "an object of a long key", b'{"' + b"a" * num_bytes + b'":-1}'
    yield "a long number", b"9" * 4000


def _repeat(element: Any, num_bytes: int) -> bytes:
    return _repeat_text(json.dumps(element, separators=(",", ":")).encode(), num_bytes)


def _repeat_text(text: bytes, num_bytes: int) -> bytes:
    count = max(1, num_bytes // (len(text) + 1))
    return b"[" + b",".join([text] * count) + b"]"


def _object(element: Any, num_bytes: int) -> bytes:
    value = json.dumps(element, separators=(",", ":"))
    count = max(1, num_bytes // (len(value) + 10))
    return b"{" + b",".join(f'"{key:x}":{value}'.encode() for key in range(count)) + b"}"
