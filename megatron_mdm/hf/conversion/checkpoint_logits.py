"""Logits of a checkpoint's model as training runs it: Megatron's blocks, in this one process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.checkpoint.manifest import SavedModel, read_manifest, saved_model
from megatron_mdm.checkpoint.restoring import load_weights
from megatron_mdm.checkpoint.storage import CheckpointReader, checkpoint_at


def checkpoint_model(path: Path) -> SavedModel:
    """The model that a checkpoint holds.

    Args:
        path: A checkpoint: its own folder, a run's or its `checkpoints`.

    Returns:
        The model.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    return saved_model(read_manifest(checkpoint_at(path)))


@torch.no_grad()
def checkpoint_logits(
    path: Path, tokens_BS: Tensor, *, dtype: torch.dtype, is_causal: bool
) -> Tensor:
    """Runs a checkpoint's model on this machine's CPU in float32.

    Megatron-Core is imported here and not above: conversion alone does without it.

    Args:
        path: A checkpoint: its own folder, a run's or its `checkpoints`.
        tokens_BS: Tokens [B, S], int64.
        dtype: Weights are rounded to it first, as an export of this dtype has them.
        is_causal: Attention sees no later position, whatever the checkpoint was trained for.

    Returns:
        Logits [B, S, vocabulary rows], float32; -inf for padding and the mask token.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    from megatron_mdm.distributed.mesh import model_parallel
    from megatron_mdm.distributed.processes import start_process_group
    from megatron_mdm.model.shards import named_shards
    from megatron_mdm.model.transformer import build_model

    device = torch.device("cpu")
    has_group = dist.is_initialized()
    start_process_group(device)
    try:
        reader = CheckpointReader(checkpoint_at(path))
        kind: Literal["mdm", "ar"] = "ar" if is_causal else "mdm"
        config = saved_model(reader.manifest)._replace(kind=kind).inference_config()
        with model_parallel(config.parallel, device) as mesh:
            stage = build_model(config, mesh, torch.float32).eval()
            load_weights(reader, list(named_shards(stage, mesh)))
            for parameter in stage.parameters():
                parameter.copy_(parameter.to(dtype))
            with mesh.cuda_redirected():
                logits: Tensor = stage(tokens_BS)
    finally:
        if not has_group:
            dist.destroy_process_group()
    return logits
