"""What ranks do in the tests of skipped steps: train, with bad steps in between or without."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import Overrides, batches_of, engine_of, mean_loss, stage_of
from numpy.typing import NDArray

from megatron_mdm.data.loader import Batch
from megatron_mdm.training.engine import Engine, StepResult

FAULTS = ("weight", "target", "gradient", "refused")


class BadStep(NamedTuple):
    """A step with a fault.

    Attributes:
        loss: Mean loss, nats per token.
        grad_norm: As the engine reports it.
        is_applied: Was the update made?
        changed: Names of what differs between before and after.
    """

    loss: float
    grad_norm: float
    is_applied: bool
    changed: list[str]


class Outcome(NamedTuple):
    """A rank's run.

    Attributes:
        good_applied: Was the update of each good step made?
        bad: The bad steps, by their fault.
        adam_steps: Adam's counts at the end.
        state: All weights and moments of this rank at the end.
    """

    good_applied: list[bool]
    bad: dict[str, BadStep]
    adam_steps: set[int]
    state: dict[str, NDArray[np.float32]]


def train(overrides: Overrides, dtype: str, with_faults: bool) -> Outcome:
    """Trains on five good steps, with a bad one after each of the first four, or without.

    The faults: `weight`: one weight of the last replica's first micro batch is NaN; `target`: one
    of its targets is the mask token, whose loss is infinite; `gradient`: the last replica's first
    gradient is NaN behind the first layer; `refused`: the step is not accepted.

    Args:
        overrides: As for `cases.config_of`.
        dtype: `fp32` or `bf16`.
        with_faults: Are there bad steps?

    Returns:
        What happened.
    """
    good, bad = [], {}
    with stage_of(overrides, dtype) as stage, engine_of(stage, dtype) as engine:
        mesh, size = stage.mesh, stage.config.batch.global_batch_size
        batches = batches_of(stage.config, mesh.dp.rank, mesh.dp.size)
        is_hit = mesh.dp.rank == mesh.dp.size - 1
        for step, fault in enumerate((*FAULTS, None)):
            good.append(engine.train_step(step, batches.read_step(step), 3e-3).is_applied)
            if with_faults and fault is not None:
                before = state_of(engine)
                result = bad_step(engine, batches.read_step(step + 5), fault, is_hit)
                after = state_of(engine)
                changed = [name for name in before if not same_bits(before[name], after[name])]
                loss = mean_loss(engine, result.loss_sum, size)
                bad[fault] = BadStep(loss, result.grad_norm, result.is_applied, changed)
        steps = {int(engine.states.get_numbers()["step"])}
        return Outcome(good, bad, steps, state_of(engine))


def bad_step(engine: Engine, batches: list[Batch], fault: str, is_hit: bool) -> StepResult:
    """A step with a fault.

    Args:
        engine: The engine.
        batches: Of the step.
        fault: As for `train`.
        is_hit: Does this rank have it?

    Returns:
        The step's result.
    """
    accepts, hook = None, None
    if fault == "refused":

        def accepts(_: torch.Tensor) -> bool:
            return False

    elif is_hit and fault == "gradient":
        hook = engine.model.decoder.layers[0].mlp.register_forward_hook(_spoil_gradient)
    elif is_hit:
        batches[0] = spoiled(batches[0], fault, engine._config.model.mask_id)
    result = engine.train_step(0, batches, 3e-3, accepts)
    if hook is not None:
        hook.remove()
    return result


def _spoil_gradient(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
    outputs[0].register_hook(lambda gradient: gradient * math.nan)


def spoiled(batch: Batch, fault: str, mask_id: int) -> Batch:
    """A micro batch with one bad number, at its first place that counts."""
    place = tuple(np.argwhere(batch.weights_BS > 0)[0])
    if fault == "weight":
        weights_BS = batch.weights_BS.copy()
        weights_BS[place] = np.nan
        return dataclasses.replace(batch, weights_BS=weights_BS)
    targets_BS = batch.targets_BS.copy()
    targets_BS[place] = mask_id
    return dataclasses.replace(batch, targets_BS=targets_BS)


def state_of(engine: Engine) -> dict[str, Any]:
    """Weights, moments, and the weights that the forward pass uses."""
    state = {
        f"{kind}/{shard.name}": engine.states.get(shard.parameter, kind).numpy()
        for shard in engine.shards
        for kind in engine.states.list_kinds(shard)
    }
    for shard in engine.shards:
        local = getattr(shard.parameter, "ds_tensor", shard.parameter)
        state[f"used/{shard.name}"] = local.detach().float().numpy().copy()
    return state


def same_bits(left: NDArray[np.float32], right: NDArray[np.float32]) -> bool:
    """Are two arrays equal bit for bit?"""
    return left.shape == right.shape and left.tobytes() == right.tobytes()
