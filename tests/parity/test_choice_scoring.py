"""`loraloom eval` gives the answers of a script that scores ARC-Easy with transformers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraloom.cli import eval as verb
from loraloom.cli import main as cli
from tests.generation.saved import save_tiny
from tests.parity.plain_arc import load, read_rows, score

TOLERANCE = 1e-4


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
        best = row["choices"]["label"][scores.index(max(scores))]
        assert near or answer["chosen"] == best


@pytest.fixture
def arc_easy(shared_dir, monkeypatch) -> Path:
    monkeypatch.setitem(cli.VERBS, "eval", (verb.evaluate, "Score."))
    return shared_dir / "data" / "arc_easy"


@pytest.mark.parametrize("scoring", ["label", "text"])
def test_a_tiny_model_answers_as_in_plain_transformers(arc_easy, tmp_path, scoring):
    base = save_tiny(tmp_path, max_position_embeddings=1024) / "base"
    model, tokenizer = load(str(base))
    rows = read_rows(arc_easy / "test.jsonl", limit=40)
    plain = [score(model, tokenizer, row, scoring) for row in rows]
    answers = evaluated(str(base), arc_easy, scoring, 40, tmp_path / "lines.jsonl")
    assert_same_answers(answers, rows, plain)
