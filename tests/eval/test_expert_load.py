from __future__ import annotations

import pytest
import torch

from loraloom.eval.expert_load import shares, tokens_per_expert
from tests.tiny import METHODS, tiny_host


def test_every_real_token_is_counted_top_k_times_in_every_layer(tiny_tokenizer):
    host = tiny_host("llama", {"mix": METHODS["mixlora"]}, vocab_size=300)
    texts = {"short": ["a"] * 40, "mixed": ["the sky", "one two three four"]}
    counts = tokens_per_expert(host, tiny_tokenizer, "mix", texts)
    for group, items in texts.items():
        num_tokens = sum(len(tiny_tokenizer(text).input_ids) for text in items)
        top_k = METHODS["mixlora"].top_k
        assert counts[group].sum(1).tolist() == [num_tokens * top_k] * host.base.num_layers


def test_shares_of_a_row_sum_to_one_and_an_empty_row_is_zero():
    assert shares(torch.tensor([[1, 3], [0, 0]])) == [[0.25, 0.75], [0.0, 0.0]]
    assert sum(shares(torch.tensor([[1, 2, 4]]))[0]) == pytest.approx(1)
