"""Pre-trains a model from a YAML config: alone, under torchrun, deepspeed or srun."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.config import load_config
from megatron_mdm.errors import run_entry_point


def parse_arguments(description: str) -> argparse.Namespace:
    """Reads the command line.

    Args:
        description: First line of the help.

    Returns:
        The config's path, the overrides, and whether to start nothing.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="describe the run, start nothing")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override any field"
    )
    return parser.parse_intermixed_args()


def main() -> None:
    """Runs or describes the training."""
    arguments = parse_arguments(__doc__ or "")
    config = load_config(arguments.config, arguments.overrides)
    # After the config is checked: the engines take seconds to import, and warn of what is optional.
    if "PYTHONWARNINGS" not in os.environ:
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from megatron_mdm.training.launch import describe, train

    if arguments.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(describe(config))
    else:
        train(config)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
