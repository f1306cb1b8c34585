"""What `tools/plan_run.py` does: reads laws, plans, and writes what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_mdm.config import Config, ParameterConvention, dump_recipe
from megatron_mdm.config.parameters import in_words
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.studies.costs.clusters import cluster_of
from megatron_mdm.studies.laws.published import AR_LAW
from megatron_mdm.studies.laws.storage import LawFile, read_law
from megatron_mdm.studies.sweeps.plan_corpus import Corpus, find_corpus
from megatron_mdm.studies.sweeps.plan_options import ObjectiveKind
from megatron_mdm.studies.sweeps.plan_report import plot_plan
from megatron_mdm.studies.sweeps.planned_run import (
    Cost,
    planned_config,
    run_warnings,
    with_best_layout,
)
from megatron_mdm.studies.sweeps.planner import Plan, make_plan


def plan_run(
    *,
    unique_tokens: float,
    training_flops: float,
    law_paths: Sequence[Path],
    family: str,
    cluster: str,
    num_gpus: int,
    config_path: Path | None,
    train_prefix: str | None,
    valid_prefix: str | None,
    plot_path: Path | None,
    parameters: ParameterConvention | None = None,
) -> tuple[Plan, dict[ObjectiveKind, Cost]]:
    """Plans, and writes a configuration and a picture.

    Args:
        unique_tokens: U.
        training_flops: C.
        law_paths: Law files, at most one of each objective.
        family: Presets to choose from.
        cluster: Name of a preset.
        num_gpus: How many GPUs.
        config_path: Where to write the chosen run's YAML; None: nowhere.
        train_prefix: Shards to train on, whose vocabulary the plan takes; None: `data/train`.
        valid_prefix: Held-out shards; None: what stands beside those to train on.
        plot_path: Where to draw; None: nowhere.
        parameters: Which N the FLOPs count; None: as the family does.

    Returns:
        The plan, and what each option costs where a layout fits.

    Raises:
        ConfigError: An option is out of range.
        DataError: A law file or the shards cannot be read.
    """
    if num_gpus < 1:
        raise ConfigError(f"--gpus={num_gpus} is not valid: give a whole number above 0.")
    for name, path, suffixes in (
        ("--out", config_path, (".yaml", ".yml")),
        ("--plot", plot_path, (".png", ".svg")),
    ):
        if path is not None and path.suffix not in suffixes:
            raise ConfigError(f"{name}={path} has to end in {' or '.join(suffixes)}.")
    laws = read_laws(law_paths)
    corpus = find_corpus(train_prefix, valid_prefix)
    plan = make_plan(
        unique_tokens=unique_tokens,
        training_flops=training_flops,
        laws=laws,
        family=family,
        parameters=parameters,
        vocab_size=corpus.vocab_size,
    )
    _check_fits(corpus, unique_tokens, is_named=train_prefix is not None)
    costs: dict[ObjectiveKind, Cost] = {}
    configs: dict[ObjectiveKind, Config] = {}
    for kind, option in plan.options.items():
        config = planned_config(
            option,
            plan.budget,
            train_prefix=corpus.train_prefix,
            valid_prefix=corpus.valid_prefix,
            run_dir=f"runs/{option.preset}-{kind}",
        )
        try:
            configs[kind], costs[kind] = with_best_layout(config, cluster_of(cluster), num_gpus)
        except ConfigError:
            # No layout fits: the table says so, and the run stays as it is.
            configs[kind] = config
    chosen = configs[plan.leaning]
    if config_path is not None:
        _write_config(config_path, chosen, plan)
    if plot_path is not None:
        known: dict[ObjectiveKind, LawFile] = {"ar": AR_LAW, **laws}
        plot_path.parent.mkdir(parents=True, exist_ok=True)
        plot_plan(plot_path, plan, known)
    about_corpus = corpus.warnings if config_path is not None else ()
    return _with_warnings(plan, [*run_warnings(chosen), *about_corpus]), costs


def read_laws(paths: Sequence[Path]) -> Mapping[ObjectiveKind, LawFile]:
    """Reads law files and sorts them by objective.

    Args:
        paths: Law files.

    Returns:
        At most one of each objective.

    Raises:
        ConfigError: A file does not say its objective or which N it takes, or two are of one
            objective.
        DataError: A file cannot be read.
    """
    laws: dict[ObjectiveKind, LawFile] = {}
    for path in paths:
        law = read_law(path)
        if law.objective is None:
            raise ConfigError(
                f"--law={path} does not say whether it is of AR or MDM: fit it with "
                "tools/fit_scaling_law.py --objective."
            )
        if law.parameters is None:
            raise ConfigError(
                f"--law={path} does not say whether it counts parameters with or without "
                "embeddings: fit it with tools/fit_scaling_law.py --parameters."
            )
        if law.objective in laws:
            raise ConfigError(f"--law={path} is a second law of {law.objective}: give one of each.")
        laws[law.objective] = law
    return laws


def _check_fits(corpus: Corpus, unique_tokens: float, *, is_named: bool) -> None:
    # Shards of the default name may be those of something else.
    if is_named and corpus.num_tokens is not None and unique_tokens > corpus.num_tokens:
        raise ConfigError(
            f"--unique-tokens={unique_tokens:g} is more than the {corpus.num_tokens:,} tokens of "
            f"--train={corpus.train_prefix}: give at most so many, or another corpus."
        )


def _write_config(path: Path, config: Config, plan: Plan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = "pretrain_ar.py" if plan.leaning == "ar" else "pretrain_mdm.py"
    header = (
        f"# {plan.unique_tokens:.3g} unique tokens, {plan.training_flops:.3g} FLOPs "
        f"({in_words(plan.budget.parameters)}): {plan.reason}.\n"
        f"# python pretrain/{entry} --config {path}\n"
    )
    write_text_whole(path, header + dump_recipe(config))


def _with_warnings(plan: Plan, warnings: Sequence[str]) -> Plan:
    return replace(plan, warnings=(*plan.warnings, *warnings))
