"""What a run would do or is about to do, in words and numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch

from megatron_mdm.config import Config, dump_config
from megatron_mdm.core.command_line import format_next_steps
from megatron_mdm.data.ledger import format_ledger
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.model.accounting import (
    count_parameters,
    recomputed_flops_per_token,
    run_flops_per_token,
    six_nd_flops,
)
from megatron_mdm.model.memory import estimate_memory
from megatron_mdm.reporting.console import format_count
from megatron_mdm.training.data_plan import compute_ledger
from megatron_mdm.training.environment import tell_other_conditions
from megatron_mdm.training.plan import RunPlan, find_missing_space, make_plan


def describe(config: Config) -> str:
    """What a run would do, without starting anything.

    Returns:
        The resolved config as YAML, then sizes, counts and estimates.

    Raises:
        MdmError: Something about the run does not fit.
    """
    plan = make_plan(config)
    facts = count_run(plan)
    dtype: Literal["fp32", "bf16"] = "bf16" if plan.dtype == torch.bfloat16 else "fp32"
    memory = asdict(estimate_memory(config, world_size=plan.layout.world_size, dtype=dtype))
    lines = [dump_config(config).rstrip(), ""]
    lines += [f"{name:44} {_format_value(value)}" for name, value in facts.items()]
    lines += [f"{'estimated ' + name:44} {value / 2**30:.3f} GiB" for name, value in memory.items()]
    lines += [f"{'estimated total per rank':44} {sum(memory.values()) / 2**30:.3f} GiB"]
    lines += ["", format_ledger(compute_ledger(config, plan.data, plan.num_steps))]
    lines += list_remarks(plan)
    # The run may start on another machine, with another disk.
    missing = find_missing_space(plan)
    lines += [] if missing is None else [f"here {missing}"]
    return "\n".join(lines)


def count_run(plan: RunPlan) -> dict[str, Any]:
    """Counts that follow from a plan.

    Returns:
        Names with their units, and numbers.
    """
    config = plan.config
    objective, counts = build_objective(config), count_parameters(config.model)
    length = objective.mean_length(config.data.seq_length)
    samples = plan.num_steps * config.batch.global_batch_size
    # Windows are computed whole even if a sample is cut short; 6 N D counts what is left of it.
    tokens = samples * config.data.seq_length
    causal = objective.causal_share
    exact = run_flops_per_token(config, plan.data.head_share)
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


def announce(plan: RunPlan) -> str:
    """What the first rank says before the first step."""
    facts = count_run(plan)
    parameters = format_count(facts["parameters_with_embeddings"])
    line = (
        f"{plan.run_dir}: {plan.config.objective.kind}, {parameters} parameters, "
        f"{plan.num_steps} steps of {facts['tokens_per_step']} tokens, "
        f"{facts['epochs']:.2f} epochs, {facts['num_processes']} x {facts['device']}"
    )
    if plan.first_step >= plan.num_steps:
        line += f"; already finished at step {plan.first_step}: nothing to do"
    elif plan.first_step:
        line += f"; resuming from {plan.resume_from}"
    elif plan.initial_weights is not None:
        line += f"; beginning with the weights of {plan.initial_weights}"
    lines = [line]
    if 0 < plan.first_step < plan.num_steps:
        lines += filter(None, [tell_other_conditions(plan)])
    lines.append(format_ledger(compute_ledger(plan.config, plan.data, plan.num_steps)))
    lines += list_remarks(plan)
    return "\n".join(lines)


def list_remarks(plan: RunPlan) -> list[str]:
    """What a user should know of the run's losses and data."""
    remark = plan.config.objective.remark
    return [*([] if remark is None else [remark]), *plan.data.remarks]


def list_next_steps(plan: RunPlan) -> list[str]:
    """What a user may do with a finished run, a line each: a page, and text of the model."""
    steps: list[tuple[str, list[object]]] = [
        ("a page of its curves", ["report", "--run", plan.run_dir])
    ]
    if plan.config.objective.runs_as is not None:
        export = plan.run_dir / "hf"
        steps += [
            ("export", ["convert", "to-hf", "--run", plan.run_dir, "--output", export]),
            ("then text", ["generate", "--model", export, "--prompt", "TEXT"]),
        ]
    return format_next_steps(steps)


def _format_value(value: Any) -> str:
    if isinstance(value, float) and abs(value) >= 1e6:
        return f"{value:.4e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
