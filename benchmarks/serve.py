"""Measure `loraloom serve` from outside: throughput, waiting times under load, and a soak.

    python -m benchmarks.serve throughput [--chats 16] [--tokens 128] [--rounds 3]
    python -m benchmarks.serve arrivals [--seconds 120] [--load 0.7]
    python -m benchmarks.serve soak [--minutes 15] [--clients 32]

The server is a process of its own; its adapters are MixLoRA of rank 8 with random B. Each way
prints its progress on stderr, and its result as one line of JSON on stdout.

throughput: so many chats at once, for the base model and for four mixtures and the base by turns,
against one static `host.generate` of the same chats. Cases take turns; medians are given.
arrivals: chats at random (Poisson) times, at a share of what the server can do; time to first
token by model.
soak: clients that chat without a pause, while adapters are loaded and unloaded; one in twenty
requests is malformed, one in twenty clients goes away under way. It fails if an answer is not
expected, if memory grows by more than 3 % after the first fifth, if the cache is not returned, or
if the server does not end with 0 after SIGTERM under load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil

from benchmarks.cases import alternate, fill_B
from loraloom import MixLoraConfig, attach, load_base_model

BASE = "smollm2-135m"
MIXTURES = ("mix-0", "mix-1", "mix-2", "mix-3")
SOAK_OPTIONS = ["--allow-loading", "--cache-tokens", "8192", "--max-waiting", "24"]
"""A cache that is full after a minute, and a queue that is at times."""
TOPICS = "rivers, bread, chess, the moon, tea, maps, bridges, rain, wool, clocks".split(", ")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("way", choices=["throughput", "arrivals", "soak"])
    parser.add_argument("--base-model", default=BASE)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chats", type=int, default=16, help="at once")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each case")
    parser.add_argument("--seconds", type=float, default=120, help="of random arrivals")
    parser.add_argument("--load", type=float, default=0.7, help="share of the server's capacity")
    parser.add_argument("--minutes", type=float, default=15, help="of the soak")
    parser.add_argument("--clients", type=int, default=32, help="of the soak")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        ways = {"throughput": throughput, "arrivals": arrivals, "soak": soak}
        print(json.dumps({"way": args.way, **ways[args.way](args, Path(directory))}))


def throughput(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    host, tokenizer = save_adapters(args, directory, MIXTURES)
    prompts = [chat_of(number) for number in range(args.chats)]
    mixed = [(*MIXTURES, args.base_model)[number % 5] for number in range(args.chats)]
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )

    def static() -> None:
        host.generate(
            **batch, min_new_tokens=args.tokens, max_new_tokens=args.tokens, do_sample=False
        )

    with running_server(args, directory, MIXTURES) as server:
        cases = {
            "static": static,
            "base": lambda: asyncio.run(server.burst(prompts, [args.base_model] * args.chats)),
            "mixed": lambda: asyncio.run(server.burst(prompts, mixed)),
        }
        times = alternate(cases, args.rounds, warmup=1)
    rates = {name: round(args.chats * args.tokens / time, 1) for name, time in times.items()}
    return {
        "tokens_per_s": rates,
        "base / static": round(rates["base"] / rates["static"], 3),
        "mixed / base": round(rates["mixed"] / rates["base"], 3),
    }


def arrivals(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    save_adapters(args, directory, MIXTURES)
    models = (*MIXTURES, args.base_model)
    with running_server(args, directory, MIXTURES) as server:
        prompts = [chat_of(number) for number in range(args.chats)]
        names = [models[number % 5] for number in range(args.chats)]
        asyncio.run(server.burst(prompts, names))
        start = time.perf_counter()
        asyncio.run(server.burst(prompts, names))
        capacity = args.chats / (time.perf_counter() - start)
        tell(f"capacity: {capacity:.2f} chats/s")
        rate = capacity * args.load
        waits = asyncio.run(random_arrivals(server, models, rate, args.seconds))
    return {
        "capacity_chats_per_s": round(capacity, 3),
        "rate_chats_per_s": round(rate, 3),
        "chats": sum(map(len, waits.values())),
        "time_to_first_token_s": {
            name: {
                "chats": len(own),
                "p50": quantile(own, 0.5),
                "p95": quantile(own, 0.95),
                "longest": quantile(own, 1),
            }
            for name, own in sorted(waits.items())
        },
    }


async def random_arrivals(
    server: Server, models: tuple[str, ...], rate: float, seconds: float
) -> dict[str, list[float]]:
    draw, waits = random.Random(0), defaultdict(list)

    async def one(http: httpx2.AsyncClient, number: int) -> None:
        name = draw.choice(models)
        start, first = time.perf_counter(), None
        async with http.stream("POST", server.chat, json=server.body(name, number)) as response:
            async for line in response.aiter_lines():
                if first is None and '"content": "' in line and '"content": ""' not in line:
                    first = time.perf_counter() - start
        waits[name].append(time.perf_counter() - start if first is None else first)

    async with httpx2.AsyncClient(timeout=600, limits=server.limits) as http:
        tasks, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            tasks.append(asyncio.create_task(one(http, len(tasks))))
            await asyncio.sleep(draw.expovariate(rate))
        await asyncio.gather(*tasks)
    return waits


def quantile(values: list[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 3)


def soak(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    names = tuple(f"mix-{number}" for number in range(8))
    save_adapters(args, directory, names)
    with running_server(args, directory, names[:4], SOAK_OPTIONS) as server:
        state = Soak(args, server, directory, names)
        asyncio.run(state.run())
        result = state.result()
        result["exit_code"] = asyncio.run(state.stop_under_load())
    result["passed"] = (
        not result["unexpected"]
        and result["memory_growth"] <= 0.03
        and result["cache_tokens_used"] == 0
        and result["exit_code"] == 0
    )
    return result


class Soak:
    """Clients, and somebody who loads and unloads adapters under way."""

    def __init__(self, args: Any, server: Server, directory: Path, names: tuple[str, ...]):
        self.args, self.server, self.directory, self.names = args, server, directory, names
        self.outcomes: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self.start = time.perf_counter()
        self.end = self.start + 60 * args.minutes

    async def run(self) -> None:
        async with httpx2.AsyncClient(timeout=600, limits=self.server.limits) as http:
            clients = [self.client(http, number) for number in range(self.args.clients)]
            await asyncio.gather(*clients, self.loader(http), self.watcher())
        await asyncio.sleep(1)

    async def client(self, http: httpx2.AsyncClient, number: int) -> None:
        draw = random.Random(number)
        while time.perf_counter() < self.end:
            name = draw.choice([self.args.base_model, *self.names])
            body = self.server.body(name, draw.randrange(1000), draw.randrange(1, 64))
            kind = draw.random()
            try:
                if kind < 0.05:
                    await self.malformed(http, draw, body)
                elif kind < 0.10:
                    await self.vanish(http, body)
                else:
                    await self.chat(http, body)
            except httpx2.HTTPError as error:
                self.unexpected.append(f"{type(error).__name__}: {error}")

    async def chat(self, http: httpx2.AsyncClient, body: dict[str, Any]) -> None:
        """A whole answer, 404 while its adapter is away, or 429."""
        text = ""
        async with http.stream("POST", self.server.chat, json=body) as response:
            async for piece in response.aiter_text():
                text += piece
        is_whole = text.rstrip().endswith("data: [DONE]") and '"error"' not in text
        expected = is_whole if response.status_code == 200 else response.status_code in (404, 429)
        self.count(str(response.status_code), expected, text)

    async def malformed(
        self, http: httpx2.AsyncClient, draw: random.Random, body: dict[str, Any]
    ) -> None:
        broken: list[Any] = [
            b'{"model": ',
            json.dumps(body | {"temperature": -1}).encode(),
            json.dumps(body | {"messages": []}).encode(),
            json.dumps(body | {"model": "../mix-0"}).encode(),
            json.dumps(body | {"max_tokens": 10**9}).encode(),
            b"[" * 50_000,
        ]
        headers = {"Content-Type": "application/json"}
        response = await http.post(self.server.chat, content=draw.choice(broken), headers=headers)
        is_fine = response.status_code in (400, 404)
        self.count(f"malformed {response.status_code}", is_fine, response.text)

    async def vanish(self, http: httpx2.AsyncClient, body: dict[str, Any]) -> None:
        async with http.stream("POST", self.server.chat, json=body) as response:
            async for _ in response.aiter_text():
                break
        self.count(f"vanished {response.status_code}", response.status_code in (200, 404, 429), "")

    async def loader(self, http: httpx2.AsyncClient) -> None:
        """Unload an adapter and load another one, every second."""
        loaded, draw = list(self.names[:4]), random.Random(99)
        while time.perf_counter() < self.end:
            gone = loaded.pop(draw.randrange(len(loaded)))
            new = draw.choice([name for name in self.names if name not in loaded])
            answers = [
                await http.post(
                    f"{self.server.address}/v1/unload_lora_adapter", json={"lora_name": gone}
                ),
                await http.post(
                    f"{self.server.address}/v1/load_lora_adapter",
                    json={"lora_name": new, "lora_path": str(self.directory / new)},
                ),
            ]
            loaded.append(new)
            for answer in answers:
                self.count(f"loading {answer.status_code}", answer.status_code == 200, answer.text)
            await asyncio.sleep(1)

    async def watcher(self) -> None:
        while time.perf_counter() < self.end:
            await asyncio.sleep(min(5.0, 3 * self.args.minutes))
            self.memory.append((time.perf_counter(), self.server.resident_bytes()))
            minutes = (time.perf_counter() - self.start) / 60
            mib = self.memory[-1][1] / 2**20
            tell(f"{minutes:.1f} min, {mib:.0f} MiB, {dict(self.outcomes)}")

    def count(self, outcome: str, is_expected: bool, text: str) -> None:
        self.outcomes[outcome] += 1
        if not is_expected:
            self.unexpected.append(f"{outcome}: {text[-300:]}")

    def result(self) -> dict[str, Any]:
        begun = self.start + 12 * self.args.minutes  # after a fifth
        settled = [size for at, size in self.memory if at >= begun]
        third = max(1, len(settled) // 3)
        first, last = statistics.median(settled[:third]), statistics.median(settled[-third:])
        return {
            "minutes": self.args.minutes,
            "outcomes": dict(self.outcomes),
            "unexpected": self.unexpected[:20],
            "memory_mib": [round(first / 2**20), round(last / 2**20)],
            "memory_growth": round(last / first - 1, 4),
            "cache_tokens_used": self.server.metric("loraloom_cache_tokens_used"),
        }

    async def stop_under_load(self) -> int:
        """Send SIGTERM while chats are answered; every one of them must end."""
        prompts = [chat_of(number) for number in range(8)]
        burst = asyncio.create_task(self.server.burst(prompts, [self.args.base_model] * 8))
        while not self.server.metric("loraloom_requests_running"):
            await asyncio.sleep(0.05)
        self.server.process.send_signal(signal.SIGTERM)
        await burst
        return await asyncio.to_thread(self.server.process.wait, 60)


class Server:
    """A running server, and how to ask it."""

    limits = httpx2.Limits(max_connections=None)

    def __init__(self, process: subprocess.Popen[str], address: str, tokens: int):
        self.process, self.address, self.tokens = process, address, tokens
        self.chat = f"{address}/v1/chat/completions"

    def body(self, model: str, number: int, tokens: int | None = None) -> dict[str, Any]:
        return {
            "model": model,
            "messages": chat_of(number),
            "max_tokens": tokens or self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }

    async def burst(self, prompts: list[Any], models: list[str]) -> None:
        """Ask everything at once, and wait for all answers."""
        async with httpx2.AsyncClient(timeout=600, limits=self.limits) as http:
            bodies = [
                self.body(name, 0) | {"messages": prompt, "stream": False}
                for prompt, name in zip(prompts, models, strict=True)
            ]
            answers = await asyncio.gather(*(http.post(self.chat, json=body) for body in bodies))
        for answer in answers:
            assert answer.json()["usage"]["completion_tokens"] == self.tokens, answer.text

    def metric(self, name: str) -> float:
        text = httpx2.get(f"{self.address}/metrics").text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def resident_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


@contextmanager
def running_server(args: Any, directory: Path, names: tuple[str, ...], options: Any = ()):
    program = str(Path(sys.executable).with_name("loraloom"))
    command = [program, "serve", "--base-model", args.base_model, "--dtype", args.dtype]
    command += [word for name in names for word in ("--adapter", f"{name}={directory / name}")]
    command += ["--port", "0", *(options or ["--cache-tokens", "32768"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        tell("".join(lines).rstrip())
        yield Server(process, lines[3].split()[-1].removesuffix("/v1"), args.tokens)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        process.wait()


def save_adapters(args: argparse.Namespace, directory: Path, names: tuple[str, ...]):
    model, tokenizer = load_base_model(args.base_model, dtype=args.dtype)
    host = attach(model)
    for seed, name in enumerate(names):
        fill_B(host.add(name, MixLoraConfig(rank=8, alpha=16), seed))
        host.save(name, directory / name)
    return host, tokenizer


def chat_of(number: int) -> list[dict[str, str]]:
    topic = TOPICS[number % len(TOPICS)]
    asked = "Tell me, in some detail, " * (number % 3) + f"what is {number} about {topic}?"
    return [{"role": "user", "content": asked}]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
