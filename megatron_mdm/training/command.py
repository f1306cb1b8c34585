"""The command line of the pre-training scripts."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_mdm.config import load_config


def run_pretraining(description: str, overrides: Sequence[str] = ()) -> None:
    """Reads the command line, then trains or describes the run.

    Args:
        description: First line of the help.
        overrides: `section.key=value` strings, applied before those of the command line.

    Raises:
        MdmError: Something about the run does not fit; raised before any worker starts.
    """
    arguments = _parse_arguments(description)
    config = load_config(arguments.config, [*overrides, *arguments.overrides])
    _quiet_engines()
    # After the config is checked: importing the engines takes seconds.
    from megatron_mdm.training.launch import describe, train

    if not arguments.dry_run:
        train(config)
    elif os.environ.get("RANK", "0") == "0":
        print(describe(config))  # noqa: T201 - what a dry run is for


def _parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="describe the run, start nothing")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override any field"
    )
    return parser.parse_intermixed_args()


def _quiet_engines() -> None:
    if "PYTHONWARNINGS" not in os.environ:
        # Megatron-Core warns of every optional package that is not there.
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
        # DeepSpeed calls collectives by names that newer versions of PyTorch deprecate.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
