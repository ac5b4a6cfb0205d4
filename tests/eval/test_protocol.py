from __future__ import annotations

import pytest
import torch

from loraloom.errors import AdapterError, DataError
from loraloom.eval.protocol import score_accuracy, score_questions
from tests.eval.scoring import (
    limit_rows,
    plain_log_likelihoods,
    question,
    scoring_host,
    some_questions,
)
from tests.tiny import ALL_FAMILIES, METHODS

EVERYBODY = [None, *METHODS]


def assert_equals_plain(host, tokenizer, adapters, tolerance=1e-8, **options):
    questions = some_questions()
    scores = score_questions(host, tokenizer, questions, adapters, **options)
    for name in adapters:
        for asked, score in zip(questions, scores[name], strict=True):
            plain = plain_log_likelihoods(host, tokenizer, asked, name)
            assert score.question is asked
            assert score.log_likelihoods == pytest.approx(plain, abs=tolerance)


@pytest.mark.parametrize("max_tokens", [1, 200, None])
def test_scores_are_those_of_one_sequence_at_a_time(tiny_tokenizer, max_tokens):
    host = scoring_host()
    assert_equals_plain(host, tiny_tokenizer, EVERYBODY, max_tokens_per_batch=max_tokens)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_scores_are_exact_in_every_family(tiny_tokenizer, family):
    host = scoring_host(family, {"mixlora": METHODS["mixlora"]})
    assert_equals_plain(host, tiny_tokenizer, [None, "mixlora"], tolerance=1e-5)


