"""What benchmarks compare: adapters of one size, timed by turns, as ratios to the first case."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from loraloom.adapters import AdapterConfig, parse_adapter_config
from loraloom.base.loading import load_base_model

PEFT_CASES = ("peft-lora", "peft-lora-tuned")
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "dora": {"method": "lora", "weight_decomposition": True},
    "mixlora": {"method": "mixlora"},
    "mixdora": {"method": "mixlora", "weight_decomposition": True},
}
MIXTURE = "mixlora"
"""What is measured where one adapter has to be chosen."""

Figures = Mapping[str, Mapping[str, float]]
"""By case, column to value, with units in the columns' names."""


@dataclass(frozen=True)
class StepSetting:
    """A step's base model, its rows for each of `num_jobs` adapters, and the adapters' sizes."""

    base_model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    rows: int = 4
    length: int = 256
    rank: int = 8
    num_experts: int = 8
    top_k: int = 2
    num_jobs: int = 1
    quantization: str | None = None


def adapter_config(case: str, setting: StepSetting, **settings: Any) -> AdapterConfig:
    """Return the adapter of a case, with the setting's sizes where its method has such."""
    sizes = {
        "rank": setting.rank,
        "alpha": 2.0 * setting.rank,
        "num_experts": setting.num_experts,
        "top_k": setting.top_k,
    }
    chosen = ADAPTERS[case] | settings
    fields = type(parse_adapter_config(chosen)).model_fields
    return parse_adapter_config(chosen | {n: size for n, size in sizes.items() if n in fields})


_weights: dict[StepSetting, dict[str, torch.nn.Parameter]] = {}


def load_setting(setting: StepSetting) -> Any:
    """Load a base model; those of all cases share their weights."""
    # Where weights lie in memory moves a step by some percent, another way in each process.
    model, _ = load_base_model(setting.base_model, setting.dtype, quantization=setting.quantization)
    parameters = dict(model.named_parameters())
    shared = _weights.setdefault(setting, parameters) if setting.quantization is None else {}
    for name, weight in shared.items():
        parameters[name].data = weight.data
    return model


def fill_B(module: torch.nn.Module) -> None:
    """Give every lora_B values: at zero a mixture's experts would be alike."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def add_options(parser: argparse.ArgumentParser, defaults: StepSetting, *fields: str) -> None:
    """Add `--rank 8` and so on, options of the fields of StepSetting that a benchmark varies."""
    for field in fields:
        default = getattr(defaults, field)
        kind = str if default is None else type(default)
        parser.add_argument(f"--{field.replace('_', '-')}", type=kind, default=default)


def chosen_setting(options: argparse.Namespace) -> StepSetting:
    fields = StepSetting.__dataclass_fields__
    return StepSetting(**{name: value for name, value in vars(options).items() if name in fields})


def add_cases(parser: argparse.ArgumentParser, known: Sequence[str], rounds: int) -> None:
    """Add `--cases a,b`, by default all, but PEFT's only where it is installed."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(
                f"got {unknown[0]}, must be some of {', '.join(known)}"
            )
        return text.split(",")

    has_peft = find_spec("peft") is not None
    installed = [name for name in known if has_peft or not name.startswith("peft-")]
    parser.add_argument("--cases", type=names, default=installed, help=f"some of {','.join(known)}")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed turns of every case")


def alternate(
    cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, float]:
    """Run every case in turn, `rounds` times over, and give each one's median in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, run in cases.items():
            elapsed = _timed(run)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_machine(dtype: str) -> str:
    """Name what figures depend on: number format, processor, its instructions and threads."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(named, platform.processor() or platform.machine())
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{dtype}, {processor} ({instructions}), {torch.get_num_threads()} threads"


def reset_peak_rss() -> None:
    """Set this process's high-water mark of resident memory back to what it uses now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Return the high-water mark of resident memory since the last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def print_figures(figures: Figures) -> None:
    """Print each figure with its ratio to the first case's."""
    baseline = next(iter(figures.values()))
    print(f"{'case':18}", *(f"{column:>12}  ratio" for column in baseline))
    for case, values in figures.items():
        cells = (
            f"{f'{value:.3f}' if value < 100 else f'{value:.0f}':>12} {value / baseline[name]:6.2f}"
            for name, value in values.items()
        )
        print(f"{case:18}", *cells, flush=True)
