"""Dropout and jitter whose random numbers belong to a sample, not a batch (T tokens, N features).

A mask is a function of (sample key, layer, site) and of the place among the sample's real tokens,
so padding, micro-batches, neighbours and recomputation don't change it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

_MASK64 = (1 << 64) - 1

# Draws a mask, [T, N], the same at each call: passes draw it where they read it, and keep none.
DrawMask = Callable[[], Tensor]


class Site(IntEnum):
    """Where in a layer random numbers are drawn; slot j of a mixture draws at FFN_SLOT + j."""

    ATTENTION_INPUT = 0
    ATTENTION_OUTPUT = 1
    FFN_INPUT = 2
    ROUTER_JITTER = 3
    FFN_SLOT = 4


def mix64(*words: int) -> int:
    """Chain SplitMix64's finaliser (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state


def sample_key(seed: int, epoch: int, sample_id: int) -> int:
    return mix64(seed, epoch, sample_id)


@dataclass(frozen=True)
class SampleSpan:
    """The real tokens of one sample within a segment's tokens."""

    key: int
    tokens: slice | Tensor

    @property
    def num_tokens(self) -> int:
        if isinstance(self.tokens, slice):
            return self.tokens.stop - self.tokens.start
        return len(self.tokens)


@dataclass(frozen=True)
class SampleNoise:
    """Random numbers of one segment at one layer; padding is kept and not jittered.

    A site is a place in the layer: one of `Site`, or a name that a method gives, as
    `mlp.up_proj.noise`. Of one site, the draws of a step are always the same.
    """

    spans: Sequence[SampleSpan]
    num_tokens: int
    layer: int
    device: torch.device

    def keep_mask(
        self, site: int | str, num_features: int, dropout: float, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "T N"]:
        """1 where a feature is kept, with probability 1 - dropout, and 0 elsewhere."""
        # Four features share a 64-bit draw, so probabilities are multiples of 2^-16. That is three
        # times as fast as a Bernoulli draw each, and a mask in the dtype of what it multiplies
        # eight times as fast to apply as a boolean one (two CPU cores, bfloat16).
        threshold = min(round(dropout * 65536), 65535) - 32768

        def draw(rows: Tensor, generator: torch.Generator) -> Tensor:
            num_words = math.ceil(rows.numel() / 4)
            words = torch.empty(num_words, dtype=torch.int64, device=self.device)
            # All of int64's range, so that each of its four parts has all of int16's.
            words.random_(-(2**63), None, generator=generator)
            bits = words.view(torch.int16)[: rows.numel()].view(rows.shape)
            return torch.ge(bits, threshold, out=rows)

        mask = torch.ones(self.num_tokens, num_features, dtype=dtype, device=self.device)
        return self._fill(mask, site, draw)

    def jitter(self, site: int | str, num_features: int, amount: float) -> Float[Tensor, "T N"]:
        """Return float32 factors, uniform in [1 - amount, 1 + amount]."""
        ones = torch.ones(self.num_tokens, num_features, dtype=torch.float32, device=self.device)
        return self._fill(
            ones, site, lambda rows, rng: rows.uniform_(1 - amount, 1 + amount, generator=rng)
        )

    def normal(self, site: int | str, num_features: int) -> Float[Tensor, "T N"]:
        """Return float32 draws of the standard normal distribution."""
        zeros = torch.zeros(self.num_tokens, num_features, dtype=torch.float32, device=self.device)
        return self._fill(zeros, site, lambda rows, rng: rows.normal_(generator=rng))

    def _fill(
        self, values: Tensor, site: int | str, draw: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        # Tensors without data take a generator of any device.
        is_meta = self.device.type == "meta"
        generator = torch.Generator(device="cpu" if is_meta else self.device)
        if isinstance(site, str):
            site = 1 << 32 | crc32(site.encode())
        for span in self.spans:
            generator.manual_seed(mix64(span.key, self.layer, site) >> 1)
            if isinstance(span.tokens, slice):
                draw(values[span.tokens], generator)
            else:
                rows = values.new_empty(len(span.tokens), values.shape[1])
                values[span.tokens] = draw(rows, generator)
        return values


def draw_mask(draw: DrawMask | None) -> Tensor | None:
    """Draw a mask, if there is dropout.

    Args:
        draw: Function that draws the mask; None without dropout.

    Returns:
        The mask, [T, N], or None.
    """
    return None if draw is None else draw()


def draw_rows(draws: Sequence[DrawMask], rows: Sequence[Tensor]) -> Tensor:
    """Draw masks one after another, and put the rows of each where they belong.

    Args:
        draws: Functions that draw the masks, [t, N] each.
        rows: Index of each mask's rows among those of all masks, [t] each.

    Returns:
        The rows of all masks, [Q, N].
    """
    mask = draws[0]()
    keep = mask.new_empty(sum(map(len, rows)), mask.shape[1])
    keep.index_copy_(0, rows[0], mask)
    for draw, index in zip(draws[1:], rows[1:], strict=True):
        keep.index_copy_(0, index, draw())
    return keep


def apply_keep_mask(
    values: Float[Tensor, "T N"], keep: Float[Tensor, "T N"] | None
) -> Float[Tensor, "T N"]:
    """`values * keep`; 1 / (1 - dropout) is left to the narrow side of the next product."""
    return values if keep is None else values * keep