def test_scores_are_exact_in_float32(tiny_tokenizer):
    host = scoring_host(dtype=torch.float32)
    assert_equals_plain(host, tiny_tokenizer, EVERYBODY, tolerance=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_sliding_window_is_kept(tiny_tokenizer, family):
    host = scoring_host(family, {}, sliding_window=8)
    assert_equals_plain(host, tiny_tokenizer, [None], tolerance=1e-5)


def test_eager_attention_gives_the_same_scores(tiny_tokenizer):
    host = scoring_host()
    host.model.set_attn_implementation("eager")
    assert_equals_plain(host, tiny_tokenizer, [None, "lora"], tolerance=1e-5)


def test_together_is_as_alone(tiny_tokenizer):
    host = scoring_host()
    together = score_questions(host, tiny_tokenizer, some_questions(), EVERYBODY)
    for name in EVERYBODY:
        alone = score_questions(host, tiny_tokenizer, some_questions(), [name])[name]
        for one, other in zip(together[name], alone, strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-10)


def test_a_diverged_adapter_leaves_its_neighbours_alone(tiny_tokenizer):
    host = scoring_host()
    before = score_questions(host, tiny_tokenizer, some_questions(), ["lora", "mixlora"])
    for parameter in host.adapters["mixlora"].parameters():
        parameter.data.fill_(torch.nan)
    after = score_questions(host, tiny_tokenizer, some_questions(), ["lora", "mixlora"])
    assert after["lora"] == before["lora"]
    assert not any(score.finite for score in after["mixlora"])


def test_batches_stay_within_their_tokens(tiny_tokenizer, monkeypatch):
    host = scoring_host()
    sizes, hidden = [], host.hidden
    monkeypatch.setattr(
        host,
        "hidden",
        lambda ids, *args, **rest: sizes.append(ids.numel()) or hidden(ids, *args, **rest),
    )
    questions = [question(f"Question {n}:" + " one" * n, ["A", "B"], index=n) for n in range(12)]
    score_questions(host, tiny_tokenizer, questions, [None, "lora"], max_tokens_per_batch=256)
    assert len(sizes) > 2
    assert max(sizes) <= 256


def test_progress_is_told_after_each_batch(tiny_tokenizer):
    told = []
    score_questions(
        scoring_host(),
        tiny_tokenizer,
        some_questions(),
        ["lora", None],
        max_tokens_per_batch=1,
        on_progress=told.append,
    )
    assert sorted(told) == [[0], [1], [2], [3], [4]]


def test_evaluation_has_no_dropout_and_leaves_the_mode_as_it_was(tiny_tokenizer):
    config = METHODS["lora"].model_copy(update={"dropout": 0.5})
    host = scoring_host(configs={"lora": config})
    quiet = score_questions(host, tiny_tokenizer, some_questions(), ["lora"])
    host.train()
    assert score_questions(host, tiny_tokenizer, some_questions(), ["lora"]) == quiet
    assert host.training
    assert all(parameter.grad is None for parameter in host.adapters["lora"].parameters())


def test_the_mode_comes_back_after_an_error(tiny_tokenizer):
    host = scoring_host().train()
    with pytest.raises(AdapterError, match="got 'nobody'"):
        score_questions(host, tiny_tokenizer, some_questions(), ["nobody"])
    assert host.training


def test_a_long_context_is_cut_from_the_left(tiny_tokenizer):
    host = scoring_host(max_position_embeddings=16)
    long, short = question("yes no " * 20 + "Answer:", ["no", "yes"]), question("?", ["no", "yes"])
    scores = score_questions(host, tiny_tokenizer, [long, short], [None])[None]
    assert [score.truncated for score in scores] == [True, False]
    kept, answers = (tiny_tokenizer(text)["input_ids"] for text in (long.contexts[0], " no"))
    tokens = torch.tensor([kept + answers])[:, -17:]
    log_probs = host(tokens[:, :-1]).logits[0].log_softmax(-1)
    scored = log_probs.gather(1, tokens[0, 1:, None])[-len(answers) :]
    assert scores[0].log_likelihoods[0] == pytest.approx(float(scored.sum()), abs=1e-8)


def test_a_choice_that_does_not_fit_is_an_error(tiny_tokenizer):
    host = scoring_host(max_position_embeddings=16)
    with pytest.raises(DataError, match="toy, question 7: a choice must have 1 to 16 tokens, got"):
        score_questions(host, tiny_tokenizer, [question("?", ["one " * 30], index=7)], [None])


def test_accuracies_are_shares_of_right_answers(tiny_tokenizer):
    host = scoring_host()
    scores = score_questions(host, tiny_tokenizer, some_questions(), [None, "dora"])
    accuracies = score_accuracy(host, tiny_tokenizer, some_questions(), [None, "dora"])
    for name, accuracy in accuracies.items():
        assert accuracy == sum(score.correct for score in scores[name]) / 5


def test_no_adapters_give_no_scores(tiny_tokenizer):
    assert score_questions(scoring_host(), tiny_tokenizer, some_questions(), []) == {}


def test_many_adapters_stay_within_the_tokens_too(tiny_tokenizer, monkeypatch):
    host, asked = scoring_host(), some_questions()[:1]
    expected = score_questions(host, tiny_tokenizer, asked, EVERYBODY)
    sizes, hidden = [], host.hidden
    monkeypatch.setattr(
        host,
        "hidden",
        lambda ids, *args, **rest: sizes.append(ids.numel()) or hidden(ids, *args, **rest),
    )
    scores = score_questions(host, tiny_tokenizer, asked, EVERYBODY)
    assert scores == expected
    (of_all,) = sizes
    sizes.clear()
    halved = score_questions(host, tiny_tokenizer, asked, EVERYBODY, of_all // 2)
    assert len(sizes) > 1
    assert max(sizes) <= of_all // 2
    for name in EVERYBODY:
        (one,), (other,) = halved[name], expected[name]
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-10)


@pytest.mark.parametrize("most", [5, 1])
def test_what_does_not_fit_into_memory_is_scored_in_parts(tiny_tokenizer, monkeypatch, most):
    host = scoring_host()
    expected = score_questions(host, tiny_tokenizer, some_questions()[:4], EVERYBODY)
    seen = limit_rows(monkeypatch, most)
    scores = score_questions(host, tiny_tokenizer, some_questions()[:4], EVERYBODY)
    assert max(seen) <= most
    assert len(seen) > 1
    for name in EVERYBODY:
        for one, other in zip(scores[name], expected[name], strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-10)


def test_a_question_that_does_not_fit_into_memory_is_an_error(tiny_tokenizer, monkeypatch):
    limit_rows(monkeypatch, 0)
    with pytest.raises(DataError, match=r"a row of \d+ tokens to be scored must fit into memory"):
        score_questions(scoring_host(), tiny_tokenizer, some_questions(), EVERYBODY)
