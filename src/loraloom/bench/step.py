"""A training step: forward, loss on all tokens, backward, AdamW.

Cases: `peft-lora` is PEFT's LoRA on the same base model, trained as its documentation does; the
others are loraloom's. Dropout 0, no gradient checkpointing, all linear layers adapted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.config.adapter import LoraConfig, MixLoraConfig
from loraloom.models.host import Host
from loraloom.models.loading import load_base_model
from loraloom.routing.losses import router_loss

Step = Callable[[], object]


@dataclass(frozen=True)
class StepSetting:
    """What a step is made of.

    Args:
        base_model: As `load_base_model` takes it.
        dtype: Of the base model.
        rows: Sequences in the batch.
        length: Tokens of each.
        rank: Of LoRA and of each expert.
        num_experts: Of a mixture.
        top_k: Of a mixture.
    """

    base_model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    rows: int = 4
    length: int = 256
    rank: int = 8
    num_experts: int = 8
    top_k: int = 2


def make_step(case: str, setting: StepSetting) -> Step:
    """Load a base model and return a function that runs one step of a case.

    Args:
        case: `peft-lora`, `lora`, `dora`, `mixlora` or `mixdora`.
        setting: Model and sizes.
    """
    model, _ = load_base_model(setting.base_model, dtype=setting.dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (setting.rows, setting.length)
    tokens = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    if case == "peft-lora":
        return _peft_step(model, tokens, setting)
    host = Host(model).train()
    host.add(case, adapter_config(case, setting))
    return _host_step(host, case, tokens)


def adapter_config(case: str, setting: StepSetting) -> LoraConfig:
    """Return the adapter of a case."""
    shared = {"rank": setting.rank, "alpha": 2.0 * setting.rank, "dropout": 0.0}
    decomposed = case in ("dora", "mixdora")
    if case in ("lora", "dora"):
        return LoraConfig(**shared, weight_decomposition=decomposed)
    return MixLoraConfig(
        **shared,
        num_experts=setting.num_experts,
        top_k=setting.top_k,
        weight_decomposition=decomposed,
    )


def fill_B(module: torch.nn.Module) -> None:
    """Give every lora_B values: at zero a mixture's experts would be alike."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def _host_step(host: Host, name: str, tokens: Tensor) -> Step:
    adapter = host.adapters[name]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)
    names = [name] * len(tokens)

    def step() -> None:
        out = host.hidden(tokens, adapters=names)
        states = out.last_hidden_state[:, :-1].flatten(0, 1)
        loss = host.token_losses(states, tokens[:, 1:].flatten()).mean()
        if isinstance(adapter.config, MixLoraConfig):
            loss = loss + router_loss(out.routing[name], adapter.config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peft_step(model: torch.nn.Module, tokens: Tensor, setting: StepSetting) -> Step:
    import peft

    config = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config).train()  # pyright: ignore[reportArgumentType]
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
