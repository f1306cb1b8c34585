"""`mdm convert`: each subcommand yields the lines that a user reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.inspection import describe_checkpoint
from megatron_mdm.checkpoint.manifest import RAW
from megatron_mdm.checkpoint.reshape import reshard_checkpoint
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.command_line import format_command
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.core.options import FLATTENED, make_app
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.diffusion.interpolating import describe_process
from megatron_mdm.hf.conversion.importing import (
    find_autoregressive_format,
    format_training_command,
    import_to_checkpoint,
    import_to_export,
)
from megatron_mdm.hf.formats.foreign import ForeignModel, open_foreign
from megatron_mdm.hf.from_run import export_run, find_checkpoint_to_export
from megatron_mdm.hf.hub import check_upload, locate_model, upload_model

if TYPE_CHECKING:
    from megatron_mdm.hf.conversion.check import LogitCheck

Dtype = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What becomes of an imported model.

    Attributes:
        output: The folder to write.
        to: A checkpoint to train from, or an export.
        dtype: Dtype of --to hf; by default that of the input.
        overwrite: Replace what an earlier import wrote.
        check: Compare the logits of both afterwards.
        tensor_parallel: Ranks that share a layer.
        pipeline_parallel: Pipeline stages.
    """

    output: Path
    to: Literal["checkpoint", "hf"] = "checkpoint"
    dtype: Dtype | None = None
    overwrite: bool = False
    check: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        """Refuses options of the other kind of output."""
        if self.to == "checkpoint" and self.dtype is not None:
            raise ConversionError(
                f"--dtype={self.dtype} is for --to hf, and a checkpoint holds float32: leave it "
                "out."
            )
        if self.to == "hf" and (self.tensor_parallel, self.pipeline_parallel) != (1, 1):
            raise ConversionError(
                "--tensor-parallel and --pipeline-parallel are for --to checkpoint, and an export "
                "is not divided: leave them out."
            )


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class PaddedImportOptions(ImportOptions):
    """The same for models that may have rows in the vocabulary that stand for no token.

    Attributes:
        vocab_size: Ids that it may predict, up to all its rows; by default those of its
            tokenizer.json.
    """

    vocab_size: int | None = None


def to_hf(
    *,
    run: Path,
    output: Path,
    step: int | None = None,
    weights: str = RAW,
    dtype: Dtype = "fp32",
    tokenizer: str | None = None,
    overwrite: bool = False,
    check: bool = False,
    push: str | None = None,
    public: bool = False,
) -> Iterator[str]:
    """Writes a Hugging Face folder from a run.

    Args:
        run: The folder of a run or of a checkpoint.
        output: The folder to write.
        step: The checkpoint to take; by default the latest.
        weights: The weights as trained (raw), or the name of an average that the checkpoint holds.
        dtype: Dtype of the weights.
        tokenizer: Folder or name of the tokenizer; by default the run's.
        overwrite: Replace an export that differs.
        check: Compare the logits of both afterwards.
        push: Upload it to the hub, as OWNER/NAME.
        public: With --push: anyone may see a repository that is made.
    """
    if push is not None:
        check_upload(push)
    elif public:
        raise ConversionError("--public is for --push: name the repository, or leave it out.")
    result = export_run(
        run,
        output,
        step=step,
        weights=weights,
        dtype=_DTYPES[dtype],
        tokenizer=tokenizer,
        overwrite=overwrite,
    )
    verb = "reusing" if result.reused else "wrote"
    yield f"{verb} {result.path}: {result.num_parameters:,} parameters"
    yield from (f"note: {remark}" for remark in result.remarks)
    if check:
        quiet_engines()
        # It builds the training model, which takes seconds to import.
        from megatron_mdm.hf.conversion.check import check_export

        yield _require_agreement(
            check_export(find_checkpoint_to_export(run, step), result.path, weights=weights),
            result.path,
        )
    if push is not None:
        yield f"uploaded to {upload_model(result.path, push, is_public=public)}"


