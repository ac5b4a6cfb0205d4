from __future__ import annotations

import pytest
import torch

from loraloom.errors import AdapterError, ModelError
from loraloom.models.layout import packed_positions, packed_token_mask
from tests.tiny import ALL_FAMILIES, METHODS, relative_error, tiny_host, tiny_ids

LENGTHS = [[5, 4], [3, 2, 1]]
WINDOWED = {
    "mistral": {"sliding_window": 3},
    "phi3": {"sliding_window": 3},
    "gemma2": {"sliding_window": 3},
    "gemma3_text": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {
        "sliding_window": 3,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def packed_and_alone(family: str, **changes):
    host = tiny_host(family, **changes)
    names, keys, length = ["mixlora", "dora"], [11, 12, 13, 14, 15], 9
    host.train()
    ids = tiny_ids(2, length)
    packed = host.hidden(ids, adapters=names, sample_keys=keys, sample_lengths=LENGTHS)
    alone, places = [], []
    rest = iter(keys)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for count in lengths:
            own = ids[row : row + 1, start : start + count]
            out = host.hidden(own, adapters=[names[row]], sample_keys=[next(rest)])
            alone.append(out.last_hidden_state[0].detach())
            places.append((row, slice(start, start + count)))
            start += count
    states = packed.last_hidden_state.detach()
    return [states[place] for place in places], alone


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_sample_in_a_packed_row_is_as_it_is_alone(family):
    for packed, alone in zip(*packed_and_alone(family), strict=True):
        assert relative_error(packed, alone) < 1e-5


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_kept_in_packed_rows(family):
    for packed, alone in zip(*packed_and_alone(family, **WINDOWED[family]), strict=True):
        assert relative_error(packed, alone) < 1e-5
    whole = packed_and_alone(family)[1][0]
    assert relative_error(packed_and_alone(family, **WINDOWED[family])[1][0], whole) > 1e-3


def test_positions_begin_anew_and_padding_counts_on_its_own():
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert packed_positions([[3, 2], [4]], 7).tolist() == expected
    assert packed_token_mask([[3, 2], [4]], 7).sum(1).tolist() == [5, 4]


def test_attention_without_masks_is_refused():
    host = tiny_host()
    host.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"sdpa or eager, got 'flash_attention_2'; choose one"):
        host.hidden(tiny_ids(1), sample_lengths=[[3, 4]])


def test_keys_are_counted_by_sample():
    host = tiny_host(configs={"lora": METHODS["lora"]}).train()
    with pytest.raises(AdapterError, match="each of the 2 samples, got 1"):
        host.hidden(tiny_ids(1), adapters=["lora"], sample_keys=[1], sample_lengths=[[3, 4]])


def test_routing_has_the_samples_tokens_alone():
    host = tiny_host(configs={"mixlora": METHODS["mixlora"]})
    with torch.no_grad():
        out = host.hidden(tiny_ids(2), adapters=["mixlora"] * 2, sample_lengths=[[3, 2], [2, 2]])
    assert len(out.routing["mixlora"][0].router_logits) == 9
