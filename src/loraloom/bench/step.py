"""A training step: forward, loss on all tokens, backward, AdamW.

Cases: `peft-lora` is PEFT's LoRA on the same base model, trained as its documentation does;
`peft-lora-tuned` is the same in autocast and with our loss, which needs no logits of the whole
batch; the others are loraloom's. Dropout 0, no gradient checkpointing, all linear layers adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.adapter import Adapter
from loraloom.bench.cases import StepSetting, adapter_config
from loraloom.models.families import head_of
from loraloom.models.host import Host
from loraloom.models.loading import load_base_model
from loraloom.models.structure import family_of
from loraloom.ops.token_loss import token_losses

Step = Callable[[], object]


def make_step(case: str, setting: StepSetting) -> Step:
    """Load a base model and return a function that runs one step of a case."""
    if case.startswith("peft-lora"):
        return _peft_step(setting, tuned=case.endswith("tuned"))
    return make_job_steps(case, setting).fused


class JobSteps:
    """Adapters on one host, each with an AdamW and with rows of its own."""

    def __init__(self, host: Host, tokens: Tensor):
        self._host = host
        self._tokens = tokens.chunk(len(host.adapters))
        self._optimizers = {
            name: torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)
            for name, adapter in host.adapters.items()
        }

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters."""
        return list(self._host.adapters.values())

    def fused(self) -> None:
        """One step of all adapters, in one forward and one backward."""
        self._step(list(self._host.adapters), self._tokens)

    def by_turns(self) -> None:
        """One step of each adapter, one after another."""
        for name, tokens in zip(self._host.adapters, self._tokens, strict=True):
            self._step([name], [tokens])

    def _step(self, names: Sequence[str], tokens: Sequence[Tensor]) -> None:
        rows = torch.cat(list(tokens))
        adapters = [name for name in names for _ in tokens[0]]
        out = self._host.hidden(rows, adapters=adapters, training=True)
        states = out.last_hidden_state[:, :-1].flatten(0, 1)
        losses = self._host.token_losses(states, rows[:, 1:].flatten())
        loss = losses.view(len(names), -1).mean(dim=1).sum()
        for name in names:
            added = self._host.adapters[name].auxiliary_loss(out.routing.get(name, []))
            loss = loss if added is None else loss + added
        loss.backward()
        for name in names:
            self._optimizers[name].step()
            self._optimizers[name].zero_grad()


def make_job_steps(case: str, setting: StepSetting) -> JobSteps:
    """Load a base model and put `num_jobs` adapters of a case on it."""
    model = load_setting(setting)
    host = Host(model)
    for job in range(setting.num_jobs):
        host.add(f"{case}-{job}", adapter_config(case, setting), seed=job)
    return JobSteps(host, _random_tokens(model, setting))


def load_setting(setting: StepSetting) -> Any:
    """Load the base model of a setting."""
    model, _ = load_base_model(setting.base_model, setting.dtype, quantization=setting.quantization)
    return model


def _random_tokens(model: torch.nn.Module, setting: StepSetting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.num_jobs * setting.rows, setting.length)
    vocab_size: int = model.config.vocab_size  # pyright: ignore
    return torch.randint(3, vocab_size, shape, generator=generator)


def fill_B(module: torch.nn.Module) -> None:
    """Give every lora_B values: at zero a mixture's experts would be alike."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def _peft_step(setting: StepSetting, *, tuned: bool) -> Step:
    import peft

    model = load_setting(setting)
    tokens = _random_tokens(model, setting)
    head = head_of(model, family_of(model))
    config = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config).train()  # pyright: ignore[reportArgumentType]
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def loss() -> Tensor:
        if not tuned:
            return wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bfloat16"):
            out = model.base_model(input_ids=tokens, use_cache=False)  # with PEFT's layers in it
        states = out.last_hidden_state[:, :-1].flatten(0, 1)
        vocab_size: int = model.config.vocab_size  # pyright: ignore
        return token_losses(states, tokens[:, 1:].flatten(), head, vocab_size).mean()

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
