"""An empty directory in which the commands and programs of each document run.

It contains `examples/`, and tiny random models by the names of those that the documents use.
"""

import shutil
from pathlib import Path

import pytest
import torch

from loraloom.base import loading
from loraloom.data import skills
from loraloom.eval import statistics
from tests.conftest import build_tokenizer
from tests.tiny import tiny_model

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MODELS = ("smollm2-135m", "tiny-base", "HuggingFaceTB/SmolLM2-135M-Instruct")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def world(models, tmp_path, monkeypatch, methods_as_before):
    """The working directory of a document, which has nothing but examples and models."""
    shutil.copytree(models, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setattr(loading, "SMALL_MODEL", "")
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 100)
    for numbers in (skills.QUESTIONS_PER_SKILL, skills.QUESTIONS_IN_A_LAND):
        for split in numbers:
            monkeypatch.setitem(numbers, split, 2)
    return tmp_path / "world"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A directory with the models, and with examples that train for few steps."""
    directory = tmp_path_factory.mktemp("models")
    examples = shutil.copytree(EXAMPLES, directory / "examples")
    run_file = (examples / "skills.yaml").read_text()
    (examples / "skills.yaml").write_text(run_file.replace("16, max_steps: 20", "4, max_steps: 2"))
    rows = (examples / "support.jsonl").read_text().splitlines(keepends=True)
    (examples / "support.jsonl").write_text("".join(rows[:80]))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    sizes |= {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of 4-bit weights
    model = tiny_model(dtype=torch.float32, **sizes)
    model.generation_config.eos_token_id = [*range(2, 60)]  # answers are short
    for name in MODELS:
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory
