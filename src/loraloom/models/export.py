"""Adapters for other engines: whole models, or GGUF adapters.

A mixture becomes a mixture-of-experts checkpoint, a plain adapter is merged into its base model.
Weights are made and written one decoder layer at a time. Then the files are read back: the logits
of what transformers makes of them are compared with the adapter's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.method import Adapter
from loraloom.adapters.own import refuse_own_parts
from loraloom.config.fields import Dtype
from loraloom.durable import write_directory, write_file
from loraloom.errors import AdapterError, ConfigError, shown
from loraloom.formats.checkpoint import write_shards
from loraloom.formats.gguf import architecture_of, write_gguf_adapter
from loraloom.models.host import Host
from loraloom.models.loading import DTYPES, quiet
from loraloom.models.whole import MergedModel, MoeModel, WholeModel, streamed_model

ExportForm = Literal["moe", "merged", "gguf"]
_PROBE_LENGTH = 48
_EXACT = 1e-4
"""Most relative error of logits where nothing is rounded to 16 bits."""
_ROUNDED = 0.2
"""Most where weights are, or where the base is quantised, which may round more than weights."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Args:
        path: Where.
        form: As what.
        architecture: The class of transformers, or llama.cpp's name.
        num_bytes: Of the tensors, or of the GGUF file.
        logit_error: ‖logits of the files - the adapter's‖ / ‖the adapter's‖ on some tokens; None
            for a GGUF adapter.
    """

    path: Path
    form: ExportForm
    architecture: str
    num_bytes: int
    logit_error: float | None


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
        name: Of the adapter.
        path: A directory that is new or empty; for `gguf` a new file `….gguf`.
        to: `moe`, the mixture-of-experts checkpoint that computes the same as a mixture; `merged`,
            the base model with a plain adapter in its weights; `gguf`, an adapter for llama.cpp.
            None: `moe` for adapters with routers, else `merged`.
        dtype: Of the written tensors: float32, bfloat16 or float16.

    Raises:
        AdapterError: If there is no such adapter, or it has no such form; nothing is written then.
        ConfigError: If the path, the form or the dtype can't be used.
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
        _written(
            write_file,
            path,
            lambda aside: write_gguf_adapter(aside, adapter, host.base, host.config, dtype),
        )
        return Export(path, form, architecture, path.stat().st_size, None)
    model = MoeModel(host, adapter) if form == "moe" else MergedModel(host, adapter)
    writer = _with_prompts_of(adapter, tokenizer)
    measured: list[Any] = []
    _written(
        write_directory,
        path,
        lambda aside: measured.extend(_write(model, writer, aside, DTYPES[dtype])),
    )
    return Export(path, form, model.architecture, *measured)


def check_target(path: Path, form: ExportForm | None) -> None:
    """Raise a ConfigError if nothing can be exported to a path; None: a whole model."""
    if (form == "gguf") != (path.suffix.lower() == ".gguf"):
        wanted = "a file ….gguf" if form == "gguf" else "a directory (for a .gguf file, to: gguf)"
        raise ConfigError(f"the output must be {wanted}, got {path}")
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise ConfigError(f"the output must not be there yet, got {path}; choose another place")


def _written(write: Callable[[Path, Callable], None], path: Path, fill: Callable) -> None:
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


def _write(
    model: WholeModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype
) -> tuple[int, float]:
    """Write a whole model, and return its tensors' bytes and the error of its logits."""
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    # `save_pretrained` refuses settings without effect that base models are published with
    model.host.model.generation_config.to_json_file(directory / "generation_config.json")
    tokenizer.save_pretrained(directory)
    num_bytes = write_shards(directory, model.shards(), model.num_shards, dtype)
    error = _logit_error(model, directory)
    is_exact = {dtype, model.host.dtype} <= {torch.float32, torch.float64}
    most = _EXACT if is_exact and model.host.base.quantization is None else _ROUNDED
    if not error <= most:
        coarse = "" if most == _EXACT else ", or rounding moves it too far (export in float32)"
        raise AdapterError(
            f"the files' logits must be the adapter's within {most:g}, they differ by {error:.2g}: "
            f"{model.architecture} doesn't compute this model{coarse}; serve the adapter with "
            "loraloom"
        )
    return num_bytes, error


def _logit_error(model: WholeModel, directory: Path) -> float:
    """Compare what transformers loads, a module at a time, with the adapter."""
    host = model.host
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(host.config.vocab_size, (1, _PROBE_LENGTH), generator=generator)
    expected = host(ids.to(host.device), adapters=[model.adapter.name]).logits.float().cpu()
    with quiet():
        written = streamed_model(model, directory)
        actual = written(ids).logits
    return float((actual - expected).norm() / expected.norm())
