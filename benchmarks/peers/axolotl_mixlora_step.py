"""A training step of axolotl 0.21.0's MixLoRA plug-in: median seconds.

The setting of `benchmarks/step.py`: SmolLM2-135M, 4 x 256 tokens, rank 8, 8 experts, top-2, LoRA
on attention by PEFT, loss on all tokens, AdamW, bfloat16 base, float32 adapters, dropout 0. It
runs in loraloom's environment, with the plug-in's own files alone (model.py, patching.py, loss.py):

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheel axolotl==0.21.0
    python -m zipfile -e wheel/axolotl-0.21.0-py3-none-any.whl axolotl_wheel
    python -m benchmarks.peers.axolotl_mixlora_step axolotl_wheel [--autocast] [--turns 6]
    python -m benchmarks.peers.axolotl_mixlora_step axolotl_wheel --count

With --count a step's operations and bytes at Llama 2 7B's sizes, as `benchmarks/count.py` has them
(8 x 512 tokens, experts of rank 16, attention of rank 80), if each expert gets as many tokens as
the others. The plug-in reads the device to know how many: 16 times a layer, which is not counted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from torch import Tensor

import loraloom
from benchmarks.count import SHAPES, count_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
AUX_LOSS_COEF = 0.01
NUM_EXPERTS, TOP_K = 8, 2


class Settings(dict):
    """Stands for axolotl's settings: what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="where axolotl's wheel is unpacked")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--count", action="store_true", help="count a step in place of timing it")
    parser.add_argument("--turns", type=int, default=6, help="steps; the first is not counted")
    options = parser.parse_args()
    patch_model, aux_loss = import_plugin(options.wheel)
    if options.count:
        return print_count(patch_model, aux_loss)
    model = build_model(patch_model)
    step = make_step(model, aux_loss, autocast=options.autocast)
    seconds = [timed(step) for _ in range(options.turns)]
    print(f"axolotl MixLoRA step: median {statistics.median(seconds[1:]):.3f} s")


def import_plugin(wheel: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Import the plug-in without the rest of axolotl, whose packages are left empty."""
    packages = ("", ".utils", ".utils.logging", ".utils.dict", ".integrations")
    for name in (f"axolotl{package}" for package in (*packages, ".integrations.mixlora")):
        module = types.ModuleType(name)
        module.__path__ = [str(wheel / name.replace(".", "/"))]
        sys.modules[name] = module
    vars(sys.modules["axolotl.utils.logging"])["get_logger"] = logging.getLogger
    vars(sys.modules["axolotl.utils.dict"])["DictDefault"] = Settings
    patching = importlib.import_module("axolotl.integrations.mixlora.patching")
    loss = importlib.import_module("axolotl.integrations.mixlora.loss")
    return patching.patch_model_with_mixlora, loss.collect_mixlora_aux_loss


def build_model(patch_model: Callable[..., Any]) -> Any:
    base, _ = loraloom.load_base_model("smollm2-135m", dtype="bfloat16")
    return add_mixture(base, patch_model, rank=8, attention_rank=8)


def add_mixture(base: Any, patch_model: Callable[..., Any], rank: int, attention_rank: int) -> Any:
    config = peft.LoraConfig(
        r=attention_rank, lora_alpha=2 * attention_rank, target_modules=ATTENTION
    )
    model = peft.get_peft_model(base, config)
    sizes = {"mixlora_num_experts": NUM_EXPERTS, "mixlora_top_k": TOP_K}
    patch_model(model, Settings(lora_r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **sizes))
    return model.train()


def make_step(model: Any, aux_loss: Callable[..., Any], *, autocast: bool) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    ids = torch.randint(3, 40000, (4, 256), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        (loss + aux_loss(model, AUX_LOSS_COEF)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def print_count(patch_model: Callable[..., Any], aux_loss: Callable[..., Any]) -> None:
    def make_step(base: Any) -> Callable[[], None]:
        model = add_mixture(base, patch_model, rank=16, attention_rank=80)
        decoder = model.base_model.model.model
        tokens = torch.zeros(8, 512, dtype=torch.long, device="meta")

        def step() -> None:
            states = decoder(input_ids=tokens, use_cache=False).last_hidden_state
            (states.sum() + aux_loss(model, AUX_LOSS_COEF)).backward()

        return step

    with patch.multiple(Tensor, __bool__=lambda tensor: True, nonzero=even_share):
        counted = count_model(make_step, SHAPES["7b"])
    print(
        f"axolotl MixLoRA: {counted.operations:.0f} operations, "
        f"{counted.bytes / 1e9:.0f} GB moved, peak "
        f"{counted.peak_bytes / 1e9:.1f} GB, H100 {counted.time_on('H100'):.3f} s"
    )


def even_share(mask: Tensor, *, as_tuple: bool) -> tuple[Tensor]:
    """Stand for the places of an expert's tokens, which the meta device can't tell."""
    return (torch.zeros(len(mask) * TOP_K // NUM_EXPERTS, dtype=torch.long, device="meta"),)


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