def push_folder(folder: Path, name: str, /, *, public: bool = False) -> Iterator[str]:
    """Uploads an export, or adapters, to the hub.

    Args:
        folder: The folder.
        name: OWNER/NAME of the repository; it is made if it is not there.
        public: Anyone may see a repository that is made.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ConversionError(
            f"{folder} holds neither config.json nor adapter_config.json: give the folder of an "
            "export, or of adapters."
        )
    check_upload(name)
    yield f"uploaded to {upload_model(folder, name, is_public=public)}"


def from_hf(input: Path, /, *, options: ImportOptions) -> Iterator[str]:
    """Reads an export of ours.

    Args:
        input: The folder of the model, its .safetensors file, or OWNER/NAME[@REVISION] of the hub.
        options: What becomes of it.
    """
    found = locate_model(input)
    return _import(open_foreign("hf", found.path), options, name=found.name)


def from_smdm(
    input: Path, /, *, options: ImportOptions, preset: str | None = None
) -> Iterator[str]:
    """Reads a published model of the SMDM family.

    Args:
        input: The folder of the model, its .safetensors file, or OWNER/NAME[@REVISION] of the hub.
        options: What becomes of it.
        preset: Its sizes, such as smdm-1028M, where the file leaves them open.
    """
    found = locate_model(input)
    return _import(open_foreign("smdm", found.path, preset=preset), options, name=found.name)


def from_llada(
    input: Path, /, *, options: PaddedImportOptions, trust_remote_code: bool = False
) -> Iterator[str]:
    """Reads a published LLaDA model.

    Args:
        input: The folder of the model, its .safetensors file, or OWNER/NAME[@REVISION] of the hub.
        options: What becomes of it.
        trust_remote_code: Let --check run the code in the input's folder.
    """
    found = locate_model(input, with_code=trust_remote_code)
    source = open_foreign("llada", found.path, vocab_size=options.vocab_size)
    return _import(source, options, name=found.name, trust_remote_code=trust_remote_code)


def from_gidd(input: Path, /, *, options: ImportOptions) -> Iterator[str]:
    """Reads a published GIDD model, of masked, hybrid or uniform noise.

    Args:
        input: The folder of the model, its .safetensors file, or OWNER/NAME[@REVISION] of the hub.
        options: What becomes of it.
    """
    found = locate_model(input)
    return _import(open_foreign("gidd", found.path), options, name=found.name)


def from_ar(
    input: Path, /, *, options: PaddedImportOptions, keep_causal: bool = False
) -> Iterator[str]:
    """Reads a Llama, Qwen2 or Qwen3 model, to go on as masked diffusion.

    Args:
        input: The folder of the model, its .safetensors file, or OWNER/NAME[@REVISION] of the hub.
        options: What becomes of it.
        keep_causal: Go on as an autoregressive model.
    """
    path, name = locate_model(input)
    source = open_foreign(
        find_autoregressive_format(path),
        path,
        vocab_size=options.vocab_size,
        keep_causal=keep_causal,
    )
    return _import(source, options, name=name)


def inspect(path: Path, /) -> Iterator[str]:
    """Says what a checkpoint holds, and checks every byte of it.

    Args:
        path: The folder of the checkpoint.
    """
    yield describe_checkpoint(path)
    manifest = verify_checkpoint(path)
    yield f"\nwhole: {len(manifest.files)} files have the sizes and checksums of their manifest"


def reshape(
    *, checkpoint: Path, output: Path, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> Iterator[str]:
    """Divides a checkpoint over other ranks.

    Args:
        checkpoint: The folder of the checkpoint.
        output: The checkpoints folder to write.
        tensor_parallel: Ranks that share a layer.
        pipeline_parallel: Pipeline stages.
    """
    path = reshard_checkpoint(
        checkpoint,
        output,
        tensor_parallel_size=tensor_parallel,
        pipeline_parallel_size=pipeline_parallel,
    )
    yield (
        f"wrote {path} for {tensor_parallel} tensor-parallel ranks and {pipeline_parallel} "
        "pipeline stages"
    )


COMMANDS: dict[str, Callable[..., Iterator[str]]] = {
    "to-hf": to_hf,
    "from-hf": from_hf,
    "from-smdm": from_smdm,
    "from-llada": from_llada,
    "from-gidd": from_gidd,
    "from-ar": from_ar,
    "inspect": inspect,
    "reshape": reshape,
    "push": push_folder,
}


def _print_lines(lines: Iterable[str] | None) -> None:
    # One by one: some come after minutes.
    for line in lines or ():
        print(line, flush=True)  # noqa: T201 - what a user reads


app = make_app(
    COMMANDS,
    "Converts checkpoints: to and from Hugging Face, from other projects, and between layouts.",
    name="convert",
    examples=(
        "mdm convert to-hf --run runs/a --output runs/a/hf",
        "mdm convert reshape --checkpoint runs/a/checkpoints/step_00001000 --output reshaped "
        "--tensor-parallel 2",
    ),
    finish=_print_lines,
)


def _import(
    source: ForeignModel, options: ImportOptions, *, name: str, trust_remote_code: bool = False
) -> Iterator[str]:
    """Writes a model of another format as a checkpoint or an export."""
    saved, overwrite = source.saved, options.overwrite
    if options.to == "hf":
        dtype = None if options.dtype is None else _DTYPES[options.dtype]
        written = import_to_export(
            source, options.output, name=name, dtype=dtype, overwrite=overwrite
        )
        path, verb = written.path, "reusing" if written.reused else "wrote"
        yield from (f"note: {remark}" for remark in written.remarks)
        following = format_command("generate", "--model", path, "--prompt", "TEXT")
    else:
        path = import_to_checkpoint(
            source,
            options.output,
            tensor_parallel_size=options.tensor_parallel,
            pipeline_parallel_size=options.pipeline_parallel,
            overwrite=overwrite,
        )
        verb, following = "wrote", format_training_command(path, source)
    kind = "autoregressive" if saved.is_causal else "masked-diffusion"
    if saved.noise is not None:
        kind = f"{describe_process(saved.noise)['kind']}-diffusion"
    yield (
        f"{verb} {path}: a {kind} model of {saved.model.num_layers} layers and width "
        f"{saved.model.hidden_size}, vocabulary {_describe_vocabulary(saved.model)}"
    )
    if options.check:
        quiet_engines()
        from megatron_mdm.hf.conversion.check import check_import

        yield _require_agreement(
            check_import(source, path, trust_remote_code=trust_remote_code), path
        )
    yield f"next: {following}"


def _describe_vocabulary(model: ModelConfig) -> str:
    rows = model.vocabulary_rows
    return f"{model.vocab_size}" + (f" of {rows} rows" if rows > model.vocab_size else "")


def _require_agreement(check: LogitCheck, path: Path) -> str:
    if not check.passed:
        raise ConversionError(
            f"{path} was written but --check refuses it, since its logits differ from those of "
            f"{check.left} by {check.relative:.2e} of their standard deviation where rounding "
            f"explains {check.tolerance:.0e}: do not use it."
        )
    return check.describe()
