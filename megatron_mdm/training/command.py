"""The commands that train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from megatron_mdm.config import Config, load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.training.restarts import adapt_to_restart

# The deepspeed launcher passes it; the environment says the same.
_LocalRank = Annotated[int | None, Parameter(name="--local_rank", show=False)]


def pretrain(
    *overrides: str, config: Path, dry_run: bool = False, local_rank: _LocalRank = None
) -> None:
    """Trains a model, or describes the run.

    Args:
        overrides: Fields of the configuration, as section.key=value.
        config: YAML file, see configs/.
        dry_run: Describe the run, start nothing.
        local_rank: Not used.

    Raises:
        MdmError: Something about the run does not fit; raised before any worker starts.
    """
    del local_rank
    _run(load_config(config, overrides), dry_run)


def finetune(
    *overrides: str, config: Path, dry_run: bool = False, local_rank: _LocalRank = None
) -> None:
    """Fine-tunes a model, or describes the run.

    Args:
        overrides: Fields of the configuration, as section.key=value.
        config: YAML file, see configs/finetuning.
        dry_run: Describe the run, start nothing.
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
    _run(resolved, dry_run)


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
