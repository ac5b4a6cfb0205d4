import json
import re
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraloom.config.task import load_task_config
from loraloom.errors import ConfigError
from loraloom.eval import generated_answers
from loraloom.eval.cache import ScoreCache
from loraloom.eval.evaluation import evaluate, load_question_sets
from loraloom.eval.generated_answers import is_right, load_answer_set, normalize_answer
from tests.eval.scoring import scoring_host
from tests.generation.saved import write_rows

NAMES = [None, "lora", "mixdora"]
ASKED = ["The sky is", "Say one", "Please choose: yes or no", "A red sea"]


@pytest.fixture
def task(tmp_path):
    """Write a task's file."""
    path = tmp_path / "support.yaml"
    return lambda **settings: path.write_text(json.dumps(settings)) and str(path)


@torch.no_grad()
def greedy(host, tokenizer, text, adapter):
    """Answer a prompt by itself, with a forward of the whole text for each token."""
    ids = list(tokenizer(text)["input_ids"])
    start = len(ids)
    while len(ids) < start + 6 and tokenizer.eos_token_id not in ids[start:]:
        ids.append(int(host(torch.tensor([ids]), adapters=[adapter]).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def squad(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@pytest.mark.parametrize("metric", ["exact_match", "contains"])
def test_answers_are_greedy_and_kept(tiny_tokenizer, task, tmp_path, monkeypatch, metric):
    host = scoring_host()
    texts = {n: [greedy(host, tiny_tokenizer, f"{x}\n", n) for x in ASKED] for n in NAMES}
    right = [f"The {texts['lora'][0].upper()}!", "no", texts["mixdora"][2].split()[0], "no"]
    rows = [{"instruction": x, "output": of} for x, of in zip(ASKED, right, strict=True)]
    data = {"dataset": write_rows(tmp_path / "rows.jsonl", *rows), "format": "instruction"}
    file = task(metric=metric, data=data | {"template": "plain"}, sampling={"max_new_tokens": 6})
    options = {"cache": ScoreCache(tmp_path, host)}
    found = evaluate(host, tiny_tokenizer, file, NAMES, **options)
    answered = [line["answer"] for line in found.lines()]
    assert answered == [text for name in NAMES for text in texts[name]]
    for name in NAMES:
        pairs = [[*map(squad, pair)] for pair in zip(texts[name], right, strict=True)]
        whole = [f" {b} " in f" {a} " if metric == "contains" else a == b for a, b in pairs]
        assert found.results[name or "base"]["support"]["accuracy"] == sum(whole) / 4
        assert any(whole) or name != "lora"
    assert f"{metric.replace('_', ' ')} %</td>" in found._repr_html_()
    assert "<p>* significant: p (Holm), of all comparisons, &lt; 0.05<br>" in found._repr_html_()
    assert found.tasks["support"]["split"] is None
    with monkeypatch.context() as patch:
        patch.setattr(generated_answers, "complete", lambda *few, **_: few[2])
        again = evaluate(host, tiny_tokenizer, file, NAMES, **options)  # generates nothing
    assert (again.results, again.num_cached_scores) == (found.results, 12)
    next(iter(host.adapters["lora"].parameters())).data.add_(1)
    assert evaluate(host, tiny_tokenizer, file, NAMES, **options).num_cached_scores == 8


def test_the_last_answer_of_a_chat_is_the_reference(tmp_path, task):
    turns = [{"role": role, "content": role[:1]} for role in ("system", "user", "assistant")]
    chats = ([*turns, *turns[1:]], [*turns[:2], turns[2] | {"content": ""}])
    path = write_rows(tmp_path / "chat.jsonl", *({"messages": chat} for chat in chats))
    data = {"dataset": path, "format": "chat", "on_empty": "skip"}
    ((index, prompt, reference),) = load_answer_set(task(metric="contains", data=data)).rows
    assert (index, list(prompt.content), reference) == (0, [*turns, turns[1]], "a")
    write_rows(tmp_path / "chat.jsonl", {"prompt": chats[0], "completion": [turns[2]]})
    ((_, prompt, reference),) = load_answer_set(task(metric="contains", data=data)).rows
    assert (list(prompt.content), reference) == (chats[0], "a")
    with pytest.raises(ConfigError, match="have no splits"):
        load_question_sets(["skills", task(metric="contains", data=data)], split="test")


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        ("exact_match", " the Cat, sat!", "A cat  sat", True),
        ("exact_match", "+", "+", True),  # nothing else is left
        ("exact_match", "A.", "A", True),
        ("contains", "The answer is (A).", "A", True),
        ("contains", "The answer is A", " (A).", True),
        ("contains", "B is a good choice.", "A", False),
        ("contains", "it is 15", "5", False),
        ("contains", "Soße", "so", False),
        ("contains", "it's «so»", "so", True),
        ("contains", "它是红色的", "红色", True),
        # signs of numbers and code count
        ("exact_match", "-5", "5", False),
        ("exact_match", "1.5", "15", False),
        ("exact_match", "1/2", "12", False),
        ("exact_match", "1,000", "1000", True),
        ("exact_match", "-$5.", "-5", True),
        ("exact_match", "C++", "C", False),
        ("exact_match", "x <= y", "x < y", False),
        ("exact_match", "=> Paris", "Paris", True),
        ("contains", "It is -5.", "5", False),
        ("contains", "It is -5.", "-5", True),
        ("contains", "It is 1.5", "5", False),
        ("contains", "2+3=5", "5", True),
        ("contains", "I like C.", "C++", False),
        ("contains", "I like C++.", "C", False),
        ("contains", "I like C++.", "C++", True),
    ],
)
def test_words_are_compared_as_squad_does_but_for_signs(metric, answer, reference, expected):
    assert is_right(metric, answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The operator is +.", "+", True),
        ("**+**", "+", True),
        ("What?", "?", True),
        ("use <= here", "<=", True),
        ("use <= here", "<", False),
        ("plus", "+", False),
    ],
)
def test_a_reference_of_signs_alone_is_looked_for_as_written(answer, reference, expected):
    assert is_right("contains", answer, reference) == expected
    assert is_right("exact_match", f" {answer}\n", reference) == (answer == reference)


@given(st.text(string.ascii_letters + " .,;:!?'\"()`_*-", max_size=30))
def test_what_has_only_words_is_normalized_as_squad_does(text):
    assert normalize_answer(text) == (squad(text) or text.lower().strip())


@given(st.text(string.ascii_letters + string.digits + string.punctuation + " ", min_size=1))
def test_an_answer_that_is_the_reference_is_right(text):
    for metric in ("exact_match", "contains"):
        assert is_right(metric, text, text), metric


@given(st.decimals(-999, 999, places=2), st.decimals(-999, 999, places=2))
def test_different_numbers_are_not_equal(first, second):
    for metric in ("exact_match", "contains"):
        assert is_right(metric, f"It is {first}."[6:], str(second)) == (str(first) == str(second))


TEXTS = {"dataset": "a.jsonl", "format": "text"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "contains"}, "data is required, but missing"),
        ({"metric": "contains", "data": TEXTS}, "data must be a dataset of format instruction or"),
        ({"metric": "f1", "data": TEXTS}, "metric must be 'exact_match' or 'contains', got 'f1'"),
    ],
)
def test_a_task_that_can_not_be_used_is_an_error(task, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_answer_set(task(**settings))
    with pytest.raises(ConfigError, match="is for evaluation only"):
        load_task_config(task(**settings))
