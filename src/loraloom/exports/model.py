"""Adapters for other engines: whole models, or GGUF adapters.

A mixture becomes a mixture-of-experts checkpoint, a plain adapter is merged into its base model.
Weights are made and written one decoder layer at a time, quantized ones in floating point. Then the
files are read back: the logits of what transformers loads are compared with the adapter's.

Source: transformers 5.24, the classes' `modeling_*.py`.
"""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from loraloom.adapters.combining import check_merges
from loraloom.adapters.contract import Adapter
from loraloom.adapters.extra_modules import own_parts, refuse_own_parts
from loraloom.atomic_io import write_directory, write_file, write_json
from loraloom.base.blocks import Block
from loraloom.base.loading import DTYPES, quiet
from loraloom.base.quantization import name_of_weight, quantized_weights
from loraloom.config.model import Dtype
from loraloom.errors import AdapterError, ConfigError, shown
from loraloom.exports.gguf import architecture_of, write_gguf_adapter
from loraloom.formats.raw_files import write_safetensors
from loraloom.host.host import Host

ExportForm = Literal["moe", "merged", "gguf"]
# Of a file of weights, as transformers' `save_pretrained` has it.
MAX_FILE_BYTES = 50 * 10**9
_PROBE_LENGTH = 48
# Most relative error of logits where nothing is rounded to 16 bits.
_EXACT = 1e-4
# Most where weights are, or where the base is quantized, which may round more than weights.
_ROUNDED = 0.2


@dataclass(frozen=True)
class Export:
    """The files that `export` wrote."""

    path: Path
    form: ExportForm
    architecture: str
    """The class of transformers, or llama.cpp's name."""
    num_bytes: int
    """Of the tensors, or of the GGUF file."""
    logit_error: float | None
    """‖logits of the files - the adapter's‖ / ‖the adapter's‖ on some tokens; None for GGUF."""


@torch.no_grad()
def export(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    path: str | Path,
    to: ExportForm | None = None,
    *,
    dtype: str = "float32",
) -> Export:
    """Write an adapter in a form that other engines read.

    Args:
        host: Base model with the adapter.
        tokenizer: Tokenizer of the base model, which a whole model includes.
        name: Name of the adapter.
        path: New or empty directory; for `gguf` a new file with this suffix.
        to: Form to write: `moe`, a mixture-of-experts checkpoint that computes the same as a
            mixture; `merged`, the base model with a plain adapter merged in; `gguf`, an adapter for
            llama.cpp. Default: `moe` for adapters with routers, else `merged`.
        dtype: Dtype of the written tensors: float32, bfloat16 or float16.

    Raises:
        AdapterError: If the adapter has no such form. Nothing is written then.
    """
    path = Path(os.path.expanduser(path))
    adapter = host.adapter(name)
    if host.merged is not None:
        raise AdapterError(
            f"cannot export while {host.merged!r} is merged; call host.unmerge({host.merged!r})"
        )
    form = to or ("moe" if adapter.config.experts_per_router else "merged")
    if form not in get_args(ExportForm):
        raise ConfigError(f"to must be one of {', '.join(get_args(ExportForm))}, got {shown(form)}")
    check_target(path, form)
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "gguf":
        refuse_own_parts(adapter.config, f"adapter {name!r}", "be a GGUF adapter")
        architecture = architecture_of(host.base)
        write_file(
            path, lambda aside: write_gguf_adapter(aside, adapter, host.base, host.config, dtype)
        )
        return Export(path, form, architecture, path.stat().st_size, None)
    model = _MoeModel(host, adapter) if form == "moe" else _MergedModel(host, adapter)
    tokenizer = _with_prompts_of(adapter, tokenizer)
    measured: list[Any] = []
    write_directory(
        path, lambda aside: measured.extend(model.write(aside, tokenizer, DTYPES[dtype]))
    )
    return Export(path, form, model.architecture, *measured)


def check_target(path: Path, form: ExportForm | None) -> None:
    """Raise a ConfigError if nothing can be exported to a path; None: a whole model."""
    if (form == "gguf") != (path.suffix.lower() == ".gguf"):
        kind = "a file ….gguf" if form == "gguf" else "a directory (for a .gguf file, to: gguf)"
        raise ConfigError(f"the output must be {kind}, got {path}")
    is_fixed = path.is_dir() and (path.is_mount() or path.samefile("."))  # can't be replaced
    if path.exists() and (is_fixed or not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            "the output must be a new path or an empty directory, neither the current one nor a "
            f"mount, got {path}; choose another path"
        )


