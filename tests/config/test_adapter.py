import pytest
from pydantic import ValidationError

from loraloom.adapters import ExpertsConfig, LoraConfig, MixLoraConfig


def test_rank_stabilized_scaling_is_alpha_over_the_root_of_rank():
    assert LoraConfig(rank=16, alpha=16, rank_stabilized=True).scaling == 4


@pytest.mark.parametrize("targets", ["q_proj", 3, None])
def test_target_modules_that_are_neither_are_refused(targets):
    with pytest.raises(ValidationError, match=r"must be all-linear, .*, moe or a list of"):
        LoraConfig(target_modules=targets)


def test_experts_inherit_what_they_do_not_set():
    config = MixLoraConfig(rank=16, alpha=32, dropout=0.1, experts=ExpertsConfig(rank=4))
    assert (config.expert_config.rank, config.expert_config.alpha) == (4, 32)
    assert config.expert_config.dropout == 0.1
