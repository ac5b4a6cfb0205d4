"""Methods: a file for each, and the list of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.dynmole import DynMoleConfig
from loraloom.adapters.hydralora import HydraLoraConfig
from loraloom.adapters.lora import LoraConfig
from loraloom.adapters.loramoe import LoraMoeConfig
from loraloom.adapters.mixlora import ExpertsConfig as ExpertsConfig
from loraloom.adapters.mixlora import MixLoraConfig
from loraloom.adapters.mola import MolaConfig
from loraloom.adapters.moslora import MosLoraConfig
from loraloom.adapters.registration import CONFIGS, any_method, register_method, take_entries
from loraloom.adapters.registration import LISTENERS as LISTENERS
from loraloom.adapters.registration import parse_adapter_config as parse_adapter_config
from loraloom.adapters.routed.method import RoutedConfig
from loraloom.adapters.smora import SmoraConfig
from loraloom.adapters.vera import VeraConfig
from loraloom.base.blocks import BLOCK_KINDS

# To add a method, import its configuration above and name it here; see also `register_method`.
CONFIGS[:] = [
    LoraConfig,
    MixLoraConfig,
    VeraConfig,
    HydraLoraConfig,
    MolaConfig,
    MosLoraConfig,
    LoraMoeConfig,
    DynMoleConfig,
    SmoraConfig,
    RoutedConfig,
]

# What a base model of an unknown type is tried with; experts do nothing until they are trained.
TRIALS: Mapping[str, AdapterConfig] = {
    **{kind: LoraConfig(rank=4, alpha=8, target_modules=kind) for kind in BLOCK_KINDS},
    "mixture": MixLoraConfig(rank=2, num_experts=2, top_k=1),
}


def _take(config: Any, package: str) -> None:
    register_method(config).package = package


take_entries("loraloom.methods", _take)

if TYPE_CHECKING:
    AnyAdapterConfig = AdapterConfig
else:
    AnyAdapterConfig = Annotated[any_method(), Field(discriminator="method")]
