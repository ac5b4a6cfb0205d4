from __future__ import annotations

import json

import pytest

from loraloom.eval.harness import evaluate_adapters, load_tasks
from loraloom.eval.harness.results import (
    _majority,
    _question,
    as_evaluation,
    question_lines,
    results_table,
)
from tests.conftest import build_tokenizer
from tests.eval.harness.toy import ROWS, TASKS
from tests.eval.scoring import scoring_host
from tests.tiny import METHODS

EVERYBODY = [None, *METHODS]
OPTIONS = {"bootstrap_iters": 0, "limit": 8}


@pytest.fixture(scope="module")
def tasks(toy_tasks):
    return load_tasks(list(TASKS), toy_tasks)


@pytest.fixture(scope="module")
def results(tasks):
    return evaluate_adapters(scoring_host(), build_tokenizer(), tasks, EVERYBODY, **OPTIONS)


def test_examples_are_the_same_for_every_adapter(tiny_tokenizer, toy_tasks):
    tiny_tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tasks = load_tasks(["toy_choice"], toy_tasks)
    host = scoring_host(configs={"lora": METHODS["lora"]})
    options = {"num_fewshot": 2, "apply_chat_template": True, **OPTIONS}
    results = evaluate_adapters(host, tiny_tokenizer, tasks, [None, "lora"], **options)
    prompts = [
        [sample["arguments"][0][0] for sample in of_adapter["samples"]["toy_choice"]]
        for of_adapter in results.values()
    ]
    assert prompts[0] == prompts[1]
    assert prompts[0][0].startswith("<bos>[user] Question:")
    assert prompts[0][0].endswith("[assistant]")
    assert prompts[0][0].count("Answer:") == 3
    assert results[None]["n-shot"] == {"toy_choice": 2}


def test_results_are_in_our_form(results):
    evaluation = as_evaluation(results)
    summary = evaluation.results
    assert list(summary) == ["base", *METHODS]
    choice = summary["lora"]["toy_choice"]
    own = results["lora"]["results"]["toy_choice"]
    assert choice["accuracy"] == own["acc_norm,none"] == choice["metrics"]["acc_norm,none"]["value"]
    assert choice["metric"] == "acc_norm,none"
    assert choice["metrics"]["acc,none"] == {"value": own["acc,none"], "stderr": None}
    assert (choice["num_examples"], choice["split"], choice["num_fewshot"]) == (8, "test", 0)
    assert summary["base"]["toy_generate"]["metric"] == "exact_match,none"
    assert "accuracy" not in summary["base"]["toy_rolling"]
    assert summary["base"]["toy_rolling"]["metrics"]["word_perplexity,none"]["value"] > 1
    table = results_table(evaluation)
    assert [column.header for column in table.columns][4:] == ["base", *METHODS]
    assert table.row_count == 3 * 2 + 1 + 1
    plain = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))["lm_eval"]
    assert plain["mixlora"]["results"] == results["mixlora"]["results"]
    assert plain["mixlora"]["config"]["adapter"] == "mixlora"
    assert "samples" not in plain["base"]


def test_targets_that_are_no_answers_have_no_majority():
    rows = [{"doc_id": n, "target": n % 2, "arguments": [("q", " a"), ("q", " b")]} for n in (0, 1)]
    assert _majority({"doc_to_target": "label"}, rows) == 0.5
    assert _majority({"doc_to_target": 3}, rows) is None
    of_contexts = [{**row, "arguments": [("x", " a"), ("y", " a")]} for row in rows]
    assert _majority({}, of_contexts) is None
    assert _majority({}, ()) is None


def test_of_mutual_information_the_answers_with_the_question_are_the_choices():
    responses = [(-2.0, False), (-1.0, True), (-9.0, False), (-0.5, True)]
    metrics = {"acc": 1.0, "acc_mutual_info": 0.0}
    sample = {"filtered_resps": responses, "metrics": [*metrics], "filter": "none", "target": 1}
    assert _question(sample | metrics)["chosen"] == 1


def test_there_is_a_line_for_each_question(results):
    lines = list(question_lines(results))
    assert len(lines) == len(EVERYBODY) * len(TASKS) * 8
    choice = next(line for line in lines if line["task"] == "toy_choice")
    assert choice["adapter"] == "base"
    assert len(choice["scores"]) == len(ROWS[choice["index"]]["choices"])
    assert choice["scores"][choice["chosen"]] == max(choice["scores"])
    assert choice["metrics"]["acc"] == float(choice["chosen"] == choice["correct_label"])
    words = next(line for line in lines if line["task"] == "toy_generate")
    assert isinstance(words["responses"][0], str)
