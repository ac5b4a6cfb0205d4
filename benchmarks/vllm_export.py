"""A mixture as an MoE checkpoint, served by vLLM, against loraloom; run by a Python that has both.

    python benchmarks/vllm_export.py [--bases llama smollm2-135m ...] [--tokens 64]

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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from vllm import LLM, SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

from loraloom import MixLoraConfig, attach, export, load_base_model

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "olmo2", "ernie4_5")
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
    model = tiny_model(base, tokenizer) if is_tiny else load_base_model(base, "float32")[0]
    host = attach(model)
    fill_B(host.add("mix", MIXTURE), std=1.0 if is_tiny else 0.02)
    prompts = [
        tokenizer(text)["input_ids"]
        for text in ("The capital of France is", "Bread is made of", "Once upon a time, the moon")
    ]
    ours = [decode(host, prompt, "mix", num_tokens) for prompt in prompts]
    bare = [decode(host, prompt, None, num_tokens) for prompt in prompts]
    done = export(host, tokenizer, "mix", path)
    theirs = serve(path, prompts, num_tokens)
    same = [one == other for one, other in zip(theirs, ours, strict=True)]
    changed = [one != other for one, other in zip(ours, bare, strict=True)]
    return {
        "architecture": done.architecture,
        "logit_error": done.logit_error,
        "texts": len(prompts),
        "equal": sum(same),
        "unlike_the_base": sum(changed),
    }


def tiny_model(family: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A model whose weights are random, so that no two tokens are nearly as likely."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **TINY, **special)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model.float().eval()


def fill_B(adapter: torch.nn.Module, std: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)


def decode(host: Any, prompt: list[int], name: str | None, num_tokens: int) -> list[int]:
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
    ids = torch.tensor([prompt])
    answer = host.generate(ids, torch.ones_like(ids), [name], eos_token_id=None, **options)
    return answer[0, len(prompt) :].tolist()


def serve(path: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    served = LLM(str(path), dtype="float32", max_model_len=128, enforce_eager=True)
    answers = served.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    served.llm_engine.engine_core.shutdown()
    return [list(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":
    main()
