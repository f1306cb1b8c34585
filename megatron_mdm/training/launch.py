"""From a configuration to a finished run, or to the dry run's description of one."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import signal
import sys
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_mdm.checkpoint.choosing import choose_checkpoint
from megatron_mdm.checkpoint.restoring import load_optimizer, load_weights
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.config import Config, dump_config
from megatron_mdm.core.errors import ConfigError, DataError, MdmError, RunStopped
from megatron_mdm.core.files import remove_leftovers, write_json_whole, write_text_whole
from megatron_mdm.data.ledger import format_ledger
from megatron_mdm.data.loader import Allocate
from megatron_mdm.diffusion.objectives import objective_of
from megatron_mdm.distributed.topology import (
    Topology,
    launched_world_size,
    model_parallel,
    start_process_group,
)
from megatron_mdm.model.accounting import (
    count_parameters,
    recomputed_flops_per_token,
    six_nd_flops,
    training_flops_per_token,
)
from megatron_mdm.model.memory import estimate_memory
from megatron_mdm.model.shards import named_shards
from megatron_mdm.model.transformer import build_model
from megatron_mdm.reporting.console import format_count
from megatron_mdm.reporting.metrics import (
    METRICS_FILE_NAME,
    VALIDATIONS_FILE_NAME,
    MetricsLogger,
)
from megatron_mdm.reporting.printing import Printer
from megatron_mdm.reporting.remarks import going_on_without
from megatron_mdm.reporting.sinks import build_sinks
from megatron_mdm.training.agreement import compare_findings, tell_failure
from megatron_mdm.training.data_plan import ledger_at, training_batches
from megatron_mdm.training.engine import Engine
from megatron_mdm.training.environment import (
    environment_of_ranks,
    library_versions,
    share_of_cores,
    tell_other_conditions,
)
from megatron_mdm.training.epochs import check_validation_interval
from megatron_mdm.training.faults import faults_told
from megatron_mdm.training.initial_weights import load_float32_weights, verify_initial_weights
from megatron_mdm.training.lock import RunLock
from megatron_mdm.training.plan import RunPlan, find_missing_space, make_plan, resumed_from
from megatron_mdm.training.ranks import RankBoard
from megatron_mdm.training.recount import LEDGER_FILE_NAME
from megatron_mdm.training.restarts import STOPPED_FILE_NAME
from megatron_mdm.training.signals import StopRequests
from megatron_mdm.training.trainer import Progress, Trainer
from megatron_mdm.training.validation import Validation
from megatron_mdm.training.watchdog import Watchdog

_CONFIG, _RUN_INFO, _WANDB_RUN_ID = "config.yaml", "run_info.json", "wandb_run_id"
# Files that a killed run may have been about to replace.
_WRITTEN_WHOLE = (
    *(_CONFIG, _RUN_INFO, _WANDB_RUN_ID, METRICS_FILE_NAME, VALIDATIONS_FILE_NAME),
    *(LEDGER_FILE_NAME, STOPPED_FILE_NAME),
)


def train(config: Config) -> None:
    """Trains, resuming from the run's latest checkpoint if there is one.

    Args:
        config: A checked configuration.

    Raises:
        MdmError: Something about the run does not fit, and no worker has started; or a fault that
            the run cannot go on with: damaged data, too many bad steps, a lost rank.
        RunStopped: A signal asked for an end before the last step; a checkpoint was saved.
    """
    started = time.time()
    rank = int(os.environ.get("RANK", "0"))
    run_dir = Path(config.run.dir)
    stopped_by, num_unwritten = None, 0
    with contextlib.ExitStack() as stack:
        try:
            plan = _prepared(config, stack)
        except MdmError as failure:
            if launched_world_size() > 1:
                tell_failure(config, failure)
            raise
        printer = stack.enter_context(Printer()) if rank == 0 else None
        start_process_group(plan.device)
        if launched_world_size() > 1:
            plan = compare_findings(plan)
        torch.set_num_threads(config.run.num_threads or share_of_cores())
        with model_parallel(config.parallel, plan.device) as topology:
            plan = replace(plan, environment=environment_of_ranks(topology))
            plan = _with_checkpoint(plan, topology)
            progress = _progress(plan)
            if printer is not None:
                printer.say(_announcement(plan, progress.step))
            if progress.step < plan.num_steps:
                stopped_by, num_unwritten = _run(plan, topology, progress, printer, started)
            dist.barrier()
        dist.destroy_process_group()
    if num_unwritten:
        raise DataError(
            f"{run_dir / METRICS_FILE_NAME} lacks the last {num_unwritten} records, which could "
            "not be written; the checkpoints are whole: free space, or choose another run.dir."
        )
    if stopped_by is not None:
        raise RunStopped(stopped_by.name)


def describe(config: Config) -> str:
    """What a run would do, without starting anything.

    Args:
        config: A checked configuration.

    Returns:
        The resolved config as YAML, then sizes, counts and estimates.

    Raises:
        MdmError: Something about the run does not fit.
    """
    plan = _checked_plan(config)
    facts = run_facts(plan)
    dtype: Literal["fp32", "bf16"] = "bf16" if plan.dtype == torch.bfloat16 else "fp32"
    memory = asdict(estimate_memory(config, world_size=plan.layout.world_size, dtype=dtype))
    lines = [dump_config(config).rstrip(), ""]
    lines += [f"{name:44} {_shown(value)}" for name, value in facts.items()]
    lines += [f"{'estimated ' + name:44} {value / 2**30:.3f} GiB" for name, value in memory.items()]
    lines += [f"{'estimated total a rank':44} {sum(memory.values()) / 2**30:.3f} GiB"]
    lines += ["", format_ledger(ledger_at(config, plan.data, plan.num_steps))]
    lines += plan.data.remarks
    # The run may start on another machine, with another disk.
    missing = find_missing_space(plan)
    lines += [] if missing is None else [f"here {missing}"]
    return "\n".join(lines)


def run_facts(plan: RunPlan) -> dict[str, Any]:
    """Counts that follow from a plan.

    Args:
        plan: The run.

    Returns:
        Names with their units, and numbers.
    """
    config = plan.config
    objective, counts = objective_of(config), count_parameters(config.model)
    length = objective.mean_length(config.data.seq_length)
    samples = plan.num_steps * config.batch.global_batch_size
    # Windows are computed whole, also where a sample is cut short; the papers count what is left.
    tokens = samples * config.data.seq_length
    causal = objective.attention.is_causal
    exact = training_flops_per_token(
        config.model,
        config.data.seq_length,
        causal=causal,
        head_share=plan.data.head_share,
    )
    again = recomputed_flops_per_token(
        config.model, config.data.seq_length, causal=causal, recompute=config.parallel.recompute
    )
    return {
        "parameters_without_embeddings": counts.non_embedding,
        "parameters_with_embeddings": counts.total,
        "vocab_size": config.model.vocab_size,
        "tokens_per_step": config.batch.global_batch_size * config.data.seq_length,
        "num_steps": plan.num_steps,
        "training_tokens": tokens,
        "unique_tokens": plan.data.train.num_windows * config.data.seq_length,
        "epochs": round(samples / plan.data.train.num_windows, 4),
        "flops_6nd": six_nd_flops(config.model, samples * length),
        "flops_6nd_with_embeddings": six_nd_flops(
            config.model, samples * length, with_embeddings=True
        ),
        "flops_exact": exact * tokens,
        "flops_recomputed": again * tokens,
        "num_processes": plan.layout.world_size,
        "data_parallel_size": plan.layout.data_parallel_size,
        "micro_batches_per_step": plan.layout.num_micro_batches,
        "device": str(plan.device.type),
        "dtype": str(plan.dtype).removeprefix("torch."),
    }


def _prepared(config: Config, stack: contextlib.ExitStack) -> RunPlan:
    """Plans the run; on the first rank in the run's folder, locked as long as the stack lives."""
    run_dir = Path(config.run.dir)
    is_first = os.environ.get("RANK", "0") == "0"
    lock = stack.enter_context(RunLock(run_dir)) if is_first else None
    plan = _checked_plan(config)
    missing = find_missing_space(plan)
    if missing is not None:
        raise ConfigError(missing)
    if lock is not None:
        lock.acquire()
        (run_dir / STOPPED_FILE_NAME).unlink(missing_ok=True)
        for name in _WRITTEN_WHOLE:
            remove_leftovers(run_dir / name)
    return plan


