"""A run with compiled kernels is the run without."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import cases
import pytest
from layouts import LAYOUTS
from worlds import World

pytestmark = pytest.mark.slow


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_kernels_train_the_same(world_of: Callable[[int], World]) -> None:
    size, parallel = LAYOUTS["tp2-sp-zero1"]
    recipe = {"parallel.recompute": "selective", "model.qk_norm": True, "model.num_query_groups": 2}
    world = world_of(size)
    plain = world.run(cases.train, overrides=recipe | parallel)[0]
    compiled = world.run(
        cases.train,
        overrides=recipe | parallel | {"run.compile": "on"},
        timeout_seconds=300,
    )[0]
    cases.assert_same_run(compiled, plain, rtol=1e-5)
