import json
import math
from dataclasses import replace

import pytest
import torch

from loraloom.config.data import TaskName
from loraloom.data.tasks import QuestionSet
from loraloom.errors import ConfigError, DataError
from loraloom.eval.score import (
    MOE_PEFT_LABELS,
    QuestionScore,
    Scorer,
    majority_share,
    score_questions,
    summarise,
    task_scores,
    with_all_labels,
)
from loraloom.eval.statistics import wilson_interval
from tests.eval.scoring import (
    plain_log_likelihoods,
    question,
    record_forwards,
    scoring_host,
    some_questions,
    toy_scores,
)
from tests.tiny import ALL_FAMILIES, METHODS

EVERYBODY = [None, *METHODS]


def scored(host, tokenizer, adapters=EVERYBODY, questions=None, max_tokens=None, **options):
    asked = some_questions() if questions is None else questions
    return score_questions(Scorer(host, tokenizer, adapters, max_tokens), asked, **options)


def assert_equals(scores, expected, tolerance=1e-10):
    assert scores.keys() == expected.keys()
    for name, of_name in scores.items():
        for one, other in zip(of_name, expected[name], strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=tolerance)


def assert_equals_plain(host, tokenizer, adapters, tolerance=1e-8, **options):
    for name, scores in scored(host, tokenizer, adapters, **options).items():
        for asked, score in zip(some_questions(), scores, strict=True):
            plain = plain_log_likelihoods(host, tokenizer, asked, name)
            assert score.log_likelihoods == pytest.approx(plain, abs=tolerance)


@pytest.mark.parametrize("max_tokens", [1, 200])
def test_scores_are_those_of_one_sequence_at_a_time(tiny_tokenizer, max_tokens):
    assert_equals_plain(scoring_host(), tiny_tokenizer, EVERYBODY, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in ALL_FAMILIES),
        ("llama", {"dtype": torch.float32}),
        ("llama", {"attention": "eager"}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
    ],
)
def test_scores_are_exact_in_every_family(tiny_tokenizer, family, changes):
    attention = changes.pop("attention", None)
    host = scoring_host(family, {"mixlora": METHODS["mixlora"]}, **changes)
    if attention is not None:
        host.model.set_attn_implementation(attention)
    assert_equals_plain(host, tiny_tokenizer, [None, "mixlora"], tolerance=1e-4)


def test_together_is_as_alone_even_beside_one_that_diverged(tiny_tokenizer):
    host = scoring_host()
    alone = {name: scored(host, tiny_tokenizer, [name])[name] for name in EVERYBODY}
    assert_equals(scored(host, tiny_tokenizer), alone)
    before = scored(host, tiny_tokenizer, ["lora", "mixlora"])
    for parameter in host.adapters["mixlora"].parameters():
        parameter.data.fill_(torch.nan)
    after = scored(host, tiny_tokenizer, ["lora", "mixlora"])
    assert after["lora"] == before["lora"]
    assert {score.chosen for score in after["mixlora"]} == {None}


def test_batches_stay_within_their_tokens(tiny_tokenizer, monkeypatch):
    shapes, told = record_forwards(monkeypatch), []
    host = scoring_host()
    questions = [question(f"Question {n}:" + " one" * n, ["A", "B"], index=n) for n in range(12)]
    whole = scored(host, tiny_tokenizer, questions=questions, max_tokens=10**6)
    assert len(shapes) == 1
    shapes.clear()
    how = {"max_tokens": 450, "on_progress": told.append}
    parts = scored(host, tiny_tokenizer, questions=questions, **how)
    assert len(shapes) == len(told) > 2
    assert max(shape.numel() for shape in shapes) <= 450
    assert_equals(parts, whole)
    assert sorted(place for places in told for place in places) == list(range(12))


def test_a_long_context_is_cut_from_the_left(tiny_tokenizer):
    host = scoring_host(max_position_embeddings=16)
    long, short = question("yes no " * 20 + "Answer:", ["no", "yes"]), question("?", ["no", "yes"])
    scores = scored(host, tiny_tokenizer, [None], [long, short])[None]
    assert [score.truncated for score in scores] == [True, False]
    kept, answers = (tiny_tokenizer(text)["input_ids"] for text in (long.contexts[0], " no"))
    tokens = torch.tensor([kept + answers])[:, -17:]
    log_probs = host(tokens[:, :-1]).logits[0].log_softmax(-1)
    chosen = log_probs.gather(1, tokens[0, 1:, None])[-len(answers) :]
    assert scores[0].log_likelihoods[0] == pytest.approx(float(chosen.sum()), abs=1e-8)
    with pytest.raises(DataError, match="toy, question 7: a choice must have 1 to 16 tokens, got"):
        scored(host, tiny_tokenizer, [None], [question("?", ["one " * 30], index=7)])


def toy_score(log_likelihoods, gold=0, normalizers=None, group=None):
    asked = question("?", ["x"] * len(log_likelihoods), gold, group=group, normalizers=normalizers)
    return QuestionScore(asked, tuple(log_likelihoods))


