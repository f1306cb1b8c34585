"""Responses learned over ranks: every layout gives one curve, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable

import cases
import numpy as np
import packed_pairs
import pytest
from layouts import LAYOUTS
from worlds import World

GetWorld = Callable[[int], World]

ONE_WINDOW = {"batch.micro_batch_size": 1, "batch.global_batch_size": 1}
_references: dict[str, dict[str, list[float]]] = {}


def reference(world_of: GetWorld, kind: str) -> dict[str, list[float]]:
    if kind not in _references:
        overrides = packed_pairs.FINETUNING | {"objective.kind": kind}
        (_references[kind],) = world_of(1).run(cases.train, overrides=overrides)
    return _references[kind]


@pytest.mark.parametrize("kind", ["mdm", "ar"])
@pytest.mark.parametrize("name", ["dp2-zero3", "pp2x2-zero2", "tp2-sp-pp2-zero2"])
def test_every_layout_trains_alike(world_of: GetWorld, name: str, kind: str) -> None:
    size, parallel = LAYOUTS[name]
    overrides = packed_pairs.FINETUNING | {"objective.kind": kind} | parallel
    for found in world_of(size).run(cases.train, overrides=overrides):
        cases.assert_same_run(found, reference(world_of, kind), rtol=2e-5)


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_packing_does_not_leak(world_of: GetWorld, kind: str) -> None:
    overrides = packed_pairs.FINETUNING | {"objective.kind": kind} | ONE_WINDOW
    (losses,) = world_of(1).run(packed_pairs.losses_packed_and_alone, overrides=overrides)
    packed, alone = zip(*losses, strict=True)
    np.testing.assert_allclose(packed, alone, rtol=2e-6)


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_prompts_have_no_part_in_the_gradient(world_of: GetWorld, kind: str) -> None:
    overrides = packed_pairs.FINETUNING | {"objective.kind": kind} | ONE_WINDOW
    ((one, other),) = world_of(1).run(
        packed_pairs.steps_with_other_targets_at_prompts, overrides=overrides
    )
    assert one == other
    ((moved_S, weighs_S),) = world_of(1).run(
        packed_pairs.gradient_of_prompt_logits, overrides=overrides
    )
    np.testing.assert_array_equal(moved_S, weighs_S)
