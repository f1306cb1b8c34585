"""Shapes of weight decay over a run, as factors of the optimizer's own."""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from megatron_mdm.config.schedule import WeightDecayScheduleConfig
from megatron_mdm.config.section import NonNegativeFloat, Section


class ConstantWeightDecayConfig(WeightDecayScheduleConfig):
    """The same weight decay in all steps."""

    kind: str = Field(default="constant", description="Shape of weight decay.")

    varies: ClassVar[bool] = False

    def factor(self, step: int, num_steps: int) -> float:
        """Is 1."""
        del step, num_steps
        return 1.0


class WeightDecayPoint(Section):
    """A point of a piecewise linear schedule of weight decay."""

    at: Annotated[float, Field(ge=0, le=1)] = Field(
        description="Share of the run's steps, that of this point included."
    )
    factor: NonNegativeFloat = Field(
        description="What the optimizer's weight_decay is multiplied by there."
    )


class PiecewiseWeightDecayConfig(WeightDecayScheduleConfig):
    """Lines from point to point; before the first its factor, behind the last that one's.

    Of two points at one share the first ends the line before it, and the second begins the next.
    """

    kind: str = Field(default="piecewise", description="Shape of weight decay.")
    points: Annotated[list[WeightDecayPoint], Field(min_length=1)] = Field(
        description="Shares of the run and factors, in order."
    )

    def factor(self, step: int, num_steps: int) -> float:
        """Interpolates at the share of the run that is done with this step."""
        share = (step + 1) / num_steps
        if share <= self.points[0].at:
            return self.points[0].factor
        for before, after in itertools.pairwise(self.points):
            if share <= after.at:
                part = (share - before.at) / (after.at - before.at)
                return before.factor + part * (after.factor - before.factor)
        return self.points[-1].factor

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        for before, after in itertools.pairwise(self.points):
            if after.at < before.at:
                raise ValueError(
                    f"schedule.weight_decay.points go back from at={before.at} to at={after.at}: "
                    "put them in the order of the run."
                )
        return self
