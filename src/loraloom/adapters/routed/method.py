"""Adapters that were trained apart as one: they stay as they are, and a router chooses among them.

Axes: T tokens, I in_features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, SerializeAsAny, WithJsonSchema, field_validator
from torch import Tensor, nn
from typing_extensions import override

from loraloom.adapters.contract import MAX_NUMBER, Adapter, AdapterConfig, Adjustable, tensors_of
from loraloom.adapters.extra_modules import refuse_own_parts
from loraloom.adapters.low_rank import LowRankAdapter, generator_for
from loraloom.adapters.projection import Projection
from loraloom.adapters.registration import parse_adapter_config
from loraloom.adapters.routed.prompt_router import PromptRouter
from loraloom.adapters.segment import MoeFfn, SegmentTokens
from loraloom.adapters.weighted_sum import MAX_MEMBERS, SumProjection, check_adds_up, sum_blocks
from loraloom.base.blocks import BaseLayer, Block
from loraloom.config.data import PromptForm
from loraloom.config.fields import StrictModel, check_name, checked
from loraloom.errors import AdapterError
from loraloom.routing.routes import TopK, router_logits

# Settings that only the experts have.
_OF_EXPERTS = ("rank", "dropout", "modules_to_save", "trainable_token_indices")
MAX_EXPERTS = 256


class Expert(StrictModel):
    """Adapter inside a routed adapter."""

    adapter: Annotated[SerializeAsAny[AdapterConfig], WithJsonSchema({"type": "object"})]
    """The settings of its method."""
    prompt: PromptForm | None = None
    """How its training data wrote prompts."""

    @field_validator("adapter", mode="before")
    @classmethod
    def _parse(cls, settings: Any) -> Any:
        return parse_adapter_config(settings) if isinstance(settings, Mapping) else settings


# Reads an adapter by its name on the host, directory or Hub ID.
ReadSource = Callable[[str], tuple[AdapterConfig, PromptForm | None, Mapping[str, Tensor]]]


class RoutedConfig(AdapterConfig):
    """Frozen adapters as experts: y = Wx + Σ_j g_j u_e(j)(x), u what an adapter adds by itself.

    Source: Ostapenko et al. 2024, Arrow, arXiv:2405.11157, section 4; peft 0.21.2,
    `peft/tuners/lora/arrow.py`. By prompt: as LORAUTER, arXiv:2601.21795, chooses among adapters by
    their data, here with a linear head on the base model's states.
    """

    peft_type = "ROUTED"
    title = "routed"
    formula = "y = Wx + Σ_j g_j u_e(j)(x), u of adapters trained apart"

    method: Literal["routed"] = "routed"
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
    train_experts: Adjustable[bool] = False
    """With router: token, whether the experts are trained further too."""
    num_layers_read: int = Field(default=0, ge=0, le=2**10)
    """Number of decoder layers before the states that a router by prompt reads; 0: embeddings."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        for name in _OF_EXPERTS:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                yield f"{name} is a setting of the experts, got {value}; remove {name}"
        if self.target_modules in ("attention", "ffn"):  # files name those that the experts have
            yield f"target_modules are those of the experts; remove {self.target_modules}"
        if self.experts_per_token > len(self.experts):
            yield f"top_k must be in [1, {len(self.experts)} experts], got {self.top_k}"
        if self.train_experts and self.router != "token":
            yield f"train_experts must be false with router: {self.router}, which is not trained"
        if self.router == "prompt" and self.experts_per_token > MAX_MEMBERS:
            yield f"top_k must be at most {MAX_MEMBERS} with router: prompt, got {self.top_k}"
        if self.num_layers_read and self.router != "prompt":
            yield f"num_layers_read requires router: prompt, got router: {self.router}"

    @property
    def experts_per_router(self) -> int:
        return len(self.experts)

    @property
    def experts_per_token(self) -> int:
        if self.top_k is not None:
            return self.top_k
        return 1 if self.router == "prompt" else min(len(self.experts), 3)

    @property
    def collapse_advice(self) -> str:
        return super().collapse_advice if self.router == "token" else ""  # nothing has collapsed

    @property
    def sources(self) -> dict[str, str]:
        """Adapters that are not read yet, by the expert's name."""
        experts = self.experts.items()
        return {name: source for name, source in experts if isinstance(source, str)}

    def with_experts(self, experts: Mapping[str, str | Expert]) -> RoutedConfig:
        return checked(RoutedConfig, {**dict(self), "experts": {**self.experts, **experts}})

    def targeted_keys(self, base_layers: Sequence[BaseLayer]) -> frozenset[str]:
        experts = self._expert_configs().values()
        return frozenset().union(*(config.targeted_keys(base_layers) for config in experts))

    def with_targets(self, keys: Set[str], base_layers: Sequence[BaseLayer]) -> RoutedConfig:
        return self  # its experts name theirs

    def check_fits(self, base_layers: Sequence[BaseLayer]) -> None:
        for name, config in self._expert_configs().items():
            if isinstance(config, RoutedConfig):
                raise AdapterError(f"expert {name} must not be routed itself; name its own experts")
            refuse_own_parts(config, f"expert {name!r}", "be routed to")
            config.check_fits(base_layers)
        if self.num_layers_read > len(base_layers):
            raise AdapterError(
                f"num_layers_read must be at most the base model's {len(base_layers)} layers, "
                f"got {self.num_layers_read}"
            )

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        experts = list[Adapter]()
        for expert_name, config in self._expert_configs().items():
            expert_seed = generator_for(seed, expert_name).initial_seed()
            expert = config.build(f"{name}/{expert_name}", base_layers, dtype, expert_seed)
            expert.prompt = self.experts[expert_name].prompt  # ty: ignore[missing-union-attribute]
            expert.is_trained = False
            experts.append(expert)
        return RoutedAdapter(name, self, base_layers, experts, dtype, seed)

    @override
    def summary(self) -> dict[str, Any]:
        experts = {name: config.summary() for name, config in self._expert_configs().items()}
        return super().summary() | {"experts": experts}

    def _expert_configs(self) -> dict[str, AdapterConfig]:
        if self.sources:
            raise AdapterError(f"experts must have been read, got {', '.join(self.sources)}")
        experts = self.experts.items()
        return {name: expert.adapter for name, expert in experts if isinstance(expert, Expert)}


