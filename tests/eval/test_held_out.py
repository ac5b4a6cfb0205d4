import json
import math

import pytest
import torch

from loraloom.config.data import SourceConfig
from loraloom.config.fields import checked
from loraloom.data.encoding import SourceEncoder
from loraloom.data.tokens import EncodedRow
from loraloom.errors import AdapterError, ConfigError, LoraloomError
from loraloom.eval import statistics
from loraloom.eval.evaluation import evaluate_loss
from loraloom.eval.held_out import data_set_name, load_held_out, row_scores
from tests.eval.scoring import scoring_host
from tests.generation.saved import write_rows
from tests.tiny import METHODS

INSTRUCTIONS = [
    {"instruction": f"Say {word}", "input": "", "output": f"{word} " * times}
    for times, word in enumerate(("blue", "yes", "two", "short"), start=1)
]
LONG = {"instruction": "Say", "input": "", "output": "blue " * 60}
TEXTS = [{"text": "The sky is blue. " * times} for times in (1, 4, 9)]
PAIRS = [
    {"prompt": f"Say {word}", "chosen": f" {word}", "rejected": " no" * times}
    for times, word in enumerate(("blue", "yes", "two", "short", "one"), start=1)
]


@pytest.fixture(scope="module")
def host():
    return scoring_host()


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are the statistics' tests' concern; ten thousand resamples take long."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 100)


@pytest.fixture
def data_of(tmp_path):
    """Write rows, and give the settings of their data set."""

    def write(rows, data_format="instruction", name="held_out.jsonl"):
        return {"dataset": write_rows(tmp_path / name, *rows), "format": data_format}

    return write


@pytest.fixture
def instructions(data_of):
    return data_of(INSTRUCTIONS)


@torch.no_grad()
def plain_loss(host, rows, adapter):
    """Loss a token of rows, each piece alone with all its logits."""
    total, count = 0.0, 0
    for piece in (piece for row in rows for piece in row.pieces):
        ids, labels = torch.tensor([piece.input_ids]), torch.tensor(piece.labels[1:])
        log_probs = host(ids, adapters=[adapter]).logits[0, :-1].log_softmax(-1)
        learnt = labels != -100
        chosen = log_probs[learnt].gather(1, labels[learnt][:, None])
        total, count = total - float(chosen.sum()), count + int(learnt.sum())
    return total / count


