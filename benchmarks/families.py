"""Which of transformers' causal LMs does `attach` take? A tiny random model of each type is tried.

    python benchmarks/families.py [--types persimmon falcon ...]

A line for each type: in the table, taken by its structure (and which of its projections), or
refused with the reason. Types whose configuration can't be made small are left out.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from loraloom import ModelError, attach
from loraloom.base.families import FAMILIES

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {
    "head_dim": 8,
    "sliding_window": 4,
    "rotary_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
"""Fields that not every configuration takes."""
MAX_PARAMETERS = 30_000_000
MAX_SECONDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="+", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    counts: Counter[str] = Counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for model_type in parser.parse_args().types:
        verdict, detail = tell(model_type)
        counts[verdict] += 1
        print(f"{model_type}: {verdict}{detail and f', {detail}'}", flush=True)
    print(dict(counts), file=sys.stderr)


def tell(model_type: str) -> tuple[str, str]:
    """Try a type, and say what came of it, and how."""
    if model_type in FAMILIES:
        return "in the table", ""
    try:
        with in_time():
            model = tiny_model(model_type)
    except Exception as error:
        return "not made", str(error).partition("\n")[0][:100]
    try:
        with in_time():
            base = attach(model).base
    except ModelError as error:
        reason = str(error).rpartition("; its linear modules")[0].rpartition("): ")[2]
        return "refused", reason or str(error)
    except TimeoutError:
        return "refused", f"not done after {MAX_SECONDS} s"
    return "taken", " ".join(dict.fromkeys(name for b in base.blocks for name in b.shapes))


@contextmanager
def in_time() -> Iterator[None]:
    """Raise a TimeoutError after some seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {MAX_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def tiny_model(model_type: str) -> Any:
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.float().eval()


def tiny_config(model_type: str) -> Any:
    """Make a configuration with as many small sizes as it takes."""
    try:
        return AutoConfig.for_model(model_type, **SMALL, **MORE)
    except Exception:
        return AutoConfig.for_model(model_type, **SMALL)


if __name__ == "__main__":
    main()
