"""Mixtures as axolotl's plug-in writes them, read as the reference's layout.

    adapter_config.json, adapter_model.safetensors    PEFT's, with the LoRA on attention
    mixlora_model.safetensors                         routers and experts:
        base_model.model.model.layers.{L}.mlp.router.gate.weight
        base_model.model.model.layers.{L}.mlp.experts.{e}.{gate|up|down}_lora_{a|b}.weight

Number and rank of the experts are the tensors' shapes. top_k, the experts' alpha and dropout stand
in the run's YAML file alone. Experts are scaled by alpha / rank, and none is decomposed.

axolotl has gated FFN blocks with all three projections adapted, and top-k routing alone.

Source: axolotl 0.21.0, `axolotl/integrations/mixlora/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.adapters.base import BaseInfo
from loraloom.adapters.files import LORA_FIELDS, AdapterFiles, SidecarFiles
from loraloom.adapters.keys import TensorKey, target_projections
from loraloom.adapters.method import AdapterConfig
from loraloom.adapters.own import OWN_FIELDS
from loraloom.errors import AdapterError, shown
from loraloom.formats.contents import SIDECAR_SETTINGS, SIDECAR_WEIGHTS
from loraloom.formats.fields import read_settings

_LAYER = r"base_model\.model\.model\.layers\.(?P<layer>\d{1,5})"
_ATTENTION = re.compile(
    rf"{_LAYER}\.self_attn\.(?P<projection>\w+)\."
    r"(?:(?P<pair>lora_[AB])\.weight|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_ROUTER = re.compile(rf"{_LAYER}\.mlp\.router\.gate\.weight")
_EXPERT = re.compile(
    rf"{_LAYER}\.mlp\.experts\.(?P<expert>\d{{1,5}})\."
    r"(?P<projection>gate|up|down)_lora_(?P<part>[ab])\.weight"
)
_FFN = ("gate_proj", "up_proj", "down_proj")
_TRAINING_FIELDS = {
    "mixlora_router_aux_loss_coef": "router_aux_loss_coef",
    "mixlora_router_init_range": "router_init_range",
    "mixlora_jitter_noise": "jitter_noise",
}
"""Settings of training, by their names in the run's YAML and in the reference's files."""
_CHOICES = ("rank_pattern", "alpha_pattern", "layers")
"""Settings of a LoRA that a mixture lacks."""


def adopted(files: AdapterFiles) -> AdapterFiles:
    """Bring such files into the reference's layout; others stay as they are."""
    sidecar = files.sidecar
    if sidecar is None or files.config.get("peft_type") != LoraConfig.peft_type:
        return files
    run = sidecar.settings if sidecar.settings.get("adapter") == "mixlora" else {}
    experts = dict(_expert_tensors(files, sidecar))
    return replace(
        files,
        config=_attention_fields(files) | _mixture_fields(files, run, sidecar),
        tensors=dict(_attention_tensors(files)) | experts,
        sidecar=None,
        program="axolotl",
    )


def _attention_fields(files: AdapterFiles) -> dict[str, Any]:
    """Read the LoRA on attention; what a mixture can't choose is refused."""
    defaults = {name: LoraConfig.model_fields[name].default for name in LORA_FIELDS}
    settings = defaults | read_settings(files, LoraConfig, [])
    chosen = [name for name in _CHOICES if settings.get(name)]
    if chosen or settings["init"] in ("pissa", "olora"):
        raise files.error(
            "the LoRA beside a mixture must have one rank and alpha, be in every layer and leave "
            f"the base model's weights as they are, got {', '.join(chosen) or settings['init']}"
        )
    return {
        "base_model_name_or_path": files.config.get("base_model_name_or_path"),
        "target_modules": [*settings["target_modules"], *_FFN],
        **{theirs: settings[ours] for ours, theirs in LORA_FIELDS.items()},
        **{name: files.config[name] for name in OWN_FIELDS if name in files.config},
    }


def _mixture_fields(
    files: AdapterFiles, run: Mapping[str, Any], sidecar: SidecarFiles
) -> dict[str, Any]:
    num_experts, rank = _sizes(files, sidecar.tensors)
    told = run.get("mixlora_num_experts", num_experts)
    if told != num_experts:
        raise files.error(
            f"`mixlora_num_experts` in {SIDECAR_SETTINGS[0]} must be the number of experts in "
            f"{SIDECAR_WEIGHTS}, {num_experts}, got {shown(told)}; it is another run's"
        )
    expert = {
        "r": rank,
        "lora_alpha": _expert_alpha(files, run),
        "lora_dropout": run.get("mixlora_expert_lora_dropout"),
        "use_dora": False,
        "use_rslora": False,
    }
    return {
        "peft_type": "MIXLORA",
        "routing_strategy": "mixlora",
        "num_experts": num_experts,
        "top_k": _top_k(files, run),
        "expert_lora": {name: value for name, value in expert.items() if value is not None},
        **{theirs: run[name] for name, theirs in _TRAINING_FIELDS.items() if name in run},
    }


