"""Key dropout: each query loses earlier keys at random, an ablation of AR.

Which keys are dropped is a hash of the sample's seed and of the places of query and key. So no mask
is drawn, sent or kept, and every layout drops the same keys. A query's own rate, where each has
one, is another hash of seed and place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.diffusion.attention_rules import CausalAttention, ModelTensors, PairRule
from megatron_mdm.diffusion.noise import CounterNoise, Purpose

_SEED, _RATES = "dropped_keys_seed", "dropped_keys_rates"
_LEAST_RATE = 1e-3
_WORD = 0xFFFFFFFF
# 2**32 over the golden ratio: neighbouring numbers end up far apart.
_STRIDE = 0x9E3779B9


# A query's own draws are hashed with places that no key has.
_RATE_PLACE, _CHOICE_PLACE = -1, -2


class DroppedKeys(NamedTuple):
    """Which keys each sequence drops. All chances and shares are stored times 2**32.

    Attributes:
        seeds_B: int64 [B], below 2**32.
        least_B: int64 [B], least chance of a query to lose an earlier key.
        spread_B: int64 [B], greatest chance less the least.
        shares_B: int64 [B], share of the queries that lose keys.
    """

    seeds_B: Tensor
    least_B: Tensor
    spread_B: Tensor
    shares_B: Tensor

    @classmethod
    def from_chances(
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
            What `build_rule` needs.
        """
        least = _as_word(least_B)
        spread = torch.zeros_like(least) if greatest_B is None else _as_word(greatest_B) - least
        shares = torch.full_like(least, 1 << 32) if shares_B is None else _as_word(shares_B)
        return cls(seeds_B, least, spread, shares)

    def build_rule(self, seq_length: int) -> PairRule:
        """Builds the rule of the keys that stay; a token always sees itself.

        Args:
            seq_length: Tokens, S.

        Returns:
            The rule.
        """
        # What depends on the query alone is hashed here, so that a kernel hashes each pair once.
        places_S = torch.arange(seq_length, device=self.seeds_B.device)
        rows_BS = _mix((self.seeds_B[:, None] + places_S * _STRIDE) & _WORD)
        rates_BS = self._find_rates(rows_BS)

        def is_kept(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            drawn = _mix((rows_BS[b, query] + key * _STRIDE) & _WORD)
            return (drawn >= rates_BS[b, query]) | (query == key)

        return is_kept

    def _find_rates(self, rows_BS: Tensor) -> Tensor:
        """The chance of each query to lose a key, times 2**32."""
        # One bit less, so that the product stays below 2**63.
        uniform_BS = _mix((rows_BS + _RATE_PLACE * _STRIDE) & _WORD) >> 1
        rates_BS = self.least_B[:, None] + ((self.spread_B[:, None] * uniform_BS) >> 31)
        loses_BS = _mix((rows_BS + _CHOICE_PLACE * _STRIDE) & _WORD) < self.shares_B[:, None]
        return rates_BS * loses_BS


class CausalWithDroppedKeys(CausalAttention):
    """Every token sees itself and those tokens before it that it does not lose."""

    def pair(self, model_inputs: ModelTensors, seq_length: int) -> PairRule | None:
        """The keys that stay; all of them where the batch drops none, as in validation."""
        if _SEED not in model_inputs:
            return None
        rates_B3 = model_inputs[_RATES]
        dropped = DroppedKeys.from_chances(model_inputs[_SEED], *rates_B3.unbind(1))
        return dropped.build_rule(seq_length)


@dataclass(frozen=True)
class KeyDropout:
    """Draws which keys the samples of a run drop.

    Attributes:
        noise: Source of draws.
        rate_per: Who draws the rate, from U(1e-3, 1), at which earlier keys are dropped: every
            query its own, or every sample one for all its queries.
        ratio: Share of the queries, or of the samples, that lose keys.

    Source:
        arXiv 2507.15857, ablations; there a rate belongs to a query, and a share of the queries has
        one.
    """

    noise: CounterNoise
    rate_per: Literal["query", "sample"]
    ratio: float

    @property
    def attention(self) -> CausalWithDroppedKeys:
        """The rule that reads these inputs."""
        return CausalWithDroppedKeys()

    def draw_inputs(self, position: int) -> dict[str, NDArray[Any]]:
        """Draws the inputs of the rule for the sample at a position.

        Args:
            position: Place in the global order, from 0.

        Returns:
            `dropped_keys_seed`: int64 [], below 2**31. `dropped_keys_rates`: float32 [3], least and
            greatest chance of a query to lose an earlier key, and the share of the queries that do.
        """
        generator = self.noise.make_generator(Purpose.KEYS, position)
        rate = _LEAST_RATE + (1.0 - _LEAST_RATE) * generator.random()
        seed = int(generator.integers(0, 2**31))
        rates = (_LEAST_RATE, 1.0, self.ratio)
        if self.rate_per == "sample":
            rates = (rate, rate, float(generator.random() < self.ratio))
        return {_SEED: np.array(seed, np.int64), _RATES: np.array(rates, np.float32)}


def _as_word(share_B: Tensor) -> Tensor:
    return (share_B.double() * 2.0**32).long()


def _mix(word: Tensor) -> Tensor:
    """Scatters the bits of 32-bit words held in int64.

    Source: the finalizer of MurmurHash3, which is in the public domain.
    """
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)
