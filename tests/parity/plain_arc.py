"""ARC-Easy scored with transformers alone: a choice at a time, no padding, float32.

By hand, against the answers of `loraloom eval`:

    python -m tests.parity.plain_arc --model smollm2-135m --data DIR/test.jsonl --limit 200
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_rows(path: Path, limit: int | None) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[:limit]]


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


def load(directory: str):
    """A model and its tokenizer, from a directory or the small model's package."""
    if directory != "smollm2-135m":
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ), AutoTokenizer.from_pretrained(directory)
    from loraloom.models.loading import load_base_model  # it knows where the GGUF file is

    return load_base_model(directory, "float32")


def main() -> None:
    """Print how many of the choices agree, and the largest difference of a score."""
    from loraloom.cli.main import main as loraloom

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scoring", default="text")
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    rows = read_rows(given.data, given.limit)
    model, tokenizer = load(given.model)
    plain = [score(model, tokenizer, row, given.scoring) for row in rows]
    with tempfile.TemporaryDirectory() as directory:
        lines = Path(directory) / "lines.jsonl"
        words = f"eval --base-model {given.model} --task arc_easy --scoring {given.scoring}".split()
        files = ["--data", str(given.data), "--per-question", str(lines), "--no-cache"]
        assert loraloom([*words, *files, "--device", "cpu", "--limit", str(len(rows))]) == 0
        answers = [json.loads(line) for line in lines.read_text().splitlines()]
    same = 0
    for row, scores, answer in zip(rows, plain, answers, strict=True):
        same += answer["chosen"] == row["choices"]["label"][scores.index(max(scores))]
    largest = max(
        abs(one - other)
        for scores, answer in zip(plain, answers, strict=True)
        for one, other in zip(scores, answer["scores"], strict=True)
    )
    print(f"same choice on {same} of {len(rows)} questions; scores differ by at most {largest:.1e}")


if __name__ == "__main__":
    main()
