"""loraloom's methods in PEFT: `get_peft_model(model, LoraloomConfig(adapter=...))`.

Importing this registers every method of loraloom with PEFT. The tuner is a host on the base model:
nothing in the model is replaced, and what PEFT does with its own layers (activate, disable, freeze,
save, load, delete) is done with the host's adapters. Files are those of `Host.save`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn

from loraloom.adapters import CONFIGS, LISTENERS, parse_adapter_config
from loraloom.adapters.contract import Adapter, AdapterConfig
from loraloom.adapters.registration import check_config
from loraloom.atomic_io import write_json
from loraloom.errors import AdapterError, ConfigError
from loraloom.formats.files import fit_to_base, parse_files, read_stored
from loraloom.formats.layouts import render
from loraloom.formats.raw_files import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    find_adapter,
)
from loraloom.host.host import Host
from loraloom.host.outer_forward import Rows, TakesCheckpointing, with_auxiliary_loss

_TYPE, _TASK = "LORALOOM", "CAUSAL_LM"
# Of the tensors of adapters in a PEFT model's state.
_PREFIX = "base_model.loraloom."
# Fields of PEFT's that the configuration has too.
_FIELDS = ("task_type", "base_model_name_or_path", "revision", "inference_mode")


@dataclass(init=False)
class LoraloomConfig(PeftConfig):
    """A method of loraloom with its settings, and PEFT's own fields, as PEFT takes them.

    Without a seed, initial weights follow torch's own generator, which `set_seed` sets. Without
    `adapter`, the fields are those of an adapter_config.json.
    """

    adapter: AdapterConfig = field(kw_only=True)
    seed: int | None = None

    def __init__(self, adapter: Any = None, seed: int | None = None, **fields: object):
        self.file_fields: dict[str, Any] = {}
        self.is_from_file = adapter is None
        if adapter is None:
            self.adapter = parse_files(_files(fields, {}, CONFIG_FILE)).config
            self.file_fields = fields
            fields = _shared_fields(fields)
        else:
            is_given = isinstance(adapter, Mapping)
            self.adapter = parse_adapter_config(adapter) if is_given else check_config(adapter)
        self.seed = seed
        arguments: dict[str, Any] = {"task_type": _TASK, **fields}
        super().__init__(**arguments)
        if self.task_type not in (_TASK, None):
            raise ConfigError(f"task_type must be {_TASK}, got {self.task_type!r}")
        self.peft_type = getattr(PeftType, _TYPE)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        **kwargs: object,
    ) -> LoraloomConfig:
        """Read an adapter's configuration; of a directory with what its tensors say of patterns."""
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if not (directory.exists() or subfolder or kwargs):
            directory = find_adapter(str(directory))
        files = {path.name for path in directory.glob("adapter_*")}
        if CONFIG_FILE not in files or not files & {WEIGHTS_FILE, PICKLE_FILE}:
            name = str(pretrained_model_name_or_path)
            return super().from_pretrained(name, subfolder, **kwargs)
        fields = cls.from_json_file(str(directory / CONFIG_FILE))
        seed: Any = kwargs.get("seed")
        config = cls(read_stored(directory).config, seed, **_shared_fields(fields))
        config.file_fields, config.is_from_file = fields, True
        return config

    @classmethod
    def from_peft_type(cls, **kwargs: object) -> LoraloomConfig:
        arguments: dict[str, Any] = dict(kwargs)
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in _FIELDS}
        adapter = self.adapter.model_dump(mode="json")
        return {"peft_type": _TYPE, **fields, "adapter": adapter, "seed": self.seed}

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        if not self.file_fields:
            raise ConfigError(
                f"{CONFIG_FILE} describes the base model too, and this configuration has none; "
                "call get_peft_model with this configuration first"
            )
        path = Path(save_directory, CONFIG_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = self.file_fields | {"base_model_name_or_path": self.base_model_name_or_path}
        write_json(path, fields)


def _shared_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Take PEFT's own fields of a file; MoE-PEFT has another word for choice tasks."""
    shared = {name: fields[name] for name in _FIELDS if name in fields}
    return shared | ({"task_type": _TASK} if shared.get("task_type") == "QUESTION_ANS" else {})


def _files(fields: dict[str, Any], tensors: dict[str, Tensor], source: str) -> AdapterFiles:
    config = {name: value for name, value in fields.items() if value is not None}
    return AdapterFiles(config, tensors, source=source)


class HostedAdapters(nn.Module, BaseTunerLayer):
    """The adapters of a tuner, where PEFT looks for their names and their state."""

    adapter_layer_names = ("adapters",)

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.frozen: dict[str, set[str]] = {}  # parameters that methods don't train

    def forward(self, name: str) -> dict[str, Tensor]:
        adapter: Any = self.adapters[name]
        return adapter.tensors()

    def _move_adapter_to_device_of_base_layer(self, *_: object, **__: object) -> None:
        pass  # adapters are built where their projections compute


class LoraloomModel(TakesCheckpointing, BaseTuner):
    """A base model with a host on it, under PEFT's names.

    One adapter is active at a time; `adapter_names` gives each row of a forward its own.
    """

    uses_shared_state = True

    @property
    def config(self) -> Any:
        """The base model's; where the active adapter has routers, trl finds its auxiliary loss."""
        config = self.model.config
        active = [self.host.adapter(name) for name in self.active_adapters]
        has_router = any(adapter.config.experts_per_router > 0 for adapter in active)
        return with_auxiliary_loss(config) if has_router else config

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.host = Host(model)
        is_on = any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
        self.host.enable_gradient_checkpointing(is_on)
        self.loraloom = HostedAdapters()
        self.host.outer_forward.default_rows = self._active_rows

    def inject_adapter(self, model: nn.Module, adapter_name: str, *_: object, **__: object) -> None:
        try:
            self._put(adapter_name, self.peft_config[adapter_name])
        except Exception:
            is_known = adapter_name in self.loraloom.adapters
            if adapter_name in self.host.adapters and not is_known:
                self.host.remove(adapter_name)  # PyTorch refuses names with a dot
            if not self.host.adapters:
                self.host.detach()
            raise
        self._activate(self.active_adapters)

    def _put(self, name: str, config: Any) -> Adapter:
        """Put an adapter on the host; it is trained where it is the active one."""
        seed = int(torch.randint(2**31, ())) if config.seed is None else config.seed
        if config.is_from_file:  # what it begins with is in the files
            registry = self.host._registry
            adapter = registry.register(registry.build(name, config.adapter, seed))
        else:
            adapter = self.host.add(name, config.adapter, seed)
        self.loraloom.frozen[name] = {
            parameter_name
            for parameter_name, parameter in adapter.named_parameters()
            if not parameter.requires_grad
        }
        self.set_requires_grad(name, name in self.active_adapters and not config.inference_mode)
        self.loraloom.adapters[name] = adapter
        if not config.is_from_file:
            config.file_fields = render(adapter.config, adapter.tensors(), self.host.base).config
        return adapter

    def _active_rows(self) -> Rows | None:
        is_off = self.loraloom.disable_adapters or not self.active_adapters
        return None if is_off else self._rows(self.active_adapters)

    def _rows(self, adapters: Sequence[str | None]) -> Rows:
        return Rows(adapters, self.training and torch.is_grad_enabled())

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        names = [None if name == "__base__" else name for name in adapter_names]
        inputs = (*args[:1], *map(kwargs.get, ("input_ids", "inputs", "inputs_embeds")), names)
        rows = next(values for values in inputs if values is not None)
        if len(names) != len(rows):
            raise AdapterError(f"adapter_names must have one per row ({len(rows)}), got {names}")
        with self.host.outer_forward.of_rows(self._rows(names)):
            yield

    def generate(self, *args: object, **kwargs: object) -> Any:
        with self.host.prepared():
            return self.model.generate(*args, **kwargs)

    def train(self, mode: bool = True) -> LoraloomModel:
        super().train(mode)
        self.model.eval().get_input_embeddings().train(mode)  # by it NEFTune adds noise
        return self

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise AdapterError(
                f"one adapter can be active at a time, got {names}; rows of several adapters: "
                "model(..., adapter_names=[...])"
            )
        self.host.adapter(names[0])
        for name in self.host.adapters:
            self.set_requires_grad(name, name == names[0] and not inference_mode)
        self._activate(names)

    def _activate(self, names: list[str]) -> None:
        self.active_adapter = names
        self.loraloom._active_adapter = names

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            frozen = self.loraloom.frozen[name]
            for parameter_name, parameter in self.host.adapter(name).named_parameters():
                parameter.requires_grad_(requires_grad and parameter_name not in frozen)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.loraloom._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; if it was active, the first that is left becomes so."""
        self.host.remove(adapter_name)
        del self.loraloom.adapters[adapter_name]
        del self.peft_config[adapter_name]
        if adapter_name in self.active_adapters:
            left = list(self.host.adapters)[:1]
            self.set_adapter(left) if left else self._activate([])

    def unload(self) -> nn.Module:
        del self.model.peft_config
        return self.host.detach()

    def merge_adapter(self, *_: object, **__: object) -> Any:
        raise AdapterError(
            "adapters of loraloom.peft can't be merged here; save them, and `loraloom export` "
            "merges those without routers; unload() gives the base model back"
        )

    merge_and_unload = merge_adapter

    def unmerge_adapter(self) -> None:
        pass  # nothing is merged

    def _create_and_replace(self, *_: object, **__: object) -> None:
        raise AssertionError("a host replaces no modules")

    @classmethod
    def _get_adapter_state_dict(
        cls, *, model: Any, adapter_name: str, state_dict: dict[str, Tensor], **_: object
    ) -> dict[str, Tensor]:  # ty: ignore[incompatible-method-override]
        """Lay an adapter's tensors out as in its files, with the values of a state dict."""
        tuner = model.base_model
        prefix = f"{_PREFIX}adapters.{adapter_name}."
        # of a resized base, PEFT would put its tables in the place of the adapter's own
        for name in [name for name in state_dict if not name.startswith(_PREFIX)]:
            del state_dict[name]
        values = {k.removeprefix(_PREFIX): v for k, v in state_dict.items() if k.startswith(prefix)}
        tensors = torch.func.functional_call(
            tuner.loraloom, values, adapter_name, tie_weights=False
        )
        return render(tuner.host.adapter(adapter_name).config, tensors, tuner.host.base).tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, *, model: Any, adapter_name: str, state_dict: dict[str, Tensor], **_: object
    ) -> dict[str, Tensor]:  # ty: ignore[incompatible-method-override]
        """Copy an adapter's tensors in, named as in its files, and return its state."""
        tuner = model.base_model
        name = adapter_name
        config: Any = tuner.peft_config[name]
        files = _files(config.file_fields, state_dict, f"adapter {name!r}")
        settings, tensors = fit_to_base(parse_files(files), tuner.host.base)
        adapter = tuner.host.adapter(name)
        without_memory = any(parameter.is_meta for parameter in adapter.parameters())
        unmatched = tensors.keys() ^ adapter.tensors().keys()
        # PEFT's low_cpu_mem_usage, or files have more to them than their configuration says.
        if without_memory or any(not key.endswith(".magnitude") for key in unmatched):
            config.adapter = settings
            tuner.host.remove(name)
            adapter = tuner._put(name, config)
        adapter.load_tensors(tensors)
        state = adapter.state_dict()
        return {f"{_PREFIX}adapters.{name}.{key}": value for key, value in state.items()}


def _register() -> None:
    """Make PEFT know loraloom's type, and by which types of files to read its configurations."""
    for name in dict.fromkeys([_TYPE, *(method.peft_type for method in CONFIGS)]):
        if name in PeftType.__members__:
            continue
        # PEFT's enumeration of types has no way to add one.
        member: Any = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        setattr(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        register_peft_method(name=name.lower(), config_cls=LoraloomConfig, model_cls=LoraloomModel)


_register()
LISTENERS.append(_register)
