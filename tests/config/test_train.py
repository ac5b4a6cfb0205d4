import pytest
from pydantic import ValidationError

from loraloom.training.settings import DpoConfig, SftConfig, TrainConfig


def test_defaults_are_those_that_the_documentation_names():
    config = TrainConfig(num_epochs=1)
    assert (config.optimizer, config.weight_decay, config.lr_scheduler) == ("adamw", 0.0, "linear")
    assert (config.max_length, config.max_grad_norm) == (512, 1.0)


def test_a_micro_batch_is_the_whole_batch_by_default():
    config = TrainConfig(num_epochs=1, batch_size=12)
    assert config.micro_batch_size == 12


def test_an_optimizer_is_named_in_any_case():
    assert TrainConfig(num_epochs=1, optimizer="AdamW").optimizer == "adamw"


def test_a_warmup_ratio_is_rounded_up_to_steps():
    assert TrainConfig(num_epochs=1, warmup_ratio=0.1).warmup_steps_of(101) == 11
    assert TrainConfig(num_epochs=1, warmup_steps=7).warmup_steps_of(101) == 7
    assert TrainConfig(num_epochs=1).warmup_steps_of(101) == 0


def test_clipping_can_be_switched_off():
    assert TrainConfig(num_epochs=1, max_grad_norm=None).max_grad_norm is None


def test_the_objective_is_supervised_fine_tuning_by_default():
    assert TrainConfig(num_epochs=1).objective == SftConfig()
    assert not TrainConfig(num_epochs=1).learns_from_pairs
    assert TrainConfig(num_epochs=1, objective=DpoConfig()).learns_from_pairs


CONTRADICTIONS = [
    ({"num_epochs": None}, "max_steps or num_epochs must be given"),
    ({"max_steps": 5}, "max_steps and num_epochs exclude each other, got 5 and 1"),
    ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio and warmup_steps exclude each other"),
    ({"lr_scheduler": "constant", "warmup_steps": 5}, "use constant_with_warmup"),
    ({"lr_scheduler": "greedy", "warmup_ratio": 0.1}, "warmup_ratio has no effect on greedy"),
    ({"lr_scheduler": "cosin"}, "'cosine'"),
    ({"lr_scheduler": "constant", "lr_scheduler_args": {"power": 2}}, "nothing for constant, got"),
    ({"lr_scheduler_args": {"mode": "max"}}, "must not hold mode: the job sets it"),
    ({"optimizer": "muon"}, "'sgd'"),
    ({"optimizer": "LBFGS"}, "'sgd'"),
    ({"optimizer": "adamx"}, "'adamw'"),
    ({"optimizer": "rprop", "weight_decay": 0.1}, "weight_decay has no effect on rprop"),
    ({"optimizer_args": {"lr": 1}}, "must not hold lr: the job's own learning_rate is used"),
    (
        {"batch_size": 16, "micro_batch_size": 5},
        "micro_batch_size must divide batch_size=16, got 5",
    ),
    ({"batch_size": 4, "micro_batch_size": 8}, "micro_batch_size must divide batch_size=4, got 8"),
    ({"early_stopping": {}}, "early_stopping has no effect without eval_steps"),
    ({"learning_rate": 0}, "greater than 0"),
    (
        {"objective": {"name": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}},
        "label_smoothing has no effect on loss_type ipo",
    ),
    (
        {"objective": {"name": "cpo", "loss_type": "hinge", "label_smoothing": 0.1}},
        "label_smoothing has no effect on loss_type hinge",
    ),
    ({"objective": {"name": "dpo", "label_smoothing": 0.5}}, "less than 0.5"),
    ({"objective": {"name": "dpo", "loss_type": "hinge"}}, "'sigmoid' or 'ipo'"),
    ({"max_length": 1}, "greater than or equal to 2"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_a_setting_that_cannot_take_effect_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({"num_epochs": 1, **settings})
