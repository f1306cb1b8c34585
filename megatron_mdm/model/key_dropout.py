"""Keys that a query loses at random: an ablation of AR.

Which ones is a function of the sample's seed and of the places of query and key, so nothing of the
size of a mask is drawn, sent or kept, and every layout loses the same ones. The rate at which a
query loses keys, where it is its own, is one more hash of seed and place.
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


# What a query draws for itself stands at places that no key has.
_RATE_PLACE, _CHOICE_PLACE = -1, -2


class DroppedKeys(NamedTuple):
    """What every sequence loses. All chances and shares are held times 2**32.

    Attributes:
        seeds_B: int64 [B], below 2**32.
        least_B: int64 [B], least chance of a query to lose an earlier key.
        spread_B: int64 [B], what the greatest chance is above it.
        shares_B: int64 [B], share of the queries that lose keys.
    """

    seeds_B: Tensor
    least_B: Tensor
    spread_B: Tensor
    shares_B: Tensor

    @classmethod
    def of(
        cls,
        seeds_B: Tensor,
        least_B: Tensor,
        greatest_B: Tensor | None = None,
        shares_B: Tensor | None = None,
    ) -> DroppedKeys:
        """The dropout of a batch.

        Args:
            seeds_B: int64 [B], below 2**32.
            least_B: float [B], least chance of a query to lose an earlier key, in [0, 1].
            greatest_B: float [B], greatest chance; each query has its own, uniform between the two.
                None: all queries have the least one.
            shares_B: float [B], share of the queries that lose keys, in [0, 1]; None: all do.

        Returns:
            What `keeping` needs.
        """
        least = _as_word(least_B)
        spread = torch.zeros_like(least) if greatest_B is None else _as_word(greatest_B) - least
        shares = torch.full_like(least, 1 << 32) if shares_B is None else _as_word(shares_B)
        return cls(seeds_B, least, spread, shares)

    def keeping(self, rule: Rule, seq_length: int) -> Rule:
        """A rule of visibility from which earlier keys are dropped.

        Args:
            rule: Causal.
            seq_length: Tokens, S.

        Returns:
            The rule; a token always sees itself.
        """
        # What depends on the query alone is made once, so that a kernel hashes each pair once.
        places_S = torch.arange(seq_length, device=self.seeds_B.device)
        rows_BS = _mixed((self.seeds_B[:, None] + places_S * _STRIDE) & _WORD)
        rates_BS = self._rates(rows_BS)

        def visible(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_kept = _mixed((rows_BS[b, query] + key * _STRIDE) & _WORD) >= rates_BS[b, query]
            return rule(b, head, query, key) & (is_kept | (query == key))

        return visible

    def _rates(self, rows_BS: Tensor) -> Tensor:
        """The chance of each query to lose a key, times 2**32."""
        # One bit less, so that the product stays below 2**63.
        uniform_BS = _mixed((rows_BS + _RATE_PLACE * _STRIDE) & _WORD) >> 1
        rates_BS = self.least_B[:, None] + ((self.spread_B[:, None] * uniform_BS) >> 31)
        loses_BS = _mixed((rows_BS + _CHOICE_PLACE * _STRIDE) & _WORD) < self.shares_B[:, None]
        return rates_BS * loses_BS


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


def _as_word(share_B: Tensor) -> Tensor:
    return (share_B.double() * 2.0**32).long()


def _mixed(word: Tensor) -> Tensor:
    """Scatters the bits of 32-bit words held in int64.

    Source: the finalizer of MurmurHash3, which is in the public domain.
    """
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)
