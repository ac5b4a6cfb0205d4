"""What a first run on a card should show, as one page: correctness, then time and memory.

Results of every method are compared with the CPU's. Then steps and decoding are timed on a Llama
with random weights, as large as the card's memory allows, beside PEFT and, if it is installed,
vLLM. Each part runs in a process of its own: one that fails is reported, and others go on.

    python -m benchmarks.gpu_check                 # about ten minutes; writes gpu_check.md
    python -m benchmarks.gpu_check --device cpu    # in tiny sizes, to try the command
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import loraloom
from benchmarks.cases import fill_B
from loraloom.adapters import AdapterConfig, parse_adapter_config
from loraloom.base.loading import find_device
from loraloom.devices import (
    device_name,
    free_device_bytes,
    free_memory,
    has_separate_memory,
)
from loraloom.host.host import Host

# (hidden size, FFN size, layers, rows of a step, tokens of each, least GB of free memory)
SHAPES = {
    "7b": (4096, 11008, 32, 8, 512, 44),
    "3b": (3072, 8192, 28, 8, 512, 20),
    "1b": (2048, 8192, 16, 8, 256, 7),
    "tiny": (64, 128, 2, 8, 16, 0),
}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora", "rank": 8},
    "DoRA": {"method": "lora", "rank": 8, "weight_decomposition": True},
    "VeRA": {"method": "vera", "rank": 16},
    "MoSLoRA": {"method": "moslora", "rank": 8},
    "HydraLoRA": {"method": "hydralora", "rank": 4, "num_experts": 3},
    "MoLA": {"method": "mola", "rank": 4, "num_experts": 4},
    "LoRAMoE": {"method": "loramoe", "rank": 4, "num_experts": 4},
    "DynMoLE": {"method": "dynmole", "rank": 4, "num_experts": 4},
    "SMoRA": {"method": "smora", "rank": 8, "top_k": 2},
    "MixLoRA": {"method": "mixlora", "rank": 4, "num_experts": 4},
    "MixDoRA": {"method": "mixlora", "rank": 4, "num_experts": 4, "weight_decomposition": True},
}
ON_EXPERTS = ("LoRA", "DoRA", "MixLoRA", "MixDoRA")
_TOLERANCE = 1e-3
_PLAIN = {"method": "lora", "rank": 80, "alpha": 160}
_MIXTURE = {"method": "mixlora", "rank": 16, "alpha": 32, "num_experts": 8, "top_k": 2}
# What a step trains, with about as many weights each.
STEPS: dict[str, list[dict[str, Any]]] = {
    "LoRA": [_PLAIN],
    "DoRA": [_PLAIN | {"weight_decomposition": True}],
    "MixLoRA": [_MIXTURE],
    "MixDoRA": [_MIXTURE | {"weight_decomposition": True}],
    "8 LoRAs of rank 16": [{"method": "lora", "rank": 16, "alpha": 32}] * 8,
    "8 MixLoRAs of rank 2": [_MIXTURE | {"rank": 2}] * 8,
}
NUM_DECODED = 16
NUM_NEW_TOKENS = 64
_PROMPT_LENGTH = 32

Row = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, xpu, cpu")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.md"))
    parser.add_argument("--size", choices=SHAPES, help="by default what the memory holds")
    parser.add_argument("--steps", type=int, default=8, help="timed ones of each case")
    parser.add_argument("--part", choices=PARTS, help="run this part here and print JSON")
    options = parser.parse_args(arguments)
    if options.part:
        print(json.dumps(list(PARTS[options.part](options))))
        return
    write_page(options, in_process_of_its_own)


def write_page(
    options: argparse.Namespace, run: Callable[[str, argparse.Namespace], list[Row]]
) -> None:
    """Run all parts and write the page, which is whole after each of them."""
    device = find_device(options.device)
    options.device = str(device)
    options.size = options.size or fitting_size(device)
    page = _heading(device, options)
    for part in PARTS:
        print(f"{part} …", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            rows = run(part, options)
        except Exception as error:  # the page reports it
            rows = [{"failed": f"{type(error).__name__}: {error}".replace("\n", " ")}]
        page += f"\n## {part}\n\n{_table(rows)}\n{time.perf_counter() - start:.0f} s\n"
        options.output.write_text(page)
    print(f"wrote {options.output}; please send it to loraloom's issues", file=sys.stderr)


def in_process_of_its_own(part: str, options: argparse.Namespace) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", part]
    for name in ("device", "size", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"exit {done.returncode}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def fitting_size(device: torch.device) -> str:
    if not has_separate_memory(device):
        return "tiny"
    free = free_device_bytes(device) / 1e9
    return next(name for name, shape in SHAPES.items() if free >= shape[-1])


def _heading(device: torch.device, options: argparse.Namespace) -> str:
    names = ("loraloom", "torch", "transformers", "peft", "bitsandbytes", "vllm")
    versions = {name: _version(name) for name in names}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    hidden, ffn, layers, rows, length, _ = SHAPES[options.size]
    lines = [f"# loraloom on {device_name(device) or device.type}, {date.today()}", ""]
    if not has_separate_memory(device):
        lines += ["**A trial on the CPU: its times say nothing of a card.**", ""]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        lines.append(f"- CUDA {torch.version.cuda}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    lines.append(f"- {listed}")
    lines.append(
        f"- base model: Llama, hidden size {hidden}, FFN {ffn}, {layers} layers, random weights, "
        f"{_dtype(device)}; a step has {rows} rows of {length} tokens"
    )
    return "\n".join(lines) + "\n"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _table(rows: list[Row]) -> str:
    if not rows:
        return "nothing to report\n"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in rows:
        lines.append(" | ".join(_cell(row.get(name, "")) for name in columns))
    return "".join(f"| {line} |\n" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# Correctness


def correctness(options: argparse.Namespace) -> Iterator[Row]:
    """Compare losses, gradients and greedy tokens of every method with the CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    bases = {"Llama": (_tiny_llama(), METHODS)}
    on_experts = {
        name: METHODS[name] | {"target_modules": ["attention", "experts"]} for name in ON_EXPERTS
    }
    bases["Qwen3-MoE, experts"] = (_tiny_moe(), on_experts)
    for base, (config, methods) in bases.items():
        for name, settings in methods.items():
            results = [
                _small_round(config, settings, torch.device(place))
                for place in ("cpu", options.device)
            ]
            (loss, gradients, tokens), (our_loss, our_gradients, our_tokens) = results
            error = max(
                abs(our_loss - loss) / abs(loss),
                float((our_gradients - gradients).norm() / gradients.norm()),
            )
            same = int((tokens == our_tokens).all(1).sum())
            is_right = error < _TOLERANCE and same == len(tokens)
            yield {
                "base model": base,
                "method": name,
                "relative error": error,
                "greedy rows the same": f"{same} of {len(tokens)}",
                "result": "ok" if is_right else "**WRONG**",
            }


