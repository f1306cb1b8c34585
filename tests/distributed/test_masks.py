"""Noise is a function of the position: what each rank's model receives, on every layout."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import observations
import pytest
from layouts import LAYOUTS
from worlds import World

GetWorld = Callable[[int], World]
Received = Callable[[str], list[dict[str, Any]]]

_OVERRIDES = {"data.seq_length": 64, "objective.stochastic_length_ratio": 0.3}
_NUM_STEPS = 4
_KINDS = ("inputs", "targets", "weights")


@pytest.fixture(scope="module")
def received(world_of: GetWorld) -> Received:
    """What each rank of a layout receives."""

    @functools.cache
    def get(name: str) -> list[dict[str, Any]]:
        size, parallel = LAYOUTS[name]
        overrides = _OVERRIDES | parallel
        return world_of(size).run(
            observations.received_batches, overrides=overrides, num_steps=_NUM_STEPS
        )

    return get


def _samples(rank: dict[str, Any], step: int) -> list[tuple[bytes, ...]]:
    parts = [rank[kind][step].reshape(-1, 64) for kind in _KINDS]
    return [tuple(part[index].tobytes() for part in parts) for index in range(len(parts[0]))]


@pytest.mark.parametrize(
    "name", ["tp2-zero1", "pp2-zero1", "tp2-sp-pp2-zero2", "tp2-dp2-zero1", "pp2-dp2-zero1"]
)
def test_tensor_and_pipeline_peers_receive_the_same_masks(received: Received, name: str) -> None:
    replicas = defaultdict(list)
    for rank in received(name):
        replicas[rank["data_rank"]].append(rank)
    for first, *others in replicas.values():
        assert others
        for other, kind in itertools.product(others, _KINDS):
            np.testing.assert_array_equal(other[kind], first[kind])


@pytest.mark.parametrize("name", ["dp2-zero1", "dp4-zero1", "tp2-dp2-zero1", "pp2-dp2-zero1"])
def test_replicas_together_receive_the_global_batch_of_one_process(
    received: Received, name: str
) -> None:
    (alone,) = received("zero1")
    replicas = {rank["data_rank"]: rank for rank in received(name)}
    for step in range(_NUM_STEPS):
        together = [sample for rank in replicas.values() for sample in _samples(rank, step)]
        assert len(together) == 8
        assert sorted(together) == sorted(_samples(alone, step))


def _masks(rank: dict[str, Any]) -> np.ndarray:
    return (rank["inputs"] == rank["mask_id"]).reshape(_NUM_STEPS, -1, 64)


def _assert_draws_apart(masks: np.ndarray) -> int:
    """Not equal and, where that says something, not nested either; returns how often it did.

    Two masks made of the same draws at different times are nested: the smaller lies within the
    larger. Independent ones are so by chance if the smaller is tiny or the larger almost full.
    """
    num_compared = 0
    for one, other in itertools.combinations(masks, 2):
        assert (one != other).any()
        small, large = sorted((one, other), key=np.sum)
        if small.sum() >= 8 and large.sum() <= 40:
            assert (small & ~large).any()
            num_compared += 1
    return num_compared


def test_no_two_samples_of_a_global_batch_share_a_mask(received: Received) -> None:
    masks_RSBL = np.stack([_masks(rank) for rank in received("dp4-zero1")])
    compared = [_assert_draws_apart(np.concatenate(masks_RSBL[:, step])) for step in range(4)]
    assert min(compared) >= 3


def test_every_visit_of_a_window_has_a_mask_of_its_own(received: Received) -> None:
    (alone,) = received("zero1")
    visits = defaultdict(list)
    for x0, mask in zip(
        alone["targets"].reshape(-1, 64), np.concatenate(_masks(alone)), strict=True
    ):
        visits[x0.tobytes()].append(mask)
    assert len(visits) == cases.NUM_WINDOWS
    assert {len(masks) for masks in visits.values()} == {2, 3}
    assert sum(_assert_draws_apart(np.stack(masks)) for masks in visits.values()) >= 3


def test_masked_positions_are_the_predicted_ones(received: Received) -> None:
    for rank in received("pp2-dp2-zero1"):
        masked = rank["inputs"] == rank["mask_id"]
        np.testing.assert_array_equal(masked, rank["weights"] > 0)
        np.testing.assert_array_equal(rank["inputs"][~masked], rank["targets"][~masked])
