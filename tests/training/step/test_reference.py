import pytest
import torch

from loraloom.generation.scoring import label_log_probs
from loraloom.training.settings import DpoConfig
from loraloom.training.step import objectives
from loraloom.training.step.objectives import (
    Reference,
    load_reference,
    score_references,
)
from tests.tiny import METHODS, randomise
from tests.training.toy import toy_examples, toy_host


@pytest.fixture
def start(tmp_path):
    """Directory of an adapter that changes the base model's outputs."""
    host = toy_host()
    randomise(host.add("start", METHODS["mixlora"], seed=3), seed=3)
    host.save("start", tmp_path / "start")
    return str(tmp_path / "start")


def test_a_sample_is_asked_for_once(start, monkeypatch):
    host = toy_host()
    base, adapter = Reference(), load_reference(host, DpoConfig(reference=start))
    asked = []

    def counted(host, rows):
        asked.append([(name, example.sample_id) for name, example in rows])
        return label_log_probs(host, rows)

    monkeypatch.setattr(objectives, "label_log_probs", counted)
    examples = toy_examples(4)
    host.train()
    score_references(host, [(base, examples[:2]), (None, examples), (adapter, examples[1:3])])
    score_references(host, [(base, examples[1:]), (adapter, examples[1:3])])
    score_references(host, [(base, examples)])
    name = adapter.adapter_name
    assert asked == [[(None, 0), (None, 1), (name, 1), (name, 2)], [(None, 2), (None, 3)]]
    (expected,) = label_log_probs(host, [(name, examples[2])])
    torch.testing.assert_close(adapter.of([examples[2]])[0], float(expected.sum()))
    assert base.of([examples[2]]) != adapter.of([examples[2]])
