"""How an adapter's weights follow their gradients."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, WithJsonSchema, field_validator

from loraloom.config.fields import CheckInfo, StrictModel

OptimizerName = Literal[
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "adamw_8bit",
    "ademamix_8bit",
    "lion_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "paged_ademamix_8bit",
    "paged_lion_8bit",
]
"""The optimizers of torch.optim, in lower case, and bitsandbytes' as transformers calls them.

Three can't be used: lbfgs evaluates the loss several times a step, muon takes matrices only (a
mixture's experts are stacked), sparseadam takes sparse gradients only.
"""

_IN_ANY_CASE = "|".join(
    re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", name)
    for name in get_args(OptimizerName)
)
_SCHEMA = {
    "anyOf": [
        {"enum": list(get_args(OptimizerName))},  # what editors complete
        {"type": "string", "pattern": f"^({_IN_ANY_CASE})$"},
    ]
}


class OptimizerConfig(StrictModel):
    """How an adapter's weights follow their gradients."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Highest learning rate of the schedule."""
    optimizer: Annotated[OptimizerName, WithJsonSchema(_SCHEMA)] = "adamw"
    """An optimizer of torch.optim, or of bitsandbytes in 8 bits or paged, by name in any case."""
    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, for example `{betas: [0.9, 0.95]}`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the adapter's weights. 0 as in transformers' Trainer; torch's own is 0.01."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """LoRA+: lora_B learns at this multiple of learning_rate (Hayou et al., arXiv:2402.12354)."""
    router_lr_ratio: float | None = Field(default=None, gt=0)
    """Routers learn at this multiple of learning_rate."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _lower(cls, name: Any) -> Any:
        return name.lower() if isinstance(name, str) else name

    @field_validator("optimizer_args")
    @classmethod
    def _check_optimizer_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        for own, argument in (
            ("learning_rate", "lr"),
            ("weight_decay", "weight_decay"),
            ("parameters", "params"),
        ):
            if argument in args:
                raise ValueError(
                    f"optimizer_args must not hold {argument}: the job's own {own} is used"
                )
        return args

    @field_validator("weight_decay")
    @classmethod
    def _check_weight_decay(cls, weight_decay: float, info: CheckInfo) -> float:
        if weight_decay > 0 and info.data.get("optimizer") == "rprop":
            raise ValueError("weight_decay has no effect on rprop; remove it")
        return weight_decay
