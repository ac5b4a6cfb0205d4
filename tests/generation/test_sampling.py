import random

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraloom.config.fields import checked
from loraloom.data.tokens import NUM_BEFORE, text_of_token
from loraloom.errors import ConfigError
from loraloom.generation.request import GenerationRequest, Row
from loraloom.generation.sampling import SamplingConfig, TextStream, TokenRule, choose_tokens
from loraloom.host.choice import Choice
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()


def draw(logits, rows, **settings):
    """Draw a token for each row from the same logits."""
    requests = [
        GenerationRequest([1], Choice(None), "", SamplingConfig(**settings), row) for row in rows
    ]
    rules = [Row(request, TOKENIZER, [], print).token_rule(len(logits)) for request in requests]
    chosen = choose_tokens(torch.tensor([logits] * len(rules)), rules)
    return torch.tensor([one.token for one in chosen])


def test_draws_follow_the_softmax():
    logits = [0.0, 1.0, 2.0, -1.0]
    counts = draw(logits, range(4000), temperature=1.0).bincount(minlength=4)
    assert counts / 4000 == pytest.approx(torch.tensor(logits).softmax(-1), abs=0.03)


def test_draws_are_from_the_likeliest_only():
    assert set(draw([0.0, 2.0, 1.0, 1.5], range(300), temperature=3.0, top_k=2).tolist()) == {1, 3}
    drawn = draw([0.0, 3.0, 3.0, 0.0], range(300), temperature=1.0, top_p=0.9)
    assert set(drawn.tolist()) == {1, 2}


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.6}], ids=str
)
def test_draws_have_the_distribution_of_transformers(settings):
    num_draws = 5000
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    read = [3, 5, 8]
    sampling = SamplingConfig(temperature=0.7, repetition_penalty=1.3, **settings)
    processors = [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7)]
    processors += [TopKLogitsWarper(top_k) for top_k in [sampling.top_k] if top_k]
    processors.append(TopPLogitsWarper(sampling.top_p))
    scores = logits
    for processor in processors:
        scores = processor(torch.tensor([read]), scores)
    edits = dict.fromkeys(read, (0.0, 1.3))
    draws = [(index + 0.5) / num_draws for index in range(num_draws)]
    rules = [TokenRule(sampling, draw, edits, None) for draw in draws]
    chosen = choose_tokens(logits.expand(num_draws, -1), rules)
    counts = torch.tensor([one.token for one in chosen]).bincount(minlength=40)
    assert counts / num_draws == pytest.approx(scores.softmax(-1)[0], abs=1.5 / num_draws)


def test_the_largest_draw_is_a_token_that_may_follow():
    logits = torch.tensor([[-1e9, 1.0, 1.0, -1e9], [1.0, -1e9, 1.0, -1e9]])
    for settings in ({}, {"top_k": 2}, {"top_p": 0.9}):
        sampling = SamplingConfig(temperature=1.0, **settings)
        allowed = torch.tensor([True, True, True, False])
        rules = [TokenRule(sampling, 1.0, {}, allowed)] * 2
        assert [one.token for one in choose_tokens(logits, rules)] == [2, 2], settings


def test_log_probabilities_are_those_of_the_logits_whatever_the_rules():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, torch.nan]])
    rules = [TokenRule(SamplingConfig(), 0.5, {0: (9.0, 1.0)}, None)] * 2
    chosen, broken = choose_tokens(logits, rules, 2)
    log_probs = logits[0].log_softmax(-1).tolist()
    assert chosen == (0, log_probs[0], [(1, log_probs[1]), (2, log_probs[2])])
    assert broken.token == -1


