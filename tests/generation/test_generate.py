import pytest
import torch

from loraloom.config.data import PromptForm
from loraloom.errors import ConfigError, DataError
from loraloom.generation.generate import generate, make_requests
from loraloom.generation.prompts import Prompt
from loraloom.generation.sampling import SamplingConfig
from tests.generation.asking import TEXTS
from tests.tiny import METHODS


def prompts(texts=TEXTS):
    names = [None, *METHODS]
    return [Prompt(text, names[place % len(names)]) for place, text in enumerate(texts)]


def completed(host, tokenizer, asked=None, batch_size=16, **settings):
    sampling = SamplingConfig(**{"max_new_tokens": 8} | settings)
    asked = prompts() if asked is None else asked
    return generate(host, tokenizer, asked, sampling, batch_size=batch_size)


def test_completions_are_in_the_order_of_the_prompts(host, tiny_tokenizer):
    together = completed(host, tiny_tokenizer)
    for prompt, completion in zip(prompts(), together, strict=True):
        assert completed(host, tiny_tokenizer, [prompt]) == [completion]
    assert len(set(together)) == len(together)


def test_a_string_is_a_prompt_of_the_base_model(host, tiny_tokenizer):
    mixed = ["the sky", Prompt("the sky", "lora"), "one"]
    asked = [Prompt("the sky"), mixed[1], Prompt("one")]
    assert completed(host, tiny_tokenizer, mixed) == completed(host, tiny_tokenizer, asked)
    with pytest.raises(ConfigError, match="prompts must be a list, got 'the sky'; put it into"):
        completed(host, tiny_tokenizer, "the sky")


def test_rows_of_a_batch_are_asked_as_their_adapters_were_trained(
    host, tiny_tokenizer, monkeypatch
):
    tiny_tokenizer.chat_template = "{{ messages[-1].content }} says"
    forms = {
        "lora": PromptForm(format="instruction", template="plain"),
        "mixlora": PromptForm(format="chat", chat_template="{{ messages[-1].content }}?"),
    }
    for name, form in forms.items():
        monkeypatch.setattr(host.adapters[name], "prompt", form)
    asked = [Prompt("yes", name) for name in (None, "lora", "mixlora", "dora")]
    written = ["yes says", "yes\n", "yes?", "yes says"]
    sampling = SamplingConfig(max_new_tokens=4)
    found = make_requests(host, tiny_tokenizer, asked, sampling)
    assert [tiny_tokenizer.decode(one.prompt_ids) for one in found] == written
    form = PromptForm(format="text")
    one_form = make_requests(host, tiny_tokenizer, asked, sampling, prompt_form=form)
    raw = make_requests(host, tiny_tokenizer, asked, sampling, raw=True)
    assert [one.prompt_ids for one in one_form] == [one.prompt_ids for one in raw]
    assert tiny_tokenizer.decode(raw[1].prompt_ids) == "yes"


def test_drawing_leaves_torchs_own_numbers_alone(host, tiny_tokenizer):
    state = torch.random.get_rng_state()
    completed(host, tiny_tokenizer, temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_completion_ends_at_an_end_token(host, tiny_tokenizer):
    ids = tiny_tokenizer("the sky", return_tensors="pt")["input_ids"]
    out = host.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    new = out[0, ids.shape[1] :].tolist()
    tiny_tokenizer.eos_token = tiny_tokenizer.convert_ids_to_tokens(new[2])
    assert new[2] not in new[:2]
    assert completed(host, tiny_tokenizer, [Prompt("the sky")]) == [tiny_tokenizer.decode(new[:2])]


def test_a_prompt_that_leaves_no_room_is_an_error(host, tiny_tokenizer):
    long = Prompt("one " * 100, origin="line 2")
    with pytest.raises(DataError, match="line 2: the prompt must have at most 120 tokens"):
        completed(host, tiny_tokenizer, [Prompt("one"), long])
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        completed(host, tiny_tokenizer, batch_size=0)


def test_what_does_not_fit_into_memory_is_completed_in_parts(host, tiny_tokenizer, monkeypatch):
    expected = completed(host, tiny_tokenizer, temperature=1.0, seed=5)
    seen, decode = [], host.decode

    def limited(session, *rest):
        if len(session.adapters) > 2:
            raise torch.OutOfMemoryError
        seen.append(len(session.adapters))
        return decode(session, *rest)

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(host, "decode", limited)
    assert completed(host, tiny_tokenizer, temperature=1.0, seed=5) == expected
    assert max(seen) == 2
    monkeypatch.setattr(host, "prefill", full)
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens does not fit into memory"):
        completed(host, tiny_tokenizer)
