"""Attack `loraloom serve` from outside, and print a table of what came of it.

    python -m benchmarks.serve_abuse [--scale 1.0] [NAME ...]

A tiny base model with random weights is served by a process of its own, with two API keys, an
admin's key and at most 1,024 open files. Each attack is a function below; it returns what it saw,
and whether the server held. Further attacks, such as `chat:messages`, fill a field of a route with
each of the large values of `serve_bodies`. NAME may have wildcards: `'chat:*'`. The table has the
longest waits of others for `/health` and for two tokens, and the peak of memory. The exit code is
the number of attacks that the server did not hold against. Attacks on the shares of keys are of
`--scale` times their size.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import torch
from pydantic import BaseModel

from benchmarks.serve_bodies import large_bodies, paths_of
from benchmarks.serve_watch import Waits, Watch, max_waits, read_bytes, watching
from loraloom.adapters import RoutedConfig
from loraloom.generation.router import fit_router
from loraloom.serve.http.guards import MAX_BODY_BYTES
from loraloom.serve.http.schemas import ChatBody, CompletionBody, LoadBody, UnloadBody
from tests.conftest import build_tokenizer
from tests.tiny import tiny_host

MAX_FILES = 1024
NUM_ADAPTERS = 40
MAX_WAITING = 200
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
Outcome = tuple[str, bool]
# Seconds that another key may wait for two tokens while a key attacks, in a process of its own.
MAX_WAIT_S = 5.0
PROGRAM = [str(Path(sys.executable).with_name("loraloom"))]
# The same without garbage collections.
UNCOLLECTED = [
    sys.executable,
    "-c",
    "import gc, sys; gc.disable(); from loraloom.cli.main import main; sys.exit(main())",
]
# Routes with bodies, and whose key may send them.
ROUTES: dict[str, tuple[str, type[BaseModel], str]] = {
    "chat": ("/v1/chat/completions", ChatBody, "user-1"),
    "completion": ("/v1/completions", CompletionBody, "user-1"),
    "load": ("/v1/load_lora_adapter", LoadBody, "admin"),
    "unload": ("/v1/unload_lora_adapter", UnloadBody, "admin"),
}


class Result(NamedTuple):
    """What came of an attack."""

    name: str
    attack: str
    outcome: str
    held: bool
    waits: Waits


class Server:
    """A server under attack, in a directory with its base model, adapters, keys and log."""

    scale = 1.0
    watch: Watch
    waits = Waits()  # that an attack has read

    def __init__(self, directory: Path, hub: str, *options: str, program: Sequence[str] = PROGRAM):
        self.directory, self.hub, self.log = directory, hub, directory / f"log{len(options)}"
        command = [*program, "serve", "--base-model", "base", "--port", "0", "--dtype", "float32"]
        command += ["--adapter", "greedy=lora", "--adapter", "modest=mixlora"]
        command += ["--adapter-dir", "cold", "--max-adapters", "8", "--max-rows", "4"]
        command += [
            "--cache-tokens",
            "4096",
            "--api-key-file",
            "keys",
            "--max-waiting",
            str(MAX_WAITING),
        ]
        command += ["--allow-loading", "--admin-key-file", "admins", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=directory,
                env=os.environ | {"HF_ENDPOINT": hub},
                preexec_fn=lambda: resource.setrlimit(
                    resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES)
                ),
            )
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline().rstrip()).endswith("/v1"):
            assert self.process.poll() is None, "the server did not start"
        self.port = int(line.removesuffix("/v1").rpartition(":")[2])
        self.statuses: Counter[int] = Counter()

    def client(self, key: str = "user-1") -> httpx2.AsyncClient:
        async def count(response: httpx2.Response) -> None:
            if response.request.url.path.startswith("/v1"):
                self.statuses[response.status_code] += 1

        return httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=600,
            limits=httpx2.Limits(max_connections=None),
            event_hooks={"response": [count]},
        )

    async def ask(
        self, http: httpx2.AsyncClient, model: str, tokens: int = 4, prompt: str = "one"
    ) -> httpx2.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return await http.post("/v1/completions", json=body | {"ignore_eos": True})

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()  # which closes the pipe

    def scaled(self, number: int) -> int:
        return max(1, math.ceil(number * self.scale))

    async def complete(self, http: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
        return await http.post("/v1/completions", json={"model": "base", **body})

    async def waits_beside(self, attack: Awaitable[Any]) -> tuple[float, float, Any]:
        """Seconds that another key and `/health` wait at most, and what came of the attack."""
        task = asyncio.ensure_future(attack)
        answers, healths = [0.0], [0.0]
        async with self.client("user-2") as http:
            await asyncio.sleep(0.05)
            while not task.done():
                start = time.perf_counter()
                (await http.get("/health")).raise_for_status()
                healths.append(time.perf_counter() - start)
                start = time.perf_counter()
                (await self.ask(http, "base", 2)).raise_for_status()
                answers.append(time.perf_counter() - start)
        return max(answers), max(healths), await task

    async def metric(self, name: str) -> float:
        """The sum of all samples whose name and labels begin like this."""
        async with self.client() as http:
            lines = (await http.get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"loraloom_{name}"))


async def half_open(server: Server) -> Outcome:
    """1,100 connections that send half of their headers, held for ten seconds."""
    size, held = server.log.stat().st_size, []
    for _ in range(1100):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        held.append(connection)
    waits = []
    for _ in range(10):
        start = time.perf_counter()
        async with server.client() as http:
            answers = [await http.get("/health"), await server.ask(http, "modest")]
        waits.append(time.perf_counter() - start)
        await asyncio.sleep(1)
    for connection in held:
        connection.close()
    grown = server.log.stat().st_size - size
    seen = f"health and an answer in {max(waits):.2f} s at most; log grew by {grown / 1000:.0f} kB"
    return seen, max(waits) < 5 and grown < 50_000 and {a.status_code for a in answers} == {200}


async def one_adapter_takes_all(server: Server) -> Outcome:
    """60 long requests for one adapter, then a short one for another."""
    async with server.client() as http:
        crowd = [asyncio.create_task(server.ask(http, "greedy", 100)) for _ in range(60)]
        while await server.metric("requests_waiting") < 40:
            await asyncio.sleep(0.05)
        answer = await server.ask(http, "modest")
        num_before = sum(task.done() for task in crowd)
        await asyncio.gather(*crowd)
    return f"it came after {num_before} of the 60", num_before < 15 and answer.status_code == 200


async def prompts_of_others(server: Server) -> Outcome:
    """A prompt that another key has sent before."""
    prompt, cached = "the sky is blue " * 20, []
    for key in ("user-1", "user-1", "user-2"):
        before = await server.metric("prompt_tokens_cached_total")
        async with server.client(key) as http:
            await server.ask(http, "modest", prompt=prompt)
        cached.append(await server.metric("prompt_tokens_cached_total") - before)
    seen = f"tokens known: {cached[1]:.0f} to the same key, {cached[2]:.0f} to the other"
    return seen, cached[1] > 0 == cached[2]


async def loading(server: Server) -> Outcome:
    """Load with a user's key, and with an admin's: from elsewhere, by links."""

    async def load(http: httpx2.AsyncClient, name: str, path: str) -> httpx2.Response:
        return await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

    (server.directory / "cold" / "link").symlink_to(server.directory / "lora")
    elsewhere = (str(server.directory / "lora"), "../lora", "link", "/none", "some/adapter")
    async with server.client() as http:
        as_user = (await load(http, "mine", "cold-0")).status_code
    async with server.client("admin") as http:
        refused = [(path, await load(http, "mine", path)) for path in elsewhere]
    words = {one.json()["error"]["message"].replace(path, "") for path, one in refused}
    seen = f"user {as_user}; {len(words)} message for {len(refused)} paths elsewhere"
    return seen, (as_user, len(words)) == (403, 1)


async def many_adapters(server: Server) -> Outcome:
    """40 adapters at once, where 8 may be loaded."""
    async with server.client() as http:
        names = [f"cold-{number}" for number in range(NUM_ADAPTERS)]
        answers = await asyncio.gather(*(server.ask(http, name, 20) for name in names))
    statuses = Counter(answer.status_code for answer in answers)
    return f"statuses {dict(statuses)}", statuses == {200: NUM_ADAPTERS}


async def hub_out_of_reach(server: Server) -> Outcome:
    """A cold adapter, while an admin loads from a Hub that never answers."""
    other = Server(server.directory, server.hub)  # without --adapter-root, which refuses the Hub
    async with other.client("admin") as admin, other.client() as http:
        body = {"lora_name": "far", "lora_path": "some/adapter"}
        task = asyncio.create_task(admin.post("/v1/load_lora_adapter", json=body))
        await asyncio.sleep(0.5)
        start = time.perf_counter()
        answer = await other.ask(http, "cold-1")
        waited = time.perf_counter() - start
        task.cancel()
    other.stop()
    return f"{answer.status_code} after {waited:.2f} s", answer.status_code == 200 and waited < 10


async def files_change(server: Server) -> Outcome:
    """An adapter whose files are replaced, and then deleted."""
    path = server.directory / "cold" / "changing"
    shutil.copytree(server.directory / "lora", path)
    answers = []
    async with server.client() as http:
        answers.append(await server.ask(http, "changing", 20))
        shutil.copytree(server.directory / "mixlora", path, dirs_exist_ok=True)
        answers += [await server.ask(http, "changing", 20), await server.ask(http, "modest", 20)]
        shutil.rmtree(path)
        gone = await server.ask(http, "changing")
    first, second, expected = [answer.json()["choices"][0]["text"] for answer in answers]
    seen = f"new text: {second == expected != first}; then {gone.status_code}"
    return seen, second == expected != first and gone.status_code == 404


async def broken_adapter(server: Server) -> Outcome:
    """An adapter of the directory whose weights are no file of safetensors."""
    path = server.directory / "cold" / "broken"
    shutil.copytree(server.directory / "lora", path)
    (path / "adapter_model.safetensors").write_bytes(b"none")
    async with server.client() as http:
        answer = await server.ask(http, "broken")
        models = (await http.get("/v1/models")).text
    shutil.rmtree(path)
    paths = str(server.directory) in answer.text + models
    is_logged = "adapter_model.safetensors" in server.log.read_text()
    seen = f"{answer.status_code}; paths told: {paths}; reason in the log: {is_logged}"
    return seen, answer.status_code == 500 and is_logged and not paths


async def schemas(server: Server) -> Outcome:
    """JSON schemas that overflow llguidance's stack, or take it minutes and gigabytes."""
    links = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(10_000)}
    anchors = {f"a{n}": {"$anchor": f"a{n}", "$ref": f"#a{n + 1}"} for n in range(3000)}
    text = {"type": "string"}
    bombs = [
        {"$ref": "#/$defs/a0", "$defs": links | {"a10000": text}},
        {"$ref": "#/$defs/a8000", "$defs": links | {"a10000": text}},
        {"$ref": "#a0", "$defs": anchors},
        {"type": "object", "properties": {f"p{n}": text for n in range(4500)}},
        {"type": "integer", "multipleOf": 1234567},
        {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
        {"enum": [f"value number {n}" for n in range(50_000)]},
    ]
    messages = [{"role": "user", "content": "one"}]
    body = {"model": "modest", "messages": messages, "max_tokens": 4}
    kind = "json_schema"
    async with server.client() as attacker, server.client("user-2") as http:
        attacks = [
            attacker.post(
                "/v1/chat/completions",
                json=body
                | {"response_format": {"type": kind, kind: {"name": "a", "schema": bomb}}},
            )
            for bomb in bombs
        ]
        gathered = asyncio.gather(*attacks)
        start = time.perf_counter()
        answer = await http.post(
            "/v1/chat/completions", json=body | {"response_format": {"type": "json_object"}}
        )
        waited = time.perf_counter() - start
        answers = await gathered
    statuses = Counter(one.status_code for one in answers)
    seen = f"{dict(statuses)}; another key's {answer.status_code} after {waited:.2f} s"
    return seen, answer.status_code == 200 and waited < 15 and statuses.keys() <= {200, 400}


async def nothing(server: Server) -> Outcome:
    """Nothing, for three seconds: what others wait without an attack."""
    await asyncio.sleep(3)
    return "", True


async def fill(server: Server, route: str, field: str) -> Outcome:
    """A field filled with each of the large values."""
    path, model, key = ROUTES[route]
    waits: list[tuple[Waits, str]] = []
    statuses: Counter[int] = Counter()
    headers = {"Content-Type": "application/json"}
    async with server.client(key) as http:
        for body in large_bodies(model, MAX_BODY_BYTES - 10_000, field, model="base"):
            answer = await http.post(path, content=body.content, headers=headers)
            statuses[answer.status_code] += 1
            waits.append((server.watch.read(), body.name))
    (health_s, _, _), name = max(waits)
    seen = f"{dict(statuses)}; /health waits {health_s:.2f} s at {name.partition(': ')[2]}"
    server.waits = max_waits(entry for entry, _ in waits)
    return seen, statuses.keys() <= {200, 400, 403, 404}


async def headers(server: Server) -> Outcome:
    """Requests with 60 kB of headers, with one of 60 kB, and with a key of 60 kB."""
    sent = [
        {f"x-{number}": "a" for number in range(6000)},
        {"x-request-id": "a" * 60_000},
        {"Authorization": "Bearer " + "a" * 60_000},
        {"Host": "a" * 60_000},
        {"Host": "a" + ":" * 60_000},
        {"Origin": "a" * 60_000, "Cookie": "a=b;" * 100},
    ]
    statuses: Counter[int] = Counter()
    size = server.log.stat().st_size
    async with server.client() as http:
        for fields in sent * 20:
            answer = await http.get("/v1/models", headers=fields)
            statuses[answer.status_code] += 1
    grown = (server.log.stat().st_size - size) / len(sent * 20)
    return f"{dict(statuses)}; {grown:.0f} bytes of log a request", grown < 1000


async def addresses(server: Server) -> Outcome:
    """Paths and queries of 60 kB: of no route, of a model, of health."""
    long = "a%00" * 10_000
    paths = [f"/{long}", f"/v1/models/{long}", f"/health?{long}", "/a" * 30_000]
    statuses: Counter[int] = Counter()
    size = server.log.stat().st_size
    async with server.client() as http:
        for path in paths * 20:
            answer = await http.get(path)
            statuses[answer.status_code] += 1
    grown = (server.log.stat().st_size - size) / len(paths * 20)
    return f"{dict(statuses)}; {grown:.0f} bytes of log a request", grown < 1000


async def sums(server: Server) -> Outcome:
    """Sums of adapters with as many terms as a name may have, all at once."""
    names = ["greedy", *(f"cold-{number}" for number in range(0, 16, 2))]
    models = ["+".join(f"{name}:0.1" for name in names[:number]) for number in (2, 4, 9)]
    models += ["+".join([f"{name}:0.1" for name in names[:2]] * number) for number in (2, 12, 9999)]
    models += ["+" * 300, ":" * 300, "/".join("a" * 150), "greedy/" * 40]
    async with server.client() as http:
        asked = [server.ask(http, model) for model in models * 4]
        statuses = Counter(answer.status_code for answer in await asyncio.gather(*asked))
    return f"{dict(statuses)}", statuses.keys() <= {200, 400, 404, 429}


async def many_completions(server: Server) -> Outcome:
    """As many completions as are accepted, each with all texts that end it and all biases."""
    stop = [f"{number:02}" + "a" * 998 for number in range(64)]
    biases = {str(number): -1.0 for number in range(300)}
    body = {"model": "base", "max_tokens": 1, "temperature": 1, "stop": stop, "logit_bias": biases}
    async with server.client() as http:
        asked = []
        for _ in range(4):
            asked.append(
                http.post("/v1/completions", json=body | {"prompt": ["one"] * 12, "n": 16})
            )
        statuses = Counter(answer.status_code for answer in await asyncio.gather(*asked))
    return f"{dict(statuses)}", statuses.keys() <= {200, 429}


async def valid_schemas(server: Server) -> Outcome:
    """Schemas of up to 200 kB that are valid, each compiled for the first time."""
    text = {"type": "string"}
    number = {"type": "number"}
    many = [
        {"type": "object", "properties": {f"{kind}{n}": text for n in range(size)}}
        for kind, size in (("a", 500), ("b", 1000), ("c", 2000), ("d", 3000))
    ]
    many += [{"enum": [f"value number {n}" for n in range(size)]} for size in (1000, 5000, 10_000)]
    many += [{"anyOf": [{"type": "array", "items": {"const": n}} for n in range(2000)]}]
    many += [{"type": "string", "pattern": "(" + "|".join(map(str, range(8000))) + ")*"}]
    many += [{"type": "string", "maxLength": 10**6}, {"type": "array", "maxItems": 10**6}]
    many += [{"type": "array", "items": number, "minItems": 5000}, {"description": "a" * 190_000}]
    many += [{"type": "string", "pattern": "(a|b|c|d|e)*" * 2000}]
    refs = [{"$ref": f"#/$defs/{spelled('abcdefghijkl', number)}"} for number in range(2000)]
    many += [{"anyOf": refs, "$defs": {"abcdefghijkl": {"enum": list(range(10_000))}}}]
    statuses: Counter[int] = Counter()
    messages = [{"role": "user", "content": "one"}]
    kind = "json_schema"
    async with server.client() as http:
        for schema in many:
            body = {"model": "base", "messages": messages, "max_tokens": 20}
            body["response_format"] = {"type": kind, kind: {"name": "a", "schema": schema}}
            answer = await http.post("/v1/chat/completions", json=body)
            statuses[answer.status_code] += 1
    return f"{dict(statuses)}", statuses.keys() <= {200, 400}


def spelled(name: str, number: int) -> str:
    """Spell a name as URLs do, in one of 2**len(name) ways."""
    letters = []
    for index, letter in enumerate(name):
        letters.append(f"%{ord(letter):x}" if number >> index & 1 else letter)
    return "".join(letters)


async def answered(server: Server) -> Outcome:
    """2,000 requests of 1 MB, answered by a server without garbage collections."""
    other = Server(server.directory, server.hub, program=UNCOLLECTED)
    body = {"model": "base", "prompt": "one", "max_tokens": 1, "user": "a" * 1_000_000}
    content = json.dumps(body).encode()
    process = Path(f"/proc/{other.process.pid}")
    headers = {"Content-Type": "application/json"}
    megabytes = []
    async with other.client() as http:
        for number in range(1, server.scaled(2000) + 1):
            await http.post("/v1/completions", content=content, headers=headers)
            if number in (200, 1000, 2000):
                megabytes.append(read_bytes(process, "VmRSS") / 1e6)
    other.stop()
    seen = ", ".join(f"{size:.0f}" for size in megabytes)
    return f"after 200, 1,000 and 2,000: {seen} MB", max(megabytes) < megabytes[0] + 50


async def counts(server: Server) -> Outcome:
    """Every answer of /v1 so far, in the log."""
    async with server.client("nobody") as http:
        await server.ask(http, "modest")
    log = server.log.read_text()
    wrong = [
        status
        for status, number in server.statuses.items()
        if sum(f'" {status}, ' in line and "/v1" in line for line in log.splitlines()) != number
    ]
    seen = f"{sum(server.statuses.values())} answers, {dict(server.statuses)}"
    return f"{seen}; not logged {wrong}", not wrong


async def sigterm(server: Server) -> Outcome:
    """SIGTERM while 16 cold adapters are asked for."""
    async with server.client() as http:
        names = [f"cold-{number}" for number in range(10, 26)]
        tasks = [asyncio.create_task(server.ask(http, name, 20)) for name in names]
        while not await server.metric("requests_running"):
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    code = await asyncio.to_thread(server.process.wait, 60)
    statuses = Counter(
        str(one.status_code) if isinstance(one, httpx2.Response) else type(one).__name__
        for one in answers
    )
    return f"exit code {code}, {dict(statuses)}", code == 0 and statuses.keys() == {"200"}


async def history(server: Server) -> Outcome:
    """A key that has worked alone, beside one that comes after a moment without requests."""
    tokens: Counter[str] = Counter()

    async def keep_asking(key: str) -> None:
        async with server.client(key) as http:
            while tokens.total() < num_tokens:
                answer = await server.ask(http, "base", 20, prompt=f"{time.perf_counter()}")
                tokens[key] += answer.json()["usage"]["total_tokens"]

    # Counted in tokens, as a busy machine answers few requests in a second.
    num_tokens = max(3_000, server.scaled(40_000))
    await asyncio.gather(*(keep_asking("user-1") for _ in range(8)))
    tokens.clear()
    newcomers = [asyncio.create_task(keep_asking("user-2")) for _ in range(8)]
    while not tokens["user-2"]:  # which comes first, when nobody is there
        await asyncio.sleep(0.01)
    tokens.clear()
    await asyncio.gather(*(keep_asking("user-1") for _ in range(8)), *newcomers)
    share = tokens["user-1"] / tokens.total()
    return f"then it gets {share:.0%} of all tokens", 0.35 < share < 0.65


async def full_queue(server: Server) -> Outcome:
    """A key that keeps the queue full."""
    is_over = False

    async def refill(http: httpx2.AsyncClient) -> None:
        while not is_over:
            await server.ask(http, "base", 8)
            await asyncio.sleep(0.02)

    async with server.client() as http, server.client("user-2") as other:
        crowd = [asyncio.create_task(refill(http)) for _ in range(MAX_WAITING + 50)]
        while await server.metric("requests_waiting") < MAX_WAITING - 20:
            await asyncio.sleep(0.05)
        statuses = [
            (await server.ask(other, "base", 2)).status_code for _ in range(server.scaled(20))
        ]
        is_over = True
        await asyncio.gather(*crowd)
    return f"another key's statuses {dict(Counter(statuses))}", set(statuses) == {200}


async def large_prompts(server: Server) -> Outcome:
    """40 prompts of 1.9 MB at once, which fit no context."""

    async def attack() -> set[int]:
        async with server.client() as http:
            asked = [
                server.complete(http, prompt="the sky is blue " * 118_000)
                for _ in range(server.scaled(40))
            ]
            return {answer.status_code for answer in await asyncio.gather(*asked)}

    waited, health, statuses = await server.waits_beside(attack())
    seen = f"{statuses}; another key waits {waited:.2f} s at most, /health {health:.2f} s"
    return seen, statuses == {400} and max(waited, health) < MAX_WAIT_S


async def many_messages(server: Server) -> Outcome:
    """Ten chats of 40,000 messages at once."""
    messages = [{"role": "user", "content": "a"}] * server.scaled(40_000)

    async def attack() -> set[int]:
        async with server.client() as http:
            body = {"model": "base", "messages": messages}
            asked = [http.post("/v1/chat/completions", json=body) for _ in range(10)]
            return {answer.status_code for answer in await asyncio.gather(*asked)}

    waited, health, statuses = await server.waits_beside(attack())
    seen = f"{statuses}; another key waits {waited:.2f} s at most, /health {health:.2f} s"
    return seen, statuses == {400} and max(waited, health) < MAX_WAIT_S


async def long_prompts(server: Server) -> Outcome:
    """16 prompts of 900 tokens at once, again and again, each for an answer of a token."""

    async def attack() -> float:
        async with server.client() as http:
            start = time.perf_counter()
            for number in range(server.scaled(4)):
                bodies = [[3 + (number * 16 + at) % 290] * 900 for at in range(16)]
                asked = [server.complete(http, prompt=ids, max_tokens=1) for ids in bodies]
                await asyncio.gather(*asked)
            return time.perf_counter() - start

    waited, _, seconds = await server.waits_beside(attack())
    seen = f"another key waits {waited:.2f} s at most, of {seconds:.1f} s"
    return seen, waited < MAX_WAIT_S


async def scored_prompts(server: Server) -> Outcome:
    """Eight prompts of 1,000 tokens to be scored, whose sender goes away."""
    body = {"model": "base", "max_tokens": 1, "echo": True, "logprobs": 1}
    before = await server.metric("steps_total")

    async def attack() -> None:
        async with server.client() as http:
            prompts = [[3 + number] * 1000 for number in range(8)]
            asked = [http.post("/v1/completions", json=body | {"prompt": one}) for one in prompts]
            tasks = [asyncio.ensure_future(one) for one in asked]
            await asyncio.sleep(0.5 * server.scale)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    waited, _, _ = await server.waits_beside(attack())
    async with server.client("user-2") as http:
        start = time.perf_counter()
        await server.ask(http, "base", 2)
        after = time.perf_counter() - start
        scored = await http.post("/v1/completions", json=body | {"prompt": [5] * 1000})
    num_steps = await server.metric("steps_total") - before
    num_scored = len(scored.json()["choices"][0]["logprobs"]["token_logprobs"])
    seen = f"another key waits {waited:.2f} s, and {after:.2f} s afterwards; {num_steps:.0f} steps"
    return seen, max(waited, after) < MAX_WAIT_S and num_scored == 1001


async def routed_prompts(server: Server) -> Outcome:
    """Prompts to an adapter whose router chooses by them, all in one request."""
    prompts = [f"{number} " + "the sky is blue " * 20 for number in range(server.scaled(200))]

    async def attack() -> int:
        async with server.client() as http:
            body = {"model": "auto", "prompt": prompts, "max_tokens": 1}
            return (await http.post("/v1/completions", json=body)).status_code

    waited, _, status = await server.waits_beside(attack())
    return f"{status}; another key waits {waited:.2f} s at most", status == 200 and waited < 5


async def text_that_does_not_settle(server: Server) -> Outcome:
    """900 tokens without text, four at once; and 65 stop texts."""
    end = str(build_tokenizer().eos_token_id)
    body = {"prompt": "one", "max_tokens": server.scaled(900), "ignore_eos": True}

    async def attack() -> set[int]:
        async with server.client() as http:
            asked = [server.complete(http, **body, logit_bias={end: 100}) for _ in range(4)]
            return {answer.status_code for answer in await asyncio.gather(*asked)}

    waited, _, statuses = await server.waits_beside(attack())
    async with server.client() as http:
        refused = await server.complete(http, prompt="one", stop=["ab"] * 65)
    seen = f"{statuses}; another key waits {waited:.2f} s at most; 65: {refused.status_code}"
    return seen, statuses == {200} and waited < MAX_WAIT_S and refused.status_code == 400


ATTACKS: dict[str, Callable[[Server], Awaitable[Outcome]]] = {
    attack.__name__: attack
    for attack in (
        half_open,
        one_adapter_takes_all,
        prompts_of_others,
        loading,
        many_adapters,
        hub_out_of_reach,
        files_change,
        broken_adapter,
        schemas,
        history,
        full_queue,
        large_prompts,
        many_messages,
        long_prompts,
        scored_prompts,
        routed_prompts,
        text_that_does_not_settle,
        headers,
        addresses,
        sums,
        many_completions,
        valid_schemas,
        answered,
        nothing,
    )
}
for route, (_, model, _) in ROUTES.items():
    for path in paths_of(model):
        ATTACKS[f"{route}:{path}"] = partial(fill, route=route, field=path)
ATTACKS |= {"counts": counts, "sigterm": sigterm}
"""In this order; after the last one nothing answers."""


def prepare(directory: Path) -> None:
    """Write a base model, adapters and keys."""
    host = tiny_host(dtype=torch.float32, vocab_size=300, max_position_embeddings=1024)
    tokenizer = build_tokenizer()
    host.add("auto", RoutedConfig(experts={"law": "lora", "math": "mixlora"}))
    fit_router(host, tokenizer, "auto", {"law": ["the court", "a court"], "math": ["one", "two"]})
    host.save("auto", directory / "cold" / "auto")
    host.remove("auto")
    for name in ("lora", "mixlora"):
        host.save(name, directory / name)
    for number in range(NUM_ADAPTERS):
        name = ("lora", "mixlora")[number % 2]
        shutil.copytree(directory / name, directory / "cold" / f"cold-{number}")
    host.detach().save_pretrained(directory / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / "base")
    (directory / "keys").write_text("user-1\nuser-2\n")
    (directory / "admins").write_text("admin\n")


@contextmanager
def served(scale: float = 1.0) -> Iterator[Server]:
    """Serve what is attacked."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as hub:
        directory = Path(folder)
        prepare(directory)
        hub_address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        server = Server(directory, hub_address, "--adapter-root", "cold")
        server.scale = scale
        try:
            with watching(server.process.pid, server.port, "user-2") as server.watch:
                yield server
        finally:
            server.stop()


def attack(server: Server, names: Sequence[str]) -> Iterator[Result]:
    for name in names:
        server.watch.read()
        server.waits = Waits()
        try:
            outcome, held = asyncio.run(ATTACKS[name](server))
        except Exception as error:
            outcome, held = f"{type(error).__name__}: {error}", False
        if not held:
            print(server.log.read_text()[-6000:], file=sys.stderr)
        waits = max_waits([server.waits, server.watch.read()])
        yield Result(name, documented(name), outcome, held, waits)


def documented(name: str) -> str:
    attack = ATTACKS[name]
    function = attack.func if isinstance(attack, partial) else attack
    return (function.__doc__ or "").strip()


def is_among(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="size of attacks on shares")
    parser.add_argument("names", nargs="*", metavar="NAME", help="all by default")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with this process
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    names = [name for name in ATTACKS if is_among(name, arguments.names)]
    num_failed = 0
    with served(arguments.scale) as server:
        for result in attack(server, names):
            verdict = "pass" if result.held else "FAIL"
            health_s, completion_s, peak_bytes = result.waits
            seen = f"{health_s:.3f} s | {completion_s:.3f} s | {peak_bytes / 1e6:.0f} MB"
            columns = [result.name, result.attack, result.outcome, seen, verdict]
            print(f"| {' | '.join(columns)} |", flush=True)
            num_failed += not result.held
    return num_failed


if __name__ == "__main__":
    sys.exit(main())
