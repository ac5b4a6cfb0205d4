"""Run files and job files that are broken in every way, up to where a model would be loaded."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.training.settings import (
    LrScheduler,
    OptimizerConfig,
    OptimizerName,
    TrainConfig,
    load_job_config,
    load_run_config,
)
from loraloom.training.step.optimizers import rehearse
from loraloom.training.store import RunDirectory
from loraloom.training.tracking import check_trackers
from tests.fuzz.harness import EXTREMES, broken_bytes, fuzz, mutated, survives

ADAPTERS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 4, "alpha": 8, "weight_decomposition": True, "init": "gaussian"},
    {"method": "mixlora", "rank": 4, "num_experts": 4, "top_k": 2, "experts": {"rank": 2}},
    {"method": "vera", "rank": 8, "d_initial": 0.1},
    {"method": "hydralora", "rank": 4, "num_experts": 3},
    {"method": "mola", "rank": 4, "num_experts": [2, 4], "top_k": 2},
    {"method": "moslora", "rank": 4, "target_modules": ["q_proj"]},
]
SOURCES: list[dict[str, Any]] = [
    {"task": "arc_easy", "path": "data", "scoring": "text", "split": "train"},
    {"dataset": "rows.jsonl", "format": "instruction", "template": "{{ instruction }} [/INST]"},
    {"dataset": "rows.csv", "format": "text", "fields": {"text": "body"}},
    {"mix": [{"task": "skills", "weight": 2}, {"dataset": "b.jsonl", "format": "chat"}]},
]
TRAINS: list[dict[str, Any]] = [
    {"learning_rate": 1e-3, "max_steps": 10, "optimizer_args": {"betas": [0.9, 0.95], "eps": 1e-8}},
    {"num_epochs": 2, "lr_scheduler": "inverse_sqrt", "lr_scheduler_args": {"timescale": 100}},
    {"num_epochs": 1, "optimizer": "sgd", "optimizer_args": {"momentum": 0.9, "foreach": True}},
    {
        "max_steps": 5,
        "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_args": {"num_cycles": 2},
        "warmup_ratio": 0.1,
        "eval_steps": 2,
        "early_stopping": {"metric": "eval/loss", "patience": 2},
    },
]
SWEEPS: list[dict[str, Any] | None] = [
    None,
    {"parameters": {"train.learning_rate": [1e-3, 1e-4], "adapter.rank": [2, 4]}},
    {
        "parameters": {"train.learning_rate": {"log_uniform": [1e-5, 1e-2]}},
        "search": {"random": 3, "seed": 1},
        "early_stopping": {"asha": {"min_steps": 2}},
    },
    {
        "parameters": {"seed": {"int_uniform": [0, 99]}, "adapter.dropout": {"uniform": [0, 0.2]}},
        "search": {"tpe": 4},
        "max_concurrent": 2,
        "early_stopping": {"hyperband": {"min_steps": 1}},
    },
]


@st.composite
def jobs(draw: st.DrawFn, name: str = "a") -> dict[str, Any]:
    """A job that can be read."""
    data = draw(st.sampled_from(SOURCES)) | {"validation_fraction": 0.1}
    train, adapter = draw(st.sampled_from(TRAINS)), draw(st.sampled_from(ADAPTERS))
    task = [{"task": "boolq", "path": "data", "limit": 5}]
    return {"name": name, "adapter": adapter, "data": data, "train": train, "eval": task}


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """A run that can be read."""
    sweep = draw(st.sampled_from(SWEEPS))
    return {
        "base_model": "smollm2-135m",
        "dtype": "bfloat16",
        "output_dir": "runs/none",
        "memory_limit": "20GB",
        "trackers": ["jsonl"],
        "jobs": [draw(jobs("a")), draw(jobs("b"))],
        "sweep": sweep and {"job": draw(jobs("tried")), **sweep},
    }


def read(path: Path, *overrides: str) -> None:
    """Do what training does before it loads a model."""
    run = load_run_config(path, overrides)
    RunDirectory(run.output_dir).check(resume=False, overwrite=False)
    check_trackers(run.trackers)
    for job in run.all_jobs:
        rehearse(job.train, job.name)


def with_file(content: bytes, action: Any) -> None:
    """Hand content to what reads files."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "run.yaml")
        path.write_bytes(content)
        survives(lambda: action(path), Path(directory))


def as_yaml(settings: Any) -> bytes:
    """Write settings as JSON, which is YAML and can be nested more deeply than PyYAML writes."""
    return json.dumps(settings, ensure_ascii=False).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("kind", ["run", "job"])
@given(data=st.data())
@fuzz
def test_settings_with_other_values(kind: str, data: st.DataObject) -> None:
    if kind == "run":
        with_file(as_yaml(data.draw(mutated(data.draw(runs())))), read)
    else:
        with_file(as_yaml(data.draw(mutated(data.draw(jobs())))), load_job_config)


@given(data=st.data())
@fuzz
def test_files_with_other_bytes(data: st.DataObject) -> None:
    with_file(data.draw(broken_bytes(as_yaml(data.draw(runs())))), read)


@given(run=runs(), path=st.text(max_size=30), value=EXTREMES)
@fuzz
def test_changes_from_the_command_line(run: dict[str, Any], path: str, value: Any) -> None:
    content = as_yaml(run)
    with_file(content, lambda file: read(file, f"{path}={value}", f"jobs.0.train.{path}={value}"))
    with_file(content, lambda file: read(file, f"jobs.1.train.optimizer_args={{{path}: {value}}}"))


@given(
    optimizer=st.sampled_from(OptimizerName.__args__),
    scheduler=st.sampled_from(LrScheduler.__args__),
    arguments=st.dictionaries(
        st.sampled_from(
            "betas eps foreach fused capturable differentiable maximize momentum nesterov amsgrad "
            "alpha lambd t0 rho lr_decay etas step_sizes centered decoupled_weight_decay".split()
        ),
        EXTREMES | st.tuples(st.floats(), st.floats()),
        max_size=3,
    ),
    schedule=st.dictionaries(
        st.sampled_from(
            "num_cycles timescale power lr_end min_lr min_lr_rate num_decay_steps num_stable_steps "
            "warmup_type decay_type factor patience threshold cooldown smooth window".split()
        ),
        EXTREMES,
        max_size=3,
    ),
    max_steps=st.integers(1, 2**40),
)
@fuzz
def test_arguments_of_optimizers_and_schedules(
    optimizer: Any, scheduler: Any, arguments: Any, schedule: Any, max_steps: int
) -> None:
    def build() -> None:
        settings = {"optimizer": optimizer, "optimizer_args": arguments, "max_steps": max_steps}
        schedules = {"lr_scheduler": scheduler, "lr_scheduler_args": schedule}
        try:
            config = TrainConfig.model_validate(settings | schedules)
            OptimizerConfig.model_validate({"optimizer": optimizer, "optimizer_args": arguments})
        except ValueError:
            return
        rehearse(config, "a")

    survives(build)
