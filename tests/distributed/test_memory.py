"""The predicted memory of a rank is what its tensors take at the fullest moment of a real step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import memory_probe
import pytest
from cases import config_of
from layouts import LAYOUTS, layout
from worlds import World

from megatron_mdm.model.head import CHUNK_BYTES
from megatron_mdm.model.memory import Dtype, estimate_stage_memory

GetWorld = Callable[[int], World]

# Activations take a third to a half of all.
ACTIVE: dict[str, Any] = {
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 160,
    "model.vocab_size": 250,
    "data.seq_length": 64,
    "batch.micro_batch_size": 4,
    "batch.global_batch_size": 16,
}
# Weights, gradients and optimizer take nearly all, and a reduction of gradients is the peak.
HEAVY: dict[str, Any] = {
    "model.hidden_size": 256,
    "model.ffn_hidden_size": 512,
    "model.vocab_size": 511,
    "model.num_layers": 2,
    "data.seq_length": 8,
    "batch.micro_batch_size": 1,
    "batch.global_batch_size": 4,
}
TOLERANCE = 0.1


def assert_memory_is_as_predicted(
    world_of: GetWorld, size: int, overrides: dict[str, Any], dtype: Dtype = "fp32"
) -> None:
    config = config_of(overrides)
    stages = config.parallel.pipeline_model_parallel_size
    measured = world_of(size).run(memory_probe.peak_bytes, overrides=overrides, dtype=dtype)
    for rank, found in enumerate(measured):
        predicted = estimate_stage_memory(
            config,
            rank * stages // size,
            world_size=size,
            dtype=dtype,
            chunk_bytes=CHUNK_BYTES["cpu"],
        )
        error = predicted.total_bytes / found - 1
        print(f"rank {rank}: {error:+.1%} of {found:,} bytes, {predicted}")
        assert abs(error) <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "zero1",
        "zero2",
        "zero3",
        "dp2-zero1",
        "dp2-zero2",
        "dp2-zero3",
        "dp2-zero1-overlap",
        "tp2-zero0",
        "tp2-sp-zero1",
        "pp2-zero0",
        "pp2-zero1",
        "pp2x2-zero0",
    ],
)
def test_memory_is_within_a_tenth_of_the_prediction(world_of: GetWorld, name: str) -> None:
    size, parallel = LAYOUTS[name]
    assert_memory_is_as_predicted(world_of, size, ACTIVE | parallel)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["zero1", "tp2-sp-zero0", "pp2x2-zero0"])
def test_recomputation_saves_what_is_predicted(
    world_of: GetWorld, name: str, recompute: str
) -> None:
    size, parallel = LAYOUTS[name]
    overrides = ACTIVE | parallel | {"parallel.recompute": recompute}
    assert_memory_is_as_predicted(world_of, size, overrides)


def test_grouped_queries_and_norms_of_heads_keep_what_is_predicted(world_of: GetWorld) -> None:
    shape = {"model.num_query_groups": 2, "model.qk_norm": True, "model.qkv_bias": True}
    assert_memory_is_as_predicted(world_of, 1, ACTIVE | layout(zero=0) | shape)


@pytest.mark.parametrize(("name", "recompute"), [("zero1", "selective"), ("tp2-sp-zero0", "none")])
def test_so_do_norms_of_the_whole_width_and_a_squared_relu(
    world_of: GetWorld, name: str, recompute: str
) -> None:
    size, parallel = LAYOUTS[name]
    shape = {"model.qk_norm": "width", "model.mlp": "relu2", "model.mlp_bias": True}
    overrides = ACTIVE | parallel | shape | {"parallel.recompute": recompute}
    assert_memory_is_as_predicted(world_of, size, overrides)


@pytest.mark.parametrize("name", ["zero3", "tp2-zero0", "pp2-zero1"])
def test_so_it_is_where_reducing_gradients_is_the_peak(world_of: GetWorld, name: str) -> None:
    size, parallel = LAYOUTS[name]
    assert_memory_is_as_predicted(world_of, size, HEAVY | parallel)


@pytest.mark.parametrize("name", ["tp2-zero1", "dp2-zero0"])
def test_so_it_is_where_an_update_needs_whole_parameters(world_of: GetWorld, name: str) -> None:
    size, parallel = LAYOUTS[name]
    muon = {"optimizer.kind": "muon"}
    assert_memory_is_as_predicted(world_of, size, HEAVY | parallel | muon)


# Activations in bf16 are not those of a GPU: a CPU's norm computes in fp32 and keeps that.
@pytest.mark.parametrize("name", ["zero1", "dp2-zero1", "dp2-zero2", "tp2-zero1", "pp2-zero1"])
def test_so_it_is_in_bf16(world_of: GetWorld, name: str) -> None:
    size, parallel = LAYOUTS[name]
    assert_memory_is_as_predicted(world_of, size, HEAVY | parallel, "bf16")


def test_a_prediction_that_is_off_by_more_would_be_noticed(world_of: GetWorld) -> None:
    (found,) = world_of(1).run(memory_probe.peak_bytes, overrides=ACTIVE | layout(zero=0))
    config = config_of(ACTIVE | layout(zero=0) | {"model.num_layers": 5})
    more = estimate_stage_memory(
        config, 0, world_size=1, dtype="fp32", chunk_bytes=CHUNK_BYTES["cpu"]
    )
    assert found != pytest.approx(more.total_bytes, rel=TOLERANCE)
