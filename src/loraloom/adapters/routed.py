"""Adapters that were trained apart as one: they stay as they are, and a router chooses among them.

Axes: T tokens, I in_features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from typing_extensions import override

from loraloom.adapters.contract import MAX_NUMBER, Adapter, AdapterConfig, Expert, Free, Projection
from loraloom.adapters.extra_modules import refuse_own_parts
from loraloom.adapters.low_rank import LowRankAdapter, generator_for
from loraloom.adapters.prompt_router import PromptRouter
from loraloom.adapters.segment import SegmentTokens
from loraloom.adapters.tensor_names import Weights
from loraloom.adapters.weighted_sum import MAX_MEMBERS, SumProjection, check_adds_up, sum_blocks
from loraloom.base.blocks import BaseLayer, Block
from loraloom.config.fields import check_name, checked
from loraloom.errors import AdapterError
from loraloom.routing.routes import TopK, router_logits

# What settings of its own an adapter of others has not.
_OF_EXPERTS = ("rank", "dropout", "modules_to_save", "trainable_token_indices")
MAX_EXPERTS = 256


class RoutedConfig(AdapterConfig):
    """Frozen adapters as experts: y = Wx + Σ_j g_j u_e(j)(x), u what an adapter adds by itself.

    Source: Ostapenko et al. 2024, Arrow, arXiv:2405.11157, section 4; peft 0.21.2,
    `peft/tuners/lora/arrow.py`. By prompt: as LORAUTER, arXiv:2601.21795, chooses among adapters by
    their data, here with a linear head on the base model's states.
    """

    peft_type = "ROUTED"
    title = "routed"
    formula = "y = Wx + Σ_j g_j u_e(j)(x), u of adapters trained apart"

    method: Literal["routed"] = "routed"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Separately trained adapters, and a router that chooses among them."""
    experts: dict[Annotated[str, AfterValidator(check_name)], str | Expert] = Field(
        min_length=1, max_length=MAX_EXPERTS
    )
    """The adapters, by name: directories, Hub IDs, or names of adapters on the host."""
    router: Literal["prompt", "arrow", "token"] = "prompt"
    """Router: one choice for a whole prompt, fitted by `fit_router`; for each token and projection
    the direction in which an expert's update is largest (arrow), or a trained router (token)."""
    top_k: int | None = Field(default=None, ge=1)
    """Number of experts used at once. Default: one per prompt, three per token."""
    temperature: float = Field(default=1.0, gt=0, le=MAX_NUMBER)
    """Divisor of the logits before the softmax."""
    train_experts: Free[bool] = False
    """With router: token, whether the experts are trained further too."""
    equal_weights: bool = False
    """With router: token, whether chosen experts weigh 1 / top_k each in place of their softmax,
    as in ReMix, arXiv:2603.10160. What trains the router is the softmax's gradient."""
    num_layers_read: int = Field(default=0, ge=0, le=2**10)
    """Number of decoder layers before the states that a router by prompt reads; 0: embeddings."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        for name in _OF_EXPERTS:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                yield f"{name} is a setting of the experts, got {value}; remove {name}"
        if self.target_modules in ("attention", "ffn"):  # files name those that the experts have
            yield f"target_modules are those of the experts; remove {self.target_modules}"
        if self.experts_per_token > len(self.experts):
            yield f"top_k must be in [1, {len(self.experts)} experts], got {self.top_k}"
        if self.train_experts and self.router != "token":
            yield f"train_experts must be false with router: {self.router}, which is not trained"
        if self.equal_weights and (self.router != "token" or self.experts_per_token < 2):
            yield "equal_weights requires router: token and a top_k of 2 or more"
        if self.router == "prompt" and self.experts_per_token > MAX_MEMBERS:
            yield f"top_k must be at most {MAX_MEMBERS} with router: prompt, got {self.top_k}"
        if self.num_layers_read and self.router != "prompt":
            yield f"num_layers_read requires router: prompt, got router: {self.router}"

    @property
    def expert_names(self) -> Sequence[str]:
        return [*self.experts]

    @property
    def experts_per_router(self) -> int:
        return len(self.experts)

    @property
    def experts_per_token(self) -> int:
        return self.top_k or min(len(self.experts), 1 if self.router == "prompt" else 3)

    @property
    def collapse_advice(self) -> str:
        return super().collapse_advice if self.router == "token" else ""  # nothing has collapsed

    @property
    def sources(self) -> Mapping[str, str]:
        return {name: one for name, one in self.experts.items() if isinstance(one, str)}

    def with_experts(self, more: Mapping[str, str | Expert]) -> RoutedConfig:
        if taken := (self.experts.keys() - self.sources.keys()) & more.keys():
            raise AdapterError(f"expert {min(taken)!r} exists already; choose another name")
        return checked(RoutedConfig, {**dict(self), "experts": {**self.experts, **more}})

    def check_begins(self) -> None:
        if not self.train_experts:
            raise AdapterError(
                "experts must be directories, Hub IDs or names of adapters on the host, got "
                "settings alone, without weights"
            )

    def targets_in(self, block: Block) -> frozenset[str]:
        return frozenset[str]().union(*(one.adapter.targets_in(block) for one in self._read()))

    def check_fits(self, base_layers: Sequence[BaseLayer]) -> None:
        for name, one in zip(self.experts, self._read(), strict=True):
            if isinstance(one.adapter, RoutedConfig):
                raise AdapterError(f"expert {name} must not be routed itself; name its own experts")
            refuse_own_parts(one.adapter, f"expert {name!r}", "be routed to")
            one.adapter.check_fits(base_layers)
        if self.num_layers_read > len(base_layers):
            most = f"num_layers_read must be at most the base model's {len(base_layers)} layers"
            raise AdapterError(f"{most}, got {self.num_layers_read}")

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        experts = list[Adapter]()
        for own, one in zip(self.experts, self._read(), strict=True):
            drawn = generator_for(seed, own).initial_seed()  # what it begins with, by its name
            experts.append(one.adapter.build(f"{name}/{own}", base_layers, dtype, drawn))
            experts[-1].prompt, experts[-1].is_trained = one.prompt, False
        return RoutedAdapter(name, self, base_layers, experts, dtype, seed)

    @override
    def summary(self) -> dict[str, Any]:
        own = zip(self.experts, self._read(), strict=True)
        return super().summary() | {"experts": {name: one.adapter.summary() for name, one in own}}

    def _read(self) -> list[Expert]:
        if self.sources:
            raise AdapterError(f"experts must have been read, got {', '.join(self.sources)}")
        return [one for one in self.experts.values() if isinstance(one, Expert)]


def of_experts(experts: Mapping[str, str], **settings: Any) -> RoutedConfig:
    """Give the settings of an adapter of others: directories, Hub IDs, or names on the host."""
    return checked(RoutedConfig, {"experts": experts, **settings})


class RoutedAdapter(LowRankAdapter):
    """Adapters that are frozen, and what chooses among them."""

    config: RoutedConfig

    def __init__(
        self,
        name: str,
        config: RoutedConfig,
        base_layers: Sequence[BaseLayer],
        experts: Sequence[Adapter],
        dtype: torch.dtype,
        seed: int,
    ):
        by_prompt = config.router == "prompt"
        added = [] if by_prompt else experts
        for expert in experts if config.experts_per_token > 1 else added:
            check_adds_up(expert)
        layers = sum_blocks(
            base_layers,
            added,
            [1.0] * len(added),
            lambda parts: _Routed(parts, config, len(experts), dtype, seed),
        )
        Adapter.__init__(self, name, config, base_layers, layers)
        if by_prompt:
            shape = (len(experts), base_layers[0].hidden_size)
            self.chooser = PromptRouter(shape, config.num_layers_read, config.temperature)
            device = next(one.device for layer in base_layers for one in layer.projections)
            self.chooser.to(dtype=dtype, device=device)
        self.experts = nn.ModuleList(experts)
        if not config.train_experts:
            self.experts.requires_grad_(False)
        self.is_trained = config.router == "token"
        self.prompt = None if self.forms_differ else experts[0].prompt

    @property
    def parts(self) -> Sequence[Adapter]:
        return (self, *self.experts)  # pyright: ignore[reportReturnType]

    @property
    def part_names(self) -> Sequence[str]:
        return list(self.config.experts)

    @torch.no_grad()
    def begin(self) -> None:
        for one in self.projections():
            assert isinstance(one, _Routed)
            one.begin()

    def tensors(self) -> dict[str, Tensor]:
        """Return each expert's tensors behind its number, and those of the routers."""
        parts = enumerate(self.parts[1:])
        of_experts = {f"experts.{e}.{n}": t for e, one in parts for n, t in one.tensors().items()}
        holders = [*self.layers.modules(), self.chooser]
        routers = [one for one in holders if isinstance(one, Weights)]
        return {name: tensor for one in routers for name, tensor in one.tensors()} | of_experts


