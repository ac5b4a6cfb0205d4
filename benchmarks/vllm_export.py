"""A mixture as an MoE checkpoint, served by vLLM, against loraloom; run by a Python that has both.

    python -m benchmarks.vllm_export [--bases llama smollm2-135m ...] [--tokens 64]

A mixture with random weights on a tiny random model of each family, or on a base model by its name,
is exported in float32. vLLM serves what was written, and its greedy tokens are compared with those
that loraloom decodes: it fails where a token is not the same. On a CPU, set
VLLM_CPU_KVCACHE_SPACE=1 and VLLM_CPU_OMP_THREADS_BIND to the cores to use. Results are one line of
JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loraloom import MixLoraConfig, attach, export, load_base_model

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
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "ernie4_5")
MIXTURE = MixLoraConfig(rank=4, alpha=8, num_experts=4, top_k=2)
SMOLLM2 = "smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bases", nargs="+", default=["llama", SMOLLM2])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    args = parser.parse_args()
    results = {}
    for base in args.bases:
        with tempfile.TemporaryDirectory() as directory:
            results[base] = check(base, args.tokens, Path(directory, "moe"))
        print(f"{base}: {results[base]}", file=sys.stderr, flush=True)
    print(json.dumps(results))
    sys.exit(0 if all(one["equal"] == one["texts"] for one in results.values()) else 1)


def check(base: str, num_tokens: int, path: Path) -> dict[str, Any]:
    """Count the texts of vLLM that are loraloom's."""
    tokenizer = load_base_model(SMOLLM2, "float32")[1]
    is_tiny = base in FAMILIES
    model = tiny_model(base, len(tokenizer)) if is_tiny else load_base_model(base, "float32")[0]
    host = attach(model)
    fill(host.add("mix", MIXTURE), std=1.0 if is_tiny else 0.02)
    prompts = [
        tokenizer(text)["input_ids"]
        for text in ("The capital of France is", "Bread is made of", "Once upon a time, the moon")
    ]
    ours = [decode(host, prompt, "mix", num_tokens) for prompt in prompts]
    bare = [decode(host, prompt, None, num_tokens) for prompt in prompts]
    done = export(host, tokenizer, "mix", path)
    served = start(path)
    theirs = ask(served, prompts, num_tokens, detokenize=False)
    served.llm_engine.engine_core.shutdown()
    same = [one == other for one, other in zip(theirs, ours, strict=True)]
    changed = [one != other for one, other in zip(ours, bare, strict=True)]
    return {
        "architecture": done.architecture,
        "logit_error": done.logit_error,
        "texts": len(prompts),
        "equal": sum(same),
        "unlike_the_base": sum(changed),
    }


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
    from vllm import LLM  # pyright: ignore[reportMissingImports]

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
    from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

    answers = served.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **settings),
        lora_request=lora_request,
        use_tqdm=False,
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":
    main()
