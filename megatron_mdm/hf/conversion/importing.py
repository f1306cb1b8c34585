"""A model of another format as a checkpoint that a run begins with, or as an export of ours."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from megatron_mdm import __version__
from megatron_mdm.checkpoint.weights import write_weights_checkpoint
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.command_line import format_command
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.diffusion.interpolating import describe_process
from megatron_mdm.hf.card import TrainingFacts
from megatron_mdm.hf.export import ExportResult, export_to_hf
from megatron_mdm.hf.formats.foreign import ForeignModel
from megatron_mdm.hf.formats.foreign_configs import AUTOREGRESSIVE
from megatron_mdm.hf.formats.tensor_files import read_json
from megatron_mdm.model.parameters import find_parameter_shape


def find_autoregressive_format(path: Path) -> str:
    """Which of the formats of autoregressive models a folder has.

    Args:
        path: A folder with config.json, or a .safetensors file beside one.

    Returns:
        The format's name, for `open_foreign`.

    Raises:
        ConversionError: There is no config.json, or it names a model that cannot be converted.
    """
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        raise ConversionError(f"{config} is missing: give the folder of a transformers model.")
    model_type = read_json(config).get("model_type")
    if model_type not in AUTOREGRESSIVE:
        raise ConversionError(
            f"{config} says model_type={model_type!r}, which cannot be converted: use a model of "
            f"the types {', '.join(AUTOREGRESSIVE)}."
        )
    return str(model_type)


def import_to_checkpoint(
    source: ForeignModel,
    output: Path,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    overwrite: bool = False,
) -> Path:
    """Writes a model of another format as a checkpoint of weights alone.

    Args:
        source: The model.
        output: A `checkpoints` folder of its own.
        tensor_parallel_size: Ranks per layer.
        pipeline_parallel_size: Pipeline stages.
        overwrite: Replace what an earlier import left there.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The output is taken or cannot be written.
        ConfigError: The model cannot be divided so.
    """
    model = source.saved.model
    return write_weights_checkpoint(
        source,
        {name: find_parameter_shape(name, model) for name in source.list_names()},
        output,
        model=model,
        kind="ar" if source.saved.is_causal else "mdm",
        seq_length=source.saved.seq_length,
        noise=source.saved.noise,
        run_ways=source.saved.run_ways,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        versions=_list_versions(),
        overwrite=overwrite,
    )


def import_to_export(
    source: ForeignModel,
    output: Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Writes a model of another format as an export of ours, with its tokenizer.

    Args:
        source: The model.
        output: Folder to write.
        name: What the card calls the source; None: the name of its folder or file.
        dtype: Dtype of the weights; None: that of the source.
        overwrite: Replace an export that differs.

    Returns:
        What was written, or found to be there already.

    Raises:
        ConversionError: The output exists and differs, or cannot be written.
    """
    origin = f"Its weights were converted from a model of the format {source.format_name}"
    facts = TrainingFacts(
        f"{origin}, {name or source.path.name}.",
        versions=_list_versions(),
        gaps=["What it was trained on, and how, the converted files do not say."],
    )
    return export_to_hf(
        source,
        source.saved,
        output,
        tokenizer_dir=source.tokenizer_dir,
        eos_token_id=source.eos_token_id,
        metadata={"imported_from": source.format_name, "versions": _list_versions()},
        facts=facts,
        dtype=dtype or source.dtype,
        overwrite=overwrite,
    )


def format_training_command(checkpoint: Path, source: ForeignModel) -> str:
    """The command of a run that begins with imported weights.

    Args:
        checkpoint: What `import_to_checkpoint` wrote.
        source: The model.

    Returns:
        A line for a shell, in which RUN.yaml stands for the run's own recipe.
    """
    kind = ["objective.kind=ar"] if source.saved.is_causal else []
    noise = source.saved.noise
    process = {} if noise is None else describe_process(noise)
    settings = [f"objective.process.{name}={value}" for name, value in process.items()]
    words = ["train", "--config", "RUN.yaml", f"run.initial_weights={checkpoint}", *kind, *settings]
    return format_command(*words, *_list_overrides(source.saved.model))


def _list_overrides(model: ModelConfig) -> list[str]:
    defaults = {name: field.default for name, field in ModelConfig.model_fields.items()}
    changed = {
        name: value
        for name, value in model.model_dump(mode="json").items()
        if value != defaults[name] and name != "preset"
    }
    return [
        f"model.{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in changed.items()
    ]


def _list_versions() -> dict[str, str]:
    names = ("torch", "safetensors", "transformers")
    return {"megatron_mdm": __version__, **{name: version(name) for name in names}}
