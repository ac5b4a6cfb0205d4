"""Attack `loraloom serve` from outside, and print a table of what came of it.

    python -m benchmarks.serve_abuse [NAME ...]

A tiny base model with random weights is served by a process of its own, with two API keys, an
admin's key and at most 1,024 open files. Each attack is a function below; it returns what it saw,
and whether the server held. The exit code is the number of attacks that it did not hold against.
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import torch

from tests.conftest import build_tokenizer
from tests.tiny import tiny_host

MAX_FILES = 1024
MAX_LOADED = 15
NUM_ADAPTERS = 40
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
Outcome = tuple[str, bool]


class Server:
    """A server under attack, in a directory with its base model, adapters, keys and log."""

    def __init__(self, directory: Path, hub: str, *options: str):
        self.directory, self.hub, self.log = directory, hub, directory / f"log{len(options)}"
        program = str(Path(sys.executable).with_name("loraloom"))
        command = [program, "serve", "--base-model", "base", "--port", "0", "--dtype", "float32"]
        command += ["--adapter", "greedy=lora", "--adapter", "modest=mixlora"]
        command += ["--adapter-dir", "cold", "--max-adapters", "8", "--max-rows", "4"]
        command += ["--cache-tokens", "4096", "--api-key-file", "keys", "--max-waiting", "200"]
        command += ["--allow-loading", "--admin-key-file", "admins", *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            cwd=directory,
            env=os.environ | {"HF_ENDPOINT": hub},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES)),
        )
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(3)]
        self.port = int(lines[2].removesuffix("/v1\n").rpartition(":")[2])
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
    """Load with a user's key, and with an admin's: from elsewhere, by links, without end."""

    async def load(http: httpx2.AsyncClient, name: str, path: str) -> httpx2.Response:
        return await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

    (server.directory / "cold" / "link").symlink_to(server.directory / "lora")
    elsewhere = (str(server.directory / "lora"), "../lora", "link", "/none", "some/adapter")
    async with server.client() as http:
        as_user = (await load(http, "mine", "cold-0")).status_code
    async with server.client("admin") as http:
        refused = [(path, await load(http, "mine", path)) for path in elsewhere]
        wide, num_loaded = server.directory / "cold" / "wide", 0
        shutil.copytree(server.directory / "wide", wide)
        for num_loaded in range(50):
            answer = await load(http, f"wide-{num_loaded}", "wide")
            if answer.status_code != 200:
                break
        for number in range(num_loaded):
            name = {"lora_name": f"wide-{number}"}
            await http.post("/v1/unload_lora_adapter", json=name)
        shutil.rmtree(wide)
    words = {one.json()["error"]["message"].replace(path, "") for path, one in refused}
    seen = f"user {as_user}; {len(words)} message for {len(refused)} paths elsewhere; "
    seen += f"{answer.status_code} after {num_loaded} loads"
    return seen, (as_user, len(words), answer.status_code) == (403, 1, 507)


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
    other.process.kill()
    other.process.wait()
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
        counts,
        sigterm,
    )
}
"""In this order; after the last one nothing answers."""


def prepare(directory: Path) -> None:
    """Write a base model, adapters and keys."""
    host = tiny_host(dtype=torch.float32, vocab_size=300, max_position_embeddings=1024)
    for name in ("lora", "mixlora"):
        host.save(name, directory / name)
    for number in range(NUM_ADAPTERS):
        name = ("lora", "mixlora")[number % 2]
        shutil.copytree(directory / name, directory / "cold" / f"cold-{number}")
    shutil.copytree(directory / "mixlora", directory / "wide")
    host.detach().save_pretrained(directory / "base")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / "base")
    (directory / "keys").write_text("user-1\nuser-2\n")
    (directory / "admins").write_text("admin\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *ATTACKS], help="all by default")
    names = parser.parse_args().names or list(ATTACKS)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    num_failed = 0
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as hub:
        directory = Path(folder)
        prepare(directory)
        hub_address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        size = (directory / "wide" / "adapter_model.safetensors").stat().st_size
        options = ("--adapter-root", "cold", "--max-adapter-bytes", str(MAX_LOADED * size))
        server = Server(directory, hub_address, *options)
        try:
            for name in names:
                try:
                    seen, held = asyncio.run(ATTACKS[name](server))
                except Exception as error:
                    seen, held = f"{type(error).__name__}: {error}", False
                num_failed += not held
                if not held:
                    print(server.log.read_text()[-6000:], file=sys.stderr)
                asked = (ATTACKS[name].__doc__ or "").strip()
                print(f"| {name} | {asked} | {seen} | {'pass' if held else 'FAIL'} |", flush=True)
        finally:
            server.process.kill()
            server.process.wait()
    return num_failed


if __name__ == "__main__":
    sys.exit(main())
