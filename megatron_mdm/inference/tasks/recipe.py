"""Recipes: which tasks, each with its estimator, its guidance and its options of generation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    create_model,
)

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.inference.models import ModelFacts
from megatron_mdm.inference.options import SCORING_OPTIONS, make_generation_options
from megatron_mdm.inference.requests import ScoringSettings

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
_STATED = (*SCORING_OPTIONS, "greedy_match")


@dataclass(frozen=True)
class TaskSettings:
    """Settings of a task.

    Attributes:
        scoring: For likelihoods.
        decoding: Options of `Decoding` for generation, by name; the model's own decide the rest.
        batch_size: Most samples of a pass of generation. Results do not depend on it.
        rolling_context: Tokens before its window that each later window of a long text sees.
    """

    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    decoding: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    rolling_context: int = 1

    def choose_estimator(self, facts: ModelFacts) -> TaskSettings:
        """The settings with the estimator that a model is judged by."""
        kind = self.scoring.choose_estimator(facts)
        return replace(self, scoring=replace(self.scoring, estimator=kind))


_HINTS = get_type_hints(ScoringSettings)
_FIELDS: dict[str, Any] = {name: (_HINTS[name] | None, None) for name in _STATED}
_StatedScoring: Any = create_model("StatedScoring", __config__=_STRICT, **_FIELDS)


class TaskRecipe(_StatedScoring):
    """Settings of a task in a recipe; the rest comes from `defaults`, or from the harness.

    Fields of `ScoringSettings` can be stated, and what follows.

    Attributes:
        num_fewshot: Examples in the context; None: as the task has it.
        rolling_context: Tokens that each later window of a long text sees before it.
        decoding: Options of generation, by the names of `Decoding`.
    """

    num_fewshot: NonNegativeInt | None = None
    rolling_context: PositiveInt | None = None
    decoding: dict[str, Any] | None = None

    def fill_from(self, other: TaskRecipe) -> TaskRecipe:
        """Fills values that this recipe does not state from another."""
        return TaskRecipe(**{**other.model_dump(), **self.model_dump(exclude_unset=True)})

    def build_settings(self, base: TaskSettings) -> TaskSettings:
        """Builds the settings.

        Args:
            base: Values of whatever is not stated.

        Returns:
            The settings.

        Raises:
            ConfigError: They do not fit each other.
        """
        stated = {name: value for name in _STATED if (value := getattr(self, name)) is not None}
        if "draws" in stated:
            stated.setdefault("max_draws", max(base.scoring.max_draws, stated["draws"]))
        # Names are checked here, before anything starts.
        make_generation_options(self.decoding or {})
        return replace(
            base,
            scoring=replace(base.scoring, **stated),
            decoding={**base.decoding, **(self.decoding or {})},
            rolling_context=self.rolling_context or base.rolling_context,
        )


class Recipe(BaseModel):
    """A list of tasks.

    Attributes:
        harness: Kind of tasks; lm-evaluation-harness is the only one.
        defaults: For all tasks.
        tasks: By the harness's names, in the order of the table.
    """

    model_config = _STRICT

    harness: Literal["lm-eval"] = "lm-eval"
    defaults: TaskRecipe = TaskRecipe()
    tasks: dict[str, TaskRecipe | None] = Field(min_length=1)

    def choose(self, names: list[str] | None) -> dict[str, TaskRecipe]:
        """Chooses tasks, each with its settings and the defaults.

        Args:
            names: Which; None: all.

        Returns:
            Recipes by task.

        Raises:
            ConfigError: The recipe has no such task.
        """
        for name in names or ():
            if name not in self.tasks:
                raise ConfigError(
                    f"--tasks={name} is not in the recipe, which has {', '.join(self.tasks)}: "
                    "choose among these, or leave out --recipe."
                )
        return {
            name: (self.tasks[name] or TaskRecipe()).fill_from(self.defaults)
            for name in (names or self.tasks)
        }


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Args:
        path: A YAML file.

    Returns:
        The recipe.

    Raises:
        ConfigError: It cannot be read, or says something that no recipe says.
    """
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--recipe={path} cannot be read ({error}): give a YAML file.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--recipe={path} is not valid YAML ({reason}): mend it.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"--recipe={path}: {where}: {first['msg']}: see docs/evaluation.md."
        ) from None
