"""Adapters on the experts of a MoE base beside PEFT's `target_parameters`: steps, memory, decoding.

A step is a forward and a backward pass of 8 rows of 64 tokens. Figures are the process' own CPU
time, cases take turns. Use one thread: OMP_NUM_THREADS=1. `30b` is counted on the meta device as
`benchmarks.count` does, at the sizes of Qwen3-30B-A3B and 8 rows of 512 tokens.

    python -m benchmarks.experts medium
    python -m benchmarks.experts fine --dtype bfloat16
    python -m benchmarks.experts 30b
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import peft
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import loraloom
from benchmarks.cases import describe_machine, print_figures
from benchmarks.count import count_layers
from loraloom.host.host import Host

RANK = 8
# (decoder layers, hidden size, experts, their hidden size, experts of a token)
SHAPES = {"medium": (8, 512, 16, 256, 2), "fine": (4, 512, 64, 128, 8)}
COUNTED: dict[str, loraloom.AdapterConfig | None] = {
    "PEFT": None,
    "LoRA": loraloom.LoraConfig(rank=RANK, expert_rank=RANK, target_modules="experts"),
    "DoRA": loraloom.LoraConfig(
        rank=RANK, expert_rank=RANK, weight_decomposition=True, target_modules="experts"
    ),
    "LoRA, shared outer": loraloom.LoraConfig(
        rank=RANK, expert_rank=RANK, shared_outer=True, target_modules="experts"
    ),
    "MixLoRA": loraloom.MixLoraConfig(rank=RANK, num_experts=4, target_modules="experts"),
    "LoRA, beside": loraloom.LoraConfig(rank=RANK, target_modules="moe"),
}
_ROWS, _LENGTH = 8, 64
_DECODED_ROWS, _PROMPT_LENGTH, _NEW_TOKENS = 16, 16, 12


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=(*SHAPES, "30b"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.shape == "30b":
        count_large()
        return
    print(describe_machine(options.dtype))
    torch.manual_seed(0)
    model = make_model(options.shape).to(getattr(torch, options.dtype))
    theirs = peft_model(copy.deepcopy(model))
    host = host_of(model)
    ids = torch.randint(0, model.config.vocab_size, (_ROWS, _LENGTH))
    steps = {
        "base, forward": lambda: _forward(model, ids),
        "base, both": lambda: _base_step(theirs, ids),
        "PEFT": lambda: _their_step(theirs, ids),
        "PEFT, 8 steps": lambda: [_their_step(theirs, row) for row in ids.split(1)],
        "one": lambda: _our_step(host, ids, ["a0"] * _ROWS),
        "eight": lambda: _our_step(host, ids, [f"a{row}" for row in range(_ROWS)]),
    }
    times = alternate(steps, options.rounds)
    for case, seconds in times.items():
        print(f"{case:15} {seconds * 1e3:8.0f} ms")
    ratios = {
        "one / PEFT": times["one"] / times["PEFT"],
        "eight / one": times["eight"] / times["one"],
        "eight / PEFT, 8 steps": times["eight"] / times["PEFT, 8 steps"],
        "one / base, both": times["one"] / times["base, both"],
        "kept memory, one / PEFT": kept_bytes(steps["one"]) / kept_bytes(steps["PEFT"]),
        "decoding, 16 adapters / base": decoding_ratio(host, options.rounds),
    }
    for name, ratio in ratios.items():
        print(f"{name:30} {ratio:.2f}")


def make_model(shape: str) -> Any:
    num_layers, hidden_size, num_experts, expert_size, top_k = SHAPES[shape]
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=expert_size,
        moe_intermediate_size=expert_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden_size // 8,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    return Qwen3MoeForCausalLM(config).eval()


def count_large() -> None:
    """Print what steps of Qwen3-30B-A3B's sizes launch, move and hold, in bfloat16."""
    figures = {}
    for case, config in COUNTED.items():
        counted = count_layers(partial(_counted_step, config), 48)
        figures[case] = {
            "operations": counted.operations,
            "GB moved": counted.bytes / 1e9,
            "peak GB": counted.peak_bytes / 1e9,
            "H100 s": counted.time_on("H100"),
        }
    print_figures(figures)


def _counted_step(config: loraloom.AdapterConfig | None, num_layers: int) -> Callable[[], object]:
    settings = Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        model: Any = Qwen3MoeForCausalLM(settings).to(torch.bfloat16)
    ids = torch.zeros(8, 512, dtype=torch.long, device="meta")
    if config is None:
        theirs = peft_model(model, autocast_adapter_dtype=False)
        # which torch has not for the meta device
        return patch("torch.autocast", lambda **_: nullcontext())(partial(_their_step, theirs, ids))
    host = loraloom.attach(model)
    host.add("counted", config)
    return partial(_our_step, host, ids, ["counted"] * len(ids))


def peft_model(model: Any, **options: bool) -> Any:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=parameters)
    return peft.get_peft_model(model, config, **options)


def host_of(model: Any) -> Host:
    host = loraloom.attach(model)
    config = loraloom.LoraConfig(rank=RANK, expert_rank=RANK, target_modules="experts")
    for number in range(_DECODED_ROWS):
        adapter = host.add(f"a{number}", config)
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return host


@torch.no_grad()
def _forward(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, logits_to_keep=1)


def _base_step(theirs: Any, ids: torch.Tensor) -> None:
    """Run the frozen base alone, with a gradient for the embeddings of its input."""
    with theirs.disable_adapter():
        embeddings = theirs.get_input_embeddings()(ids).detach().requires_grad_()
        states = theirs.model.model(inputs_embeds=embeddings).last_hidden_state
        states.float().square().mean().backward()


def _their_step(theirs: Any, ids: torch.Tensor) -> None:
    states = theirs.model.model(input_ids=ids).last_hidden_state
    states.float().square().mean().backward()
    theirs.zero_grad(set_to_none=True)


def _our_step(host: Host, ids: torch.Tensor, adapters: Sequence[str]) -> None:
    states = host.hidden(ids, adapters=adapters, training=True).last_hidden_state
    states.float().square().mean().backward()
    for adapter in host.adapters.values():
        adapter.zero_grad(set_to_none=True)


def alternate(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run every case in turn, and give each one's median CPU time in seconds."""
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(1 + rounds):
        for case, run in cases.items():
            start = time.process_time()
            run()
            if turn:
                seconds[case].append(time.process_time() - start)
    return {case: statistics.median(values) for case, values in seconds.items()}


def kept_bytes(step: Callable[[], object]) -> int:
    """Count what a step keeps for its backward pass, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


@torch.no_grad()
def decoding_ratio(host: Host, rounds: int) -> float:
    """Tokens a second of rows with an adapter each, in terms of the base model's."""
    ids = torch.randint(0, host.config.vocab_size, (_DECODED_ROWS, _PROMPT_LENGTH))
    tokens = torch.zeros(_DECODED_ROWS, dtype=torch.long)
    seconds: dict[str, list[float]] = {"base": [], "adapters": []}
    rows = {"base": [None] * _DECODED_ROWS, "adapters": [f"a{n}" for n in range(_DECODED_ROWS)]}
    for _ in range(rounds):
        for case, adapters in rows.items():
            session = host.prefill(ids, adapters=adapters)
            for step in range(_NEW_TOKENS):
                start = time.process_time()
                host.decode(session, tokens)
                if step >= _NEW_TOKENS // 4:
                    seconds[case].append(time.process_time() - start)
    return statistics.median(seconds["base"]) / statistics.median(seconds["adapters"])


if __name__ == "__main__":
    main()
