"""The commands that train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NamedTuple

from cyclopts import Parameter

from megatron_mdm.config import Config, load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.training.restarts import adapt_to_restart

# The deepspeed launcher passes it; the environment says the same.
_LocalRank = Annotated[int | None, Parameter(name="--local_rank", show=False)]


class Dry(NamedTuple):
    """What is only to be said of a run: in short, in full, with two steps measured."""

    run: bool = False
    full: bool = False
    probe: bool = False


def pretrain(
    *overrides: str,
    config: Path,
    dry_run: bool = False,
    full: bool = False,
    probe: bool = False,
    local_rank: _LocalRank = None,
) -> None:
    """Trains a model, or describes the run.

    Args:
        overrides: Fields of the configuration, as section.key=value.
        config: YAML file, see configs/.
        dry_run: Say what the run is and how long it takes, start nothing.
        full: With --dry-run: every field, count and estimate.
        probe: With --dry-run: measure two steps here.
        local_rank: Not used.

    Raises:
        MdmError: Something about the run does not fit; raised before any worker starts.
    """
    del local_rank
    _run(load_config(config, overrides), Dry(dry_run, full, probe))


def finetune(
    *overrides: str,
    config: Path,
    dry_run: bool = False,
    full: bool = False,
    probe: bool = False,
    local_rank: _LocalRank = None,
) -> None:
    """Fine-tunes a model, or describes the run.

    Args:
        overrides: Fields of the configuration, as section.key=value.
        config: YAML file, see configs/finetuning.
        dry_run: Say what the run is and how long it takes, start nothing.
        full: With --dry-run: every field, count and estimate.
        probe: With --dry-run: measure two steps here.
        local_rank: Not used.

    Raises:
        MdmError: Something about the run does not fit; raised before any worker starts.
    """
    del local_rank
    resolved = load_config(config, [*overrides, "finetuning.enabled=true"])
    if resolved.run.initial_weights is None:
        raise ConfigError(
            "run.initial_weights is not set, and fine-tuning begins with the weights of a model: "
            "set it to the folder of a run or of a converted checkpoint; for random weights use "
            "mdm train with finetuning.enabled=true."
        )
    _run(resolved, Dry(dry_run, full, probe))


def _run(config: Config, dry: Dry) -> None:
    if (dry.full or dry.probe) and not dry.run:
        raise ConfigError("--full and --probe belong to --dry-run: add it.")
    # Before anything looks for GPUs. It imports torch, and so comes after the config is checked.
    from megatron_mdm.distributed.processes import order_kernels

    order_kernels(config.parallel.tensor_model_parallel_size)
    # On a machine with a GPU, too, a run on the CPU is one for DeepSpeed.
    quiet_engines(use_cpu=True if config.run.device == "cpu" else None)
    if not dry.run:
        config = adapt_to_restart(config)
        # After the config is checked: importing the engines takes seconds.
        from megatron_mdm.training.launch import train

        train(config)
    elif os.environ.get("RANK", "0") == "0":
        from megatron_mdm.training.description import describe
        from megatron_mdm.training.summary import probe_step_seconds, summarize

        seconds = probe_step_seconds(config) if dry.probe else None
        print(summarize(config, seconds))  # noqa: T201 - what a dry run is for
        if dry.full:
            print(f"\n{describe(config)}")  # noqa: T201
