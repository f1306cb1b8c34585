"""Logits of a checkpoint's model as training runs it: Megatron's blocks, in this one process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_mdm.checkpoint.manifest import RAW, SavedModel, read_manifest, read_saved_model
from megatron_mdm.checkpoint.restoring import load_weights
from megatron_mdm.checkpoint.storage import CheckpointReader, resolve_checkpoint
from megatron_mdm.config import ParallelConfig
from megatron_mdm.diffusion.samples import LOG_SNR


def read_model(path: Path) -> SavedModel:
    """The model that a checkpoint holds.

    Args:
        path: A checkpoint: its own folder, a run's or its `checkpoints`.

    Returns:
        The model.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    return read_saved_model(read_manifest(resolve_checkpoint(path)))


@torch.no_grad()
def run_checkpoint(
    path: Path,
    tokens_BS: Tensor,
    *,
    weights: str = RAW,
    dtype: torch.dtype,
    is_causal: bool,
    log_snr_B: Tensor | None = None,
) -> Tensor:
    """Runs a checkpoint's model on this machine's CPU in float32.

    Megatron-Core is imported here and not above: conversion alone does without it.

    Args:
        path: A checkpoint: its own folder, a run's or its `checkpoints`.
        tokens_BS: Tokens [B, S], int64.
        weights: `raw`, or the name of an average of the weights.
        dtype: Weights are rounded to it first, as an export of this dtype has them.
        is_causal: Attention sees no later position, whatever the checkpoint was trained for.
        log_snr_B: float32 [B], of the noise, where the model takes it.

    Returns:
        Logits [B, S, vocabulary rows], float32; -inf for padding and the mask token.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    from megatron_mdm.distributed.mesh import open_mesh
    from megatron_mdm.distributed.processes import join_process_group
    from megatron_mdm.model.shards import name_shards
    from megatron_mdm.model.transformer import build_stage

    device = torch.device("cpu")
    reader = CheckpointReader(resolve_checkpoint(path), weights)
    kind: Literal["mdm", "ar"] = "ar" if is_causal else "mdm"
    saved = read_saved_model(reader.manifest)._replace(kind=kind)
    parallel = ParallelConfig()
    with join_process_group(device), open_mesh(parallel, device) as mesh:
        attention, length = saved.attention, saved.seq_length
        stage = build_stage(saved.model, parallel, attention, length, mesh, torch.float32)
        stage.eval()
        load_weights(reader, list(name_shards(stage, mesh)))
        for parameter in stage.parameters():
            parameter.copy_(parameter.to(dtype))
        with mesh.redirect_cuda():
            told = {} if log_snr_B is None else {LOG_SNR: log_snr_B[:, None]}
            logits: Tensor = stage(tokens_BS, model_inputs=told)
    return logits
