"""Where the plug-in takes hold of vLLM: it wraps the method that puts LoRA layers around a model,
which gets routers first, and the one that reads an adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from vllm import distributed, forward_context
from vllm.config import set_current_vllm_config
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.model_executor.layers import linear
from vllm.model_executor.models import gemma2, llama, mistral, qwen2

from loraloom.errors import FormatError, LoraloomError
from loraloom.formats.files import read_stored
from loraloom.serve.vllm.folding import PIECES, Folder, fitting_rank, max_top_k, needs_folding
from loraloom.serve.vllm.layers import MixtureFfn, define_operations

_log = logging.getLogger(__name__)

# Of llama, phi3, mistral, qwen2, qwen3 and gemma2.
_BLOCKS = (llama.LlamaMLP, mistral.MistralMLP, qwen2.Qwen2MLP, gemma2.Gemma2MLP)


@cache
def install() -> None:
    define_operations(lambda place: forward_context.get_forward_context().no_compile_layers[place])
    for manager in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        manager.create_lora_manager = _with_routers(manager.create_lora_manager)
    WorkerLoRAManager._load_adapter = _with_folding(WorkerLoRAManager._load_adapter)


def add_routers(model: nn.Module, vllm_config: Any) -> None:
    """Give each FFN block a router if that can be; loading a mixture says why it can't."""
    blocks = {name: module for name, module in model.named_modules() if type(module) in _BLOCKS}
    model.loraloom_refusal = _refusal(model, blocks, vllm_config)  # ty: ignore[invalid-assignment]
    if model.loraloom_refusal is not None:
        _log.warning("mixtures can't be served: %s", model.loraloom_refusal)
        return
    for name, block in blocks.items():
        block.router = _router(block, f"{name}.router", vllm_config)
        block.place, block.slots = f"{name}.experts", max_top_k()
        block.sum_over_devices = distributed.tensor_model_parallel_all_reduce
        block.__class__ = _mixture_class(type(block))
        vllm_config.compilation_config.static_forward_context[block.place] = block


def _refusal(model: nn.Module, blocks: dict[str, nn.Module], vllm_config: Any) -> str | None:
    if not blocks:
        return f"{type(model).__name__} has no FFN blocks that loraloom knows"
    if vllm_config.lora_config.fully_sharded_loras:
        return "routers must be whole on each device, --fully-sharded-loras can't be used"
    if vllm_config.lora_config.max_lora_rank // PIECES < max_top_k():
        return f"--max-lora-rank must be at least {fitting_rank(PIECES * max_top_k())}"
    return None


def _router(block: Any, prefix: str, vllm_config: Any) -> nn.Module:
    """A layer that computes nothing, so that vLLM keeps a LoRA for it."""
    down = block.down_proj
    with set_current_vllm_config(vllm_config), torch.device(next(down.parameters()).device):
        router = linear.ReplicatedLinear(
            down.output_size,
            2,
            bias=False,
            params_dtype=vllm_config.model_config.dtype,
            prefix=prefix,
        )
    router.weight.data.zero_()
    return router


@cache
def _mixture_class(block: type) -> type:
    return type(f"Mixture{block.__name__}", (MixtureFfn, block), {})


def _with_routers(create: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(create)
    def create_lora_manager(self: Any, model: nn.Module, vllm_config: Any) -> Any:
        add_routers(model, vllm_config)
        self.loraloom_base = vllm_config.model_config.hf_config
        return create(self, model, vllm_config)

    return create_lora_manager


def _with_folding(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_adapter(self: Any, request: Any) -> Any:
        try:
            config = read_stored(request.lora_path).config
        except FormatError:  # nothing of ours
            return load(self, request)
        if needs_folding(config):
            return _load_folded(self, request)
        try:
            return load(self, request)
        except ValueError:  # what vLLM doesn't know may still be a LoRA when it is folded
            return _load_folded(self, request)

    return load_adapter


def _load_folded(manager: Any, request: Any) -> Any:
    try:
        folded = Folder(manager.loraloom_base).fold(request.lora_path)
    except LoraloomError as error:
        raise ValueError(str(error)) from None
    model, settings = manager._adapter_manager.model, manager.lora_config
    name, refusal = request.lora_name, model.loraloom_refusal
    if folded.rank > settings.max_lora_rank:
        raise ValueError(
            f"adapter {name!r} needs --max-lora-rank {fitting_rank(folded.rank)}, got "
            f"{settings.max_lora_rank}; a mixture needs its experts times their rank"
        )
    if folded.top_k is not None and refusal is not None:
        raise ValueError(f"adapter {name!r} can't be served: {refusal}")
    if folded.top_k is not None and folded.top_k > max_top_k():
        raise ValueError(
            f"adapter {name!r} has a top_k of {folded.top_k}, above the limit of {max_top_k()}; "
            f"start vLLM with LORALOOM_MAX_TOP_K={folded.top_k}"
        )
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return LoRAModel.from_lora_tensors(
        request.lora_int_id,
        folded.tensors,
        PEFTHelper(r=folded.rank, lora_alpha=folded.rank, target_modules=[]),
        device="cpu",
        dtype=settings.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
