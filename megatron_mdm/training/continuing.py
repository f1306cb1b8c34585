"""What a run goes on with: the configuration of its checkpoint, perhaps made longer since."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mdm.checkpoint.manifest import CheckpointManifest
from megatron_mdm.config import Config, parse_config
from megatron_mdm.config.continuation import list_computed_fields
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.mixture import OrderStart, count_stated_samples
from megatron_mdm.model.accounting import count_steps
from megatron_mdm.training.data_plan import DataPlan, order_samples


def check_same_run(config: Config, saved: CheckpointManifest, path: Path) -> None:
    """Refuses a configuration that computes something else than the run that saved a checkpoint.

    Its schedule is `continue_run`'s to judge.

    Args:
        config: The run as it is asked for.
        saved: What the checkpoint holds.
        path: Its folder.

    Raises:
        ConfigError: A field differs that must not.
    """
    before, now = _list_fields(parse_config(saved.config)), _list_fields(config)
    for field, value in now.items():
        if before.get(field) != value:
            was = _as_yaml(before.get(field))
            is_open = field.startswith(("optimizer.", "data.train"))
            branch = "branch the checkpoint (mdm branch), " if is_open else ""
            raise ConfigError(
                f"{field}={_as_yaml(value)} differs from the {was} of {path}: choose another "
                f"run.dir for the new run, {branch}or restore {field}={was}."
            )


def continue_run(
    config: Config, data: DataPlan, saved: CheckpointManifest, path: Path
) -> tuple[Config, DataPlan]:
    """Lets a run go on from its checkpoint, with another length where its schedule allows that.

    The learning rate of every step that was taken has to be that of the schedule now. A warm-up
    that is a share of the run's steps stays as long as it was. Of several sources each goes on
    with its passes; from here on they are mixed as in a run of the steps that are left.

    Args:
        config: The run as it is asked for.
        data: Its data.
        saved: What the checkpoint holds.
        path: Its folder.

    Returns:
        The run as it goes on, and its data.

    Raises:
        ConfigError: The checkpoint belongs to a run of another shape.
    """
    before = parse_config(saved.config)
    windows = [source.num_windows for source in data.train.sources]
    start = find_order_start(saved)
    num_before = count_steps(before, sum(windows), count_stated_samples(before.data.train, windows))
    is_longer = data.num_steps != num_before
    if is_longer or config.schedule != before.schedule:
        config = keep_warmup(config, before, num_before)
    if is_longer or config.schedule != before.schedule:
        _check_shape(config, data.num_steps, before, num_before, saved.step, path)
    is_mixed = is_longer and len(windows) > 1 and data.num_steps > saved.step
    if is_mixed:
        start = mark_order(before, windows, num_before, saved)
    if start is not None and data.num_steps > saved.step:
        order = order_samples(config, windows, data.num_steps, start)
        data = replace(data, order=order, order_start=start)
    remark = f"the run has {data.num_steps:,} steps now, after {num_before:,} before"
    if is_longer and remark not in data.remarks:
        data = replace(data, remarks=[*data.remarks, remark])
    return config, data


def find_order_start(saved: CheckpointManifest) -> OrderStart | None:
    """Where the sample order of a checkpoint's run begins; None: at its first sample."""
    start = saved.order_start
    return None if start is None else OrderStart(start.sample, start.visits)


def mark_order(
    config: Config, windows: Sequence[int], num_steps: int, saved: CheckpointManifest
) -> OrderStart:
    """Where every source of a run stands at a checkpoint.

    Args:
        config: The run that saved it.
        windows: Windows of each source.
        num_steps: Steps that it had.
        saved: The checkpoint.

    Returns:
        The start of an order that goes on from there.
    """
    order = order_samples(config, windows, num_steps, find_order_start(saved))
    return OrderStart(saved.consumed_samples, tuple(order.count_visits(saved.consumed_samples)))


def keep_warmup(config: Config, before: Config, num_before: int) -> Config:
    """The run with a warm-up of as many steps as it had, unless it says how many.

    Args:
        config: The run as it is asked for.
        before: The run that saved its checkpoint.
        num_before: Steps that it had.
    """
    if config.schedule.warmup_steps is not None:
        return config
    warmup = before.schedule.num_warmup_steps(num_before)
    kept = {"warmup_steps": warmup, "warmup_fraction": None}
    return config.model_copy(update={"schedule": config.schedule.model_copy(update=kept)})


def _check_shape(
    config: Config, num_steps: int, before: Config, num_before: int, taken: int, path: Path
) -> None:
    if num_steps < taken:
        raise ConfigError(
            f"The schedule ends the run at step {num_steps}, and {path} has taken {taken}: "
            "lengthen it, or choose another run.dir."
        )
    lr, min_lr = config.optimizer.lr, config.optimizer.min_lr
    for step in range(taken):
        now = config.schedule.rate(step, num_steps, lr=lr, min_lr=min_lr)
        was = before.schedule.rate(step, num_before, lr=lr, min_lr=min_lr)
        if now != was:
            raise ConfigError(
                f"The schedule (kind={config.schedule.kind}, {num_steps} steps) gives step "
                f"{step + 1} the learning rate {now:.4g}, and {path} was trained with {was:.4g} "
                f"(kind={before.schedule.kind}, {num_before} steps): restore the schedule, branch "
                "a checkpoint from before the rates part (mdm branch --from RUN --step N), or "
                "begin anew with schedule.kind=wsd or constant, whose runs can be made longer."
            )
        factor = config.schedule.weight_decay.factor(step, num_steps)
        factor_was = before.schedule.weight_decay.factor(step, num_before)
        if factor != factor_was:
            raise ConfigError(
                f"schedule.weight_decay (kind={config.schedule.weight_decay.kind}, {num_steps} "
                f"steps) gives step {step + 1} {factor:.4g} times the optimizer's weight decay, "
                f"and {path} was trained with {factor_was:.4g} times ({num_before} steps): restore "
                "the schedule, or branch a checkpoint from before the two part (mdm branch --from "
                "RUN --step N)."
            )


def _list_fields(config: Config) -> dict[str, Any]:
    """What must not change; a single source's own epochs are the run's length."""
    fields = list_computed_fields(config, but=("validation", "schedule"))
    if len(config.data.train) == 1:
        for name in ("epochs", "max_epochs", "weight"):
            fields["data.train"][0].pop(name)
    return fields


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
