from __future__ import annotations

import shlex
from unittest.mock import Mock

import pytest

from loraloom.cli.train import evaluation_command, generation_command
from loraloom.errors import LoraloomError
from loraloom.training.results import JobResult
from loraloom.training.settings import RunConfig

TRAIN = {"max_steps": 4}
LORA = {"method": "lora", "rank": 2}
ROWS = {"dataset": "rows.jsonl", "format": "chat"}


def run_of(data, **settings):
    job = {"name": "a", "adapter": LORA, "data": data, "train": TRAIN, **settings}
    return RunConfig.model_validate({"base_model": "m", "output_dir": "out", "jobs": [job]})


def result(name="a", error=None, status="finished", **metrics):
    given = {"job": name, "error": error, "status": status, "metrics": metrics}
    return Mock(spec=JobResult, directory=f"out/{name}", **given)


def words(run, *results):
    command = evaluation_command(run, results)
    assert command is not None
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.parametrize(
    ("data", "settings", "asked"),
    [
        (
            {"task": "arc_easy", "path": "data", "scoring": "text"},
            {},
            "--task arc_easy --scoring text --data data",
        ),
        ({"task": "tasks/quiz.yaml"}, {}, "--task tasks/quiz.yaml"),
        (
            ROWS,
            {"eval": [{"task": "tasks/quiz.yaml", "scoring": "text"}]},
            "--task tasks/quiz.yaml --scoring text",
        ),
        (ROWS, {"eval": [{"task": "skills"}]}, "--task skills --scoring label"),
        (ROWS, {}, "--dataset HELD_OUT.jsonl --format chat --max-length 512"),
        (
            {**ROWS, "validation": {**ROWS, "dataset": "a b.jsonl"}},
            {},
            "--dataset 'a b.jsonl' --format chat --max-length 512",
        ),
        (
            {**ROWS, "validation": {**ROWS, "dataset": "owner/chats", "split": "held_out"}},
            {"train": {**TRAIN, "max_length": 1024}},
            "--dataset owner/chats --split held_out --format chat --max-length 1024",
        ),
        (
            {**ROWS, "chat_template": "{{ messages }}"},
            {},
            "--dataset HELD_OUT.jsonl --format chat --chat-template '{{ messages }}' "
            "--max-length 512",
        ),
        (
            {**ROWS, "format": "instruction", "template": "plain", "fields": {"output": "reply"}},
            {},
            "--dataset HELD_OUT.jsonl --format instruction --template plain --max-length 512 "
            "--field output=reply",
        ),
    ],
)
def test_the_command_asks_what_the_job_was_measured_on(data, settings, asked):
    start, *_ = "loraloom eval --base-model m --adapter a=out/a".split(), None
    expected = [*start, *shlex.split(asked), "--output", "out/eval.json"]
    assert words(run_of(data, **settings), result()) == expected


def test_of_a_sweep_the_best_come_first_and_the_stopped_are_left_out():
    job = {"adapter": LORA, "data": {**ROWS, "validation_fraction": 0.1}, "train": TRAIN}
    sweep = {"job": job, "parameters": {"train.learning_rate": [1e-4, 1e-3, 1e-2]}}
    run = RunConfig.model_validate({"base_model": "m", "output_dir": "out", "sweep": sweep})
    names = [trial.name for trial in run.trials]
    losses = {"eval/loss": 3.0}, {"eval/loss": 1.0}, {"eval/loss": 2.0}
    results = [result(name, **loss) for name, loss in zip(names, losses, strict=True)]
    results[2].status = "stopped"
    found = [word for word in words(run, *results) if "=out/" in word]
    assert found == [f"{name}=out/{name}" for name in (names[1], names[0])]


def test_there_is_no_command_where_there_is_nothing_to_evaluate():
    assert evaluation_command(run_of(ROWS), [result(error=str(LoraloomError("x")))]) is None
    of_config = {"dataset": "owner/chats", "config": "main", "format": "chat"}
    assert evaluation_command(run_of({**ROWS, "validation": of_config}), [result()]) is None


@pytest.mark.parametrize(("objective", "more"), [({}, "--beta 0.1"), ({"beta": 0.3}, "--beta 0.3")])
def test_pairs_are_asked_as_pairs(objective, more):
    pairs = {"dataset": "pairs.jsonl", "format": "preference"}
    run = run_of(pairs, train={**TRAIN, "objective": {"name": "dpo", **objective}})
    asked = shlex.join(words(run, result()))
    assert (
        f"--dataset HELD_OUT.jsonl --format preference --max-length 512 {more}".rstrip()
        + " --output"
        in asked
    )


def test_what_was_trained_can_be_asked():
    command = generation_command(run_of(ROWS), [result("b c")])
    assert command is not None
    assert shlex.split(command.replace("\\\n", " ")) == shlex.split(
        "loraloom generate --base-model m --adapter 'b c=out/b c' --prompt 'Hello!'"
    )
    assert generation_command(run_of(ROWS), [result(error="x")]) is None
