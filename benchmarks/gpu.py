"""Training steps on a GPU: seconds and peak memory at Llama-2-7B's shape, random weights, bfloat16.

Rank 16, 8 experts, top-2, all linears; plain LoRA has rank 80. Each case runs in a process of its
own.

    python -m benchmarks.gpu [--rows 16] [--length 512] [--layers 32] [--cases lora,mixlora]

Written without a GPU at hand: no number of it has been published yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.cases import fill_B
from loraloom import Host, LoraConfig, MixLoraConfig

CASES = ("peft-lora", "peft-lora autocast", "lora", "mixlora", "mixdora", "two mixlora")
SHARED = {"alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="sequences in a step, of all adapters")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--ffn-size", type=int, default=11008)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after three others")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--device", default="cuda", help="cpu for a try at small sizes")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--one", metavar="CASE", help="run this case here and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    if options.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    print(f"{'case':18} {'s':>8} {'peak GB':>8}", flush=True)
    for case in options.cases.split(","):
        print(f"{case:18} {in_own_process(case)}", flush=True)


def in_own_process(case: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--one", case]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().rpartition("\n")[2]
    result = json.loads(done.stdout.strip().rpartition("\n")[2])
    return f"{result['seconds']:8.3f} {result['peak_bytes'] / 1e9:8.2f}"


def measure(case: str, options: argparse.Namespace) -> dict[str, float]:
    step = make_step(case, options)
    on_gpu = options.device == "cuda"
    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else float("nan")
    return {"seconds": statistics.median(seconds), "peak_bytes": peak}


def make_step(case: str, options: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.ffn_size,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden_size // 128),
    )
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokens = torch.randint(3, config.vocab_size, (options.rows, options.length))
    step = peft_step if case.startswith("peft-lora") else host_step
    return step(model, case, tokens, options.checkpointing)


def peft_step(
    model: torch.nn.Module, case: str, tokens: torch.Tensor, checkpointing: bool
) -> Callable[[], None]:
    import peft

    config = peft.LoraConfig(r=80, lora_alpha=160, target_modules="all-linear",
                             task_type="CAUSAL_LM")  # fmt: skip
    wrapped = peft.get_peft_model(model, config).train()
    if checkpointing:
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped.enable_input_require_grads()
    fill_B(wrapped)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=case.endswith("autocast")):
            loss = wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adapter_configs(case: str) -> dict[str, LoraConfig]:
    if case == "lora":
        return {"lora": LoraConfig(rank=80, **SHARED | {"alpha": 160.0})}
    if case not in ("mixlora", "mixdora", "two mixlora"):
        raise SystemExit(f"a case must be one of {', '.join(CASES)}, got {case!r}")
    mixture = MixLoraConfig(
        rank=16, num_experts=8, top_k=2, weight_decomposition=case == "mixdora", **SHARED
    )
    return {f"mixture-{index}": mixture for index in range(2 if case.startswith("two") else 1)}


def host_step(
    model: torch.nn.Module, case: str, tokens: torch.Tensor, checkpointing: bool
) -> Callable[[], None]:
    host = Host(model).train()
    host.enable_gradient_checkpointing(checkpointing)
    configs = adapter_configs(case)
    for name, config in configs.items():
        host.add(name, config)
        fill_B(host.adapters[name])
    names = [name for name in configs for _ in range(len(tokens) // len(configs))]
    optimizers = [
        torch.optim.AdamW(host.adapters[name].parameters(), lr=1e-4, fused=True) for name in configs
    ]

    def step() -> None:
        out = host.hidden(tokens, adapters=names, training=True)
        states = out.last_hidden_state[:, :-1].flatten(0, 1)
        loss = host.token_losses(states, tokens[:, 1:].flatten()).mean() * len(configs)
        for name in configs:
            added = host.adapters[name].config.auxiliary_loss(out.routing.get(name, []))
            loss = loss if added is None else loss + added
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
