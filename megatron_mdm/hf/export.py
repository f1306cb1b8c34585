"""Writes a trained model as a Hugging Face folder that loads without this package."""

from __future__ import annotations

import filecmp
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_mdm.errors import ConversionError
from megatron_mdm.hf.names import Architecture, hf_shapes, to_hf, training_names

_HF_FOLDER = Path(__file__).resolve().parent
_CODE_FILES = (
    _HF_FOLDER / "configuration_mdm.py",
    _HF_FOLDER / "modeling_mdm.py",
    _HF_FOLDER.parent / "diffusion" / "samplers.py",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class WeightSource(Protocol):
    """A training checkpoint as full, unsharded tensors in Megatron's layout."""

    def names(self) -> list[str]:
        """Lists the names of all parameters."""
        ...

    def load(self, name: str) -> Tensor:
        """Loads one parameter."""
        ...


@dataclass(frozen=True)
class ExportResult:
    """What an export left on disk.

    Args:
        path: The folder.
        reused: True if the folder was there already with identical content.
        num_parameters: Number of exported parameters; a tied output layer counts once.
        num_shards: Number of safetensors files.
    """

    path: Path
    reused: bool
    num_parameters: int
    num_shards: int


def export_to_hf(
    source: WeightSource,
    arch: Architecture,
    output: Path,
    *,
    tokenizer_dir: Path | None,
    eos_token_id: int | None,
    metadata: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> ExportResult:
    """Writes weights, configuration, model code, tokenizer and model card.

    The folder appears whole or not at all: it is written next to its place and then renamed. At
    most one shard of weights is in memory at a time.

    Args:
        source: The training checkpoint.
        arch: The model's sizes.
        output: Folder to write.
        tokenizer_dir: Folder with the tokenizer.json to copy; None: the export has no tokenizer.
        eos_token_id: Id that ends a document, if any.
        metadata: Facts of the training run, JSON values. Put no clock time in it, or a repeated
            export is not recognised as identical.
        dtype: Floating-point type of the exported weights.
        overwrite: Replace an existing export that differs.
        max_shard_bytes: Most bytes of weights per file; a single parameter may exceed it.

    Returns:
        The folder and whether it was there already.

    Raises:
        ConversionError: The checkpoint does not fit the architecture, the tokenizer is missing,
            or `output` exists and differs.
    """
    _check_names(source, arch)
    files = _tokenizer_files(tokenizer_dir)
    shards = _plan_shards(arch, dtype, max_shard_bytes)
    output = output.absolute()
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        num_parameters = _write_weights(source, arch, partial, shards, dtype)
        _write_json(partial / "config.json", _config(arch, eos_token_id, dtype))
        _write_json(partial / "training_metadata.json", dict(metadata))
        card = _model_card(output.name, arch, num_parameters, tokenizer_dir is not None)
        (partial / "README.md").write_text(card, encoding="utf-8")
        for file in (*_CODE_FILES, *files):
            shutil.copyfile(file, partial / file.name)
        reused = _put_in_place(partial, output, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportResult(output, reused, num_parameters, len(shards))


def _check_names(source: WeightSource, arch: Architecture) -> None:
    """Refuses missing parameters, and extra ones too: they would be dropped in silence."""
    expected, found = set(training_names(arch)), set(source.names())
    for kind, names in (("lacks", expected - found), ("has the extra", found - expected)):
        if names:
            raise ConversionError(
                f"The checkpoint {kind} parameter {min(names)} ({len(names)} such in all): export "
                "it with the configuration it was trained with."
            )


def _tokenizer_files(tokenizer_dir: Path | None) -> list[Path]:
    if tokenizer_dir is None:
        return []
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise ConversionError(
            f"The tokenizer folder {tokenizer_dir} has no tokenizer.json: give the folder of a "
            "Hugging Face fast tokenizer."
        )
    return [tokenizer_dir / name for name in _TOKENIZER_FILES if (tokenizer_dir / name).is_file()]


def _plan_shards(arch: Architecture, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Groups the training names into shards, in order, from shapes alone."""
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name in training_names(arch):
        num_elements = sum(math.prod(shape) for _, shape in hf_shapes(name, arch))
        if shards[-1] and filled_bytes + num_elements * dtype.itemsize > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += num_elements * dtype.itemsize
    return shards


def _write_weights(
    source: WeightSource,
    arch: Architecture,
    folder: Path,
    shards: list[list[str]],
    dtype: torch.dtype,
) -> int:
    """Writes the safetensors files and, for more than one, their index.

    Returns:
        Number of parameters written.
    """
    weight_map: dict[str, str] = {}
    num_parameters = 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            for hf_name, tensor in to_hf(name, source.load(name).detach(), arch):
                # A clone, because safetensors refuses views that share a storage.
                tensors[hf_name] = tensor.to(device="cpu", dtype=dtype).contiguous().clone()
                weight_map[hf_name] = file
                num_parameters += tensor.numel()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = {"total_size": num_parameters * dtype.itemsize}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    return num_parameters


def _config(arch: Architecture, eos_token_id: int | None, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "megatron_mdm",
        "architectures": ["MdmForMaskedLM"],
        "auto_map": {
            "AutoConfig": "configuration_mdm.MdmConfig",
            "AutoModel": "modeling_mdm.MdmForMaskedLM",
            "AutoModelForMaskedLM": "modeling_mdm.MdmForMaskedLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": arch.vocab_size,
        "mask_token_id": arch.mask_token_id,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.ffn_hidden_size,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_theta": arch.rotary_base,
        "max_position_embeddings": arch.max_position_embeddings,
        "tie_word_embeddings": arch.tied,
        "is_causal": arch.is_causal,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }


def _model_card(title: str, arch: Architecture, num_parameters: int, has_tokenizer: bool) -> str:
    kind = "autoregressive" if arch.is_causal else "masked-diffusion"
    usage = [
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        f'model = AutoModelForMaskedLM.from_pretrained("{title}", trust_remote_code=True)',
    ]
    if has_tokenizer:
        usage += [
            f'tokenizer = AutoTokenizer.from_pretrained("{title}", trust_remote_code=True)',
            'prompt = tokenizer("Once upon a time", add_special_tokens=False, return_tensors="pt")',
            "tokens = model.generate(prompt.input_ids, max_new_tokens=64, temperature=0.7, seed=1)",
            "print(tokenizer.decode(tokens[0]))",
        ]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [masked-diffusion]",
        "---",
        f"# {title}",
        "",
        f"A {kind} language model with {num_parameters:,} parameters ({arch.num_layers} layers, "
        f"width {arch.hidden_size}, {arch.num_attention_heads} heads, vocabulary "
        f"{arch.vocab_size}), trained on sequences of {arch.max_position_embeddings} tokens. "
        "`training_metadata.json` records the run.",
        "",
        "```python",
        *usage,
        "```",
        "",
    ]
    if not arch.is_causal:
        lines += [
            f"The mask token is {arch.mask_token_id}. `model.infill(input_ids)` fills every mask "
            "token of a sequence, wherever it stands.",
            "",
        ]
    return "\n".join(lines)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put_in_place(partial: Path, output: Path, overwrite: bool) -> bool:
    """Renames the finished folder to its place.

    Returns:
        True if the place already holds the same content.
    """
    if not output.exists():
        partial.rename(output)
        return False
    if _same_content(partial, output):
        return True
    if not overwrite:
        raise ConversionError(
            f"{output} exists and differs from this export: pass --overwrite to replace it or "
            "choose another folder."
        )
    if not (output / "config.json").is_file():
        raise ConversionError(
            f"{output} is no model folder (it has no config.json) and is not replaced: choose "
            "another folder."
        )
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced)
    return False


def _same_content(left: Path, right: Path) -> bool:
    if not right.is_dir():
        return False
    names = {path.name for path in left.iterdir()}
    if names != {path.name for path in right.iterdir()} - {"__pycache__"}:
        return False
    return not any(filecmp.cmpfiles(left, right, list(names), shallow=False)[1:])
