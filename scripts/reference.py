"""Write the pages of docs/reference that the source determines.

    .venv/bin/python scripts/reference.py

Commands and options come from cyclopts, settings from the JSON Schema of run files, requests from
the server's OpenAPI document.
tests/docs/test_site.py fails where a page is not current.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from cyclopts._markup import extract_text
from cyclopts.help import HelpEntry
from transformers import PreTrainedTokenizerBase

from loraloom.cli import main as cli
from loraloom.generation.engine import Engine
from loraloom.generation.scheduler import EngineLimits
from loraloom.serve.adapter_cache import ServedAdapters
from loraloom.serve.http import guards
from loraloom.serve.http.app import ApiOptions, create_app
from loraloom.training.settings import RunConfig

DIRECTORY = Path(__file__).parent.parent / "docs/reference"
NOTE = "<!-- Written by scripts/reference.py: change the source, not this page. -->\n"

COMMAND_LINE = """\
# Command line

Every command with its options. Your terminal shows the same:

```sh
loraloom train --help
```
"""

RUN_FILE = """\
# Run file

Every setting of a run file, which is YAML: a base model, and the jobs that train on it. This is a
small one:

```yaml
base_model: smollm2-135m
output_dir: runs/first
jobs:
  - name: lora
    adapter: {method: lora}
    data: {task: skills}
    train: {max_steps: 10}
```

`loraloom config show RUN.yaml` prints your file with all defaults, `loraloom config schema` the
JSON Schema for your editor. `--set jobs.0.train.learning_rate=1e-4` changes a setting on the
command line. Settings that do not exist are errors.
"""

HTTP = """\
# HTTP API

Every request that `loraloom serve` answers. [Serving](../serving.md) explains them. Start a server,
then send the requests from a second terminal:

```sh
loraloom train examples/skills.yaml
loraloom serve --base-model smollm2-135m --adapter-dir runs/skills \\
    --allow-loading --adapter-root runs
```

