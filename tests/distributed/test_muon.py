"""Muon steps whole matrices: every layout and ZeRO stage trains like one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
from layouts import LAYOUTS, layout
from worlds import World

GetWorld = Callable[[int], World]

# Clipping is active in each step: gradients are clipped before they become momentum.
MUON: dict[str, Any] = {"optimizer.kind": "muon", "optimizer.clip_grad": 0.1}
OTHERS = {
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
RECIPES = {"plain": MUON, "tied-gqa-keller": MUON | OTHERS}


@pytest.fixture(scope="module")
def one_process(world_of: GetWorld) -> dict[str, dict[str, list[float]]]:
    return {
        name: world_of(1).run(cases.train, overrides=recipe | layout(zero=0))[0]
        for name, recipe in RECIPES.items()
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "name",
    [
        "zero2",
        "zero3",
        "dp2-zero0",
        "dp2-zero1",
        "dp2-zero2",
        "dp2-zero3",
        "tp2-zero0",
        "tp2-sp-zero1",
        "pp2-zero1",
        "tp2-sp-pp2-zero2",
        "tp2-dp2-zero1",
        "tp2-dp2-zero3",
        "pp2x2-dp2-zero1",
    ],
)
def test_a_layout_trains_like_one_process(
    world_of: GetWorld, one_process: dict[str, dict[str, list[float]]], name: str, recipe: str
) -> None:
    size, parallel = LAYOUTS[name]
    ranks = world_of(size).run(cases.train, overrides=RECIPES[recipe] | parallel)
    for curves in ranks:
        for kind, expected in one_process[recipe].items():
            error = np.abs(np.array(curves[kind]) / np.array(expected) - 1.0).max()
            print(name, recipe, kind, error)
    for curves in ranks:
        cases.assert_same_run(curves, one_process[recipe], rtol=1e-5)
