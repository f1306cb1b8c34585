"""What `mdm plan` does: reads laws, plans, and writes what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from megatron_mdm.config import Config, ParameterConvention, dump_recipe
from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.config.parameters import describe_convention
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.core.options import FLATTENED, REPEATED, Count
from megatron_mdm.studies.costs.clusters import cluster_of
from megatron_mdm.studies.laws.published import AR_LAW
from megatron_mdm.studies.laws.storage import LawFile, read_law
from megatron_mdm.studies.sweeps.plan_options import Family
from megatron_mdm.studies.sweeps.plan_report import plot_plan
from megatron_mdm.studies.sweeps.planned_run import (
    Corpus,
    Cost,
    choose_layout,
    find_corpus,
    find_run_warnings,
    make_run_config,
)
from megatron_mdm.studies.sweeps.planner import Plan, make_plan


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What there is to spend, on what, and where.

    Attributes:
        unique_tokens: Distinct tokens of the corpus, as 1e8.
        flops: Budget, 6 N D, as 1e20.
        parameters: N of --flops; as the family counts where not given.
        law: Law file; once for AR, once for MDM.
        family: Presets to choose from.
        cluster: Where it would run.
        gpus: How many.
        out: YAML file of the run to write.
        train: Shards to train on, whose vocabulary the plan takes; data/train where not given.
        valid: Held-out shards, for --out; those beside --train where not given.
        plot: PNG or SVG of the trade-off to write.
        json: Print JSON.
    """

    unique_tokens: float
    flops: float
    parameters: ParameterConvention | None = None
    law: Annotated[tuple[Path, ...], REPEATED] = ()
    family: Family = "dc"
    cluster: str = "h100"
    gpus: Count = 8
    out: Path | None = None
    train: str | None = None
    valid: str | None = None
    plot: Path | None = None
    json: bool = False


def plan_run(settings: PlanSettings) -> tuple[Plan, dict[ObjectiveKind, Cost]]:
    """Plans, and writes a configuration and a picture where asked to.

    Args:
        settings: What there is to spend.

    Returns:
        The plan, and what each option costs where a layout fits.

    Raises:
        ConfigError: An option is out of range.
        DataError: A law file or the shards cannot be read.
    """
    for name, path, suffixes in (
        ("--out", settings.out, (".yaml", ".yml")),
        ("--plot", settings.plot, (".png", ".svg")),
    ):
        if path is not None and path.suffix not in suffixes:
            raise ConfigError(f"{name}={path} has to end in {' or '.join(suffixes)}.")
    cluster = cluster_of(settings.cluster)
    laws = read_laws(settings.law)
    corpus = find_corpus(settings.train, settings.valid)
    plan = make_plan(
        unique_tokens=settings.unique_tokens,
        training_flops=settings.flops,
        laws=laws,
        family=settings.family,
        parameters=settings.parameters,
        vocab_size=corpus.vocab_size,
    )
    _check_fits(corpus, settings)
    costs: dict[ObjectiveKind, Cost] = {}
    configs: dict[ObjectiveKind, Config] = {}
    for kind, option in plan.options.items():
        config = make_run_config(option, plan.budget, corpus)
        try:
            configs[kind], costs[kind] = choose_layout(config, cluster, settings.gpus)
        except ConfigError:
            # No layout fits: the table says so, and the run stays as it is.
            configs[kind] = config
    chosen = configs[plan.leaning]
    if settings.out is not None:
        _write_config(settings.out, chosen, plan)
    if settings.plot is not None:
        known: dict[ObjectiveKind, LawFile] = {"ar": AR_LAW, **laws}
        plot_plan(settings.plot, plan, known)
    about_corpus = corpus.warnings if settings.out is not None else ()
    warnings = (*plan.warnings, *find_run_warnings(chosen), *about_corpus)
    return replace(plan, warnings=warnings), costs


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
                "mdm fit --objective."
            )
        if law.parameters is None:
            raise ConfigError(
                f"--law={path} does not say whether it counts parameters with or without "
                "embeddings: fit it with mdm fit --parameters."
            )
        if law.objective in laws:
            raise ConfigError(f"--law={path} is a second law of {law.objective}: give one of each.")
        laws[law.objective] = law
    return laws


def _check_fits(corpus: Corpus, settings: PlanSettings) -> None:
    # Shards of the default name may be those of something else.
    held, wanted = corpus.num_tokens, settings.unique_tokens
    if settings.train is not None and held is not None and wanted > held:
        raise ConfigError(
            f"--unique-tokens={wanted:g} is more than the {held:,} tokens of "
            f"--train={corpus.train_prefix}: give at most so many, or another corpus."
        )


def _write_config(path: Path, config: Config, plan: Plan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = "pretrain_ar.py" if plan.leaning == "ar" else "pretrain_mdm.py"
    header = (
        f"# {plan.unique_tokens:.3g} unique tokens, {plan.training_flops:.3g} FLOPs "
        f"({describe_convention(plan.budget.parameters)}): {plan.reason}.\n"
        f"# python pretrain/{entry} --config {path}\n"
    )
    write_text_whole(path, header + dump_recipe(config))
