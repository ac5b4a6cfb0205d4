"""Rows of all methods share steps, and each says what it says alone."""

import random
import weakref
from dataclasses import replace
from unittest.mock import create_autospec

import pytest
import torch

from loraloom.errors import DataError
from loraloom.generation import engine as engine_module
from loraloom.generation.engine import Engine
from loraloom.generation.prompts import check_token_ids
from loraloom.generation.request import RequestError, Share
from loraloom.generation.runner import BLOCK_TOKENS, PrefixCache
from loraloom.generation.sampling import JsonConstraint, choose_tokens
from loraloom.generation.scheduler import EngineLimits
from loraloom.host.decoding import Decoding, TokenStates
from tests.generation.asking import TEXTS, alone, answers, finish, request, submit
from tests.generation.conftest import NAMES, SIZES
from tests.tiny import METHODS, tiny_host


def requests_of_all(tokenizer, **settings):
    return [
        request(tokenizer, text, name, place, **settings)
        for place, (text, name) in enumerate(zip(TEXTS * 3, NAMES, strict=False))
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.8},
    ],
)
def test_text_is_that_of_generate_alone_whatever_shares_the_batch(
    make_engine, tiny_tokenizer, settings
):
    engine, asked = make_engine(), requests_of_all(tiny_tokenizer, **settings)
    expected = alone(engine, tiny_tokenizer, asked)
    assert answers(engine, asked) == expected
    shuffled = list(range(len(asked)))
    random.Random(1).shuffle(shuffled)
    again = answers(engine, [asked[place] for place in shuffled])  # prompts are remembered now
    assert again == [expected[place] for place in shuffled]
    assert any(name == "prompt_tokens_cached" for name, *_ in engine.counts)


def test_rows_that_do_not_fit_wait_and_are_computed_again(make_engine, tiny_tokenizer):
    engine = make_engine(cache_tokens=60)
    asked = [request(tiny_tokenizer, "one", name, max_new_tokens=20) for name in NAMES[:5]]
    expected = alone(engine, tiny_tokenizer, asked)
    under_way = submit(engine, *asked)
    while engine.step():
        assert engine.gauges()["cache_tokens_used"] + engine.gauges()["cache_tokens_kept"] <= 60
    assert engine.counts["preemptions",] > 0
    assert [one.text for one in under_way] == expected


@pytest.mark.parametrize(
    ("settings", "late"),
    [
        ({}, {"adapter": "dora"}),
        ({"temperature": 0.9, "seed": 4}, {"adapter": "lora", "tenant": "late"}),
    ],
)
def test_rows_of_one_who_has_them_all_give_way_and_say_what_they_say_alone(
    make_engine, tiny_tokenizer, settings, late
):
    engine = make_engine(max_rows=3)
    many = [
        request(tiny_tokenizer, text, "lora", place, max_new_tokens=30, ignore_end=True)
        for place, text in enumerate([*TEXTS[:2], *TEXTS[:2]])
    ]
    many = [replace(one, sampling=one.sampling.model_copy(update=settings)) for one in many]
    expected = [answers(make_engine(), [one])[0] for one in many]
    under_way = submit(engine, *many)
    for _ in range(5):
        engine.step()
    (other,) = submit(engine, request(tiny_tokenizer, "one", max_new_tokens=2, **late))
    num_steps = 0
    while not other.pieces or other.pieces[-1].finish_reason is None:
        engine.step()
        num_steps += 1
    assert num_steps <= 20
    assert engine.counts["preemptions",] == 1
    finish(engine)
    assert [one.text for one in under_way] == expected


def test_customers_know_nothing_of_one_anothers_prompts(make_engine, tiny_tokenizer):
    engine, known = make_engine(), []
    for tenant in ("a", "b", "b"):
        before = engine.counts["prompt_tokens_cached", "base"]
        answers(engine, [request(tiny_tokenizer, TEXTS[2], tenant=tenant)])
        known.append(engine.counts["prompt_tokens_cached", "base"] > before)
    assert known == [False, False, True]


def test_long_prompts_are_read_in_pieces_between_decoding_steps(make_engine, tiny_tokenizer):
    engine = make_engine(prefill_tokens=8)
    (short,) = submit(engine, request(tiny_tokenizer, "one", "lora", max_new_tokens=20))
    engine.step()
    long = request(tiny_tokenizer, TEXTS[2] * 2, "mixlora", max_new_tokens=3)
    (late,) = submit(engine, long)
    seen = []
    while not late.events:
        before = len(short.row.new_ids)
        engine.step()
        seen.append(len(short.row.new_ids) - before)
    assert len(seen) > 3
    assert set(seen[:-1]) == {1}
    finish(engine)
    assert [late.text] == alone(engine, tiny_tokenizer, [long])


