"""The names that the configuration knows without importing torch are those of torch."""

from typing import get_args

import torch
from transformers.trainer_utils import SchedulerType

from loraloom.training.settings import LrScheduler, OptimizerName
from loraloom.training.step.optimizers import BITSANDBYTES


def test_every_optimizer_of_torch_is_known():
    in_torch = {
        name.lower()
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    left_out = {"lbfgs", "muon", "sparseadam"}
    ours = set(get_args(OptimizerName)) - set(BITSANDBYTES)
    assert {*ours, *left_out, "optimizer"} == in_torch


def test_every_scheduler_of_transformers_is_known():
    assert set(get_args(LrScheduler)) == {scheduler.value for scheduler in SchedulerType}
