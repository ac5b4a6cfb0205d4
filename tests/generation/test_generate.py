from __future__ import annotations

import pytest
import torch

from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError, DataError
from loraloom.generation.generate import complete, generate, generate_tokens
from loraloom.generation.prompts import Prompt
from loraloom.generation.sampling import SamplingConfig
from tests.tiny import METHODS, tiny_host

TEXTS = ("one", "Question: yes or no? Answer:", "the sky", "Please choose", "a short answer is")


@pytest.fixture(scope="module")
def host():
    return tiny_host(vocab_size=300, max_position_embeddings=128, eos_token_id=2)


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


def test_greedy_takes_the_most_likely_token(host, tiny_tokenizer):
    ids = tiny_tokenizer("the sky", return_tensors="pt")["input_ids"]
    for _ in range(8):
        following = host(ids, adapters=["lora"]).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    expected = tiny_tokenizer.decode(ids[0, -8:])
    assert completed(host, tiny_tokenizer, [Prompt("the sky", "lora")]) == [expected]


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
    found = generate_tokens(host, tiny_tokenizer, asked, sampling)
    assert [tiny_tokenizer.decode(one.prompt_ids) for one in found] == written
    one_form = generate_tokens(
        host, tiny_tokenizer, asked, sampling, prompt_form=PromptForm(format="text")
    )
    raw = generate_tokens(host, tiny_tokenizer, asked, sampling, raw=True)
    assert [one.prompt_ids for one in one_form] == [one.prompt_ids for one in raw]
    assert tiny_tokenizer.decode(raw[1].prompt_ids) == "yes"


def test_a_prompt_may_scale_its_adapter(host, tiny_tokenizer):
    asked = [
        Prompt("the sky", adapter) for adapter in ("lora", ("lora", 0.25), ("lora", 0.0), None)
    ]
    texts = completed(host, tiny_tokenizer, asked)
    alone = [completed(host, tiny_tokenizer, [prompt])[0] for prompt in asked]
    assert texts == alone
    assert texts[2] == texts[3]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.8},
    ],
)
def test_completions_do_not_depend_on_the_batch(host, tiny_tokenizer, settings):
    one_batch = completed(host, tiny_tokenizer, **settings)
    assert completed(host, tiny_tokenizer, batch_size=2, **settings) == one_batch


def test_seeds_draw_differently_and_repeat(host, tiny_tokenizer):
    first, again, other = (
        completed(host, tiny_tokenizer, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_same_prompt_twice_is_drawn_twice(host, tiny_tokenizer):
    one, other = completed(host, tiny_tokenizer, [Prompt("one")] * 2, temperature=1.0)
    assert one != other


def test_drawing_leaves_torchs_own_numbers_alone(host, tiny_tokenizer):
    state = torch.random.get_rng_state()
    completed(host, tiny_tokenizer, temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_repetition_penalty_reads_no_padding(host, tiny_tokenizer):
    short, long = Prompt("one", "lora"), Prompt("Please choose the correct answer", "lora")
    together = completed(host, tiny_tokenizer, [short, long], repetition_penalty=2.5)
    assert completed(host, tiny_tokenizer, [short], repetition_penalty=2.5) == together[:1]


def test_a_completion_ends_before_a_stop_text(host, tiny_tokenizer):
    whole = completed(host, tiny_tokenizer, [Prompt("the sky")], max_new_tokens=12)[0]
    stop = next(
        letter for letter in whole[len(whole) // 2 :] if letter != "\N{REPLACEMENT CHARACTER}"
    )
    cut = completed(host, tiny_tokenizer, [Prompt("the sky")], max_new_tokens=12, stop=(stop,))[0]
    assert cut == whole[: whole.index(stop)]


def test_a_stop_text_may_not_begin_in_the_prompt(host, tiny_tokenizer):
    whole = completed(host, tiny_tokenizer, [Prompt("the sky")])[0]
    assert "y" + whole[0] not in whole
    stopped = completed(host, tiny_tokenizer, [Prompt("the sky")], stop=("y" + whole[0],))[0]
    assert stopped == whole


def test_a_completion_ends_at_an_end_token(host, tiny_tokenizer):
    ids = tiny_tokenizer("the sky", return_tensors="pt")["input_ids"]
    out = host.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    new = out[0, ids.shape[1] :].tolist()
    tiny_tokenizer.eos_token = tiny_tokenizer.convert_ids_to_tokens(new[2])
    assert new[2] not in new[:2]
    expected = tiny_tokenizer.decode(new[:2])
    assert completed(host, tiny_tokenizer, [Prompt("the sky")]) == [expected]


def test_progress_is_told(host, tiny_tokenizer):
    told = []
    sampling = SamplingConfig(max_new_tokens=1)
    encoded = tiny_tokenizer(list(TEXTS))["input_ids"]
    names = [None] * len(encoded)
    complete(host, tiny_tokenizer, encoded, names, sampling, batch_size=2, on_progress=told.append)
    assert told == [2, 4, 5]


def test_no_prompts_give_no_completions(host, tiny_tokenizer):
    assert completed(host, tiny_tokenizer, []) == []


def test_a_prompt_that_leaves_no_room_is_an_error(host, tiny_tokenizer):
    long = Prompt("one " * 100, origin="a.jsonl, line 2")
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 2: the prompt must have at most 120 tokens"
    ):
        completed(host, tiny_tokenizer, [Prompt("one"), long])


def test_an_unknown_adapter_is_an_error(host, tiny_tokenizer):
    with pytest.raises(AdapterError, match="got 'nobody'"):
        completed(host, tiny_tokenizer, [Prompt("one", "nobody")])


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
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens must fit into memory"):
        completed(host, tiny_tokenizer)
