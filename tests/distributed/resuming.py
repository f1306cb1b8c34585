"""What ranks do in the tests of resuming: train, save, go on; or load and go on."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

from cases import (
    Overrides,
    Piece,
    Stage,
    batches_of,
    engine_of,
    evaluate,
    mean_loss,
    piece_of,
    stage_of,
)

from megatron_mdm.checkpoint import rank_files
from megatron_mdm.checkpoint.discovery import choose_checkpoint
from megatron_mdm.checkpoint.manifest import FORMAT_VERSION, CheckpointManifest
from megatron_mdm.checkpoint.restoring import load_optimizer, load_weights
from megatron_mdm.checkpoint.saving import CheckpointWriter
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.config import CheckpointConfig
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.model.shards import name_shards
from megatron_mdm.training.engine import Engine
from megatron_mdm.training.initial_weights import (
    find_initial_weights,
    load_float32_weights,
    verify_initial_weights,
)

SAVED_AFTER, NUM_STEPS = 2, 5
# Every rank writes several files.
MAX_FILE_BYTES = 20_000


def writer_of(stage: Stage, folder: Path, **settings: object) -> CheckpointWriter:
    """The rank's writer, with small files.

    Args:
        stage: This rank's part of the run.
        folder: Where checkpoints lie.
        **settings: Of the section `checkpoint`.

    Returns:
        A context that waits for the last save.
    """
    return CheckpointWriter(
        folder,
        CheckpointConfig.model_validate(settings),
        stage.mesh,
        max_file_bytes=MAX_FILE_BYTES,
    )


def save(writer: CheckpointWriter, stage: Stage, engine: Engine, step: int) -> None:
    """Saves a checkpoint, or begins to.

    Args:
        writer: The rank's writer.
        stage: This rank's part of the run.
        engine: Its engine.
        step: Steps taken.
    """
    size = stage.config.batch.global_batch_size
    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=step,
        consumed_samples=step * size,
        config=stage.config.model_dump(mode="json"),
        versions={},
        data_fingerprint="",
    )
    writer.save(manifest, shards=engine.shards, states=engine.states)


def save_again(overrides: Overrides, sources: list[str], folder: str) -> None:
    """Loads checkpoints into one engine, one after the other, and saves each again.

    Args:
        overrides: As for `cases.config_of`.
        sources: Folders of checkpoints.
        folder: Gets one checkpoint for each, whose step is its place in the list.
    """
    with (
        stage_of(overrides) as stage,
        engine_of(stage) as engine,
        writer_of(stage, Path(folder)) as writer,
    ):
        for index, source in enumerate(sources):
            reader = CheckpointReader(Path(source))
            load_optimizer(reader, engine.shards, engine.states)
            save(writer, stage, engine, index)


def train_while_saving(overrides: Overrides, folder: str, background: bool) -> list[float]:
    """Saves after each of three steps and trains on at once.

    Args:
        overrides: As for `cases.config_of`.
        folder: Where checkpoints lie; the last two are kept.
        background: Whether writing goes on beside training.

    Returns:
        Gradient norms.
    """
    norms = []
    with (
        stage_of(overrides) as stage,
        engine_of(stage) as engine,
        writer_of(stage, Path(folder), background=background, keep_last=2) as writer,
    ):
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(3):
            result = engine.train_step(step, batches.read_step(step), 3e-3)
            norms.append(result.grad_norm)
            save(writer, stage, engine, step + 1)
    return norms


def save_without_space(
    overrides: Overrides, folder: str, full_rank: int, background: bool, on_write_error: str
) -> list[str]:
    """Saves three times; the second time one rank can write nothing.

    Args:
        overrides: As for `cases.config_of`.
        folder: Where checkpoints lie.
        full_rank: The rank with the full disk.
        background: Whether to write in the background.
        on_write_error: `stop` or `continue`.

    Returns:
        What each of four calls said: three saves and the final wait.
    """
    said = []

    def tell(call: object, *arguments: object) -> None:
        try:
            call(*arguments)  # type: ignore[operator]
            said.append("")
        except CheckpointError as error:
            said.append(str(error))

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        settings = {"background": background, "on_write_error": on_write_error}
        with writer_of(stage, Path(folder), **settings) as writer:
            for step in (1, 2, 3):
                if step == 2:
                    writer.wait()
                    if stage.mesh.rank == full_rank:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
                tell(save, writer, stage, engine, step)
                if writer._thread is not None:
                    writer._thread.join()
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            tell(writer.wait)
    return said


def die_while_saving(overrides: Overrides, folder: str, dying_rank: int) -> None:
    """Saves in the background; the second time one rank is killed between two of its files.

    Args:
        overrides: As for `cases.config_of`.
        folder: Where checkpoints lie.
        dying_rank: The rank that is killed.
    """
    with (
        stage_of(overrides) as stage,
        engine_of(stage) as engine,
        writer_of(stage, Path(folder), background=True) as writer,
    ):
        save(writer, stage, engine, 1)
        writer.wait()
        if stage.mesh.rank == dying_rank:
            rank_files.TensorFile.finish = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        save(writer, stage, engine, 2)
        writer.wait()


def choose(overrides: Overrides, folder: str, on_damage: str) -> str:
    """Chooses the checkpoint to go on from.

    Args:
        overrides: As for `cases.config_of`.
        folder: Where checkpoints lie.
        on_damage: `previous` or `refuse`.

    Returns:
        Its name, or the error.
    """
    with stage_of(overrides) as stage:
        try:
            path = choose_checkpoint(Path(folder), on_damage, stage.mesh)  # type: ignore[arg-type]
        except CheckpointError as error:
            return str(error)
        return path.name if path is not None else ""


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
            path = choose_checkpoint(Path(folder), "refuse", stage.mesh)
            assert path is not None
            reader = CheckpointReader(path)
            load_weights(reader, list(name_shards(stage.model, stage.mesh)))
            first_step = reader.manifest.step
        with engine_of(stage, dtype) as engine:
            if resume:
                reader = CheckpointReader(path)
                load_optimizer(reader, engine.shards, engine.states)
            batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
            size = stage.config.batch.global_batch_size
            for step in range(first_step, NUM_STEPS):
                result = engine.train_step(step, batches.read_step(step), 3e-3)
                if step >= SAVED_AFTER:
                    curve.append((mean_loss(engine, result.loss_sum, size), result.grad_norm))
                if not resume and step == SAVED_AFTER - 1:
                    with writer_of(stage, Path(folder)) as writer:
                        save(writer, stage, engine, step + 1)
    return curve


def train_and_save(overrides: Overrides, folder: str) -> tuple[float, float]:
    """Trains for two steps and saves.

    Args:
        overrides: As for `cases.config_of`.
        folder: Where checkpoints lie.

    Returns:
        The held-out loss after the steps, and the loss of the batch of step 0 again.
    """
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(2):
            engine.train_step(step, batches.read_step(step), 3e-3)
        with writer_of(stage, Path(folder)) as writer:
            save(writer, stage, engine, 2)
        held_out = evaluate(stage, engine)
        again = engine.train_step(0, batches.read_step(0), 0.0)
        size = stage.config.batch.global_batch_size
        return held_out, mean_loss(engine, again.loss_sum, size)


def begin(overrides: Overrides, dtype: str = "fp32") -> dict[str, float | list[Piece]]:
    """Begins a run with `run.initial_weights`.

    Args:
        overrides: As for `cases.config_of`.
        dtype: `fp32` or `bf16`.

    Returns:
        The held-out loss, that of the first step, and the optimizer's weights before it.
    """
    with stage_of(overrides, dtype) as stage:
        found = find_initial_weights(stage.config)
        assert found is not None
        path = verify_initial_weights(found, stage.mesh)
        reader = CheckpointReader(path)
        load_weights(reader, list(name_shards(stage.model, stage.mesh)))
        with engine_of(stage, dtype) as engine:
            load_float32_weights(path, engine.shards, engine.states)
            weights = [
                piece_of(shard, engine.states.get(shard.parameter, "weight"))
                for shard in engine.shards
            ]
            held_out = evaluate(stage, engine)
            batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
            result = engine.train_step(0, batches.read_step(0), 3e-3)
            size = stage.config.batch.global_batch_size
            loss = mean_loss(engine, result.loss_sum, size)
    return {"held_out": held_out, "loss": loss, "weights": weights}


def verify(overrides: Overrides) -> str:
    """Looks for damage in `run.initial_weights`.

    Args:
        overrides: As for `cases.config_of`.

    Returns:
        The path, or the error.
    """
    with stage_of(overrides) as stage:
        try:
            found = find_initial_weights(stage.config)
            assert found is not None
            return str(verify_initial_weights(found, stage.mesh))
        except CheckpointError as error:
            return str(error)
