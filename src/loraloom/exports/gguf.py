"""Plain adapters as GGUF files, which llama.cpp puts on a GGUF model (`--lora FILE`).

    blk.{L}.attn_q.weight.lora_a [R, I], blk.{L}.attn_q.weight.lora_b [O, R], … by gguf's names

`adapter.lora.alpha` is s·R, as llama.cpp's scale is alpha over lora_b's rank: what `lora_alpha` is
without rank stabilisation. A projection whose rows llama.cpp keeps in another order has its B so.

Source: llama.cpp, `convert_lora_to_gguf.py` and the `modify_tensors` of its `conversion/`.

Axes: I in_features, O out_features, R rank.
"""

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

from loraloom.adapters.contract import Adapter
from loraloom.base.blocks import BaseInfo
from loraloom.errors import AdapterError

# llama.cpp's name of a family's architecture.
_ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2")},
    **{name: name for name in ("granite", "stablelm", "smollm3")},
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "gpt_neox": "gptneox",
}
# Families whose q and k llama.cpp rotates by neighbouring rows, not by halves of a head.
_PAIRED = ("llama", "mistral", "granite", "smollm3")
_FILE_TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def architecture_of(base: BaseInfo) -> str:
    """Return llama.cpp's name of a base model's architecture."""
    if base.model_type not in _ARCHITECTURES:
        raise AdapterError(
            f"a GGUF adapter's base model must be of the families {', '.join(_ARCHITECTURES)}, "
            f"got {base.model_type}; merge the adapter and convert the whole model instead"
        )
    return _ARCHITECTURES[base.model_type]


def write_gguf_adapter(
    path: Path, adapter: Adapter, base: BaseInfo, config: Any, dtype: str
) -> None:
    """Write an adapter as a GGUF file; `config` is the base model's."""
    _check_is_plain(adapter)
    architecture = architecture_of(base)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], base.num_layers)
    alpha = adapter.config.scaling * adapter.config.rank
    kind, file_type = _FILE_TYPES[dtype]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(file_type)
    for projection in adapter.projections():
        name = names.get_name(projection.key.replace("layers", base.layers_path, 1))
        assert name is not None, projection.key
        lora_A = projection.compute_A(torch.float32)
        lora_B = projection.compute_B(torch.float32).T * (projection.num_columns / alpha)
        lora_B = _stored_rows(lora_B, projection.name, base.model_type, config)
        for part, tensor in {"a": lora_A, "b": lora_B}.items():
            values = tensor.detach().cpu().contiguous().numpy()
            writer.add_tensor(f"{name}.weight.lora_{part}", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_is_plain(adapter: Adapter) -> None:
    if not adapter.is_mergeable:
        obstacle = adapter.config.title
    elif any(projection.row_scale() is not None for projection in adapter.projections()):
        obstacle = "weight_decomposition; export it merged into its base model instead"
    else:
        return
    raise AdapterError(
        f"adapter {adapter.name!r} must be without routers and weight_decomposition to be a "
        f"GGUF adapter, because llama.cpp supports only A and B, got {obstacle}"
    )


def _stored_rows(lora_B: Tensor, name: str, model_type: str, config: Any) -> Tensor:
    """Bring B's rows, [O, R], into the order in which llama.cpp has the projection's."""
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", None) or heads["q_proj"]
    if model_type in _PAIRED and name in heads:
        return lora_B.unflatten(0, (heads[name], 2, -1)).transpose(1, 2).flatten(0, 2)
    if name == "query_key_value":  # head by head; there all q, then all k, then all v
        return lora_B.unflatten(0, (heads["q_proj"], 3, -1)).transpose(0, 1).flatten(0, 2)
    return lora_B
