"""Dropout is a function of (seed, step, micro batch, rank)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cases
import numpy as np
import observations
import pytest
from layouts import LAYOUTS
from worlds import World

GetWorld = Callable[[int], World]

_DROPOUT = {"model.hidden_dropout": 0.2, "model.attention_dropout": 0.2}


@pytest.mark.parametrize(
    "name", ["zero1", "tp2-zero1", "tp2-sp-zero1", "pp2-zero1", "tp2-dp2-zero3"]
)
def test_a_step_is_repeated_to_the_bit_and_steps_differ(world_of: GetWorld, name: str) -> None:
    size, parallel = LAYOUTS[name]
    overrides = _DROPOUT | parallel
    world = world_of(size)
    third, fourth, again = world.run(
        observations.losses_of_steps, overrides=overrides, steps=[3, 4, 3]
    )[0]
    assert third == again
    assert third != fourth
    # A resumed run starts at its step, with another history of draws.
    assert world.run(observations.losses_of_steps, overrides=overrides, steps=[3])[0] == [third]
    other_seed = overrides | {"run.seed": 2}
    assert world.run(observations.losses_of_steps, overrides=other_seed, steps=[3])[0] != [third]


def test_tensor_parallel_ranks_share_hidden_dropout_and_not_attention_dropout(
    world_of: GetWorld,
) -> None:
    overrides = LAYOUTS["tp2-zero1"][1] | {"model.attention_dropout": 0.5}
    (first,), (second,) = world_of(2).run(
        observations.dropout_draws, overrides=overrides, places=[(0, 0)]
    )
    assert set(np.unique(first["hidden"])) == {1.0, 3.0}
    np.testing.assert_array_equal(first["hidden"], second["hidden"])
    assert np.ptp(first["attention"]) > 0
    assert (first["attention"] != second["attention"]).any()
    assert (first["private"] != second["private"]).all()


@pytest.mark.parametrize("name", ["dp2-zero1", "pp2-zero1"])
def test_replicas_and_stages_draw_apart(world_of: GetWorld, name: str) -> None:
    overrides = LAYOUTS[name][1] | {"model.attention_dropout": 0.5}
    (first,), (second,) = world_of(2).run(
        observations.dropout_draws, overrides=overrides, places=[(0, 0)]
    )
    for kind in first:
        assert (first[kind] != second[kind]).any()


def test_steps_and_micro_batches_draw_apart(world_of: GetWorld) -> None:
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    overrides = {"model.attention_dropout": 0.5}
    (draws,) = world_of(1).run(observations.dropout_draws, overrides=overrides, places=places)
    for one, other in itertools.combinations(draws, 2):
        for kind in one:
            assert (one[kind] != other[kind]).any()


@pytest.mark.parametrize("name", ["tp2-zero0", "tp2-zero1", "tp2-sp-zero1"])
def test_replicated_weights_stay_equal_to_the_bit(world_of: GetWorld, name: str) -> None:
    overrides = _DROPOUT | {"model.qk_norm": True} | LAYOUTS[name][1]
    first, second = world_of(2).run(
        observations.replicated_weights, overrides=overrides, num_steps=5
    )
    assert len(first) == 17
    for weight, values in first.items():
        assert (values != 1.0).all(), weight
        np.testing.assert_array_equal(values, second[weight], err_msg=weight)


@pytest.mark.parametrize("name", ["tp2-sp-zero1", "pp2-zero1"])
def test_evaluation_drops_nothing(world_of: GetWorld, name: str) -> None:
    size, parallel = LAYOUTS[name]
    with_dropout, without = (
        world_of(size).run(cases.evaluate_untrained, overrides=overrides | parallel)[0]
        for overrides in (_DROPOUT, {})
    )
    assert with_dropout == without
