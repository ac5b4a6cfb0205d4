import json
import math
from inspect import signature
from unittest.mock import patch

import lm_eval
import pytest

from loraloom.config.data import PromptForm
from loraloom.eval.harness import evaluate_adapters, load_tasks
from loraloom.eval.harness.lm import Answers, SimpleEvaluateOptions
from loraloom.eval.harness.tasks import as_evaluation, question_lines
from tests.conftest import build_tokenizer
from tests.eval.harness.toy import ROWS, TASKS
from tests.eval.scoring import scoring_host
from tests.tiny import METHODS

EVERYBODY = [None, *METHODS]
OPTIONS = {"bootstrap_iters": 0, "limit": 4}


@pytest.fixture(scope="module")
def tasks(toy_tasks):
    return load_tasks(list(TASKS), toy_tasks)


@pytest.fixture(scope="module")
def results(tasks):
    return evaluate_adapters(scoring_host(), build_tokenizer(), tasks, EVERYBODY, **OPTIONS)


def test_examples_are_the_same_for_every_adapter(tiny_tokenizer, toy_tasks, monkeypatch):
    tiny_tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tasks = load_tasks(["toy_choice"], toy_tasks)
    host = scoring_host(configs={"own": METHODS["lora"], "lora": METHODS["lora"]})
    monkeypatch.setattr(host.adapters["own"], "prompt", PromptForm(format="instruction"))
    options = {"num_fewshot": 2, "apply_chat_template": True, **OPTIONS}
    with patch.object(Answers, "of", autospec=True, side_effect=Answers.of) as answers:
        results = evaluate_adapters(host, tiny_tokenizer, tasks, [None, "own", "lora"], **options)
    asked = [call.args[0].adapters for call in answers.call_args_list]
    assert asked == [[None, "lora"], ["own"], [None, "lora"]]
    prompts = [
        [sample["arguments"][0][0] for sample in of_adapter["samples"]["toy_choice"]]
        for of_adapter in results.values()
    ]
    assert prompts[0] == prompts[2] != prompts[1]
    assert prompts[0][0].startswith("<bos>[user] Question:")
    assert prompts[0][0].endswith("[assistant]")
    assert prompts[0][0].count("Answer:") == 3
    assert results[None]["n-shot"] == {"toy_choice": 2}


def test_all_options_are_arguments_of_lm_evals_function():
    parameters = set(signature(lm_eval.simple_evaluate).parameters)
    ours = {"model", "model_args", "tasks", "task_manager", "batch_size", "device"}
    assert set(SimpleEvaluateOptions.__annotations__) == parameters - ours


def test_results_are_in_our_form(results):
    evaluation = as_evaluation(results)
    summary = evaluation.results
    assert list(summary) == ["base", *METHODS]
    choice = summary["lora"]["toy_choice"]
    own = results["lora"]["results"]["toy_choice"]
    assert choice["accuracy"] == own["acc_norm,none"] == choice["metrics"]["acc_norm,none"]["value"]
    assert choice["metric"] == "acc_norm,none"
    assert choice["metrics"]["acc,none"] == {"value": own["acc,none"], "stderr": None}
    assert (choice["num_examples"], choice["split"], choice["num_fewshot"]) == (4, "test", 0)
    assert summary["base"]["toy_generate"]["metric"] == "exact_match,none"
    assert "accuracy" not in summary["base"]["toy_rolling"]
    assert summary["base"]["toy_rolling"]["metrics"]["word_perplexity,none"]["value"] > 1
    (table,) = evaluation.tables()
    assert [column.header for column in table.columns][3:] == ["base", *METHODS]
    assert table.row_count == 3 * 2 + 1 + 1
    plain = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))["lm_eval"]
    assert plain["mixlora"]["results"] == results["mixlora"]["results"]
    assert plain["mixlora"]["config"]["adapter"] == "mixlora"
    assert "samples" not in plain["base"]


def test_numbers_that_json_has_none_for_are_null():
    sample = {"doc_id": 0, "doc_hash": "0", "filter": "none", "target": "a", "metrics": ["m"]}
    sample |= {"m": math.nan, "filtered_resps": [-math.inf]}
    (line,) = question_lines({None: {"samples": {"toy": [sample]}}})
    assert (line["metrics"], line["responses"]) == ({"m": None}, [None])


def test_there_is_a_line_for_each_question(results):
    lines = list(question_lines(results))
    assert len(lines) == len(EVERYBODY) * len(TASKS) * 4
    choice = next(line for line in lines if line["task"] == "toy_choice")
    assert choice["adapter"] == "base"
    scores = [score for score, _ in choice["responses"]]
    assert len(scores) == len(ROWS[choice["index"]]["choices"])
    assert choice["metrics"]["acc"] == float(scores.index(max(scores)) == choice["correct_label"])
    words = next(line for line in lines if line["task"] == "toy_generate")
    assert isinstance(words["responses"][0], str)
