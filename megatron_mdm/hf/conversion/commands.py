"""The subcommands of `tools/convert_checkpoint.py`: each yields the lines that a user reads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_mdm.checkpoint.choosing import verify_checkpoint
from megatron_mdm.checkpoint.inspection import describe_checkpoint
from megatron_mdm.checkpoint.reshape import reshape_checkpoint
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.hf.conversion.importing import (
    autoregressive_format,
    import_to_checkpoint,
    import_to_export,
    training_command,
)
from megatron_mdm.hf.formats.foreign import ForeignModel, open_foreign
from megatron_mdm.hf.from_run import checkpoint_to_export, export_run

if TYPE_CHECKING:
    from megatron_mdm.hf.conversion.check import LogitCheck

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_IMPORTS = {
    "from-hf": "read an export of ours",
    "from-smdm": "read a published model of the SMDM family",
    "from-llada": "read a published LLaDA model",
    "from-ar": "read a Llama, Qwen2 or Qwen3 model, to go on as masked diffusion",
}


def add_subcommands(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands; the chosen one's function becomes `run`.

    Args:
        parser: The tool's parser.
    """
    commands = parser.add_subparsers(dest="command", required=True)
    _add_export(commands.add_parser("to-hf", help="write a Hugging Face folder from a run"))
    for name, text in _IMPORTS.items():
        _add_import(commands.add_parser(name, help=text), name)
    inspected = commands.add_parser("inspect", help="say what a checkpoint holds; is it whole?")
    inspected.add_argument("path", type=Path, help="folder of the checkpoint")
    inspected.set_defaults(run=inspect)
    reshaped = commands.add_parser("reshape", help="divide a checkpoint over other ranks")
    reshaped.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    reshaped.add_argument("--output", type=Path, required=True, help="checkpoints folder to write")
    _add_layout(reshaped)
    reshaped.set_defaults(run=reshape)


def export(arguments: argparse.Namespace) -> Iterator[str]:
    """Writes a Hugging Face folder from a checkpoint."""
    result = export_run(
        arguments.run_dir,
        arguments.output,
        step=arguments.step,
        dtype=DTYPES[arguments.dtype],
        tokenizer=arguments.tokenizer,
        overwrite=arguments.overwrite,
    )
    verb = "reusing" if result.reused else "wrote"
    yield f"{verb} {result.path}: {result.num_parameters:,} parameters"
    yield from (f"note: {remark}" for remark in result.remarks)
    if arguments.check:
        quiet_engines()
        # It builds the training model, which takes seconds to import.
        from megatron_mdm.hf.conversion.check import check_export

        checkpoint = checkpoint_to_export(arguments.run_dir, arguments.step)
        yield _checked(check_export(checkpoint, result.path), result.path)


def import_model(arguments: argparse.Namespace) -> Iterator[str]:
    """Reads a model of another format and writes it as a checkpoint or an export."""
    source = _open(arguments)
    if arguments.to == "hf":
        written = import_to_export(
            source,
            arguments.output,
            dtype=DTYPES.get(arguments.dtype),
            overwrite=arguments.overwrite,
        )
        path, verb = written.path, "reusing" if written.reused else "wrote"
        yield from (f"note: {remark}" for remark in written.remarks)
        following = f"python tools/generate.py --model {path} --prompt TEXT"
    else:
        path = import_to_checkpoint(
            source,
            arguments.output,
            tensor_parallel_size=arguments.tensor_parallel,
            pipeline_parallel_size=arguments.pipeline_parallel,
            overwrite=arguments.overwrite,
        )
        verb, following = "wrote", training_command(path, source)
    model = source.saved.model
    kind = "autoregressive" if source.saved.is_causal else "masked-diffusion"
    yield (
        f"{verb} {path}: a {kind} model of {model.num_layers} layers and width "
        f"{model.hidden_size}, vocabulary {_vocabulary(model)}"
    )
    if arguments.check:
        quiet_engines()
        from megatron_mdm.hf.conversion.check import check_import

        trust = arguments.trust_remote_code
        yield _checked(check_import(source, path, trust_remote_code=trust), path)
    yield f"next: {following}"


