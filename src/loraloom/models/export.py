"""Adapters for other engines: whole models, or GGUF adapters.

A mixture becomes a mixture-of-experts checkpoint, a plain adapter is merged into its base model.
Weights are made and written one decoder layer at a time, quantised ones in floating point. Then the
files are read back: the logits of what transformers loads are compared with the adapter's.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from loraloom.adapters.method import Adapter, Projection
from loraloom.adapters.own import own_parts, refuse_own_parts
from loraloom.config.model import Dtype
from loraloom.durable import write_directory, write_file
from loraloom.errors import AdapterError, ConfigError, shown
from loraloom.formats.gguf import architecture_of, write_gguf_adapter
from loraloom.models.combine import check_merges
from loraloom.models.host import Host
from loraloom.models.loading import DTYPES, quiet
from loraloom.models.moe import STORED, LazyTensor, twin_of, write_shards
from loraloom.models.quantization import quantised_linears

ExportForm = Literal["moe", "merged", "gguf"]
_PROBE_LENGTH = 48
# Most relative error of logits where nothing is rounded to 16 bits.
_EXACT = 1e-4
# Most where weights are, or where the base is quantised, which may round more than weights.
_ROUNDED = 0.2


@dataclass(frozen=True)
class Export:
    """What was written."""

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
        host: With the adapter on its base model.
        tokenizer: The base model's; written with a whole model.
        name: The adapter's.
        path: A directory that is new or empty; for `gguf` a new file `….gguf`.
        to: `moe`, the mixture-of-experts checkpoint that computes the same as a mixture; `merged`,
            the base model with a plain adapter in its weights; `gguf`, an adapter for llama.cpp.
            None: `moe` for adapters with routers, else `merged`.
        dtype: Of the written tensors: float32, bfloat16 or float16.

    Raises:
        AdapterError: If the adapter has no such form; nothing is written then.
    """
    path, adapter = Path(path), host.adapter(name)
    if host.merged is not None:
        raise AdapterError(
            f"no adapter may be merged to export one, {host.merged!r} is; unmerge it"
        )
    form = to or ("moe" if adapter.config.experts_per_router else "merged")
    if form not in get_args(ExportForm):
        raise ConfigError(f"to must be one of {', '.join(get_args(ExportForm))}, got {shown(form)}")
    check_target(path, form)
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    if form == "gguf":
        refuse_own_parts(adapter.config, f"adapter {name!r}", "be a GGUF adapter")
        architecture = architecture_of(host.base)
        described = (adapter, host.base, host.config, dtype)
        _write(write_file, path, lambda aside: write_gguf_adapter(aside, *described))
        return Export(path, form, architecture, path.stat().st_size, None)
    model = _MoeModel(host, adapter) if form == "moe" else _MergedModel(host, adapter)
    options = (_with_prompts_of(adapter, tokenizer), DTYPES[dtype])
    measured: list[Any] = []
    _write(write_directory, path, lambda aside: measured.extend(model.write(aside, *options)))
    return Export(path, form, model.architecture, *measured)


def check_target(path: Path, form: ExportForm | None) -> None:
    """Raise a ConfigError if nothing can be exported to a path; None: a whole model."""
    if (form == "gguf") != (path.suffix.lower() == ".gguf"):
        wanted = "a file ….gguf" if form == "gguf" else "a directory (for a .gguf file, to: gguf)"
        raise ConfigError(f"the output must be {wanted}, got {path}")
    is_empty_directory = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty_directory:
        raise ConfigError(f"the output must not be there yet, got {path}; choose another place")


def _write(write: Callable[[Path, Callable], None], path: Path, fill: Callable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, fill)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from error


