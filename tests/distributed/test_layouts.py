"""One run, any layout: every division of ranks trains like one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cases
import numpy as np
import pytest
from layouts import LAYOUTS, layout
from worlds import World

Curves = dict[str, list[float]]


# Between them: both maskings, tied and untied, both objectives, grouped queries, cut samples,
# attention within documents, biases and norms on heads, attention that widens for four of the five
# steps, noise of several kinds, blocks that are left out, a penalty that only gradients have, what
# the networks of GIDD have besides, micro batches of two objectives.
RECIPES: dict[str, dict[str, Any]] = {
    "untied-bernoulli": {"objective.process.masking": "bernoulli"},
    "tied-fixed": {"model.tie_embeddings": True},
    "gqa-cut": {"model.num_query_groups": 2, "objective.stochastic_length_ratio": 0.5},
    "tied-gqa-cut-bernoulli": {
        "model.tie_embeddings": True,
        "model.num_query_groups": 2,
        "objective.process.masking": "bernoulli",
        "objective.stochastic_length_ratio": 0.5,
    },
    "ar": {"objective.kind": "ar"},
    "ar-tied-cut": {
        "objective.kind": "ar",
        "model.tie_embeddings": True,
        "objective.stochastic_length_ratio": 0.5,
    },
    "gqa-cut-documents": {
        "data.attention": "document",
        "model.num_query_groups": 2,
        "objective.stochastic_length_ratio": 0.5,
    },
    "ar-documents": {"data.attention": "document", "objective.kind": "ar"},
    "ar-orders-dropped-keys": {
        "objective.kind": "ar",
        "objective.num_orders": 3,
        "objective.key_dropout": True,
    },
    "ar-dropped-keys-of-some-queries": {
        "objective.kind": "ar",
        "objective.key_dropout": True,
        "objective.key_dropout_ratio": 0.6,
    },
    "ar-documents-dropped-keys-of-some-samples": {
        "objective.kind": "ar",
        "data.attention": "document",
        "objective.key_dropout": True,
        "objective.key_dropout_rate_per": "sample",
        "objective.key_dropout_ratio": 0.6,
    },
    "gqa-biases-head-norms": {
        "model.num_query_groups": 2,
        "model.qkv_bias": True,
        "model.qk_norm": True,
    },
    "annealed-cut": {
        "objective.attention_annealing_steps": 4,
        "objective.stochastic_length_ratio": 0.5,
    },
    "annealed-documents": {
        "objective.attention_annealing_steps": 4,
        "data.attention": "document",
    },
    "hybrid-cut": {
        "objective.process": {"kind": "hybrid", "p_u": 0.2, "weighting": "dynamic"},
        "objective.stochastic_length_ratio": 0.5,
    },
    "hybrid-time-cut": {
        "model.time_embedding": True,
        "objective.process": {"kind": "hybrid", "p_u": 0.2, "weighting": "dynamic"},
        "objective.stochastic_length_ratio": 0.5,
    },
    "uniform-tied": {
        "objective.process": {"kind": "uniform"},
        "model.tie_embeddings": True,
    },
    "gidd": {
        "model.qk_norm": "width",
        "model.attention_soft_cap": 0.5,
        "model.attention_sink": True,
        "model.mlp": "relu2",
        "model.mlp_bias": True,
        "objective.process": {"kind": "hybrid", "shift": 1.0, "weighting": "dynamic"},
    },
    "gqa-capped-documents-gated-biases-width-norms": {
        "data.attention": "document",
        "model.num_query_groups": 2,
        "model.qk_norm": "width",
        "model.attention_soft_cap": 0.5,
        "model.mlp_bias": True,
        "parallel.recompute": "selective",
    },
    "stochastic-depth-z-loss": {
        "model.stochastic_depth": 0.5,
        "objective.loss_head": {"kind": "cross_entropy", "z_loss": 0.01},
        "objective.stochastic_length_ratio": 0.5,
    },
    "mixture-cut": {
        "objective": {"kind": "mixture", "ar_share": 0.6, "stochastic_length_ratio": 0.5},
        "model.num_query_groups": 2,
    },
    "mixture-documents-in-place": {
        "objective": {"kind": "mixture", "shift": False, "ar_share": 0.4},
        "data.attention": "document",
    },
}

_FEW = ("tp2-zero1", "pp2-zero1", "dp2-zero2", "tp2-sp-pp2-zero2")
_MORE = {
    "gqa-cut": _FEW,
    "tied-gqa-cut-bernoulli": ("tp2-dp2-zero3", "pp2-dp2-zero2"),
    "ar": ("pp2x2-zero1", *_FEW),
    "ar-tied-cut": ("tp2-dp2-zero1", "pp2-dp2-zero1", "tp2-sp-pp2x2-zero2"),
    "gqa-cut-documents": ("zero3", "tp2-sp-pp2x2-zero2", *_FEW),
    "ar-documents": ("tp2-zero1", "pp2-zero1", "tp2-sp-pp2-zero2"),
    "gqa-biases-head-norms": (
        "tp2-zero0",
        "tp2-sp-zero1",
        "dp2-zero3",
        "tp2-sp-dp2-zero3",
        "tp2-sp-pp2x2-zero2",
        *_FEW,
    ),
    "ar-orders-dropped-keys": ("zero3", "pp2x2-zero1", "tp2-sp-pp2-zero2"),
    "ar-dropped-keys-of-some-queries": ("tp2-sp-pp2-zero2",),
    "ar-documents-dropped-keys-of-some-samples": ("tp2-dp2-zero1",),
    "annealed-cut": ("zero3", "tp2-sp-pp2x2-zero2", "pp2-zero1"),
    "annealed-documents": ("tp2-dp2-zero3", "pp2x2-dp2-zero1"),
    "hybrid-cut": ("zero3", "tp2-dp2-zero1", "tp2-sp-pp2x2-zero2"),
    "hybrid-time-cut": ("tp2-sp-pp2-zero2", "dp2-zero3"),
    "uniform-tied": ("tp2-sp-pp2-zero2", "dp2-zero2"),
    "gidd": ("zero3", "tp2-sp-pp2x2-zero2", "tp2-sp-dp2-zero3"),
    "gqa-capped-documents-gated-biases-width-norms": ("tp2-sp-pp2-zero2",),
    "stochastic-depth-z-loss": ("tp2-zero1", "pp2-dp2-zero1", "zero3", "tp2-sp-pp2x2-zero2"),
    "mixture-cut": ("zero3", "tp2-zero1", "dp2-zero2", "pp2-dp2-zero1", "tp2-sp-pp2x2-zero2"),
    "mixture-documents-in-place": ("dp2-zero3", "tp2-sp-pp2-zero2"),
}

# Rounding of float32 sums in another order, over five steps of Adam.
FP32_TOLERANCE = 1e-5
# bfloat16 keeps 8 bits, and layouts round in different places: tensor parallelism adds rounded
# halves of every row-parallel product, replicas add gradients in another order. A loss averages the
# rounding of hundreds of tokens and stays within one unit, 2**-8; a gradient norm rests on few
# large entries, each rounded again in every layer on its way back.
BF16_TOLERANCE = {"losses": 2**-8, "grad_norms": 2.5e-2, "held_out": 2**-8}


def _cases() -> Iterator[Any]:
    for recipe in ("untied-bernoulli", "tied-fixed"):
        for name in LAYOUTS:
            yield pytest.param(name, recipe, id=f"{recipe}-{name}")
    for recipe, names in _MORE.items():
        for name in names:
            yield pytest.param(name, recipe, id=f"{recipe}-{name}")


@pytest.fixture(scope="module")
def one_process(world_of: Callable[[int], World]) -> Callable[..., Curves]:
    """Curves of one process, computed once for each set of settings."""
    known: dict[str, Curves] = {}

    def get(recipe: str, **settings: Any) -> Curves:
        key = f"{recipe} {settings}"
        if key not in known:
            overrides = RECIPES[recipe] | layout(zero=settings.pop("zero", 0))
            known[key] = world_of(1).run(cases.train, overrides=overrides, **settings)[0]
        return known[key]

    return get


def _deviation(curves: Curves, expected: Curves, kind: str) -> float:
    found, wanted = np.array(curves[kind]), np.array(expected[kind])
    return float(np.abs(found / wanted - 1.0).max())


@pytest.mark.parametrize(("name", "recipe"), _cases())
def test_a_layout_trains_like_one_process(
    world_of: Callable[[int], World],
    one_process: Callable[..., Curves],
    name: str,
    recipe: str,
) -> None:
    size, parallel = LAYOUTS[name]
    expected = one_process(recipe)
    ranks = world_of(size).run(cases.train, overrides=RECIPES[recipe] | parallel)
    for curves in ranks:
        for kind in expected:
            assert _deviation(curves, expected, kind) < FP32_TOLERANCE, (
                kind,
                curves[kind],
                expected[kind],
            )


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_runs_would_show_a_wrong_update(
    one_process: Callable[..., Curves], recipe: str
) -> None:
    trained, frozen = one_process(recipe), one_process(recipe, lr=0.0)
    assert trained["losses"][0] == frozen["losses"][0]
    assert all(norm > 0.5 for norm in trained["grad_norms"]), "clip_grad=0.5 should be active"
    assert _deviation(trained, frozen, "losses") > 0.01


@pytest.mark.parametrize("recipe", ["untied-bernoulli", "tied-fixed"])
@pytest.mark.parametrize(
    "name",
    [
        "zero2",
        "tp2-zero1",
        "tp2-sp-zero1",
        "pp2-zero1",
        "pp2-zero2",
        "pp2x2-zero1",
        "dp2-zero1",
        "dp2-zero2",
        "dp2-zero3",
    ],
)
def test_a_bf16_layout_trains_like_one_bf16_process(
    world_of: Callable[[int], World],
    one_process: Callable[..., Curves],
    name: str,
    recipe: str,
) -> None:
    size, parallel = LAYOUTS[name]
    expected = one_process(recipe, zero=1, dtype="bf16")
    curves = world_of(size).run(cases.train, overrides=RECIPES[recipe] | parallel, dtype="bf16")[0]
    for kind, tolerance in BF16_TOLERANCE.items():
        assert _deviation(curves, expected, kind) < tolerance, (kind, curves[kind], expected[kind])


@pytest.mark.parametrize(
    "name", ["tp2-sp-zero1", "tp2-sp-pp2-zero2", "pp2-zero1", "pp2x2-zero1", "dp2-zero3"]
)
def test_initial_weights_can_be_evaluated(world_of: Callable[[int], World], name: str) -> None:
    size, parallel = LAYOUTS[name]
    expected = world_of(1).run(cases.evaluate_untrained, overrides={})[0]
    found = world_of(size).run(cases.evaluate_untrained, overrides=parallel)
    np.testing.assert_allclose(found, expected, rtol=FP32_TOLERANCE)
