"""Tiny jobs on a tiny model: data that can be learnt, and engines that are set up in one call."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import loraloom
from loraloom.adapters import AdapterConfig, LoraConfig, MixLoraConfig
from loraloom.config.text import read_json
from loraloom.data.tokens import NO_LOSS, Example, PreferencePair
from loraloom.data.training_set import Portion, TrainingSet
from loraloom.host.host import Host
from loraloom.training.builder import JobBuilder
from loraloom.training.engine import Engine
from loraloom.training.job import Job, JobResult
from loraloom.training.learner import Learner
from loraloom.training.reporting import Progress
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import JobConfig, RunConfig
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss
from loraloom.training.step.fused import add_gradients, read_losses
from loraloom.training.step.objectives import load_reference
from tests.tiny import VOCAB_SIZE, randomise, tiny_model

PAD_ID = 0

_MIXED = {"alpha": 4, "dropout": 0.1, "top_k": 2, "router_init_std": 1.0}
ADAPTERS: dict[str, LoraConfig] = {
    "lora": LoraConfig(rank=3, alpha=6, dropout=0.1),
    "dora": LoraConfig(rank=2, alpha=6, dropout=0.2, weight_decomposition=True),
    "mixlora": MixLoraConfig(rank=2, num_experts=4, router_jitter=0.05, **_MIXED),
    "mixdora": MixLoraConfig(
        rank=4, num_experts=3, router_jitter=0.02, weight_decomposition=True, **_MIXED
    ),
}
"""Methods of different ranks, dropout and jitter on; routers that are far from ties."""


def toy_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer of bytes in the tiny model's vocabulary: space to DEL without a few."""
    special = {"<pad>": PAD_ID, "<s>": 1, "</s>": 2, "<unk>": 3}
    letters = {chr(32 + index): 4 + index for index in range(VOCAB_SIZE - 4)}
    tokenizer = Tokenizer(WordLevel(special | letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def toy_examples(count: int, seed: int = 0, longest: int = 9, first_id: int = 0) -> list[Example]:
    """Count up from a random token; the first two tokens have no loss, lengths differ."""
    generator = random.Random(seed)
    examples = []
    for sample_id in range(first_id, first_id + count):
        start, length = generator.randrange(3, 40), generator.randrange(4, longest + 1)
        ids = tuple(range(start, start + length))
        examples.append(Example(ids, (NO_LOSS, NO_LOSS, *ids[2:]), sample_id))
    return examples


def padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels of examples, padded on the right."""
    length = max(len(example.input_ids) for example in examples)

    def column(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])

    return (
        column([example.input_ids for example in examples], PAD_ID),
        column([[1] * len(example.input_ids) for example in examples], 0),
        column([example.labels for example in examples], NO_LOSS),
    )


def forward_backward(
    host: Host, micro_batches: Sequence[MicroBatch], pad_id: int = PAD_ID
) -> list[MicroBatchLoss]:
    """Add gradients, and read the losses."""
    unread = add_gradients(host, micro_batches, pad_id)
    return read_losses(host.ranks, list(enumerate(unread)), len(unread))


def accept(job: Job, loss: MicroBatchLoss) -> dict[str, Any] | None:
    """Let a job take its next micro-batch's loss and the gradients that are there."""
    micro_batch = job.micro_batch()
    if micro_batch.clip_gradient is not None:
        loss = replace(loss, grad_norm=float(micro_batch.clip_gradient()))
    return job.accept(micro_batch, loss)


def read_result(directory: Path) -> JobResult:
    """Read a job's result.json."""
    return TypeAdapter(JobResult).validate_python(read_json(directory / "result.json"))


def toy_pairs(
    count: int, seed: int = 0, longest: int = 9, first_id: int = 0
) -> list[PreferencePair]:
    """Prefer counting up to counting down from the same two tokens; lengths differ."""
    generator = random.Random(seed)
    pairs = []
    for place in range(count):
        start, first_sample = generator.randrange(20, 40), first_id + 2 * place
        answers = []
        for direction in (1, -1):
            length = generator.randrange(2, longest)
            ids = (start, start, *range(start + direction, start + direction * length, direction))
            answers.append((ids, (NO_LOSS, NO_LOSS, *ids[2:])))
        chosen, rejected = (
            Example(ids, labels, first_sample + place)
            for place, (ids, labels) in enumerate(answers)
        )
        pairs.append(PreferencePair(chosen, rejected))
    return pairs


def toy_set(
    count: int = 16, seed: int = 0, num_validation: int = 0, make: Any = toy_examples, **kinds: Any
) -> TrainingSet:
    """Make a training set of toy examples, or of toy pairs."""
    examples = make(count, seed, **kinds)
    first_id = sum(len(example.rows) for example in examples)
    return TrainingSet(
        examples=examples,
        validation=make(num_validation, seed + 1000, first_id=first_id),
        portions=(Portion(0, count, 1.0),),
        report=(f"toy: {count} rows",),
        seed=seed,
    )


def toy_config(
    name: str, adapter: AdapterConfig | None = None, seed: int = 0, **settings: Any
) -> JobConfig:
    """Make a job's configuration: `eval`, `data`, `priority` and settings of `train`."""
    sections = {key: settings.pop(key) for key in ("eval", "data", "priority") if key in settings}
    train = {"batch_size": 4, "max_steps": 4, "lr_scheduler": "constant", "learning_rate": 1e-2}
    return JobConfig.model_validate(
        {
            "name": name,
            "seed": seed,
            "adapter": (adapter or ADAPTERS["lora"]).model_dump(),
            "data": {"task": "skills"},
            "train": train | settings,
            **sections,
        }
    )


def toy_host(dtype: torch.dtype = torch.float64, family: str = "llama") -> Host:
    """Attach to a tiny model."""
    return loraloom.attach(tiny_model(family, dtype))


def add_job(
    host: Host, config: JobConfig, training_set: TrainingSet | None = None, *, random: bool = False
) -> Job:
    """Put a job's adapter on a host."""
    adapter = host.add(config.name, config.adapter, config.seed)
    if random:
        randomise(adapter, config.seed)
    make = toy_pairs if config.train.objective.learns_from_pairs else toy_examples
    reference = load_reference(host, config.train.objective)
    training_set = training_set or toy_set(seed=config.seed, make=make)
    learner = Learner(adapter, config.train, host.dtype)
    return Job(config, learner, training_set, reference)


def toy_engine(
    directory: Path,
    configs: Sequence[JobConfig],
    sets: Mapping[str, TrainingSet] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    family: str = "llama",
    progress: Progress | None = None,
    **options: Any,
) -> Engine:
    """Set up jobs on a new tiny model."""
    host = toy_host(dtype, family)
    jobs = [add_job(host, config, (sets or {}).get(config.name)) for config in configs]
    builder = JobBuilder(host, toy_tokenizer())
    run = RunConfig(base_model="tiny", output_dir=directory, **options)
    return Engine(host, jobs, builder, RunDirectory(directory), progress or Progress(), run)


def weights_of(job: Job) -> dict[str, Tensor]:
    """Copy an adapter's weights."""
    return {name: parameter.detach().clone() for name, parameter in job.learner.parameters.items()}


def gradients_of(job: Job) -> dict[str, Tensor]:
    """Copy an adapter's gradients, zero where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in job.learner.parameters.items()
    }