def _with_prompts_of(
    adapter: Adapter, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    if adapter.prompt is None:
        return tokenizer
    template = tokenizer.chat_template
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    written = adapter.prompt.as_chat_template(template, adds_bos=adds_bos)
    if written is None:
        return tokenizer
    writer = copy.deepcopy(tokenizer)
    writer.chat_template = written
    if isinstance(template, dict):
        writer.chat_template = {**template, "default": written}
    return writer


def _on_disk(module: nn.Module, layers_path: str, path: str = "") -> dict[str, str]:
    """Have modules' weights read when they run; accelerate wants some elsewhere, a layer's."""
    if path and path != layers_path and not layers_path.startswith(f"{path}."):
        has_weights = next(module.parameters(), None) is not None
        return {path: "disk" if has_weights and path != f"{layers_path}.0" else "cpu"}
    devices: dict[str, str] = {}
    for name, child in module.named_children():
        devices |= _on_disk(child, layers_path, f"{path}.{name}".lstrip("."))
    return devices


class _ExportedModel(ABC):
    """A base model and an adapter as one model: a configuration, and tensors layer by layer."""

    def __init__(self, host: Host, adapter: Adapter):
        self.host = host
        self.adapter = adapter
        self.wide = torch.promote_types(host.dtype, torch.float32)
        # The adapter may have an embedding or head of its own, and not both as one.
        base = host.base
        self.unties_head = False
        if base.ties_head and (adapter.own_at(base.embedding) or adapter.own_at(base.head)):
            self.unties_head = not own_parts(adapter.config, base).tied
        with torch.device("meta"):
            self.built = self.build()
        self.config = self.built.config
        self.architecture = type(self.built).__name__
        self.config.architectures = [self.architecture]
        if self.unties_head:
            self.config.tie_word_embeddings = False

    @abstractmethod
    def build(self) -> Any:
        """Make the model without its weights."""

    @abstractmethod
    def layer_tensors(self, index: int, layer: nn.Module) -> dict[str, Tensor]:
        """Make a decoder layer's tensors, by their names in a layer of the built model."""

    def write(
        self, directory: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
    ) -> tuple[int, float]:
        """Write the model, and return its tensors' bytes and the error of its logits."""
        host = self.host
        self.config.dtype = dtype
        self.config.save_pretrained(directory)
        # `save_pretrained` refuses settings without effect that base models are published with.
        host.model.generation_config.to_json_file(directory / "generation_config.json")
        tokenizer.save_pretrained(directory)
        num_bytes = self._write_weights(directory, dtype)
        error = self._logit_error(directory)
        is_exact = {dtype, host.dtype} <= {torch.float32, torch.float64}
        most = _EXACT if is_exact and host.base.quantization is None else _ROUNDED
        if not error <= most:
            coarse = "" if most == _EXACT else ", or rounding moves it too far (export in float32)"
            raise AdapterError(
                f"the files' logits must be the adapter's within {most:g}, they differ by "
                f"{error:.2g}: {self.architecture} computes differently{coarse}; serve the adapter"
            )
        return num_bytes, error

    def _write_weights(self, directory: Path, dtype: torch.dtype) -> int:
        """Write the tensors, of which a layer is in memory at a time, and return their bytes."""
        shapes = [self._described(index, dtype) for index in range(self.host.base.num_layers + 1)]
        described = {name: tensor for group in shapes for name, tensor in group.items()}
        # A larger tensor would come in front of those that are made before it.
        largest = max(tensor.nbytes for tensor in described.values())
        split = split_torch_state_dict_into_shards(
            described, max_shard_size=max(MAX_FILE_BYTES, largest)
        )
        made = chain.from_iterable(self._made(index, group) for index, group in enumerate(shapes))
        tensors = (tensor.to(dtype) for tensor in made)
        for file, names in split.filename_to_tensors.items():
            in_file = {name: described[name] for name in names}
            write_safetensors(
                directory / file, in_file, islice(tensors, len(names)), {"format": "pt"}
            )
        if split.is_sharded:
            contents = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(directory / "model.safetensors.index.json", contents)
        return split.metadata["total_size"]

    def _described(self, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Give the tensors outside of the decoder layers (0), or a layer's, without numbers."""
        if index == 0:
            tensors = self._outside()
        else:
            path = f"{self.host.base.layers_path}.{index - 1}"
            tensors = self.built.get_submodule(path).state_dict(prefix=f"{path}.")
        empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
        stored = revert_weight_conversion(self.built, empty)
        # Each for itself: files are planned by storages, which views share.
        return {name: torch.empty_like(tensor, dtype=dtype) for name, tensor in stored.items()}

    def _made(self, index: int, names: Collection[str]) -> Iterable[Tensor]:
        """Make these tensors, in the order of their names in checkpoints."""
        if index == 0:
            tensors = self._outside()
        else:
            path = f"{self.host.base.layers_path}.{index - 1}"
            layer = self.layer_tensors(index - 1, self.host.model.get_submodule(path))
            tensors = {f"{path}.{name}": tensor for name, tensor in layer.items()}
        for name in tensors:
            path, _, kind = name.rpartition(".")
            module = self.adapter.own_at(path)
            if module is not None:  # in place of the base model's
                tensors[name] = module.stored(kind, tensors[name])
        # Checkpoints have other names than models, and experts apart.
        stored = revert_weight_conversion(self.built, tensors)
        unmatched = stored.keys() ^ {*names}
        if unmatched:
            raise self._mismatch(self.architecture, sorted(unmatched))
        return (stored[name] for name in names)

    def _mismatch(self, target: str, parts: Iterable[str]) -> AdapterError:
        return AdapterError(
            f"{self.adapter.name!r} on this {self.host.base.model_type} can't be a {target}: only "
            f"one of them has {', '.join(parts)}; serve the adapter with loraloom instead"
        )

    def _logit_error(self, directory: Path) -> float:
        host = self.host
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(host.config.vocab_size, (1, _PROBE_LENGTH), generator=generator)
        output = host(ids.to(host.device), adapters=[self.adapter.name], training=False)
        expected = output.logits.float().cpu()
        with quiet(), TemporaryDirectory(dir=directory) as scratch:
            model = self.built.from_pretrained(
                directory,
                dtype=torch.float32,
                device_map=_on_disk(self.built, host.base.layers_path),
                offload_folder=scratch,
            )
            actual = model.eval()(ids).logits
            del model  # which reads from the folder
        return float((actual - expected).norm() / expected.norm())

    def _outside(self) -> dict[str, Tensor]:
        model = self.host.model
        tied = {} if self.unties_head else model.all_tied_weights_keys
        tensors = _tensors_of(model, f"{self.host.base.layers_path}.")
        return {name: tensor for name, tensor in tensors.items() if name not in tied}

    def merged(
        self, layer: nn.Module, blocks: Iterable[Block], leave_out: str = " "
    ) -> dict[str, Tensor]:
        """Make a layer's tensors, with updates in the weights of some blocks."""
        tensors = _tensors_of(layer, leave_out)
        for block in blocks:
            for projection in self.adapter.weights_on(block).values():
                merged = projection.merged(self.wide)
                tensors[projection.base.stored_name] = projection.base.as_stored(merged)
        return tensors


def _tensors_of(module: nn.Module, leave_out: str) -> dict[str, Tensor]:
    """A module's tensors but for those of one part, by name; quantized weights are dequantized."""
    weights = quantized_weights(module).items()
    quantized = {name_of_weight(path): weight for path, weight in weights}
    prefixes = tuple(f"{name.removesuffix('.weight')}." for name in quantized)
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        is_plain = name.endswith(".bias") or not name.startswith(prefixes)
        if is_plain and not name.startswith(leave_out):
            tensors[name] = tensor
    for name, weight in quantized.items():
        if not name.startswith(leave_out):
            tensors[name] = weight.dequantized()
    return tensors


class _MergedModel(_ExportedModel):
    """The base model with an adapter's updates in its weights."""

    def build(self) -> Any:
        check_merges(self.adapter)
        config = copy.deepcopy(self.host.model.config)
        for name in ("quantization_config", "auto_map"):
            vars(config).pop(name, None)
        return type(self.host.model)(config)

    def layer_tensors(self, index: int, layer: nn.Module) -> dict[str, Tensor]:
        blocks = self.adapter.base_layers[index].blocks
        return self.merged(layer, blocks)


@dataclass(frozen=True)
class Twin:
    """A class of transformers whose mixtures of experts are those of a dense family.

    It has the family's attention, norms and head, and in place of the FFN block a router and whole
    experts: softmax over all experts, the top_k of it, renormalized to sum to 1. What else the
    block has adds nothing where it is zero.
    """

    model_type: str
    num_experts: str  # its configuration's field for them
    settings: Mapping[str, Any] = field(default_factory=dict)
    size_field: str | None = None  # of the experts' width; None where it is the dense family's
    top_k: str = "num_experts_per_tok"
    block: str = "mlp"
    router: str = "gate.weight"
    keeps_layer_types: bool = False  # layers may differ in their attention


_QUIET = {"output_router_logits": False}
_MIXTRAL = Twin("mixtral", "num_local_experts", _QUIET | {"router_jitter_noise": 0.0})
_QWEN3 = Twin(
    "qwen3_moe",
    "num_experts",
    {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    size_field="moe_intermediate_size",
)
_EVERY_LAYER = {"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 1}

# From a dense family's `model_type` to the class that computes its mixtures. Others have none:
# gemma's norms add 1 or come in other places, for instance.
TWINS: dict[str, Twin] = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen2": replace(
        _QWEN3,
        model_type="qwen2_moe",
        # The shared expert is silent; vLLM wants one of some width.
        settings={**_QWEN3.settings, "shared_expert_intermediate_size": 16, "qkv_bias": True},
        keeps_layer_types=True,
    ),
    "qwen3": _QWEN3,
    "granite": Twin(
        "granitemoe", "num_local_experts", _QUIET, block="block_sparse_moe", router="router.weight"
    ),
    "olmo2": Twin("flex_olmo", "num_experts", {"norm_topk_prob": True}),
    "ernie4_5": Twin(
        "ernie4_5_moe",
        "moe_num_experts",
        {"moe_num_shared_experts": 0, **_EVERY_LAYER},
        size_field="moe_intermediate_size",
        top_k="moe_k",
    ),
}


class _MoeModel(_ExportedModel):
    """A mixture as a model of the mixture-of-experts class that computes the same."""

    @property
    def twin(self) -> Twin:
        model_type = self.host.base.model_type
        if model_type not in TWINS:
            raise AdapterError(
                f"a mixture's base model must be of a family that a mixture-of-experts class of "
                f"transformers computes exactly ({', '.join(TWINS)}), got {model_type}; no such "
                "class has its norms and activations, so serve the mixture with loraloom instead"
            )
        return TWINS[model_type]

    def build(self) -> Any:
        twin = self.twin
        kinds = getattr(self.host.config, "layer_types", None) or []
        if not twin.keeps_layer_types and "sliding_attention" in kinds:
            raise self._mismatch(twin.model_type, ["layers with sliding attention"])
        config = self.host.config.to_dict()
        ffn = self.adapter.as_moe(self._gated_block(0))
        for name in ("architectures", "auto_map", "model_type", "quantization_config"):
            config.pop(name, None)
        fields = {twin.num_experts: ffn.num_experts, twin.top_k: ffn.top_k}
        if twin.size_field is not None:
            fields[twin.size_field] = config["intermediate_size"]
        config |= {**twin.settings, **fields}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(twin.model_type, **config))

    def layer_tensors(self, index: int, layer: nn.Module) -> dict[str, Tensor]:
        block = self._gated_block(index)
        ffn = self.adapter.as_moe(block)
        path = f"{self.host.base.layers_path}.{index}.{self.twin.block}"
        parts = self.built.get_submodule(path).state_dict()
        tensors = {
            name: torch.zeros(part.shape, dtype=self.config.dtype) for name, part in parts.items()
        }
        tensors[self.twin.router] = ffn.router
        for expert in range(ffn.num_experts):
            inputs = [ffn.weight(expert, name, self.wide) for name in block.groups[0]]
            tensors["experts.gate_up_proj"][expert] = torch.cat(inputs)
            tensors["experts.down_proj"][expert] = ffn.weight(expert, block.output.name, self.wide)
        named = {f"{self.twin.block}.{name}": tensor for name, tensor in tensors.items()}
        others = [other for other in self.adapter.base_layers[index].blocks if other is not block]
        return self.merged(layer, others, f"{block.path}.") | named

    def _gated_block(self, index: int) -> Block:
        blocks = self.adapter.base_layers[index].blocks
        return next(block for block in blocks if block.gating is not None)
