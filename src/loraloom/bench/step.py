"""A training step: forward, loss on all tokens, backward, AdamW.

Cases: `peft-lora` is PEFT's LoRA on the same base model, trained as its documentation does;
`peft-lora-tuned` is the same in autocast and with our loss, which needs no logits of the whole
batch; the others are loraloom's. Dropout 0, no gradient checkpointing, all linear layers adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.adapter import Adapter
from loraloom.config.adapter import LoraConfig, MixLoraConfig
from loraloom.models.families import family_of, head_of
from loraloom.models.host import Host
from loraloom.models.loading import load_base_model
from loraloom.ops.token_loss import token_losses
from loraloom.routing.losses import router_loss

Step = Callable[[], object]

STEP_CASES = ("peft-lora", "peft-lora-tuned", "lora", "dora", "mixlora", "mixdora")


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
        num_jobs: Adapters, each with rows of its own in the batch.
    """

    base_model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    rows: int = 4
    length: int = 256
    rank: int = 8
    num_experts: int = 8
    top_k: int = 2
    num_jobs: int = 1


def make_step(case: str, setting: StepSetting) -> Step:
    """Load a base model and return a function that runs one step of a case.

    Args:
        case: One of `STEP_CASES`.
        setting: Model and sizes.
    """
    if case.startswith("peft-lora"):
        return _peft_step(setting, tuned=case.endswith("tuned"))
    return make_job_steps(case, setting).fused


class JobSteps:
    """Adapters on one host, each with an AdamW and with rows of its own.

    Args:
        host: In training mode, with the adapters.
        tokens: (rows of all adapters, length), by adapter.
    """

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
        out = self._host.hidden(rows, adapters=[n for n in names for _ in tokens[0]])
        states = out.last_hidden_state[:, :-1].flatten(0, 1)
        losses = self._host.token_losses(states, rows[:, 1:].flatten())
        loss = losses.view(len(names), -1).mean(dim=1).sum()
        for name in names:
            config = self._host.adapters[name].config
            if isinstance(config, MixLoraConfig):
                loss = loss + router_loss(out.routing[name], config)
        loss.backward()
        for name in names:
            self._optimizers[name].step()
            self._optimizers[name].zero_grad()


def make_job_steps(case: str, setting: StepSetting) -> JobSteps:
    """Load a base model and put `num_jobs` adapters of a case on it."""
    model, _ = load_base_model(setting.base_model, dtype=setting.dtype)
    host = Host(model).train()
    for job in range(setting.num_jobs):
        host.add(f"{case}-{job}", adapter_config(case, setting), seed=job)
    return JobSteps(host, _random_tokens(model, setting))


def _random_tokens(model: torch.nn.Module, setting: StepSetting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.num_jobs * setting.rows, setting.length)
    vocab_size: int = model.config.vocab_size  # pyright: ignore
    return torch.randint(3, vocab_size, shape, generator=generator)


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


def _peft_step(setting: StepSetting, *, tuned: bool) -> Step:
    import peft

    model, _ = load_base_model(setting.base_model, dtype=setting.dtype)
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
