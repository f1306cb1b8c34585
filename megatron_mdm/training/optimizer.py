"""AdamW and the learning rate: a pure function of the step, so there is no scheduler to save."""

from __future__ import annotations

import math

import torch

from megatron_mdm.config import OptimizerConfig, ScheduleConfig


def build_optimizer(module: torch.nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    Args:
        module: Its parameters are optimised; vectors (norm weights and biases) are not decayed.
        optimizer: Settings.

    Returns:
        The optimizer, in PyTorch's fused kernel on CPUs and GPUs.
    """
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=True,
    )


def learning_rate(
    step: int, num_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> float:
    """Learning rate of a step.

    Args:
        step: Optimizer step, 0 to num_steps - 1.
        num_steps: Steps of the run.
        optimizer: Peak and final learning rate.
        schedule: Shape and warm-up.

    Returns:
        The rate. Warm-up rises linearly and reaches the peak at its last step; cosine ends at
        min_lr; constant stays at the peak; wsd falls linearly to min_lr in its last part.
    """
    warmup = warmup_steps(num_steps, schedule)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if schedule.kind == "constant":
        return optimizer.lr
    span = optimizer.lr - optimizer.min_lr
    if schedule.kind == "cosine":
        progress = (step + 1 - warmup) / max(1, num_steps - warmup)
        return optimizer.min_lr + 0.5 * span * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = max(1, round(schedule.decay_fraction * num_steps))
    remaining = max(0, num_steps - step - 1)
    return optimizer.min_lr + span * min(1.0, remaining / decay)


def warmup_steps(num_steps: int, schedule: ScheduleConfig) -> int:
    """Steps of warm-up.

    Args:
        num_steps: Steps of the run.
        schedule: Steps, a share, or neither (1%).

    Returns:
        Number of steps, 0 or more.
    """
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    share = 0.01 if schedule.warmup_fraction is None else schedule.warmup_fraction
    return round(share * num_steps)
