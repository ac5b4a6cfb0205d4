"""Jobs that learn from streams: they go on where they were, and refuse other data."""

from pathlib import Path

import pytest

import loraloom
from tests.training.running import assert_same_files, pressing
from tests.training.saved import run_settings


def settings(inputs: Path, output_dir: Path) -> dict:
    """A LoRA that accumulates, with rows that end amid a block, and a mixture on pairs."""
    run = run_settings(inputs, output_dir)
    plain, pairs = run["jobs"]
    stream = {"streaming": True, "shuffle_buffer": 5}
    rows = {"dataset": str(inputs / "rows.jsonl"), "format": "instruction"}
    plain["data"] = {**rows, **stream, "validation": rows}
    plain["train"] |= {"micro_batch_size": 2, "save_steps": 1, "max_steps": 6, "eval_steps": 3}
    pairs |= {"name": "pairs", "eval": []}
    pairs["data"] = {"dataset": str(inputs / "pairs.jsonl"), "format": "preference", **stream}
    pairs["train"] |= {"objective": {"name": "dpo"}, "packing": True, "warmup_ratio": 0.5}
    return run


def interrupt(run: dict, rounds: int, **options) -> None:
    with pytest.raises(KeyboardInterrupt):
        loraloom.train(run, between_steps=pressing(rounds), **options)


def test_a_run_goes_on_in_its_streams_as_if_unbroken(inputs, tmp_path):
    loraloom.train(settings(inputs, tmp_path / "unbroken"))
    run = settings(inputs, tmp_path / "broken")
    interrupt(run, 3)  # amid a step, and amid a block
    interrupt(run, 7, resume=True)
    loraloom.train(run, resume=True)
    assert_same_files(tmp_path / "broken", tmp_path / "unbroken", ["plain", "pairs"])


def test_rows_that_changed_where_the_stream_stands_are_refused(inputs, tmp_path):
    file = tmp_path / "rows.jsonl"
    text = (inputs / "rows.jsonl").read_text()
    file.write_text(text)
    run = settings(inputs, tmp_path / "run")
    run["jobs"] = run["jobs"][:1]
    run["jobs"][0]["data"]["dataset"] = str(file)
    interrupt(run, 4)
    lines = text.splitlines(keepends=True)
    file.write_text("".join([*lines[:8], *reversed(lines[8:])]))
    with pytest.raises(loraloom.ConfigError, match=r"job plain: .*the stream has changed"):
        loraloom.train(run, resume=True)
    file.write_text(text + lines[0])
    with pytest.raises(loraloom.ConfigError, match="job plain: examples"):
        loraloom.train(run, resume=True)