Requests and answers have OpenAI's form, and fields without a description are
[OpenAI's](https://platform.openai.com/docs/api-reference). Unknown fields are errors,
except in messages. In completions, `null` counts as not set. If the server has keys, send
`-H "Authorization: Bearer KEY"`; only `/health`, `/ready` and the playground's page need none. For
programs, `GET /openapi.json` returns this page as an OpenAPI document.
"""
BODIES = {
    "/v1/chat/completions": {
        "model": "mix",
        "messages": [{"role": "user", "content": "Say blue"}],
        "max_tokens": 8,
    },
    "/v1/completions": {"model": "lora", "prompt": "Bus 34 in Orlen goes to the", "max_tokens": 8},
    "/v1/load_lora_adapter": {"lora_name": "extra", "lora_path": "skills/mix"},
    "/v1/unload_lora_adapter": {"lora_name": "extra"},
}
_OF_COMPLETIONS = {404, 429, 500, 504, 507}
CODES = {  # statuses of errors, but for those of all requests
    "/v1/chat/completions": _OF_COMPLETIONS,
    "/v1/completions": _OF_COMPLETIONS,
    "/v1/load_lora_adapter": {403, 504, 507},
    "/v1/unload_lora_adapter": {403, 404},
    "/v1/models/{model}": {404},
}

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
MAX_BOUND = 2**16  # those beyond it only stop slips
TYPES = {"object": "mapping", "array": "list", "null": "`null`", "boolean": "`true` or `false`"}


def pages() -> dict[str, str]:
    """The generated pages, by file name."""
    made = {"command_line.md": command_line(), "run_file.md": run_file(), "http.md": http_api()}
    return {name: "\n".join([NOTE, *parts]) for name, parts in made.items()}


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    names = header.split(" | ")
    cells = [[re.sub(r"<(?=\w)", "&lt;", text.replace("|", r"\|")) for text in row] for row in rows]
    lines = [names, ["---"] * len(names), *([" ".join(c.split()) for c in row] for row in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def command_line() -> Iterator[str]:
    yield COMMAND_LINE
    verbs = cli.VERBS.items()
    links = ((f"[`{verb}`](#{anchor(f'loraloom {verb}')})", use) for verb, (_, use) in verbs)
    yield table("command | use", links)
    for verb, (place, _) in verbs:
        module, _, function = str(place).partition(":")
        code = getattr(importlib.import_module(f"loraloom.cli.{module}"), function)
        app, words = cli._app(verb.split()), verb.split()
        with app.app_stack(words):
            panels = [panel for _, panel in app._assemble_help_panels(words, "plaintext")]
        given = [one.positional_label for panel in panels for one in panel.entries]
        yield f"## loraloom {verb}\n"
        yield (inspect.getdoc(code) or "").partition("\n\nArgs:")[0] + "\n"
        yield f"```text\nloraloom {' '.join([verb, *filter(None, given), '[OPTIONS]'])}\n```\n"
        for panel in panels:
            rows = [option(one) for one in panel.entries if "--help" not in one.names]
            if rows:
                yield f"**{extract_text(panel.title)}**\n"
                yield table("option | default | use", rows)


def option(entry: HelpEntry) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in entry.display_labels_with_metavar)
    choices = ", ".join(f"`{one}`" for one in entry.choices or ())
    default = "required" if entry.required else f"`{entry.default}`" if entry.default else ""
    text = extract_text(entry.description)
    return names, default, f"{text} One of {choices}." if choices else text


def run_file() -> Iterator[str]:
    yield RUN_FILE
    schema = RunConfig.model_json_schema()
    models = {"": schema, **schema["$defs"]}
    headings: dict[str, str] = {}  # of each model, where it comes first
    for heading, name in sections("", "", models):
        headings.setdefault(name, heading)
    first: dict[tuple[str, ...], str] = {}  # section of each row
    for name, heading in headings.items():
        yield f"## {f'`{heading}`' if heading else 'Top level'}\n"
        yield models[name].get("description", "").partition("\n\n")[0] + "\n"
        yield from fields("setting", models[name], heading, headings, first)


def fields(
    kind: str,
    model: Mapping[str, Any],
    heading: str,
    headings: Mapping[str, str],
    first: dict[tuple[str, ...], str],
) -> Iterator[str]:
    """A table of those that no earlier section has, and links to the sections of the others."""
    rows, known = [*settings(model, headings)], defaultdict[str, list[str]](list)
    for row in rows:
        known[first.setdefault(row, heading)].append(row[0])
    yield table(f"{kind} | type | default | use", (r for r in rows if first[r] == heading))
    known.pop(heading, None)
    for other, names in known.items():
        yield f"As in {link(other)}: {', '.join(names)}.\n"


def http_api() -> Iterator[str]:
    yield HTTP
    engine = mocked(Engine)
    engine.max_length = 1024
    engine.limits = EngineLimits()
    parts = engine, mocked(PreTrainedTokenizerBase), mocked(ServedAdapters)
    api = create_app(*parts, ApiOptions(allow_loading=True)).openapi()
    models, calls = api["components"]["schemas"], dict[str, tuple[str, Any]]()
    for path, methods in api["paths"].items():
        calls |= {f"{method.upper()} {path}": (path, of) for method, of in methods.items()}
    calls = dict(sorted(calls.items(), key=lambda call: not call[0].startswith("POST")))
    links = ((link(name), of["description"]) for name, (_, of) in calls.items())
    yield table("request | use", links)
    headings, first = {"ChatMessage": "messages[]"}, dict[tuple[str, ...], str]()
    for heading, (path, of) in calls.items():
        yield f"## `{heading}`\n"
        yield f"{of['description']}\n\n```sh\n{curl(path)}\n```\n"
        codes = CODES.get(path, set()) | ({401} if path not in guards._OPEN else set())
        if "requestBody" in of:
            codes |= {400, 413}
            body = without_null(models[model_of(of["requestBody"])])
            yield from fields("field", body, heading, headings, first)
        returned = answer(of["responses"]["200"], models)
        yield f"Returns {returned}. Errors: {', '.join(map(str, sorted(codes))) or 'none'}.\n"
        if path == "/v1/chat/completions":
            yield "### `messages[]`\n"
            message = without_null(models["ChatMessage"])
            yield from fields("field", message, "messages[]", headings, first)
    yield "Next: [serving](../serving.md) · [errors](operations.md#http-errors)\n"


def without_null(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out that a field may be null, which says that it is not set."""
    null, properties = {"type": "null"}, dict[str, Any]()
    for name, of in model["properties"].items():
        kinds = [kind for kind in of.get("anyOf", ()) if kind != null]
        properties[name] = {**of, "anyOf": kinds} if kinds else of
    return {**model, "properties": properties}


def mocked(kind: type) -> Any:
    found = MagicMock()
    found.__class__ = kind
    return found


def curl(path: str) -> str:
    line = f"curl http://127.0.0.1:8000{path.format(model='mix')}"
    if path not in BODIES:
        return line
    header = '-H "Content-Type: application/json"'
    return f"{line} {header} \\\n    -d '{json.dumps(BODIES[path])}'"


def model_of(message: Mapping[str, Any]) -> str:
    """Name the model of a request's or response's JSON, if it has one."""
    schema = message["content"].get("application/json", {}).get("schema", {})
    return schema.get("$ref", "").rpartition("/")[2]


def answer(response: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    if name := model_of(response):
        keys = ", ".join(f"`{key}`" for key in models[name]["required"])
        return f"OpenAI's `{name}` ({keys})"
    return "JSON" if "application/json" in response["content"] else "plain text"


def settings(model: Mapping[str, Any], headings: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for key, of in model["properties"].items():
        default = json.dumps(of["default"]).strip('"') if "default" in of else ""
        shown = "required" if key in model.get("required", ()) else default and f"`{default}`"
        yield f"`{key}`", in_words(of, headings), shown, of.get("description", "")


def link(heading: str) -> str:
    return f"[`{heading.rpartition(': ')[2]}`](#{anchor(heading)})"


def sections(path: str, name: str, models: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Models of a run file, each with the paths in it where it may stand."""
    yield path, name
    for key, of in models[name]["properties"].items():
        for inner in dict.fromkeys(re.findall(r"'\$ref': '#/\$defs/(\w+)'", str(of))):
            tags = [one["const"] for one in models[inner]["properties"].values() if "const" in one]
            place = f"{path}.{key}".removeprefix(".") + "[]" * ("'items': {'$ref'" in str(of))
            yield from sections(": ".join([place, *tags]), inner, models)


def in_words(of: Mapping[str, Any], headings: Mapping[str, str]) -> str:
    """What a JSON Schema allows."""
    say = lambda one: in_words(one, headings)  # noqa: E731
    match of:
        case {"const": value}:
            return f"`{value}`"
        case {"enum": values}:
            return " or ".join(f"`{value}`" for value in values)
        case {"$ref": ref}:
            name = ref.rpartition("/")[2]
            return link(headings[name]) if name in headings else "mapping"
        case {"anyOf": members} | {"oneOf": members}:
            return " or ".join(dict.fromkeys(map(say, members)))
        case {"type": "array", "prefixItems": items}:
            return f"[{', '.join(map(say, items))}]"
        case {"type": "array", "items": items}:
            return f"list of {say(items)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"mapping to {say(values)}"
    kind = of.get("type", "any value")
    bounds = ((sign, of[name]) for name, sign in BOUNDS.items() if name in of)
    limits = [f"{sign} {bound:g}" for sign, bound in bounds if abs(bound) < MAX_BOUND]
    return " ".join([TYPES.get(kind, kind), " and ".join(limits)]).strip()


if __name__ == "__main__":
    for name, page in pages().items():
        (DIRECTORY / name).write_text(page)
