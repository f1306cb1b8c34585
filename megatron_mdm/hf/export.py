"""Writes a trained model as a Hugging Face folder that loads without this package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.checkpoint.streaming import TensorFile, TensorInfo
from megatron_mdm.checkpoint.weights import WeightSource
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.card import TrainingFacts, format_model_card
from megatron_mdm.hf.formats.exported_config import MODEL_TYPE, list_exported_sizes
from megatron_mdm.hf.formats.translation import list_external_shapes, to_format
from megatron_mdm.hf.placing import open_whole_folder
from megatron_mdm.hf.tokenizer_files import TOKENIZER_CLASS, check_tokenizer_folder, write_tokenizer
from megatron_mdm.model.parameters import list_parameter_names

_PACKAGE = Path(__file__).resolve().parent.parent
# The Python files that travel with every export. They import each other and nothing of ours.
CODE_FILES = tuple(
    _PACKAGE / name
    for name in (
        "hf/configuration_mdm.py",
        "hf/modeling_mdm.py",
        "hf/attention_mdm.py",
        "hf/backbone_mdm.py",
        "hf/caching_mdm.py",
        "hf/generation_mdm.py",
        "diffusion/decoding.py",
        "diffusion/block_steps.py",
        "diffusion/interpolation.py",
        "diffusion/noise_sampler.py",
        "diffusion/sampler_state.py",
        "diffusion/samplers.py",
        "diffusion/time_features.py",
        "diffusion/token_choice.py",
    )
)
# config.json, the card, the code: little beside any model.
_OTHER_BYTES = 1_000_000


@dataclass(frozen=True)
class ExportResult:
    """What an export left on disk.

    Args:
        path: The folder.
        reused: True if the folder was there already with identical content.
        num_parameters: Number of exported parameters; a tied output layer counts once.
        num_shards: Number of safetensors files.
        remarks: Sentences that a user should know.
    """

    path: Path
    reused: bool
    num_parameters: int
    num_shards: int
    remarks: tuple[str, ...] = ()


def export_to_hf(
    source: WeightSource,
    saved: SavedModel,
    output: Path,
    *,
    tokenizer_dir: Path | None,
    eos_token_id: int | None,
    metadata: Mapping[str, Any],
    chat_template: str | None = None,
    facts: TrainingFacts | None = None,
    title: str | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> ExportResult:
    """Writes weights, configuration, model code, tokenizer and model card.

    The folder appears whole or not at all: it is written next to its place and then renamed. One
    parameter is in memory at a time.

    Args:
        source: The training checkpoint.
        saved: The model.
        output: Folder to write.
        tokenizer_dir: Folder with the tokenizer.json to copy; None: the export has no tokenizer.
        eos_token_id: Id that ends a document, if any.
        metadata: Facts of the training run, JSON values. Put no clock time in it, or a repeated
            export is not recognised as identical.
        chat_template: Jinja template that told conversations; None: the tokenizer's own, if any.
        facts: What the model card says besides the sizes; None: that nothing is known.
        title: Heading of the model card; None: the folder's name.
        dtype: Floating-point type of the exported weights.
        overwrite: Replace an existing export that differs.
        max_shard_bytes: Most bytes of weights per file; a single parameter may exceed it.

    Returns:
        The folder and whether it was there already.

    Raises:
        ConversionError: The checkpoint does not fit the model or the dtype, the tokenizer
            is missing, or `output` exists and differs or cannot be written.
    """
    _check_names(source, saved)
    if tokenizer_dir is not None:
        check_tokenizer_folder(tokenizer_dir)
    shards = _plan_shards(saved, dtype, max_shard_bytes)
    num_parameters = sum(info.num_bytes for shard in shards for info in shard) // dtype.itemsize
    facts = facts or TrainingFacts("Nothing is known of its training.")
    output, has_tokenizer = output.absolute(), tokenizer_dir is not None
    with open_whole_folder(output, overwrite=overwrite) as placing:
        partial = placing.partial
        _check_space(partial, num_parameters * dtype.itemsize)
        _write_weights(source, saved, partial, shards, dtype)
        write_model_code(partial, saved, eos_token_id, dtype, has_tokenizer=has_tokenizer)
        _write_json(partial / "training_metadata.json", dict(metadata))
        card = format_model_card(
            title or output.name,
            saved,
            num_parameters,
            facts,
            folder=output.name,
            has_tokenizer=has_tokenizer,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        remark = None
        if tokenizer_dir is not None:
            remark = write_tokenizer(
                tokenizer_dir,
                partial,
                mask_token_id=saved.model.mask_id,
                is_causal="mdm" not in saved.ways,
                chat_template=chat_template,
            )
    remarks = () if remark is None else (remark,)
    return ExportResult(output, placing.reused, num_parameters, len(shards), remarks)


def write_model_code(
    folder: Path,
    saved: SavedModel,
    eos_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    has_tokenizer: bool = False,
) -> None:
    """Writes what transformers builds a model from: config.json and the code, without weights.

    Args:
        folder: Where.
        saved: The model.
        eos_token_id: Id that ends a document, if any.
        dtype: Floating-point type of the weights.
        has_tokenizer: Will there be a tokenizer beside it?
    """
    config = _build_config(saved, eos_token_id, dtype, has_tokenizer=has_tokenizer)
    _write_json(folder / "config.json", config)
    for file in CODE_FILES:
        shutil.copyfile(file, folder / file.name)


def _check_names(source: WeightSource, saved: SavedModel) -> None:
    """Refuses missing parameters, and extra ones, which would be dropped silently."""
    expected, found = set(list_parameter_names(saved.model)), set(source.list_names())
    for kind, names in (("lacks", expected - found), ("has the extra", found - expected)):
        if names:
            raise ConversionError(
                f"The checkpoint {kind} parameter {min(names)} ({len(names)} such in all): export "
                "it with the configuration it was trained with."
            )


def _plan_shards(
    saved: SavedModel, dtype: torch.dtype, max_shard_bytes: int
) -> list[list[TensorInfo]]:
    """Groups the tensors into shards, in order, from shapes alone.

    The tensors of one training parameter may lie in two files.
    """
    shards: list[list[TensorInfo]] = [[]]
    filled_bytes = 0
    for name in list_parameter_names(saved.model):
        for hf_name, shape in list_external_shapes("hf", name, saved):
            info = TensorInfo(hf_name, dtype, shape)
            if shards[-1] and filled_bytes + info.num_bytes > max_shard_bytes:
                shards.append([])
                filled_bytes = 0
            shards[-1].append(info)
            filled_bytes += info.num_bytes
    return shards


def _write_weights(
    source: WeightSource,
    saved: SavedModel,
    folder: Path,
    shards: Sequence[Sequence[TensorInfo]],
    dtype: torch.dtype,
) -> None:
    """Writes the safetensors files and, for more than one, their index."""
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    tensors = _convert_tensors(source, saved, dtype)
    for file_name, infos in zip(names, shards, strict=True):
        file = TensorFile(folder / file_name, infos, {"format": "pt"}, has_digest=False)
        try:
            for _ in infos:
                # Not held in a variable, which would keep it while the next tensor is loaded.
                file.write(*next(tensors))
            file.finish()
        finally:
            file.close()
    if len(shards) > 1:
        weight_map = {
            info.name: file for file, infos in zip(names, shards, strict=True) for info in infos
        }
        total = {"total_size": sum(info.num_bytes for infos in shards for info in infos)}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _convert_tensors(
    source: WeightSource, saved: SavedModel, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name in list_parameter_names(saved.model):
        waiting = to_format("hf", name, source.load(name), saved)
        while waiting:
            hf_name, tensor = waiting.pop(0)
            yield hf_name, _convert(hf_name, tensor, dtype)
            del tensor


def _convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    result = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ConversionError(
            f"The parameter {name} holds numbers beyond the range of fp16 (largest magnitude "
            f"{tensor.abs().max().item():.4g}): export with --dtype bf16 or fp32."
        )
    return result


def _check_space(folder: Path, num_bytes: int) -> None:
    needed, free = num_bytes + _OTHER_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"{folder.parent} has {free:,} bytes free, less than the {needed:,} of this export: "
            "free some space or choose another disk."
        )


def _build_config(
    saved: SavedModel, eos_token_id: int | None, dtype: torch.dtype, *, has_tokenizer: bool
) -> dict[str, Any]:
    # The pipelines of transformers before version 5 need it to load the tokenizer.
    tokenizer = {"tokenizer_class": TOKENIZER_CLASS} if has_tokenizer else {}
    causal = {}
    if "ar" in saved.ways:
        causal = {"AutoModelForCausalLM": "modeling_mdm.MdmForCausalLM"}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MdmForCausalLM" if saved.is_causal else "MdmForMaskedLM"],
        "auto_map": {
            "AutoConfig": "configuration_mdm.MdmConfig",
            "AutoModel": "modeling_mdm.MdmForMaskedLM",
            "AutoModelForMaskedLM": "modeling_mdm.MdmForMaskedLM",
            **causal,
        },
        "dtype": str(dtype).removeprefix("torch."),
        **list_exported_sizes(saved),
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "unused_token_ids": None,
        **tokenizer,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