def _checked_plan(config: Config) -> RunPlan:
    plan = make_plan(config)
    check_validation_interval(config, plan.data.train.num_windows)
    return plan


def _run(
    plan: RunPlan, topology: Topology, progress: Progress, printer: Printer | None, started: float
) -> tuple[signal.Signals | None, int]:
    """Trains; returns the signal that stopped it, and the number of metrics that were lost."""
    num_unwritten = 0
    board = RankBoard(plan.run_dir, topology.rank, topology.world_size)
    if topology.rank == 0:
        board.clean()
    dist.barrier()
    with (
        Watchdog(board, plan.config.faults.hang_timeout_seconds) as watchdog,
        StopRequests(topology.world_size) as stops,
        faults_told(board, plan.checkpoint_dir, watchdog, stops),
    ):
        logger = _open_logger(plan, progress.step) if topology.rank == 0 else None
        trainer = _build_trainer(plan, topology, logger, printer, progress, stops, watchdog)
        try:
            stopped_by = trainer.fit()
        finally:
            if logger is not None:
                logger.close()
        if stopped_by is not None:
            stops.ignore_from_now_on()
        if logger is not None:
            num_unwritten = logger.num_unwritten
            with going_on_without(plan.run_dir / _RUN_INFO):
                _write_run_info(plan, time.time() - started)
    return stopped_by, num_unwritten


