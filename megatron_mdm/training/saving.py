"""Checkpoints of a run, when they are due and when it is asked to stop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mdm.checkpoint.manifest import FORMAT_VERSION, CheckpointManifest, SavedOrder
from megatron_mdm.checkpoint.saving import CheckpointWriter
from megatron_mdm.checkpoint.storage import name_checkpoint
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.core.remarks import warn_on_write_error
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.training.environment import list_versions
from megatron_mdm.training.hooks import Hook, TrainingRun, read_state
from megatron_mdm.training.restarts import STOPPED_FILE_NAME
from megatron_mdm.training.signals import StopRequests

if TYPE_CHECKING:
    from megatron_mdm.training.plan import RunPlan


class Checkpoints(Hook):
    """Saves the run with the state of all its hooks."""

    name = "checkpoints"

    def __init__(self, plan: RunPlan, mesh: Mesh) -> None:
        self._writer = CheckpointWriter(plan.checkpoint_dir, plan.config.checkpoint, mesh)
        self._saved_step: int | None = None

    def before_step(self, run: TrainingRun) -> None:
        """Reports on what was written since the last step."""
        for report in self._writer.take_reports():
            run.metrics |= {
                "perf/checkpoint_stall_seconds": report.stall_seconds,
                "perf/checkpoint_write_seconds": report.write_seconds,
                "perf/checkpoint_bytes": report.num_bytes,
            }

    def after_step(self, run: TrainingRun) -> None:
        """Saves if it is due."""
        if run.is_due(run.config.checkpoint.every_steps):
            self.save(run)

    def save(self, run: TrainingRun) -> Path:
        """Saves a checkpoint of the step just taken, unless there is one.

        Returns:
            Its folder, which may be missing where `checkpoint.on_write_error` is `continue`.

        Raises:
            CheckpointError: It could not be written.
        """
        path = run.plan.checkpoint_dir / name_checkpoint(run.step)
        if self._saved_step == run.step:
            return path
        with run.paused():
            run.mark("saving")
            # The save under way still reads the hooks' states.
            self._writer.wait()
            for hook in run.hooks:
                hook.before_save(run)
            self._writer.save(
                _make_manifest(run),
                shards=run.engine.shards,
                states=run.engine.states,
                hook_states=run.list_weight_states(),
                on_published=lambda path: _call_after_save(run, path),
            )
        self._saved_step = run.step
        return path

    def wait(self) -> None:
        """Waits until nothing is being written."""
        self._writer.wait()

    def close(self) -> None:
        """Waits for the last save."""
        self._writer.close()


class StopOnRequest(Hook):
    """Ends the run after a step when a signal to any rank has asked for it, and saves it first."""

    name = "stop"

    def __init__(self, stops: StopRequests, checkpoints: Checkpoints) -> None:
        self._stops = stops
        self._checkpoints = checkpoints

    def after_step(self, run: TrainingRun) -> None:
        """Asks all ranks; a validation may have heard the signal before."""
        if run.stopped_by is None and not run.is_last_step:
            run.stopped_by = self._stops.poll()
        if run.stopped_by is None:
            return
        saved = self._checkpoints.save(run)
        self._checkpoints.wait()
        if run.mesh.rank > 0:
            return
        record = {"step": run.step, "signal": run.stopped_by.name, "time": time.time()}
        path = run.plan.run_dir / STOPPED_FILE_NAME
        with warn_on_write_error(path):
            write_text_whole(path, json.dumps(record) + "\n")
        # It may be missing where checkpoint.on_write_error is continue.
        outcome = f"saved {saved}" if saved.exists() else "this step could not be saved"
        run.say(
            f"stopped by {run.stopped_by.name} at step {run.step}: {outcome}; start the same "
            "command again to go on"
        )


def _make_manifest(run: TrainingRun) -> CheckpointManifest:
    plan = run.plan
    states = {hook.name: read_state(hook, f"The hook {hook.name}") for hook in run.hooks}
    start = plan.data.order_start
    return CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=run.step,
        skipped_steps=run.num_skipped,
        consumed_samples=run.step * plan.config.batch.global_batch_size,
        config=plan.config.model_dump(mode="json"),
        versions=list_versions(),
        environment=plan.environment,
        data_fingerprint=plan.data.fingerprint,
        order_start=None if start is None else SavedOrder(**start._asdict()),
        tokenizer=plan.data.tokenizer,
        chat_template=next(iter(plan.data.chat_templates), None),
        state={name: state for name, state in states.items() if state},
    )


def _call_after_save(run: TrainingRun, path: Path) -> None:
    step = int(path.name.removeprefix("step_"))
    for hook in run.hooks:
        hook.after_save(step, path)
    run.say(f"saved {path}")
