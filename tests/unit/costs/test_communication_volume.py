from __future__ import annotations

import pytest
from cost_examples import HEAD, LAYER, WHOLE, run_of

from megatron_mdm.config import parse_config
from megatron_mdm.studies.costs.communication import Transfer, step_transfers


def sent(config, stage=0, *, world_size=2, dtype="bf16") -> dict[tuple[str, str], float]:
    """Bytes by kind and operation."""
    sums: dict[tuple[str, str], float] = {}
    for one in step_transfers(config, stage, world_size=world_size, dtype=dtype):
        key = (one.kind, one.operation)
        sums[key] = sums.get(key, 0.0) + one.sent_bytes
    return sums


@pytest.mark.parametrize(
    ("operation", "ranks", "expected"),
    [
        ("all_reduce", 4, 1500),
        ("all_gather", 4, 750),
        ("reduce_scatter", 2, 500),
        ("send", 2, 1000),
    ],
)
def test_a_ring_sends_its_share(operation, ranks, expected):
    # 10 calls of 100 bytes: twice three quarters, three quarters, a half, all.
    assert Transfer("x", operation, "data", ranks, 10, 100).sent_bytes == expected


def test_tensor_parallel_layers_sum_hidden_states_four_times():
    # 8 micro batches, 4 layers and the embedding: 17 tensors of 16 * 8 numbers of two bytes, each
    # sent 2 * 1/2 times.
    found = sent(run_of(tensor_model_parallel_size=2))
    assert found[("tensor parallel", "all_reduce")] == 8 * 17 * 256
    # Of 16 positions 17/32 count: a gradient of 8 numbers and three fp32 numbers each.
    assert found[("output layer", "all_reduce")] == 8 * 8.5 * (8 * 2 + 3 * 4)
    assert len(found) == 2  # replicas: none


def test_sequence_parallel_layers_gather_and_scatter():
    found = sent(run_of(tensor_model_parallel_size=2, sequence_parallel=True))
    # Of each tensor of 256 bytes the other half.
    assert found[("tensor parallel", "all_gather")] == 8 * (6 * 4 + 1) * 128
    assert found[("tensor parallel", "reduce_scatter")] == 8 * (4 * 4 + 1) * 128
    # Gradients of nine norms.
    assert found[("tensor parallel", "all_reduce")] == 8 * 9 * 16
    assert found[("output layer", "all_gather")] == 8 * 128


def test_full_recomputation_repeats_the_forward_sums():
    found = sent(run_of(tensor_model_parallel_size=2, recompute="full"))
    assert found[("tensor parallel", "all_reduce")] == 8 * (17 + 2 * 4) * 256
    selective = sent(run_of(tensor_model_parallel_size=2, recompute="selective"))
    assert selective == sent(run_of(tensor_model_parallel_size=2))


def test_stages_send_to_their_neighbours():
    config = run_of(pipeline_model_parallel_size=4)
    # Ends send one way, the others both; 8 micro batches of 256 bytes.
    assert [sent(config, stage, world_size=4)[("pipeline", "send")] for stage in range(4)] == [
        8 * 256,
        8 * 2 * 256,
        8 * 2 * 256,
        8 * 256,
    ]
    chunked = run_of(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert sent(chunked)[("pipeline", "send")] == 8 * 3 * 256
    tied = run_of(pipeline_model_parallel_size=2, model={"tie_embeddings": True})
    assert sent(tied)[("tied embeddings", "all_reduce")] == 2 * HEAD


def test_zero_stages_reduce_and_gather():
    whole = 2 * WHOLE
    # Four micro batches per replica; a ring of two sends all of an all-reduce, half of the others.
    assert sent(run_of(zero_stage=1)) == {
        ("gradients", "all_reduce"): whole,
        ("weights", "all_gather"): whole / 2,
    }
    assert sent(run_of(zero_stage=2))[("gradients", "all_reduce")] == 4 * whole
    # All of these matrices are small enough to stay until the next step.
    assert sent(run_of(zero_stage=3)) == {
        ("gradients", "reduce_scatter"): 4 * whole / 2,
        ("weights", "all_gather"): whole / 2,
    }
    pipelined = run_of(zero_stage=2, pipeline_model_parallel_size=2)
    size = 2 * (2 * LAYER + 512)
    assert sent(pipelined, world_size=4)[("gradients", "all_reduce")] == size


def test_one_process_sends_nothing():
    assert step_transfers(run_of(), 0, world_size=1, dtype="fp32") == []


@pytest.mark.parametrize(
    ("preset", "vocab_size", "gathered"),
    [
        # As two steps of the engine gathered them when they were simulated (docs/scaling.md).
        ("smdm-1028M", 32_000, 5_160_189_440),
        ("dc-16183M", 32_000, 116_021_975_040),
    ],
)
def test_zero_3_gathers_again_what_cannot_live_until_the_backward_pass(
    preset, vocab_size, gathered
):
    tree = {
        "run": {"dir": "r"},
        "model": {"preset": preset, "vocab_size": vocab_size},
        "objective": {"kind": "mdm"},
        "data": {"train": [{"path": "a"}], "seq_length": 2048},
        "batch": {"global_batch_size": 32, "micro_batch_size": 2},
        "parallel": {"zero_stage": 3},
        "schedule": {"steps": 1},
    }
    whole = sum(
        one.total_bytes
        for one in step_transfers(parse_config(tree), 0, world_size=8, dtype="bf16")
        if one.operation == "all_gather"
    )
    assert whole == pytest.approx(gathered, rel=0.006)
