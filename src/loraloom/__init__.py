"""Mixtures of LoRA experts: train, evaluate and run many adapters on one frozen base model.

Everything that is public is here and is imported on first use, so that `import loraloom` is
immediate and brings no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraloom.adapters import *  # noqa: F403
    from loraloom.adapters import register_method as register_method
    from loraloom.base.loading import load_base_model as load_base_model
    from loraloom.config.data import PromptForm as PromptForm
    from loraloom.errors import AdapterError as AdapterError
    from loraloom.errors import ConfigError as ConfigError
    from loraloom.errors import DataError as DataError
    from loraloom.errors import FormatError as FormatError
    from loraloom.errors import LoraloomError as LoraloomError
    from loraloom.errors import ModelError as ModelError
    from loraloom.errors import TrainingError as TrainingError
    from loraloom.eval.evaluation import evaluate as evaluate
    from loraloom.eval.evaluation import evaluate_loss as evaluate_loss
    from loraloom.eval.results import Evaluation as Evaluation
    from loraloom.eval.statistics import compare as compare
    from loraloom.eval.statistics import compare_paired as compare_paired
    from loraloom.eval.statistics import read_answers as read_answers
    from loraloom.eval.statistics import summarise_seeds as summarise_seeds
    from loraloom.exports.converting import convert as convert
    from loraloom.exports.model import Export as Export
    from loraloom.exports.model import export as export
    from loraloom.generation.generate import Completion as Completion
    from loraloom.generation.generate import generate as generate
    from loraloom.generation.prompts import Prompt as Prompt
    from loraloom.generation.router import RouterFit as RouterFit
    from loraloom.generation.router import fit_router as fit_router
    from loraloom.generation.sampling import SamplingConfig as SamplingConfig
    from loraloom.host.forwards import HostOutput as HostOutput
    from loraloom.host.host import Host as Host
    from loraloom.host.host import attach as attach
    from loraloom.training.client import TrainingClient as TrainingClient
    from loraloom.training.client import example_of as example_of
    from loraloom.training.client import example_of_completion as example_of_completion
    from loraloom.training.client import run_requests as run_requests
    from loraloom.training.job import JobResult as JobResult
    from loraloom.training.run import train as train
    from loraloom.training.settings import CpoConfig as CpoConfig
    from loraloom.training.settings import DpoConfig as DpoConfig
    from loraloom.training.settings import JobConfig as JobConfig
    from loraloom.training.settings import OptimizerConfig as OptimizerConfig
    from loraloom.training.settings import RunConfig as RunConfig
    from loraloom.training.settings import SftConfig as SftConfig
    from loraloom.training.settings import register_objective as register_objective

__version__ = "0.1.0"

_HOMES = {
    "adapters": "register_method",
    "base.loading": "load_base_model",
    "config.data": "PromptForm",
    "errors": "AdapterError ConfigError DataError FormatError LoraloomError ModelError "
    "TrainingError",
    "eval.evaluation": "evaluate evaluate_loss",
    "eval.results": "Evaluation",
    "eval.statistics": "compare compare_paired read_answers summarise_seeds",
    "exports.converting": "convert",
    "exports.model": "Export export",
    "generation.generate": "Completion generate",
    "generation.prompts": "Prompt",
    "generation.router": "RouterFit fit_router",
    "generation.sampling": "SamplingConfig",
    "host.forwards": "HostOutput",
    "host.host": "Host attach",
    "training.client": "TrainingClient example_of example_of_completion run_requests",
    "training.job": "JobResult",
    "training.run": "train",
    "training.settings": "CpoConfig DpoConfig JobConfig OptimizerConfig RunConfig SftConfig "
    "register_objective",
}

_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

if not TYPE_CHECKING:  # to a type checker a module with __getattr__ has every attribute

    def __getattr__(name: str) -> object:
        if name in _MODULE_OF:
            return getattr(import_module(f"loraloom.{_MODULE_OF[name]}"), name)
        if name == "__all__":
            return sorted([*_MODULE_OF, *_adapter_configs()])
        if name.endswith("Config") and name in (configs := _adapter_configs()):
            return configs[name]
        raise AttributeError(f"module 'loraloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_MODULE_OF, *_adapter_configs(), "__version__"])


def _adapter_configs() -> dict[str, type]:
    """Find the settings of every method in the one list of methods."""
    from loraloom import adapters
    from loraloom.config.fields import StrictModel

    return {
        name: value
        for name, value in vars(adapters).items()
        if isinstance(value, type) and issubclass(value, StrictModel)
    }
