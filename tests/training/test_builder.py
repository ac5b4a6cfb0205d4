from __future__ import annotations

import json

import pytest

from loraloom.errors import LoraloomError
from loraloom.training.builder import Evaluation, JobBuilder
from loraloom.training.settings import JobConfig
from tests.training.toy import ADAPTERS, toy_host, toy_tokenizer

ROWS = [{"text": f"{word} and so on"} for word in ("one", "two", "three", "four")]


@pytest.fixture
def builder():
    host, tokenizer = toy_host(), toy_tokenizer()
    return JobBuilder(host, tokenizer, Evaluation(host, tokenizer))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def config(rows, name: str = "a", **sections) -> JobConfig:
    settings = {
        "name": name,
        "adapter": {"method": "lora", "rank": 2, "alpha": 4},
        "data": {"dataset": str(rows), "format": "text"},
        "train": {"max_steps": 1, "max_length": 32},
    }
    return JobConfig.model_validate(settings | sections)


def test_a_job_has_its_adapter_on_the_host_and_its_data(builder, rows):
    job = builder.build(config(rows))
    assert builder._host.adapters == {"a": job.adapter}
    assert len(job.training_set.examples) == len(ROWS)


def test_jobs_with_the_same_data_and_seed_share_what_was_read(builder, rows):
    first, same = builder.build(config(rows)), builder.build(config(rows, "b"))
    other = builder.build(config(rows, "c", seed=1))
    assert first.training_set is same.training_set
    assert first.training_set is not other.training_set


def test_rows_longer_than_the_models_positions_are_refused(builder, rows):
    rows.write_text(json.dumps({"text": "one " * 999}) + "\n")
    message = (
        r"job a: examples must fit the model's \d+ positions, the longest has 900 tokens; set tr"
    )
    with pytest.raises(LoraloomError, match=message):
        builder.build(config(rows, train={"max_steps": 1, "max_length": 900}))


def test_data_that_may_have_changed_is_read_again(builder, rows):
    builder.build(config(rows))
    rows.write_text(json.dumps(ROWS[0]) + "\n")
    job = builder.build(config(rows, "b"), reads_data=True)
    assert len(job.training_set.examples) == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"dataset": "gone.jsonl", "format": "text"}},
        {"start_from": "gone"},
        {"train": {"max_steps": 1, "optimizer_args": {"bates": 1}}},
        {"eval": [{"task": "piqa", "path": "gone"}]},
    ],
    ids=["data", "start", "optimizer", "questions"],
)
def test_a_job_that_can_not_be_built_leaves_nothing_on_the_host(builder, rows, sections, tmp_path):
    with pytest.raises(LoraloomError, match="job a: "):
        builder.build(config(rows, **sections))
    assert builder._host.adapters == {}


def test_a_reference_loaded_for_a_job_that_can_not_be_built_leaves_too(builder, tmp_path):
    builder._host.add("start", ADAPTERS["lora"])
    builder._host.save("start", tmp_path / "start")
    objective = {"name": "dpo", "reference": str(tmp_path / "start")}
    data = {"dataset": "gone.jsonl", "format": "preference"}
    with pytest.raises(LoraloomError, match=r"job a: .*gone\.jsonl"):
        builder.build(config("", data=data, train={"max_steps": 1, "objective": objective}))
    assert set(builder._host.adapters) == {"start"}
