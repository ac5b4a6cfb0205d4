"""Tiny base models of every family with random weights, and adapters that change their outputs.

Axes: B batch, L sequence, D hidden, F feed-forward.

Models are in float64 unless asked otherwise. (transformers' norms, rotary embeddings and eager
softmax round to float32 inside, for everybody alike.)
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

import loraloom
from loraloom.adapters import (
    AdapterConfig,
    DynMoleConfig,
    HydraLoraConfig,
    LoraConfig,
    LoraMoeConfig,
    MixLoraConfig,
    MolaConfig,
    MosLoraConfig,
    RoutedConfig,
    SmoraConfig,
    VeraConfig,
)
from loraloom.adapters.contract import Adapter
from loraloom.adapters.routed.method import Expert
from loraloom.host.host import Host

VOCAB_SIZE = 97
LAYERS = 2

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GROUPS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 8,
}
_LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 20.0},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "stablelm": {"use_qkv_bias": True},
    "ministral": {"head_dim": 8},
    "ministral3": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "exaone4": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "seed_oss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 3.0},
    "cohere2": {"logit_scale": 3.0, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _EXPERTS | _LINEAR,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "axk1": _EXPERTS | _GROUPS | _LATENT,
    "deepseek_v2": _EXPERTS | _GROUPS | _LATENT,
    "glm4_moe_lite": _EXPERTS | _GROUPS | _LATENT,
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _EXPERTS | {"head_dim": 8},
    "olmoe": _EXPERTS,
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
# Mixtures of experts that are found by their structure; some have dense layers in front.
MOE_TYPES: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "layer_types": ["attention"] * LAYERS,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
    },
    "glm4_moe": _EXPERTS | _GROUPS,
    "dots1": _EXPERTS | _GROUPS,
    "deepseek_v3": _EXPERTS | _GROUPS | _LATENT,
    "ernie4_5_moe": {
        "moe_intermediate_size": 16,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "phimoe": {"num_local_experts": 4},
    "qwen3_5_moe_text": _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 16},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "lfm2_moe": _EXPERTS
    | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"], "use_expert_bias": True},
    "gemma4_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "enable_moe_block": True,
        "layer_types": ["full_attention"] * LAYERS,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
    },
}
LATENT_TYPES = ("deepseek_v3", "deepseek_v2", "glm4_moe_lite", "axk1", "minicpm3", "youtu")
"""Those with multi-head latent attention."""
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "qwen3_next")
_COMPOSITES = ("gemma3", "mistral3")
"""Models with an encoder of images beside their text part."""
_IMAGES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ALL_FAMILIES = tuple(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 granite stablelm gpt_neox "
    "smollm3".split()
)
"""One or more of each layout, which all that depends on the family is tried on."""
PADS_RIGHT_ONLY = ("gemma2",)
"""Gemma 2 needs eager attention, and gives NaN by itself in float64 with padding on the left."""
_EAGER = (*PADS_RIGHT_ONLY, "gpt_oss")

METHODS: dict[str, LoraConfig] = {
    "lora": LoraConfig(rank=3, alpha=6),
    "dora": LoraConfig(rank=2, alpha=6, weight_decomposition=True),
    "mixlora": MixLoraConfig(rank=2, alpha=4, num_experts=4, top_k=2),
    "mixdora": MixLoraConfig(rank=2, alpha=4, num_experts=3, top_k=2, weight_decomposition=True),
}
"""One configuration of each method; ranks differ."""


ALL_METHODS: dict[str, AdapterConfig] = METHODS | {
    "vera": VeraConfig(rank=5, d_initial=0.5),
    "hydralora": HydraLoraConfig(rank=2, alpha=4, num_experts=3),
    "mola": MolaConfig(rank=2, alpha=4, num_experts=(3, 4), top_k=2, router_loss_scope="per_layer"),
    "moslora": MosLoraConfig(rank=4, alpha=6),
    "loramoe": LoraMoeConfig(rank=2, alpha=4, num_experts=3),
    "dynmole": DynMoleConfig(rank=2, alpha=4, num_experts=4, entropy_threshold=0.95),
    "smora": SmoraConfig(rank=6, alpha=6, top_k=2),
    "routed": RoutedConfig(
        experts={
            "law": Expert(adapter=LoraConfig(rank=3, alpha=6)),
            "math": Expert(adapter=LoraConfig(rank=2, alpha=6)),
        },
        router="token",
        top_k=1,
        train_experts=True,
    ),
}
"""The methods that work on each projection in their own way as well."""

_EXPERTS_ALONE: dict[str, Any] = {"alpha": 6, "target_modules": ("experts",)}
_WITH_ATTENTION: dict[str, Any] = {"alpha": 6, "target_modules": ("attention", "experts")}
ON_EXPERTS: dict[str, LoraConfig] = {
    "lora": LoraConfig(rank=3, expert_rank=3, **_EXPERTS_ALONE),
    "rslora": LoraConfig(rank=4, rank_stabilized=True, **_WITH_ATTENTION),
    "dora": LoraConfig(rank=2, weight_decomposition=True, **_EXPERTS_ALONE),
    "shared": LoraConfig(rank=6, shared_outer=True, **_EXPERTS_ALONE),
    "shared-dora": LoraConfig(
        rank=4, shared_outer=True, weight_decomposition=True, **_EXPERTS_ALONE
    ),
    "some": LoraConfig(rank=4, base_experts={0: (2, 0), 1: (1,)}, dropout=0.3, **_EXPERTS_ALONE),
    "some-dora": LoraConfig(
        rank=4,
        base_experts=(1, 3),
        shared_outer=True,
        weight_decomposition=True,
        **_WITH_ATTENTION,
    ),
    "mixlora": MixLoraConfig(rank=2, num_experts=3, top_k=2, dropout=0.2, **_WITH_ATTENTION),
    "mixdora": MixLoraConfig(
        rank=2, num_experts=3, top_k=2, weight_decomposition=True, **_EXPERTS_ALONE
    ),
    "beside": LoraConfig(rank=3, alpha=6, dropout=0.2, target_modules=("attention", "moe")),
}
"""Adapters on the experts of a base model that is a mixture of them, and one beside its block."""


def changed(config: AdapterConfig, **settings: Any) -> AdapterConfig:
    """Make a configuration with other settings; unlike `model_copy` it checks them."""
    return type(config).model_validate(config.model_dump() | settings)


def tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Make a model whose weights, biases and norms are random: none is zero or one."""
    config = _tiny_config(family, changes)
    auto = AutoModelForImageTextToText if family in _COMPOSITES else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager" if family in _EAGER else "sdpa")
    if dtype == torch.float64 and family in (*MOE_TYPES, *_MIXTURES, *LATENT_TYPES):
        model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype).eval()


