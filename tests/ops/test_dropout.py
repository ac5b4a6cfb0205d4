"""Random numbers that belong to a sample."""

from itertools import combinations

import pytest
import torch

from loraloom.ops.dropout import SampleNoise, SampleSpan, Site, mix64, sample_key

KEY = sample_key(0, 0, 7)
N = 64


def noise(spans, num_tokens: int, layer: int = 0) -> SampleNoise:
    return SampleNoise(tuple(spans), num_tokens, layer, torch.device("cpu"))


def alone(key: int = KEY, tokens: int = 5, site: int = Site.FFN_INPUT, layer: int = 0, dropout=0.5):
    return noise([SampleSpan(key, slice(0, tokens))], tokens, layer).keep_mask(site, N, dropout)


def test_mix64_is_what_splitmix64_gives():
    assert mix64(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 seeded with 0


@pytest.mark.parametrize("positions", [[0, 2, 3, 6, 7], [7, 6, 3, 2, 0]])
def test_tokens_need_not_lie_side_by_side(positions):
    places = torch.tensor(positions)
    mask = noise([SampleSpan(KEY, places)], 8).keep_mask(Site.FFN_INPUT, N, 0.5)
    assert torch.equal(mask[places], alone())
    assert mask[[1, 4, 5]].all()


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    alone()
    assert torch.equal(torch.get_rng_state(), before)


def test_layer_site_slot_sample_epoch_and_seed_each_change_a_mask():
    masks = [
        alone(),
        alone(layer=1),
        alone(site=Site.ATTENTION_INPUT),
        alone(site=Site.FFN_SLOT),
        alone(site=Site.FFN_SLOT + 1),
        alone(key=sample_key(0, 0, 8)),
        alone(key=sample_key(0, 1, 7)),
        alone(key=sample_key(1, 0, 7)),
    ]
    for mask, other in combinations(masks, 2):
        assert 0.35 < (mask == other).double().mean() < 0.65
    assert max(Site) == Site.FFN_SLOT  # slots come after all other sites


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.9])
def test_a_share_of_one_minus_dropout_is_kept(dropout):
    spans = [SampleSpan(sample_key(0, 0, i), slice(40 * i, 40 * i + 40)) for i in range(20)]
    mask = noise(spans, 800).keep_mask(Site.FFN_INPUT, N, dropout)
    deviation = (dropout * (1 - dropout) / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - (1 - dropout)) < 5 * deviation
    assert mask.double().mean(0).std() < 3 * (dropout * (1 - dropout) / 800) ** 0.5


def test_jitter_is_uniform_around_one_and_leaves_padding_alone(request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float16)
    factors = noise([SampleSpan(KEY, slice(1, 200))], 201).jitter(Site.ROUTER_JITTER, N, 0.1)
    real = factors[1:200]
    assert factors.dtype == torch.float32
    assert (factors[[0, 200]] == 1).all()
    assert 0.9 <= real.min() < 0.901 < 1.099 < real.max() <= 1.1
    assert abs(real.mean() - 1) < 2e-3


def test_normal_draws_belong_to_a_sample_and_to_a_site_by_name():
    draws = noise([SampleSpan(KEY, slice(1, 2001))], 2002).normal("up_proj.noise", N)
    assert (draws[[0, 2001]] == 0).all()
    assert abs(draws[1:2001].mean()) < 0.02
    assert abs(draws[1:2001].std() - 1) < 0.02
    alone = noise([SampleSpan(KEY, slice(0, 2000))], 2000)
    assert torch.equal(alone.normal("up_proj.noise", N), draws[1:2001])
    assert not torch.equal(alone.normal("gate_proj.noise", N), draws[1:2001])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_is_ones_and_zeros_and_the_same_in_every_dtype(dtype):
    mask = noise([SampleSpan(KEY, slice(0, 5))], 5).keep_mask(Site.FFN_INPUT, N, 0.3, dtype)
    assert mask.dtype == dtype
    assert set(mask.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(mask.double(), alone(dropout=0.3).double())
