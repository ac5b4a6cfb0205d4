from __future__ import annotations

import pytest
import torch

from loraloom.errors import ConfigError
from loraloom.generation.sampling import SamplingConfig, TokenChooser, parse_sampling

CPU = torch.device("cpu")


def draw(logits, rows, **settings):
    """Draw a token for each row from the same logits."""
    choosers = [TokenChooser(SamplingConfig(**settings), row, CPU) for row in rows]
    return torch.tensor([chooser.choose([], torch.tensor(logits)) for chooser in choosers])


def test_greedy_leaves_the_logits_alone():
    assert draw([0.0, 2.0, 1.0], range(3)).tolist() == [1, 1, 1]


def test_draws_follow_the_softmax():
    logits = [0.0, 1.0, 2.0, -1.0]
    counts = draw(logits, range(4000), temperature=1.0).bincount(minlength=4)
    expected = torch.tensor(logits).softmax(-1)
    assert counts / 4000 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("temperature", [0.001, 1e30])
def test_extreme_temperatures_draw_a_token(temperature):
    drawn = draw([-40.0, 90.0, 3.0], range(50), temperature=temperature)
    assert set(drawn.tolist()) == ({1} if temperature < 1 else {0, 1, 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1e-45}, "temperature must be 0, for the most likely token, or at least"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be at most 100"),
    ],
)
def test_settings_beyond_reason_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_sampling(**settings)


def test_temperature_sharpens_and_flattens():
    cold = draw([0.0, 1.0], range(500), temperature=0.2).float().mean()
    hot = draw([0.0, 1.0], range(500), temperature=5.0).float().mean()
    assert cold > 0.98
    assert 0.45 < hot < 0.65


def test_top_k_draws_from_the_likeliest_only():
    drawn = draw([0.0, 2.0, 1.0, 1.5], range(300), temperature=3.0, top_k=2)
    assert set(drawn.tolist()) == {1, 3}


def test_top_p_draws_from_the_share_only():
    drawn = draw([0.0, 3.0, 3.0, 0.0], range(300), temperature=1.0, top_p=0.9)
    assert set(drawn.tolist()) == {1, 2}


def test_a_draw_depends_on_seed_and_row_alone():
    logits = [0.0] * 50
    together = draw(logits, [3, 8, 9], temperature=1.0, seed=1)
    assert draw(logits, [8], temperature=1.0, seed=1) == together[1]
    assert not torch.equal(draw(logits, [3, 8, 9], temperature=1.0, seed=2), together)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"top_p": 1.5, "temperature": 1}, "top_p must be at most 1, got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"top_p": 0.5}, "top_p has no effect at temperature 0, got 0.5; set temperature above 0"),
        ({"top_k": 5}, "top_k has no effect at temperature 0, got 5"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_sampling(**settings)


def test_all_faults_are_in_one_message():
    with pytest.raises(ConfigError) as error:
        parse_sampling(temperature=-1, seed=-2)
    assert len(str(error.value).splitlines()) == 2
