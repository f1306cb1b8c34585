"""From a configuration to a finished run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import torch

from megatron_mdm.checkpoint.restoring import load_optimizer, load_weights
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.config import Config
from megatron_mdm.core.errors import ConfigError, DataError, MdmError, RunStopped
from megatron_mdm.data.loader import TrainingBatches
from megatron_mdm.distributed.host_memory import choose_allocator
from megatron_mdm.distributed.mesh import Mesh, open_mesh
from megatron_mdm.distributed.processes import (
    choose_collective_timeout,
    leave_process_group,
    read_world_size,
    start_process_group,
    wait_for_ranks,
)
from megatron_mdm.model.shards import name_shards
from megatron_mdm.model.transformer import build_model
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME
from megatron_mdm.reporting.printing import Printer
from megatron_mdm.training.agreement import compare_findings, settle_plan, tell_failure
from megatron_mdm.training.data_plan import open_batches
from megatron_mdm.training.description import announce, list_next_steps
from megatron_mdm.training.engine import Engine
from megatron_mdm.training.environment import count_threads
from megatron_mdm.training.faults import tell_faults
from megatron_mdm.training.hook_list import begin_hooks, list_hooks
from megatron_mdm.training.hooks import TrainingRun
from megatron_mdm.training.initial_weights import load_float32_weights
from megatron_mdm.training.lock import RunLock
from megatron_mdm.training.plan import RunPlan, find_missing_space, make_plan
from megatron_mdm.training.ranks import RankBoard
from megatron_mdm.training.run_files import clean_run_dir, open_logger, write_run_info
from megatron_mdm.training.signals import StopRequests
from megatron_mdm.training.trainer import Trainer
from megatron_mdm.training.watchdog import Watchdog


def train(config: Config) -> None:
    """Trains, resuming from the run's latest checkpoint if there is one.

    Raises:
        MdmError: Something about the run does not fit, and no worker has started; or a fault that
            the run cannot go on with: damaged data, too many bad steps, a lost rank.
        RunStopped: A signal asked for an end before the last step; a checkpoint was saved.
    """
    started = time.time()
    timeout = choose_collective_timeout(config.faults.hang_timeout_seconds)
    rank = int(os.environ.get("RANK", "0"))
    stopped_by, num_unwritten = None, 0
    with contextlib.ExitStack() as stack:
        try:
            plan = _prepare(config, stack)
        except MdmError as failure:
            if read_world_size() > 1:
                tell_failure(config, failure)
            raise
        printer = stack.enter_context(Printer()) if rank == 0 else None
        start_process_group(plan.device, collective_timeout=timeout)
        if read_world_size() > 1:
            plan = compare_findings(plan)
        torch.set_num_threads(config.run.num_threads or count_threads())
        with open_mesh(config.parallel, plan.device, timeout) as mesh:
            plan = settle_plan(plan, mesh)
            if printer is not None:
                printer.say(announce(plan))
            if plan.first_step < plan.num_steps:
                stopped_by, num_unwritten = _run(plan, mesh, printer, started)
            if printer is not None and stopped_by is None:
                printer.say("\n".join(list_next_steps(plan)))
            wait_for_ranks(plan.device)
        leave_process_group()
    if num_unwritten:
        raise DataError(
            f"{plan.run_dir / METRICS_FILE_NAME} lacks the last {num_unwritten} records, which "
            "could not be written; the checkpoints are whole: free space, or choose another "
            "run.dir."
        )
    if stopped_by is not None:
        raise RunStopped(stopped_by.name)


def _prepare(config: Config, stack: contextlib.ExitStack) -> RunPlan:
    """Plans the run; the first rank locks the run's folder until the stack closes."""
    is_first = os.environ.get("RANK", "0") == "0"
    lock = stack.enter_context(RunLock(Path(config.run.dir))) if is_first else None
    plan = make_plan(config)
    missing = find_missing_space(plan)
    if missing is not None:
        raise ConfigError(missing)
    if lock is not None:
        lock.acquire()
        clean_run_dir(plan)
    return plan


def _run(
    plan: RunPlan, mesh: Mesh, printer: Printer | None, started: float
) -> tuple[signal.Signals | None, int]:
    """Trains; returns the signal that stopped it, and the number of metrics that were lost."""
    board = RankBoard(plan.run_dir, mesh.rank, mesh.world_size)
    if mesh.rank == 0:
        board.clean()
    wait_for_ranks(mesh.device)
    hang_timeout = plan.config.faults.hang_timeout_seconds
    say = printer.say if printer is not None else lambda line: None
    with (
        Watchdog(board, hang_timeout) as watchdog,
        StopRequests(mesh.world_size, choose_collective_timeout(hang_timeout), say) as stops,
        tell_faults(board, plan.checkpoint_dir, watchdog, stops),
    ):
        logger = open_logger(plan) if mesh.rank == 0 else None
        engine = _build_engine(plan, mesh)
        hooks = list_hooks(plan, mesh, logger, stops)
        run = TrainingRun(plan, engine, hooks, watchdog, printer)
        for remark in begin_hooks(run):
            run.say(remark)
        stopped_by = Trainer(run, _open_batches_of_rank(plan, mesh)).fit()
        if stopped_by is not None:
            stops.ignore_from_now_on()
        if logger is not None:
            write_run_info(plan, time.time() - started)
    return stopped_by, 0 if logger is None else logger.num_unwritten


def _build_engine(plan: RunPlan, mesh: Mesh) -> Engine:
    """Builds this rank's stage with its initial or loaded weights and optimizer state."""
    # A checkpoint holds all of them.
    draws_weights = plan.resume_from is None
    model = build_model(plan.config, mesh, plan.dtype, draws_weights=draws_weights)
    weights_from = plan.resume_from or plan.initial_weights
    if weights_from is not None:
        reader = CheckpointReader(weights_from)
        load_weights(reader, list(name_shards(model, mesh)))
    engine = Engine(plan.config, plan.layout, mesh, model, plan.dtype)
    if plan.resume_from is not None:
        reader = CheckpointReader(plan.resume_from)
        load_optimizer(reader, engine.shards, engine.states)
    elif plan.initial_weights is not None:
        load_float32_weights(plan.initial_weights, engine.shards, engine.states)
    return engine


def _open_batches_of_rank(plan: RunPlan, mesh: Mesh) -> TrainingBatches:
    return open_batches(
        plan.config,
        plan.data,
        data_parallel_rank=mesh.dp.rank,
        data_parallel_size=mesh.dp.size,
        allocate=choose_allocator(plan.device),
    )
