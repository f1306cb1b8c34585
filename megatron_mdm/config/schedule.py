"""The length of a run and its learning rate over time: the section `schedule`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from megatron_mdm.config.component import ChosenFrom, Component
from megatron_mdm.config.parameters import ParameterConvention
from megatron_mdm.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Probability
from megatron_mdm.core.registry import Registry


class WeightDecayScheduleConfig(Component):
    """Weight decay over a run, as a factor of that of the optimizer.

    Attributes:
        varies: Is it worth logging?
    """

    varies: ClassVar[bool] = True

    def factor(self, step: int, num_steps: int) -> float:
        """Factor of a step, a pure function as the learning rate is.

        Args:
            step: Optimizer step, 0 to num_steps - 1.
            num_steps: Steps of the run.

        Returns:
            What the optimizer's weight decay is multiplied by, from 0.
        """
        raise NotImplementedError


WEIGHT_DECAY_SCHEDULES = Registry(
    "a schedule of weight decay",
    WeightDecayScheduleConfig,
    {
        "constant": "megatron_mdm.training.weight_decay_schedules:ConstantWeightDecayConfig",
        "piecewise": "megatron_mdm.training.weight_decay_schedules:PiecewiseWeightDecayConfig",
    },
)
_CHOSEN_WEIGHT_DECAY = ChosenFrom(WEIGHT_DECAY_SCHEDULES, "schedule.weight_decay", "constant")


class ScheduleConfig(Component):
    """Length of the run and shape of the learning rate.

    Exactly one of steps, tokens, epochs and flops; none when every source states its epochs.
    """

    steps: PositiveInt | None = Field(default=None, description="Optimizer steps.")
    tokens: PositiveInt | None = Field(default=None, description="Training tokens.")
    epochs: PositiveFloat | None = Field(default=None, description="Passes over the data.")
    flops: PositiveFloat | None = Field(
        default=None,
        description="Compute budget in FLOPs, counted as 6 N D; flops_parameters says which N.",
    )
    flops_parameters: ParameterConvention | None = Field(
        default=None,
        description="N of flops; default: as the family of model.preset counts, with embeddings "
        "for dc-*, without for smdm-* and for models without a preset.",
    )
    warmup_steps: NonNegativeInt | None = Field(default=None, description="Steps of warm-up.")
    warmup_fraction: Probability | None = Field(
        default=None, description="Warm-up as a share of all steps; default 0.01."
    )
    weight_decay: Annotated[WeightDecayScheduleConfig, _CHOSEN_WEIGHT_DECAY] = Field(
        default_factory=_CHOSEN_WEIGHT_DECAY.read_default,
        description="Factor of the optimizer's weight decay over the run.",
    )

    def rate(self, step: int, num_steps: int, *, lr: float, min_lr: float) -> float:
        """Learning rate of a step, a pure function: there is no scheduler to save.

        Args:
            step: Optimizer step, 0 to num_steps - 1.
            num_steps: Steps of the run.
            lr: Peak, which a linear warm-up reaches at its last step.
            min_lr: The rate at the end, where the shape has one.

        Returns:
            The rate.
        """
        warmup = self.num_warmup_steps(num_steps)
        if step < warmup:
            return lr * (step + 1) / warmup
        return self.rate_after_warmup(step, num_steps, lr=lr, min_lr=min_lr)

    def rate_after_warmup(self, step: int, num_steps: int, *, lr: float, min_lr: float) -> float:
        """Learning rate of a step behind the warm-up; arguments as for `rate`."""
        raise NotImplementedError

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of warm-up of a run of so many steps: as said, or a share, or 1%."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        share = 0.01 if self.warmup_fraction is None else self.warmup_fraction
        return round(share * num_steps)

    @model_validator(mode="after")
    def _check_one_length(self) -> Self:
        given = [name for name in ("steps", "tokens", "epochs", "flops") if getattr(self, name)]
        if len(given) > 1:
            found = " and ".join(f"schedule.{name}={getattr(self, name)}" for name in given)
            raise ValueError(
                "schedule needs exactly one of steps, tokens, epochs and flops, "
                f"but {found} are set: keep one."
            )
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError(
                "schedule.warmup_steps and schedule.warmup_fraction are both set: keep one."
            )
        return self


SCHEDULES = Registry(
    "a schedule",
    ScheduleConfig,
    {
        "cosine": "megatron_mdm.training.schedules:CosineConfig",
        "linear": "megatron_mdm.training.schedules:LinearConfig",
        "constant": "megatron_mdm.training.schedules:ConstantConfig",
        "wsd": "megatron_mdm.training.schedules:WsdConfig",
    },
)
CHOSEN_SCHEDULE = ChosenFrom(SCHEDULES, "schedule", "cosine")
