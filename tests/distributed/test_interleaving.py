"""Several chunks of the model on each pipeline stage, run by Megatron's interleaved schedule."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import observations
import pytest
import resuming
from layouts import LAYOUTS, layout
from weight_pieces import assemble
from worlds import World

GetWorld = Callable[[int], World]

ONE = (1, layout(zero=0))
DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
TIED = {"model.tie_embeddings": True}


@pytest.mark.parametrize("settings", [{}, TIED], ids=["untied", "tied"])
def test_chunks_take_turns_and_hold_the_weights_of_one_process(
    world_of: GetWorld, settings: dict[str, Any]
) -> None:
    (whole,) = world_of(1).run(cases.initial_pieces, overrides=settings)
    size, parallel = LAYOUTS["pp2x2-zero1"]
    stages = world_of(size).run(
        cases.initial_pieces, overrides=parallel | settings, with_engine=True
    )
    layers, others = [], []
    for pieces in stages:
        found = [re.match(r"decoder\.layers\.(\d+)\.", piece.name) for piece in pieces]
        layers.append({int(match[1]) for match in found if match})
        others.append({piece.name for piece, match in zip(pieces, found, strict=True) if not match})
    assert layers == [{0, 2}, {1, 3}]
    embedding = "embedding.word_embeddings.weight"
    head = embedding if settings else "output_layer.weight"
    assert others == [{embedding}, {head, "decoder.final_layernorm.weight"}]
    expected = assemble(whole)
    assembled = assemble([piece for pieces in stages for piece in pieces])
    assert assembled.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(assembled[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("overrides", "size", "parallel"),
    [
        # Between more than two stages each neighbour is another rank.
        ({"model.num_layers": 8}, 4, layout(pp=4, chunks=2)),
        ({"model.num_layers": 6}, 2, layout(pp=2, chunks=3)),
        # More micro batches than fill the pipeline: the schedule has a steady state.
        ({"batch.micro_batch_size": 1}, 2, layout(pp=2, chunks=2)),
    ],
    ids=["four-stages", "three-chunks", "eight-micro-batches"],
)
def test_more_stages_chunks_or_micro_batches_train_like_one_process(
    world_of: GetWorld, overrides: dict[str, Any], size: int, parallel: dict[str, Any]
) -> None:
    (expected,) = world_of(1).run(cases.train, overrides=overrides | ONE[1])
    for curves in world_of(size).run(cases.train, overrides=overrides | parallel):
        for kind, values in expected.items():
            np.testing.assert_allclose(curves[kind], values, rtol=1e-5, err_msg=kind)


def test_a_micro_batch_has_dropout_of_its_own_in_every_chunk(world_of: GetWorld) -> None:
    size, parallel = LAYOUTS["pp2x2-zero1"]
    stages = world_of(size).run(observations.dropout_states, overrides=parallel | DROPOUT, step=3)
    chunks = [passes for stage in stages for passes in stage]
    assert len(chunks) == 4
    for passes in chunks:
        assert len(passes) == 4
        for found, first in zip(passes, chunks[0], strict=True):
            np.testing.assert_array_equal(found["inputs"], first["inputs"])
            assert found["state"] == found["defined"]
    states = [found["state"] for passes in chunks for found in passes]
    assert all(one != other for one, other in itertools.combinations(states, 2))


def test_evaluation_drops_nothing(world_of: GetWorld) -> None:
    size, parallel = LAYOUTS["pp2x2-zero1"]
    with_dropout, without = (
        world_of(size).run(cases.evaluate_untrained, overrides=settings | parallel)[0]
        for settings in (DROPOUT, {})
    )
    assert with_dropout == without


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [("pp2x2-zero1", TIED, "bf16"), ("tp2-sp-pp2x2-zero2", TIED | DROPOUT, "fp32")],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    world_of: GetWorld, tmp_path: Any, name: str, settings: dict[str, Any], dtype: str
) -> None:
    size, parallel = LAYOUTS[name]
    common = {"overrides": parallel | settings, "folder": str(tmp_path), "dtype": dtype}
    uninterrupted = world_of(size).run(resuming.run, resume=False, **common)
    resumed = world_of(size).run(resuming.run, resume=True, **common)
    assert resumed == uninterrupted
    assert len(resumed[0]) == resuming.NUM_STEPS - resuming.SAVED_AFTER


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [
        (ONE, LAYOUTS["pp2x2-zero2"]),
        (LAYOUTS["tp2-sp-pp2x2-zero2"], ONE),
        (LAYOUTS["pp2-zero1"], LAYOUTS["pp2x2-zero1"]),
    ],
    ids=["one-to-interleaved", "interleaved-to-one", "stages-to-chunks"],
)
def test_a_run_goes_on_with_and_without_interleaving(
    world_of: GetWorld,
    tmp_path: Any,
    saved_by: tuple[int, dict[str, Any]],
    resumed_by: tuple[int, dict[str, Any]],
) -> None:
    curves = []
    for resume, (size, parallel) in enumerate((saved_by, resumed_by)):
        curves.append(
            world_of(size).run(
                resuming.run,
                overrides=parallel | TIED,
                folder=str(tmp_path),
                resume=bool(resume),
            )[0]
        )
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
