import sys
from datetime import date

import pytest
import yaml
from pydantic import ValidationError

from loraloom.config.fields import check_name
from loraloom.errors import ConfigError
from loraloom.training.settings import RunConfig, load_run_config
from loraloom.training.sweep_settings import SweepConfig, parameter_value

RATES = [1e-4, 3e-4]
BASE = {"base_model": "smollm2-135m", "output_dir": "runs/a"}
TEMPLATE = {
    "adapter": {"method": "lora", "rank": 8},
    "data": {"task": "skills", "validation_fraction": 0.1},
    "train": {"max_steps": 24},
}


def sweep(**settings):
    return {"job": TEMPLATE, "parameters": {"train.learning_rate": RATES}, **settings}


def run(**settings):
    return RunConfig.model_validate({**BASE, "sweep": sweep(**settings)})


def faults(tmp_path, **settings):
    """The message about a faulty run file, without its first line."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, "sweep": sweep(**settings)}, sort_keys=False))
    with pytest.raises(ConfigError) as error:
        load_run_config(path)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_a_grid_has_every_combination_and_the_last_parameter_changes_fastest():
    parameters = {"train.learning_rate": RATES, "adapter.method": ["lora", "mixlora"]}
    trials = run(parameters=parameters).trials
    assert [trial.name for trial in trials] == [
        "sweep-000-0.0001-lora",
        "sweep-001-0.0001-mixlora",
        "sweep-002-0.0003-lora",
        "sweep-003-0.0003-mixlora",
    ]
    assert [(job.train.learning_rate, job.adapter.method) for job in trials] == [
        (1e-4, "lora"),
        (1e-4, "mixlora"),
        (3e-4, "lora"),
        (3e-4, "mixlora"),
    ]
    assert all(job.adapter.rank == 8 for job in trials)


def test_a_parameter_may_be_a_whole_section_or_a_place_in_a_list():
    parameters = {
        "adapter": [{"method": "lora"}, {"method": "mixlora", "top_k": 1}],
        "eval.0.limit": [5],
    }
    trials = run(parameters=parameters, job={**TEMPLATE, "eval": [{"task": "skills"}]}).trials
    assert [job.adapter.method for job in trials] == ["lora", "mixlora"]
    assert trials[1].eval[0].limit == 5
    assert TEMPLATE["adapter"]["rank"] == 8


PARAMETERS = {
    "train.learning_rate": {"log_uniform": [1e-5, 1e-2]},
    "adapter.dropout": {"uniform": [0.1, 0.2]},
    "adapter.rank": {"int_uniform": [2, 4]},
    "seed": [1, 2],
}


def draw(number: int, seed: int = 0):
    config = {"parameters": PARAMETERS, "search": {"random": number, "seed": seed}}
    config = SweepConfig.model_validate({"job": TEMPLATE, **config})
    return [
        {path: parameter_value(drawn) for path, drawn in combination.items()}
        for combination in config.combinations()
    ]


def test_random_values_are_in_their_ranges_and_reach_all_of_them():
    drawn = draw(200)
    rates = [values["train.learning_rate"] for values in drawn]
    assert 1e-5 <= min(rates) < 2e-5 < 5e-3 < max(rates) <= 1e-2
    assert 80 < sum(rate < 10**-3.5 for rate in rates) < 120
    assert all(0.1 <= values["adapter.dropout"] <= 0.2 for values in drawn)
    assert {values["adapter.rank"] for values in drawn} == {2, 3, 4}
    assert {values["seed"] for values in drawn} == {1, 2}
    assert all(rate == float(f"{rate:.4g}") for rate in rates)


def test_tpe_begins_with_ten_random_jobs_that_are_known_beforehand():
    config = run(parameters=PARAMETERS, search={"tpe": 30})
    assert [job.seed for job in config.trials] == [values["seed"] for values in draw(10)]
    assert len(config.first_jobs) == 4
    assert [config.sweep.share_of_concurrent(worker, 6) for worker in range(6)] == [1] * 6
    few = config.sweep.model_copy(update={"max_concurrent": 4})
    assert [few.share_of_concurrent(worker, 3) for worker in range(3)] == [2, 1, 1]
    assert RunConfig.model_validate(config.model_dump(mode="json")).all_jobs == config.all_jobs
    later = config.trial(29, config.sweep.combinations()[0] | {"seed": "2"})
    assert later.name.startswith("sweep-029-")
    assert later.seed == 2


def test_every_fault_of_the_values_is_told(tmp_path):
    parameters = {
        "seed": [],
        "adapter.rank": 8,
        "train.learning_rate": {"log_uniform": [0, 1]},
        "train.batch_size": {"int_uniform": [1, 2.5]},
        "data.task": [date(2024, 1, 1), "b"],
    }
    lines = faults(tmp_path, parameters=parameters)
    assert [line.partition(" a list of JSON values, or a ")[0] for line in lines] == [
        f"sweep.parameters.{path}: must be" for path in parameters
    ]
    assert lines[0].endswith("{int_uniform: ...} of whole numbers; got []")


SWEEP_FAULTS = [
    ({"parameters": {"adapter.rnak": [1]}}, "adapter: unknown key 'rnak'; did you mean 'rank'?"),
    ({"parameters": {"adapter.rank": [8, 0]}}, "sweep.job: adapter.rank must be greater than or"),
    ({"parameters": {"adapter.rank": [0, -1]}}, "sweep.job: adapter.rank must be greater than or"),
    ({"job": "b"}, "sweep.job must be a mapping, got 'b'"),
    ({"job": {**TEMPLATE, "name": "a/b"}}, "sweep.job: name must be a safe file name"),
    ({"search": "gird"}, "search must be grid, {random: how many, seed: 0} or {tpe: how many, s"),
    ({"search": {"random": 0}}, "search.random must be greater than or equal to 1, got 0"),
    ({"search": {"tpe": 2, "random": 2}}, "search must be grid, {random: how many, seed: 0} or {"),
    (
        {"parameters": {"seed": list(range(30)), "adapter.rank": list(range(1, 31))}},
        "search grid must give at most 512 jobs, got 900; take search: {random",
    ),
    (
        {"parameters": {"seed": {"int_uniform": [1, 2]}}},
        "search grid requires lists, got a range for seed; take search: {random: how many}",
    ),
    (
        {"parameters": {"seed": {"int_uniform": [1, 2], "uniform": [1, 2]}}},
        "or a range with low <= high",
    ),
    ({"metric": "loss"}, "metric must be one that every job measures outside test splits (eval/lo"),
    ({"early_stopping": {"asha": {}}}, "early_stopping.asha.min_steps is required, but missing"),
    (
        {"parameters": {"data.task": ["a", "b"]}},
        "must not change the rows that measure jobs",
    ),
    ({"early_stopping": {}}, "early_stopping.asha is required, but missing"),
]


@pytest.mark.parametrize(("settings", "message"), SWEEP_FAULTS)
def test_a_faulty_sweep_is_refused_by_one_line(tmp_path, settings, message):
    (line,) = faults(tmp_path, **settings)
    assert line.startswith("sweep")
    assert message in line


def test_a_run_has_jobs_or_a_sweep():
    jobs = [{**TEMPLATE, "name": "a"}]
    settings = {**BASE, "jobs": jobs}
    with pytest.raises(ValidationError, match="a run must set jobs or sweep, not both"):
        RunConfig.model_validate({**settings, "sweep": sweep()})


def test_a_name_is_a_safe_file_name_whatever_the_values_are():
    values = [{"method": "lora", "target_modules": ["q_proj", "v_proj"]}, {"method": "mixlora"}]
    templates = ["[/INST] {{ instruction }}" * 20, "data/a b.jinja"]
    data = {"dataset": "rows.jsonl", "format": "instruction"}
    data["validation"] = {"dataset": "held_out.jsonl", "format": "instruction"}
    long = {**TEMPLATE, "name": "n" * 90, "data": data}
    parameters = {"adapter": values, "data.template": templates}
    for template in (long, {**long, "name": "short"}):
        names = [trial.name for trial in run(parameters=parameters, job=template).trials]
        assert len(set(names)) == 4
        assert all(check_name(name) == name for name in names)
    assert names[3] == "short-003-method_mixlora-data_a_b.jinja"


def test_without_optuna_a_sweep_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    (line,) = faults(tmp_path)
    assert line.endswith("which is not installed; run: pip install 'loraloom[sweep]'")
