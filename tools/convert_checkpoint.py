"""Converts checkpoints between the trainer's format and Hugging Face's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.errors import run_entry_point
from megatron_mdm.hf.from_run import export_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line.

    Returns:
        The subcommand's arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="write a Hugging Face folder from a run")
    to_hf.add_argument("--run", type=Path, required=True, help="folder of the run")
    to_hf.add_argument("--output", type=Path, required=True, help="folder to write")
    to_hf.add_argument("--step", type=int, help="checkpoint to take; default: the latest")
    to_hf.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights")
    to_hf.add_argument("--overwrite", action="store_true", help="replace an export that differs")
    return parser.parse_args()


def main() -> None:
    """Converts."""
    arguments = parse_arguments()
    result = export_run(
        arguments.run,
        arguments.output,
        step=arguments.step,
        dtype=DTYPES[arguments.dtype],
        overwrite=arguments.overwrite,
    )
    verb = "reusing" if result.reused else "wrote"
    print(f"{verb} {result.path}: {result.num_parameters:,} parameters")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
