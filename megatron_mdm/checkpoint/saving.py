"""Saving from within a run: all ranks write, one rename makes it visible.

torch.distributed.checkpoint would write in the background as well, but its metadata is a pickle,
and nothing in a checkpoint may run code.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from megatron_mdm.checkpoint.hook_states import WeightState, plan_hook_states, read_hook_states
from megatron_mdm.checkpoint.manifest import (
    CheckpointManifest,
    FileRecord,
    SavedLayout,
    SavedOptimizer,
)
from megatron_mdm.checkpoint.publishing import prepare_folder, publish_checkpoint
from megatron_mdm.checkpoint.rank_files import (
    MAX_FILE_BYTES,
    HostCopies,
    PlannedTensor,
    RankFiles,
    SavedTensor,
    list_owned,
    read_owned,
)
from megatron_mdm.checkpoint.retention import delete_old
from megatron_mdm.checkpoint.storage import name_checkpoint
from megatron_mdm.config import CheckpointConfig
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.core.remarks import warn
from megatron_mdm.distributed.gathering import gather

if TYPE_CHECKING:
    # For types alone: offline tools start without Megatron-Core and DeepSpeed.
    from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
    from megatron_mdm.distributed.mesh import Mesh
    from megatron_mdm.model.shards import NamedShard

# Ranks wait for the slowest disk among them; a rank that dies is noticed at once.
_TIMEOUT = timedelta(hours=2)


class SaveReport(NamedTuple):
    """A published checkpoint.

    Attributes:
        path: Its folder.
        step: Optimizer steps taken.
        stall_seconds: How long training stood still on this rank.
        write_seconds: From the first byte to the published checkpoint.
        num_bytes: Size of all tensor files.
    """

    path: Path
    step: int
    stall_seconds: float
    write_seconds: float
    num_bytes: int


class _Share(NamedTuple):
    """What a rank contributes to a checkpoint."""

    files: dict[str, FileRecord]
    parameters: dict[str, list[int]]


class CheckpointWriter:
    """Saves the checkpoints of a run. Every rank has one and makes the same calls.

    In the background training waits only for the copy into CPU memory. One thread of each rank then
    writes, and at most one save is under way. An error of any rank reaches every rank: at once in
    the foreground, else with the next `save` or `wait`.

    Args:
        folder: The run's `checkpoints` folder.
        settings: Retention, background writing, and what follows an error.
        mesh: This rank's place.
        max_file_bytes: A tensor file holds at most so many bytes, or one larger tensor.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        mesh: Mesh,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._mesh = mesh
        self._max_file_bytes = max_file_bytes
        # A group of their own: the writing threads' messages must not mix with those of training.
        self._group = (
            dist.new_group(backend="gloo", timeout=_TIMEOUT) if mesh.world_size > 1 else None
        )
        self._copies = HostCopies(mesh.device)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._waited_seconds = 0.0
        self._reports: list[SaveReport] = []

    def __enter__(self) -> CheckpointWriter:
        """Opens nothing: the context is for its end."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; an error that ends the context takes precedence over one of the pending save."""
        with contextlib.suppress(CheckpointError) if kind else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        """Waits for the pending save, and ends. Every rank calls it.

        Raises:
            CheckpointError: The save could not be written and `on_write_error` is `stop`.
        """
        try:
            self.wait()
        finally:
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def save(
        self,
        manifest: CheckpointManifest,
        *,
        shards: Sequence[NamedShard],
        states: OptimizerStates,
        hook_states: Mapping[str, WeightState] | None = None,
        on_published: Callable[[Path], None] | None = None,
    ) -> None:
        """Saves a checkpoint, or begins to. Every rank calls it.

        Args:
            manifest: Progress and configuration; the rest is filled in here.
            shards: This rank's parameters.
            states: Their optimizer state.
            hook_states: What hooks keep of them by name, the same names on every rank.
            on_published: Called on the first rank once the checkpoint is there, in the background
                from the writing thread. Its OSError counts as one of the save.

        Raises:
            CheckpointError: This save, or the one before in the background, could not be written
                and `on_write_error` is `stop`; older checkpoints are untouched.
        """
        self.wait()
        # The time spent waiting counts as stalled.
        started = time.perf_counter() - self._waited_seconds
        self._waited_seconds = 0.0
        mesh = self._mesh
        layout = SavedLayout(
            world_size=mesh.world_size,
            tensor_parallel_size=mesh.tp.size,
            pipeline_parallel_size=mesh.pp.size,
            data_parallel_size=mesh.dp.size,
            zero_stage=states.zero_stage,
        )
        optimizer = SavedOptimizer(
            states=states.names, by_role=states.by_role, numbers=states.get_numbers()
        )
        kept = hook_states or {}
        saved = {name: state.to_saved() for name, state in kept.items()}
        changes = {"layout": layout, "optimizer": optimizer, "hook_states": saved}
        manifest = manifest.model_copy(update=changes)
        owned = list_owned(shards, mesh)
        planned = [
            PlannedTensor(kind, shard.name, shard.local_shape)
            for shard in owned
            for kind in states.list_kinds(shard)
        ]
        parameters = {shard.name: list(shard.shape) for shard in owned}
        planned += plan_hook_states(owned, kept)
        tensors: Iterable[SavedTensor] = chain(
            read_owned(shards, owned, states), read_hook_states(shards, owned, states, kept)
        )
        if self._settings.background:
            tensors = self._copies.take(tensors)
        stall_seconds = time.perf_counter() - started if self._settings.background else None

        def write() -> None:
            try:
                num_bytes = self._write(manifest, planned, tensors, parameters, on_published)
            except Exception as error:
                self._note(error)
                return
            seconds = time.perf_counter() - started
            stall = seconds if stall_seconds is None else stall_seconds
            path = self._folder / name_checkpoint(manifest.step)
            write_seconds = seconds - (stall_seconds or 0.0)
            report = SaveReport(path, manifest.step, stall, write_seconds, num_bytes)
            self._reports.append(report)

        if self._settings.background:
            # A daemon thread: it must not keep a rank alive that fails elsewhere.
            self._thread = threading.Thread(target=write, name="checkpoint-writer", daemon=True)
            self._thread.start()
        else:
            write()
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is being written. Every rank calls it.

        Raises:
            CheckpointError: The save could not be written and `on_write_error` is `stop`.
        """
        if self._thread is not None:
            started = time.perf_counter()
            self._thread.join()
            self._thread = None
            self._waited_seconds += time.perf_counter() - started
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take_reports(self) -> list[SaveReport]:
        """Takes the reports since the last call, oldest first."""
        reports, self._reports = self._reports, []
        return reports

    def _note(self, error: Exception) -> None:
        if not isinstance(error, _WriteError) or self._settings.on_write_error == "stop":
            self._error = error
        elif self._mesh.rank == 0:
            warn(f"a checkpoint was not saved, training goes on: {error}")

    def _write(
        self,
        manifest: CheckpointManifest,
        planned: Sequence[PlannedTensor],
        tensors: Iterable[SavedTensor],
        parameters: dict[str, list[int]],
        on_published: Callable[[Path], None] | None,
    ) -> int:
        final = self._folder / name_checkpoint(manifest.step)
        aside = self._folder / f".{final.name}.tmp"
        problem = self._attempt_on_first(lambda: prepare_folder(aside))
        self._agree(aside, problem)
        written, problem = self._write_tensors(aside, planned, tensors)
        share = _Share(written, parameters)
        shares = self._agree(aside, problem, share)
        files = {name: record for part in shares for name, record in part.files.items()}
        shapes = {name: shape for part in shares for name, shape in part.parameters.items()}
        whole = manifest.model_copy(
            update={
                "files": dict(sorted(files.items())),
                "parameters": dict(sorted(shapes.items())),
            }
        )

        def publish() -> None:
            publish_checkpoint(aside, final, whole)
            if on_published is not None:
                on_published(final)

        problem = self._attempt_on_first(publish)
        self._agree(aside, problem)
        if self._mesh.rank == 0:
            self._delete_old(manifest.step)
        return sum(record.num_bytes for record in files.values())

    def _write_tensors(
        self, aside: Path, planned: Sequence[PlannedTensor], tensors: Iterable[SavedTensor]
    ) -> tuple[dict[str, FileRecord], str]:
        mesh = self._mesh
        writer = RankFiles(
            aside,
            planned,
            tensor_rank=mesh.tp.rank,
            pipeline_rank=mesh.pp.rank,
            data_rank=mesh.dp.rank,
            max_file_bytes=self._max_file_bytes,
        )
        remaining = iter(tensors)
        try:
            return writer.write(remaining), ""
        except OSError as error:
            # Other replicas wait in ZeRO's gathers, so this rank has to take part in all of them.
            for _ in remaining:
                pass
            return {}, _explain(error)

    def _attempt_on_first(self, action: Callable[[], None]) -> str:
        if self._mesh.rank == 0:
            try:
                action()
            except OSError as error:
                return _explain(error)
        return ""

    def _agree(self, aside: Path, problem: str, share: _Share | None = None) -> list[_Share]:
        # All ranks learn of a problem on one, so that none goes on or waits for it.
        try:
            everyone: list[Any] = [(problem, share)]
            if self._group is not None:
                everyone = gather((problem, share), self._group)
        except RuntimeError as error:
            raise CheckpointError(
                f"{aside} was given up, since a rank was lost while saving "
                f"({str(error).splitlines()[0]}): start the run again; older checkpoints are whole."
            ) from None
        for rank, (found, _) in enumerate(everyone):
            if found:
                if self._mesh.rank == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                raise _WriteError(
                    f"{aside} cannot be written by rank {rank} ({found}): free some space; older "
                    "checkpoints are whole."
                )
        return [share for _, share in everyone]

    def _delete_old(self, newest: int) -> None:
        settings = self._settings
        rule = {"keep_last": settings.keep_last, "keep_every_steps": settings.keep_every_steps}
        try:
            delete_old(self._folder, newest, **rule)
        except OSError as error:
            warn(f"an old checkpoint could not be deleted ({_explain(error)}): delete it by hand.")


class _WriteError(CheckpointError):
    """A checkpoint that could not be written, as every rank knows."""


def _explain(error: OSError) -> str:
    return str(error.strerror or error)