class _Routed(SumProjection):
    """The experts' weights on a projection, and its router, [E, I]."""

    def __init__(
        self,
        parts: Sequence[tuple[Projection, float]],
        config: RoutedConfig,
        num_experts: int,
        dtype: torch.dtype,
        seed: int,
    ):
        super().__init__(parts)
        modules = [module for module, _ in parts]
        is_arrow = config.router == "arrow"
        maps = any(one.maps_rank_space for one in modules)
        scales = any(one.row_scale() is not None for one in modules)
        if len(parts) < num_experts or scales or (is_arrow and maps):
            found = "updates that are not BA" if maps else "weight_decomposition"
            found = f"some not on {self.key}" if len(parts) < num_experts else found
            raise AdapterError(
                f"router: {config.router} weighs what experts add to a projection, so all must be "
                f"LoRAs on the same ones, got {found}; router: prompt accepts others"
            )
        self.config = config
        self._is_arrow, self._maps = is_arrow, maps
        self._route = TopK(config.experts_per_token)
        rows = torch.zeros(num_experts, self.base.in_features, dtype=torch.float32)
        if not is_arrow:
            for expert, row in enumerate(rows):
                row.normal_(std=0.02, generator=generator_for(seed, self._name(expert)))
        rows = rows.to(dtype=dtype, device=self.base.device)
        self.router = nn.Parameter(rows, requires_grad=not is_arrow)
        owners = [expert for expert, one in enumerate(modules) for _ in range(one.num_columns)]
        owners = torch.tensor(owners, device=self.base.device)
        self.register_buffer("owners", owners, persistent=False)

    @property
    def maps_rank_space(self) -> bool:
        return True

    def begin(self) -> None:
        """Take Arrow's prototypes: the first right singular vector of each update."""
        for row, (part, _) in zip(self.router if self._is_arrow else (), self._parts, strict=False):
            dtype = torch.promote_types(self.router.dtype, torch.float32)
            # float64 on the CPU, which some devices lack
            A, B = (weight(dtype).cpu().double() for weight in (part.compute_A, part.compute_B))
            row.copy_(torch.linalg.svd(torch.linalg.qr(B.T).R @ A, full_matrices=False).Vh[0])

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh each expert's columns by the token's routing."""
        logits = router_logits(hidden_states, self.router)
        logits = (logits.abs() if self._is_arrow else logits) / self.config.temperature
        selected, chosen = self._route(logits)
        if self.config.equal_weights:
            # ReMix trains its routers by policy gradients; here the backward pass sees the softmax
            chosen = chosen - chosen.detach() + 1 / self.config.experts_per_token
        tokens.record_routing(logits, selected, chosen, self.path)
        weights = torch.zeros_like(logits).scatter(1, selected, chosen).to(low_rank.dtype)  # (T, E)
        if not self._maps:
            return low_rank * weights.index_select(1, self.get_buffer("owners"))
        parts = self.mapped(low_rank, hidden_states, tokens)
        return torch.cat([z * g for z, g in zip(parts, weights.split(1, 1), strict=True)], 1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for expert, row in enumerate(self.router.detach()):
            yield self._name(expert), row

    def _name(self, expert: int) -> str:
        return f"{self.key}.experts.{expert}.router"
