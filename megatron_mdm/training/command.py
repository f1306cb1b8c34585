"""The command line of the training scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from megatron_mdm.config import Config, load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import run_command
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.training.restarts import adapt_to_restart

# The deepspeed launcher passes it; the environment says the same.
_LocalRank = Annotated[int | None, Parameter(name="--local_rank", show=False)]


def run_pretraining(description: str, overrides: Sequence[str] = ()) -> None:
    """Reads the command line, then trains or describes the run.

    Args:
        description: First line of the help.
        overrides: `section.key=value` strings, applied before those of the command line.

    Raises:
        MdmError: Something about the run does not fit; raised before any worker starts.
    """
    if (arguments := run_command(_read_arguments, description)) is not None:
        path, given, is_dry = arguments
        _run(load_config(path, [*overrides, *given]), is_dry)


def run_finetuning(description: str, kind: Literal["mdm", "ar"]) -> None:
    """Reads the command line, then fine-tunes or describes the run.

    Args:
        description: First line of the help.
        kind: The objective.

    Raises:
        MdmError: Something about the run does not fit; raised before any worker starts.
    """
    if (arguments := run_command(_read_arguments, description)) is None:
        return
    path, given, is_dry = arguments
    config = load_config(path, [*given, "finetuning.enabled=true", f"objective.kind={kind}"])
    if config.run.initial_weights is None:
        raise ConfigError(
            "run.initial_weights is not set, and fine-tuning begins with the weights of a model: "
            "set it to the folder of a run or of a converted checkpoint; for random weights use "
            f"pretrain/pretrain_{kind}.py with finetuning.enabled=true."
        )
    _run(config, is_dry)


def _run(config: Config, is_dry: bool) -> None:
    # Before anything looks for GPUs. It imports torch, and so comes after the config is checked.
    from megatron_mdm.distributed.processes import order_kernels

    order_kernels(config.parallel.tensor_model_parallel_size)
    # On a machine with a GPU, too, a run on the CPU is one for DeepSpeed.
    quiet_engines(use_cpu=True if config.run.device == "cpu" else None)
    if not is_dry:
        config = adapt_to_restart(config)
        # After the config is checked: importing the engines takes seconds.
        from megatron_mdm.training.launch import train

        train(config)
    elif os.environ.get("RANK", "0") == "0":
        from megatron_mdm.training.description import describe

        print(describe(config))  # noqa: T201 - what a dry run is for


def _read_arguments(
    *overrides: str, config: Path, dry_run: bool = False, local_rank: _LocalRank = None
) -> tuple[Path, list[str], bool]:
    """Reads the command line of a training script: the file, overrides, whether it is a dry run.

    Args:
        overrides: Fields of the configuration, as section.key=value.
        config: YAML file, see configs/.
        dry_run: Describe the run, start nothing.
        local_rank: Not used.
    """
    del local_rank
    return config, list(overrides), dry_run