def _sizes(files: AdapterFiles, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Tell the number and the rank of the experts by the first router and the first A."""
    router = next((t for name, t in tensors.items() if _ROUTER.fullmatch(name)), None)
    lora_A = next((t for name, t in tensors.items() if name.endswith("_lora_a.weight")), None)
    if router is None or lora_A is None or router.dim() != 2 or lora_A.dim() != 2:
        raise files.error(f"{SIDECAR_WEIGHTS} must hold routers and experts of axolotl's")
    return len(router), len(lora_A)


def _top_k(files: AdapterFiles, run: Mapping[str, Any]) -> Any:
    if not run and "top_k" not in files.given:
        raise _missing(files)
    return run.get("mixlora_top_k", 2)


def _expert_alpha(files: AdapterFiles, run: Mapping[str, Any]) -> Any:
    alpha = run.get("mixlora_expert_lora_alpha") or run.get("lora_alpha")
    if alpha is None and "alpha" not in (files.given.get("experts") or {}):
        raise _missing(files)
    return alpha


def _missing(files: AdapterFiles) -> Exception:
    return files.error(
        f"{SIDECAR_WEIGHTS} doesn't tell top_k and the experts' alpha, and there is no "
        f"{SIDECAR_SETTINGS[0]} of the axolotl run beside it; put it there, or give both: "
        "host.load(name, path, settings={'top_k': 2, 'experts': {'alpha': 32}}), or "
        "loraloom convert PATH NEW --to native --set top_k=2 --set experts.alpha=32"
    )


def _attention_tensors(files: AdapterFiles) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in files.tensors.items():
        match = _ATTENTION.fullmatch(name)
        if match is None:
            raise files.error(f"`{name}` must be a tensor of a LoRA on attention")
        part = match["pair"] or match["magnitude"]
        place = f"mixlora.layers.{match['layer']}.self_attn.{match['projection']}"
        yield f"{place}.{part}.weight", tensor


def _expert_tensors(files: AdapterFiles, sidecar: SidecarFiles) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in sidecar.tensors.items():
        if match := _ROUTER.fullmatch(name):
            yield f"mixlora.layers.{match['layer']}.mlp.moe_gate.weight", tensor
        elif match := _EXPERT.fullmatch(name):
            place = f"mixlora.layers.{match['layer']}.mlp.{match['projection']}_proj"
            part = f"lora_{match['part'].upper()}"
            yield f"{place}.experts.{match['expert']}.{part}.weight", tensor
        else:
            raise files.error(f"{SIDECAR_WEIGHTS}: `{name}` is no router's or expert's tensor")


def split(
    config: AdapterConfig, tensors: Mapping[str, Tensor], base: BaseInfo
) -> tuple[LoraConfig, SidecarFiles]:
    """Part a mixture into the LoRA on attention, and the sidecar's tensors and settings.

    Raises:
        AdapterError: If axolotl's plug-in has no such mixture.
    """
    if not isinstance(config, MixLoraConfig):
        raise AdapterError(f"axolotl has mixtures of whole FFN blocks alone, got {config.title}")
    fault = _fault(config, base)
    if fault is not None:
        raise AdapterError(f"axolotl's mixtures {fault}")
    shared = {name: getattr(config, name) for name in (*LORA_FIELDS, "init")}
    paths = target_projections(config.target_modules, base)
    names = [path.rpartition(".")[2] for path in paths if path.startswith(f"{base.attention}.")]
    attention = LoraConfig(target_modules=tuple(dict.fromkeys(names)), **shared)
    named = {_sidecar_name(TensorKey.parse(name)): tensor for name, tensor in tensors.items()}
    own = {name: tensor for name, tensor in named.items() if name is not None}
    return attention, SidecarFiles(own, _run_settings(config, attention))


def _fault(config: MixLoraConfig, base: BaseInfo) -> str | None:
    """Say how axolotl's mixtures differ from one; None if they don't."""
    expert = config.expert_config
    paths = target_projections(config.target_modules, base)
    ffn = {path.rpartition(".")[2] for path in paths if path.startswith(f"{base.ffn}.")}
    if base.layers_path != "model.layers":
        return f"have their layers at model.layers, got {base.layers_path}"
    if ffn != set(_FFN):
        return f"have experts on all of {', '.join(_FFN)}, got {', '.join(sorted(ffn))}"
    if len(ffn) == len(paths):
        return "have a LoRA on attention, got none"
    if config.routing != "top_k":
        return f"have top-k routing, got {config.routing}"
    if config.shared_expert is not None or config.router_bias:
        return "have neither a shared_expert nor a router_bias, got one of them"
    if expert.weight_decomposition or expert.rank_stabilized:
        return f"scale experts by alpha / rank and decompose none, got {config.title}"
    return None


def _sidecar_name(key: TensorKey | None) -> str | None:
    """Name a router's or an expert's tensor; None for others."""
    if key is None or (key.part != "router" and key.expert is None):
        return None
    block = f"base_model.model.model.layers.{key.layer}.mlp"
    if key.part == "router":
        return f"{block}.router.gate.weight"
    projection = str(key.projection).removesuffix("_proj")
    return f"{block}.experts.{key.expert}.{projection}_{key.part.lower()}.weight"


def _run_settings(config: MixLoraConfig, attention: LoraConfig) -> dict[str, Any]:
    expert = config.expert_config
    return {
        "adapter": "mixlora",
        "plugins": ["axolotl.integrations.mixlora.MixLoraPlugin"],
        "lora_r": attention.rank,
        "lora_alpha": attention.alpha,
        "lora_dropout": attention.dropout,
        "lora_target_modules": list(attention.target_modules),
        "mixlora_num_experts": config.num_experts,
        "mixlora_top_k": config.top_k,
        "mixlora_router_aux_loss_coef": config.router_aux_loss_coef,
        "mixlora_router_init_range": config.router_init_std,
        "mixlora_jitter_noise": config.router_jitter,
        "mixlora_expert_lora_r": expert.rank,
        "mixlora_expert_lora_alpha": expert.alpha,
        "mixlora_expert_lora_dropout": expert.dropout,
    }
