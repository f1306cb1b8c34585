"""What mdm evaluate does: tasks of lm-evaluation-harness, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from megatron_mdm.config.objective import RunWay
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import format_json, write_text_whole
from megatron_mdm.core.options import REPEATED
from megatron_mdm.core.tables import format_markdown_table
from megatron_mdm.inference.ensemble import Ensemble
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.options import (
    DEFAULT_SCORING,
    DTYPES,
    SCORING_OPTIONS,
    ScoringOptions,
    list_given_options,
)
from megatron_mdm.inference.rank_pool import join_launched_ranks
from megatron_mdm.inference.requests import ScoringSettings
from megatron_mdm.inference.tasks.evaluation import (
    Entry,
    LoadedTasks,
    evaluate_task,
    explain_missing_data,
    find_tasks,
)
from megatron_mdm.inference.tasks.harness import HarnessModel, HarnessWorker
from megatron_mdm.inference.tasks.recipe import TaskRecipe, TaskSettings, load_recipe

RESULTS, TABLE = "results.json", "results.md"
_PACKAGES = ("lm-eval", "torch", "transformers", "tokenizers")


def run(
    *,
    model: Annotated[list[Path], REPEATED],
    run_as: RunWay | None = None,
    recipe: Path | None = None,
    tasks: str | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    log_samples: bool = False,
    out: Path | None = None,
    scoring: ScoringOptions = DEFAULT_SCORING,
) -> None:
    """Evaluates, and prints a table.

    Args:
        model: Folder of an exported model; repeatable: the probabilities of several, which are all
            loaded at once, are averaged.
        run_as: Of mixtures of objectives: ar, mdm, or prefix, whose contexts see themselves whole.
        recipe: Tasks with their settings, as in configs/eval; an option given here goes before
            them.
        tasks: NAME,NAME: tasks of the harness, or some of the recipe's.
        include_path: Folder of further tasks, in YAML.
        num_fewshot: Examples in the context, for all tasks.
        limit: Only the first N documents of each task.
        batch_size: Samples of a pass of generation.
        log_samples: Also write what each document came to.
        out: Folder for results.json and results.md.
        scoring: How masked diffusion is scored.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    recipes = choose_recipes(recipe, tasks, scoring, num_fewshot)
    base = TaskSettings(
        ScoringSettings(seed=scoring.seed, max_tokens=scoring.max_tokens), batch_size=batch_size
    )
    settings = {name: one.build_settings(base) for name, one in recipes.items()}
    with join_launched_ranks():
        members = (ExportedModel(folder, DTYPES[scoring.dtype], run_as) for folder in model)
        worker = HarnessWorker(Ensemble(members) if len(model) > 1 else next(members))
        pool = worker.make_pool()

        def work() -> None:
            manager = find_tasks(list(recipes), include_path)
            if len(model) > 1:
                _refuse_generation(list(recipes), manager)
            harness_model = HarnessModel.from_worker(worker, pool)
            is_causal = worker.model.facts.is_causal
            entries = {
                name: evaluate_task(
                    harness_model,
                    name,
                    one,
                    settings[name],
                    manager,
                    limit=limit,
                    log_samples=log_samples,
                )
                for name, one in recipes.items()
            }
            tree = {
                "model": " + ".join(map(str, model)),
                "objective": "ar" if is_causal else "mdm",
                **({} if run_as is None else {"run_as": run_as}),
                "dtype": scoring.dtype,
                "limit": limit,
                "versions": {name: version(name) for name in _PACKAGES},
                "tasks": entries,
            }
            _deliver(tree, out, is_causal, len(model))

        pool.run_on_driver(work)


def choose_recipes(
    path: Path | None, tasks: str | None, scoring: ScoringOptions, num_fewshot: int | None = None
) -> dict[str, TaskRecipe]:
    """Chooses the recipe of each task: options of the command line go before the file's.

    Args:
        path: Of a recipe.
        tasks: Names with commas between them: of the harness, or some of the recipe's.
        scoring: Options of scoring.
        num_fewshot: Examples in the context.

    Returns:
        Recipes by task.

    Raises:
        ConfigError: There are no tasks, or the recipe cannot be read.
    """
    names = None if tasks is None else [*dict.fromkeys(tasks.split(","))]
    if path is not None:
        recipes = load_recipe(path).choose(names)
    elif names is not None:
        recipes = {name: TaskRecipe() for name in names}
    else:
        raise ConfigError("There are no tasks: give --tasks, --recipe or both.")
    given = list_given_options(scoring, SCORING_OPTIONS)
    if num_fewshot is not None:
        given["num_fewshot"] = num_fewshot
    return {name: recipe.model_copy(update=given) for name, recipe in recipes.items()}


def _refuse_generation(names: Sequence[str], manager: LoadedTasks) -> None:
    for name in names:
        with explain_missing_data(name):
            loaded = manager.load([name])["tasks"]
        if any(task.OUTPUT_TYPE == "generate_until" for task in loaded.values()):
            raise ConfigError(
                f"The task {name} asks for texts, and the mean of several models writes none: "
                "evaluate one model, or leave the task out."
            )


def _deliver(tree: dict[str, Any], out: Path | None, is_causal: bool, num_models: int) -> None:
    samples = {name: entry.pop("samples") or {} for name, entry in tree["tasks"].items()}
    rows = [row for entry in tree["tasks"].values() for row in _list_rows(entry, is_causal)]
    heads = ["task", "metric", "value", "standard error", "noise", "shots", "documents", "how"]
    if num_models > 1:
        rows = [[*row[:-1], f"{row[-1]}, mean of {num_models} models"] for row in rows]
    table = format_markdown_table(heads, rows)
    sys.stdout.write(table)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, found in samples.items():
        lines = [format_json(one, default=str) for part in found.values() for one in part]
        if lines:
            write_text_whole(out / f"samples_{name}.jsonl", "\n".join(lines) + "\n")
    write_text_whole(out / TABLE, table)
    write_text_whole(out / RESULTS, format_json(tree, indent=2, default=str) + "\n")


def _list_rows(entry: Entry, is_causal: bool) -> list[list[str]]:
    rows = []
    for task, metrics in entry["results"].items():
        for metric, value in metrics.items():
            if "," not in metric or "_stderr" in metric or not isinstance(value, int | float):
                continue
            title, _, kind = metric.partition(",")
            numbers = (
                value,
                metrics.get(f"{title}_stderr,{kind}"),
                entry["noise"].get(task, {}).get(title),
            )
            rows.append(
                [
                    task,
                    title if kind == "none" else f"{title} ({kind})",
                    *(f"{one:.4f}" if isinstance(one, int | float) else "" for one in numbers),
                    f"{entry['num_fewshot'].get(task, '')}",
                    f"{entry['num_documents'].get(task, {}).get('effective', '')}",
                    _describe_how(entry, is_causal),
                ]
            )
    return rows


def _describe_how(entry: Entry, is_causal: bool) -> str:
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