@pytest.mark.parametrize(
    ("log_likelihoods", "normalizers", "chosen"),
    [
        ([-2.0, -1.0, -3.0], None, 1),
        ([-2.0, -1.0, -1.0], None, 1),  # the first of equals
        ([-6.0, -4.0], [3.0, 1.0], 0),
        ([-1.0, math.nan], None, None),
    ],
)
def test_the_highest_finite_score_is_chosen(log_likelihoods, normalizers, chosen):
    score = toy_score(log_likelihoods, 0, normalizers)
    assert (score.chosen, score.correct) == (chosen, chosen == 0)


def test_accuracy_comes_with_its_sample_standard_error():
    result = summarise([toy_score([-1.0, -2.0], gold) for gold in (0, 0, 0, 1)])
    assert (result["accuracy"], result["num_examples"]) == (0.75, 4)
    assert result["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert summarise([toy_score([-1.0, -2.0])])["stderr"] is None


def test_the_majority_is_the_best_constant_answer():
    asked = [
        question("?", ["yes", "no"], 0),
        question("?", ["no", "yes"], 1),
        question("?", ["no", "yes"], 1),
        question("?", ["no", "yes"], 0),
        question("?", ["maybe", "no", "yes"], 0),
    ]
    assert majority_share(asked) == 0.6  # yes
    assert majority_share(asked[3:]) == 1.0  # both are A
    # a text that all choices share is no answer
    assert majority_share([question("?", ["it is"] * 2, gold) for gold in (0, 1)]) == 0.5
    of_first = [QuestionScore(one, (-1.0, *[-2.0] * (len(one.labels) - 1))) for one in asked]
    result = summarise(of_first)
    assert (result["accuracy"], result["majority"], result["beats_majority"]) == (0.6, 0.6, False)


def results_of(scores):
    asked = QuestionSet("toy", "test", "text", [score.question for score in scores], {})
    return task_scores(asked, {"base": scores}).results["base"]


def test_results_are_by_adapter_and_group():
    results = toy_scores(group="sums").results
    assert list(results) == ["base", "law"]
    results["base"] = dict(results["base"])
    groups = results["base"].pop("groups")
    assert results["base"] == {
        "accuracy": 0.5,
        "stderr": 0.5,
        "num_examples": 2,
        "majority": 0.5,
        "beats_majority": False,
        "interval": list(wilson_interval(0.5, 2)),
        "split": "test",
    }
    assert groups == {"sums": {k: v for k, v in results["base"].items() if k != "split"}}
    mixed = [toy_score([-1.0, -2.0], gold, None, name) for gold, name in [(0, "b"), (1, "a")]]
    groups = results_of([*mixed, toy_score([-1.0, -2.0])])["groups"]
    assert [(name, one["accuracy"]) for name, one in groups.items()] == [("a", 0.0), ("b", 1.0)]
    assert results_of([replace(mixed[0], truncated=True)])["num_truncated"] == 1


def test_every_question_has_a_line():
    lines = [json.loads(json.dumps(line)) for line in toy_scores().lines]
    places = [(line["adapter"], line["index"]) for line in lines]
    assert places == [("base", 0), ("base", 1), ("law", 0), ("law", 1)]
    assert lines[0]["question"] == lines[2]["question"] != lines[1].pop("question")
    assert lines[1] == {
        "task": "toy",
        "split": "test",
        "index": 1,
        "adapter": "base",
        "correct": False,
        "chosen": "A",
        "correct_label": "B",
        "scores": [-1.0, -2.0],
    }


def arc(prompt: str, labels: str, gold: int):
    return replace(question(prompt, labels, gold), task="arc_easy", labels=tuple(labels))


def test_moe_peft_is_asked_for_every_label_of_the_task():
    asked = with_all_labels(arc("Answer:", "ABC", gold=1))
    assert asked.labels == ("1", "2", "3", "4", "A", "B", "C", "D", "E")
    assert asked.continuations[0] == " 1"
    assert asked.labels[asked.gold] == "B"
    assert set(asked.contexts) == {"Answer:"}
    digits = with_all_labels(arc("Answer:", "1234", gold=3))
    assert digits.labels[digits.gold] == "4"
    assert set(MOE_PEFT_LABELS) == set(TaskName.__args__) - {"skills"}
    other = replace(arc("Answer:", "ABCD", gold=3), labels=("A", "B", "C", "F"), index=7)
    with pytest.raises(ConfigError, match="arc_easy, question 7, with 'F'"):
        with_all_labels(other)
    with pytest.raises(ConfigError, match=r"compat moe-peft needs a task of arc_easy, .*got toy"):
        with_all_labels(question("?", ["a", "b"]))


def test_moe_peft_scores_the_last_token_of_a_label_after_the_prompt(tiny_tokenizer):
    host = scoring_host(configs={})
    asked = [with_all_labels(arc("Please choose:", "ABCD", 0))]
    scorer = Scorer(host, tiny_tokenizer, [None], compat="moe-peft")
    (score,) = score_questions(scorer, asked)[None]
    prompt = torch.tensor([tiny_tokenizer("Please choose:")["input_ids"]])
    log_probs = host(prompt).logits[0, -1].log_softmax(-1)
    last = [tiny_tokenizer(text)["input_ids"][-1] for text in asked[0].continuations]
    assert len(tiny_tokenizer(" 1")["input_ids"]) == 2
    assert score.log_likelihoods == pytest.approx(log_probs[last].tolist(), abs=1e-8)
