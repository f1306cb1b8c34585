"""The one place where masks are drawn: noise, a position and a time make them.

Validation during training, `estimate_nll` and the estimators of evaluation draw here; they differ
in where position and time come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mdm.diffusion.masking import ForwardProcess, Masking
from megatron_mdm.diffusion.noise import CounterNoise, Purpose, spread_times
from megatron_mdm.diffusion.schedules import LINEAR

# Of the forms with one expectation the one with the least variance.
FIXED_COUNT = ForwardProcess(fixed_count=True, eps=0.0, schedule=LINEAR)


@dataclass(frozen=True)
class MaskDraw:
    """One draw of noise; what it hides depends on nothing else.

    Attributes:
        noise: Source of the draws.
        position: Number of the draw among those of the source.
        time: In (0, 1], uniform over draws.
    """

    noise: CounterNoise
    position: int
    time: float

    def maskings(
        self, lengths: Sequence[int], forward: ForwardProcess = FIXED_COUNT
    ) -> list[Masking]:
        """Hides tokens of several stretches that share a window, or of a single one.

        Args:
            lengths: Tokens of each.
            forward: How tokens are hidden.

        Returns:
            A mask for each, and its weight; the times are spread over the stretches.
        """
        times = spread_times(self.time, len(lengths))
        uniforms_S = self.noise.uniforms(Purpose.MASK, self.position, sum(lengths))
        parts = np.split(uniforms_S, np.cumsum(lengths)[:-1])
        return [forward(part_L, time) for part_L, time in zip(parts, times, strict=True)]
