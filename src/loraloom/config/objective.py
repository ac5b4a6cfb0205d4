"""What a job minimises: `train.objective`. Names are trl's where it has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from loraloom.config.fields import CheckInfo, StrictModel

BASE_REFERENCE = "base"
"""The reference that is the base model itself."""


class SftConfig(StrictModel):
    """Supervised fine-tuning: the mean of -log p over labels."""

    name: Literal["sft"] = "sft"
    """Supervised fine-tuning on the answers in the data."""


class _PairConfig(StrictModel):
    """What losses on pairs check alike."""

    @field_validator("label_smoothing", check_fields=False)
    @classmethod
    def _check_label_smoothing(cls, smoothing: float, info: CheckInfo) -> float:
        loss_type = info.data.get("loss_type", "sigmoid")
        if smoothing > 0 and loss_type != "sigmoid":
            raise ValueError(f"label_smoothing has no effect on loss_type {loss_type}; remove it")
        return smoothing


class DpoConfig(_PairConfig):
    """Direct preference optimisation against a reference policy.

    Source: Rafailov et al. 2023, DPO, arXiv:2305.18290; Azar et al. 2023, IPO, arXiv:2310.12036;
    label smoothing: Mitchell 2023, A note on DPO with noisy preferences (cDPO).
    """

    name: Literal["dpo"] = "dpo"
    """Direct preference optimisation."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss of DPO's paper, or of IPO's on log-probabilities per token."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held at the reference; the τ of IPO's paper."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """sigmoid: the share of pairs that are taken to be the wrong way round."""
    reference: str = Field(default=BASE_REFERENCE, min_length=1)
    """Policy to stay near: base for the base model, or an adapter's directory or hub id."""


class CpoConfig(_PairConfig):
    """Contrastive preference optimisation: no reference, and a likelihood term on chosen answers.

    Source: Xu et al. 2024, CPO, arXiv:2401.08417; hinge: Zhao et al. 2023, SLiC-HF,
    arXiv:2305.10425.
    """

    name: Literal["cpo"] = "cpo"
    """Contrastive preference optimisation."""
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid"
    """Loss of the margin between chosen and rejected."""
    beta: float = Field(default=0.1, gt=0)
    """Factor of the margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """sigmoid: the share of pairs that are taken to be the wrong way round."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the chosen answers' mean -log p per token."""


ObjectiveConfig = Annotated[SftConfig | DpoConfig | CpoConfig, Field(discriminator="name")]