@pytest.mark.parametrize(
    ("rows", "kind", "max_length"), [(INSTRUCTIONS, "instruction", 256), (TEXTS, "text", 24)]
)
def test_the_loss_is_that_of_a_plain_forward(host, tiny_tokenizer, data_of, rows, kind, max_length):
    data = data_of(rows, kind)
    evaluation = evaluate_loss(host, tiny_tokenizer, data, max_length=max_length)
    encoder = SourceEncoder(checked(SourceConfig, data), tiny_tokenizer, max_length)
    encoded = encoder.load("validation")
    assert any(len(row.pieces) > 1 for row in encoded) == (rows is TEXTS)
    assert list(evaluation.results) == ["base", *METHODS]
    for name in (None, "lora", "mixdora"):
        result = evaluation.results[name or "base"]["held_out"]
        assert result["loss"] == pytest.approx(plain_loss(host, encoded, name), abs=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
        assert result["interval"][0] <= result["loss"] <= result["interval"][1]
        assert result["num_examples"] == len(rows)
    assert list(evaluation.routing) == ["mixlora", "mixdora"]
    assert evaluation.routing["mixlora"]["tasks"]["held_out"]["num_questions_covered"] == len(rows)
    json.dumps(evaluation.to_json(), allow_nan=False)


def test_seeds_are_one_contestant_on_the_same_rows(tiny_tokenizer, instructions):
    seeds = {f"mix@{seed}": METHODS["mixlora"] for seed in range(2)}
    evaluation = evaluate_loss(scoring_host(configs=seeds), tiny_tokenizer, instructions)
    losses = [evaluation.results[name]["held_out"]["loss"] for name in seeds]
    assert evaluation.seeds["mix"]["tasks"]["held_out"]["mean"] == pytest.approx(sum(losses) / 2)
    (comparison,) = evaluation.comparisons
    assert (comparison.first, comparison.second, comparison.metric) == ("mix", "base", "loss")
    base = evaluation.results["base"]["held_out"]["loss"]
    assert comparison.difference == pytest.approx(sum(losses) / 2 - base)
    assert comparison.num_examples == len(INSTRUCTIONS)


def test_rows_have_their_places_and_those_that_do_not_fit_are_told(host, tiny_tokenizer, data_of):
    data = data_of([LONG, *INSTRUCTIONS, {"x": 1}])
    options = {"max_length": 60, "limit": 1 + len(INSTRUCTIONS)}  # what comes later isn't read
    evaluation = evaluate_loss(host, tiny_tokenizer, data, ["lora"], **options)
    places = [line["index"] for line in evaluation.lines()]
    assert places == [place + 1 for place in range(len(INSTRUCTIONS))]
    details = evaluation.tasks["held_out"]
    assert details["num_examples"] == len(INSTRUCTIONS)
    assert "1 dropped because their answers do not fit" in details["notes"]


def test_chosen_answers_are_ranked_above_rejected_ones(host, tiny_tokenizer, data_of):
    names = [None, "mixdora", "lora"]
    data = data_of(PAIRS, "preference", "pairs.jsonl")
    evaluation = evaluate_loss(host, tiny_tokenizer, data, names)
    encoded = SourceEncoder(checked(SourceConfig, data), tiny_tokenizer, 256).load("validation")

    def margins(adapter):
        answers = [EncodedRow((piece,)) for row in encoded for piece in row.pieces]
        sums = [-plain_loss(host, [x], adapter) * sum(x.pieces[0].is_learnt) for x in answers]
        return torch.tensor(sums[0::2]) - torch.tensor(sums[1::2])

    assert [*evaluation.results] == [name or "base" for name in names]
    for name in names:
        result = evaluation.results[name or "base"]["pairs"]
        assert result["accuracy"] == pytest.approx(float((margins(name) > 0).float().mean()))
        assert result["num_examples"] == len(PAIRS)
    for task in (routing["tasks"]["pairs"] for routing in evaluation.routing.values()):
        assert task["num_questions"] == task["num_questions_covered"] == len(PAIRS)
    assert {one.metric for one in evaluation.comparisons} <= {"accuracy"}
    lines = [line for line in evaluation.lines() if line["adapter"] == "lora"]
    assert [line["index"] for line in lines] == list(range(len(PAIRS)))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"format": "chatt"}, {}, "format"),
        ({}, {"max_length": 10**6}, "max_length must be from 2 to the model's 256, got 1000000"),
        ({"format": "text", "fields": {"text": "output"}}, {"max_length": 1}, "2 to the model's"),
        ({}, {"limit": 0}, "limit must be at least 1, or None for all, got 0"),
        ({}, {"adapters": []}, "at least"),
    ],
)
def test_a_wrong_data_set_is_an_error(host, tiny_tokenizer, instructions, change, options, message):
    with pytest.raises(LoraloomError, match=message):
        evaluate_loss(host, tiny_tokenizer, instructions | change, **options)
    with pytest.raises(ConfigError, match="at least one task or data set, got none"):
        evaluate_loss(host, tiny_tokenizer, [])
    one = load_held_out(host, tiny_tokenizer, instructions)
    with pytest.raises(ConfigError, match="sets must have different names, got held_out, held_out"):
        evaluate_loss(host, tiny_tokenizer, [one, one])


def test_a_diverged_adapter_is_an_error(tiny_tokenizer, instructions):
    host = scoring_host()
    for parameter in host.adapters["lora"].parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="got nan from adapter 'lora' in row 1 of"):
        evaluate_loss(host, tiny_tokenizer, instructions)


def test_data_sets_have_the_names_of_their_files():
    names = ["a/eval.math.jsonl", "rows.csv.gz", "teknium/OpenHermes-2.5", "data/dolly/"]
    assert [*map(data_set_name, names)] == ["eval.math", "rows", "OpenHermes-2.5", "dolly"]


def test_the_split_of_a_directory_that_was_read_is_noted(host, tiny_tokenizer, data_of, tmp_path):
    path = data_of(INSTRUCTIONS, name="validation.jsonl")["dataset"]
    data = {"dataset": str(tmp_path), "format": "instruction"}
    details = load_held_out(host, tiny_tokenizer, data).details
    assert (details["split"], details["source"]["file"]) == ("validation", path)
    task = {"template": "{{ instruction }}", "choices": ["blue", "no"], "labels": ["a", "b"]}
    task |= {"data": {"files": {"validation": path}}, "answer": "{{ 'a' }}"}
    (tmp_path / "quiz.yaml").write_text(json.dumps(task))
    quiz = load_held_out(host, tiny_tokenizer, {"task": str(tmp_path / "quiz.yaml")})
    assert quiz.details["format"] == "text"  # the task's own


def test_a_perplexity_that_is_no_number_is_left_out(host, tiny_tokenizer, instructions):
    data = load_held_out(host, tiny_tokenizer, instructions)
    losses = {"a": [1e4 * n for n in data.num_tokens]}
    assert row_scores(data, losses).results["a"]["perplexity"] is None


def test_adapters_are_noted_as_before_scoring(host, tiny_tokenizer, instructions, tmp_path):
    (file := tmp_path / "adapter_config.json").touch()
    sets = (file.unlink() or load_held_out(host, tiny_tokenizer, one) for one in [instructions])
    evaluation = evaluate_loss(host, tiny_tokenizer, sets, sources={"a": str(tmp_path)})
    assert [*evaluation.adapters["a"]["sha256"]] == [file.name]
