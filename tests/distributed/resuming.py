"""What ranks do in the tests of resuming: train, save, go on; or load and go on."""

from __future__ import annotations

from pathlib import Path

from cases import Overrides, batches_of, engine_of, mean_loss, stage_of

from megatron_mdm.checkpoint.saving import load_optimizer, load_weights, save_checkpoint
from megatron_mdm.checkpoint.storage import (
    FORMAT_VERSION,
    CheckpointManifest,
    CheckpointReader,
    latest_checkpoint,
)
from megatron_mdm.model.parameters import named_shards

SAVED_AFTER, NUM_STEPS = 2, 5


def run(
    overrides: Overrides, folder: str, resume: bool, dtype: str = "fp32"
) -> list[tuple[float, float]]:
    """Trains from the start, saving on the way, or from what was saved.

    Args:
        overrides: As for `cases.config_of`.
        folder: Where checkpoints lie.
        resume: Start from the latest checkpoint, and save nothing.
        dtype: `fp32` or `bf16`.

    Returns:
        Loss and gradient norm of every step after the checkpoint.
    """
    curve = []
    with stage_of(overrides, dtype) as stage:
        first_step = 0
        if resume:
            path = latest_checkpoint(Path(folder))
            assert path is not None
            with CheckpointReader(path) as reader:
                load_weights(reader, list(named_shards(stage.model, stage.topology)))
                first_step = reader.manifest.step
        with engine_of(stage, dtype) as engine:
            if resume:
                with CheckpointReader(path) as reader:
                    load_optimizer(reader, engine.shards, engine.states)
            batches = batches_of(stage.config, stage.topology.data_rank, stage.topology.data_size)
            size = stage.config.batch.global_batch_size
            for step in range(first_step, NUM_STEPS):
                result = engine.train_step(step, batches.step_batches(step), 3e-3)
                if step >= SAVED_AFTER:
                    curve.append((mean_loss(engine, result.loss_sum, size), result.grad_norm))
                if not resume and step == SAVED_AFTER - 1:
                    manifest = CheckpointManifest(
                        format_version=FORMAT_VERSION,
                        step=step + 1,
                        consumed_samples=(step + 1) * size,
                        predictions=[(step + 1) * size],
                        world_size=stage.topology.world_size,
                        config=stage.config.model_dump(mode="json"),
                        versions={},
                        data_fingerprint="",
                        files={},
                    )
                    save_checkpoint(
                        Path(folder),
                        manifest,
                        shards=engine.shards,
                        states=engine.states,
                        topology=stage.topology,
                    )
    return curve
