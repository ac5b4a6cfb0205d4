"""Schemas that would crash, stall or fill the server are refused, and other requests answered."""

import asyncio
import json
import threading
import time
from typing import Any

import httpx2
import pytest

from loraloom.errors import ConfigError
from loraloom.serve.http import grammars
from loraloom.serve.http.app import ApiOptions
from loraloom.serve.http.grammars import GrammarCompiler, json_grammar, resolve_ref
from loraloom.serve.http.schemas import ChatBody
from tests.conftest import build_tokenizer
from tests.serve.http.in_process import serving

TEXT = {"type": "string"}
CHAT = {"model": "lora", "messages": [{"role": "user", "content": "one"}], "max_tokens": 2}


def linked(num_links, make):
    """A schema of definitions, each made from a reference to the next one."""
    links = {f"a{n}": make({"$ref": f"#/$defs/a{n + 1}"}) for n in range(num_links)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{num_links}": TEXT}}


def nested(num_levels, make):
    schema = TEXT
    for _ in range(num_levels):
        schema = make(schema)
    return schema


def pattern(text):
    return {"type": "string", "pattern": text}


def properties(schemas):
    return {"type": "object", "properties": {f"p{n}": s for n, s in enumerate(schemas)}}


LINKS = {
    "ref": lambda s: s,
    "properties": lambda s: {"type": "object", "properties": {"x": s}},
    "allOf": lambda s: {"allOf": [s, TEXT]},
    "anyOf": lambda s: {"anyOf": [s, TEXT]},
    "oneOf": lambda s: {"oneOf": [s, {"type": "null"}]},
    "not": lambda s: {"not": s},
    "if": lambda s: {"if": TEXT, "then": s},
    "items": lambda s: {"type": "array", "items": s},
    "prefixItems": lambda s: {"type": "array", "prefixItems": [s]},
    "patternProperties": lambda s: {"type": "object", "patternProperties": {"^x": s}},
    "additionalProperties": lambda s: {"type": "object", "additionalProperties": s},
}
TOO_DEEP = {f"{name} by refs": linked(1500, make) for name, make in LINKS.items()}
TOO_DEEP |= {f"{name} nested": nested(300, make) for name, make in LINKS.items() if name != "ref"}
TOO_COMPLEX = {
    "a multiple of a prime": {"type": "integer", "multipleOf": 1234567},
    "a chain of anchors": {
        "$ref": "#a0",
        "$defs": {f"a{n}": {"$anchor": f"a{n}", "$ref": f"#a{n + 1}"} for n in range(3000)},
    },
    "many properties": properties([TEXT] * 4500),
}
REFUSED = {
    "look-around": pattern("(?=a)(?=.*b).*"),
    "a reference elsewhere": {"$ref": "http://10.0.0.1/x.json"},
    "allOf of 3,000": {"allOf": [{"properties": {f"p{n}": TEXT}} for n in range(3000)]},
    "nothing": {"type": 3, "description": "secret " * 100},
}
TOO_LARGE = {"enum": [f"value number {n}" for n in range(50_000)]}
BOUNDED = {
    "repeated repetition": pattern("((a{1,1000}){1,1000}){1,1000}"),
    "Unicode classes": properties([pattern(r"(\p{L}|\p{N}|\p{S}){1,200}x")] * 60),
    "exponential automaton": properties([pattern(".*a.{200}|[ab]*a[ab]{200}")] * 3),
    "doubling": linked(40, lambda s: {"anyOf": [s, s]}),
    "a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "lengths": {
        "type": "array",
        "items": {"type": "string", "minLength": 10**6},
        "minItems": 10**6,
    },
    "x-guidance": {"type": "object", "x-guidance": {"whitespace_pattern": "(a|a)*" * 100}},
    "lark": {"%lark": "start: start start"},
}


def body_with(schema) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    }


@pytest.fixture(scope="module")
def url(host, tokenizer):
    with serving(host, tokenizer, options=ApiOptions(api_keys=["a", "b"])) as (address, _):
        yield f"{address}/v1/chat/completions"


def ask(url, key="a", **fields):
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.post(url, json=CHAT | fields, headers=headers, timeout=60)


def refusal(response):
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert len(message) < 500
    return message


@pytest.mark.parametrize("name", TOO_DEEP)
def test_deep_schemas_are_refused_before_they_are_compiled(name):
    body = ChatBody.model_validate(CHAT | body_with(TOO_DEEP[name]))
    with pytest.raises(ConfigError, match="at most 200 levels"):
        json_grammar(body)


