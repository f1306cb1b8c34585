"""Noise schedules: how much is masked at time t, and what weight makes every schedule one bound.

The bound on the negative log-likelihood is an integral over the masked share m, not over time:
integral of f(m) / m dm, where f(m) is the expected cross-entropy of all masked tokens. A schedule
m(t) samples some shares more often than others, and the weight m'(t) / m(t) makes up for it: the
expectation is the same for all of them, the variance is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NoiseSchedule:
    """The masked share m(t), rising from m(0) = 0 to m(1) = 1, and the times that are drawn.

    Attributes:
        kind: linear: m = t. cosine: m = 1 - cos(pi t / 2). polynomial: m = t^power.
        power: Of the polynomial, above 0.
        t_min: Least time, at least 0. With a range narrower than 0 to 1 the loss is the mean of the
            bound's integrand over it, and not a bound.
        t_max: Greatest time, at most 1, above `t_min`.
        weighting: bound: the weights of the bound; equal: each masked token weighs the same.

    Source:
        arXiv 2406.07524, equation 10 and its invariance to the schedule; the equal weights are
        those of plain masked language modelling.
    """

    kind: Literal["linear", "cosine", "polynomial"] = "linear"
    power: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0
    weighting: Literal["bound", "equal"] = "bound"

    def time(self, u: float) -> float:
        """The time of a uniform draw.

        Args:
            u: In (0, 1].

        Returns:
            t in (t_min, t_max].
        """
        return self.t_min + (self.t_max - self.t_min) * u

    def share(self, t: float) -> float:
        """Masked share at a time.

        Args:
            t: In [0, 1].

        Returns:
            m(t) in [0, 1].
        """
        if self.kind == "cosine":
            return 1.0 - math.cos(0.5 * math.pi * t)
        return t if self.kind == "linear" else t**self.power

    def slope(self, t: float) -> float:
        """Derivative of the masked share.

        Args:
            t: In (0, 1].

        Returns:
            m'(t).
        """
        if self.kind == "cosine":
            return 0.5 * math.pi * math.sin(0.5 * math.pi * t)
        return 1.0 if self.kind == "linear" else self.power * t ** (self.power - 1.0)

    def time_of(self, share: float) -> float:
        """The time at which a share is masked.

        Args:
            share: m in [0, 1].

        Returns:
            t in [0, 1] with m(t) = m.
        """
        if self.kind == "cosine":
            return 2.0 / math.pi * math.acos(1.0 - share)
        return share if self.kind == "linear" else share ** (1.0 / self.power)

    def mean_share(self) -> float:
        """Mean of m(t) over the times that are drawn.

        Returns:
            The integral of m over t_min..t_max, divided by its length.
        """

        def integral(t: float) -> float:
            if self.kind == "cosine":
                return t - 2.0 / math.pi * math.sin(0.5 * math.pi * t)
            power = 1.0 if self.kind == "linear" else self.power
            return float(t ** (power + 1.0) / (power + 1.0))

        return (integral(self.t_max) - integral(self.t_min)) / (self.t_max - self.t_min)

    def mean_count(self, length: int) -> float:
        """Mean of l = ceil(m(t) L) over the times that are drawn.

        Args:
            length: Tokens, L.

        Returns:
            Tokens that are masked on average, 1 to L.
        """
        # l exceeds k where t is past the time of k / L; a mean is the sum of such chances.
        span = self.t_max - self.t_min
        chances = (
            (self.t_max - min(max(self.time_of(k / length), self.t_min), self.t_max)) / span
            for k in range(length)
        )
        return math.fsum(chances)


LINEAR = NoiseSchedule()
