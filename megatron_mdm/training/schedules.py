"""Shapes of the learning rate behind the warm-up."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megatron_mdm.config.schedule import ScheduleConfig

_DECAY_OF_WSD = frozenset({"decay_fraction", "decay_shape"})


class CosineConfig(ScheduleConfig):
    """Half a cosine from the peak to min_lr."""

    kind: str = Field(default="cosine", description="Shape behind the warm-up.")

    ignored: ClassVar[frozenset[str]] = _DECAY_OF_WSD

    def rate_after_warmup(self, step: int, num_steps: int, *, lr: float, min_lr: float) -> float:
        """Ends at min_lr."""
        warmup = self.num_warmup_steps(num_steps)
        progress = (step + 1 - warmup) / max(1, num_steps - warmup)
        return min_lr + (lr - min_lr) * _fall_as_cosine(min(1.0, progress))


class LinearConfig(ScheduleConfig):
    """A line from the peak to min_lr."""

    kind: str = Field(default="linear", description="Shape behind the warm-up.")

    ignored: ClassVar[frozenset[str]] = _DECAY_OF_WSD

    def rate_after_warmup(self, step: int, num_steps: int, *, lr: float, min_lr: float) -> float:
        """Ends at min_lr."""
        warmup = self.num_warmup_steps(num_steps)
        progress = (step + 1 - warmup) / max(1, num_steps - warmup)
        return min_lr + (lr - min_lr) * (1.0 - min(1.0, progress))


class ConstantConfig(ScheduleConfig):
    """The peak until the end."""

    kind: str = Field(default="constant", description="Shape behind the warm-up.")

    ignored: ClassVar[frozenset[str]] = _DECAY_OF_WSD

    def rate_after_warmup(self, step: int, num_steps: int, *, lr: float, min_lr: float) -> float:
        """Stays at the peak."""
        del step, num_steps, min_lr
        return lr


class WsdConfig(ScheduleConfig):
    """Warm-up, stable, decay: the peak, then down to min_lr."""

    kind: str = Field(default="wsd", description="Shape behind the warm-up.")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="Share of all steps in which the rate decays."
    )
    decay_shape: Literal["linear", "sqrt", "cosine"] = Field(
        default="linear",
        description="How the excess over min_lr falls: as the share of the decay that remains, as "
        "its square root, or as half a cosine.",
    )

    def rate_after_warmup(self, step: int, num_steps: int, *, lr: float, min_lr: float) -> float:
        """Falls to min_lr in the last part."""
        decay = max(1, round(self.decay_fraction * num_steps))
        remaining = max(0, num_steps - step - 1)
        share = min(1.0, remaining / decay)
        if self.decay_shape == "sqrt":
            share = math.sqrt(share)
        elif self.decay_shape == "cosine":
            share = _fall_as_cosine(1.0 - share)
        return min_lr + (lr - min_lr) * share


def _fall_as_cosine(progress: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))
