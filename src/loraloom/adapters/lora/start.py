"""Initial weights of a LoRA that PEFT computes, from the base's weights or at random.

Axes: I in_features, O out_features, R rank.

Source: Meng et al. 2024, PiSSA, arXiv:2404.02948; Buyukakyuz 2024, OLoRA, arXiv:2406.01775; peft
0.21.2, `peft/tuners/lora/layer.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.base import BaseProjection
from loraloom.adapters.lora.config import LoraConfig
from loraloom.adapters.low_rank import generator_for, seeded
from loraloom.errors import AdapterError, ConfigError


def start_of(base: BaseProjection, config: LoraConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Let PEFT initialise A, [R, I], and B, [O, R], on a copy of a projection."""
    import_peft(config.init)
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora import Linear

    settings: Any = {"use_rslora": config.rank_stabilized, "init_lora_weights": config.init}
    sizes: Any = {"r": config.rank, "lora_alpha": config.alpha}
    with seeded(base.device, generator_for(seed, base.key).initial_seed()):
        layer = Linear(_copy(base), "start", config=PeftConfig(**settings), **sizes)
    lora_A, lora_B = (layer.get_parameter(f"{part}.start.weight") for part in ("lora_A", "lora_B"))
    if len(lora_A) < config.rank:
        raise AdapterError(
            f"init: {config.init} has {len(lora_A)} directions on {base.key}, got rank "
            f"{config.rank}; lower rank, or give that projection less by rank_pattern"
        )
    return lora_A.detach(), lora_B.detach()


def import_peft(init: str) -> None:
    """Raise a ConfigError if PEFT, which computes an initialisation, is not installed."""
    try:
        import peft as peft
    except ImportError as error:
        raise ConfigError(
            f"init: {init} is computed by PEFT, which is not installed; "
            "run: pip install 'loraloom[peft]'"
        ) from error


def _copy(base: BaseProjection) -> nn.Linear:
    """Copy a projection's weights, which PEFT changes, in float32."""
    linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    weight = base.weight.detach().to(torch.float32, copy=True)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
