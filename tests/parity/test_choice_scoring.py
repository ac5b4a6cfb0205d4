"""`loraloom eval` gives the answers of a script that scores ARC-Easy with transformers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraloom.cli import eval as verb
from loraloom.cli import main as cli
from tests.generation.saved import save_tiny

TOLERANCE = 1e-4


def ask(row: dict, scoring: str) -> tuple[str, list[str], list[int]]:
    """Prompt, continuations and what to divide their log-likelihoods by."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    if scoring == "text":
        prompt = f"Question: {row['question']}\nAnswer:"
        return prompt, [" " + text for text in texts], [len(text) for text in texts]
    listed = " ".join(f"({label}) {text}" for label, text in zip(labels, texts, strict=True))
    prompt = (
        f"Please choose the correct answer to the question: {row['question']} {listed}\nAnswer:"
    )
    return prompt, [" " + label for label in labels], [1] * len(labels)


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt: str, continuation: str) -> float:
    ids = tokenizer(prompt + continuation, return_tensors="pt")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def score(model, tokenizer, row: dict, scoring: str) -> list[float]:
    prompt, continuations, lengths = ask(row, scoring)
    return [
        log_likelihood(model, tokenizer, prompt, continuation) / length
        for continuation, length in zip(continuations, lengths, strict=True)
    ]


def evaluated(base_model: str, data: Path, scoring: str, limit: int, lines: Path) -> list[dict]:
    """Run `loraloom eval` and read its line for each question."""
    words = f"--task arc_easy --scoring {scoring} --limit {limit} --device cpu".split()
    files = ["--data", str(data), "--per-question", str(lines)]
    assert cli.main(["eval", "--base-model", base_model, *words, *files]) == 0
    return [json.loads(line) for line in lines.read_text().splitlines()]


def assert_same_answers(answers: list[dict], rows: list[dict], plain: list[list[float]]) -> None:
    assert len(answers) == len(rows)
    for answer, row, scores in zip(answers, rows, plain, strict=True):
        assert answer["scores"] == pytest.approx(scores, abs=TOLERANCE)
        assert answer["correct_label"] == row["answerKey"]
        near = sorted(scores)[-1] - sorted(scores)[-2] < 2 * TOLERANCE
        assert near or answer["chosen"] == row["choices"]["label"][scores.index(max(scores))]


@pytest.fixture
def arc_easy(shared_dir, monkeypatch) -> Path:
    monkeypatch.setitem(cli.VERBS, "eval", (verb.evaluate, "Score."))
    return shared_dir / "data" / "arc_easy"


@pytest.mark.parametrize("scoring", ["label", "text"])
def test_a_tiny_model_answers_as_in_plain_transformers(arc_easy, tmp_path, scoring):
    base = save_tiny(tmp_path, max_position_embeddings=1024) / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (arc_easy / "test.jsonl").read_text().splitlines()[:12]]
    plain = [score(model, tokenizer, row, scoring) for row in rows]
    answers = evaluated(str(base), arc_easy, scoring, 12, tmp_path / "lines.jsonl")
    assert_same_answers(answers, rows, plain)
