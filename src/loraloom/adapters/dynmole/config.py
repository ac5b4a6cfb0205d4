"""Settings of DynMoLE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from loraloom.adapters.config import MAX_NUMBER, ExpertCount, MixtureConfig
from loraloom.adapters.keys import Shape, TensorKey, routed_shapes
from loraloom.adapters.lora.files import lora_settings
from loraloom.adapters.reference import shared_fields
from loraloom.config.fields import CheckInfo
from loraloom.errors import shown

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles

_ROUTING_FIELDS = ("keep_top_k", "top_p", "entropy_threshold", "entropy_index", "entropy_eps")
"""Settings that its authors' code keeps in adapter_config.json under the same names."""
_OWN_SETTINGS = {"init", "router_entropy_loss_coef", "router_aux_loss_coef"}
"""Those that it has no field for, under `"loraloom": {"adapter": …}`."""


class DynMoleConfig(MixtureConfig):
    """A router and LoRA experts on each projection; all are used where the router is undecided.

    Source: Li et al. 2025, DynMoLE, arXiv:2504.00661; settings, defaults and names in files as in
    its code, github.com/mikecovlee/DynMoLE.
    """

    adds_up_over_ranks = False
    peft_type = "DYNMOLE"
    layout = "reference"
    title = "DynMoLE"
    formula = "y = Wx + s·Σ_e ω_e B_e(A_e x), ω = p, of low entropy cut to top_p"

    method: Literal["dynmole"] = "dynmole"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Mixture of LoRA experts whose number depends on the router's entropy."""
    num_experts: ExpertCount = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    """Experts of each projection."""
    keep_top_k: int = Field(default=2, ge=1, validate_default=True)
    """Experts that each token uses at least."""
    top_p: float = Field(default=0.75, gt=0, le=1)
    """A token uses the most probable experts while they sum to at most this."""
    entropy_threshold: float = Field(default=0.9, gt=0, le=1)
    """Tsallis entropy of the probabilities, as a share of its maximum, above which a token uses all
    experts."""
    entropy_index: float = Field(default=1.1, gt=0, le=2)
    """q of the Tsallis entropy; 1 is Shannon's."""
    entropy_eps: float = Field(default=1e-5, gt=0, le=1)
    """Added to each probability in the entropy."""
    router_entropy_loss_coef: float = Field(default=0.01, ge=0, le=MAX_NUMBER)
    """Weight of the mean entropy, which makes routers decide."""
    router_aux_loss_coef: float = Field(default=0.001, ge=0, le=MAX_NUMBER)
    """Weight of the load-balance loss."""

    @field_validator("keep_top_k")
    @classmethod
    def _check_keep_top_k(cls, keep: int, info: CheckInfo) -> int:
        num_experts = info.data.get("num_experts", keep)
        if keep > num_experts:
            raise ValueError(f"keep_top_k must be in [1, num_experts={num_experts}], got {keep}")
        return keep

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.dynmole.weights import DynMoleAdapter, route_of
        from loraloom.adapters.routed import RoutedProjection

        route = route_of(self)

        def build(base, _):
            return RoutedProjection(base, self, self.num_experts, route, dtype, seed)

        return DynMoleAdapter.of(name, self, base_layers, build)

    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        return routed_shapes(place, out_features, in_features, self.num_experts, self.rank)

    @property
    def collapse_advice(self) -> str:
        """See AdapterConfig."""
        return "raise router_aux_loss_coef, or lower learning_rate"

    @property
    def routing_label(self) -> str:
        """See MixtureConfig."""
        return f"top-p {self.top_p:g} or all"

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        return super().summary() | self.model_dump(include=set(_ROUTING_FIELDS))

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        return [
            *super().card_lines(),
            f"{self.num_experts} experts on each projection, all for tokens with an entropy "
            f"(q = {self.entropy_index:g}, eps = {self.entropy_eps:g}) above "
            f"{self.entropy_threshold:g}, else top-p {self.top_p:g}, {self.keep_top_k} at least",
        ]

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """See AdapterConfig."""
        return {
            **shared_fields(self, base, decomposed=False),
            "routing_strategy": "dynmole",
            "num_experts": self.num_experts,
            **{name: getattr(self, name) for name in _ROUTING_FIELDS},
            "entropy_type": "tsallis",
            "loraloom": {"adapter": self.model_dump(mode="json", include=_OWN_SETTINGS)},
        }

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """See AdapterConfig."""
        kind = files.config.get("entropy_type", "tsallis")
        if kind != "tsallis":
            raise files.error(f"`entropy_type` must be tsallis, got {shown(kind)}")
        settings = lora_settings(files, projections)
        if settings.pop("weight_decomposition"):
            raise files.error("`use_dora` must be unset: experts of a DynMoLE aren't decomposed")
        known = {name: files.config[name] for name in _ROUTING_FIELDS if name in files.config}
        return {
            **settings,
            **known,
            "num_experts": files.required("num_experts"),
            **files.section("loraloom").get("adapter", {}),
        }
