"""Evaluates tasks of lm-evaluation-harness: of an export's model, and of weights under training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from megatron_mdm.core.errors import ConfigError, first_line
from megatron_mdm.inference.tasks.harness import HarnessModel
from megatron_mdm.inference.tasks.metric_noise import estimate_metric_noise
from megatron_mdm.inference.tasks.recipe import TaskRecipe, TaskSettings

# For the standard errors of metrics that have no formula of their own.
_BOOTSTRAP_RESAMPLES = 1000

Entry = dict[str, Any]


class LoadedTasks(TaskManager):
    """Knows the tasks of the evaluation that it was last asked for."""

    def load(self, task_list: Any) -> TaskDict:
        """Loads tasks, as the harness asks for them."""
        self.last = super().load(task_list)
        return self.last


def find_tasks(names: Sequence[str], folder: Path | None) -> LoadedTasks:
    """Finds tasks of the harness.

    Args:
        names: Which.
        folder: With further ones, in YAML.

    Returns:
        What loads them.

    Raises:
        ConfigError: There is no such folder or task.
    """
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"--include-path={folder} is no folder: name one with YAML files.")
        # Reading the harness's own thousands takes ten seconds.
        manager = LoadedTasks(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = LoadedTasks(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"--tasks={name} is none of the {len(manager.all_tasks):,} tasks of "
                f"lm-evaluation-harness {version('lm-eval')}: see `lm-eval ls tasks`, or name the "
                "folder of your own with --include-path."
            )
    return manager


@contextmanager
def explain_missing_data(task: str) -> Iterator[None]:
    """Turns the errors of data that cannot be downloaded into one sentence."""
    try:
        yield
    except (ConnectionError, DatasetNotFoundError, HTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"The data of the task {task} are not in {constants.HF_HOME} and cannot be "
            f"downloaded ({first_line(error)}): run the same command with --limit 1 on a machine "
            "with a network and copy its HF_HOME here, or name tasks of your own with "
            "--include-path."
        ) from error


def evaluate_task(
    model: HarnessModel,
    name: str,
    recipe: TaskRecipe,
    settings: TaskSettings,
    manager: LoadedTasks,
    *,
    limit: int | None = None,
    log_samples: bool = False,
) -> Entry:
    """Evaluates a task. Only on the rank that deals requests out.

    Args:
        model: The model.
        name: Of the task, or of a group of tasks.
        recipe: As it was stated.
        settings: As it is evaluated.
        manager: What loads it.
        limit: Only so many first documents of each task; None: all.
        log_samples: Keep what each document came to.

    Returns:
        The figures with their noise, settings and counts, as results.json has them.

    Raises:
        ConfigError: Its data are missing, or something does not fit the model.
    """
    model.settings, model.scores = settings.choose_estimator(model.facts), {}
    # The harness would fork for what is one piece of work, and a fork of a process with threads,
    # as one that trains has, may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with explain_missing_data(name), _without_description():
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[name],
            num_fewshot=recipe.num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=log_samples,
            bootstrap_iters=_BOOTSTRAP_RESAMPLES,
        )
    return _describe(found, model, manager, recipe)


@contextmanager
def _without_description() -> Iterator[None]:
    """Leaves out the harness's description of the machine, which takes seconds."""
    describe = evaluator.add_env_info
    evaluator.add_env_info = lambda storage: None
    try:
        yield
    finally:
        evaluator.add_env_info = describe


def _describe(found: Any, model: HarnessModel, manager: LoadedTasks, recipe: TaskRecipe) -> Entry:
    scores = model.scores.values()
    seed = model.settings.scoring.seed

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "results": found["results"],
        "noise": {
            name: estimate_metric_noise(task, model.scores, seed)
            for name, task in manager.last["tasks"].items()
        },
        "num_documents": found["n-samples"],
        "num_fewshot": found["n-shot"],
        "task_versions": found["versions"],
        "settings": asdict(model.settings),
        "recipe": recipe.model_dump(exclude_unset=True),
        "num_requests": len(scores),
        "forward_passes": sum(score.num_passes for score in scores),
        "mean_standard_error_of_log_likelihoods": mean([one.standard_error for one in scores]),
        "mean_reach_of_95_percent_intervals": mean([one.reach for one in scores]),
        "samples": found.get("samples"),
    }
