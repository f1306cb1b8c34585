"""What is made again in the backward pass is what was made before, dropout included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import memory_probe
import pytest
from layouts import LAYOUTS, layout
from worlds import World

DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
PASSED_BY = {"model.stochastic_depth": 0.4}
GROUPED = {"model.num_query_groups": 2, "model.qk_norm": True, "model.tie_embeddings": True}
CUT = {"objective.stochastic_length_ratio": 0.5, "data.attention": "document"}


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("zero1", DROPOUT | CUT),
        ("zero3", DROPOUT | GROUPED | PASSED_BY),
        ("dp2-zero3", DROPOUT),
        ("dp2-zero2", GROUPED | CUT),
        ("tp2-zero0", DROPOUT),
        ("tp2-sp-zero1", DROPOUT | GROUPED),
        ("tp2-sp-pp2-zero2", DROPOUT | PASSED_BY | {"objective.kind": "ar"}),
        ("pp2x2-zero1", DROPOUT | CUT),
        ("tp2-sp-dp2-zero3", GROUPED),
    ],
)
def test_a_run_does_not_depend_on_what_it_keeps(
    world_of: Callable[[int], World], name: str, recipe: dict[str, Any], recompute: str
) -> None:
    size, parallel = LAYOUTS[name]
    world = world_of(size)
    kept = world.run(cases.train, overrides=recipe | parallel)[0]
    remade = world.run(
        cases.train, overrides=recipe | parallel | {"parallel.recompute": recompute}
    )[0]
    cases.assert_same_run(remade, kept, rtol=1e-6)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "parallel", [layout(zero=0), LAYOUTS["tp2-zero0"][1], LAYOUTS["tp2-sp-zero0"][1]]
)
def test_a_layer_keeps_what_it_says(
    world_of: Callable[[int], World], parallel: dict[str, Any], qk_norm: bool
) -> None:
    """Bytes of a layer, float32, from the sizes of the tensors that its gradients need."""
    tp, sp = parallel["parallel.tensor_model_parallel_size"], parallel["parallel.sequence_parallel"]
    world = world_of(tp)
    d, f, heads, groups, width, tokens = 32, 48, 4, 2, 8, 2 * 16
    residual = d // tp if sp else d
    q, k = heads * width // tp, groups * width // tp
    # Inputs of two norms, q, k, v, what attention makes of them (heads before positions and, for
    # the projection, after them), gates and values of SwiGLU.
    least = 2 * residual + (q + 2 * k) + 2 * q + 2 * f // tp
    roots = 2 / (tp if sp else 1)  # of two norms; and the log-sum of every head
    least += roots + heads // tp
    if qk_norm:
        # Queries and keys before their norms, inside the product that holds the values as well;
        # of several groups Megatron copies the queries together.
        least += (q + 2 * k) + (heads + groups) // tp + (q if tp == 1 else 0)
    expected = {
        # The outputs of two norms and of SwiGLU, which are inputs of matrix products.
        "none": least + 2 * residual + f // tp,
        "selective": least,
        "full": residual,
    }
    overrides = parallel | {"model.num_query_groups": groups, "model.qk_norm": qk_norm}
    for recompute, elements in expected.items():
        found = world.run(
            memory_probe.bytes_kept_by_a_layer,
            overrides=overrides | {"parallel.recompute": recompute},
        )
        assert found == [4 * tokens * elements] * tp, recompute