def _build_trainer(
    plan: RunPlan,
    topology: Topology,
    logger: MetricsLogger | None,
    printer: Printer | None,
    progress: Progress,
    stops: StopRequests,
    watchdog: Watchdog,
) -> Trainer:
    config = plan.config
    model = build_model(config, topology, plan.dtype)
    weights_from = plan.resume_from or plan.initial_weights
    if weights_from is not None:
        with CheckpointReader(weights_from) as reader:
            load_weights(reader, list(named_shards(model, topology)))
    engine = Engine(config, plan.layout, topology, model, plan.dtype)
    if plan.resume_from is not None:
        with CheckpointReader(plan.resume_from) as reader:
            load_optimizer(reader, engine.shards, engine.states)
    elif plan.initial_weights is not None:
        load_float32_weights(plan.initial_weights, engine.shards, engine.states)
    batches = training_batches(
        config,
        plan.data,
        data_parallel_rank=topology.data_rank,
        data_parallel_size=topology.data_size,
        allocate=_allocator(plan.device),
    )
    content = plan.data.read_content()
    validation = Validation(config, plan.data.train, plan.data.valid, content)
    return Trainer(plan, engine, batches, validation, logger, printer, progress, stops, watchdog)


def _with_checkpoint(plan: RunPlan, topology: Topology) -> RunPlan:
    # Now that no other run writes there, and the ranks can share the reading.
    if plan.config.checkpoint.resume != "never":
        on_damage = plan.config.checkpoint.on_damage
        chosen = choose_checkpoint(plan.checkpoint_dir, on_damage, topology)
        plan = resumed_from(plan, chosen)
    if plan.initial_weights is None:
        return plan
    return replace(plan, initial_weights=verify_initial_weights(plan.initial_weights, topology))


def _progress(plan: RunPlan) -> Progress:
    if plan.resume_from is None:
        return Progress(0, [0] * len(plan.config.data.train))
    with CheckpointReader(plan.resume_from) as reader:
        manifest = reader.manifest
    return Progress(
        manifest.step, manifest.predictions, manifest.skipped_steps, manifest.loss_average
    )


def _allocator(device: torch.device) -> Allocate:
    if device.type != "cuda":
        return np.empty

    def pinned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        # The GPU copies by itself, beside its computation, from memory that cannot move.
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()

    return pinned


def _announcement(plan: RunPlan, first_step: int) -> str:
    facts = run_facts(plan)
    parameters = format_count(facts["parameters_with_embeddings"])
    line = (
        f"{plan.run_dir}: {plan.config.objective.kind}, {parameters} parameters, "
        f"{plan.num_steps} steps of {facts['tokens_per_step']} tokens, "
        f"{facts['epochs']:.2f} epochs, {facts['num_processes']} x {facts['device']}"
    )
    if first_step >= plan.num_steps:
        line += f"; already finished at step {first_step}: nothing to do"
    elif first_step:
        line += f"; resuming from {plan.resume_from}"
    elif plan.initial_weights is not None:
        line += f"; beginning with the weights of {plan.initial_weights}"
    lines = [line]
    if 0 < first_step < plan.num_steps:
        lines += filter(None, [tell_other_conditions(plan)])
    lines.append(format_ledger(ledger_at(plan.config, plan.data, plan.num_steps)))
    lines += plan.data.remarks
    return "\n".join(lines)


def _open_logger(plan: RunPlan, first_step: int) -> MetricsLogger:
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    write_text_whole(plan.run_dir / _CONFIG, dump_config(plan.config))
    resume_step = first_step or None
    reporting = plan.config.reporting
    sinks = build_sinks(
        plan.run_dir,
        wandb_mode=reporting.wandb,
        wandb_project=reporting.wandb_project,
        wandb_run_name=plan.run_dir.name,
        wandb_run_id=_wandb_run_id(plan) if reporting.wandb != "off" else None,
        tensorboard=reporting.tensorboard,
        config=plan.config.model_dump(mode="json"),
        resume_step=resume_step,
    )
    return MetricsLogger(plan.run_dir, resume_step=resume_step, sinks=sinks)


def _wandb_run_id(plan: RunPlan) -> str:
    # A resumed run goes on with its curve; a fresh one gets a curve of its own.
    path = plan.run_dir / _WANDB_RUN_ID
    if plan.resume_from is None or not path.exists():
        write_text_whole(path, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="utf-8").strip()


def _write_run_info(plan: RunPlan, wall_seconds: float) -> None:
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    path = plan.run_dir / _RUN_INFO
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = earlier.get("wall_seconds", 0.0) if plan.resume_from is not None else 0.0
    info = {
        **run_facts(plan),
        "wall_seconds": round(before + wall_seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "platform": platform.platform(),
        **(plan.environment.model_dump() if plan.environment is not None else {}),
        "versions": library_versions(),
    }
    write_json_whole(path, info)


def _shown(value: Any) -> str:
    if isinstance(value, float) and abs(value) >= 1e6:
        return f"{value:.4e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