def of_experts(experts: Mapping[str, str], **settings: Any) -> RoutedConfig:
    return checked(RoutedConfig, {"experts": experts, **settings})


def sources_of(config: AdapterConfig) -> Mapping[str, str]:
    """Name the adapters that an adapter is to be made of; most are made of none."""
    return config.sources if isinstance(config, RoutedConfig) else {}


def expert_names(config: AdapterConfig) -> list[str]:
    """Name the experts of a router in their order, by numbers where they have no names."""
    if isinstance(config, RoutedConfig):
        return list(config.experts)
    return [str(number) for number in range(config.experts_per_router)]


def add_experts(config: AdapterConfig, sources: Mapping[str, str]) -> AdapterConfig:
    """Give the settings with further adapters, and as many experts for a token as before."""
    if not isinstance(config, RoutedConfig):
        raise AdapterError(f"{config.title} does not contain other adapters; use method: routed")
    for name in sorted(sources):
        if name in config.experts:
            raise AdapterError(f"expert {name!r} exists already; choose another name")
    extended = config.with_experts(sources)
    if extended.experts_per_token == config.experts_per_token:
        return extended
    return extended.model_copy(update={"top_k": config.experts_per_token})


def build_from_sources(
    config: AdapterConfig, read: ReadSource, build: Callable[[AdapterConfig], Adapter]
) -> Adapter:
    """Build a new adapter; one that is made of others has their weights."""
    if not isinstance(config, RoutedConfig):
        return build(config)
    if not config.sources and not config.train_experts:
        raise AdapterError(
            "experts must be directories, Hub IDs or names of adapters on the host, got "
            "settings alone, without weights"
        )
    experts: dict[str, Expert] = {}
    weights: dict[str, Mapping[str, Tensor]] = {}
    for name, source in config.sources.items():
        expert_config, prompt, weights[name] = read(source)
        experts[name] = Expert(adapter=expert_config, prompt=prompt)
    adapter = build(config.with_experts(experts) if experts else config)
    for name, tensors in weights.items():
        adapter.members[name].load_tensors(tensors)
    if config.router == "arrow":
        for projection in adapter.projections():
            assert isinstance(projection, RoutedUpdates)
            projection.compute_prototypes()
    return adapter


