"""Make a tiny base model whose FFN blocks are mixtures of experts, for the study of places.

    python recipes/moe/tiny_base.py --output runs/moe/tiny-base

It learns what loraloom.data.tiny_base teaches its model without experts: the rules of the skills at
home and in eight lands that no study asks about.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from loraloom.data.tiny_base import build_tokenizer, pretrain, read_texts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args(arguments)
    texts = read_texts()
    tokenizer = build_tokenizer(texts)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,  # for the loss that keeps experts in use
        router_aux_loss_coef=0.01,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    loss = pretrain(args.output, model, tokenizer, texts, args.steps)
    print(f"loss {loss:.3f}")


if __name__ == "__main__":
    main()
