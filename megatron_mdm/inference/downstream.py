"""The section of the hook that evaluates tasks while a run trains.

Apart from what evaluates, so that a configuration is read before anything large is imported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_mdm.config.hook import HookConfig
from megatron_mdm.config.section import FilePath, NonNegativeInt, PositiveFloat, PositiveInt
from megatron_mdm.diffusion.probes import EstimatorKind


class DownstreamConfig(HookConfig):
    """Tasks of lm-evaluation-harness on the weights under training, as mdm evaluate does them.

    They are evaluated at the end of the run, and before it every so many epochs or steps.
    """

    kind: str = Field(default="downstream", description="This hook.")
    every_epochs: PositiveFloat | None = Field(
        default=None, description="Evaluate whenever so many epochs are over; or give every_steps."
    )
    every_steps: PositiveInt | None = Field(
        default=None, description="Evaluate every so many optimizer steps."
    )
    tasks: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="Tasks of the harness, or some of the recipe's."
    )
    recipe: FilePath | None = Field(
        default=None, description="Tasks with their settings, as in configs/eval."
    )
    include_path: FilePath | None = Field(
        default=None, description="Folder of tasks of your own, in YAML."
    )
    weights: str = Field(
        default="raw",
        description="Whose tasks: the weights that are trained, or an average of them by its name, "
        "of a hook that stands before this one.",
    )
    limit: PositiveInt | None = Field(
        default=None, description="Only the first so many documents of each task."
    )
    num_fewshot: NonNegativeInt | None = Field(
        default=None, description="Examples in the context, for all tasks."
    )
    estimator: EstimatorKind | None = Field(
        default=None, description="Of masked diffusion, for all tasks; else the recipe's."
    )
    draws: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Random masks of a request, for all tasks; else the recipe's."
    )
    seed: NonNegativeInt = Field(default=0, description="Of the masks.")
    max_tokens: PositiveInt | None = Field(
        default=None, description="Most tokens of a forward pass; null: what suits the device."
    )
    batch_size: PositiveInt = Field(default=16, description="Most samples of a pass of generation.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the copy of the weights that is evaluated."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError(
                f"hooks.kind=downstream has every_epochs={self.every_epochs} and "
                f"every_steps={self.every_steps}: keep one."
            )
        if self.tasks is None and self.recipe is None:
            raise ValueError("hooks.kind=downstream has no tasks: give tasks, recipe or both.")
        return self

    def build(self, config: Any) -> Any:
        """Makes the hook.

        Raises:
            ConfigError: The recipe cannot be read, or its settings do not fit each other.
        """
        # The harness takes seconds to import.
        from megatron_mdm.inference.tasks.downstream import Downstream

        return Downstream(self, config)
