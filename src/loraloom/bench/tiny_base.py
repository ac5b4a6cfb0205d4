"""Make a tiny base model that knows the language of the skills, in minutes on one core.

    python -m loraloom.bench.tiny_base --output runs/mixture/tiny-base

It is trained from nothing on the questions and answers of every rule at its home and in eight
lands that no study asks about (`skills@592` and smaller ones don't have them), so that it knows the
words, that a dog is an animal, and that lands differ. What a study measures on it is how an adapter
holds the orders of other lands. It shows directions within minutes; it says nothing about knowledge
that a language model brings along, and its adapters are large beside it.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraloom.data.skills import generate_skills
from loraloom.data.skills.lands import FIRST_SYLLABLES, LAST_SYLLABLES, land_names

NUM_LANDS, FIRST_LAND = 600, 592
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def main() -> None:
    """Train the model and write it."""
    parser = argparse.ArgumentParser(description="Make a tiny base model for studies.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6, help="how long to train")
    args = parser.parse_args()
    texts = read_texts()
    tokenizer = build_tokenizer(texts)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, **SIZES)
    model = LlamaForCausalLM(config)
    pretrain(model, tokenizer, texts, 60 * args.minutes)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


def read_texts() -> list[str]:
    """Questions with their answers, of all splits, at home and in lands of its own."""
    own = re.compile(rf"\b({'|'.join(land_names(NUM_LANDS)[FIRST_LAND:])})\b")
    return [
        f"{row['question']} {row['choices'][row['answer']]}"
        for split in ("train", "validation", "test")
        for num_lands in (None, NUM_LANDS)
        for row in generate_skills(split, num_lands=num_lands)
        if num_lands is None or own.search(row["question"])
    ]


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Make words whole, but numbers of digits and names of lands of syllables."""
    words = {word for text in texts for word in re.findall(r"[^\W\d]+|[^\w\s]", text)}
    words -= set(land_names(NUM_LANDS))
    digits = list("0123456789")
    pieces = [*digits, *(f"##{digit}" for digit in digits), *FIRST_SYLLABLES]
    pieces += [f"##{syllable}" for syllable in LAST_SYLLABLES]
    vocabulary = {piece: place for place, piece in enumerate([*SPECIAL, *pieces])}
    for word in sorted(words - vocabulary.keys()):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], seconds: float
) -> None:
    """Train for some time, at a rate that falls to zero with it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    began, losses = time.monotonic(), []
    for batch in batches(tokenizer, texts):
        share = (time.monotonic() - began) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, len(losses) / 50) * (1 - share)
        logits = model(batch, attention_mask=(batch != 0).long()).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            print(f"step {len(losses)}: loss {sum(losses[-100:]) / 100:.3f}", flush=True)


def batches(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], size: int = 128
) -> Iterator[torch.Tensor]:
    """Draw batches of texts with like lengths, without end, padded with 0."""
    rows = [torch.tensor(ids) for ids in tokenizer(texts).input_ids]
    generator = random.Random(0)
    while True:
        rows.sort(key=lambda row: (len(row), generator.random()))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        generator.shuffle(parts)
        for part in parts:
            yield torch.nn.utils.rnn.pad_sequence(part, batch_first=True)


if __name__ == "__main__":
    main()