def test_layers_with_running_states_are_served_without_remembering_prompts(tiny_tokenizer):
    host = tiny_host("lfm2", METHODS, torch.float32, **SIZES)
    limits = EngineLimits(max_rows=8, cache_tokens=1024, prefill_tokens=16)
    engine = Engine(host, tiny_tokenizer, limits)
    asked = [request(tiny_tokenizer, TEXTS[2], name) for name in (*METHODS, None, "mixlora")]
    assert answers(engine, asked) == alone(engine, tiny_tokenizer, asked)
    assert engine.gauges()["cache_tokens_kept"] == 0


def test_prompts_that_begin_alike_are_read_once_for_each_adapter(make_engine, tiny_tokenizer):
    engine = make_engine()
    asked = [request(tiny_tokenizer, TEXTS[2], name) for name in ("lora", "lora", "dora")]
    assert answers(engine, asked) == alone(engine, tiny_tokenizer, asked)
    length = len(asked[0].prompt_ids)
    assert length - 16 <= engine.counts["prompt_tokens_cached", "lora"] < length
    assert engine.counts["prompt_tokens_cached", "dora"] == 0


def test_weights_that_changed_meet_no_states_of_before(tiny_tokenizer):
    host = tiny_host(configs={"a": METHODS["mixlora"]}, dtype=torch.float32, **SIZES)
    engine = Engine(host, tiny_tokenizer, EngineLimits(8, 1024, 16))
    asked = [request(tiny_tokenizer, TEXTS[2], "a")]
    before = answers(engine, asked)
    with torch.no_grad():
        for parameter in host.adapters["a"].parameters():
            parameter.mul_(2)
    assert answers(engine, asked) == alone(engine, tiny_tokenizer, asked) != before


def test_an_adapter_that_goes_takes_what_was_made_of_it_along(tiny_tokenizer):
    host = tiny_host(configs={"a": METHODS["mixlora"], "b": METHODS["mixlora"]}, **SIZES)
    engine = Engine(host, tiny_tokenizer, EngineLimits(8, 1024, 16))
    answers(engine, [request(tiny_tokenizer, text, name) for text in TEXTS for name in "ab"])
    gone = weakref.ref(host.adapters["b"])
    engine.forget(host.adapters["b"])
    host.remove("b")
    finish(engine)
    assert gone() is None


def test_an_adapter_that_diverged_fails_alone(tiny_tokenizer):
    host = tiny_host(dtype=torch.float32, **SIZES)
    with torch.no_grad():
        next(iter(host.adapters["mixlora"].parameters())).fill_(torch.nan)
    engine = Engine(host, tiny_tokenizer, EngineLimits(8, 1024, 16))
    names = [None, *METHODS]
    requests = [request(tiny_tokenizer, "one", name) for name in names]
    asked = submit(engine, *(replace(one, owner=f"public {one.owner}") for one in requests))
    finish(engine)
    failed = {name: one.error for name, one in zip(names, asked, strict=True) if one.error}
    assert list(failed) == ["mixlora"]
    assert "must be finite, got NaN from adapter 'public mixlora'" in str(failed["mixlora"])


def test_an_adapter_that_can_not_read_fails_alone(make_engine, host, tiny_tokenizer, monkeypatch):
    engine = make_engine()
    asked = requests_of_all(tiny_tokenizer)[5:10]
    expected = alone(engine, tiny_tokenizer, asked)
    real = host.prefill

    def broken(input_ids, attention_mask, adapters, *rest):
        if "mola" in adapters:
            raise RuntimeError("a fault of this adapter")
        return real(input_ids, attention_mask, adapters, *rest)

    monkeypatch.setattr(host, "prefill", broken)
    under_way = submit(engine, *asked)
    finish(engine)
    for one, text in zip(under_way, expected, strict=True):
        if one.request.adapter == "mola":
            assert str(one.error) == "a fault of this adapter"
        else:
            assert (one.error, one.text) == (None, text)


def test_rows_that_could_not_be_decoded_end(make_engine, host, tiny_tokenizer, monkeypatch):
    engine = make_engine()
    asked = requests_of_all(tiny_tokenizer)[:2]
    with monkeypatch.context() as patch:
        patch.setattr(host, "decode", lambda *_: 1 / 0)
        under_way = submit(engine, *asked)
        finish(engine)
    assert [str(one.error) for one in under_way] == ["division by zero"] * 2
    assert answers(engine, asked) == alone(engine, tiny_tokenizer, asked)


