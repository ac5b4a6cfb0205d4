"""vLLM with loraloom's plug-in against loraloom itself; run by a Python that has both.

    python -m benchmarks.vllm_plugin check [--families llama qwen3 ...] [--devices 2]
    python -m benchmarks.vllm_plugin throughput [--chats 16] [--tokens 64] [--rounds 3] [--compiled]

check: two mixtures of different experts, rank and top_k, a LoRA and the base model answer in one
batch, greedy in float32, on a tiny random model of each family; it fails where a token is not the
one that loraloom chooses.
throughput: so many prompts at once, all of the base model, of a LoRA, of a mixture, and by turns of
four mixtures and the base model. Cases take turns; medians are given. `--rank` is the LoRA's and
the experts'.

On a CPU, set VLLM_CPU_KVCACHE_SPACE=1 and VLLM_CPU_OMP_THREADS_BIND to the cores to use. Results
are one line of JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.vllm_export import ask, decode, fill, start, tiny_model
from loraloom import LoraConfig, MixLoraConfig, attach, load_base_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")
VOCAB_SIZE = 256
CHECKED = {
    "small": MixLoraConfig(rank=2, alpha=4, num_experts=4, top_k=2),
    "large": MixLoraConfig(rank=3, alpha=3, num_experts=3, top_k=1, experts={"rank": 5}),
    "lora": LoraConfig(rank=5, alpha=6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("way", choices=["check", "throughput"])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--devices", type=int, default=1, help="that share a layer")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, not on a CPU")
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chats", type=int, default=16, help="at once")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each case")
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        ways = {"check": check, "throughput": throughput}
        result = ways[args.way](args, Path(directory))
    print(json.dumps({"way": args.way, **result}))
    sys.exit(0 if result.get("equal", True) else 1)


def check(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    families = {family: check_family(args, family, directory / family) for family in args.families}
    return {"families": families, "equal": all(families.values())}


def check_family(args: argparse.Namespace, family: str, directory: Path) -> bool:
    """Whether vLLM chooses the tokens that loraloom does."""
    model = tiny_model(family, VOCAB_SIZE)
    model.save_pretrained(directory / "base")
    host = attach(model)
    save_adapters(host, CHECKED, directory, std=1.0)
    names = [None, *CHECKED]
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (5, 17)
    ]
    prompts = [prompt for prompt in drawn for _ in names]
    names *= len(drawn)
    expected = [decode(host, prompt, name, 16) for prompt, name in zip(prompts, names, strict=True)]
    assert len(set(map(tuple, expected))) == len(expected), "adapters must change what is said"
    served = serve(args, directory, "float32", max_lora_rank=16, skip_tokenizer_init=True)
    requests = lora_requests(names, list(CHECKED), directory)
    told = ask(served, prompts, 16, requests, detokenize=False)
    same = [one == other for one, other in zip(told, expected, strict=True)]
    served.llm_engine.engine_core.shutdown()
    tell(f"{family}: {sum(same)} of {len(same)} texts are equal")
    return all(same)


def throughput(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    model, tokenizer = load_base_model(args.base_model, dtype=args.dtype)
    model.save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    mixtures = [f"mix-{number}" for number in range(4)]
    config = MixLoraConfig(rank=args.rank, alpha=2 * args.rank)
    configs = {"lora": LoraConfig(rank=args.rank, alpha=2 * args.rank)}
    save_adapters(attach(model), configs | dict.fromkeys(mixtures, config), directory, std=0.02)
    names = ["lora", *mixtures]
    prompts = [
        tokenizer(f"Tell me what is {number} about rivers, bread and the moon.")["input_ids"]
        for number in range(args.chats)
    ]
    cases = {
        "base": [None],
        "lora": ["lora"],
        "mixture": ["mix-0"],
        "mixed": [*mixtures, None],
    }
    rank = config.num_experts * args.rank
    served = serve(args, directory, args.dtype, max_lora_rank=rank)
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(args.rounds + 1):
        for case, models in cases.items():
            asked = [models[number % len(models)] for number in range(args.chats)]
            requests = lora_requests(asked, names, directory)
            begun = time.perf_counter()
            ask(served, prompts, args.tokens, requests)
            elapsed = time.perf_counter() - begun
            tell(f"{case}: {args.chats * args.tokens / elapsed:.1f} tokens/s")
            if turn:
                seconds[case].append(elapsed)
    rates = {
        case: round(args.chats * args.tokens / statistics.median(own), 1)
        for case, own in seconds.items()
    }
    return {
        "tokens_per_s": rates,
        "mixture / lora": round(rates["mixture"] / rates["lora"], 3),
        "mixed / base": round(rates["mixed"] / rates["base"], 3),
    }


def save_adapters(host: Any, configs: dict[str, Any], directory: Path, std: float) -> None:
    for seed, (name, config) in enumerate(configs.items()):
        fill(host.add(name, config, seed), std, seed)
        host.save(name, directory / name)


def serve(args: argparse.Namespace, directory: Path, dtype: str, **settings: Any) -> Any:
    return start(
        directory / "base",
        dtype=dtype,
        enable_lora=True,
        max_loras=6,
        enforce_eager=not args.compiled,
        tensor_parallel_size=args.devices,
        **settings,
    )


def lora_requests(models: list[str | None], names: list[str], directory: Path) -> list[Any]:
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    return [
        None if name is None else LoRARequest(name, 1 + names.index(name), str(directory / name))
        for name in models
    ]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
