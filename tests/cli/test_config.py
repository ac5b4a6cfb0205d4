import json

import pytest
import yaml

from loraloom.cli.main import main
from loraloom.training.settings import load_run_config

RUN = """
base_model: smollm2-135m
output_dir: runs/a
jobs:
  - name: a
    adapter: {method: mixlora, top_k: 1}
    data: {task: skills, scoring: text}
    train: {max_steps: 5}
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_the_schema_is_json(capsys):
    assert main(["config", "schema"]) == 0
    assert {"base_model", "output_dir"} == set(json.loads(capsys.readouterr().out)["required"])


def test_a_run_is_shown_with_its_defaults(run_file, capsys):
    assert main(["config", "show", str(run_file)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["dtype"] == "auto"
    assert shown["jobs"][0]["adapter"]["num_experts"] == 8
    assert shown["jobs"][0]["train"]["micro_batch_size"] == 16


@pytest.mark.parametrize("name", ["a", "'08'", "'1e5'", "'yes'"])
def test_what_is_shown_is_the_same_run(run_file, tmp_path, capsys, name):
    changes = [f"jobs.0.name={name}", "jobs.0.train.learning_rate=1e-5"]
    assert main(["config", "show", str(run_file), "--set", changes[0], "--set", changes[1]]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert load_run_config(again) == load_run_config(run_file, changes)


def test_faults_are_listed_with_code_2(run_file, capsys):
    overrides = ["jobs.0.adapter.top_k=9", "jobs.0.train.max_step=3"]
    argv = ["config", "show", str(run_file)]
    assert main([*argv, "--set", overrides[0], "--set", overrides[1]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"error: {run_file}:",
        "  jobs.0.adapter: top_k must be in [1, num_experts=8], got 9",
        "  jobs.0.train: unknown key 'max_step'; did you mean 'max_steps'?",
    ]


def test_the_jobs_of_a_sweep_are_listed_and_the_rest_is_the_same_run(run_file, tmp_path, capsys):
    overrides = [
        "jobs=[]",
        "sweep.job={name: a, adapter: {method: lora}, train: {max_steps: 4}}",
        "sweep.job.data={task: skills, validation_fraction: 0.1}",
        "sweep.parameters={train.learning_rate: [1e-4, 1e-3]}",
    ]
    words = [word for one in overrides for word in ("--set", one)]
    assert main(["config", "show", str(run_file), *words]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-3:] == ["# The sweep's 2 jobs:", "# a-000-0.0001", "# a-001-0.001"]
    again = tmp_path / "again.yaml"
    again.write_text(shown)
    assert load_run_config(again) == load_run_config(run_file, overrides)
