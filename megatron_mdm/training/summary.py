"""A run in a few lines before it starts: how large, how long, and does it fit this machine."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from megatron_mdm.config import Config, dump_config
from megatron_mdm.core.command_line import own_command
from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.core.launcher import drop_launch
from megatron_mdm.model.memory import estimate_memory
from megatron_mdm.reporting.console import format_count, format_duration
from megatron_mdm.reporting.metrics import read_metrics
from megatron_mdm.training.description import count_run
from megatron_mdm.training.plan import RunPlan, find_missing_space, make_plan
from megatron_mdm.training.throughput import find_peak_flops, measure_matmul_flops

# Of the rate of a large matrix product: what small models reach on two cores (docs/performance.md).
_SHARE_OF_PEAK = 0.4
_MOST_EPOCHS, _LEAST_STEPS = 1000, 100
_GIB = 2**30
_SECONDS = "perf/step_seconds"
# The first two steps of four pay for memory and compilation.
_PROBE = (
    *("schedule.steps=4", "schedule.warmup_steps=1", "data.valid=[]", "hooks=[]"),
    *("reporting.log_every_steps=1", "reporting.wandb=off", "reporting.tensorboard=false"),
)


def summarize(config: Config, step_seconds: float | None = None) -> str:
    """What a run would do, in short, without starting anything.

    Args:
        config: The run.
        step_seconds: Of a step, measured; None: it is estimated.

    Returns:
        A line each for model, data, compute, memory and time, then remarks.

    Raises:
        MdmError: Something about the run does not fit.
    """
    plan = make_plan(config)
    facts = count_run(plan)
    lines = [
        f"{config.run.dir}: {config.objective.kind}, "
        f"{format_count(facts['parameters_with_embeddings'])} parameters, "
        f"{format_count(facts['parameters_without_embeddings'])} of them without embeddings",
        f"  data     {format_count(facts['unique_tokens'])} unique tokens, "
        f"{facts['epochs']:.4g} epochs: {format_count(facts['training_tokens'])} tokens",
        f"  steps    {plan.num_steps:,} of {config.batch.global_batch_size} windows of "
        f"{config.data.seq_length} tokens, {format_count(facts['tokens_per_step'])} tokens a step",
        f"  compute  {facts['flops_6nd']:.3g} FLOPs (6 N D, N without embeddings)",
        f"  layout   {facts['num_processes']} x {facts['device']}, {facts['dtype']}; data-parallel "
        f"{facts['data_parallel_size']}, {facts['micro_batches_per_step']} micro batches of "
        f"{config.batch.micro_batch_size}",
        f"  memory   {_describe_memory(plan)}",
        f"  time     {_describe_time(plan, facts, step_seconds)}",
    ]
    remarks = [*plan.data.remarks, *_find_remarks(plan, facts)]
    missing = find_missing_space(plan)
    remarks += [] if missing is None else [f"here {missing}"]
    return "\n".join([*lines, *(f"note: {remark}" for remark in remarks)])


def probe_step_seconds(config: Config) -> float:
    """Measures a step of a run on this machine: it is started for a few steps, and thrown away.

    Args:
        config: The run.

    Returns:
        Seconds of the fastest step after the first two.

    Raises:
        ConfigError: The run is one of several processes.
        MdmError: It could not start.
    """
    if make_plan(config).layout.world_size > 1:
        raise ConfigError(
            "--probe measures one process, and the run has several: leave it out, and see the "
            "first steps of the run."
        )
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        run_dir, recipe = Path(folder) / "run", Path(folder) / "run.yaml"
        recipe.write_text(dump_config(config), encoding="utf-8")
        done = subprocess.run(
            own_command("train", "--config", recipe, f"run.dir={run_dir}", *_PROBE),
            env=drop_launch(os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
            raise MdmError(f"the run cannot start: {said[-1].removeprefix('error: ')}")
        records = [one for one in read_metrics(run_dir / "metrics.jsonl") if _SECONDS in one]
    return float(min(record[_SECONDS] for record in records[2:]))


def measure_useful_flops() -> float:
    """FLOP/s that training is likely to reach on this machine's GPU or CPU.

    Returns:
        A share of what large matrix products reach.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    peak = find_peak_flops(device, dtype) or measure_matmul_flops(device, dtype)
    return _SHARE_OF_PEAK * peak


def _describe_memory(plan: RunPlan) -> str:
    dtype: Literal["fp32", "bf16"] = "bf16" if plan.dtype == torch.bfloat16 else "fp32"
    world_size = plan.layout.world_size
    needed = sum(asdict(estimate_memory(plan.config, world_size=world_size, dtype=dtype)).values())
    if plan.device.type == "cuda":
        there = torch.cuda.get_device_properties(plan.device).total_memory
        where = "this GPU"
    else:
        # All ranks of a machine without GPUs share its memory.
        needed *= world_size
        there, where = psutil.virtual_memory().total, "this machine"
    line = f"{needed / _GIB:.3g} GiB of tensors estimated; {where} has {there / _GIB:.3g} GiB"
    return line if needed <= 0.9 * there else f"{line}: TOO LITTLE"


def _describe_time(plan: RunPlan, facts: dict[str, Any], measured: float | None) -> str:
    if measured is not None:
        seconds, how = measured, "as two steps took here"
    else:
        stated = plan.config.reporting.peak_tflops
        peak = (stated or 0) * 1e12 or find_peak_flops(plan.device, plan.dtype)
        source = "stated" if stated else "data sheet's" if peak else "measured"
        peak = peak or measure_matmul_flops(plan.device, plan.dtype)
        work = (facts["flops_exact"] + facts["flops_recomputed"]) / plan.num_steps
        seconds = work / (_SHARE_OF_PEAK * peak * plan.layout.world_size)
        how = (
            f"at {_SHARE_OF_PEAK:.0%} of the {source} {peak / 1e12:.3g} TFLOP/s; --probe measures "
            "two steps"
        )
    total = seconds * plan.num_steps
    several = plan.layout.world_size
    hours = f", {total / 3600 * several:.3g} hours of all processes" if several > 1 else ""
    return f"about {format_duration(total)} of steps here, {seconds:.3g} s each{hours} ({how})"


def _find_remarks(plan: RunPlan, facts: dict[str, Any]) -> list[str]:
    remarks = []
    if facts["epochs"] > _MOST_EPOCHS:
        remarks.append(
            f"each window is seen {facts['epochs']:,.0f} times: fewer epochs or more data are "
            "rarely worse (arXiv 2507.15857 went up to 500)."
        )
    if plan.num_steps < _LEAST_STEPS:
        remarks.append(
            f"{plan.num_steps} steps are few to learn from: lower batch.global_batch_size="
            f"{plan.config.batch.global_batch_size} or train longer."
        )
    if not plan.config.data.valid:
        remarks.append("data.valid is empty: overfitting will not be seen.")
    return remarks
