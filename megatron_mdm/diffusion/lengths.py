"""Stochastic sequence length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from megatron_mdm.diffusion.noise import CounterNoise, Purpose

# A share of samples, as a field of the configuration.
Ratio = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class LengthSampler:
    """Stochastic sequence length: now and then a sample is cut short.

    A model that saw short sequences can evaluate and generate them.

    Attributes:
        noise: Source of draws.
        ratio: Share of samples that are cut, in [0, 1].
        minimum: Shortest length.
    """

    noise: CounterNoise
    ratio: float
    minimum: int = 1

    def __call__(self, seq_length: int, position: int) -> int:
        """Length of the sample at a position.

        Args:
            seq_length: Tokens of a full window, S.
            position: Place in the global order, from 0.

        Returns:
            S, or with probability `ratio` a draw from U{minimum..S}.
        """
        if self.ratio == 0.0:
            return seq_length
        generator = self.noise.make_generator(Purpose.LENGTH, position)
        if generator.random() >= self.ratio:
            return seq_length
        return int(generator.integers(self.minimum, seq_length + 1))

    def mean(self, seq_length: int) -> float:
        """Expected length.

        Args:
            seq_length: Tokens of a full window, S.

        Returns:
            (1 - r) S + r (m + S) / 2, for the share r of samples that are cut and the shortest
            length m.

        Source:
            arXiv 2410.18514: 2048 (1 - r) + 1024.5 r.
        """
        shortened = (self.minimum + seq_length) / 2
        return seq_length * (1 - self.ratio) + self.ratio * shortened
