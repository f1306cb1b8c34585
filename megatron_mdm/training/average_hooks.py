"""Averages of the weights, kept in float32 on each rank's own pieces of them.

An average of p_1 ... p_n is kept as the mean itself, moved towards the newest weights by a share of
the distance: 1 / n of it for a plain mean. The exponential y_n = b_n y_{n-1} + (1 - b_n) p_n from
y_0 = 0 falls short by the factor 1 - B_n, B_n = b_1 ... b_n, and y_n / (1 - B_n) is moved by
(1 - b_n) / (1 - B_n).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mdm.checkpoint.hook_states import WeightState
from megatron_mdm.training.averaging import (
    AverageConfig,
    ExponentialAverageConfig,
    Moments,
    UniformAverageConfig,
    find_decay,
)
from megatron_mdm.training.hooks import Hook, TrainingRun


class WeightAverage(Hook):
    """Base of averages: keeps the pieces.

    Args:
        section: Name, and whether validations judge it.

    Attributes:
        num_averaged: Of how many weights it is the average.
    """

    def __init__(self, section: AverageConfig) -> None:
        self.name = section.name
        self.num_averaged = 0
        self._is_judged = section.validated
        self._pieces: list[Tensor] = []
        self._run: TrainingRun | None = None

    def begin(self, run: TrainingRun) -> None:
        """Takes the run, whose engine has the weights."""
        self._run = run

    def add(self, share: float) -> None:
        """Moves the average towards the weights by a share of the distance; 1 makes it them."""
        assert self._run is not None
        pieces = self._run.engine.states.list_pieces()
        if not self._pieces:
            self._pieces = [torch.zeros_like(piece) for piece in pieces]
        with torch.no_grad():
            torch._foreach_lerp_(self._pieces, pieces, share)
        self.num_averaged += 1

    def describe(self) -> str:
        """What it is, in a few words."""
        raise NotImplementedError

    def weight_states(self) -> Mapping[str, WeightState]:
        """The average, once there is one."""
        if not self.num_averaged:
            return {}
        return {self.name: WeightState(self._pieces, self.describe(), True, self._is_judged)}

    def state_dict(self) -> dict[str, Any]:
        """Of how many weights it is the average."""
        return {"num_averaged": self.num_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes room for what the checkpoint holds."""
        assert self._run is not None
        self.num_averaged = state["num_averaged"]
        pieces = self._run.engine.states.list_pieces()
        self._pieces = [torch.zeros_like(piece) for piece in pieces]


class ExponentialAverage(WeightAverage):
    """An exponential average of the weights after every step whose update was made.

    Args:
        section: Its horizon.
        step_tokens: Tokens of a step.
    """

    def __init__(self, section: ExponentialAverageConfig, step_tokens: int) -> None:
        super().__init__(section)
        self._section = section
        self._step_tokens = step_tokens
        # B_n, the share that is still missing.
        self._missing = 1.0

    def after_step(self, run: TrainingRun) -> None:
        """Averages the step's weights."""
        assert run.result is not None
        if not run.result.is_applied:
            return
        decay = find_decay(self._section, self.num_averaged + 1, self._step_tokens)
        self._missing *= decay
        self.add((1 - decay) / (1 - self._missing))

    def describe(self) -> str:
        """Horizon and steps."""
        warm = ", warm" if self._section.warm else ""
        horizon = f"{self._section.horizon_tokens:,}"
        return f"exponential, horizon {horizon} tokens{warm}, of {self.num_averaged:,} steps"

    def state_dict(self) -> dict[str, Any]:
        """The count, and what is missing."""
        return {**super().state_dict(), "missing": self._missing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them."""
        super().load_state_dict(state)
        self._missing = state["missing"]


class UniformAverage(WeightAverage):
    """A plain mean of the weights at some steps of the run.

    A run that is made longer has other last moments, and its mean begins anew.

    Args:
        section: Which steps.
    """

    def __init__(self, section: UniformAverageConfig) -> None:
        super().__init__(section)
        self._section = section
        self._moments: Moments | None = None

    def begin(self, run: TrainingRun) -> None:
        """Finds the moments, which follow from the run's length."""
        super().begin(run)
        plan = run.plan
        self._moments = self._section.find_moments(
            run.config, plan.num_steps, plan.data.train.num_windows
        )

    def after_step(self, run: TrainingRun) -> None:
        """Averages the weights if it is time, also where the step changed nothing."""
        assert self._moments is not None
        if self._moments.includes(run.step):
            self.add(1 / (self.num_averaged + 1))

    def describe(self) -> str:
        """Moments and their number."""
        return f"mean of {self.num_averaged:,} weights, one {self._section.describe()}"

    def state_dict(self) -> dict[str, Any]:
        """The count, and which moments it speaks of."""
        told = {} if self._moments is None else {"first": self._moments.first}
        return {**super().state_dict(), **told, "moments": self._section.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the mean if it is one of the same moments."""
        run, moments = self._run, self._moments
        assert run is not None
        assert moments is not None
        if (state.get("first"), state["moments"]) == (moments.first, self._section.describe()):
            if state["num_averaged"]:
                super().load_state_dict(state)
            return
        # The weights at hand are those of the checkpoint's step.
        if moments.includes(run.step):
            self.add(1.0)
        if state["num_averaged"]:
            number = moments.last - moments.first + 1
            lost = moments.count(run.step) - self.num_averaged
            told = f", without the first {lost} of its {number} moments" if lost else ""
            run.say(f"the average {self.name} has other moments than before and begins anew{told}")
