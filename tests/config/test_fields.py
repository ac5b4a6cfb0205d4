import pytest
from pydantic import ValidationError

from loraloom import LoraConfig, MixLoraConfig
from loraloom.config.fields import check_name, checked
from loraloom.errors import ConfigError, shown
from loraloom.training.settings import JobConfig, RunConfig, TrainConfig

PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_dora": "weight_decomposition",
    "use_rslora": "rank_stabilized",
}


@pytest.mark.parametrize("config", [LoraConfig, MixLoraConfig])
@pytest.mark.parametrize(("name", "ours"), PEFT_NAMES.items())
def test_pefts_names_lead_to_ours_in_python_as_in_a_file(config, name, ours):
    with pytest.raises(ValidationError, match=f"unknown key '{name}'; did you mean '{ours}'?"):
        config(**{name: 1})


JOB = {
    "name": "a",
    "adapter": {"method": "lora"},
    "data": {"task": "boolq"},
    "train": {"max_steps": 1},
}


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"adapter": {"method": "lora", "target_modules": [5]}},
            ["adapter: target_modules must be all-linear"],
        ),
        ({"adapter": {}}, ["adapter requires 'method', which is missing"]),
        ({"data": {"mix": [{"task": "boolq"}, {}]}}, ["data.mix.1: a source must be a task or"]),
        ({"eval": [{}]}, ["eval.0.task is required, but missing"]),
    ],
)
def test_paths_of_faults_have_no_tags_of_unions(changes, lines):
    with pytest.raises(ConfigError) as caught:
        checked(JobConfig, JOB | changes)
    told = [line.strip() for line in str(caught.value).splitlines()]
    assert len(told) == len(lines)
    assert all(line.startswith(start) for line, start in zip(told, lines, strict=True))


@pytest.mark.parametrize("limit", ["3 parsecs", "lots", [1]])
def test_a_memory_limit_that_is_no_size_says_what_is_one(limit):
    run = {"base_model": "base", "output_dir": "out", "memory_limit": limit}
    with pytest.raises(ConfigError, match=r'memory_limit must .* unit as in "20GB" or "512MiB", g'):
        checked(RunConfig, run)


def test_all_unknown_keys_of_a_section_are_told():
    adapter = {"method": "lora", "rnk": 2, "a9": 1}
    with pytest.raises(ConfigError) as caught:
        checked(JobConfig, JOB | {"adapter": adapter})
    misspelt, unlike = str(caught.value).splitlines()
    assert "unknown key 'rnk'; did you mean 'rank'?" in misspelt
    assert "unknown key 'a9'; known keys are" in unlike


def test_a_key_like_no_other_gets_the_known_ones():
    with pytest.raises(
        ValidationError, match=r"unknown key 'a\{b\}'; known keys are batch_size, ear"
    ):
        TrainConfig(max_steps=1, **{"a{b}": 1})


@pytest.mark.parametrize("name", ["a", "arc-mixlora", "0.1_b", "mix@0", "x" * 100])
def test_a_safe_name_is_returned(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "a\\b", "-a", ".hidden", "a b", "a\n", "ä", "x" * 101]
)
def test_an_unsafe_name_is_refused(name):
    with pytest.raises(ConfigError, match="name must be a safe file name") as error:
        check_name(name)
    assert shown(name) in str(error.value)
