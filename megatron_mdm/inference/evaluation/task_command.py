"""The command line of tools/evaluate.py: tasks of lm-evaluation-harness, one after the other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import json_text, write_text_whole
from megatron_mdm.core.tables import markdown_table
from megatron_mdm.inference.evaluation.harness import HarnessModel, HarnessWorker, TaskSettings
from megatron_mdm.inference.evaluation.metric_noise import metric_noise
from megatron_mdm.inference.evaluation.options import DTYPES, add_scoring_options, given_scoring
from megatron_mdm.inference.evaluation.rank_pool import launched_ranks
from megatron_mdm.inference.evaluation.recipe import TaskRecipe, load_recipe
from megatron_mdm.inference.evaluation.requests import ScoringSettings
from megatron_mdm.inference.evaluation.scoring_model import ExportedScoringModel

RESULTS, TABLE = "results.json", "results.md"
_PACKAGES = ("lm-eval", "torch", "transformers", "tokenizers")


class LoadedTasks(TaskManager):
    """Knows the tasks of the evaluation that it was last asked for."""

    def load(self, task_list: Any) -> TaskDict:
        """Loads tasks, as the harness asks for them."""
        self.last = super().load(task_list)
        return self.last


def add_command_line(parser: argparse.ArgumentParser) -> None:
    """Adds the options.

    Args:
        parser: An empty parser.
    """
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported model")
    add(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="tasks with their settings, as in configs/eval; an option given here goes before them",
    )
    add("--tasks", metavar="NAME,NAME", help="tasks of the harness, or some of the recipe's")
    add("--include-path", type=Path, metavar="DIR", help="folder of further tasks, in YAML")
    add("--num-fewshot", type=int, metavar="N", help="examples in the context, for all tasks")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add("--batch-size", type=int, default=16, help="samples a pass of generation (%(default)s)")
    add("--log-samples", action="store_true", help="also write what each document came to")
    add("--out", type=Path, metavar="DIR", help=f"folder for {RESULTS} and {TABLE}")
    add_scoring_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates, and prints a table.

    Args:
        arguments: Of `add_command_line`.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    recipes = _recipes(arguments)
    settings = task_settings(arguments)
    with launched_ranks():
        worker = HarnessWorker(ExportedScoringModel(arguments.model, DTYPES[arguments.dtype]))
        pool = worker.pool()

        def work() -> None:
            manager = _find_tasks(list(recipes), arguments.include_path)
            model = HarnessModel.of(worker, pool)
            entries = {}
            for name, recipe in recipes.items():
                model.settings, model.scores = settings[name], {}
                found = _evaluate(model, manager, name, recipe, arguments)
                entries[name] = _entry(found, model, manager, recipe)
            _deliver(entries, arguments, worker)

        pool.lead(work)


def task_settings(arguments: argparse.Namespace) -> dict[str, TaskSettings]:
    """How each task is done: what the command line gives, then the recipe, then the defaults.

    Args:
        arguments: Of `add_command_line`.

    Returns:
        Settings by task.

    Raises:
        ConfigError: There are no tasks, the recipe cannot be read, or a value does not fit.
    """
    scoring = ScoringSettings(seed=arguments.seed, max_tokens=arguments.max_tokens)
    base = TaskSettings(scoring, batch_size=arguments.batch_size)
    return {name: recipe.settings(base) for name, recipe in _recipes(arguments).items()}


def _recipes(arguments: argparse.Namespace) -> dict[str, TaskRecipe]:
    names = None if arguments.tasks is None else [*dict.fromkeys(arguments.tasks.split(","))]
    if arguments.recipe is not None:
        recipes = load_recipe(arguments.recipe).choose(names)
    elif names is not None:
        recipes = {name: TaskRecipe() for name in names}
    else:
        raise ConfigError("There are no tasks: give --tasks, --recipe or both.")
    given = given_scoring(arguments)
    if arguments.num_fewshot is not None:
        given["num_fewshot"] = arguments.num_fewshot
    return {name: recipe.model_copy(update=given) for name, recipe in recipes.items()}


def _find_tasks(names: Sequence[str], folder: Path | None) -> LoadedTasks:
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


def _evaluate(
    model: HarnessModel,
    manager: LoadedTasks,
    name: str,
    recipe: TaskRecipe,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    found: Any = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=recipe.num_fewshot,
        limit=arguments.limit,
        task_manager=manager,
        log_samples=arguments.log_samples,
        bootstrap_iters=1000,
    )
    result: dict[str, Any] = found
    return result


def _entry(
    found: dict[str, Any], model: HarnessModel, manager: LoadedTasks, recipe: TaskRecipe
) -> dict[str, Any]:
    scores = model.scores.values()
    errors = [score.standard_error for score in scores]
    reaches = [score.reach for score in scores]
    seed = model.settings.scoring.seed
    return {
        "results": found["results"],
        "noise": {
            name: metric_noise(task, model.scores, seed)
            for name, task in manager.last["tasks"].items()
        },
        "num_documents": found["n-samples"],
        "num_fewshot": found["n-shot"],
        "task_versions": found["versions"],
        "settings": asdict(model.settings),
        "recipe": recipe.model_dump(exclude_unset=True),
        "num_requests": len(scores),
        "forward_passes": sum(score.num_passes for score in scores),
        "mean_standard_error_of_log_likelihoods": sum(errors) / len(errors) if errors else None,
        "mean_reach_of_95_percent_intervals": sum(reaches) / len(reaches) if reaches else None,
        "samples": found.get("samples"),
    }


def _deliver(
    entries: dict[str, dict[str, Any]], arguments: argparse.Namespace, worker: HarnessWorker
) -> None:
    samples = {name: entry.pop("samples") for name, entry in entries.items()}
    table = _table(entries, is_causal=worker.model.facts.is_causal)
    sys.stdout.write(table)
    if arguments.out is None:
        return
    tree = {
        "model": str(arguments.model),
        "objective": "ar" if worker.model.facts.is_causal else "mdm",
        "dtype": arguments.dtype,
        "limit": arguments.limit,
        "versions": {name: version(name) for name in _PACKAGES},
        "tasks": entries,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.log_samples:
        for name, found in samples.items():
            lines = [json_text(one, default=str) for part in found.values() for one in part]
            write_text_whole(arguments.out / f"samples_{name}.jsonl", "\n".join(lines) + "\n")
    write_text_whole(arguments.out / TABLE, table)
    write_text_whole(arguments.out / RESULTS, json_text(tree, indent=2, default=str) + "\n")


def _table(entries: dict[str, dict[str, Any]], *, is_causal: bool) -> str:
    heads = ["task", "metric", "value", "standard error", "noise", "shots", "documents", "how"]
    rows = []
    for entry in entries.values():
        for task, metrics in entry["results"].items():
            documents = entry["num_documents"].get(task, {}).get("effective", "")
            for metric, value in metrics.items():
                if "," not in metric or "_stderr" in metric or not isinstance(value, int | float):
                    continue
                title, _, kind = metric.partition(",")
                error = metrics.get(f"{title}_stderr,{kind}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                label = title if kind == "none" else f"{title} ({kind})"
                shots = entry["num_fewshot"].get(task, "")
                noise = entry["noise"].get(task, {}).get(title)
                moved = "" if noise is None else f"{noise:.4f}"
                known = [task, label, f"{value:.4f}", shown, moved]
                rows.append([*known, f"{shots}", f"{documents}", _how(entry, is_causal)])
    return markdown_table(heads, rows)


def _how(entry: dict[str, Any], is_causal: bool) -> str:
    scoring = entry["settings"]["scoring"]
    if not entry["num_requests"]:
        decoding = entry["settings"]["decoding"]
        return ", ".join(f"{key} {value}" for key, value in decoding.items()) or "generation"
    if is_causal:
        # The estimators are of masked diffusion.
        return "exact likelihood"
    parts = [scoring["estimator"].replace("_", " ")]
    if scoring["estimator"] != "chain_rule":
        parts.append(f"{scoring['draws']} draws")
    if scoring["guidance_scale"]:
        parts.append(f"w {scoring['guidance_scale']:g}")
    return ", ".join(parts)
