"""Averages of the weights: the sections `hooks` of kind `ema` and `swa`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from megatron_mdm.checkpoint.manifest import RAW
from megatron_mdm.config import Config
from megatron_mdm.config.hook import HookConfig
from megatron_mdm.config.section import PositiveFloat, PositiveInt, Probability
from megatron_mdm.core.errors import ConfigError

if TYPE_CHECKING:
    # For types alone: a configuration is read before the engines are imported, which takes seconds.
    from megatron_mdm.training.average_hooks import ExponentialAverage, UniformAverage


def _refuse_raw(name: str) -> str:
    if name == RAW:
        raise ValueError(f"{RAW} is what the weights that are trained are called: choose another.")
    return name


# It stands in metrics, files and command lines.
AverageName = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40), AfterValidator(_refuse_raw)
]


class AverageConfig(HookConfig):
    """What every average of the weights has."""

    name: AverageName
    validated: bool = Field(
        default=True,
        description="Judge the average in every validation too, on the same windows and noise, "
        "which takes as long again.",
    )

    def list_weight_states(self) -> list[str]:
        """The average, under its name."""
        return [self.name]


class ExponentialAverageConfig(AverageConfig):
    """Exponential moving average (EMA) of the weights, without the bias of its beginning."""

    kind: str = Field(default="ema", description="Which hook.")
    name: AverageName = Field(
        default="ema", description="Of the average, in metrics, checkpoints and for --weights."
    )
    horizon_tokens: PositiveInt = Field(
        description="Tokens of training over which a weight's share falls to 1/e: a step keeps "
        "exp(-tokens of a step / horizon_tokens) of the average."
    )
    warm: bool = Field(
        default=False,
        description="Let step n keep at most (1 + n) / (10 + n), which forgets the first steps "
        "sooner.",
    )

    def build(self, config: Config) -> ExponentialAverage:
        """Makes the hook."""
        from megatron_mdm.training.average_hooks import ExponentialAverage

        return ExponentialAverage(self, _count_step_tokens(config))


class Moments(NamedTuple):
    """The steps of a run at which something is averaged.

    Attributes:
        stride: Steps from one to the next, 1 or more; each is rounded up, so that the remainders
            do not add up.
        first: Number of the first that counts, from 1.
        last: Number of the run's last.
    """

    stride: Fraction
    first: int
    last: int

    def includes(self, step: int) -> bool:
        """Is it one of them?"""
        return self.count(step) > self.count(step - 1)

    def count(self, step: int) -> int:
        """How many of them have come after so many steps."""
        return max(step // self.stride - self.first + 1, 0)


class UniformAverageConfig(AverageConfig):
    """Plain mean of the weights at regular moments of a run (SWA), all or its last ones.

    The moments are counted from the start: by default the end of every epoch.
    """

    kind: str = Field(default="swa", description="Which hook.")
    name: AverageName = Field(
        default="swa", description="Of the average, in metrics, checkpoints and for --weights."
    )
    every_epochs: PositiveFloat | None = Field(
        default=None, description="From one moment to the next; default 1."
    )
    every_steps: PositiveInt | None = Field(default=None, description="The same in steps.")
    every_tokens: PositiveInt | None = Field(default=None, description="The same in tokens.")
    last: PositiveInt | None = Field(
        default=None, description="Average the last so many moments of the run; null: all."
    )
    from_share: Probability = Field(
        default=0.0, description="Average the moments after this share of the run's steps."
    )

    @model_validator(mode="after")
    def _check_one_of_each(self) -> Self:
        names = ("every_epochs", "every_steps", "every_tokens")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"hooks.{given[0]} and hooks.{given[1]} are both set: keep one.")
        if self.last is not None and self.from_share:
            raise ValueError("hooks.last and hooks.from_share are both set: keep one.")
        return self

    def build(self, config: Config) -> UniformAverage:
        """Makes the hook."""
        del config
        from megatron_mdm.training.average_hooks import UniformAverage

        return UniformAverage(self)

    def check_length(self, config: Config, num_steps: int, num_windows: int) -> None:
        """Refuses moments that the run does not have."""
        stride = self._find_stride(config, num_windows)
        field, length = self._describe_stride()
        if stride < 1:
            raise ConfigError(
                f"{field} of kind={self.kind} is less than one step of "
                f"{_count_step_tokens(config):,} tokens: make it longer, or use every_steps=1."
            )
        number = int(num_steps // stride)
        if number < (self.last or 1):
            found = f"{number} such moment{'' if number == 1 else 's'}"
            wanted = "average" if self.last is None else f"last={self.last}"
            raise ConfigError(
                f"{wanted} of the hook {self.name!r} needs more than the {found} (every {length}) "
                f"in the run's {num_steps:,} steps: make {field.partition('=')[0]} or last smaller."
            )

    def find_moments(self, config: Config, num_steps: int, num_windows: int) -> Moments:
        """Finds the steps whose weights are averaged.

        Args:
            config: The run.
            num_steps: Its optimizer steps.
            num_windows: Windows of all its training sources.
        """
        stride = self._find_stride(config, num_windows)
        number = int(num_steps // stride)
        if self.last is not None:
            return Moments(stride, max(number - self.last, 0) + 1, number)
        before = int(Fraction(str(self.from_share)) * num_steps // stride)
        return Moments(stride, before + 1, number)

    def describe(self) -> str:
        """Which moments, in words."""
        return f"every {self._describe_stride()[1]}"

    def _find_stride(self, config: Config, num_windows: int) -> Fraction:
        if self.every_steps is not None:
            return Fraction(self.every_steps)
        if self.every_tokens is not None:
            return Fraction(self.every_tokens, _count_step_tokens(config))
        epochs = Fraction(str(self.every_epochs or 1))
        return epochs * num_windows / config.batch.global_batch_size

    def _describe_stride(self) -> tuple[str, str]:
        """The field that says it, and in words."""
        if self.every_steps is not None:
            return f"every_steps={self.every_steps}", f"{self.every_steps:,} steps"
        if self.every_tokens is not None:
            return f"every_tokens={self.every_tokens}", f"{self.every_tokens:,} tokens"
        epochs = self.every_epochs or 1
        return f"every_epochs={epochs:g}", "epoch" if epochs == 1 else f"{epochs:g} epochs"


def find_decay(section: ExponentialAverageConfig, num_averaged: int, step_tokens: int) -> float:
    """Share of an exponential average that a step keeps.

    Args:
        section: The average.
        num_averaged: Steps averaged, this one among them.
        step_tokens: Tokens of a step.

    Returns:
        exp(-step_tokens / horizon_tokens), of a warm one (1 + n) / (10 + n) if that is less.
    """
    decay = math.exp(-step_tokens / section.horizon_tokens)
    return min(decay, (1 + num_averaged) / (10 + num_averaged)) if section.warm else decay


def _count_step_tokens(config: Any) -> int:
    return int(config.batch.global_batch_size * config.data.seq_length)
