"""A step: shapes of the output layer that repeat, one wait for the device, sums rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import observations
import pytest
import step_probe
from layouts import LAYOUTS
from worlds import World

GetWorld = Callable[[int], World]

# A micro batch has 32 positions, so most of those with 5 overflow, and one with 64 never does.
CAPACITIES = [1, 5, 64]


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("zero1", {"model.tie_embeddings": True}),
        ("tp2-sp-zero1", {"objective.stochastic_length_ratio": 0.5}),
        ("pp2-zero2", {"objective.kind": "ar"}),
    ],
)
def test_padded_positions_change_nothing(
    world_of: GetWorld, name: str, recipe: dict[str, Any], capacity: int
) -> None:
    size, parallel = LAYOUTS[name]
    world = world_of(size)
    exact = world.run(cases.train, overrides=recipe | parallel)[0]
    padded = world.run(
        cases.train, overrides=recipe | parallel | {"batch.prediction_capacity": capacity}
    )[0]
    cases.assert_same_run(padded, exact, rtol=1e-6)


@pytest.mark.parametrize("capacity", [None, *CAPACITIES])
def test_every_position_has_its_place_and_shapes_are_multiples(
    world_of: GetWorld, capacity: int | None
) -> None:
    overrides = {} if capacity is None else {"batch.prediction_capacity": capacity}
    seen = world_of(1).run(step_probe.positions_of_batches, overrides=overrides, num_steps=6)[0]
    for weights_BS, positions_M in seen:
        real_M = positions_M[positions_M >= 0]
        np.testing.assert_array_equal(real_M, np.flatnonzero(weights_BS))
        missing = len(positions_M) - len(real_M)
        if capacity is None:
            assert missing == 0
        else:
            assert len(positions_M) % capacity == 0
            assert missing < capacity or len(positions_M) == capacity
    assert min(np.count_nonzero(weights_BS) for weights_BS, _ in seen) == 0


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_padding_alone_is_a_loss_of_zero(world_of: GetWorld, capacity: int) -> None:
    """The step in the middle predicts nothing."""
    exact = world_of(1).run(observations.train_with_empty_batches, overrides={})[0]
    padded = world_of(1).run(
        observations.train_with_empty_batches,
        overrides={"batch.prediction_capacity": capacity},
    )[0]
    assert padded["losses"][1] == 0.0
    cases.assert_same_run(padded, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("zero0", {}),
        ("zero1", {"objective.stochastic_length_ratio": 0.5}),
        ("zero2", {"objective.kind": "ar"}),
        ("zero3", {"parallel.recompute": "full"}),
        # Not with sequence parallelism: Megatron compares states of the CPU's generator then, which
        # are on the host wherever the model is.
        ("tp2-zero1", {"parallel.recompute": "selective"}),
        ("pp2-zero1", {}),
    ],
)
def test_the_host_reads_as_often_for_many_micro_batches_as_for_two(
    world_of: GetWorld, name: str, recipe: dict[str, Any]
) -> None:
    """Each reading of a number waits for all kernels before it: once per step is enough."""
    size, parallel = LAYOUTS.get(name, (1, {"parallel.zero_stage": 0}))
    few, many = (
        world_of(size).run(
            step_probe.readings_of_a_step,
            overrides=recipe | parallel | {"batch.global_batch_size": 2 * micro_batches},
        )
        for micro_batches in (2, 6)
    )
    for fewer, more in zip(few, many, strict=True):
        assert more == fewer
        assert sum(fewer.values()) > 0
    if name == "zero0":
        # The gradient norm, which says whether the update is made.
        assert few == [{"aten._local_scalar_dense.default": 1}]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_host_never_waits_for_an_idle_device(world_of: GetWorld, zero_stage: int) -> None:
    """Beyond two steps, after which DeepSpeed's own timer of throughput would begin."""
    overrides = {"parallel.zero_stage": zero_stage}
    waits = world_of(1).run(step_probe.waits_of_steps, overrides=overrides, num_steps=4)
    assert waits == [0]


@pytest.mark.parametrize("name", ["pp2-zero1", "pp2x2-zero2"])
def test_bf16_gradients_of_a_pipeline_are_rounded_once(world_of: GetWorld, name: str) -> None:
    """Under 32 micro batches; added up in bf16 some would be off by several of its units."""
    size, parallel = LAYOUTS[name]
    overrides = parallel | {"batch.global_batch_size": 64}
    for parameters in world_of(size).run(step_probe.summed_gradients, overrides=overrides):
        assert len(parameters) > 10
        for exact, found in parameters:
            assert (np.abs(found - exact) <= np.abs(exact) * (2**-8 + 1e-4) + 1e-7).all()