def test_rows_are_halved_until_the_engine_is_idle_when_memory_runs_out(
    make_engine, host, tiny_tokenizer, monkeypatch
):
    engine, sizes, real = make_engine(max_rows=4), [], host.decode

    def full_once(session, *rest):
        sizes.append(len(session.adapters))
        if 4 in sizes and len(sizes) == sizes.index(4) + 1:
            raise torch.OutOfMemoryError
        return real(session, *rest)

    monkeypatch.setattr(host, "decode", full_once)
    asked = [request(tiny_tokenizer, "one", max_new_tokens=24, ignore_end=True)] * 8
    answers(engine, asked)
    assert max(sizes[sizes.index(4) + 1 :]) == 2
    answers(engine, asked[:4])  # an engine that was idle begins as at first
    assert sizes[-1] == 4


@pytest.mark.parametrize("what", ["read", "join", "decode"])
def test_a_row_that_memory_has_no_room_for_beside_others_waits(
    make_engine, tiny_tokenizer, monkeypatch, what
):
    asked = [request(tiny_tokenizer, "one " * n, max_new_tokens=6) for n in (1, 8, 9)]
    expected = answers(make_engine(max_rows=4), asked)
    engine = make_engine(max_rows=4, prefill_tokens=8)
    real, most = getattr(engine._runner, what), []

    def limited(*args):
        most.append(len(engine._served))
        if len(engine._served) > 1:
            raise torch.OutOfMemoryError
        return real(*args)

    monkeypatch.setattr(engine._runner, what, limited)
    assert answers(engine, asked) == expected
    assert max(most) > 1


def test_rows_are_halved_when_there_is_no_room_to_choose_their_tokens(
    make_engine, tiny_tokenizer, monkeypatch
):
    asked = [request(tiny_tokenizer, "one " * n, temperature=1.0, seed=n) for n in (1, 8, 9)]
    expected = answers(make_engine(max_rows=4), asked)
    sizes = []

    def limited(logits, *rest):
        sizes.append(len(logits))
        if len(logits) > 1:
            raise torch.OutOfMemoryError
        return choose_tokens(logits, *rest)

    monkeypatch.setattr(engine_module, "choose_tokens", limited)
    assert answers(make_engine(max_rows=4), asked) == expected
    assert max(sizes) > 1


def test_a_grammar_that_breaks_ends_its_own_request_alone(make_engine, tiny_tokenizer):
    class Broken:
        def compute_logit_bias(self):
            raise ValueError("too complex")

    engine = make_engine()
    asked = [request(tiny_tokenizer, text, "lora") for text in TEXTS[:3]]
    expected = answers(engine, asked)
    asked[1] = replace(asked[1], constraint=JsonConstraint(Broken()))
    first, broken, last = submit(engine, *asked)
    finish(engine)
    assert str(broken.error) == "too complex"
    assert [first.text, last.text] == [expected[0], expected[2]]


def test_requests_that_take_too_long_end_and_let_their_adapters_go(make_engine, tiny_tokenizer):
    events, gone = [], []
    engine = make_engine(max_request_s=0.0)
    engine.submit(request(tiny_tokenizer, "the sky", "lora"), events.append, lambda: gone.append(1))
    finish(engine)
    assert events[0].code == "timeout"
    assert gone == [1]


def test_tokens_beyond_the_embedding_are_refused(make_engine, host, tiny_tokenizer):
    """Some checkpoints have special tokens of images there."""
    engine, beyond = make_engine(), SIZES["vocab_size"]
    message = f"prompt: token ids must be below {beyond}, got {beyond}"
    with pytest.raises(DataError, match=message):
        submit(engine, replace(request(tiny_tokenizer, "one"), prompt_ids=[1, beyond]))
    with pytest.raises(DataError, match="below 200, got 300"):
        check_token_ids([1, 300], 200, "prompt")


def test_longrope_ends_where_earlier_keys_change(make_engine, host, tiny_tokenizer, monkeypatch):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 6}
    monkeypatch.setattr(host.config, "rope_parameters", host.config.rope_parameters | rope)
    with pytest.raises(RequestError, match="maximum context length is 6 tokens"):
        submit(make_engine(), request(tiny_tokenizer, "one", max_new_tokens=6))


