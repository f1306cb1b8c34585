"""Attention that widens from causal to full over the first steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import documents
import numpy as np
import observations
import pytest
from layouts import LAYOUTS
from worlds import World

GetWorld = Callable[[int], World]

ANNEALED = {"objective.attention_annealing_steps": 3}
CUT = {"objective.stochastic_length_ratio": 0.5}


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("lengths", [None, [16, 6]], ids=["whole", "cut"])
def test_a_token_changes_the_logits_of_those_that_may_look_so_far_ahead(
    world_of: GetWorld, lookahead: int, lengths: list[int] | None
) -> None:
    # One layer: several would pass on what a neighbour has seen.
    (result,) = world_of(1).run(
        documents.changed_tokens,
        overrides={"model.num_layers": 1, **ANNEALED},
        lengths=lengths,
        lookahead=lookahead,
    )
    places = np.arange(16)
    for sequence, numbers in enumerate(result["documents"]):
        length = 16 if lengths is None else lengths[sequence]
        expected = (numbers[:, None] == numbers) & (places[:, None] <= places + lookahead)
        expected[length:] = False
        changed = result["changed"][sequence]
        np.testing.assert_array_equal(changed[:, :length], expected[:, :length])


@pytest.mark.parametrize("name", ["zero3", "tp2-sp-pp2x2-zero2"])
def test_every_part_of_the_model_gets_the_lookahead_of_its_step_and_evaluation_none(
    world_of: GetWorld, name: str
) -> None:
    size, parallel = LAYOUTS[name]
    ranks = world_of(size).run(
        observations.received_lookaheads, overrides=ANNEALED | parallel, num_steps=5
    )
    # Thirds of 16 tokens, rounded down.
    assert ranks == [([{0}, {5}, {10}, {None}, {None}], {None})] * size


@pytest.mark.parametrize(
    "settings", [{}, CUT, {"data.attention": "document"}], ids=["whole", "cut", "documents"]
)
def test_after_its_steps_annealing_leaves_no_trace(
    world_of: GetWorld, settings: dict[str, Any]
) -> None:
    steps = [0, 1, 2, 3, 9]
    annealed, plain = (
        world_of(1).run(observations.losses_of_steps, overrides=overrides, steps=steps)[0]
        for overrides in (settings | ANNEALED, settings)
    )
    assert annealed[3:] == plain[3:]
    assert len({*annealed[:3], plain[0]}) == 4


def test_evaluation_measures_full_attention(world_of: GetWorld) -> None:
    annealed, plain = (
        world_of(1).run(cases.evaluate_untrained, overrides=overrides)[0]
        for overrides in (ANNEALED, {})
    )
    assert annealed == plain