NAME = "abcdefgh"
SPELLINGS = [
    "".join(f"%{ord(c):x}" if i >> k & 1 else c for k, c in enumerate(NAME)) for i in range(256)
]
LINEAR = {
    "a target in many spellings": {
        "$defs": {NAME: {"enum": [0] * 20_000}},
        "anyOf": [{"$ref": f"#/$defs/{spelling}"} for spelling in SPELLINGS],
    },
    "all levels of a target": {
        "$defs": nested(150, lambda s: {"a": s, "enum": [0] * 100}),
        "anyOf": [{"$ref": "#/$defs" + "/a" * level} for level in range(150)],
    },
    "elements of a list": {
        "x": [0] * 30_000,
        "anyOf": [{"$ref": f"#/x/{index}"} for index in range(4000)],
    },
}


@pytest.mark.parametrize("name", LINEAR)
def test_references_to_a_target_are_followed_once(name, monkeypatch):
    schema = LINEAR[name]
    visited = []
    height = grammars._height

    def count(node, *arguments):
        visited.append(id(node))
        return height(node, *arguments)

    monkeypatch.setattr(grammars, "_height", count)
    assert json_grammar(ChatBody.model_validate(CHAT | body_with(schema))) is not None
    assert len(visited) < len(json.dumps(schema))


def test_parameters_of_tools_are_bounded_as_schemas_are(url):
    tool = {
        "type": "function",
        "function": {"name": "paint", "parameters": TOO_DEEP["ref by refs"]},
    }
    message = refusal(ask(url, tools=[tool], tool_choice="required"))
    assert "at most 200 levels" in message


def test_large_schemas_are_refused_with_the_limit(url):
    assert "at most 200,000" in refusal(ask(url, **body_with(TOO_LARGE)))


@pytest.mark.parametrize("name", TOO_COMPLEX)
def test_the_process_that_compiles_dies_in_place_of_the_server(url, name):
    start = time.monotonic()
    message = refusal(ask(url, **body_with(TOO_COMPLEX[name])))
    assert "too complex to compile" in message
    assert time.monotonic() - start < 20
    assert ask(url, key="b", **body_with({"type": "object"})).status_code == 200


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_do_not_repeat_the_schema(url, name):
    message = refusal(ask(url, **body_with(REFUSED[name])))
    assert "the JSON schema can't be used" in message
    assert "secret" not in message
    assert "start:" not in message


@pytest.mark.parametrize("name", BOUNDED)
def test_other_keys_are_answered_while_a_schema_is_compiled(url, name):
    answers = []
    attack = threading.Thread(target=lambda: answers.append(ask(url, **body_with(BOUNDED[name]))))
    attack.start()
    start = time.monotonic()
    assert ask(url, key="b").status_code == 200
    assert ask(url, key="b", **body_with({"type": "object"})).status_code == 200
    assert time.monotonic() - start < 20
    attack.join()
    assert answers[0].status_code in (200, 400), answers[0].text


def test_deep_json_is_no_schema(url):
    deep = '{"a":' * 500_000 + "1" + "}" * 500_000
    content = json.dumps(CHAT | body_with("SCHEMA")).replace('"SCHEMA"', deep)
    headers = {"Authorization": "Bearer a", "Content-Type": "application/json"}
    assert httpx2.post(url, content=content, headers=headers).status_code in (400, 413)
    assert ask(url, key="b").status_code == 200


def test_a_usual_schema_stays_usable():
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}}
    for schema in (tree, linked(30, LINKS["properties"]), properties([TEXT] * 1000)):
        grammar = json_grammar(ChatBody.model_validate(CHAT | body_with(schema)))
        assert grammar is not None
        compiler = GrammarCompiler(build_tokenizer(), 300, [2])
        constraint = asyncio.run(compiler.compile(grammar, ""))
        assert constraint.allowed(300).sum() > 0
        # the second time, no process is needed
        compiler.close()
        assert asyncio.run(compiler.compile(grammar, "")) is constraint
        assert compiler._process is None


@pytest.mark.parametrize(
    ("ref", "target"),
    [("#", 0), ("#/a~1b", 1), ("#/c/1", 2), ("#/d%25", 3), ("#/c/9", None), ("other#/a~1b", None)],
)
def test_references_lead_where_json_pointers_do(ref, target):
    schema = {"a/b": 1, "c": [0, 2], "d%": 3}
    assert resolve_ref(schema, ref) == (schema if target == 0 else target)