def test_an_answer_ends_with_its_turn(make_engine, tiny_tokenizer):
    engine, says = make_engine(), {"logit_bias": {1: 100.0}, "turn_end": "<bos>"}
    requests = [request(tiny_tokenizer, "one", ignore_end=one, **says) for one in (False, True)]
    ended, ignored = submit(engine, *requests)
    finish(engine)
    assert (ended.text, ended.pieces[-1].finish_reason, ended.row.new_ids) == ("", "stop", [1])
    assert len(ignored.row.new_ids) == 8


def test_penalties_and_biases_change_what_is_said(make_engine, tiny_tokenizer):
    engine = make_engine()
    plain, biased, penalised = (
        request(tiny_tokenizer, "one", "lora", max_new_tokens=40, **settings)
        for settings in ({}, {"logit_bias": {77: 100.0}}, {"frequency_penalty": 2.0})
    )
    asked = submit(engine, plain, biased, penalised)
    finish(engine)
    assert set(asked[1].row.new_ids) == {77}
    assert len(set(asked[2].row.new_ids)) > len(set(asked[0].row.new_ids))


def assert_are_of_the_model(entries, host, ids):
    """Entries of the last tokens of a text are as in one forward of all of it."""
    expected = host(torch.tensor([ids]), adapters=["mixlora"]).logits[0].detach().log_softmax(-1)
    assert [entry.token for entry in entries] == ids[-len(entries) :]
    for entry, log_probs in zip(entries, expected[-len(entries) - 1 : -1], strict=True):
        values, tokens = log_probs.topk(2)
        assert [token for token, _ in entry.top] == tokens.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert entry.log_prob == pytest.approx(float(log_probs[entry.token]), abs=1e-4)


def test_log_probs_are_those_of_the_model(make_engine, host, tiny_tokenizer):
    engine = make_engine()
    (asked,) = submit(engine, request(tiny_tokenizer, TEXTS[1], "mixlora", num_logprobs=2))
    finish(engine)
    told = [entry for piece in asked.pieces for entry in piece.log_probs]
    assert_are_of_the_model(told, host, [*asked.request.prompt_ids, *asked.row.new_ids])


def test_a_prompt_is_scored_as_it_is_read_and_charged_once(make_engine, host, tiny_tokenizer):
    engine = make_engine(prefill_tokens=8)
    settings = {"scores_prompt": True, "num_logprobs": 2, "max_new_tokens": 1}
    long = request(tiny_tokenizer, TEXTS[2] * 2, "mixlora", **settings)
    answers(engine, [request(tiny_tokenizer, TEXTS[2] * 2, "mixlora", max_new_tokens=1)])
    used = engine._scheduler.used(Share("", "base"))[0]
    (asked,) = submit(engine, long)
    finish(engine)
    charged = engine._scheduler.used(Share("", "base"))[0] - used
    assert charged == len(long.prompt_ids)  # though it is known
    told = [entry for piece in asked.pieces for entry in piece.log_probs][:-1]
    assert_are_of_the_model(told, host, long.prompt_ids)


def test_routers_choose_in_the_engines_steps_and_are_charged(make_engine, host, tiny_tokenizer):
    engine = make_engine()
    ids = tiny_tokenizer(TEXTS[2])["input_ids"]
    choices = [engine.choose(ids, "lora", Share("a", "lora")) for _ in range(3)]
    choices[1].cancel()
    finish(engine)
    assert [one.result().adapter for one in (choices[0], choices[2])] == ["lora", "lora"]
    assert engine._scheduler.used(Share("a", "lora"))[0] == 2 * len(ids)


def test_prompts_that_begin_alike_are_kept_in_a_cache_that_overflows():
    generator, cache = random.Random(0), PrefixCache()
    session = create_autospec(Decoding, instance=True)
    for _ in range(300):
        branches = [generator.randrange(2) for _ in range(generator.randrange(1, 6))]
        prompt = [branch for branch in branches for _ in range(BLOCK_TOKENS)]
        states = torch.tensor(prompt).unsqueeze(1)
        session.states.side_effect = lambda _, start, stop, of=states: TokenStates(
            of[start:stop], [(1, 1)]
        )
        held = cache.find(None, [*prompt, 7])
        assert held is None or torch.equal(held.values, states[: len(held.values)])
        if generator.random() < 0.7:
            cache.remember(session, 0, None, prompt)
            assert torch.equal(cache.find(None, [*prompt, 7]).values, states)
        cache.shrink(generator.randrange(3, 9) * BLOCK_TOKENS)
