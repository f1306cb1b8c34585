"""Which samples of a mixture of objectives are of which: a function of seed and position."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.noise import CounterNoise, Purpose, TimeSampler


class Kind(NamedTuple):
    """What a sample is.

    Attributes:
        is_ar: Of next-token prediction.
        slot: Its number among the samples of its step that are of masked diffusion, from 0.
        num_diffusion: How many of those there are.
    """

    is_ar: bool
    slot: int
    num_diffusion: int


@dataclass(frozen=True)
class KindOrder:
    """Which samples are of next-token prediction: whole groups, as evenly as possible.

    After s steps of N groups floor(s N alpha + u) groups were, with one u for the run; in a step
    they are neighbours, from a group on that is drawn anew each time. So R replicas, which take
    every R-th micro batch, have as many of either kind, to one, and no place of a step or replica
    sees more of one than of the other.

    Attributes:
        noise: Source of draws.
        ar_share: alpha, in [0, 1].
        group_size: Neighbouring samples of a group.
        groups_per_step: Groups of a step, N.
    """

    noise: CounterNoise
    ar_share: Fraction
    group_size: int
    groups_per_step: int

    def count_ar_groups(self, step: int) -> int:
        """Groups of next-token prediction in a step.

        Args:
            step: Optimizer step, from 0.

        Returns:
            N alpha where that is a whole number, or else one of its neighbours.
        """
        per_step = self.groups_per_step * self.ar_share
        first = Fraction(self.noise.uniform(Purpose.KINDS, 0))
        return math.floor((step + 1) * per_step + first) - math.floor(step * per_step + first)

    def find(self, position: int) -> Kind:
        """Finds the kind of the sample at a position.

        Args:
            position: Place in the global order, from 0.

        Returns:
            Its kind.
        """
        size = self.group_size
        step, place = divmod(position, self.groups_per_step * size)
        group, slot = divmod(place, size)
        is_ar_G = _arrange_step(self, step)
        before = group - int(is_ar_G[:group].sum())
        num_diffusion = len(is_ar_G) - int(is_ar_G.sum())
        return Kind(bool(is_ar_G[group]), before * size + slot, num_diffusion * size)


# Every sample of a step asks for it, from a few steps at once.
@functools.lru_cache(maxsize=32)
def _arrange_step(order: KindOrder, step: int) -> NDArray[np.bool_]:
    """Bool [N], which groups of a step are of next-token prediction."""
    num_groups = order.groups_per_step
    first = int(order.noise.uniform(Purpose.KINDS, step + 1) * num_groups)
    places_G = (np.arange(num_groups) - first) % num_groups
    return places_G < order.count_ar_groups(step)


@dataclass(frozen=True)
class DiffusionTimes:
    """The time of every sample of masked diffusion, stratified over those of its step.

    Attributes:
        kinds: Which these are.
        times: Draws times.
    """

    kinds: KindOrder
    times: TimeSampler

    def __call__(self, position: int) -> float:
        """The time of the sample at a position, in (0, 1]."""
        _, slot, count = self.kinds.find(position)
        return self.times.among(position, slot, count)
