"""Which rows of a batch belong to which adapter."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import loraloom
from loraloom.base.families import FAMILIES
from loraloom.errors import DataError, ModelError
from tests.tiny import ALL_FAMILIES, relative_error, tiny_host, tiny_ids, tiny_model

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
    packed = host.hidden(ids, torch.ones_like(ids), names, keys, sample_lengths=LENGTHS)
    states, alone, rest = packed.last_hidden_state.detach(), [], iter(keys)
    for row, lengths in enumerate(LENGTHS):
        for own in ids[row, : sum(lengths)].split(lengths):
            out = host.hidden(own[None], adapters=[names[row]], sample_keys=[next(rest)])
            alone.append(out.last_hidden_state[0].detach())
    parts = [state[: sum(own)].split(own) for state, own in zip(states, LENGTHS, strict=True)]
    return [*parts[0], *parts[1]], alone


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_sample_in_a_packed_row_is_as_it_is_alone(family):
    packed, alone = packed_and_alone(family, **WINDOWED.get(family, {}))
    for ours, expected in zip(packed, alone, strict=True):
        assert relative_error(ours, expected) < 1e-5
    if family in WINDOWED:
        assert relative_error(alone[0], packed_and_alone(family)[1][0]) > 1e-3


@pytest.mark.parametrize("lengths", [[[3, 9]], [[3], [4]]])
def test_samples_that_are_not_in_the_rows_are_refused(lengths):
    with pytest.raises(DataError, match="sample_lengths must be of 1 rows with up to 7 tokens"):
        tiny_host().hidden(tiny_ids(1), sample_lengths=lengths)


PACKS = [family for family in FAMILIES if family not in ("lfm2", "qwen3_5_text", "gpt_oss")]
BAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "attn_layer_indices": [1],
}
LEAKS = {"gpt_oss": {}, "lfm2": {}, "qwen3_5_text": {}, "granitemoehybrid": {}, "bamba": BAMBA}


@pytest.mark.parametrize("family", PACKS)
def test_families_whose_samples_are_apart_pack(family):
    dtype = torch.bfloat16 if family in ("llama", "mixtral") else torch.float32
    host = loraloom.attach(tiny_model(family, dtype))
    implementations = ("eager",) if family == "gemma2" else ("sdpa", "eager")
    for implementation in implementations:
        host.model.set_attn_implementation(implementation)
        host.packing.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", LEAKS)
def test_models_whose_packed_samples_see_each_other_are_refused(family, dtype):
    host = loraloom.attach(tiny_model(family, dtype, **LEAKS[family]))
    with torch.no_grad(), pytest.raises(ModelError, match=f"'{family}'.*set packing: false"):
        host.hidden(tiny_ids(1), sample_lengths=[[3, 4]])
    assert not host.model.get_input_embeddings()._forward_hooks


def test_packing_is_tried_where_no_gradients_are_kept():
    host = tiny_host(configs={})
    with torch.inference_mode():
        host.hidden(tiny_ids(1), sample_lengths=[[3, 4]])


@pytest.fixture
def named_attention(monkeypatch):
    """Have SDPA under another name, with its masks or without."""
    attend = AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "masked", attend)
    monkeypatch.setitem(AttentionInterface._global_mapping, "unmasked", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "masked", sdpa_mask)


def test_attention_of_any_name_that_computes_as_eager_is_accepted(named_attention):
    model = tiny_model("llama", torch.float32)
    model.set_attn_implementation("masked")
    host = loraloom.attach(model)
    host.packing.check()
    assert model.config._attn_implementation == "masked"


def test_attention_that_sees_padding_is_refused(named_attention):
    model = tiny_model("llama", torch.float32)
    model.set_attn_implementation("unmasked")
    with pytest.raises(ModelError, match=r"attention by unmasked must equal .* within 1e-05"):
        loraloom.attach(model)
    assert model.config._attn_implementation == "unmasked"
    model.set_attn_implementation("sdpa")
    loraloom.attach(model)  # it was left as it was


def test_packing_is_refused_if_attention_takes_no_mask(named_attention):
    host = tiny_host()
    host.model.set_attn_implementation("unmasked")
    with pytest.raises(ModelError, match=r"\(attn_implementation unmasked\) they do"):
        host.hidden(tiny_ids(1), sample_lengths=[[3, 4]])
