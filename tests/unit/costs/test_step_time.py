from __future__ import annotations

import pytest
from cost_examples import run_of

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.costs.clusters import CLUSTERS, Cluster, cluster_of
from megatron_mdm.studies.costs.communication import Transfer
from megatron_mdm.studies.costs.layouts import best_layouts, estimate
from megatron_mdm.studies.costs.step_time import (
    estimate_step_time,
    stage_flops_per_token,
    transfer_seconds,
)

# One FLOP per nanosecond, one byte per second; nothing for latency.
SLOW = Cluster(
    memory_bytes=1e12,
    bf16_flops=1e9,
    fp32_flops=1e8,
    gpus_per_node=4,
    node_bytes_per_second=100.0,
    network_bytes_per_second=10.0,
    latency_seconds=0.0,
    efficiency=0.5,
)

# Per token 6 * 480 + 12 * 16 * 8 = 4,416 FLOPs per layer; head 6 * 8 * 64 * 17/32 = 1,632.
LAYER_FLOPS, HEAD_FLOPS = 4416, 1632


def test_flops_of_stages_add_up_by_hand():
    assert stage_flops_per_token(run_of(), 0) == 4 * LAYER_FLOPS + HEAD_FLOPS
    pipelined = run_of(pipeline_model_parallel_size=2)
    assert stage_flops_per_token(pipelined, 0) == 2 * LAYER_FLOPS
    assert stage_flops_per_token(pipelined, 1) == 2 * LAYER_FLOPS + HEAD_FLOPS
    again = run_of(recompute="full")
    assert stage_flops_per_token(again, 0) == 4 * LAYER_FLOPS * 4 / 3 + HEAD_FLOPS
    assert stage_flops_per_token(run_of(recompute="selective"), 0) == 4 * LAYER_FLOPS + HEAD_FLOPS


def test_one_gpu_computes_at_its_efficiency_and_nothing_else():
    # 8 * 16 tokens of 19,296 FLOPs at half of 1e9 a second.
    time = estimate_step_time(run_of(), SLOW, world_size=1, dtype="bf16")
    assert time.step_seconds == pytest.approx(128 * 19_296 / 5e8)
    assert time.mfu == pytest.approx(0.5)
    assert time.tokens_per_second == pytest.approx(128 / time.step_seconds)
    in_fp32 = estimate_step_time(run_of(), SLOW, world_size=1, dtype="fp32")
    assert in_fp32.step_seconds == pytest.approx(10 * time.step_seconds)


def test_recomputation_takes_time_but_is_no_work_of_the_model():
    time = estimate_step_time(run_of(recompute="full"), SLOW, world_size=1, dtype="bf16")
    share = (4 * LAYER_FLOPS + HEAD_FLOPS) / (4 * LAYER_FLOPS * 4 / 3 + HEAD_FLOPS)
    assert time.mfu == pytest.approx(0.5 * share)


@pytest.mark.parametrize(("chunks", "share"), [(1, 1 / 8), (2, 1 / 16)])
def test_the_bubble_is_the_pipelines(chunks, share):
    # (P - 1) / (V m) of what the slowest stage computes, where links cost nothing.
    free = cluster_of(
        "h100", node_bytes_per_second=1e30, network_bytes_per_second=1e30, latency_seconds=0.0
    )
    config = run_of(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks)
    time = estimate_step_time(config, free, world_size=2, dtype="bf16")
    assert time.bubble_seconds == pytest.approx(share * time.compute_seconds)
    assert time.step_seconds == pytest.approx((1 + share) * time.compute_seconds)


def seconds_of(operation, group, ranks, *, world_size=16, tp=1, cluster=SLOW) -> float:
    transfer = Transfer("x", operation, group, ranks, 1, 1000)
    config = run_of(tensor_model_parallel_size=tp)
    return transfer_seconds(transfer, config, cluster, world_size=world_size)


