"""What other programs write for mixtures, brought into MoE-PEFT's layout of today.

MoE-PEFT before version 0.5.0, when it was mLoRA (before 0.4 the FFN had w1, w2 and w3 for gate,
down and up, and the routing was called "mixtral" or "switch"):

    {method}.layers.{L}.gate.weight             now ….{L}.mlp.moe_gate.weight
    {method}.layers.{L}.experts.{e}.{p}.lora_A… now ….{L}.mlp.{p}.experts.{e}.lora_A…
    ….layers.{L}.self_attn.{p}.lora_A…          now ….layers.{L}.mlp.{p}.lora_A…   (FFN, plain LoRA)

axolotl's plug-in, which has gated FFN blocks with all three projections adapted, top-k routing
alone, and scales experts by alpha / rank. Number and rank of the experts are the tensors' shapes;
top_k, the experts' alpha and dropout stand in the run's YAML file alone:

    adapter_config.json, adapter_model.safetensors    PEFT's, with the LoRA on attention
    mixlora_model.safetensors                         routers and experts:
        base_model.model.model.layers.{L}.mlp.router.gate.weight
        base_model.model.model.layers.{L}.mlp.experts.{e}.{gate|up|down}_lora_{a|b}.weight

Source: mikecovlee/mLoRA 0.2.1 to 0.4.6, `mlora/model.py`, `mlora/common/modelargs.py`;
axolotl 0.21.0, `axolotl/integrations/mixlora/`.
"""

import re
from dataclasses import replace

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.adapters.extra_modules import OWN_FIELDS
from loraloom.errors import shown
from loraloom.formats.fields import LORA_FIELDS, build_config
from loraloom.formats.layouts import StoredAdapter, parse
from loraloom.formats.raw_files import SIDECAR_SETTINGS, SIDECAR_WEIGHTS, AdapterFiles, Sidecar

_STRATEGIES = {"mixtral": "mixlora", "switch": "mixlora-switch"}
_PROJECTIONS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_RENAMED = (
    (r"(\w+\.layers\.\d+)\.gate\.weight", r"\1.mlp.moe_gate.weight"),
    (r"(\w+\.layers\.\d+)\.experts\.(\d+)\.(\w+)\.(lora_[AB]\.weight)", r"\1.mlp.\3.experts.\2.\4"),
    (
        r"(base_model\.model\.model\.layers\.\d+)\.self_attn\."
        r"(gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2)\.(lora_[AB]\.weight)",
        r"\1.mlp.\2.\3",
    ),
)
_LAYER = "base_model.model.model.layers."
_ROUTER = re.compile(rf"{re.escape(_LAYER)}(\d{{1,5}})\.mlp\.router\.gate\.weight")
_EXPERT = re.compile(
    rf"{re.escape(_LAYER)}(\d{{1,5}})\.mlp\.experts\.(\d{{1,5}})\."
    r"(gate|up|down)_lora_([ab])\.weight"
)
_FFN = ("gate_proj", "up_proj", "down_proj")
# Ours of training, by their names in the run's YAML.
_TRAINING_FIELDS = {
    "mixlora_router_aux_loss_coef": "router_aux_loss_coef",
    "mixlora_router_init_range": "router_init_std",
    "mixlora_jitter_noise": "router_jitter",
}


def up_to_date(files: AdapterFiles) -> AdapterFiles:
    """Bring files of MoE-PEFT's forerunners into its layout of today; others stay as they are."""
    config = dict(files.config)
    strategy = config.get("routing_strategy")
    if strategy in _STRATEGIES:
        config["routing_strategy"] = _STRATEGIES[strategy]
        if config.get("sparse_step") is not None:
            raise files.error(f"`sparse_step` is not supported, got {shown(config['sparse_step'])}")
    targets = files.targets()
    if targets:
        config["target_modules"] = [_PROJECTIONS.get(name, name) for name in targets]
    names = {}
    for name in files.tensors:
        current = re.sub(r"\bw[123]_proj\b", lambda match: _PROJECTIONS[match[0]], name)
        for pattern, new in _RENAMED:
            current = re.sub(rf"\A{pattern}\Z", new, current)
        names[name] = current
    return replace(files, config=config, tensors=files.renamed(names))


def of_axolotl(files: AdapterFiles, sidecar: Sidecar) -> StoredAdapter:
    """Understand a mixture of axolotl's: PEFT's files of a LoRA, and what lies beside them."""
    attention = parse(replace(files, overrides={}), LoraConfig)
    experts = {}
    for name, tensor in sidecar.tensors.items():
        router_name = _ROUTER.fullmatch(name)
        expert_name = _EXPERT.fullmatch(name)
        if router_name is not None:
            experts[f"layers.{router_name[1]}.mlp.router"] = tensor
        elif expert_name is not None:
            layer, expert, projection, side = expert_name.groups()
            prefix = f"layers.{layer}.mlp.{projection}_proj.experts.{expert}"
            experts[f"{prefix}.lora_{side.upper()}"] = tensor
        else:
            raise files.error(f"{SIDECAR_WEIGHTS}: `{name}` is not a tensor of a router or expert")
    router = next((t for key, t in experts.items() if key.endswith("router")), None)
    lora_A = next((t for key, t in experts.items() if key.endswith("lora_A")), None)
    if router is None or lora_A is None or router.dim() != 2 or lora_A.dim() != 2:
        raise files.error(f"{SIDECAR_WEIGHTS} must contain routers and experts of axolotl's")
    # The directory may hold the settings of another run, of a LoRA for instance.
    run = sidecar.settings if sidecar.settings.get("adapter") == "mixlora" else {}
    alpha = run.get("mixlora_expert_lora_alpha") or run.get("lora_alpha")
    lacks_alpha = alpha is None and "alpha" not in (files.overrides.get("experts") or {})
    if lacks_alpha or (not run and "top_k" not in files.overrides):
        raise files.error(
            f"top_k and the experts' alpha are not in {SIDECAR_WEIGHTS}, and {SIDECAR_SETTINGS[0]} "
            f"of the axolotl run is missing; add {SIDECAR_SETTINGS[0]}, or pass both values: "
            "host.load(name, path, settings={'top_k': 2, 'experts': {'alpha': 32}}), or "
            "loraloom convert PATH NEW --to native --set top_k=2 --set experts.alpha=32"
        )
    expert_settings = {
        "rank": len(lora_A),
        "alpha": alpha,
        "dropout": run.get("mixlora_expert_lora_dropout"),
        "weight_decomposition": False,
        "rank_stabilized": False,
    }
    settings = {
        **attention.config.model_dump(include={*LORA_FIELDS, *OWN_FIELDS}),
        "target_modules": (*attention.config.target_modules, *_FFN),
        "num_experts": len(router),
        "top_k": run.get("mixlora_top_k", 2),
        "experts": expert_settings,
        **{ours: run[theirs] for theirs, ours in _TRAINING_FIELDS.items() if theirs in run},
    }
    config = build_config(files, MixLoraConfig, settings)
    return replace(attention, layout="axolotl", config=config, tensors=attention.tensors | experts)
