"""Load a base model and its tokenizer with transformers; a repository's own code never runs."""

from __future__ import annotations

import io
import platform
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from filelock import FileLock
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from loraloom.config.fields import AttnImplementation, check_device
from loraloom.config.quantization import AnyQuantization, check_fits_dtype, parse_quantization
from loraloom.durable import write_directory
from loraloom.errors import ModelError, shown
from loraloom.models.quantising import (
    check_checkpoint,
    check_quantization,
    transformers_config,
)
from loraloom.models.sources import (
    ModelSource,
    ask_hub,
    dequantised_copy,
    find_source,
    tokenizer_copy,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
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
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str | None = None,
    quantization: Any = None,
    *,
    sharded: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM, in eval mode, and its tokenizer, which has a padding token.

    Args:
        name: A hub name, a directory, a .gguf file (its weights are dequantised) or
            `smollm2-135m`; it becomes the model's `config.name_or_path`.
        dtype: float32, bfloat16, float16, float64, or auto: the checkpoint's, but bfloat16 in
            place of float16 where the device computes in it, and float32 in place of both on a CPU
            without instructions for bfloat16; of a .gguf file bfloat16, in the same way.
        device: cpu, cuda, cuda:0, xpu, mps, or auto: an accelerator where there is one.
        attn_implementation: sdpa, eager or flash_attention_2; None leaves it to transformers.
        quantization: nf4, int8, torchao-int8, torchao-int4, or a mapping of a library's settings,
            as in a run file; None for none, or what a quantised checkpoint has.
        sharded: Read this rank's part of the weights alone; all ranks of torch.distributed's
            default group call this.

    Raises:
        ModelError: If there is no such model, its files are missing, broken or incomplete, or the
            dtype, device or attention implementation is unknown or not available here, or the
            device can't compute with that quantisation, or a quantised model is to be sharded.
        ConfigError: If the device's name could not be one, the quantisation is unknown, its library
            is not installed, or it doesn't go with the dtype or the checkpoint.
    """
    source = find_source(name)
    place, quantised = find_device(device), parse_quantization(quantization)
    check_quantization(quantised, dtype, place)
    if source.kind == "hub":
        source = ask_hub(source)
    checkpoint = _read_config(source)
    check_checkpoint(name, checkpoint, quantised)
    if sharded and (quantised is not None or checkpoint.get("quantization_config") is not None):
        raise ModelError(
            f"parallel.base: fsdp needs weights in floating point, those of {name} are quantised; "
            "take base: replicated"
        )
    number_format = _find_dtype(dtype, checkpoint, place)
    options = {
        "dtype": number_format,
        "device_map": place,
        **_attention_option(attn_implementation, number_format),
        **_quantization_option(quantised, number_format),
    }
    with quiet(hides_stderr=source.kind == "gguf"), _told_as_model_error(name, source):
        if sharded:
            options["sharded"] = True
        load = _load if source.gguf_file is None else _load_gguf
        model, tokenizer = load(name, source, options)
    _set_padding(name, model, tokenizer)
    _check_token_ids(name, model, tokenizer)
    model.config.name_or_path = name
    return model, tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model alone."""
    source = find_source(name)
    with (
        quiet(hides_stderr=source.kind == "gguf"),
        _told_as_model_error(f"the tokenizer of {name}", source),
    ):
        return _load_tokenizer(source)


def find_device(name: str) -> torch.device:
    """Return a device that this machine has."""
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


def _read_config(source: ModelSource) -> dict[str, Any]:
    """Read a checkpoint's config.json; {} where it has none, or none that can be read."""
    if source.gguf_file is not None:
        return {}
    with suppress(*_LOADING_ERRORS):
        return PreTrainedConfig.get_config_dict(
            source.location, local_files_only=source.cached, trust_remote_code=False
        )[0]
    return {}  # loading tells what is wrong


def _find_dtype(name: str, checkpoint: Mapping[str, Any], device: torch.device) -> torch.dtype:
    if name == "auto":
        return _dtype_of(checkpoint, device)
    if name not in DTYPES:
        raise ModelError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {shown(name)}")
    if name == "float64" and device.type == "mps":
        raise ModelError("dtype float64 does not exist on mps; use float32, or device cpu")
    in_16_bits = DTYPES[name].itemsize == 2
    if in_16_bits and device.type == "cpu" and not _multiplies_in_bfloat16(device):
        warnings.warn(
            f"this CPU has no instructions for products in 16 bits: {name} takes 2 to 20 times as "
            "long as float32, for half of the memory; take dtype auto or float32",
            stacklevel=3,
        )
    return DTYPES[name]


def _multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    # On x86, oneDNN says yes to AVX-512 alone, where it emulates at half the speed of float32.
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _dtype_of(checkpoint: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """Choose what the checkpoint was saved in, as far as the device and training allow it."""
    if not checkpoint:  # of a GGUF file, whose weights have few bits
        saved = "bfloat16"
    else:
        named = checkpoint.get("dtype") or checkpoint.get("torch_dtype")
        saved = str(named).removeprefix("torch.")
    if saved not in ("bfloat16", "float16"):
        return torch.float32
    if _multiplies_in_bfloat16(device):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.float16


def _quantization_option(
    quantization: AnyQuantization | None, dtype: torch.dtype
) -> dict[str, QuantizationConfigMixin]:
    if quantization is None:
        return {}
    check_fits_dtype(quantization, str(dtype).removeprefix("torch."))
    return {"quantization_config": transformers_config(quantization, dtype)}


def _attention_option(name: str | None, dtype: torch.dtype) -> dict[str, str]:
    # transformers would take a hub name too, and run the kernel that it downloads from there
    known = get_args(AttnImplementation)
    if name is None:
        return {}
    if name not in known:
        raise ModelError(
            f"attn_implementation must be one of {', '.join(known)}, got {shown(name)}"
        )
    if name == "flash_attention_2" and dtype.itemsize > 2:
        raise ModelError(
            "attn_implementation flash_attention_2 computes in 16 bits only, got dtype "
            f"{str(dtype).removeprefix('torch.')}; take bfloat16, or sdpa"
        )
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

    Where the cache can't be written, nothing is kept. A model to be quantised is loaded from the
    copy.
    """
    copy = dequantised_copy(source, options["dtype"])
    if "sharded" in options:
        return _load_gguf_in_part(name, source, copy, options)
    plain = {name: value for name, value in options.items() if name != "quantization_config"}
    with ExitStack() as stack:
        with suppress(OSError):  # several processes wait for the first one's copy
            copy.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{copy}.lock"))
        if copy.is_dir():
            with suppress(ModelError, *_LOADING_ERRORS):
                return _load_copy(name, source, copy, options)
        loaded = _load(name, source, plain)
        with suppress(*_LOADING_ERRORS):
            write_directory(copy, lambda aside: _save(aside, *loaded))
        if plain == options:
            return loaded
        if copy.is_dir():
            return _load_copy(name, source, copy, options)
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        _save(scratch, *loaded)
        return _load_copy(name, source, scratch, options)


def _load_gguf_in_part(
    name: str, source: ModelSource, copy: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a rank's part of the copy; outside of its lock, as ranks wait for each other there."""
    if not copy.is_dir():
        whole = {name: value for name, value in options.items() if name != "sharded"}
        model, tokenizer = _load_gguf(name, source, whole)
        if not copy.is_dir():
            from loraloom.models.sharding import shard

            shard(model, options["device_map"])
            return model, tokenizer
    return _load_copy(name, source, copy, options)


def _load_copy(
    name: str, source: ModelSource, copy: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = _load(name, ModelSource("directory", str(copy)), options)
    tokenizer.name_or_path = source.location  # as if it came from the file
    return model, tokenizer


def _save(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load a tokenizer; that of a GGUF file is converted once, which may take half a minute."""
    if source.gguf_file is None:
        return _read_tokenizer(source)
    copy = tokenizer_copy(source)
    if copy.is_dir():
        with suppress(*_LOADING_ERRORS):
            tokenizer = _read_tokenizer(ModelSource("directory", str(copy)))
            tokenizer.name_or_path = source.location
            return tokenizer
    tokenizer = _read_tokenizer(source, gguf_file=source.gguf_file)

    def save(aside: Path) -> None:
        tokenizer.save_pretrained(aside)

    with suppress(*_LOADING_ERRORS):
        write_directory(copy, save)
    return tokenizer


def _read_tokenizer(source: ModelSource, **options: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        source.location, trust_remote_code=False, local_files_only=source.cached, **options
    )


def _load_model(
    source: ModelSource, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    if source.gguf_file is not None:
        config = GgufConfig(dequantize=True)
        options = {**options, "gguf_file": source.gguf_file, "quantization_config": config}
    common = {
        "local_files_only": source.cached,
        "trust_remote_code": False,  # None would ask on the terminal whether to run that code
    }
    model_class: Any = _auto_class(source)
    if "sharded" in options:
        from loraloom.models.sharding import sharded_class

        options = {name: value for name, value in options.items() if name != "sharded"}
        config = AutoConfig.from_pretrained(source.location, **common)
        model_class = sharded_class(model_class._model_mapping[type(config)], options["device_map"])
    loaded = model_class.from_pretrained(
        source.location,
        **common,
        adapter_kwargs={"local_files_only": source.cached},  # else it waits for the hub, in vain
        ignore_mismatched_sizes=True,  # the report has them, and _check_complete refuses them
        output_loading_info=True,
        **options,
    )
    return cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)


def _auto_class(source: ModelSource) -> Any:
    """Choose the class: that of models of images and text where the type has no causal LM."""
    model_type = _read_config(source).get("model_type")
    causal, composite = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    is_composite = model_type in composite and model_type not in causal
    return AutoModelForImageTextToText if is_composite else AutoModelForCausalLM


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


def _check_token_ids(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Hold the tokenizer against the model's embedding, before a row fails in the middle of a run.

    Special tokens of no use beyond the embedding are common: of images, or by transformers' custom.
    """
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
    special = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    beyond = [
        token
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= rows and token_id not in special
    ]
    if beyond:
        warnings.warn(
            f"the tokenizer in {name} has tokens ({len(beyond)}) beyond the model's embedding of "
            f"{rows} rows, {shown(beyond[0])} for one; texts must not have them",
            stacklevel=3,
        )


@contextmanager
def quiet(*, hides_stderr: bool = False) -> Iterator[None]:
    """Hold back warnings and progress bars of transformers, but not the bars of a download."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    download_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if download_bars:
        enable_progress_bars()
    try:
        # the bar of dequantising has no switch
        with redirect_stderr(io.StringIO()) if hides_stderr else nullcontext():
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
