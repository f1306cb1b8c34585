"""Muon steps whole matrices: every layout and ZeRO stage trains like one process, and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import communication_probe
import numpy as np
import pytest
import resuming
import rounds_probe
from layouts import LAYOUTS, layout
from worlds import World

from megatron_mdm.checkpoint.manifest import read_manifest
from megatron_mdm.checkpoint.reshape import reshard_checkpoint
from megatron_mdm.studies.costs.communication import step_transfers

GetWorld = Callable[[int], World]
Curves = dict[str, list[float]]

# Clipping is active in each step, so that orthogonalizing before it would show.
MUON: dict[str, Any] = {"optimizer.kind": "muon", "optimizer.clip_grad": 0.1}
OTHERS = MUON | {
    "model.tie_embeddings": True,
    "model.num_query_groups": 2,
    "model.qkv_bias": True,
    "model.qk_norm": True,
    "optimizer.coefficients": "polar_express",
    "optimizer.scale": "keller",
    "optimizer.split_qkv": False,
    "optimizer.embedding_lr_factor": 0.5,
    "optimizer.vector_lr_factor": 2.0,
}
RECIPES = {"plain": MUON, "others": OTHERS}


@pytest.fixture(scope="module")
def one_process(world_of: GetWorld) -> Callable[..., Curves]:
    known: dict[str, Curves] = {}

    def get(recipe: str, **settings: Any) -> Curves:
        key = f"{recipe} {settings}"
        if key not in known:
            overrides = RECIPES[recipe] | layout(zero=settings.pop("zero", 0))
            known[key] = world_of(1).run(cases.train, overrides=overrides, **settings)[0]
        return known[key]

    return get


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("dp2-zero1", "plain"),
        ("zero3", "plain"),
        ("dp2-zero0", "others"),
        ("dp2-zero2", "others"),
        ("dp2-zero3", "others"),
        ("tp2-zero0", "plain"),
        ("tp2-sp-zero1", "others"),
        ("pp2-zero1", "others"),
        ("tp2-dp2-zero1", "others"),
        ("tp2-dp2-zero3", "plain"),
        ("tp2-sp-pp2-zero2", "others"),
        ("pp2x2-dp2-zero1", "plain"),
        ("pp4-zero1", "others"),
    ],
)
def test_a_layout_trains_like_one_process(
    world_of: GetWorld, one_process: Callable[..., Curves], name: str, recipe: str
) -> None:
    size, parallel = LAYOUTS[name]
    ranks = world_of(size).run(cases.train, overrides=RECIPES[recipe] | parallel)
    for curves in ranks:
        cases.assert_same_run(curves, one_process(recipe), rtol=1e-5)


@pytest.mark.parametrize("name", ["dp2-zero1", "tp2-zero0"])
def test_a_large_model_is_made_whole_in_rounds(
    world_of: GetWorld, one_process: Callable[..., Curves], name: str
) -> None:
    size, parallel = LAYOUTS[name]
    # Fewer than the largest matrix has: a round for each of its size.
    ranks = world_of(size).run(
        rounds_probe.train_in_rounds, overrides=MUON | parallel, round_elements=1000
    )
    for curves in ranks:
        cases.assert_same_run(curves, one_process("plain"), rtol=1e-5)


def test_the_runs_would_show_a_wrong_update(one_process: Callable[..., Curves]) -> None:
    trained, frozen = one_process("plain"), one_process("plain", lr=0.0)
    assert all(norm > 0.1 for norm in trained["grad_norms"])
    assert abs(trained["losses"][-1] / frozen["losses"][-1] - 1) > 0.01
    assert one_process("others") != one_process("plain")


@pytest.mark.parametrize("name", ["dp2-zero1", "tp2-zero1", "pp2-zero1"])
def test_a_bf16_layout_trains_like_one_bf16_process(
    world_of: GetWorld, one_process: Callable[..., Curves], name: str
) -> None:
    size, parallel = LAYOUTS[name]
    expected = one_process("plain", zero=1, dtype="bf16")
    curves = world_of(size).run(cases.train, overrides=MUON | parallel, dtype="bf16")[0]
    # As of AdamW, in `test_layouts.py`.
    np.testing.assert_allclose(curves["losses"], expected["losses"], rtol=2**-8)
    np.testing.assert_allclose(curves["held_out"], expected["held_out"], rtol=2**-8)


@pytest.mark.parametrize("name", ["dp2-zero1", "tp2-dp2-zero3", "tp2-zero0"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    world_of: GetWorld, tmp_path: Path, name: str
) -> None:
    size, parallel = LAYOUTS[name]
    common = {"overrides": parallel | OTHERS, "folder": str(tmp_path)}
    uninterrupted = world_of(size).run(resuming.run, resume=False, **common)
    assert world_of(size).run(resuming.run, resume=True, **common) == uninterrupted
    # Its momentum counts: a run that forgets it goes on otherwise.
    forgetful = common | {"overrides": parallel | OTHERS | {"optimizer.momentum": 0.0}}
    assert world_of(size).run(resuming.run, resume=True, **forgetful) != uninterrupted


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [("tp2-dp2-zero3", "pp2-zero1"), ("pp2-zero2", "dp2-zero0"), ("zero2", "tp2-zero1")],
)
def test_a_run_goes_on_under_another_layout_and_as_its_checkpoint_is_reshaped(
    world_of: GetWorld, tmp_path: Path, saved_by: str, resumed_by: str
) -> None:
    curves = []
    for name in (saved_by, resumed_by):
        size, parallel = LAYOUTS[name]
        folder, overrides = str(tmp_path / "saved"), parallel | OTHERS
        resume = name == resumed_by
        found = world_of(size).run(resuming.run, overrides=overrides, folder=folder, resume=resume)
        curves.append(found[0])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    path = tmp_path / "saved" / f"step_{resuming.SAVED_AFTER:08d}"
    kinds = read_manifest(path).list_kinds
    assert kinds("decoder.layers.0.mlp.linear_fc1.weight") == ("weight", "momentum_buffer")
    assert kinds("embedding.word_embeddings.weight") == ("weight", "exp_avg", "exp_avg_sq")
    reshard_checkpoint(
        path, tmp_path / "reshaped", tensor_parallel_size=2, pipeline_parallel_size=2
    )
    again = world_of(size).run(
        resuming.run, overrides=overrides, folder=str(tmp_path / "reshaped"), resume=True
    )
    assert again[0] == curves[1]


@pytest.mark.parametrize("name", ["tp2-dp2-zero1", "dp2-zero0"])
def test_predicted_bytes_are_those_that_a_rank_exchanges_on_average(
    world_of: GetWorld, name: str
) -> None:
    size, parallel = LAYOUTS[name]
    counted = world_of(size).run(communication_probe.count, overrides=MUON | parallel)
    config = cases.config_of(MUON | parallel)
    transfers = step_transfers(config, 0, world_size=size, dtype="fp32")
    predicted = sum(one.total_bytes for one in transfers if one.kind == "optimizer")
    assert sum(sent["all_to_all"] for sent, _ in counted) == pytest.approx(size * predicted)
