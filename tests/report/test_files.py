from __future__ import annotations

import json

import pytest

from loraloom.errors import ConfigError, DataError
from loraloom.eval.results import read_evaluation
from loraloom.report import jobs as files
from loraloom.report.jobs import read_run
from loraloom.training import results, tracking
from tests.report.made import evaluation, write_evaluation, write_run


def test_names_of_files_are_trainings():
    assert tracking.METRICS_FILE == files.METRICS_FILE
    assert results.RESULT_FILE == files.RESULT_FILE


def test_a_runs_jobs_are_found_by_their_files(tmp_path):
    run = write_run(tmp_path / "run")
    (run / ".checkpoints").mkdir()
    (run / "elsewhere").mkdir()
    jobs = read_run(run)
    assert [(job.name, job.run) for job in jobs] == [("lora", "run"), ("mix", "run")]
    assert [job.result["method"] for job in jobs] == ["LoRA", "MixLoRA"]
    assert len(jobs[0].metrics) == 41


def test_a_jobs_own_directory_will_do(tmp_path):
    run = write_run(tmp_path / "run")
    (job,) = read_run(run / "mix")
    assert (job.name, job.run) == ("mix", "run")


def test_a_job_that_still_trains_has_no_result(tmp_path):
    run = write_run(tmp_path / "run", ["mix"])
    (run / "mix/result.json").unlink()
    with (run / "mix/metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (job,) = read_run(run)
    assert (job.result, job.ended) == (None, None)
    assert job.metrics[-1]["step"] == 40


@pytest.mark.parametrize("name", ["nowhere", "empty", "a_file"])
def test_what_is_no_run_is_one_clear_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    with pytest.raises(ConfigError, match="RUN_DIR must be a directory that `loraloom train` wrot"):
        read_run(tmp_path / name)


@pytest.mark.parametrize("line", ["{]", "[1]"])
def test_a_broken_line_is_named(tmp_path, line):
    run = write_run(tmp_path / "run", ["mix"])
    file = run / "mix/metrics.jsonl"
    file.write_text(f"{line}\n{file.read_text()}")
    with pytest.raises(DataError, match=r"metrics\.jsonl.* line 1"):
        read_run(run)


def test_an_evaluation_is_read_and_what_is_new_in_it_passed_over(tmp_path):
    content = evaluation() | {"a later field": 1}
    read = read_evaluation(write_evaluation(tmp_path / "result.json", content))
    assert list(read.results) == ["base", "mix", "lora"]
    assert read.routing["mix"]["num_experts"] == 8


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"schema_version": 2, "results": {}}, "schema_version: Input should be 1"),
        ({"results": {}}, "schema_version: Field required"),
        ([], "Input should be a valid dictionary"),
    ],
)
def test_another_file_is_no_evaluation(tmp_path, content, fault):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"must be what `loraloom eval --output` wrote.*{fault}"):
        read_evaluation(path)


def test_a_missing_evaluation_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="--eval must be a file of"):
        read_evaluation(tmp_path / "nowhere.json")


def changed(change):
    content = evaluation()
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c["routing"]["mix"].update(num_experts=0), "num_experts: Input should be great"),
        (lambda c: c["routing"]["mix"].update(num_experts=10**7), "num_experts: Input should be l"),
        (lambda c: c["results"]["mix"]["piqa"].update(accuracy=1.5), "results.mix.piqa.accuracy"),
        (lambda c: c["results"]["mix"]["piqa"].update(interval=[0.1]), "results.mix.piqa.interval"),
        (lambda c: c["comparisons"][0].update(difference="x"), "comparisons.0.difference"),
        (lambda c: c.update(seeds={"mix": {"adapters": 3, "tasks": {}}}), "seeds.mix.adapters"),
    ],
)
def test_a_table_that_is_not_whole_is_an_error_that_names_it(tmp_path, change, fault):
    path = write_evaluation(tmp_path / "result.json", changed(change))
    with pytest.raises(DataError) as caught:
        read_evaluation(path)
    assert str(path) in str(caught.value)
    assert fault in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_numbers_that_are_not_finite_are_errors(tmp_path, number):
    text = json.dumps(evaluation()).replace('"difference": 0.2', f'"difference": {number}')
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"result\.json"):
        read_evaluation(tmp_path / "result.json")
    run = write_run(tmp_path / "run", ["mix"])
    metrics = run / "mix/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"aux_loss": 0.02', f'"aux_loss": {number}'))
    with pytest.raises(DataError, match=r"metrics\.jsonl.*line 1"):
        read_run(run)


@pytest.mark.parametrize("text", ["[" * 100_000, '"\\ud800"', "\x1b[31m", ""])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"result\.json must be JSON, line 1"):
        read_evaluation(tmp_path / "result.json")
