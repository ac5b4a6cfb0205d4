"""Decoding: new tokens a second for rows that share one adapter, or have different ones.

Cases: `base` is transformers' own generate on a model that nothing is attached to; an adapter's
name gives every row the same one; `mixed` deals four mixtures and the base out by turns; `sums`
gives every row another weighted sum of four LoRAs.

    python -m benchmarks.decode --rows 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from benchmarks.cases import (
    ADAPTERS,
    MIXTURE,
    StepSetting,
    adapter_config,
    add_cases,
    add_options,
    alternate,
    chosen_setting,
    fill_B,
    load_setting,
    print_figures,
)
from loraloom.host.host import Host

_PROMPT_LENGTH = 32
_SUMMED = ("lora-0", "lora-1", "lora-2", "lora-3")
_MIXED = ("mixture-0", "mixture-1", "mixture-2", "mixture-3", None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    fields = ("base_model", "dtype", "quantization", "rows", "rank", "num_experts", "top_k")
    add_options(parser, StepSetting(rows=16), *fields)
    parser.add_argument("--new-tokens", type=int, default=32, help="of each row")
    add_cases(parser, ("base", *ADAPTERS, "mixed", "sums"), rounds=5)
    options = parser.parse_args(arguments)
    setting = chosen_setting(options)
    runs = {case: make_decode(case, setting, options.new_tokens) for case in options.cases}
    times = alternate(runs, options.rounds, warmup=1)
    tokens = setting.rows * options.new_tokens
    print_figures({name: {"tokens/s": tokens / time} for name, time in times.items()})


def make_decode(case: str, setting: StepSetting, new_tokens: int) -> Callable[[], object]:
    """Load a base model and return a function that decodes once."""
    model = load_setting(setting)
    generator = torch.Generator().manual_seed(0)
    shape = (setting.rows, _PROMPT_LENGTH)
    prompts = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    options = {
        "attention_mask": torch.ones_like(prompts),
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "do_sample": False,
    }
    if case == "base":
        return lambda: model.generate(prompts, **options)
    host = Host(model)
    names = {"mixed": _MIXED, "sums": _SUMMED}.get(case, (case,))
    of_case = {"mixed": MIXTURE, "sums": "lora"}.get(case, case)
    for seed, name in enumerate(filter(None, names)):
        fill_B(host.add(name, adapter_config(of_case, setting), seed))
    rows = [names[row % len(names)] for row in range(setting.rows)]
    if case == "sums":
        rows = ["+".join(f"{one}:{(row + 1) / 16}" for one in _SUMMED) for row in range(len(rows))]
    return lambda: host.generate(prompts, adapters=rows, **options)


if __name__ == "__main__":
    main()
