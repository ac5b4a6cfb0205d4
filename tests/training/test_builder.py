from functools import partial

import pytest
import torch

from loraloom.adapters import LoraConfig, MixLoraConfig, RoutedConfig, VeraConfig
from loraloom.config.data import PromptForm
from loraloom.errors import ConfigError, LoraloomError
from loraloom.training.builder import JobBuilder, load_start
from loraloom.training.settings import JobConfig
from tests.generation.saved import write_rows
from tests.tiny import METHODS, changed, randomise
from tests.training.saved import save_inputs
from tests.training.toy import toy_host, toy_tokenizer

ROLES = ("instruction", "output")
ROWS = [{"text": f"{word} and so on"} for word in ("one", "two", "three", "four")]


@pytest.fixture
def builder():
    host, tokenizer = toy_host(), toy_tokenizer()
    tokenizer.pad_token = None  # EOS takes its place
    return JobBuilder(host, tokenizer)


@pytest.fixture
def rows(tmp_path):
    write_rows(tmp_path / "rows.jsonl", *ROWS)
    return tmp_path / "rows.jsonl"


def config(rows, name: str = "a", **sections) -> JobConfig:
    settings = {
        "name": name,
        "adapter": {"method": "lora", "rank": 2, "alpha": 4},
        "data": {"dataset": str(rows), "format": "text"},
        "train": {"max_steps": 1, "max_length": 32},
    }
    return JobConfig.model_validate(settings | sections)


def test_jobs_with_the_same_data_and_seed_share_what_was_read(builder, rows):
    data = {"dataset": str(rows), "format": "instruction", "fields": dict.fromkeys(ROLES, "text")}
    build = partial(builder.build, reread=False)
    first, same = build(config(rows)), build(config(rows, "b"))
    other = build(config(rows, "c", seed=1))
    assert first.training_set is same.training_set
    assert first.training_set is not other.training_set
    streamed, paces = {"dataset": str(rows), "format": "text", "streaming": True}, []
    for size in (1, 2):
        train = {"max_steps": 9, "batch_size": size, "max_length": 32}
        paces.append(build(config(rows, f"s{size}", data=streamed, train=train)))
    assert paces[0].training_set is not paces[1].training_set
    assert all(paces[1].order.window(step) for step in range(3))
    assert paces[1].order.epochs_after(1) == 0.0  # of a step that is undone
    held_out = build(config(rows, "e", data=data | {"validation_fraction": 0.5}))
    held_out.objective = lambda *_: (torch.tensor(1.5), {"loss": 9.0, "x": torch.nan})
    assert builder.measure([held_out])["e"] == {"eval/loss": 1.5}


def test_a_job_that_joins_reads_its_files_again(builder, rows, tmp_path):
    inputs = save_inputs(tmp_path / "inputs")
    questions = inputs / "arc_easy/validation.jsonl"
    task = {"task": "arc_easy", "path": str(inputs), "scoring": "text"}
    first = builder.build(config(rows, eval=[task]))
    write_rows(rows, *ROWS, {"text": "five and so on"})
    questions.write_text(questions.read_text().replace("What is 2", "What is 22"))
    other = builder.build(config(rows, "c", eval=[task]))
    assert len(other.training_set.examples) == len(first.training_set.examples) + 1
    assert list(other.questions.values()) != list(first.questions.values())
    assert builder.measure([first, other]).keys() == {"a", "c"}


def test_rows_longer_than_the_models_positions_are_refused(builder, rows):
    write_rows(rows, {"text": "one " * 999})
    message = (
        r"job a: examples must fit the model's \d+ positions, the longest has 900 tokens; set tr"
    )
    with pytest.raises(LoraloomError, match=message):
        builder.build(config(rows, train={"max_steps": 1, "max_length": 900}))


TOP_P = MixLoraConfig(rank=2, num_experts=4, routing="top_p")


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_gets_the_weights_of_the_old_one(method, tmp_path):
    host = toy_host()
    old = randomise(host.add("old", METHODS[method], seed=3), seed=3)
    new = host.add("new", changed(METHODS[method], dropout=0.3))
    host.save("old", tmp_path / "old")
    load_start(host, new, str(tmp_path / "old"))
    own = new.tensors()
    assert all(torch.equal(own[name], tensor) for name, tensor in old.tensors().items())


def test_a_routed_job_starts_from_files_whose_experts_are_written_otherwise(tmp_path):
    host = toy_host()
    host.add("law", LoraConfig(rank=2, target_modules="all-linear"))
    host.add("auto", RoutedConfig(experts={"law": "law"}, router="token"))
    for name in ("law", "auto"):
        host.save(name, tmp_path / name)
    again = RoutedConfig(experts={"law": str(tmp_path / "law")}, router="token", train_experts=True)
    load_start(host, host.add("new", again), str(tmp_path / "auto"))


PLAIN, RAW = (PromptForm(format="instruction", template="plain"), PromptForm(format="preference"))
CHAT = PromptForm(format="chat")
PLAIN_PAIRS = {"format": "preference", "template": "plain"}


@pytest.mark.parametrize(
    ("learned", "data", "message"),
    [
        (PLAIN, {"format": "preference"}, "'template': 'plain'}, but this job's have {'format': '"),
        (CHAT, {"format": "preference"}, "form {'format': 'chat'}, but this job's have"),
        (RAW, PLAIN_PAIRS, "this job's have {'format': 'instruction', 'template': 'plain'}"),
        (PLAIN, PLAIN_PAIRS, None),
        (RAW, {"format": "preference"}, None),
        (PromptForm(format="task"), {"format": "preference"}, None),
        (PromptForm(format="text"), PLAIN_PAIRS, None),  # which has no prompts
        (None, PLAIN_PAIRS, None),
    ],
)
def test_a_start_from_another_form_of_prompts_is_a_warning(
    builder, tmp_path, learned, data, message
):
    adapter = LoraConfig(rank=2, alpha=4)
    builder._host.add("old", adapter).prompt = learned
    builder._host.save("old", tmp_path / "old")
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = write_rows(tmp_path / "pairs.jsonl", pair)
    train = {"max_steps": 1, "max_length": 32, "objective": {"name": "dpo"}}
    data = {"dataset": pairs, **data}
    job = builder.build(config(pairs, data=data, train=train, start_from=str(tmp_path / "old")))
    assert len(job.warnings) == (message is not None)
    assert all(message in warning for warning in job.warnings)


@pytest.mark.parametrize(
    ("old", "new", "setting"),
    [
        (LoraConfig(rank=2, alpha_pattern={"q_proj": 7.0}), LoraConfig(rank=2), "alpha_pattern"),
        (TOP_P, changed(TOP_P, temperature=2.0), "temperature"),
        (VeraConfig(rank=4), VeraConfig(rank=4, save_projection=False), "save_projection"),
    ],
)
def test_settings_that_leave_no_trace_in_shapes_must_agree_too(tmp_path, old, new, setting):
    host = toy_host()
    host.add("old", old)
    host.save("old", tmp_path / "old")
    with pytest.raises(ConfigError, match=f"{setting} is "):
        load_start(host, host.add("new", new), str(tmp_path / "old"))