def _tiny_config(family: str, changes: Mapping[str, Any]) -> PreTrainedConfig:
    settings = _SMALL | _OWN.get(family, {}) | MOE_TYPES.get(family, {}) | changes
    if family not in _COMPOSITES:
        return AutoConfig.for_model(family, **settings)
    parts = AutoConfig.for_model(family)
    return AutoConfig.for_model(
        family,
        text_config={"model_type": parts.text_config.model_type, "head_dim": 8, **settings},
        vision_config={"model_type": parts.vision_config.model_type, **_IMAGES},
        image_token_index=VOCAB_SIZE - 1,
        mm_tokens_per_image=4,
    )


def randomise(adapter: Adapter, seed: int = 0) -> Adapter:
    """Move an adapter away from its initial values; all slots of its routers keep some weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name or "router" in name or "lambda_b" in name:
                parameter.normal_(std=0.3, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 2, generator=generator))
    return adapter


def tiny_host(
    family: str = "llama",
    configs: Mapping[str, AdapterConfig] = METHODS,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Host:
    """Attach randomised adapters, named as in `configs`, to a tiny model."""
    host = loraloom.attach(tiny_model(family, dtype, **changes))
    for seed, (name, config) in enumerate(configs.items()):
        randomise(host.add(name, config, seed=seed), seed)
    return host


def tiny_ids(rows: int, length: int = 7, seed: int = 0) -> Tensor:
    """Draw tokens, [B, L], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)


def padded_mask(lengths: Sequence[int], side: str = "right", length: int = 7) -> Tensor:
    """Make a mask, [B, L], with so many real tokens in each row."""
    places = torch.arange(length)
    places = places if side == "right" else places.flip(0)
    return (places < torch.tensor(lengths)[:, None]).long()


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Return the gradient of every tensor under its name; zero where there is none.

    The weights are overwritten on the way.
    """
    with torch.no_grad():
        for parameter in adapter.parameters():
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    return {name: tensor.clone() for name, tensor in adapter.tensors().items()}


def parameter_grads(module: nn.Module) -> dict[str, Tensor]:
    """Take the gradients of all parameters, and reset them."""
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return grads


@torch.no_grad()
def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Compute ‖actual - expected‖ / ‖expected‖."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-300))


def stored_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights by name as they lie in memory, quantized ones in their parts."""
    for name, tensor in model.state_dict().items():
        # torchao's tensors have their numbers and scales inside
        if hasattr(tensor, "__tensor_flatten__"):
            inner_names, _ = tensor.__tensor_flatten__()
            for inner_name in inner_names:
                yield f"{name}.{inner_name}", getattr(tensor, inner_name)
        else:
            yield name, tensor.as_subclass(Tensor)
