"""Exports checkpoints to Hugging Face's format, inspects them, and divides them anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.checkpoint.choosing import verify_checkpoint
from megatron_mdm.checkpoint.inspection import describe_checkpoint
from megatron_mdm.checkpoint.reshape import reshape_checkpoint
from megatron_mdm.errors import run_entry_point
from megatron_mdm.hf.from_run import export_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line.

    Returns:
        The subcommand's arguments, and its function as `run`.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="write a Hugging Face folder from a run")
    to_hf.add_argument("--run", dest="run_dir", type=Path, required=True, help="folder of the run")
    to_hf.add_argument("--output", type=Path, required=True, help="folder to write")
    to_hf.add_argument("--step", type=int, help="checkpoint to take; default: the latest")
    to_hf.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights")
    to_hf.add_argument("--overwrite", action="store_true", help="replace an export that differs")
    to_hf.set_defaults(run=export)
    inspected = commands.add_parser("inspect", help="say what a checkpoint holds; is it whole?")
    inspected.add_argument("path", type=Path, help="folder of the checkpoint")
    inspected.set_defaults(run=inspect)
    reshaped = commands.add_parser("reshape", help="divide a checkpoint over other ranks")
    reshaped.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    reshaped.add_argument("--output", type=Path, required=True, help="checkpoints folder to write")
    reshaped.add_argument("--tensor-parallel", type=int, default=1, help="ranks a layer (1)")
    reshaped.add_argument("--pipeline-parallel", type=int, default=1, help="stages (1)")
    reshaped.set_defaults(run=reshape)
    return parser.parse_args()


def export(arguments: argparse.Namespace) -> None:
    """Writes a Hugging Face folder."""
    options = {"step": arguments.step, "overwrite": arguments.overwrite}
    dtype = DTYPES[arguments.dtype]
    result = export_run(arguments.run_dir, arguments.output, dtype=dtype, **options)
    verb = "reusing" if result.reused else "wrote"
    print(f"{verb} {result.path}: {result.num_parameters:,} parameters")


def inspect(arguments: argparse.Namespace) -> None:
    """Describes a checkpoint and checks every byte of it."""
    print(describe_checkpoint(arguments.path), flush=True)
    manifest = verify_checkpoint(arguments.path)
    print(f"\nwhole: {len(manifest.files)} files have the sizes and checksums of their manifest")


def reshape(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint for another division of ranks."""
    tensor, pipeline = arguments.tensor_parallel, arguments.pipeline_parallel
    path = reshape_checkpoint(
        arguments.checkpoint,
        arguments.output,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
    )
    print(f"wrote {path} for {tensor} tensor-parallel ranks and {pipeline} pipeline stages")


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(run_entry_point(lambda: arguments.run(arguments)))
