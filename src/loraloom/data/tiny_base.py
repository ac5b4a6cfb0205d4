"""Make a tiny base model that knows the language of the skills, in minutes on one core.

    python -m loraloom.data.tiny_base --output runs/mixture/tiny-base

It learns each rule at its home and in eight lands that no study asks about. A study on it measures
how adapters hold the orders of other lands; it says nothing about what language models know.
"""

import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

import cyclopts
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from loraloom.atomic_io import write_directory
from loraloom.base.loading import quiet
from loraloom.data import skills
from loraloom.data.skills import generate_skills, land_names
from loraloom.terminal import make_console, show_progress

NUM_LANDS = 600
FIRST_LAND = 592
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def main(output: Path, layers: int = 3, hidden_size: int = 64, steps: int = 4000) -> None:
    """Make a tiny base model for studies. Its hidden size is a multiple of 8."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(f"--output must be new or an empty directory, got {output}")
    with show_progress(make_console(stderr=True), "tiny base model", [1] * steps) as advance:
        loss = make_tiny_base(output, steps, layers, hidden_size, lambda step: advance([step]))
    print(f"loss {loss:.3f}")


def make_tiny_base(
    output: Path,
    num_steps: int,
    num_layers: int = 3,
    hidden_size: int = 64,
    on_step: Callable[[int], object] = lambda _: None,
) -> float:
    """Train and write a model with its tokenizer; return the mean loss of its last steps."""
    texts = read_texts()
    tokenizer = build_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return pretrain(output, model, tokenizer, texts, num_steps, on_step)


def pretrain(
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    num_steps: int,
    on_step: Callable[[int], object] = lambda _: None,
) -> float:
    """Train a model on texts, and write it with its tokenizer; return its last steps' mean loss."""
    batches = _batches(tokenizer([*texts]).input_ids)
    loss = _train(model, batches, num_steps, on_step)

    def fill(directory: Path) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    with quiet():
        write_directory(output, fill)
    return loss


def read_texts() -> list[str]:
    lands = land_names(NUM_LANDS)[FIRST_LAND:]
    texts = []
    for split in skills.SPLITS:
        rows = generate_skills(split) + generate_skills(split, lands)
        texts += [f"{row['question']} {row['choices'][row['answer']]}" for row in rows]
    return texts


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Make a token of each word, of each digit of a number and each syllable of a land's name."""
    pieces = [*SPECIAL, *string.digits]
    pieces += [f"##{digit}" for digit in string.digits]
    pieces += skills.FIRST_SYLLABLES
    pieces += [f"##{syllable}" for syllable in skills.LAST_SYLLABLES]
    words = set(re.findall(r"[^\W\d]+|[^\w\s]", " ".join(texts)))
    pieces += sorted(words.difference(land_names(NUM_LANDS), pieces))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = {f"{token.strip('<>')}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _train(
    model: PreTrainedModel,
    batches: Iterator[torch.Tensor],
    num_steps: int,
    on_step: Callable[[int], object],
) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    losses: list[float] = []
    for step, batch in enumerate(islice(batches, num_steps)):
        for group in optimizer.param_groups:
            warmup = min(1.0, step / 50)
            group["lr"] = 3e-3 * warmup * (1 - step / num_steps)
        # causal, padded on the right: no token sees padding
        output = model(batch)
        predicted = output.logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(predicted, batch[:, 1:].flatten(), ignore_index=0)
        total = loss
        if "aux_loss" in output:  # of a mixture, to keep its experts in use
            total = loss + model.config.router_aux_loss_coef * output.aux_loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(step)
    return fmean(losses[-100:])


def _batches(ids: Sequence[Sequence[int]], size: int = 64) -> Iterator[torch.Tensor]:
    """Draw batches of texts with similar lengths, without end, padded with 0."""
    rows = [torch.tensor(row) for row in ids]
    generator = random.Random(0)
    while True:
        rows.sort(key=lambda row: (len(row), generator.random()))
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        generator.shuffle(batches)
        for batch in batches:
            yield torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)


if __name__ == "__main__":
    cyclopts.run(main)
