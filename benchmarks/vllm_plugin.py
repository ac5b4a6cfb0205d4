"""vLLM with loraloom's plug-in against loraloom itself; run by a Python that has both.

    python benchmarks/vllm_plugin.py check [--families llama qwen3 ...] [--devices 2]
    python benchmarks/vllm_plugin.py throughput [--chats 16] [--tokens 64] [--rounds 3] [--compiled]

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
from vllm import LLM, SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

from loraloom import LoraConfig, MixLoraConfig, attach, load_base_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")
TINY = {
    "vocab_size": 256,
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
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
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
    model = tiny_model(family)
    model.save_pretrained(directory / "base")
    host = attach(model)
    save_adapters(host, CHECKED, directory, std=1.0)
    names = [None, *CHECKED]
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randint(3, TINY["vocab_size"], (length,), generator=generator).tolist()
        for length in (5, 17)
    ]
    prompts = [prompt for prompt in drawn for _ in names]
    names *= len(drawn)
    expected = [
        host.generate(
            torch.tensor([prompt]), adapters=[name], max_new_tokens=16, min_new_tokens=16
        )[0, len(prompt) :].tolist()
        for prompt, name in zip(prompts, names, strict=True)
    ]
    assert len(set(map(tuple, expected))) == len(expected), "adapters must change what is said"
    served = serve(args, directory, "float32", max_lora_rank=16, skip_tokenizer_init=True)
    told = ask(served, prompts, names, list(CHECKED), directory, 16, detokenize=False)
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
            start = time.perf_counter()
            ask(served, prompts, asked, names, directory, args.tokens)
            elapsed = time.perf_counter() - start
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


def tiny_model(family: str) -> Any:
    """A model whose weights are random, so that no two tokens are nearly as likely."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
            elif family == "gemma2" and "post_" in name:
                # its blocks add normed outputs to embeddings that are the head, too: were these the
                # larger part, each token would be followed by itself, whoever adapts the blocks
                parameter.fill_(4.0)
    model.generation_config.eos_token_id = None
    return model.float().eval()


def save_adapters(host: Any, configs: dict[str, Any], directory: Path, std: float) -> None:
    """Save adapters with random B, of which each changes what is said."""
    for seed, (name, config) in enumerate(configs.items()):
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in host.add(name, config, seed).named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=std, generator=generator)
        host.save(name, directory / name)


def serve(args: argparse.Namespace, directory: Path, dtype: str, **settings: Any) -> Any:
    return LLM(
        str(directory / "base"),
        dtype=dtype,
        enable_lora=True,
        max_loras=6,
        max_model_len=128,
        enforce_eager=not args.compiled,
        tensor_parallel_size=args.devices,
        **settings,
    )


def ask(
    served: Any,
    prompts: list[list[int]],
    models: list[str | None],
    names: list[str],
    directory: Path,
    num_tokens: int,
    **settings: Any,
) -> list[list[int]]:
    """Ask everything at once; the tokens of each answer."""
    answers = served.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **settings),
        lora_request=[
            None
            if name is None
            else LoRARequest(name, 1 + names.index(name), str(directory / name))
            for name in models
        ],
        use_tqdm=False,
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
