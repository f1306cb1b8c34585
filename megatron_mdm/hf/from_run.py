"""A training run's checkpoint as an exported model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from megatron_mdm.checkpoint.storage import CheckpointReader, checkpoint_name, latest_checkpoint
from megatron_mdm.config import Config, config_from_dict
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.errors import CheckpointError
from megatron_mdm.hf.export import ExportResult, export_to_hf
from megatron_mdm.hf.names import Architecture


def export_run(
    run_dir: Path,
    output: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> ExportResult:
    """Exports a checkpoint of a run with its tokenizer.

    Args:
        run_dir: The run's folder.
        output: Folder to write.
        step: Checkpoint to take; None: the latest.
        dtype: Dtype of the exported weights.
        overwrite: Replace an export that differs.

    Returns:
        What was written, or found to be there already.

    Raises:
        CheckpointError: The run has no such checkpoint, or it is damaged.
        DataError: The tokenizer is gone.
        ConversionError: The output exists and differs.
    """
    folder = run_dir / "checkpoints"
    path = latest_checkpoint(folder) if step is None else folder / checkpoint_name(step)
    if path is None:
        raise CheckpointError(f"{folder} holds no checkpoint: give --run a run that saved one.")
    with CheckpointReader(path) as reader, tempfile.TemporaryDirectory() as scratch:
        config = config_from_dict(reader.manifest.config)
        manifest = _shard_manifest(config)
        return export_to_hf(
            reader,
            architecture(config),
            output,
            tokenizer_dir=_tokenizer_folder(config, manifest, Path(scratch)),
            eos_token_id=manifest.eod_token_id if manifest else None,
            dtype=dtype,
            metadata={
                "step": reader.manifest.step,
                "consumed_samples": reader.manifest.consumed_samples,
                "versions": reader.manifest.versions,
                "config": reader.manifest.config,
            },
            overwrite=overwrite,
        )


def architecture(config: Config) -> Architecture:
    """The sizes of a run's model.

    Args:
        config: The run.

    Returns:
        What names and shapes of the export follow from.
    """
    model = config.model
    return Architecture(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        head_dim=model.head_width,
        ffn_hidden_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        mask_token_id=model.mask_id,
        tied=model.tie_embeddings,
        is_causal=config.objective.kind == "ar",
        max_position_embeddings=config.data.seq_length,
        rms_norm_eps=model.norm_epsilon,
        rotary_base=model.rotary_base,
        embedding_rows=model.embedding_rows,
        head_rows=model.head_rows,
    )


def _shard_manifest(config: Config) -> Manifest | None:
    path = manifest_path(Path(config.data.train[0].path))
    return Manifest.read(path) if path.exists() else None


def _tokenizer_folder(config: Config, manifest: Manifest | None, scratch: Path) -> Path | None:
    name = config.data.tokenizer or (manifest.tokenizer if manifest else None)
    if name is None:
        return None
    path = Path(name)
    if path.exists():
        return path if path.is_dir() else path.parent
    # A hub name, or a path that is gone: loading says which, in one sentence.
    load_tokenizer(name)
    AutoTokenizer.from_pretrained(name).save_pretrained(scratch)
    return scratch
