"""Where a mixture sends its tokens: by layer, and by group of questions.

Axes: N layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.models.host import Host
from loraloom.routing.statistics import count_choices, load_shares

_TEXTS_PER_BATCH = 32


def tokens_per_expert(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    adapter_name: str,
    texts: Mapping[str, Sequence[str]],
) -> dict[str, Tensor]:
    """Count how often each expert is chosen for the tokens of some texts.

    Args:
        host: In eval mode.
        tokenizer: The base model's.
        adapter_name: A mixture on the host.
        texts: Texts by group, a skill or task say.

    Returns:
        For each group the choices of every layer's experts, [N, E].
    """
    return {
        group: sum(
            (
                _count(host, tokenizer, adapter_name, items[start : start + _TEXTS_PER_BATCH])
                for start in range(0, len(items), _TEXTS_PER_BATCH)
            ),
            start=torch.zeros(1, 1, dtype=torch.long),
        )
        for group, items in texts.items()
    }


@torch.no_grad()
def _count(
    host: Host, tokenizer: PreTrainedTokenizerBase, adapter_name: str, texts: Sequence[str]
) -> Tensor:
    batch = tokenizer(list(texts), return_tensors="pt", padding=True).to(host.device)
    output = host.hidden(batch.input_ids, batch.attention_mask, [adapter_name] * len(texts))
    return count_choices(output.routing[adapter_name]).cpu()


def shares(counts: Tensor) -> list[list[float]]:
    """Turn counts into each row's shares, which sum to one."""
    return load_shares(counts).tolist()
