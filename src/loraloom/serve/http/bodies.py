"""Bodies of requests, parsed and validated in threads, by turns of API keys."""

import json
from collections.abc import Callable, Coroutine, Set
from functools import partial
from typing import Any, Generic, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, SchemaValidator, core_schema
from starlette.requests import ClientDisconnect
from typing_extensions import override

from loraloom.errors import shown
from loraloom.generation.request import RequestError
from loraloom.serve.http.guards import TENANT
from loraloom.serve.http.preparation import Preparations

_Body = TypeVar("_Body", bound=BaseModel)
# Sequences and mappings of pydantic's core schemas.
_CONTAINERS = {"list", "tuple", "set", "frozenset", "dict"}
# Lists and objects of a body: json reads more in a tenth of a second, which nothing interrupts.
MAX_CONTAINERS = 2**17
# Characters of a key that an error repeats.
_MAX_NAME = 100
# What there is too much of, and what to do, by pydantic's types of errors.
_TOO_LONG = {
    "too_long": "elements; send fewer",
    "string_too_long": "characters; shorten the text",
}
# Keys of core schemas whose values are no schemas.
_OPAQUE = {"cls", "config", "metadata", "serialization"}


class BodyParser(Generic[_Body]):
    """Reads a body's bytes; validation ends at the first fault of each list or mapping.

    pydantic describes every wrong element, which takes seconds and gigabytes for a long list.
    """

    def __init__(self, model: type[_Body]):
        self._validator = SchemaValidator(_ending_early(model.__pydantic_core_schema__))

    def parse(self, content: bytes) -> _Body:
        """Read a body; whatever is wrong with it is a RequestError."""
        num_containers = count_containers(content)
        if num_containers > MAX_CONTAINERS:
            raise RequestError(
                f"the body must have at most {MAX_CONTAINERS:,} lists and objects, got "
                f"{num_containers:,}; send fewer in each request"
            )
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            raise RequestError(f"the body must be JSON: {error.msg}") from None
        except (ValueError, RecursionError):  # no UTF-8, a number of 4,300 digits, deep nesting
            raise RequestError("the body must be JSON that Python reads") from None
        try:
            return self._validator.validate_python(value)
        except ValidationError as error:
            raise fault_of(error.errors(include_url=False)) from None


def count_containers(content: bytes) -> int:
    """Count the lists and objects of JSON by their brackets, without those in strings."""
    count = content.count(b"[") + content.count(b"{")
    # strings of other encodings have quotes among their bytes
    if count > MAX_CONTAINERS and json.detect_encoding(content).startswith("utf-8"):
        unescaped = content.replace(rb"\\", b"").replace(rb"\"", b"")
        content = b"".join(unescaped.split(b'"')[::2])
        count = content.count(b"[") + content.count(b"{")
    return count


def fault_of(errors: list[ErrorDetails]) -> RequestError:
    """Describe the fault of a body, as clients of OpenAI expect it."""
    # of a union, the kind that the body is most like; kinds are no names of fields
    first = max(errors, key=lambda error: len(error["loc"]))
    names = [str(name)[:_MAX_NAME] for name in first["loc"]]
    param = ".".join(name for name in names if f"_{name}".isidentifier())
    if first["type"] in _TOO_LONG:
        limit = f"{first['ctx']['max_length']:,} {_TOO_LONG[first['type']]}"
        return RequestError(f"{param} must have at most {limit}", param=param)
    message = first["msg"].removeprefix("Value error, ")
    return RequestError(f"{param or 'the body'}: {message}", param=param or None)


def _ending_early(schema: Any) -> Any:
    """Copy a core schema so that its validator reports few faults, however large the input is."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_ending_early, schema))
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "fields" and isinstance(value, dict):  # whose keys are names
            copy[key] = {name: _ending_early(field) for name, field in value.items()}
        else:
            copy[key] = value if key in _OPAQUE else _ending_early(value)
    if copy.get("type") in _CONTAINERS:
        copy["fail_fast"] = True
    if copy.get("type") == "typed-dict" and copy.get("extra_behavior") == "forbid":
        check_keys = partial(_check_keys, known=copy["fields"].keys())
        return core_schema.no_info_before_validator_function(check_keys, copy)  # ty: ignore[invalid-argument-type]
    return copy


def _check_keys(value: Any, known: Set[str]) -> Any:
    """Refuse the first unknown key; pydantic would describe each of them."""
    if isinstance(value, dict):
        for key in value:
            if key not in known:
                raise ValueError(f"unknown key {shown(key)}; known keys are {', '.join(known)}")
    return value


class _ParsedRequest(Request):
    """A request whose body was parsed before FastAPI reads it."""

    parsed: BaseModel

    @override
    async def json(self) -> BaseModel:
        return self.parsed


class PreparedRoute(APIRoute):
    """A route whose body is parsed in its sender's turn; FastAPI would do it in the event loop."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model: Any = self.body_field.field_info.annotation
        parser = BodyParser(model)

        async def prepare(request: Request) -> Response:
            prepared = _ParsedRequest(request.scope, request.receive)
            try:
                content = await prepared.body()
            except ClientDisconnect:
                raise RequestError("the client has gone", "client_gone") from None
            tenant = request.scope.get(TENANT, "")
            preparations: Preparations = request.app.state.preparations
            with preparations.preparing(tenant):
                prepared.parsed = await preparations.run(tenant, partial(parser.parse, content))
            return await handle(prepared)

        return prepare
