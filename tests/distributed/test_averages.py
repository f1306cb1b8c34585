"""Averages of the weights: the same on every layout, saved, resumed, never in training's way."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import averages
import numpy as np
import pytest
import torch
from averages import NUM_STEPS, name_step
from layouts import LAYOUTS, layout
from numpy.typing import NDArray
from worlds import World

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.reshape import reshard_checkpoint
from megatron_mdm.checkpoint.storage import CheckpointReader

STEP_TOKENS = 8 * 16
HORIZON = 300
# An epoch of 12 windows ends after steps 2 and 3, since a step takes 8 of them.
EPOCH_ENDS = (2, 3)
HOOKS = {
    "model.tie_embeddings": True,
    "hooks": [
        {"kind": "ema", "horizon_tokens": HORIZON},
        {"kind": "ema", "name": "slow", "horizon_tokens": 10**9, "warm": True},
        {"kind": "swa"},
    ],
}
ONE = (1, layout(zero=0))
NAMES = ("tp2-zero1", "pp2-zero1", "dp2-zero2", "dp2-zero3")

GetWorld = Callable[[int], World]
FloatArray = NDArray[np.float64]


@pytest.fixture(scope="module")
def one_process(world_of: GetWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of one process: its folder, and the loss of each of its weights."""
    folder = tmp_path_factory.mktemp("one")
    (held_out,) = world_of(1).run(averages.train, overrides=ONE[1] | HOOKS, folder=str(folder))
    return {"folder": folder, "held_out": held_out}


def read_weights(folder: Path, step: int, weights: str = "raw") -> dict[str, FloatArray]:
    reader = CheckpointReader(folder / name_step(step), weights)
    return {name: reader.load(name).double().numpy() for name in reader.list_names()}


def average_by_hand(folder: Path, decays: list[float]) -> dict[str, FloatArray]:
    """y = b y + (1 - b) p from y = 0, divided by what is missing."""
    total: dict[str, FloatArray] = {}
    for step, decay in enumerate(decays, start=1):
        for name, value in read_weights(folder, step).items():
            total[name] = decay * total.get(name, 0.0) + (1 - decay) * value
    return {name: value / (1 - math.prod(decays)) for name, value in total.items()}


def check_averages(folder: Path) -> None:
    """Are the averages of the last checkpoint those of the weights of all of them?"""
    verify_checkpoint(folder / name_step(NUM_STEPS))
    points = [read_weights(folder, step) for step in EPOCH_ENDS]
    by_hand = {
        "ema": average_by_hand(folder, NUM_STEPS * [math.exp(-STEP_TOKENS / HORIZON)]),
        "slow": average_by_hand(folder, [(1 + n) / (10 + n) for n in range(1, NUM_STEPS + 1)]),
        "swa": {name: (value + points[1][name]) / 2 for name, value in points[0].items()},
    }
    for name, expected in by_hand.items():
        found = read_weights(folder, NUM_STEPS, name)
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            np.testing.assert_allclose(found[parameter], value, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", NAMES)
def test_averages_are_those_of_one_process(
    world_of: GetWorld, tmp_path: Path, one_process: dict[str, Any], name: str
) -> None:
    size, parallel = LAYOUTS[name]
    ranks = world_of(size).run(
        averages.train, overrides=parallel | HOOKS, folder=str(tmp_path), background=size == 2
    )
    check_averages(tmp_path)
    for held_out in ranks:
        assert held_out["raw again"] == held_out["raw"]
        for weights, loss in one_process["held_out"].items():
            assert held_out[weights] == pytest.approx(loss, rel=1e-5)


def test_one_process_averages_its_own_weights(one_process: dict[str, Any]) -> None:
    check_averages(one_process["folder"])
    held_out = one_process["held_out"]
    assert held_out["raw again"] == held_out["raw"]
    assert len({*held_out.values()}) == len(held_out) - 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("dp2-zero1", "bf16"), ("dp2-zero3", "bf16"), ("pp2-zero2", "bf16"), ("tp2-zero0", "fp32")],
)
def test_a_resumed_run_has_the_averages_bit_for_bit_and_judging_changes_nothing(
    world_of: GetWorld, tmp_path: Path, name: str, dtype: str
) -> None:
    size, parallel = LAYOUTS[name]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = {"overrides": parallel | HOOKS, "dtype": dtype}
    ended = world_of(size).run(averages.train, folder=str(whole), **common)
    # The uninterrupted run has judged its averages after the step that the other goes on from.
    saved = whole / name_step(averages.JUDGED_AFTER)
    assert (
        world_of(size).run(
            averages.train, folder=str(resumed), resume_from=str(saved), judges=False, **common
        )
        == ended
    )
    left, right = (CheckpointReader(folder / name_step(NUM_STEPS)) for folder in (whole, resumed))
    assert left.manifest.stored_kinds == right.manifest.stored_kinds
    assert left.manifest.stored_kinds[-3:] == ("hook.ema", "hook.slow", "hook.swa")
    assert left.manifest.state == right.manifest.state
    for parameter in left.list_names():
        for kind in left.manifest.stored_kinds:
            assert torch.equal(left.load(parameter, kind), right.load(parameter, kind)), kind


@pytest.mark.parametrize("name", ["tp2-sp-pp2-zero2", "dp2-zero3"])
def test_averages_go_on_under_another_layout(
    world_of: GetWorld, tmp_path: Path, one_process: dict[str, Any], name: str
) -> None:
    size, parallel = LAYOUTS[name]
    saved = one_process["folder"] / name_step(averages.JUDGED_AFTER)
    if name == "dp2-zero3":
        # By way of a checkpoint that was divided anew, offline.
        saved = reshard_checkpoint(
            saved, tmp_path / "reshaped", tensor_parallel_size=2, pipeline_parallel_size=2
        )
    found = world_of(size).run(
        averages.train,
        overrides=parallel | HOOKS,
        folder=str(tmp_path / "run"),
        resume_from=str(saved),
    )[0]
    for weights, loss in one_process["held_out"].items():
        assert found[weights] == pytest.approx(loss, rel=1e-5)
    for step in range(1, averages.JUDGED_AFTER + 1):
        shutil.copytree(one_process["folder"] / name_step(step), tmp_path / "run" / name_step(step))
    check_averages(tmp_path / "run")
