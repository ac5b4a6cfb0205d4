"""Decoding: new tokens a second for rows that share one adapter, or have different ones.

Cases: `base` is transformers' own generate on a model that nothing is attached to; an adapter's
name gives every row the same one; `mixed` deals four mixtures and the base out by turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraloom.bench.cases import StepSetting, adapter_config, mixture_case
from loraloom.bench.step import fill_B, load_setting
from loraloom.models.host import Host

_PROMPT_LENGTH = 32
_MIXED = ("mixture-0", "mixture-1", "mixture-2", "mixture-3", None)


@dataclass(frozen=True)
class DecodeSetting:
    """What is decoded.

    Args:
        adapter: Base model, rank and mixture.
        rows: Sequences at once.
        new_tokens: Tokens to make.
    """

    adapter: StepSetting
    rows: int = 16
    new_tokens: int = 32


def make_decode(case: str, setting: DecodeSetting) -> Callable[[], object]:
    """Load a base model and return a function that decodes once."""
    model = load_setting(setting.adapter)
    generator = torch.Generator().manual_seed(0)
    shape = (setting.rows, _PROMPT_LENGTH)
    prompts = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    options = {
        "attention_mask": torch.ones_like(prompts),
        "min_new_tokens": setting.new_tokens,
        "max_new_tokens": setting.new_tokens,
        "do_sample": False,
    }
    if case == "base":
        return lambda: model.generate(prompts, **options)
    host = Host(model)
    names = _MIXED if case == "mixed" else (case,)
    for seed, name in enumerate(filter(None, names)):
        config = adapter_config(mixture_case() if case == "mixed" else case, setting.adapter)
        fill_B(host.add(name, config, seed))
    rows = [names[row % len(names)] for row in range(setting.rows)]
    return lambda: host.generate(prompts, adapters=rows, **options)
