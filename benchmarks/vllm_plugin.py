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
from transformers import AutoConfig, AutoModelForCausalLM

from loraloom import LoraConfig, MixLoraConfig, attach, load_base_model

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
    from vllm.lora.request import LoRARequest

    return [
        None if name is None else LoRARequest(name, 1 + names.index(name), str(directory / name))
        for name in models
    ]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tiny_model(family: str, vocab_size: int) -> Any:
    """A model whose weights are random, so that no two tokens are nearly as likely."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=vocab_size, **TINY)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(std=0.15, generator=generator)
            elif family == "gemma2" and "post_" in name:
                # its blocks add normed outputs to embeddings that are the head, too: were these the
                # larger part, each token would be followed by itself, whoever adapts the blocks
                parameter.fill_(4.0)
    return model.float().eval()


def fill(adapter: torch.nn.Module, std: float, seed: int = 1) -> None:
    """Give an adapter weights that change what is said."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)


def decode(host: Any, prompt: list[int], name: str | None, num_tokens: int) -> list[int]:
    """Loraloom's greedy tokens."""
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
    ids = torch.tensor([prompt])
    answer = host.generate(ids, torch.ones_like(ids), [name], eos_token_id=None, **options)
    return answer[0, len(prompt) :].tolist()


def start(path: Path, **settings: Any) -> Any:
    """Start vLLM on a model directory."""
    from vllm import LLM

    defaults = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    return LLM(str(path), **defaults | settings)


def ask(
    served: Any,
    prompts: list[list[int]],
    num_tokens: int,
    lora_request: Any = None,
    **settings: Any,
) -> list[list[int]]:
    """Ask everything at once; the greedy tokens of each answer."""
    from vllm import SamplingParams, TokensPrompt

    answers = served.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **settings),
        lora_request=lora_request,
        use_tqdm=False,
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":
    main()
