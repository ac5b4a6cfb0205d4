"""Which experts read a completion's tokens."""

import pytest
import torch

from tests.generation.asking import TEXTS, finish, request, submit

ROUTED = ("mixlora", ("mixdora", 0.5), "mixlora", "mola", "hydralora", ("mixlora", 1.0), "mixdora")


def routed(tokenizer):
    return [
        request(tokenizer, text, adapter, place, tells_routing=True)
        for place, (text, adapter) in enumerate(zip([*TEXTS, *TEXTS], ROUTED, strict=False))
    ]


def told(asked):
    return [entry for piece in asked.pieces for entry in piece.routing]


def assert_is_what_a_forward_does(host, asked):
    """All tokens of the completion but the last are told as routers meet them in one forward."""
    prompt, new = asked.request.prompt_ids, asked.row.new_ids
    entries = told(asked)
    assert len(entries) == len(new) - 1
    with torch.no_grad():
        routing = host(torch.tensor([[*prompt, *new]]), adapters=[asked.request.adapter]).routing
    (records,) = routing.values()
    for place, (_, choices) in enumerate(entries, start=len(prompt)):
        assert [choice.router for choice in choices] == [one.router for one in records]
        for choice, record in zip(choices, records, strict=True):
            assert choice.num_experts == record.num_experts
            assert choice.experts == record.selected_experts[place].tolist()
            assert choice.weights == pytest.approx(record.routing_weights[place].tolist(), abs=1e-4)


def test_tokens_are_told_as_a_forward_routes_them_whatever_shares_the_batch(
    make_engine, host, tiny_tokenizer
):
    engine = make_engine()
    others = [request(tiny_tokenizer, text, name) for text in TEXTS[:2] for name in ("lora", None)]
    asked = submit(engine, *others, *routed(tiny_tokenizer))[len(others) :]
    finish(engine)
    for one in asked:
        assert_is_what_a_forward_does(host, one)
        assert one.text.startswith("".join(text for text, _ in told(one)))


def test_a_row_that_waited_again_misses_no_token(make_engine, host, tiny_tokenizer):
    engine = make_engine(cache_tokens=60)
    asked = submit(
        engine,
        *(
            request(tiny_tokenizer, "one", adapter, tells_routing=True, max_new_tokens=20)
            for adapter in ROUTED[:5]
        ),
    )
    finish(engine)
    assert engine.counts["preemptions",] > 0
    for one in asked:
        assert_is_what_a_forward_does(host, one)


@pytest.mark.parametrize("adapter", [None, "lora", "vera"])
def test_what_has_no_routers_tells_nothing(make_engine, tiny_tokenizer, adapter):
    engine = make_engine()
    (asked,) = submit(engine, request(tiny_tokenizer, "one", adapter, tells_routing=True))
    finish(engine)
    assert asked.text
    assert told(asked) == []
