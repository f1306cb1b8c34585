from __future__ import annotations

import pytest
from cost_examples import EMBEDDING, HEAD, LAYER, WHOLE, run_of
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.config.optimizer import CHOSEN_OPTIMIZER
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.model.accounting import count_state_elements
from megatron_mdm.model.memory import (
    MemoryEstimate,
    count_passes_in_flight,
    count_stage_parameters,
    estimate_memory,
    estimate_stage_memory,
)


def memory_of(*, world_size=1, dtype="fp32", stage=None, **options) -> MemoryEstimate:
    config = run_of(**options)
    if stage is None:
        return estimate_memory(config, world_size=world_size, dtype=dtype)
    return estimate_stage_memory(config, stage, world_size=world_size, dtype=dtype)


# 16 tokens of a layer keep 4 d + 3 a + 2 k + 3 f = 32 + 24 + 8 + 36 = 100 numbers, and 4 log-sums
# and 2 roots in fp32. The backward pass of a feed-forward block adds 2 d + 3 f = 52.
KEPT = 16 * (100 * 4 + 6 * 4)
WORKING = 16 * 52 * 4


def test_one_process_in_fp32_adds_up_by_hand():
    # Several micro batches, so all gradients exist when the last backward pass begins, beside the
    # new one of the output matrix.
    memory = memory_of(zero_stage=0, seq=256, model={"vocab_size": 7})
    # Eight rows of embedding and of head instead of 64 leave 3,016 - 2 * 56 * 8 = 2,120.
    assert memory.weights_bytes == 4 * 2120
    assert memory.optimizer_bytes == 8 * 2120
    assert memory.gradients_bytes == 4 * (2120 + 64)
    assert memory.activations_bytes == 4 * 16 * KEPT
    assert memory.buffers_bytes == 16 * WORKING
    assert memory.logits_bytes == 0
    assert memory.total_bytes == 12 * 2120 + 4 * 2184 + 64 * KEPT + 16 * WORKING


def test_with_a_large_vocabulary_the_output_layer_is_the_peak():
    # 256 tokens: 3 d numbers of hidden states, all 1,000 logits in fp32, and an fp32 gradient.
    memory = memory_of(zero_stage=0, seq=256, model={"vocab_size": 999})
    assert memory.logits_bytes == 256 * 3 * 8 * 4 + 256 * 1000 * 4 + 1000 * 8 * 4
    assert memory.buffers_bytes == 0


def test_logits_are_held_a_chunk_at_a_time():
    config = run_of(zero_stage=0, seq=256, model={"vocab_size": 999})
    memory = estimate_memory(config, world_size=1, dtype="fp32", chunk_bytes=403_999)
    # A hundred positions of 4,000 bytes.
    assert memory.logits_bytes == 256 * 3 * 8 * 4 + 400_000 + 1000 * 8 * 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_twice_the_replicas_halve_the_optimizer(stage):
    two, four = (memory_of(world_size=size, zero_stage=stage) for size in (2, 4))
    assert two.optimizer_bytes == 12 * 3016 // 2
    assert four.optimizer_bytes == 12 * 3016 // 4


def test_of_hidden_matrices_muon_keeps_one_state():
    config = run_of(zero_stage=0)
    muon = config.model_copy(update={"optimizer": CHOSEN_OPTIMIZER.read({"kind": "muon"})})
    hidden = 4 * (LAYER - 16)
    memory = estimate_memory(muon, world_size=1, dtype="fp32")
    assert memory.optimizer_bytes == 4 * (2 * 3016 - hidden)
    assert count_state_elements(muon) == 2 * 3016 - hidden
    assert count_state_elements(config) == 2 * 3016


def test_among_many_replicas_under_zero_3_the_start_is_the_peak():
    # DeepSpeed gathers no more than a billion weights at once; a stage is built whole, in float32.
    sizes = {"hidden_size": 5120, "num_attention_heads": 40, "num_query_groups": 40}
    config = run_of(
        zero_stage=3, batch=4096, model=sizes | {"num_layers": 47, "ffn_hidden_size": 13632}
    )
    size = count_stage_parameters(config, 0).total
    assert size == 47 * (4 * 5120**2 + 3 * 5120 * 13632 + 2 * 5120) + 2 * 64 * 5120 + 5120
    memory = estimate_memory(config, world_size=4096, dtype="bf16")
    assert memory == MemoryEstimate(4 * size, 0, 0, 0, 0, 0)
    # Among few the states of the optimizer are more.
    assert estimate_memory(config, world_size=2, dtype="bf16").optimizer_bytes == 12 * size // 2


