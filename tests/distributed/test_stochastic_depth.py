"""Stochastic depth in the network: right on average, off in evaluation, nothing more is kept."""

from __future__ import annotations

from collections.abc import Callable

import depth_probe
import memory_probe
import numpy as np
import pytest
import torch
from worlds import World

from megatron_mdm.model.block import scale_change

DEPTH = {"model.num_layers": 3, "model.stochastic_depth": 0.6}


def test_each_block_has_the_expectation_of_one_that_is_never_left_out(
    world_of: Callable[[int], World],
) -> None:
    (found,) = world_of(1).run(depth_probe.outputs_of_blocks, overrides=DEPTH)
    outputs, whole, rates = found["outputs"], found["whole"], found["rates"]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6])
    assert len(whole) == 1 + 2 + 4
    for before, expected in whole.items():
        rate = rates[len(before)]
        mean = rate * outputs[(*before, False)] + (1 - rate) * outputs[(*before, True)]
        np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-13)
        if before:
            # A sample that passes a block by comes out as it came in.
            np.testing.assert_array_equal(outputs[(*before, False)], outputs[before])
        assert np.abs(outputs[(*before, True)] - outputs[(*before, False)]).max() > 1e-3
    np.testing.assert_array_equal(found["evaluated"], found["plain"])


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_block_that_may_be_left_out_keeps_no_more(
    world_of: Callable[[int], World], recompute: str
) -> None:
    overrides = DEPTH | {"parallel.recompute": recompute}
    world = world_of(1)
    plain, scaled = (
        world.run(memory_probe.bytes_kept_by_a_layer, overrides=overrides, scales=scales)[0]
        for scales in (None, [1.25, 0.0, 1.25])
    )
    # The scales of two samples, in float32.
    assert plain <= scaled <= plain + 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_those_that_were_drawn_in_any_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    before, change = torch.randn(2, 5, 3, 64, generator=generator).to(dtype)
    after = before + change
    # 1 / 0.95 is no number of bfloat16: the next one is 0.2% away.
    scales = torch.tensor([0.0, 1.0, 1 / 0.95])
    found = scale_change(before, after, scales)
    assert found.dtype == dtype
    assert torch.equal(found[:, 0], before[:, 0])
    assert torch.equal(found[:, 1], after[:, 1])
    exact = before.double() + scales.double()[:, None] * (after.double() - before.double())
    rounding = torch.finfo(dtype).eps * exact.abs()
    assert ((found.double() - exact).abs() <= rounding).all()