def prompt_router_of(adapter: Adapter) -> PromptRouter | None:
    """Return the router that chooses an adapter's expert for a whole prompt, if it has one."""
    return adapter.prompt_router if isinstance(adapter, RoutedAdapter) else None


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
        is_by_prompt = config.router == "prompt"
        if config.experts_per_token > 1 or not is_by_prompt:
            for expert in experts:
                check_adds_up(expert)
        # A router by prompt chooses before the forward, which then runs what it has chosen.
        added = [] if is_by_prompt else experts

        def make(updates: Sequence[tuple[Projection, float]]) -> RoutedUpdates:
            return RoutedUpdates(updates, config, dtype, seed)

        layers = sum_blocks(base_layers, added, [1.0] * len(added), make)
        super().__init__(name, config, base_layers, layers)
        self.prompt_router = None
        if is_by_prompt:
            shape = (len(experts), base_layers[0].hidden_size)
            router = PromptRouter(shape, config.num_layers_read, config.temperature)
            device = base_layers[0].blocks[0].device
            self.prompt_router = router.to(dtype=dtype, device=device)
        self.experts = nn.ModuleList(experts)
        self.members = dict(zip(config.experts, experts, strict=True))
        if not config.train_experts:
            self.experts.requires_grad_(False)
        self.is_trained = config.router == "token"
        self.prompt = None if self.forms_differ else experts[0].prompt

    def as_moe(self, block: Block) -> MoeFfn:
        names = ", ".join(f"{self.name}/{name}" for name in self.members)
        raise self._no_moe(f"{self.config.title}; from Python, export one of its experts, {names}")

    def tensors(self) -> dict[str, Tensor]:
        tensors = tensors_of([*self.layers.modules(), self.prompt_router])
        for number, expert in enumerate(self.members.values()):
            for name, tensor in expert.tensors().items():
                tensors[f"experts.{number}.{name}"] = tensor
        return tensors


class RoutedUpdates(SumProjection):
    """The experts' weights on a projection, and its router, [E, I]."""

    def __init__(
        self,
        updates: Sequence[tuple[Projection, float]],
        config: RoutedConfig,
        dtype: torch.dtype,
        seed: int,
    ):
        super().__init__(updates)
        self.config = config
        self._is_arrow = config.router == "arrow"
        self._maps = super().maps_rank_space
        self._route = TopK(config.experts_per_token)
        self._check_can_be_weighed()
        rows = torch.zeros(len(updates), self.base.in_features, dtype=torch.float32)
        if not self._is_arrow:
            for expert, row in enumerate(rows):
                row.normal_(std=0.02, generator=generator_for(seed, self._name(expert)))
        device = self.base.device
        self.router = nn.Parameter(rows.to(dtype=dtype, device=device))
        self.router.requires_grad_(not self._is_arrow)
        expert_of_column = list[int]()
        for expert, update in enumerate(self.updates):
            expert_of_column += [expert] * update.num_columns
        owners = torch.tensor(expert_of_column, device=device)
        self.register_buffer("owners", owners, persistent=False)

    def _check_can_be_weighed(self) -> None:
        if len(self.updates) < len(self.config.experts):
            variant = f"some not on {self.key}"
        elif self.base.num_experts is not None:
            variant = f"updates of a base model's experts, {self.key}"
        elif self._maps and self._is_arrow:
            variant = "updates that are not BA"
        elif any(update.row_scale() is not None for update in self.updates):
            variant = "updates that are not BA" if self._maps else "weight_decomposition"
        else:
            return
        raise AdapterError(
            f"router: {self.config.router} weighs what experts add to a projection, so all must "
            f"be LoRAs on the same ones, got {variant}; router: prompt accepts others"
        )

    @property
    def maps_rank_space(self) -> bool:
        return True

    @torch.no_grad()
    def compute_prototypes(self) -> None:
        """Compute Arrow's prototypes: the first right singular vector of each update."""
        dtype = torch.promote_types(self.router.dtype, torch.float32)
        for row, update in zip(self.router, self.updates, strict=True):
            # float64 on the CPU, which some devices lack
            A = update.compute_A(dtype).cpu().double()
            B = update.compute_B(dtype).cpu().double()
            triangle = torch.linalg.qr(B.T).R
            directions = torch.linalg.svd(triangle @ A, full_matrices=False).Vh
            row.copy_(directions[0])

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        logits = router_logits(hidden_states, self.router)
        if self._is_arrow:
            logits = logits.abs()
        logits = logits / self.config.temperature
        selected, chosen = self._route(logits)
        tokens.record_routing(logits, selected, chosen, self.path)
        weights = torch.zeros_like(logits).scatter(1, selected, chosen).to(low_rank.dtype)  # (T, E)
        if not self._maps:
            return low_rank * weights.index_select(1, self.get_buffer("owners"))
        mapped = self.mapped(low_rank, hidden_states, tokens)
        pairs = zip(mapped, weights.split(1, 1), strict=True)
        return torch.cat([columns * weight for columns, weight in pairs], 1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for expert, row in enumerate(self.router.detach()):
            yield self._name(expert), row

    def _name(self, expert: int) -> str:
        return f"{self.key}.experts.{expert}.router"
