"""Keys that a query loses at random: an ablation of AR.

Which ones is a function of the sample's seed and of the places of query and key, so nothing of the
size of a mask is drawn, sent or kept, and every layout loses the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# A rule of visibility: from indices of sequence, head, query and key to whether the key is seen.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_WORD = 0xFFFFFFFF
# 2**32 over the golden ratio: neighbouring numbers end up far apart.
_STRIDE = 0x9E3779B9


class DroppedKeys(NamedTuple):
    """What every sequence loses.

    Attributes:
        seeds_B: int64 [B], below 2**32.
        thresholds_B: int64 [B], the chance to lose a key times 2**32.
    """

    seeds_B: Tensor
    thresholds_B: Tensor

    @classmethod
    def of(cls, seeds_B: Tensor, rates_B: Tensor) -> DroppedKeys:
        """The dropout of a batch.

        Args:
            seeds_B: int64 [B], below 2**32.
            rates_B: float [B], chances in [0, 1].

        Returns:
            What `keeping` needs.
        """
        return cls(seeds_B, (rates_B.double() * 2.0**32).long())

    def keeping(self, rule: Rule) -> Rule:
        """A rule of visibility from which earlier keys are dropped.

        Args:
            rule: Causal.

        Returns:
            The rule; a token always sees itself.
        """
        seeds_B, thresholds_B = self

        def visible(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = _mixed((seeds_B[b] + query * _STRIDE) & _WORD)
            is_kept = _mixed((row + key * _STRIDE) & _WORD) >= thresholds_B[b]
            return rule(b, head, query, key) & (is_kept | (query == key))

        return visible


def written_out(rule: Rule, batch_size: int, seq_length: int, device: torch.device) -> Tensor:
    """A rule as a mask, for kernels that take no other.

    Args:
        rule: The same for all heads.
        batch_size: Sequences, B.
        seq_length: Tokens, S.
        device: Where.

    Returns:
        bool [B, 1, S, S], True where a key is seen.
    """
    places_S = torch.arange(seq_length, device=device)
    b_B11 = torch.arange(batch_size, device=device)[:, None, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    return rule(b_B11, head, places_S[:, None], places_S).unsqueeze(1)


def _mixed(word: Tensor) -> Tensor:
    """Scatters the bits of 32-bit words held in int64.

    Source: the finalizer of MurmurHash3, which is in the public domain.
    """
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)
