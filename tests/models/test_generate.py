"""Generation with adapters: transformers' own, each row with its adapter."""

from __future__ import annotations

import functools

import pytest
import torch

import loraloom
from loraloom.errors import AdapterError
from tests.tiny import METHODS, changed, padded_mask, randomise, tiny_host, tiny_ids, tiny_model

NAMES = ["mixlora", None, "lora", "mixdora", "dora", "mixlora"]
LENGTHS = [7, 5, 3, 7, 6, 4]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
FAMILIES = ("llama", "phi", "gpt_neox", "gemma3_text")


def prompts():
    """Left-padded prompts and their mask."""
    mask = padded_mask(LENGTHS, "left")
    return torch.where(mask.bool(), tiny_ids(6), 0), mask


def alone(host, row: int, **kwargs):
    ids, mask = prompts()
    real = mask[row].bool()
    return host.generate(ids[row : row + 1, real], adapters=[NAMES[row]], **GREEDY | kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_generated_as_alone_without_padding(family):
    host, (ids, mask) = tiny_host(family), prompts()
    together = host.generate(ids, attention_mask=mask, adapters=NAMES, **GREEDY)
    for row in range(6):
        start = 7 - LENGTHS[row]
        assert torch.equal(together[row, start:], alone(host, row)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_full_forwards(family):
    host, ids, names = tiny_host(family), tiny_ids(4), [*METHODS]
    generated = host.generate(ids, adapters=names, **GREEDY)
    with torch.no_grad():
        logits = host(generated, adapters=names).logits
    assert torch.equal(logits[:, 6:-1].argmax(-1), generated[:, 7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_adapters_it_is_the_base_models_generate(family):
    model, (ids, mask) = tiny_model(family), prompts()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    host = loraloom.attach(model)
    assert torch.equal(host.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_without_a_mask_transformers_makes_one_from_the_padding():
    host, (ids, mask) = tiny_host(), prompts()
    expected = host.generate(ids, attention_mask=mask, adapters=NAMES, **GREEDY)
    assert torch.equal(host.generate(ids, adapters=NAMES, **GREEDY), expected)


@pytest.mark.parametrize("returned", [1, 2, 3])
def test_beams_and_returned_sequences_take_their_rows_adapter(returned):
    host, (ids, mask) = tiny_host(), prompts()
    kwargs = {"num_beams": 3, "num_return_sequences": returned}
    together = host.generate(ids, attention_mask=mask, adapters=NAMES, **GREEDY | kwargs)
    assert len(together) == 6 * returned
    for row in range(6):
        start = 7 - LENGTHS[row]
        rows = together[row * returned : (row + 1) * returned, start:]
        assert torch.equal(rows, alone(host, row, **kwargs))


def test_sampled_sequences_of_a_prompt_take_its_adapter():
    host, (ids, mask) = tiny_host(), prompts()
    greedy = host.generate(ids, attention_mask=mask, adapters=NAMES, **GREEDY)
    sampled = host.generate(
        ids,
        attention_mask=mask,
        adapters=NAMES,
        **GREEDY | {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    )
    assert torch.equal(sampled, greedy.repeat_interleave(3, dim=0))


def test_rows_that_end_early_do_not_shift_the_others():
    host, (ids, mask) = tiny_host(), prompts()
    greedy = host.generate(ids, attention_mask=mask, adapters=NAMES, **GREEDY)
    ending = int(greedy[2, 8])  # the second token that row 2 generates
    out = host.generate(
        ids,
        attention_mask=mask,
        adapters=NAMES,
        **GREEDY | {"eos_token_id": ending, "pad_token_id": 0},
    )
    for row in range(6):
        tokens = out[row, 7:].tolist()
        length = tokens.index(ending) + 1 if ending in tokens else len(tokens)
        assert tokens[:length] == greedy[row, 7 : 7 + length].tolist()


def test_a_static_cache_gives_the_same_tokens():
    host, (ids, mask) = tiny_host(), prompts()
    expected = host.generate(ids, attention_mask=mask, adapters=NAMES, **GREEDY)
    static = host.generate(
        ids, attention_mask=mask, adapters=NAMES, cache_implementation="static", **GREEDY
    )
    assert torch.equal(static, expected)


def test_without_a_cache_the_tokens_are_the_same():
    host, (ids, mask) = tiny_host(), prompts()
    arguments = {"attention_mask": mask, "adapters": NAMES, **GREEDY}
    expected = host.generate(ids, **arguments)
    assert torch.equal(host.generate(ids, use_cache=False, **arguments), expected)


def test_scores_are_those_of_the_rows_adapter():
    host, ids, names = tiny_host(), tiny_ids(4), [*METHODS]
    out = host.generate(
        ids, adapters=names, **GREEDY, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        logits = host(out.sequences, adapters=names).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits.to(out.logits[0].dtype))


def test_the_head_sees_the_last_position_of_a_prompt_alone():
    host, seen = tiny_host(), []
    host.model.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[1])
    )
    host.generate(tiny_ids(4), adapters=[*METHODS], **GREEDY)
    assert seen == [1] * 6


def test_generation_is_in_eval_mode_whatever_the_default():
    host = tiny_host(configs={"a": changed(METHODS["mixlora"], dropout=0.5)})
    expected = host.generate(tiny_ids(2), adapters=["a", None], **GREEDY)
    host.train()
    assert torch.equal(host.generate(tiny_ids(2), adapters=["a", None], **GREEDY), expected)


def test_adapters_are_one_a_row():
    with pytest.raises(AdapterError, match="each of the 2 rows, got 3"):
        tiny_host().generate(tiny_ids(2), adapters=["lora"] * 3, **GREEDY)


@pytest.mark.parametrize(
    "own_forward",
    [
        False,
        True,
    ],
)
def test_generation_leaves_the_model_as_it_was(own_forward):
    """An instance's own `forward` is what accelerate's device maps put there."""
    model = tiny_model()
    if own_forward:
        model.forward = functools.partial(type(model).forward, model)
    before = model.__dict__.get("forward")
    host = loraloom.attach(model)
    randomise(host.add("a", METHODS["mixlora"]))
    host.generate(tiny_ids(2), adapters=["a", None], **GREEDY)
    with pytest.raises(ValueError, match="nonsense"):
        host.generate(tiny_ids(2), adapters=["a", None], nonsense=1, **GREEDY)
    assert model.__dict__.get("forward") is before


def test_the_head_reads_contiguous_states_of_prompts():
    host = tiny_host("llama", {"a": METHODS["lora"]})
    seen = []
    host.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0])
    )
    host.generate(tiny_ids(3), adapters=["a"] * 3, max_new_tokens=2)
    assert seen[0].shape[1] == 1
    assert all(states.is_contiguous() for states in seen)
