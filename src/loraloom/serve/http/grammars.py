"""Answers that keep to a JSON schema, or call a tool: grammars, checked before they compile."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from multiprocessing.process import BaseProcess
from typing import Any
from urllib.parse import unquote

import llguidance
from transformers import PreTrainedTokenizerBase

from loraloom.errors import ConfigError
from loraloom.generation.sampling import JsonConstraint
from loraloom.serve.http import trial
from loraloom.serve.http.preparation import Preparations
from loraloom.serve.http.schemas import ChatBody

MAX_DEPTH = 200
MAX_CHARACTERS = 200_000
# Seconds after which a process that compiles is killed, however little it could compute.
_MAX_WAIT_S = 30
# Grammars whose outcome is kept.
_NUM_KEPT = 64
_PROCESSES = multiprocessing.get_context("spawn")
# Python's own way of writing JSON; where any space is allowed, small models never end.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(body: ChatBody) -> str | None:
    """Calls of tools or values of a schema, for llguidance; `$ref`s stay in their own schema."""
    choices = []
    if body.must_call:
        for function in (tool["function"] for tool in body.callable_tools):
            start = f'{{"name": {json.dumps(function["name"])}, "arguments": '
            schema = {"type": "object", **(function.get("parameters") or {})}
            choices.append(f'{json.dumps(start)} {_json(schema)} "}}"')
    elif body.schema_of_answer is not None:
        choices.append(_json(body.schema_of_answer))
    if not choices:
        return None
    grammar = f"start: {' | '.join(choices)}"
    if len(grammar) > MAX_CHARACTERS:
        raise ConfigError(
            f"the JSON schema can't be used: it has {len(grammar):,} characters; a schema, or "
            f"those of all tools together, may have at most {MAX_CHARACTERS:,}"
        )
    return grammar


def _json(schema: dict[str, Any]) -> str:
    try:
        written = json.dumps({**schema, "x-guidance": _SPACING})
    except RecursionError:
        written = ""
    if not written or (len(written) <= MAX_CHARACTERS and _height(schema, schema, {}) > MAX_DEPTH):
        raise ConfigError(
            "the JSON schema can't be used: it is nested too deeply; a schema may have at most "
            f"{MAX_DEPTH} levels, those behind its $refs included"
        )
    return f"%json {written}"


def _height(node: Any, schema: Any, heights: dict[int, int], depth: int = 1) -> int:
    """Count the levels below a part of a schema, those behind its `$ref` included.

    Each part is visited once, however often references name it, so the time is linear.
    """
    if id(node) in heights:
        return heights[id(node)]
    children = node if isinstance(node, list) else []
    if isinstance(node, dict):
        children = list(node.values())
        ref = node.get("$ref")
        if isinstance(ref, str):
            children.append(resolve_ref(schema, ref))
    if not children or depth > MAX_DEPTH:
        return 1
    heights[id(node)] = 0  # a reference to what contains it adds no level
    height = 1
    for child in children:
        height = max(height, 1 + _height(child, schema, heights, depth + 1))
    heights[id(node)] = height
    return height


def resolve_ref(schema: Any, ref: str) -> Any:
    """What a JSON pointer within a schema points to; None for what isn't there, or elsewhere."""
    start, *steps = ref.split("/")
    for step in steps:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and key.isdecimal():
            schema = schema[int(key)] if _is_index(key, schema) else None
        else:
            schema = schema.get(key) if isinstance(schema, dict) else None
    return schema if start == "#" else None


def _is_index(key: str, values: list[Any]) -> bool:
    return len(key) <= len(str(len(values))) and int(key) < len(values)


class GrammarCompiler:
    """Compiles grammars that a process apart has compiled before, and survived.

    Keys take turns, so none waits for more than one grammar of each other key.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: list[int]):
        self._hf_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = end_tokens
        self._line = Preparations(num_threads=1)  # apart, as this may take long
        # clients send the same schema with each request
        self._outcome = lru_cache(_NUM_KEPT)(self._compile)
        self._process: BaseProcess | None = None

    async def compile(self, grammar: str, tenant: str) -> JsonConstraint:
        outcome = await self._line.run(tenant, partial(self._outcome, grammar))
        if isinstance(outcome, str):
            raise ConfigError(f"the JSON schema can't be used: {outcome}")
        return outcome

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    @cached_property
    def _settings(self) -> dict[str, Any]:
        backend: Any = self._hf_tokenizer.backend_tokenizer
        return {
            "tokenizer": backend.to_str(),
            "n_vocab": self._vocab_size,
            "eos_token": self._end_tokens,
        }

    @cached_property
    def _tokenizer(self) -> Any:  # takes a second
        return llguidance.LLTokenizer(**self._settings)

    def _compile(self, grammar: str) -> JsonConstraint | str:
        if self._process is None:
            self._start_process()
        fault = self._ask(grammar)
        if fault is None:
            return "it is too complex to compile; use fewer properties, or simpler patterns"
        if fault:
            return fault
        return JsonConstraint(trial.compile_grammar(self._tokenizer, grammar))

    def _start_process(self) -> None:
        self._pipe, child_pipe = _PROCESSES.Pipe()
        arguments = [child_pipe, self._settings]
        self._process = _PROCESSES.Process(target=trial.answer, args=arguments, daemon=True)
        self._process.start()
        child_pipe.close()  # so that its end is seen
        if self._receive() is None:
            raise RuntimeError("the process that compiles grammars can't be started")

    def _ask(self, grammar: str) -> str | None:
        """Why a grammar can't be used, or an empty text; None if the process died of it."""
        with suppress(OSError):
            self._pipe.send(grammar)
        return self._receive()

    def _receive(self) -> str | None:
        with suppress(EOFError, OSError):
            if self._pipe.poll(_MAX_WAIT_S):
                return self._pipe.recv()
        self.close()
        return None
