from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import resuming
from layouts import LAYOUTS, layout
from worlds import World

TIED = {"model.tie_embeddings": True}
DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [
        ("dp2-zero1", DROPOUT, "fp32"),
        ("dp2-zero2", {}, "bf16"),
        ("dp2-zero3", DROPOUT, "fp32"),
        ("dp2-zero3", {}, "bf16"),
        ("dp2-zero1", DROPOUT, "bf16"),
        ("pp2-zero1", TIED, "bf16"),
        ("tp2-sp-pp2-zero2", TIED | DROPOUT, "fp32"),
        ("tp2-dp2-zero1", TIED, "bf16"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    world_of: Callable[[int], World],
    tmp_path: Any,
    name: str,
    settings: dict[str, Any],
    dtype: str,
) -> None:
    size, parallel = LAYOUTS[name]
    common = {"overrides": parallel | settings, "folder": str(tmp_path), "dtype": dtype}
    uninterrupted = world_of(size).run(resuming.run, resume=False, **common)
    resumed = world_of(size).run(resuming.run, resume=True, **common)
    assert resumed == uninterrupted
    assert len(resumed[0]) == resuming.NUM_STEPS - resuming.SAVED_AFTER


ONE = (1, layout(zero=0))


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [
        (ONE, LAYOUTS["tp2-sp-pp2-zero2"]),
        (ONE, LAYOUTS["dp2-zero3"]),
        (LAYOUTS["tp2-dp2-zero3"], ONE),
        (LAYOUTS["tp2-pp2-zero1"], LAYOUTS["dp4-zero1"]),
        (LAYOUTS["pp4-zero1"], LAYOUTS["tp2-dp2-zero2"]),
        (LAYOUTS["dp2-zero1"], LAYOUTS["pp2-dp2-zero0"]),
    ],
    ids=["one-to-tp-pp", "one-to-zero3", "zero3-to-one", "tp-pp-to-dp4", "pp4-to-tp", "dp-to-pp"],
)
@pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])
def test_a_run_goes_on_under_another_layout(
    world_of: Callable[[int], World],
    tmp_path: Any,
    saved_by: tuple[int, dict[str, Any]],
    resumed_by: tuple[int, dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    curves = []
    for resume, (size, parallel) in enumerate((saved_by, resumed_by)):
        overrides = parallel | settings
        curves.append(
            world_of(size).run(
                resuming.run, overrides=overrides, folder=str(tmp_path), resume=bool(resume)
            )[0]
        )
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
