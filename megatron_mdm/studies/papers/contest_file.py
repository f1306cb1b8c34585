"""The YAML file of a contest: who takes part, what is tuned for each, and over what seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from megatron_mdm.config.section import NonNegativeInt, PositiveInt, Section
from megatron_mdm.studies.sweeps.sweep_file import read_section_file


class Range(Section):
    """Numbers between two ends."""

    low: float = Field(description="Least value.")
    high: float = Field(description="Greatest value.")
    log: bool = Field(default=False, description="Are ratios what matters, not differences?")

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}: give a range.")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} has no logarithm: give a number above 0.")
        return self


class Ladder(Section):
    """What each ingredient gives: rungs that are added one after the other."""

    start: dict[str, Any] = Field(description="Fields of the lowest rung.")
    rungs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = Field(
        description="Fields that each further rung sets, by its name, from the lowest up."
    )
    averages_from: str | None = Field(
        default=None,
        description="The rung from which on averages of the weights count; it may set nothing. "
        "None: they count from the lowest rung on.",
    )

    @model_validator(mode="after")
    def _check_averages(self) -> Self:
        if self.averages_from is not None and self.averages_from not in self.rungs:
            raise ValueError(
                f"averages_from={self.averages_from} is no rung: use one of "
                f"{', '.join(self.rungs)}."
            )
        return self


class ContestFile(Section):
    """A contest as it is written. Paths are relative to the working directory, as in configs."""

    base: str = Field(description="YAML config that every run starts from.")
    dir: str = Field(description="Folder of all runs and of the report.")
    set: dict[str, Any] = Field(default={}, description="Fields that all runs share.")
    contestants: Annotated[dict[str, dict[str, Any]], Field(min_length=2)] = Field(
        description="Fields of each, by its name; what they set is not tuned for them."
    )
    space: Annotated[dict[str, Range | list[Any]], Field(min_length=1)] = Field(
        description="What is tuned: a range, or a list of values, by dotted field."
    )
    trials: PositiveInt = Field(description="Runs that tune each contestant.")
    at_once: PositiveInt = Field(
        default=2, description="Trials of a contestant that are proposed at once."
    )
    seed: NonNegativeInt = Field(
        default=0, description="Of the proposals, of their runs, and of the choice of windows."
    )
    seeds: Annotated[list[NonNegativeInt], Field(min_length=2)] = Field(
        description="Of the runs that are compared: each contestant's best trial, once a seed."
    )
    ladder: Ladder | None = Field(default=None, description="An ablation besides.")

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if self.seed in self.seeds:
            raise ValueError(
                f"seeds={self.seeds} holds seed={self.seed}, by which the trials were chosen, so "
                "that its run would look too good: give other seeds."
            )
        for field, values in self.space.items():
            if isinstance(values, list) and len(values) < 2:
                raise ValueError(f"space.{field}={values} leaves no choice: put it into set.")
        return self

    def find_space(self, contestant: str) -> dict[str, Range | list[Any]]:
        """What is tuned for a contestant: all but what it sets itself."""
        own = self.contestants[contestant]
        return {field: one for field, one in self.space.items() if field not in own}


def read_contest(path: Path) -> ContestFile:
    """Reads and checks the file of a contest; its runs are not looked at.

    Args:
        path: The YAML file.

    Returns:
        Its content.

    Raises:
        ConfigError: It cannot be read, or a key or value is not valid.
    """
    return read_section_file(path, ContestFile, "contest", "base, dir, contestants and space")
