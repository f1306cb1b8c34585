"""Noise schedules: the share m(t) = 1 - alpha_t masked at time t, and the weights of the bound.

The bound on the negative log-likelihood is an integral over the masked share m, not over time:
integral of f(m) / m dm, where f(m) is the expected cross-entropy of all masked tokens. A schedule
m(t) samples some shares more often than others, and the weight m'(t) / m(t) = -alpha'_t / (1 -
alpha_t) makes up for it: all schedules have the same expectation, and different variances.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule(ABC):
    """The masked share m(t) = 1 - alpha_t, from m(0) = 0 to m(1) = 1, and the times that are drawn.

    Attributes:
        t_min: Least time, at least 0. With a range narrower than 0 to 1 the loss is the mean of the
            bound's integrand over it, and not a bound.
        t_max: Greatest time, at most 1, above `t_min`.
        weighting: bound: the weights of the bound; equal: each masked token weighs the same.

    Source:
        arXiv 2406.07524, equation 10 and its invariance to the schedule; the equal weights are
        those of plain masked language modelling.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    weighting: Literal["bound", "equal"] = "bound"

    @abstractmethod
    def masked_share(self, t: float) -> float:
        """Masked share m(t) at a time in [0, 1]."""

    @abstractmethod
    def slope(self, t: float) -> float:
        """Derivative m'(t) of the masked share at a time in (0, 1]."""

    @abstractmethod
    def time_of(self, share: float) -> float:
        """The time in [0, 1] at which a share is masked."""

    @abstractmethod
    def integral(self, t: float) -> float:
        """Integral of m from 0 to a time."""

    def time(self, u: float) -> float:
        """The time in (t_min, t_max] of a uniform draw in (0, 1]."""
        return self.t_min + (self.t_max - self.t_min) * u

    def mean_share(self) -> float:
        """Mean of m(t) over the times that are drawn."""
        return (self.integral(self.t_max) - self.integral(self.t_min)) / (self.t_max - self.t_min)

    def mean_count(self, length: int) -> float:
        """Mean of l = ceil(m(t) L) over the times that are drawn.

        Args:
            length: Tokens, L.

        Returns:
            Tokens that are masked on average, 1 to L.
        """
        return _mean_count(self, length)

    def count_weight(self, count: int, length: int) -> float:
        """Weight of each of l masked tokens of L in the bound.

        Args:
            count: Masked tokens, l.
            length: Tokens, L.

        Returns:
            1 / (l P(l)), where P(l) is the chance of l under t ~ U(0, 1].
        """
        chance = self.time_of(count / length) - self.time_of((count - 1) / length)
        return 1.0 / (count * chance)


@dataclass(frozen=True, kw_only=True)
class Linear(NoiseSchedule):
    """m = t."""

    def masked_share(self, t: float) -> float:
        """The time itself."""
        return t

    def slope(self, t: float) -> float:
        """1, always."""
        del t
        return 1.0

    def time_of(self, share: float) -> float:
        """The share itself."""
        return share

    def integral(self, t: float) -> float:
        """t^2 / 2."""
        return float(t**2.0 / 2.0)

    def count_weight(self, count: int, length: int) -> float:
        """L / l, without rounding on the way."""
        return length / count


@dataclass(frozen=True, kw_only=True)
class Cosine(NoiseSchedule):
    """m = 1 - cos(pi t / 2)."""

    def masked_share(self, t: float) -> float:
        """Rises slowly at first."""
        return 1.0 - math.cos(0.5 * math.pi * t)

    def slope(self, t: float) -> float:
        """Its derivative."""
        return 0.5 * math.pi * math.sin(0.5 * math.pi * t)

    def time_of(self, share: float) -> float:
        """Its inverse."""
        return 2.0 / math.pi * math.acos(1.0 - share)

    def integral(self, t: float) -> float:
        """Its integral."""
        return t - 2.0 / math.pi * math.sin(0.5 * math.pi * t)


@dataclass(frozen=True, kw_only=True)
class Polynomial(NoiseSchedule):
    """m = t^power.

    Attributes:
        power: Above 0.
    """

    power: float

    def masked_share(self, t: float) -> float:
        """The power of the time."""
        return float(t**self.power)

    def slope(self, t: float) -> float:
        """Its derivative."""
        return float(self.power * t ** (self.power - 1.0))

    def time_of(self, share: float) -> float:
        """Its inverse."""
        return float(share ** (1.0 / self.power))

    def integral(self, t: float) -> float:
        """Its integral."""
        return float(t ** (self.power + 1.0) / (self.power + 1.0))


LINEAR = Linear()


@functools.lru_cache
def _mean_count(schedule: NoiseSchedule, length: int) -> float:
    # l exceeds k where t is past the time of k / L; a mean is the sum of such chances.
    span = schedule.t_max - schedule.t_min
    starts = (
        min(max(schedule.time_of(k / length), schedule.t_min), schedule.t_max)
        for k in range(length)
    )
    return math.fsum((schedule.t_max - start) / span for start in starts)
