import pytest
import torch

from loraloom.data.tokens import NO_LOSS, Example, TokenPair
from loraloom.errors import DataError
from loraloom.generation import scoring
from loraloom.generation.scoring import example_row, label_log_probs, score_rows
from loraloom.host.host import Host
from tests.eval.scoring import limit_rows, record_forwards
from tests.tiny import METHODS, tiny_host
from tests.training.toy import toy_examples, toy_host


def scores_alone(host, name, example):
    """log p of a row's labels, and whether each is the likeliest, from that row's own logits."""
    ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
    log_p = host(ids, adapters=[name]).logits[0, :-1].log_softmax(-1).detach()
    learnt = labels != NO_LOSS
    picked = log_p[learnt].gather(1, labels[learnt, None])[:, 0]
    return picked, log_p[learnt].argmax(-1) == labels[learnt]


@pytest.fixture
def requests():
    """Rows of several lengths, whose adapters are mixed."""
    names = [None, "mixlora", "lora", None, "mixdora", "lora"]
    return list(zip(names, toy_examples(len(names), longest=12), strict=True))


def test_scores_come_in_the_order_of_the_requests(requests, monkeypatch):
    host = tiny_host(configs=METHODS)
    monkeypatch.setattr(scoring, "tokens_per_batch", lambda host: 24)
    for values, (name, example) in zip(label_log_probs(host, requests), requests, strict=True):
        torch.testing.assert_close(values, scores_alone(host, name, example)[0])


def test_with_longrope_rows_lie_apart_by_their_positions(monkeypatch):
    host, shapes = tiny_host(configs={}), record_forwards(monkeypatch)
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 6}
    monkeypatch.setattr(host.config, "rope_parameters", host.config.rope_parameters | rope)
    choices = scoring.make_rows([TokenPair([1] * 3, [n, 4, 5, 6]) for n in (2, 3)], shared=True)
    others = [example_row(one) for one in (Example((5,) * n, (5,) * n, 1) for n in (6, 7))]
    score_rows(host, [(None, row) for row in (*choices, *others)])
    assert sorted(shapes) == [(1, 7), (2, 9)]


@pytest.mark.parametrize("others", [0, 1])
def test_a_row_without_labels_has_no_scores(others):
    host = toy_host()
    blank = (None, Example((5, 6), (NO_LOSS, NO_LOSS), 0))
    full = (None, Example((5, 6), (5, 6), 1))
    values = label_log_probs(host, [blank, *[full] * others])
    assert [len(one) for one in values] == [0, 1][: 1 + others]


def test_scoring_has_no_dropout_and_leaves_the_mode_as_it_is():
    host = toy_host()
    host.add("a", METHODS["lora"].model_copy(update={"dropout": 0.5}))
    rows = [("a", example) for example in toy_examples(3)]
    calm = label_log_probs(host, rows)
    assert not host.training
    host.train()
    for values, expected in zip(label_log_probs(host, rows), calm, strict=True):
        assert torch.equal(values, expected)
        assert not values.requires_grad
    assert host.training
    assert host.adapter("a").training


@pytest.mark.parametrize("most", [3, 1])
def test_what_does_not_fit_into_memory_is_scored_in_parts(requests, monkeypatch, most):
    host = tiny_host(configs=METHODS)
    expected = label_log_probs(host, requests)
    seen = limit_rows(monkeypatch, most)
    for values, other in zip(label_log_probs(host, requests), expected, strict=True):
        torch.testing.assert_close(values, other)
    assert max(seen) <= most
    assert sum(seen) == len(requests)


def test_a_row_that_does_not_fit_into_memory_is_an_error(requests, monkeypatch):
    limit_rows(monkeypatch, 0)
    with pytest.raises(DataError, match=r"a row of \d+ tokens to be scored does not fit"):
        label_log_probs(tiny_host(configs=METHODS), requests)


def test_routing_is_told_of_real_tokens_by_adapter(requests, monkeypatch):
    host = tiny_host(configs=METHODS)
    rows = [(name, example_row(example)) for name, example in requests]
    routed = []
    score_rows(host, rows, on_routing=routed.append)
    assert sorted(one.adapter for one in routed) == ["mixdora", "mixlora"]
    for one in routed:
        (place,) = one.places
        assert rows[place] == (one.adapter, one.rows[0])
        alone = Host.hidden(host, torch.tensor([one.rows[0].input_ids]), None, [one.adapter])
        for layer, expected in zip(one.routing, alone.routing[one.adapter], strict=True):
            assert torch.equal(layer.selected_experts, expected.selected_experts)
