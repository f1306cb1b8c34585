"""What ranks do in the tests of averages: train with hooks that average, judge, save, go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cases import NUM_WINDOWS, Overrides, Stage, batches_of, engine_of, evaluate, stage_of
from resuming import MAX_FILE_BYTES

from megatron_mdm.checkpoint.manifest import FORMAT_VERSION, CheckpointManifest, read_manifest
from megatron_mdm.checkpoint.restoring import load_optimizer, load_weights
from megatron_mdm.checkpoint.saving import CheckpointWriter
from megatron_mdm.checkpoint.storage import CheckpointReader, name_checkpoint
from megatron_mdm.config import CheckpointConfig
from megatron_mdm.model.shards import name_shards
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.training.engine import Engine
from megatron_mdm.training.hook_list import begin_hooks, build_own_hooks
from megatron_mdm.training.hooks import TrainingRun
from megatron_mdm.training.judging import PartEnded, judge_averages
from megatron_mdm.training.plan import RunPlan

JUDGED_AFTER, NUM_STEPS = 2, 4


@contextlib.contextmanager
def _begin(stage: Stage, dtype: str, path: Path | None) -> Iterator[TrainingRun]:
    """A run with its averages, new or from a checkpoint."""
    saved = None if path is None else read_manifest(path)
    plan: Any = SimpleNamespace(
        config=stage.config,
        num_steps=NUM_STEPS,
        first_step=0 if saved is None else saved.step,
        saved=saved,
        resume_from=path,
        data=SimpleNamespace(train=SimpleNamespace(num_windows=NUM_WINDOWS)),
    )
    if path is not None:
        load_weights(CheckpointReader(path), list(name_shards(stage.model, stage.mesh)))
    with engine_of(stage, dtype) as engine:
        if path is not None:
            load_optimizer(CheckpointReader(path), engine.shards, engine.states)
        hooks = build_own_hooks(stage.config)
        run = TrainingRun(cast(RunPlan, plan), engine, hooks, None, None)
        begin_hooks(run)
        yield run


def _save(writer: CheckpointWriter, run: TrainingRun) -> None:
    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=run.step,
        consumed_samples=run.step * run.config.batch.global_batch_size,
        config=run.config.model_dump(mode="json"),
        versions={},
        data_fingerprint="",
        state={hook.name: hook.state_dict() for hook in run.hooks},
    )
    kept = run.list_weight_states()
    engine: Engine = run.engine
    writer.save(manifest, shards=engine.shards, states=engine.states, hook_states=kept)


def _judge(stage: Stage, run: TrainingRun) -> dict[str, float]:
    """The held-out loss of all weights, and again of the raw ones, also after a part that ended."""
    found = {"raw": evaluate(stage, run.engine)}
    for name, state in run.list_weight_states().items():
        with run.engine.states.run_with(state.pieces):
            found[name] = evaluate(stage, run.engine)
    with pytest.raises(PartEnded):
        judge_averages(run, _end_here, raw=cast(JudgedWindows, None))
    return found | {"raw again": evaluate(stage, run.engine)}


def _end_here() -> JudgedWindows:
    """Ends the validation of an average as a signal does: on all ranks."""
    raise PartEnded(None, None)


def train(
    overrides: Overrides,
    folder: str,
    *,
    dtype: str = "fp32",
    resume_from: str | None = None,
    judges: bool = True,
    background: bool = False,
) -> dict[str, float]:
    """Trains, and saves a checkpoint after every step.

    Args:
        overrides: As for `cases.config_of`, with `hooks`.
        folder: Where checkpoints go.
        dtype: `fp32` or `bf16`.
        resume_from: A checkpoint to go on from.
        judges: Judge the averages in the middle of the run, too.
        background: Save beside training.

    Returns:
        The held-out loss of all weights at the end, as `_judge`.
    """
    path = None if resume_from is None else Path(resume_from)
    settings = CheckpointConfig(background=background, keep_last=None)
    with (
        stage_of(overrides, dtype) as stage,
        _begin(stage, dtype, path) as run,
        CheckpointWriter(
            Path(folder), settings, stage.mesh, max_file_bytes=MAX_FILE_BYTES
        ) as writer,
    ):
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        for step in range(run.step, NUM_STEPS):
            read = batches.read_step(step)
            run.begin_step(read, 3e-3)
            run.end_step(run.engine.train_step(step, read, 3e-3))
            for hook in run.hooks:
                hook.after_step(run)
            _save(writer, run)
            if judges and run.step == JUDGED_AFTER:
                found = _judge(stage, run)
                assert found["raw"] == found["raw again"]
        return _judge(stage, run)


def name_step(step: int) -> str:
    """Name of a checkpoint."""
    return name_checkpoint(step)