def test_links_are_those_between_the_ranks():
    # Within a node 1,000 * 2 * 3/4 bytes at 100 a second.
    assert seconds_of("all_reduce", "tensor", 4) == pytest.approx(15)
    assert seconds_of("all_reduce", "data", 4) == pytest.approx(15)
    # Replicas on four nodes: four of a node share the way out, at 4 * 10 a second.
    assert seconds_of("all_reduce", "data", 16) == pytest.approx(1000 * 2 * 15 / 16 / 40)
    # With two ranks per layer two replicas are on a node: 2 * 10 a second.
    assert seconds_of("all_gather", "data", 8, tp=2) == pytest.approx(1000 * 7 / 8 / 20)
    assert seconds_of("send", "pipeline", 2) == pytest.approx(100)
    assert seconds_of("send", "pipeline", 2, world_size=4) == pytest.approx(10)


def test_latency_counts_messages():
    late = Cluster(1e12, 1e9, 1e8, 4, 1e30, 1e30, latency_seconds=1.0)
    # log2 of 16 is 4: there and back, or one way.
    assert seconds_of("all_reduce", "data", 16, cluster=late) == pytest.approx(8)
    assert seconds_of("all_gather", "data", 16, cluster=late) == pytest.approx(4)
    assert seconds_of("send", "pipeline", 2, cluster=late) == pytest.approx(1)


def test_a_share_of_what_runs_beside_computation_is_free():
    zero3 = estimate_step_time(run_of(zero_stage=3), CLUSTERS["h100"], world_size=2, dtype="bf16")
    spent = sum(zero3.communication_seconds.values())
    assert zero3.hidden_seconds == pytest.approx(min(spent / 2, zero3.compute_seconds))
    for overlaps in (False, True):
        time = estimate_step_time(
            run_of(zero_stage=1, overlap_gradient_reduction=overlaps),
            SLOW,
            world_size=2,
            dtype="bf16",
        )
        gradients = time.communication_seconds["gradients"]
        expected = min(gradients / 2, time.compute_seconds) if overlaps else 0.0
        assert time.hidden_seconds == pytest.approx(expected)


@pytest.mark.parametrize("name", CLUSTERS)
def test_more_memory_or_speed_never_makes_a_run_slower(name):
    config, better = run_of(batch=64), cluster_of(name, network_bytes_per_second=1e12)
    slower, faster = (
        best_layouts(config, cluster, world_size=16, dtype="bf16", num_best=1)[0]
        for cluster in (CLUSTERS[name], better)
    )
    assert faster.time.step_seconds <= slower.time.step_seconds


def test_the_best_layouts_are_the_fastest_that_fit():
    config, cluster = run_of(batch=64), CLUSTERS["h100"]
    found = best_layouts(config, cluster, world_size=8, dtype="bf16", num_best=1000)
    seconds = [one.time.step_seconds for one in found]
    assert seconds == sorted(seconds)
    assert all(one.fits and one.memory.total_bytes <= 0.92 * 80e9 for one in found)
    divisions = {
        (
            one.config.parallel.tensor_model_parallel_size,
            one.config.parallel.pipeline_model_parallel_size,
        )
        for one in found
    }
    # Two groups of heads and four layers.
    assert divisions == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)}
    again = estimate(found[3].config, cluster, world_size=8, dtype="bf16")
    assert again == found[3]


def test_where_nothing_fits_the_least_is_named():
    with pytest.raises(ConfigError, match="No layout fits 2 GPUs of 1e-06 GB with 8% left free"):
        best_layouts(
            run_of(),
            cluster_of("h100", memory_bytes=1000.0),
            world_size=2,
            dtype="bf16",
            num_best=1,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"efficiency": 1.5}, "efficiency=1.5 is a share: give a number up to 1, such as 0.55."),
        ({"bf16_flops": 0.0}, "bf16_flops=0 must be greater than 0: correct it."),
        ({"bf16_flops": float("nan")}, "bf16_flops=nan must be greater than 0: correct it."),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        cluster_of("a100", **options)
    assert str(caught.value) == message
