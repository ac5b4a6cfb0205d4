"""Methods: a file for each, and the list of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, TypeAdapter

from loraloom.adapters.config import AdapterConfig
from loraloom.adapters.dynmole import DynMoleConfig
from loraloom.adapters.hydralora import HydraLoraConfig
from loraloom.adapters.lora import LoraConfig
from loraloom.adapters.loramoe import LoraMoeConfig
from loraloom.adapters.mixlora import ExpertsConfig as ExpertsConfig
from loraloom.adapters.mixlora import MixLoraConfig
from loraloom.adapters.mixlora import SharedExpertConfig as SharedExpertConfig
from loraloom.adapters.mola import MolaConfig
from loraloom.adapters.moslora import MosLoraConfig
from loraloom.adapters.smora import SmoraConfig
from loraloom.adapters.vera import VeraConfig

CONFIGS: tuple[type[AdapterConfig], ...] = (
    LoraConfig,
    MixLoraConfig,
    VeraConfig,
    HydraLoraConfig,
    MolaConfig,
    MosLoraConfig,
    LoraMoeConfig,
    DynMoleConfig,
    SmoraConfig,
)
"""The methods. To add one, import its configuration above and name it here."""

TRIALS: Mapping[str, AdapterConfig] = {
    "attention": LoraConfig(rank=4, alpha=8, target_modules="attention"),
    "ffn": LoraConfig(rank=4, alpha=8, target_modules="ffn"),
    "mixture": MixLoraConfig(rank=2, num_experts=2, top_k=1),
}
"""What a base model of an unknown type is tried with; experts do nothing until they are trained."""

if TYPE_CHECKING:
    AnyAdapterConfig = AdapterConfig
else:
    AnyAdapterConfig = Annotated[Union[CONFIGS], Field(discriminator="method")]  # noqa: UP007


def parse_adapter_config(settings: Mapping[str, Any]) -> AdapterConfig:
    """Check the settings of an adapter, as in the `adapter:` section of a run file."""
    return TypeAdapter(AnyAdapterConfig).validate_python(dict(settings))
