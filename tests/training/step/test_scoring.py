from __future__ import annotations

import torch

from loraloom.data.examples import NO_LOSS, Example
from loraloom.training.step import scoring
from loraloom.training.step.scoring import label_log_probs, label_losses
from tests.tiny import METHODS, tiny_host
from tests.training.toy import PAD_ID, toy_examples, toy_host


def test_label_losses_are_in_the_order_of_rows_and_places():
    host = toy_host()
    labels = torch.tensor([[5, 6, NO_LOSS, 7], [NO_LOSS, NO_LOSS, 9, NO_LOSS]])
    hidden_states = torch.randn(2, 4, 32, dtype=torch.float64)
    log_p = host.logits(hidden_states).log_softmax(-1)
    expected = [-log_p[0, 0, 6], -log_p[0, 2, 7], -log_p[1, 1, 9]]
    torch.testing.assert_close(label_losses(host, hidden_states, labels), torch.stack(expected))


def log_probs_alone(host, name, example):
    """log p of a row's labels from the logits of that row by itself."""
    ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
    log_p = host(ids, adapters=[name]).logits[0, :-1].log_softmax(-1)
    learnt = labels != NO_LOSS
    return log_p[learnt].gather(1, labels[learnt, None])[:, 0].detach()


def test_log_probs_come_in_the_order_of_the_rows(monkeypatch):
    host = tiny_host(configs=METHODS)
    names = [None, "mixlora", "lora", None, "mixdora", "lora"]
    rows = list(zip(names, toy_examples(len(names), longest=12), strict=True))
    monkeypatch.setattr(scoring, "MAX_TOKENS_PER_BATCH", 24)
    for values, (name, example) in zip(label_log_probs(host, rows, PAD_ID), rows, strict=True):
        torch.testing.assert_close(values, log_probs_alone(host, name, example))


def test_a_row_without_labels_has_no_log_probs():
    host = toy_host()
    rows = [(None, Example((5, 6), (NO_LOSS, NO_LOSS), 0)), (None, Example((5, 6), (5, 6), 1))]
    assert [len(values) for values in label_log_probs(host, rows, PAD_ID)] == [0, 1]


def test_scoring_has_no_dropout_and_leaves_the_mode_as_it_is():
    host = toy_host()
    host.add("a", METHODS["lora"].model_copy(update={"dropout": 0.5}))
    rows = [("a", example) for example in toy_examples(3)]
    calm = label_log_probs(host, rows, PAD_ID)
    assert not host.training
    host.train()
    for values, expected in zip(label_log_probs(host, rows, PAD_ID), calm, strict=True):
        assert torch.equal(values, expected)
    assert host.training
    assert host.adapter("a").training


def test_what_does_not_fit_into_memory_is_scored_in_parts(monkeypatch):
    host = toy_host()
    rows = [(None, example) for example in toy_examples(5)]
    expected = label_log_probs(host, rows, PAD_ID)
    seen, hidden = [], host.hidden

    def limited(ids, *args):
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        seen.append(len(ids))
        return hidden(ids, *args)

    monkeypatch.setattr(host, "hidden", limited)
    for values, other in zip(label_log_probs(host, rows, PAD_ID), expected, strict=True):
        torch.testing.assert_close(values, other)
    assert sum(seen) == 5
