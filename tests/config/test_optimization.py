"""The names that the configuration knows without importing torch are those of torch."""

import inspect
from typing import get_args

import pytest
import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from transformers.trainer_utils import SchedulerType

from loraloom.config.optimizer import REFUSED_OPTIMIZERS, OptimizerName
from loraloom.config.train import SCHEDULER_ARGS, LrScheduler

SET_BY_THE_TRAINER = {
    *("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "mode", "verbose"),
}
CLASSES = {
    "reduce_lr_on_plateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
    "greedy": GreedyLR,
}


def test_every_optimizer_of_torch_is_known():
    in_torch = {
        name.lower()
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    assert {*get_args(OptimizerName), *REFUSED_OPTIMIZERS, "optimizer"} == in_torch


def test_every_scheduler_of_transformers_is_known():
    assert set(get_args(LrScheduler)) == {scheduler.value for scheduler in SchedulerType}


@pytest.mark.parametrize("scheduler", SCHEDULER_ARGS)
def test_the_known_arguments_of_a_scheduler_are_all_that_it_takes(scheduler):
    function = CLASSES.get(scheduler) or TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(scheduler)]
    taken = set(inspect.signature(function).parameters)
    assert set(SCHEDULER_ARGS[scheduler]) == taken - SET_BY_THE_TRAINER
