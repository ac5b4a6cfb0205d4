"""The tiny base model of studies."""

import pytest

import loraloom
from loraloom.data import tiny_base
from loraloom.data.skills import generate_skills


def test_the_tiny_base_model_has_a_token_for_each_syllable_of_a_land(tmp_path, monkeypatch):
    rows = generate_skills("train")[:90]
    texts = [f"{row['question']} {row['choices'][row['answer']]}" for row in rows]
    monkeypatch.setattr(tiny_base, "read_texts", lambda: texts)
    tiny_base.main(tmp_path, layers=1, hidden_size=16, steps=2)
    with pytest.raises(SystemExit, match="must be new"):  # what is there is not deleted
        tiny_base.main(tmp_path, steps=2)
    model, tokenizer = loraloom.load_base_model(str(tmp_path))
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (1, 48)
    assert tokenizer.tokenize("Baldan: 42") == ["Bal", "##dan", ":", "4", "##2"]
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(texts).input_ids)


def test_the_tiny_base_model_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_base, "read_texts", lambda: ["the lower card wins 3"] * 64)
    assert tiny_base.make_tiny_base(tmp_path / "a", 200, num_layers=1, hidden_size=16) < 1