def _tiny_llama() -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return LlamaConfig(vocab_size=128, num_attention_heads=4, num_key_value_heads=2, **sizes)


def _tiny_moe() -> Qwen3MoeConfig:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return Qwen3MoeConfig(vocab_size=128, num_experts=8, num_experts_per_tok=2, **sizes, **heads)


def _small_round(
    config: Any, settings: Mapping[str, Any], device: torch.device
) -> tuple[float, Tensor, Tensor]:
    """Return a round's loss, all gradients, and greedy tokens of rows with and without it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.vocab_size, (4, 12), generator=generator)
    host = loraloom.attach(model.to(device))
    adapter = host.add("a", _config(settings), seed=0)
    for weight in adapter.parameters():
        noise = torch.randn(weight.shape, generator=generator) * 0.1
        weight.data += noise.to(device)
    names = ["a", None, "a", "a"]
    loss = _loss(host, ids.to(device), names, ["a"])
    loss.backward()
    gradients = [
        torch.zeros(weight.numel()) if weight.grad is None else weight.grad.flatten().cpu()
        for weight in adapter.parameters()
    ]
    tokens = host.generate(
        ids.to(device), attention_mask=torch.ones_like(ids).to(device), adapters=names,
        max_new_tokens=8, do_sample=False,
    )  # fmt: skip
    return float(loss.detach()), torch.cat(gradients), tokens.cpu()


def _config(settings: Mapping[str, Any]) -> AdapterConfig:
    return parse_adapter_config({"dropout": 0.0, **settings})


def _loss(host: Host, ids: Tensor, rows: list[str | None], names: list[str]) -> Tensor:
    out = host.hidden(ids, adapters=rows, training=True, sample_keys=list(range(len(ids))))
    states = out.last_hidden_state[:, :-1].flatten(0, 1)
    loss = host.token_losses(states, ids[:, 1:].flatten()).mean() * len(names)
    for name in names:
        added = host.adapters[name].config.auxiliary_loss(out.routing.get(name, []))
        loss = loss if added is None else loss + added
    return loss


# Time and memory


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if has_separate_memory(device) else torch.float32


def _load_base(options: argparse.Namespace) -> tuple[Any, Tensor]:
    """Make the base model and a step's tokens."""
    hidden, ffn, layers, rows, length, _ = SHAPES[options.size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128), vocab_size=32_000 if hidden > 64 else 128,
    )  # fmt: skip
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=_dtype(device)).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, config.vocab_size, (rows, length), generator=generator)
    return model, tokens.to(device)


def training(options: argparse.Namespace) -> Iterator[Row]:
    """Time optimizer steps of all rows, and note the peak of memory."""
    model, tokens = _load_base(options)
    baseline = None
    if find_spec("peft") is not None:
        baseline, peak = _measure(_peft_step(model, tokens), options)
        yield _step_row("PEFT, LoRA", baseline, peak, baseline)
        del model
        free_memory()
        model, tokens = _load_base(options)
    for name, configs in STEPS.items():
        host = loraloom.attach(model)
        seconds, peak = _measure(_host_step(host, tokens, configs), options)
        baseline = baseline or seconds
        yield _step_row(name, seconds, peak, baseline)
        if len(configs) > 1:
            each = [_host_step(host, tokens[:1], [config], start) for start, config in
                    enumerate(configs)]  # fmt: skip
            seconds, peak = _measure(lambda steps=each: [step() for step in steps], options)
            yield _step_row(f"{name}, one after another", seconds, peak, baseline)
        model = host.detach()
        free_memory()


def _step_row(name: str, seconds: float, peak: int | None, baseline: float) -> Row:
    row: dict[str, Any] = {"step": name, "s": seconds, "÷ first": seconds / baseline}
    if peak is not None:
        row["peak GB"] = peak / 1e9
    return row


def _measure(step: Callable[[], object], options: argparse.Namespace) -> tuple[float, int | None]:
    """Give the median of the step's seconds, and the peak of the device's memory in bytes."""
    device = torch.device(options.device)
    step()
    step()
    if has_separate_memory(device):
        torch.accelerator.reset_peak_memory_stats()
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    peak = torch.accelerator.max_memory_allocated() if has_separate_memory(device) else None
    return statistics.median(times), peak


def _synchronize(device: torch.device) -> None:
    if has_separate_memory(device):
        torch.get_device_module(device).synchronize(device)


