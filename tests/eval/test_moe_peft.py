from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraloom.config.data import TaskName
from loraloom.errors import ConfigError, DataError
from loraloom.eval import moe_peft
from loraloom.eval.protocol import score_questions
from tests.eval.scoring import question, scoring_host


def arc(prompt: str, labels: str, gold: int):
    return replace(question(prompt, labels, gold), task="arc_easy", labels=tuple(labels))


def test_every_label_of_the_task_is_offered():
    asked = moe_peft.with_all_labels(arc("Answer:", "ABC", gold=1))
    assert asked.labels == ("1", "2", "3", "4", "A", "B", "C", "D", "E")
    assert asked.continuations[0] == " 1"
    assert asked.labels[asked.gold] == "B"
    assert set(asked.contexts) == {"Answer:"}


def test_labels_of_digits_are_found_too():
    asked = moe_peft.with_all_labels(arc("Answer:", "1234", gold=3))
    assert asked.labels[asked.gold] == "4"


def test_the_last_token_of_a_label_is_scored_after_the_prompt(tiny_tokenizer):
    host = scoring_host(configs={})
    asked = [moe_peft.with_all_labels(arc("Please choose:", "ABCD", 0))]
    (score,) = score_questions(
        host, tiny_tokenizer, asked, [None], encode=moe_peft.encode_last_tokens
    )[None]
    prompt = torch.tensor([tiny_tokenizer("Please choose:")["input_ids"]])
    log_probs = host(prompt).logits[0, -1].log_softmax(-1)
    last = [tiny_tokenizer(text)["input_ids"][-1] for text in asked[0].continuations]
    assert len(tiny_tokenizer(" 1")["input_ids"]) == 2
    assert score.log_likelihoods == pytest.approx(log_probs[last].tolist(), abs=1e-8)


def test_a_task_that_moe_peft_lacks_is_an_error():
    with pytest.raises(
        ConfigError, match=r"needs a task that MoE-PEFT has \(arc_easy, .*got skills"
    ):
        moe_peft.check_tasks(["arc_easy", "skills"])


def test_all_other_tasks_have_a_list():
    assert set(moe_peft.LABELS) == set(TaskName.__args__) - {"skills"}


def test_a_label_that_moe_peft_does_not_ask_for_is_an_error():
    asked = replace(arc("Answer:", "ABCD", gold=3), labels=("A", "B", "C", "F"), index=7)
    with pytest.raises(DataError, match=r"arc_easy, question 7: its answer must be .* got 'F'"):
        moe_peft.with_all_labels(asked)