def test_bf16_optimizers_hold_what_deepspeeds_do():
    # ZeRO-1: whole fp32 gradients beside the bf16 ones, and copies in both dtypes to reduce.
    memory = memory_of(world_size=2, dtype="bf16", zero_stage=1, seq=2)
    assert memory.weights_bytes == 2 * 3016
    assert memory.gradients_bytes == (4 + 2) * 3016
    assert memory.buffers_bytes == (4 + 2) * 3016
    # ZeRO-2: half of them in fp32; the bucket, its copy, and the largest tensor in fp32.
    memory = memory_of(world_size=2, dtype="bf16", zero_stage=2, seq=2)
    assert memory.gradients_bytes == 4 * 3016 // 2
    assert memory.buffers_bytes == (2 + 2) * 3016 + 4 * 512
    # ZeRO-3: half of the weights, the norms and what is gathered last.
    memory = memory_of(world_size=2, dtype="bf16", zero_stage=3, seq=2)
    assert memory.weights_bytes == 2 * (3016 // 2 + 4 * 16 + 8 + 512)
    assert memory.gradients_bytes == 4 * 3016 // 2
    assert memory.buffers_bytes == 2 * 3016 + 4 * 3016


def test_a_stage_holds_its_layers_and_its_end_of_the_model():
    config = run_of(pipeline_model_parallel_size=2)
    assert count_stage_parameters(config, 0).total == 2 * LAYER + EMBEDDING
    assert count_stage_parameters(config, 1).total == 2 * LAYER + 8 + HEAD
    size = count_stage_parameters(run_of(), 0)
    assert size[:3] == (WHOLE, 512, HEAD)
    ends = {"embedding": EMBEDDING, "output": HEAD}
    assert size.by_role == ends | {"vector": 4 * 16 + 8, "hidden": 4 * (LAYER - 16)}
    tied = run_of(pipeline_model_parallel_size=2, model={"tie_embeddings": True})
    assert count_stage_parameters(tied, 1).total == 2 * LAYER + 8 + HEAD
    assert count_stage_parameters(run_of(model={"tie_embeddings": True}), 0).total == WHOLE - HEAD


def test_tensor_parallel_ranks_split_matrices_and_biases_but_no_norms():
    both = {"qkv_bias": True, "qk_norm": True}
    # Biases of a + 2 k = 16 and two norms of a head of 2 a layer.
    whole = count_stage_parameters(run_of(model=both), 0)
    assert whole.total == WHOLE + 4 * (16 + 4)
    half = count_stage_parameters(run_of(model=both, tensor_model_parallel_size=2), 0)
    norms = 4 * (16 + 4) + 8
    assert half.total == (whole.total - norms) // 2 + norms


@pytest.mark.parametrize(
    ("stages", "chunks", "stage", "micro_batches", "passes"),
    [
        (4, 1, 0, 8, 4),
        (4, 1, 3, 8, 1),
        (4, 1, 0, 2, 2),
        # 2 (4 - 0 - 1) + (2 - 1) 4 = 10 to warm up, and one more; the last stage 0 + 4 + 1.
        (4, 2, 0, 8, 11),
        (4, 2, 3, 8, 5),
        (4, 2, 0, 4, 8),
    ],
)
def test_passes_in_flight_are_those_of_the_schedule(stages, chunks, stage, micro_batches, passes):
    config = run_of(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        model={"num_layers": 8},
    )
    assert count_passes_in_flight(config, stage, micro_batches) == passes


def test_recomputation_keeps_less():
    kept = [
        memory_of(zero_stage=0, seq=256, recompute=name).activations_bytes
        for name in ("none", "selective", "full")
    ]
    # Less by 2 d + f = 28 of 100 numbers; only d = 8.
    assert kept == [4 * 256 * 424, 4 * 256 * (424 - 28 * 4), 4 * 256 * 8 * 4]


def test_sequence_parallelism_splits_what_norms_keep():
    plain, split = (
        memory_of(
            world_size=2,
            zero_stage=0,
            seq=256,
            tensor_model_parallel_size=2,
            sequence_parallel=on,
        )
        for on in (False, True)
    )
    # 4 d whole or halved, (3 a + 2 k + 3 f) / 2 = 34, two log-sums and two roots.
    assert plain.activations_bytes == 4 * 256 * ((32 + 34) * 4 + 16)
    assert split.activations_bytes == 4 * 256 * ((16 + 34) * 4 + 16)


def test_a_pipeline_keeps_whole_gradients_under_zero_2():
    # The fullest moment of long windows is the last micro batch's backward pass.
    memory = memory_of(
        world_size=4, stage=0, seq=4096, pipeline_model_parallel_size=2, zero_stage=2
    )
    assert memory.activations_bytes > 0
    assert memory.gradients_bytes == 4 * (2 * LAYER + EMBEDDING)
    # Without stages they are halves.
    memory = memory_of(world_size=2, seq=4096, zero_stage=2)
    assert memory.activations_bytes > 0
    assert memory.gradients_bytes <= 4 * (WHOLE // 2 + HEAD)


@given(st.sampled_from([0, 1, 2, 3]), st.sampled_from(["none", "selective", "full"]))
def test_activations_grow_with_the_micro_batch_and_nothing_else_does(zero, recompute):
    one, two = (
        memory_of(zero_stage=zero, recompute=recompute, seq=256, micro=micro) for micro in (1, 2)
    )
    assert two.activations_bytes == 2 * one.activations_bytes
    assert two.weights_bytes == one.weights_bytes
    assert two.optimizer_bytes == one.optimizer_bytes


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        memory_of(world_size=3, tensor_model_parallel_size=3)