def test_a_draw_depends_on_seed_and_row_alone():
    logits = [0.0] * 50
    together = draw(logits, [3, 8, 9], temperature=1.0, seed=1)
    assert draw(logits, [8], temperature=1.0, seed=1) == together[1]
    assert not torch.equal(draw(logits, [3, 8, 9], temperature=1.0, seed=2), together)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be greater than or equal to 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be less than or equal to 100"),
        ({"top_p": 1.5, "temperature": 1}, "top_p must be less than or equal to 1, got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be greater than or equal to 1, got 0"),
        ({"top_p": 0.5}, "top_p requires temperature above 0, got top_p 0.5 with temperature 0"),
        ({"top_k": 5}, "top_k requires temperature above 0, got top_k 5"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        checked(SamplingConfig, settings)


def streamed(tokenizer, ids, stop=()):
    """The pieces of a text, up to a stop text."""
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces


def test_pieces_of_any_tokens_are_the_text_of_all(tiny_tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(3, 300) for _ in range(draw.randrange(1, 40))]
        assert "".join(streamed(tiny_tokenizer, ids)) == tiny_tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🦊🦊 and 🐻‍❄️", "a  b\n\n c"])
def test_characters_of_several_bytes_come_whole(tiny_tokenizer, text):
    pieces = streamed(tiny_tokenizer, tiny_tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_ends_before_the_first_stop_text(tiny_tokenizer):
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(draw.choice("abcab \n") for _ in range(30))
        stop = tuple(
            "".join(draw.choice("abc ") for _ in range(draw.randrange(1, 4))) for _ in "xy"
        )
        assert (
            "".join(streamed(tiny_tokenizer, tiny_tokenizer(text)["input_ids"], stop))
            == text[: min([text.index(one) for one in stop if one in text], default=None)]
        )


def test_what_may_begin_a_stop_text_is_held_back(tiny_tokenizer):
    stream = TextStream(tiny_tokenizer, ("END",))
    settled = [
        "".join(stream.push(token) for token in tiny_tokenizer(text)["input_ids"])
        for text in ("so E", "N!")
    ]
    assert settled == ["so ", "EN!"]


def test_a_text_that_goes_on_begins_with_its_space():
    words = {"<s>": 0, "\u2581Once": 1, "\u2581upon": 2, "\u2581a": 3, "\u2581time": 4, "s": 5}
    backend = Tokenizer(WordLevel(words, unk_token="<s>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    for before, text in (((), "times"), ([0, 1, 2, 3], " times"), ([0], "times")):
        stream = TextStream(tokenizer, (), before)
        assert "".join([*map(stream.push, [4, 5]), stream.finish()]) == text
    stream = TextStream(tokenizer, (" t",), [1])
    assert (stream.push(4), stream.stopped) == ("", True)
    assert text_of_token(tokenizer, 4) == " time"


def test_what_stands_before_is_no_part_of_the_text(tiny_tokenizer):
    draw = random.Random(2)
    for _ in range(200):
        ids = tiny_tokenizer("".join(draw.choice("ab é日🦊\n") for _ in range(20)))["input_ids"]
        cut = draw.randrange(len(ids))
        before = tiny_tokenizer.decode(ids[:cut])
        if before.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        stream = TextStream(tiny_tokenizer, (), ids[:cut][-NUM_BEFORE:])
        text = "".join([*map(stream.push, ids[cut:]), stream.finish()])
        assert before + text == tiny_tokenizer.decode(ids)


def test_a_special_token_ends_a_text_in_which_it_is_not_seen(tiny_tokenizer):
    one, two = (tiny_tokenizer(word)["input_ids"] for word in ("one", "two"))
    stream = TextStream(tiny_tokenizer, ("<bos>",))
    pushed = "".join(stream.push(token) for token in [*one, tiny_tokenizer.bos_token_id])
    assert (pushed, stream.stopped, stream.finish()) == ("one", True, "")
    assert "".join(streamed(tiny_tokenizer, [*one, *two], ("<bos>",))) == "onetwo"


@pytest.mark.parametrize("kind", ["end of text", "bytes of no character", "halves of characters"])
def test_text_that_does_not_settle_is_not_decoded_again_from_its_start(
    tiny_tokenizer, monkeypatch, kind
):
    ids = {
        "end of text": [tiny_tokenizer.eos_token_id] * 2000,
        "bytes of no character": tiny_tokenizer.convert_tokens_to_ids(["\u00ac"]) * 2000,
        "halves of characters": tiny_tokenizer.convert_tokens_to_ids(["\u00e2", "\u0124"]) * 1000,
    }[kind]
    stream = TextStream(tiny_tokenizer)
    decode = tiny_tokenizer.decode
    sizes = []

    def counted(tokens, **options):
        sizes.append(len(tokens))
        return decode(tokens, **options)

    monkeypatch.setattr(tiny_tokenizer, "decode", counted)
    pieces = [stream.push(token) for token in ids]
    assert max(sizes, default=0) <= 16
    text = "".join([*pieces, stream.finish()])
    assert text == decode(ids, skip_special_tokens=True)


def test_a_prompt_may_end_with_the_sign_of_an_unknown_character(tiny_tokenizer):
    before = tiny_tokenizer("one \N{REPLACEMENT CHARACTER}")["input_ids"]
    stream = TextStream(tiny_tokenizer, (), before[-NUM_BEFORE:])
    pieces = [stream.push(token) for token in tiny_tokenizer("two")["input_ids"]]
    assert "".join([*pieces, stream.finish()]) == "two"