def inspect(arguments: argparse.Namespace) -> Iterator[str]:
    """Describes a checkpoint and checks every byte of it."""
    yield describe_checkpoint(arguments.path)
    manifest = verify_checkpoint(arguments.path)
    yield f"\nwhole: {len(manifest.files)} files have the sizes and checksums of their manifest"


def reshape(arguments: argparse.Namespace) -> Iterator[str]:
    """Writes a checkpoint for another division of ranks."""
    tensor, pipeline = arguments.tensor_parallel, arguments.pipeline_parallel
    path = reshape_checkpoint(
        arguments.checkpoint,
        arguments.output,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
    )
    yield f"wrote {path} for {tensor} tensor-parallel ranks and {pipeline} pipeline stages"


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", dest="run_dir", type=Path, required=True, help="folder of a run or a checkpoint")
    add("--output", type=Path, required=True, help="folder to write")
    add("--step", type=int, help="checkpoint to take; default: the latest")
    add("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights (fp32)")
    add("--tokenizer", help="folder or name of the tokenizer; default: the run's")
    add("--overwrite", action="store_true", help="replace an export that differs")
    add("--check", action="store_true", help="compare the logits of both afterwards")
    parser.set_defaults(run=export)


def _add_import(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("input", type=Path, help="folder of the model, or its .safetensors file")
    add("--output", type=Path, required=True, help="folder to write")
    add("--to", choices=("checkpoint", "hf"), default="checkpoint", help="(checkpoint)")
    add("--dtype", choices=DTYPES, help="dtype of --to hf; default: that of the input")
    add("--overwrite", action="store_true", help="replace what an earlier import wrote")
    add("--check", action="store_true", help="compare the logits of both afterwards")
    _add_layout(parser)
    parser.set_defaults(run=import_model, preset=None, keep_causal=False, trust_remote_code=False)
    parser.set_defaults(vocab_size=None)
    if name in ("from-ar", "from-llada"):
        text = "ids that the model may predict, up to all its rows (those of its tokenizer.json)"
        add("--vocab-size", type=int, help=text)
    if name == "from-smdm":
        add("--preset", help="sizes, such as smdm-1028M, where the file leaves them open")
    elif name == "from-ar":
        add("--keep-causal", action="store_true", help="go on as an autoregressive model")
    elif name == "from-llada":
        text = "let --check run the code in the input's folder"
        add("--trust-remote-code", action="store_true", help=text)


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks a layer (1)")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="stages (1)")


def _open(arguments: argparse.Namespace) -> ForeignModel:
    if arguments.to == "checkpoint" and arguments.dtype is not None:
        raise ConversionError(
            f"--dtype={arguments.dtype} is for --to hf, and a checkpoint holds float32: leave it "
            "out."
        )
    layout = (arguments.tensor_parallel, arguments.pipeline_parallel)
    if arguments.to == "hf" and layout != (1, 1):
        raise ConversionError(
            "--tensor-parallel and --pipeline-parallel are for --to checkpoint, and an export is "
            "not divided: leave them out."
        )
    name = arguments.command.removeprefix("from-")
    if name == "ar":
        name = autoregressive_format(arguments.input)
    return open_foreign(
        name,
        arguments.input,
        preset=arguments.preset,
        keep_causal=arguments.keep_causal,
        vocab_size=arguments.vocab_size,
    )


def _vocabulary(model: ModelConfig) -> str:
    rows = model.vocabulary_rows
    return f"{model.vocab_size}" + (f" of {rows} rows" if rows > model.vocab_size else "")


def _checked(check: LogitCheck, path: Path) -> str:
    if not check.passed:
        raise ConversionError(
            f"{path} was written but --check refuses it, since its logits differ from those of "
            f"{check.left} by {check.relative:.2e} of their standard deviation where rounding "
            f"explains {check.tolerance:.0e}: do not use it."
        )
    return check.describe()