def _peft_step(model: Any, tokens: Tensor) -> Callable[[], None]:
    import peft

    config = peft.LoraConfig(
        r=80, lora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped: Any = peft.get_peft_model(model, config).train()
    fill_B(wrapped)
    trained = [weight for weight in wrapped.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _host_step(
    host: Host, tokens: Tensor, configs: list[dict[str, Any]], first: int = 0
) -> Callable[[], None]:
    names = []
    for number, settings in enumerate(configs, start=first):
        name = f"{len(configs)}-{number}"
        fill_B(host.add(name, _config(settings), seed=number))
        names.append(name)
    rows: list[str | None] = [name for name in names for _ in range(len(tokens) // len(names))]
    weights = [weight for name in names for weight in host.adapters[name].parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def step() -> None:
        _loss(host, tokens, rows, names).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(options: argparse.Namespace) -> Iterator[Row]:
    """Time greedy decoding of rows that have an adapter each."""
    model, _ = _load_base(options)
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_DECODED, _PROMPT_LENGTH)
    prompts = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    prompts = prompts.to(options.device)
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompts),
        "min_new_tokens": NUM_NEW_TOKENS,
        "max_new_tokens": NUM_NEW_TOKENS,
        "do_sample": False,
    }
    baseline, _ = _measure(lambda: model.generate(prompts, **settings), options)
    yield _decoding_row("transformers, no adapter", baseline, baseline)
    host = loraloom.attach(model)
    seconds, _ = _measure(lambda: host.generate(prompts, **settings), options)
    yield _decoding_row("loraloom, no adapter", seconds, baseline)
    for title, config in (("LoRAs", {"method": "lora", "rank": 16}), ("MixLoRAs", _MIXTURE)):
        names = [f"{title}-{number}" for number in range(NUM_DECODED)]
        for seed, name in enumerate(names):
            fill_B(host.add(name, _config(config), seed))
        for number in (1, NUM_DECODED):
            rows = [names[row % number] for row in range(NUM_DECODED)]
            seconds, _ = _measure(
                lambda rows=rows: host.generate(prompts, adapters=rows, **settings), options
            )
            yield _decoding_row(
                f"loraloom, {number} {title if number > 1 else title[:-1]}", seconds, baseline
            )
        for name in names:
            host.remove(name)


def _decoding_row(name: str, seconds: float, baseline: float) -> Row:
    tokens = NUM_DECODED * NUM_NEW_TOKENS
    return {"rows of": name, "tokens/s": tokens / seconds, "÷ first": baseline / seconds}


def vllm(options: argparse.Namespace) -> Iterator[Row]:
    """Time the same LoRAs in vLLM, where it is installed."""
    if find_spec("vllm") is None:
        yield {"vLLM": "not installed"}
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with TemporaryDirectory() as directory:
        model, _ = _load_base(options)
        model.save_pretrained(f"{directory}/base")
        host = loraloom.attach(model)
        requests = []
        for number in range(NUM_DECODED):
            name = f"lora-{number}"
            settings = {"method": "lora", "rank": 16, "target_modules": "all-linear"}
            fill_B(host.add(name, _config(settings), number))
            host.save(name, f"{directory}/{name}")
            requests.append(LoRARequest(name, number + 1, f"{directory}/{name}"))
        vocabulary = model.config.vocab_size
        del host, model
        free_memory()
        engine = LLM(
            f"{directory}/base", skip_tokenizer_init=True, enable_lora=True, max_lora_rank=16,
            max_loras=NUM_DECODED, max_model_len=256, gpu_memory_utilization=0.8,
        )  # fmt: skip
        sampling = SamplingParams(
            max_tokens=NUM_NEW_TOKENS, min_tokens=NUM_NEW_TOKENS, temperature=0, detokenize=False
        )
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_DECODED, _PROMPT_LENGTH)
        ids = torch.randint(3, vocabulary, shape, generator=generator)
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        cases = {"vLLM, no adapter": None, "vLLM, 16 LoRAs": requests}
        for name, loras in cases.items():
            seconds, _ = _measure(
                lambda loras=loras: engine.generate(
                    prompts, sampling, lora_request=loras, use_tqdm=False
                ),
                options,
            )
            yield _decoding_row(name, seconds, seconds)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "correctness": correctness,
    "training": training,
    "decoding": decoding,
    "vllm": vllm,
}


if __name__ == "__main__":
    main()
