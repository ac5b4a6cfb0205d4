"""Load a base model and its tokenizer with transformers; a repository's own code never runs."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import Any, cast, get_args

import torch
from filelock import FileLock
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from loraloom.config.fields import AttnImplementation, check_device
from loraloom.durable import write_directory
from loraloom.errors import ModelError
from loraloom.models.sources import ModelSource, dequantised_copy, find_source

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# What transformers, safetensors and gguf raise at files that are missing, broken or unknown.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    struct.error,
    SafetensorError,
)

_ADVICE = {
    "directory": "check that save_pretrained wrote model and tokenizer there",
    "gguf": "check that the file is whole and that transformers reads its architecture",
    "hub": "check the name on huggingface.co, the network, and `hf auth login` if it is gated",
}


def load_base_model(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM, in eval mode, and its tokenizer, which has a padding token.

    Args:
        name: A hub name, a directory, a .gguf file (its weights are dequantised) or
            `smollm2-135m`; it becomes the model's `config.name_or_path`.
        dtype: float32, bfloat16 or float16.
        device: cpu, cuda, cuda:0, xpu, mps, or auto: an accelerator where there is one.
        attn_implementation: sdpa, eager or flash_attention_2; None leaves it to transformers.

    Raises:
        ModelError: If there is no such model, its files are missing, broken or incomplete, or the
            dtype, device or attention implementation is unknown or not to be had here.
        ConfigError: If the device's name could not be one.
    """
    source = find_source(name)
    options = {
        "dtype": _find_dtype(dtype),
        "device_map": find_device(device),
        **_attention_option(attn_implementation),
    }
    with _quiet(source), _told_as_model_error(name, source):
        load = _load if source.gguf_file is None else _load_gguf
        model, tokenizer = load(name, source, options)
    _set_padding(name, model, tokenizer)
    model.config.name_or_path = name
    return model, tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model alone.

    Args:
        name: As in `load_base_model`.

    Raises:
        ModelError: If there is no such model, or its tokenizer can't be loaded.
    """
    source = find_source(name)
    with _quiet(source), _told_as_model_error(f"the tokenizer of {name}", source):
        return _load_tokenizer(source)


def find_device(name: str) -> torch.device:
    """Return a device that this machine has.

    Args:
        name: As in `load_base_model`.

    Raises:
        ConfigError: If it could not be the name of a device.
        ModelError: If this machine has no such device.
    """
    if check_device(name) == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = torch.device(name)
    module = torch.get_device_module(device)
    count = module.device_count() if module.is_available() else 0
    if (device.index or 0) >= count:
        raise ModelError(
            f"device must be one that this machine has, got {name} where it has {count} of type "
            f"{device.type}; take auto or cpu"
        )
    return device


def _find_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _attention_option(name: str | None) -> dict[str, str]:
    # transformers would take a hub name too, and run the kernel that it downloads from there
    known = get_args(AttnImplementation)
    if name is None:
        return {}
    if name not in known:
        raise ModelError(f"attn_implementation must be one of {', '.join(known)}, got {name!r}")
    return {"attn_implementation": name}


def _load(
    name: str, source: ModelSource, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _told_as_model_error(f"the tokenizer of {name}", source):
        tokenizer = _load_tokenizer(source)
    model, report = _load_model(source, options)
    _check_complete(name, model, report)
    return model, tokenizer


def _load_gguf(
    name: str, source: ModelSource, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file by its dequantised copy, which is made where there is none or a broken one.

    Where the cache can't be written, nothing is kept.
    """
    copy = dequantised_copy(source, options["dtype"])
    with ExitStack() as stack:
        with suppress(OSError):  # several processes wait for the first one's copy
            copy.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{copy}.lock"))
        if copy.is_dir():
            with suppress(ModelError, *_LOADING_ERRORS):
                model, tokenizer = _load(name, ModelSource("directory", str(copy)), options)
                tokenizer.name_or_path = source.location  # as if it came from the file
                return model, tokenizer
        loaded = _load(name, source, options)
        with suppress(*_LOADING_ERRORS):
            write_directory(copy, lambda aside: _save(aside, *loaded))
        return loaded


def _save(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    return AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **options)


def _load_model(
    source: ModelSource, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    if source.gguf_file is not None:
        config = GgufConfig(dequantize=True)
        options = {**options, "gguf_file": source.gguf_file, "quantization_config": config}
    loaded = AutoModelForCausalLM.from_pretrained(
        source.location,
        trust_remote_code=False,  # None would ask on the terminal whether to run that code
        ignore_mismatched_sizes=True,  # the report has them, and _check_complete refuses them
        output_loading_info=True,
        **options,
    )
    return cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)


def _check_complete(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse what transformers would fill with random weights, or with somebody's adapter."""
    misfits = {key for key, *_ in report["mismatched_keys"]}
    if random_weights := sorted(report["missing_keys"] | misfits):
        raise ModelError(
            f"can't load {name}: {len(random_weights)} of the weights of a {type(model).__name__} "
            f"are not in its files or have another shape there, {random_weights[0]} for one; "
            "get a complete copy"
        )
    if model._hf_peft_config_loaded:
        raise ModelError(
            f"base model must be a whole model, got the adapter {name}; name the model that it was "
            "trained on, and load it as an adapter"
        )


def _set_padding(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer must have an eos_token, got none in {name}; give it one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _quiet(source: ModelSource) -> Iterator[None]:
    """Hold back warnings and progress bars of transformers, but not the bars of a download."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    download_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if download_bars:
        enable_progress_bars()
    try:
        # the bar of dequantising has no switch
        with redirect_stderr(io.StringIO()) if source.kind == "gguf" else nullcontext():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not download_bars:
            disable_progress_bars()


@contextmanager
def _told_as_model_error(what: str, source: ModelSource) -> Iterator[None]:
    try:
        yield
    except _LOADING_ERRORS as error:
        text = str(error).strip() or type(error).__name__
        advice = _ADVICE[source.kind]
        if isinstance(error, ImportError):
            advice = "install what it names"
        if "trust_remote_code" in text:
            text = "it needs code of its own"
            advice = "loraloom runs none from a model's repository; take a model of transformers"
        reason = text.splitlines()[0].rstrip(" .:;")  # the rest may be a page
        raise ModelError(f"can't load {what}: {reason}; {advice}") from error
