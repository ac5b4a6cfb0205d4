"""GGUF adapters read by llama.cpp, against loraloom; run by a Python that has both.

    pip install xllamacpp
    python -m benchmarks.gguf_adapters [--families llama qwen2 qwen3] [--tokens 64]

A tiny random model of each family is written as a GGUF file, and a LoRA with random weights on it
exported as a GGUF adapter, both in float32. llama.cpp's greedy tokens without and with the adapter
are compared with loraloom's: it fails where one is not the same. Results are one line of JSON on
stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, TokenType, get_tensor_name_map

from benchmarks.vllm_export import fill, tiny_model
from loraloom import LoraConfig, attach, export

FAMILIES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
VOCAB_SIZE = 256
PROMPTS = ([5, 9, 60, 31], [40, 41, 42, 7, 3, 90, 12], [77, 200])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    args = parser.parse_args()
    results = {}
    for family in args.families:
        with tempfile.TemporaryDirectory() as directory:
            results[family] = check(family, args.tokens, Path(directory))
    print(json.dumps(results))
    sys.exit(0 if all(one["equal"] == 2 * len(PROMPTS) for one in results.values()) else 1)


def check(family: str, num_tokens: int, directory: Path) -> dict[str, Any]:
    """Count the texts of llama.cpp that are loraloom's, without and with the adapter."""
    model = tiny_model(family, VOCAB_SIZE)
    write_model(model, family, directory / "base.gguf")
    host = attach(model)
    fill(host.add("a", LoraConfig(rank=4, alpha=6)), std=1.0)
    nothing: Any = None  # the file has no tokenizer
    export(host, nothing, "a", directory / "a.gguf", to="gguf")
    ours = [decode(host, name, prompt, num_tokens) for name in (None, "a") for prompt in PROMPTS]
    theirs = ask(directory / "base.gguf", directory / "a.gguf", num_tokens)
    return {"texts": len(ours), "equal": sum(map(list.__eq__, ours, theirs))}


def write_model(model: Any, family: str, path: Path) -> None:
    """Write a model as llama.cpp's `convert_hf_to_gguf.py` would, with an alphabet as tokens."""
    config, architecture = model.config, FAMILIES[family]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(VOCAB_SIZE)])
    writer.add_token_types([TokenType.NORMAL] * VOCAB_SIZE)
    writer.add_token_merges(["t 3"])
    writer.add_eos_token_id(config.eos_token_id)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, num_heads in (
            ("q", config.num_attention_heads),
            ("k", config.num_key_value_heads),
        ):
            if family == "llama" and f"{part}_proj" in name:  # rotated by neighbouring rows
                tensor = tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(place, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode(host: Any, name: str | None, prompt: list[int], num_tokens: int) -> list[int]:
    """Loraloom's greedy tokens, none of which ends the text."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
    return host.generate(ids, adapters=[name], **options)[0, len(prompt) :].tolist()


def ask(base: Path, adapter: Path, num_tokens: int) -> list[list[int]]:
    """llama.cpp's greedy tokens, without the adapter and with it."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx = 128
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    settings = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    answers = [
        server.handle_completions(
            settings | {"prompt": prompt, "lora": [{"id": 0, "scale": scale}]}
        )
        for scale in (0.0, 1.0)
        for prompt in PROMPTS
    ]
    texts = [answer["choices"][0]["text"] for answer in answers]
    return [[int(number) for number in text.split("t")[1:]] for text in texts]


if __name__ == "__main__":
    main()
