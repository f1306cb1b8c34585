"""What a crossover is made of: its corpora, and runs of sweeps as curves of held-out loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.core.errors import DataError
from megatron_mdm.model.accounting import model_size
from megatron_mdm.reporting.metrics import NLL
from megatron_mdm.reporting.run_folder import RunFolder
from megatron_mdm.studies.papers.crossover import Condition, MeasuredRun
from megatron_mdm.studies.steps import run_step
from megatron_mdm.studies.sweeps.grid import Sweep, SweepRun, field_of, load_sweep
from megatron_mdm.studies.sweeps.run_sizes import SizedRun, size_runs

# Of `make crossover`: enough random documents for the most unique tokens of configs/crossover.
_SUBSET_TOKENS = 524288
_VOCABULARIES = {"bytes": 257, "bpe-1024": 1024}
_ERROR = "valid/nll_standard_error"
# Swept fields that are no choice of a setting: what is compared, what is repeated, what both
# objectives have to cope with, how long they go on, and what is told and kept.
_NO_SETTING = (
    *("objective.kind", "run.seed", "data.train", "data.valid", "data.tokenizer"),
    *("schedule.", "validation.", "checkpoint.", "reporting."),
)
_SIZES = ("preset", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups")
_MORE_SIZES = ("head_dim", "ffn_hidden_size", "vocab_size")


def prepare_corpora(folder: Path) -> None:
    """Makes text of Python's standard library, tokenizers and shards; what is done is reused.

    Args:
        folder: Where all goes; the sweeps name their shards in it.

    Raises:
        MdmError: A step failed; it has said why.
    """
    corpus = folder / "corpus"
    train = corpus / "train.jsonl"
    run_step("gather-stdlib", "--output", corpus)
    for name, size in _VOCABULARIES.items():
        tokenizer, shards = folder / name / "tokenizer", folder / name / "train"
        trained = ("--vocab-size", size, "--output", tokenizer)
        run_step("tokenizer", "train", "--input", train, *trained)
        for split in ("train", "valid"):
            made = ("--tokenizer", tokenizer, "--output-prefix", folder / name / split)
            run_step("prepare", "--input", corpus / f"{split}.jsonl", *made)
        drawn = ("--tokens", _SUBSET_TOKENS, "--output-prefix", shards)
        run_step("subset", "--input", shards, *drawn)


def read_sweeps(
    paths: Sequence[Path], *, best_size: bool = False
) -> tuple[list[MeasuredRun], list[str]]:
    """Reads what the runs of sweeps have measured so far.

    Args:
        paths: YAML files of sweeps.
        best_size: Let each objective have its best size: sizes are settings, not conditions.

    Returns:
        The runs that have a held-out loss, and the names of those that have none.

    Raises:
        MdmError: A sweep, or a file of a run, is not valid, or no run has begun.
    """
    found: list[MeasuredRun] = []
    missing: list[str] = []
    sweeps = [load_sweep(path) for path in paths]
    folders = [run.folder for sweep in sweeps for run in sweep.runs]
    if not any(folder.exists() for folder in folders):
        raise DataError(
            f"None of the {len(folders)} runs has begun, the first of them in {folders[0]}: leave "
            "out --report-only, which trains them, or start in the folder that has `runs`."
        )
    for sweep in sweeps:
        for run in size_runs(sweep.runs, from_ledgers=True):
            measured = measure(sweep, run, best_size=best_size)
            if measured is None:
                missing.append(run.name)
            else:
                found.append(measured)
    return found, missing


def measure(sweep: Sweep, run: SizedRun, *, best_size: bool = False) -> MeasuredRun | None:
    """Reads a run's curve.

    Args:
        sweep: Says which fields were swept.
        run: The run.
        best_size: The size is a part of the setting.

    Returns:
        The run; None before its first held-out loss.

    Raises:
        DataError: The metrics are damaged, or a loss is not finite.
    """
    left = RunFolder(run.folder)
    judged = left.validations
    if not judged:
        return None
    losses = np.array([record[NLL] for record in judged])
    if not np.isfinite(losses).all():
        raise DataError(
            f"{run.folder} has held-out losses that are not finite: lower its learning rate, or "
            "take it out of the sweep."
        )
    steps = [int(record["step"]) for record in judged]
    setting = setting_of(sweep, run)
    if best_size:
        setting = ", ".join(filter(None, (f"N={run.num_parameters:,}", setting)))
    return MeasuredRun(
        name=run.name,
        objective=cast(ObjectiveKind, run.config.objective.kind),
        condition=Condition(
            corpus=" + ".join(source.path for source in run.config.data.train),
            unique_tokens=run.unique_tokens,
            num_parameters=None if best_size else run.num_parameters,
        ),
        setting=setting,
        seed=run.config.run.seed,
        epochs=np.array([run.epochs(step) for step in steps]),
        flops=np.array([run.flops(step) for step in steps]),
        losses=losses,
        errors=np.array([float(record.get(_ERROR, np.nan)) for record in judged]),
        records=left.matched,
        best_windows=left.windows.get(steps[int(losses.argmin())]),
        size=model_size(run.config.model),
    )


def setting_of(sweep: Sweep, run: SweepRun) -> str:
    """What was chosen for a run that another run of its condition may do otherwise.

    Args:
        sweep: Says which fields were swept.
        run: The run.

    Returns:
        Fields and values; empty where nothing was chosen.
    """
    sizes = {f"model.{name}" for name in (*_SIZES, *_MORE_SIZES)}
    chosen = [
        field for field in sweep.fields if not field.startswith(_NO_SETTING) and field not in sizes
    ]
    return ", ".join(f"{field}={json.dumps(field_of(run.config, field))}" for field in chosen)
