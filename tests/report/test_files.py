import json

import pytest

from loraloom.errors import DataError
from loraloom.eval.results import read_evaluation
from loraloom.report.jobs import read_run
from tests.report.made import evaluation, write_evaluation, write_run


def test_a_runs_jobs_are_found_by_their_files(tmp_path):
    run = write_run(tmp_path / "run")
    (run / ".checkpoints").mkdir()
    (run / "elsewhere").mkdir()
    jobs = read_run(run)
    assert [(job.name, job.run) for job in jobs] == [("lora", "run"), ("mix", "run")]
    assert [job.result["method"] for job in jobs] == ["LoRA", "MixLoRA"]
    assert len(jobs[0].metrics) == 41
    (job,) = read_run(run / "mix")  # a job's own directory will do
    assert (job.name, job.run) == ("mix", "run")


def test_a_job_that_still_trains_has_no_result(tmp_path):
    run = write_run(tmp_path / "run", ["mix"])
    (run / "mix/result.json").unlink()
    with (run / "mix/metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (job,) = read_run(run)
    assert job.result is None
    assert job.metrics[-1]["step"] == 40


@pytest.mark.parametrize("line", ["{]", '{"step": 1, "loss": NaN}'])
def test_a_broken_line_is_named(tmp_path, line):
    run = write_run(tmp_path / "run", ["mix"])
    file = run / "mix/metrics.jsonl"
    file.write_text(f"{line}\n{file.read_text()}")
    with pytest.raises(DataError, match=r"metrics\.jsonl.* line 1"):
        read_run(run)


def test_an_evaluation_is_read_and_what_is_new_in_it_is_kept(tmp_path):
    content = evaluation() | {"a later field": 1}
    read = read_evaluation(write_evaluation(tmp_path / "result.json", content))
    assert list(read.results) == ["base", "mix", "lora"]
    assert read.routing["mix"]["num_experts"] == 8
    assert read.to_json()["a later field"] == 1
    with pytest.raises(DataError, match=r"nowhere\.json can't be read"):
        read_evaluation(tmp_path / "nowhere.json")


WHOLE = json.dumps(evaluation())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "JSON: .* line 1"),
        ("[]", "what `loraloom eval --output` wrote"),
        (WHOLE.replace('"schema_version": 1', '"schema_version": 2'), "schema_version must be 1"),
        (WHOLE.replace('"p_value"', '"p"'), "p_value"),
        (WHOLE.replace('"difference": 0.2', '"difference": NaN'), "JSON"),
    ],
)
def test_another_file_is_an_error_that_names_it(tmp_path, text, fault):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match=rf"result\.json must be (?s:.*){fault}"):
        read_evaluation(tmp_path / "result.json")
