"""Components outside the package train, are saved and go on, with no edit inside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import resuming
from layouts import LAYOUTS
from worlds import World

from megatron_mdm.checkpoint.manifest import read_manifest
from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.model.memory import estimate_memory
from megatron_mdm.training.plan import make_plan

pytestmark = pytest.mark.slow

MOMENTUM = {"optimizer.kind": "own_training:MomentumConfig"}

GetWorld = Callable[[int], World]


@pytest.mark.parametrize(
    "name", ["dp2-zero0", "dp2-zero1", "dp2-zero2", "dp2-zero3", "tp2-pp2-zero1"]
)
def test_an_optimizer_of_ones_own_goes_on_bit_for_bit(
    world_of: GetWorld, tmp_path: Path, name: str
) -> None:
    size, parallel = LAYOUTS[name]
    common = {"overrides": parallel | MOMENTUM, "folder": str(tmp_path)}
    uninterrupted = world_of(size).run(resuming.run, resume=False, **common)
    manifest = read_manifest(tmp_path / f"step_{resuming.SAVED_AFTER:08d}")
    assert manifest.stored_kinds == ("weight", "momentum_buffer")
    assert world_of(size).run(resuming.run, resume=True, **common) == uninterrupted
    # Its state counts: a run that forgets it goes on otherwise.
    forgetful = common | {"overrides": parallel | MOMENTUM | {"optimizer.momentum": 0.0}}
    assert world_of(size).run(resuming.run, resume=True, **forgetful) != uninterrupted


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [("dp2-zero3", "tp2-zero1"), ("pp2-zero2", "dp2-zero0"), ("tp2-zero0", "dp2-zero3")],
)
def test_an_optimizer_of_ones_own_goes_on_under_another_layout(
    world_of: GetWorld, tmp_path: Path, saved_by: str, resumed_by: str
) -> None:
    curves = [
        world_of(2).run(
            resuming.run,
            overrides=LAYOUTS[name][1] | MOMENTUM,
            folder=str(tmp_path),
            resume=name == resumed_by,
        )[0]
        for name in (saved_by, resumed_by)
    ]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["tp2-dp2-zero1", "tp2-dp2-zero3", "pp2-zero2", "dp2-zero0"])
def test_an_optimizer_of_ones_own_sees_whole_parameters_under_any_layout(
    world_of: GetWorld, name: str
) -> None:
    unit_steps = {"optimizer.kind": "own_training:UnitStepConfig", "optimizer.lr": 0.1}
    expected = world_of(1).run(cases.train, overrides=unit_steps)[0]
    size, parallel = LAYOUTS[name]
    (curves, *_) = world_of(size).run(cases.train, overrides=parallel | unit_steps)
    cases.assert_same_run(curves, expected, rtol=1e-5)


def test_memory_is_that_of_the_optimizers_states_and_of_what_hooks_keep_of_the_weights() -> None:
    keeping = {"hooks": [{"kind": "own_training:FarthestConfig"}]}
    adamw, momentum, kept = (
        estimate_memory(cases.config_of(overrides), world_size=1, dtype="fp32").optimizer_bytes
        for overrides in ({}, MOMENTUM, MOMENTUM | keeping)
    )
    assert adamw == kept == 2 * momentum


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A run whose optimizer, schedule and hook live in this folder."""
    with ShardWriter(tmp_path / "tokens", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 100, 1000))
        writer.finish()
    return {
        "run": {"dir": str(tmp_path / "run"), "seed": 1, "device": "cpu", "num_threads": 1},
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "ffn_hidden_size": 32,
            "vocab_size": 100,
        },
        "data": {"train": [{"path": str(tmp_path / "tokens")}], "seq_length": 16},
        "batch": {"global_batch_size": 4},
        "optimizer": {"kind": "own_training:MomentumConfig", "momentum": 0.8},
        "schedule": {"kind": "own_training:LineConfig", "steps": 6},
        "checkpoint": {"every_steps": 3},
        "hooks": [{"kind": "own_training:LargestLossConfig", "every_steps": 2}],
        "reporting": {"peak_tflops": 0.1},
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"optimizer": {"kind": "own_training:WholeMomentumConfig"}},
            ["own_training:WholeMomentumConfig", "parallel.zero_stage=1", "use", "zero_stage=0"],
        ),
        (
            {"optimizer": {"kind": "own_training:RowMomentumConfig"}},
            ["optimizer.kind=own_training:RowMomentumConfig", "rows", "the parameter's shape"],
        ),
        ({"hooks": [{}]}, ["hooks.kind=None", "package.module:Class"]),
        ({"hooks": [{"kind": "own_training:MomentumConfig"}]}, ["is not a hook", "HookConfig"]),
        (
            {"hooks": 2 * [{"kind": "own_training:LargestLossConfig"}]},
            ["hooks.1.kind=own_training:LargestLossConfig", "'LargestLoss'", "another name"],
        ),
        (
            {"hooks": [{"kind": f"own_training:{one}Config"} for one in ("Farthest", "Near")]},
            ["hooks.1.kind=own_training:NearConfig", "'farthest' of every weight", "another name"],
        ),
        (
            {"hooks": [{"kind": "own_training:SetConfig"}]},
            ["hooks.0.kind=own_training:SetConfig", "JSON", "state_dict"],
        ),
    ],
)
def test_what_cannot_take_part_is_refused_before_anything_starts(
    tree: dict[str, Any], change: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(parse_config(tree | change))
    for part in told:
        assert part in str(caught.value)