def _with_prompts_of(
    adapter: Adapter, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The tokenizer, whose chat template writes prompts as the adapter's training data did."""
    own = tokenizer.chat_template
    if adapter.prompt is None or not (own is None or isinstance(own, str)):
        return tokenizer
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer = copy.deepcopy(tokenizer)
    writer.chat_template = adapter.prompt.as_chat_template(own, adds_bos=adds_bos)
    return writer


def _on_disk(module: nn.Module, layers_path: str, path: str = "") -> dict[str, str]:
    """Have modules' weights read when they run; accelerate wants some elsewhere, a layer's."""
    if path and path != layers_path and not layers_path.startswith(f"{path}."):
        has_weights = any(True for _ in module.parameters())
        return {path: "disk" if has_weights and path != f"{layers_path}.0" else "cpu"}
    places: dict[str, str] = {}
    for name, child in module.named_children():
        places |= _on_disk(child, layers_path, f"{path}.{name}".lstrip("."))
    return places


class _ExportedModel(ABC):
    """A base model and an adapter as one model: a configuration, and tensors layer by layer."""

    config: Any
    """In transformers' class."""
    built: Any
    """A model of the class, maybe without weights."""

    def __init__(self, host: Host, adapter: Adapter):
        self.host = host
        self.adapter = adapter
        self.dtype = torch.promote_types(host.dtype, torch.float32)
        # The adapter may have an embedding or head of its own, and not both as one.
        base = host.base
        has_own = any(adapter.own_at(path) is not None for path in (base.embedding, base.head))
        self.unties_head = base.ties_head and has_own and not own_parts(adapter.config, base).tied

    @abstractmethod
    def layer_tensors(self, index: int, layer: nn.Module) -> Iterator[tuple[str, LazyTensor]]:
        """Yield a decoder layer's tensors by their names in the layer."""

    @property
    def architecture(self) -> str:
        return type(self.built).__name__

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
        num_bytes = write_shards(directory, self.shards(), host.base.num_layers + 1, dtype)
        error = self._logit_error(directory)
        is_exact = {dtype, host.dtype} <= {torch.float32, torch.float64}
        most = _EXACT if is_exact and host.base.quantization is None else _ROUNDED
        if not error <= most:
            coarse = "" if most == _EXACT else ", or rounding moves it too far (export in float32)"
            raise AdapterError(
                f"the files' logits must be the adapter's within {most:g}, they differ by "
                f"{error:.2g}: {self.architecture} doesn't compute this model{coarse}; serve the "
                "adapter with loraloom"
            )
        return num_bytes, error

    def _logit_error(self, directory: Path) -> float:
        host = self.host
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(host.config.vocab_size, (1, _PROBE_LENGTH), generator=generator)
        expected = host(ids.to(host.device), adapters=[self.adapter.name]).logits.float().cpu()
        with quiet(), TemporaryDirectory(dir=directory) as scratch:
            places = _on_disk(self.built, host.base.layers_path)
            options = {"dtype": torch.float32, "device_map": places, "offload_folder": scratch}
            actual = self.built.from_pretrained(directory, **options).eval()(ids).logits
        return float((actual - expected).norm() / expected.norm())

    def shards(self) -> Iterator[Mapping[str, LazyTensor]]:
        """Yield the tensors outside of the decoder layers by name, then those of each layer."""
        model, path = self.host.model, self.host.base.layers_path
        tied = {} if self.unties_head else model.all_tied_weights_keys
        yield {
            name: self._owned(name, tensor)
            for name, tensor in _tensors_of(model).items()
            if not name.startswith(f"{path}.") and name not in tied
        }
        for index, layer in enumerate(model.get_submodule(path).children()):
            tensors = self.layer_tensors(index, layer)
            named = ((f"{path}.{index}.{name}", tensor) for name, tensor in tensors)
            yield {name: self._owned(name, tensor) for name, tensor in named}

    def _owned(self, name: str, tensor: LazyTensor) -> LazyTensor:
        path, _, kind = name.rpartition(".")
        own = self.adapter.own_at(path)
        if own is None:
            return tensor
        return LazyTensor(tensor.shape, lambda: own.stored(kind, tensor.make()))

    def merged(
        self, projections: Mapping[str, Projection], name: str, tensor: LazyTensor
    ) -> LazyTensor:
        """Merge the update into a tensor if it is the weight of one of a block's projections."""
        weights = {f"{projection.path}.weight": projection for projection in projections.values()}
        if name not in weights:
            return tensor
        return LazyTensor(tensor.shape, lambda: weights[name].merged(self.dtype))


def _tensors_of(module: nn.Module) -> dict[str, LazyTensor]:
    """A module's tensors by name; weights that are quantised are dequantised when wanted."""
    tensors = {name: LazyTensor.of(tensor) for name, tensor in module.state_dict().items()}
    for path, weight in quantised_linears(module).items():
        for name in [name for name in tensors if name.startswith(f"{path}.")]:
            if name != f"{path}.bias":
                del tensors[name]
        shape = (weight.linear.out_features, weight.linear.in_features)
        tensors[f"{path}.weight"] = LazyTensor(shape, weight.whole)
    return tensors


class _MergedModel(_ExportedModel):
    """The base model with an adapter's updates in its weights."""

    def __init__(self, host: Host, adapter: Adapter):
        super().__init__(host, adapter)
        check_merges(adapter)
        self.built = host.model
        self.config = copy.deepcopy(host.model.config)
        self.config.architectures = [self.architecture]
        for name in ("quantization_config", "auto_map"):
            if hasattr(self.config, name):
                delattr(self.config, name)
        if self.unties_head:
            self.config.tie_word_embeddings = False

    def layer_tensors(self, index: int, layer: nn.Module) -> Iterator[tuple[str, LazyTensor]]:
        stored = STORED.get(self.host.base.model_type)
        projections = {**self.adapter.attention_block(index), **self.adapter.ffn_block(index)}
        for name, tensor in _tensors_of(layer).items():
            merged = self.merged(projections, name, tensor)
            parts = {name: ()} if stored is None else stored.stored_parts(name, merged.shape)
            for stored_name, place in parts.items():
                yield stored_name, merged.part(place)


class _MoeModel(_ExportedModel):
    """A mixture as a model of the mixture-of-experts class that computes the same."""

    def __init__(self, host: Host, adapter: Adapter):
        super().__init__(host, adapter)
        self.twin = twin_of(host.base.model_type)
        fields = self.twin.config_fields(host.config.to_dict(), adapter.as_moe(0))
        if self.unties_head:
            fields["tie_word_embeddings"] = False
        self.config = AutoConfig.for_model(self.twin.model_type, **fields)
        with torch.device("meta"):
            self.built = AutoModelForCausalLM.from_config(self.config)
        self.config.architectures = [self.architecture]
        self._check_tensors()

    def layer_tensors(self, index: int, layer: nn.Module) -> Iterator[tuple[str, LazyTensor]]:
        base, attention = self.host.base, self.adapter.attention_block(index)
        for name, tensor in _tensors_of(layer).items():
            if not name.startswith(f"{base.ffn}."):
                merged = self.merged(attention, name, tensor)
                yield from self.twin.rename(name, merged, self.host.config)
        ffn = self.adapter.as_moe(index)
        shapes = {name: base.shapes[f"{base.ffn}.{name}"] for name in base.ffn_projections}
        for name, tensor in self.twin.ffn_tensors(ffn, shapes, self.dtype):
            yield f"{self.twin.block}.{name}", tensor

    def _check_tensors(self) -> None:
        host, base, twin = self.host, self.host.base, self.twin
        layer = f"{base.layers_path}.0"
        ours = _tensors_of(host.model.get_submodule(layer))
        outside = {name for name in ours if not name.startswith(f"{base.ffn}.")}
        odd = [name for name in ours if name not in outside and "bias" in name]
        names = {new for name in outside for new, _ in twin.rename(name, ours[name], host.config)}
        theirs = self.built.get_submodule(layer).state_dict()
        odd += sorted(names ^ {n for n in theirs if not n.startswith(f"{twin.loaded_block}.")})
        kinds = set(getattr(host.config, "layer_types", None) or [])
        rope = getattr(host.config, "rope_parameters", None) or {}
        if twin.splits_qkv and rope.get("partial_rotary_factor", 1.0) != 1.0:
            odd.append("heads that are rotated in part")
        if not twin.keeps_layer_types and "sliding_attention" in kinds:
            odd.append("layers with sliding attention")
        if odd:
            raise AdapterError(
                f"a mixture on this {base.model_type} can't be a {self.architecture}: only one of "
                f"them has {', '.join(odd)}; serve the mixture with loraloom instead"
            )
