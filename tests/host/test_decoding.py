"""Prefill and decoding: rows of their own lengths come and go, and nobody notices."""

import random

import pytest
import torch

from loraloom.errors import AdapterError, DataError
from loraloom.host.decoding import Decoding
from loraloom.host.host import Host
from tests.tiny import ALL_FAMILIES, METHODS, PADS_RIGHT_ONLY, padded_mask, tiny_host, tiny_ids

NAMES = ["mixlora", None, "lora", "mixdora", "dora", "mixlora"]
LENGTHS = [7, 5, 3, 7, 6, 4]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = [family for family in ALL_FAMILIES if family not in PADS_RIGHT_ONLY]
TWO_KINDS = ("lfm2", "qwen3_5_text")  # convolutions, or linear attention, in some layers


def prompts():
    mask = padded_mask(LENGTHS, "left")
    return torch.where(mask.bool(), tiny_ids(6), 0), mask


def greedy(host: Host, session: Decoding, steps: int) -> torch.Tensor:
    """Decode the most likely tokens of a session, [B, steps]."""
    tokens = []
    for step in range(steps):
        tokens.append(session.logits.argmax(-1))
        if step < steps - 1:
            host.decode(session, tokens[-1])
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("family", [*FAMILIES, *TWO_KINDS])
def test_greedy_tokens_are_those_of_transformers_generate(family):
    host, (ids, mask) = tiny_host(family), prompts()
    expected = host.generate(ids, attention_mask=mask, adapters=NAMES, **GREEDY)[:, 7:]
    assert torch.equal(greedy(host, host.prefill(ids, mask, NAMES), 4), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", *TWO_KINDS])
def test_rows_that_come_and_go_at_random_say_what_they_say_alone(family):
    host, draw = tiny_host(family), random.Random(4)
    session, said = None, []
    for step in range(20):
        if session is None or (len(session.adapters) < 5 and draw.random() < 0.6):
            ids, name = tiny_ids(1, draw.randint(1, 9), seed=step), draw.choice(NAMES)
            came, alone = (host.prefill(ids, None, [name]) for _ in range(2))
            said.append((alone, []))
            session = came if session is None else (session.join(came), session)[1]
        tokens = session.logits.argmax(-1)
        for (_, own), token in zip(said, tokens.tolist(), strict=True):
            own.append(token)
        leaving = draw.randrange(len(said)) if len(said) > 1 and draw.random() < 0.5 else None
        if leaving is not None:
            alone, own = said[leaving]
            assert greedy(host, alone, len(own))[0].tolist() == own
            rows = [row for row in range(len(said)) if row != leaving]
            draw.shuffle(rows)
            said, tokens = [said[row] for row in rows], tokens[rows]
            session.keep(rows)
        host.decode(session, tokens)


def test_states_that_are_no_numbers_go_with_their_row():
    """Attention multiplies even what is masked, so nobody may find what another row left."""
    host = tiny_host(configs={"broken": METHODS["lora"]})
    with torch.no_grad():
        for parameter in host.adapters["broken"].parameters():
            parameter.fill_(torch.nan)
    session = host.prefill(tiny_ids(2, 7), None, [None, "broken"])
    session.keep([0])
    short = tiny_ids(1, 3)
    session.join(host.prefill(short, None, [None]))
    tokens = session.logits.argmax(-1)
    alone = host.decode(host.prefill(short, None, [None]), tokens[1:])
    torch.testing.assert_close(host.decode(session, tokens)[1:], alone)


@pytest.mark.parametrize("mask", [[1, 1, 0], [1, 0, 1], [0, 0, 0]])
def test_prompts_that_are_not_padded_on_the_left_are_refused(mask):
    with pytest.raises(DataError, match=r"padded on the left.*got an attention_mask"):
        tiny_host().prefill(tiny_ids(2, 3), torch.tensor([[1, 1, 1], mask]), ["lora", None])
    with pytest.raises(AdapterError, match="for each of the 4 rows, got 'lora'"):
        tiny_host().prefill(tiny_ids(4), adapters="lora")


def alone(host, row: int, **kwargs):
    ids, mask = prompts()
    real = mask[row].bool()
    return host.generate(ids[row : row + 1, real], adapters=[NAMES[row]], **GREEDY | kwargs)


@pytest.mark.parametrize("returned", [1, 2, 3])
def test_beams_and_returned_sequences_take_their_rows_adapter(returned):
    host, (ids, mask) = tiny_host(), prompts()
    kwargs = {"num_beams": 3, "num_return_sequences": returned}
    together = host.generate(ids, attention_mask=mask, adapters=NAMES, **GREEDY | kwargs)
    assert len(together) == 6 * returned
    for row in range(6):
        rows = together[row * returned : (row + 1) * returned, 7 - LENGTHS[row] :]
        assert torch.equal(rows, alone(host, row, **kwargs))
