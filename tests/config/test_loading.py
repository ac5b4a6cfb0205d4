import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from loraloom.adapters import MixLoraConfig
from loraloom.errors import ConfigError
from loraloom.training.settings import load_job_config, load_run_config, schema

RUN = """
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
dtype: bfloat16
output_dir: runs/arc
jobs:
  - name: arc-mixlora
    seed: 0
    adapter: {method: mixlora, rank: 16, alpha: 32, dropout: 0.05, target_modules: all-linear,
              num_experts: 8, top_k: 2, router_aux_loss_coef: 0.01}
    data: {task: arc_easy, path: data/arc_easy}
    train: {learning_rate: 2e-4, batch_size: 16, micro_batch_size: 8, num_epochs: 2,
            lr_scheduler: constant, max_length: 512}
  - name: arc-lora
    adapter: {method: lora, rank: 80, alpha: 160, target_modules: all-linear}
    data: {mix: [{task: arc_easy, weight: 2}, {dataset: alpaca.jsonl, format: instruction}]}
    train: {max_steps: 100, optimizer_args: {eps: 1e-6}}
"""

SCHEMA = Draft202012Validator(schema())


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_run_config(path, overrides)


def faults(tmp_path, *overrides, text=RUN):
    """The lines of the message after its first."""
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *overrides)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_a_run_file_is_read(tmp_path):
    config = load(tmp_path, RUN)
    assert config.jobs[0].adapter == MixLoraConfig(rank=16, alpha=32, dropout=0.05)
    assert config.jobs[0].train.learning_rate == 2e-4
    assert config.jobs[1].train.optimizer_args == {"eps": 1e-6}


JOB = """
adapter: {method: lora, rank: 8}
data: {task: arc_easy}
train: {max_steps: 10}
"""


def test_a_job_file_is_the_settings_of_one_job(tmp_path):
    path = tmp_path / "math.yaml"
    path.write_text(JOB)
    assert load_job_config(path).name == "math"
    path.write_text(f"name: law\n{JOB}")
    assert load_job_config(path).name == "law"


def test_later_overrides_win_and_a_number_in_quotes_is_a_number(tmp_path):
    path = "jobs.0.train.learning_rate"
    assert load(tmp_path, RUN, f"{path}=1e-3", f"{path}='1e-4'").jobs[0].train.learning_rate == 1e-4


def test_all_faults_are_in_one_message(tmp_path):
    wrong = {
        "dtype=float17": "dtype must be 'auto', .*got 'float17'; did you mean 'float16'?",
        "jobs.0.name=a/b": r"jobs\.0: name must be a safe file name .*got 'a/b'",
        "jobs.0.adapter.top_k=9": r"jobs\.0\.adapter: top_k must be in .*=8\], got 9",
        "jobs.0.data.task=arc_esy": r"jobs\.0\.data: task must .*did you mean 'arc_easy'",
        "jobs.0.train.lr=1": r"jobs\.0\.train: unknown key 'lr'; did you mean 'learning_rate'",
        "jobs.0.eval=[{}]": r"jobs\.0\.eval\.0\.task is required, but missing",
        "jobs.1.adapter.num_experts=8": r".*unknown key 'num_experts'; did you mean",
        "jobs.1.data.mix.1.format=null": r"jobs\.1\.data\.mix\.1: dataset requires format",
        "jobs.1.train.learning_rate=fast": r".*rate must be a valid number.*, got 'fast'",
    }
    lines = faults(tmp_path, *wrong)
    assert len(lines) == len(wrong), lines
    for fault in wrong.values():
        assert any(re.match(fault, line) for line in lines), fault


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("jobs.1.adapter.method=dora", "jobs.1.adapter must have a 'method' of 'lora', "),
        ("jobs.1.adapter.method=dora", "write method: lora with weight_decomposition: true"),
        ("jobs.1.adapter.method=mixlor", "got 'mixlor'; did you mean 'mixlora'?"),
        ("jobs.1.adapter=lora", "jobs.1.adapter must be a mapping, got 'lora'"),
        ("jobs.1.start_from=''", "jobs.1.start_from must have at least 1 character, got ''"),
        ("jobs.1.adapter.rank=1.5", "jobs.1.adapter.rank must be a valid integer, got"),
        ("jobs.1.adapter.dropout=1", "jobs.1.adapter.dropout must be less than 1, got 1"),
        ("jobs.1.adapter.alpha=.inf", "jobs.1.adapter.alpha must be a finite number, got inf"),
        ("output_dir=s3://b/runs", "output_dir must be a directory, got the URL 's3://b/runs'"),
        ("output_dir=~nosuchuser/runs", "output_dir must be a path, got '~nosuchuser/runs'"),
        ("base_model=null", "base_model must be a valid string, got None"),
        ("jobs.1.train.eval_steps=5", "eval_on_start requires data to evaluate; set data."),
        ("jobs.1.train.objective={name: dpoo}", "must have a 'name' of 'sft', 'dpo', 'cpo', got"),
        ("jobs.0.train.objective={name: dpo, beta: 0}", "objective.beta must be greater than 0"),
        ("jobs.1.train.objective={name: dpo}", "objective dpo requires pairs of answers"),
    ],
)
def test_a_fault_is_one_line_with_its_path(tmp_path, override, fault):
    (line,) = faults(tmp_path, override)
    assert fault in line


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml can't be read: No such file"):
        load_run_config("nowhere.yaml")


@pytest.mark.parametrize(("text", "got"), [("", "nothing"), ("- a\n- b\n", "list"), ("hi", "str")])
def test_a_file_without_settings_is_refused(tmp_path, text, got):
    with pytest.raises(ConfigError, match=f"must be a mapping of settings, got {got}"):
        load(tmp_path, text)


def test_the_schema_knows_every_setting_with_its_help():
    definitions = schema()["$defs"]
    described = [
        (name, field)
        for name, definition in definitions.items()
        for field, settings in definition["properties"].items()
        if "description" not in settings
    ]
    assert described == []
    assert definitions["MixLoraConfig"]["properties"]["top_k"]["default"] == 2
    assert definitions["TrainConfig"]["additionalProperties"] is False


def test_the_users_home_is_filled_in(tmp_path):
    assert load(tmp_path, RUN, "output_dir=~/runs").output_dir == Path.home() / "runs"


def test_the_schema_takes_what_a_run_file_may_say(tmp_path):
    load(tmp_path, RUN, "quantization=nf4")
    run = yaml.safe_load(RUN.replace("2e-4", "0.0002"))  # YAML 1.2, which editors know, reads both
    SCHEMA.validate(run | {"quantization": "nf4"})
