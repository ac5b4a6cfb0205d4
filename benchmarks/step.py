"""A training step, forward, loss on all tokens, backward, AdamW: time and peak memory (Linux).

Cases: `peft-lora` is PEFT's LoRA on the same base model, trained as its documentation does;
`peft-lora-tuned` is the same in autocast and with our loss, which needs no logits of the whole
batch; the others are loraloom's. Dropout 0, no gradient checkpointing, all linear layers adapted.

    python -m benchmarks.step --memory
    python -m benchmarks.step --num-jobs 8 --rows 1 --length 128   # fused, and one after another
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from benchmarks.cases import (
    ADAPTERS,
    MIXTURE,
    PEFT_CASES,
    StepSetting,
    adapter_config,
    add_cases,
    add_options,
    alternate,
    chosen_setting,
    describe_machine,
    load_setting,
    peak_rss_bytes,
    print_figures,
    reset_peak_rss,
)
from loraloom.adapters.contract import Adapter
from loraloom.base.structure import read_structure
from loraloom.host.host import Host
from loraloom.ops.token_loss import token_losses

Step = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, StepSetting(), *StepSetting.__dataclass_fields__)
    add_cases(parser, (*PEFT_CASES, *ADAPTERS), rounds=7)
    parser.add_argument("--case", choices=ADAPTERS, default=MIXTURE, help="of --num-jobs")
    parser.add_argument(
        "--memory", action="store_true", help="peaks too, in processes of their own"
    )
    parser.add_argument("--peak-of", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    setting = chosen_setting(options)
    if options.peak_of:
        print(measure_peak(options.peak_of, setting))
    elif setting.num_jobs > 1:
        compare_jobs(options.case, setting, options.rounds, memory=options.memory)
    else:
        steps = {name: make_step(name, setting) for name in options.cases}
        times = alternate(steps, options.rounds)
        figures = {name: {"s": time} for name, time in times.items()}
        if options.memory:
            figures = {
                name: {**values, "peak GB": peak_bytes(name, setting) / 1e9}
                for name, values in figures.items()
            }
        print(describe_machine(setting.dtype))
        print_figures(figures)


def compare_jobs(case: str, setting: StepSetting, rounds: int, *, memory: bool) -> None:
    """Print fused steps of many jobs against the same jobs one after another."""
    steps = JobSteps(case, setting)
    times = alternate({"by turns": steps.by_turns, "fused": steps.fused}, rounds, warmup=1)
    tokens = setting.num_jobs * setting.rows * setting.length
    print_figures({way: {"tokens/s": tokens / time, "s": time} for way, time in times.items()})
    if memory:
        weights = sum(p.numel() * p.element_size() for p in steps.adapters[0].parameters())
        one, every = (
            peak_bytes(case, replace(setting, num_jobs=jobs)) for jobs in (1, setting.num_jobs)
        )
        print(describe_peaks(setting.num_jobs, one, every, state_bytes=4 * weights))


def describe_peaks(num_jobs: int, one_bytes: int, all_bytes: int, state_bytes: int) -> str:
    """Set all jobs' peak against one job's, and what each adds against its AdamW training state."""
    share = all_bytes / (num_jobs * one_bytes)
    added = (all_bytes - one_bytes) / (num_jobs - 1) / state_bytes
    return (
        f"peak memory: 1 job {one_bytes / 1e9:.2f} GB, {num_jobs} jobs {all_bytes / 1e9:.2f} GB, "
        f"{share:.2f} of {num_jobs} times one; each further job adds {added:.2f} times its "
        f"weights, gradients and AdamW state ({state_bytes / 1e9:.3f} GB)"
    )


def peak_bytes(case: str, setting: StepSetting) -> int:
    """Measure a case's steps in a process of its own."""
    words = [
        word
        for name, value in asdict(setting).items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-m", "benchmarks.step", "--peak-of", case, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def measure_peak(case: str, setting: StepSetting, num_steps: int = 3) -> int:
    """Run some steps; return the high-water mark, reset after loading."""
    step = make_step(case, setting)
    reset_peak_rss()
    for _ in range(num_steps):
        step()
    return peak_rss_bytes()


def make_step(case: str, setting: StepSetting) -> Step:
    """Load a base model and return a function that runs one step of a case."""
    if case.startswith("peft-lora"):
        return _peft_step(setting, tuned=case.endswith("tuned"))
    return JobSteps(case, setting).fused


class JobSteps:
    """Adapters of a case on one host, each with an AdamW and with rows of its own."""

    def __init__(self, case: str, setting: StepSetting):
        model = load_setting(setting)
        self._host = Host(model)
        self._tokens = _random_tokens(model, setting).chunk(setting.num_jobs)
        for job in range(setting.num_jobs):
            self._host.add(f"{case}-{job}", adapter_config(case, setting), seed=job)
        self._optimizers = {
            name: torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)
            for name, adapter in self._host.adapters.items()
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
            added = self._host.adapters[name].config.auxiliary_loss(out.routing.get(name, []))
            loss = loss if added is None else loss + added
        loss.backward()
        for name in names:
            self._optimizers[name].step()
            self._optimizers[name].zero_grad()


def _random_tokens(model: torch.nn.Module, setting: StepSetting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.num_jobs * setting.rows, setting.length)
    vocab_size: int = model.config.vocab_size
    return torch.randint(3, vocab_size, shape, generator=generator)


def _peft_step(setting: StepSetting, *, tuned: bool) -> Step:
    import peft

    model = load_setting(setting)
    tokens = _random_tokens(model, setting)
    head = read_structure(model).head
    config = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config).train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def loss() -> Tensor:
        if not tuned:
            return wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bfloat16"):
            out = model.base_model(input_ids=tokens, use_cache=False)  # with PEFT's layers in it
        states = out.last_hidden_state[:, :-1].flatten(0, 1)
        vocab_size: int = model.config.vocab_size
        return token_losses(states, tokens[:, 1:].flatten(), head, vocab_size).mean()

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
