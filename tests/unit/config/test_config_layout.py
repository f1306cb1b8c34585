from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.config import Layout, check_layout, parse_config
from megatron_mdm.core.errors import ConfigError


def config_of(*, heads=14, layers=6, ffn=112, groups=None, seq=32, micro=1, batch=8, **parallel):
    return parse_config(
        {
            "run": {"dir": "r"},
            "model": {
                "num_layers": layers,
                "hidden_size": heads * 8,
                "num_attention_heads": heads,
                "num_query_groups": groups,
                "ffn_hidden_size": ffn,
                "vocab_size": 100,
            },
            "data": {"train": [{"path": "a"}], "seq_length": seq},
            "batch": {"micro_batch_size": micro, "global_batch_size": batch},
            "parallel": parallel,
            "schedule": {"steps": 1},
        }
    )


def tp(size, **others):
    return {"tensor_model_parallel_size": size, **others}


def pp(size, **others):
    return {"pipeline_model_parallel_size": size, **others}


REFUSED = {
    "heads": (
        config_of(**tp(4)),
        4,
        "parallel.tensor_model_parallel_size=4 does not divide model.num_attention_heads=14: "
        "use 1, 2, 7 or 14.",
    ),
    "groups": (
        config_of(heads=12, groups=3, **tp(2)),
        2,
        "parallel.tensor_model_parallel_size=2 does not divide model.num_query_groups=3: "
        "use 1 or 3.",
    ),
    "feed-forward": (
        config_of(ffn=110, **tp(7)),
        7,
        "parallel.tensor_model_parallel_size=7 does not divide model.ffn_hidden_size=110: "
        "use 1, 2, 5, 10, 11, 22, 55 or 110.",
    ),
    "vocabulary": (
        config_of(**tp(7)),
        7,
        "parallel.tensor_model_parallel_size=7 does not divide model.vocab_padding_multiple=128: "
        "set that to a multiple of 7, for example 896.",
    ),
    "layers": (
        config_of(layers=7, **pp(2)),
        2,
        "parallel.pipeline_model_parallel_size=2 does not divide model.num_layers=7: use 1 or 7.",
    ),
    "ZeRO-3 with a pipeline": (
        config_of(**pp(2, zero_stage=3)),
        2,
        "parallel.zero_stage=3 does not work with parallel.pipeline_model_parallel_size=2: "
        "use zero_stage 0, 1 or 2, or one pipeline stage.",
    ),
    "overlap with a pipeline": (
        config_of(**pp(2, zero_stage=2, overlap_gradient_reduction=True)),
        2,
        "parallel.overlap_gradient_reduction=true is for parallel.zero_stage 1 and 2 without "
        "pipeline stages, but they are 2 and 2: leave it out, as ZeRO-3 overlaps by itself and the "
        "others reduce once per step.",
    ),
    "overlap under ZeRO-3": (
        config_of(zero_stage=3, overlap_gradient_reduction=True),
        2,
        "parallel.overlap_gradient_reduction=true is for parallel.zero_stage 1 and 2 without "
        "pipeline stages, but they are 3 and 1: leave it out, as ZeRO-3 overlaps by itself and the "
        "others reduce once per step.",
    ),
    "interleaving without a pipeline": (
        config_of(virtual_pipeline_model_parallel_size=2),
        1,
        "parallel.virtual_pipeline_model_parallel_size=2 needs "
        "parallel.pipeline_model_parallel_size of at least 2, but it is 1: raise that or set "
        "virtual_pipeline_model_parallel_size to 1.",
    ),
    "layers of a stage": (
        config_of(layers=6, **pp(2, virtual_pipeline_model_parallel_size=2)),
        2,
        "parallel.virtual_pipeline_model_parallel_size=2 does not divide model.num_layers / "
        "parallel.pipeline_model_parallel_size=3: use 1 or 3.",
    ),
    "interleaved batch": (
        config_of(layers=8, batch=10, micro=2, **pp(4, virtual_pipeline_model_parallel_size=2)),
        4,
        "batch.global_batch_size=10 makes 5 micro batches per replica, but "
        "parallel.virtual_pipeline_model_parallel_size=2 needs a multiple of "
        "parallel.pipeline_model_parallel_size=4: use 8 or 16.",
    ),
    "sequence parallelism alone": (
        config_of(sequence_parallel=True),
        1,
        "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size of at least 2, "
        "but it is 1: raise it or switch sequence_parallel off.",
    ),
    "sequence length": (
        config_of(seq=9, **tp(2, sequence_parallel=True)),
        2,
        "parallel.tensor_model_parallel_size=2 does not divide data.seq_length=9: use 1, 3 or 9.",
    ),
    "processes": (
        config_of(**tp(2, pipeline_model_parallel_size=2)),
        6,
        "parallel.tensor_model_parallel_size=2 times parallel.pipeline_model_parallel_size=2 does "
        "not divide the 6 processes that were launched: launch a multiple of 4, for example "
        "torchrun --nproc_per_node=4.",
    ),
    "batch": (
        config_of(batch=10, micro=2),
        4,
        "batch.global_batch_size=10 is not a multiple of batch.micro_batch_size=2 times 4 "
        "data-parallel ranks: use 8 or 16.",
    ),
    "batch below one micro batch": (
        config_of(batch=3, micro=2),
        2,
        "batch.global_batch_size=3 is not a multiple of batch.micro_batch_size=2 times 2 "
        "data-parallel ranks: use 4.",
    ),
}


@pytest.mark.parametrize(("config", "world_size", "told"), REFUSED.values(), ids=REFUSED)
def test_sizes_that_do_not_fit_are_refused_with_the_sizes_that_would(config, world_size, told):
    with pytest.raises(ConfigError) as caught:
        check_layout(config, world_size)
    # A size may fit several places ill.
    assert told in str(caught.value).splitlines()


@pytest.mark.parametrize(
    "case", ["heads", "feed-forward", "vocabulary", "batch", "batch below one micro batch"]
)
def test_the_last_size_that_a_message_names_is_accepted(case):
    config, world_size, told = REFUSED[case]
    size = int(re.findall(r"\d+", told)[-1])
    if case.startswith("batch"):
        config = config.model_copy(
            update={"batch": config.batch.model_copy(update={"global_batch_size": size})}
        )
    else:
        multiple = size if case == "vocabulary" else 14 * 110 * 128
        heads, ranks = (size, size) if case != "vocabulary" else (14, 7)
        config = config_of(heads=heads, ffn=110 * 14, batch=ranks, **tp(ranks))
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"vocab_padding_multiple": multiple})}
        )
        world_size = ranks
    check_layout(config, world_size)


@given(
    split=st.sampled_from([1, 2, 7, 14]),
    stages=st.sampled_from([1, 2, 3, 6]),
    replicas=st.integers(1, 5),
    micro=st.integers(1, 4),
    num_micro_batches=st.integers(1, 6),
)
def test_sizes_that_divide_give_the_layout(split, stages, replicas, micro, num_micro_batches):
    config = config_of(
        micro=micro,
        batch=micro * replicas * num_micro_batches,
        **tp(split, pipeline_model_parallel_size=stages),
    )
    model = config.model.model_copy(update={"vocab_padding_multiple": 896})
    config = config.model_copy(update={"model": model})
    world_size = split * stages * replicas
    assert check_layout(config, world_size) == Layout(world_size, replicas, num_micro_batches)


@given(
    stages=st.sampled_from([2, 3, 4]),
    chunks=st.integers(2, 3),
    replicas=st.integers(1, 3),
    rounds=st.integers(1, 3),
)
def test_an_interleaved_pipeline_takes_whole_rounds_of_micro_batches(
    stages, chunks, replicas, rounds
):
    config = config_of(
        layers=2 * stages * chunks,
        batch=stages * rounds * replicas,
        **pp(stages, virtual_pipeline_model_parallel_size=chunks),
    )
    world_size = stages * replicas
    assert check_layout(config, world_size) == Layout(world_size, replicas, stages * rounds)


def test_zero_3_works_without_a_pipeline():
    assert check_layout(config_of(zero_stage=3), 4).data_parallel_size == 4


def test_sequence_parallelism_works_with_two_ranks_a_layer():
    assert check_layout(config_of(**tp(2, sequence_parallel=True)), 2).data_parallel_size == 1


def test_all_sizes_that_do_not_fit_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        check_layout(config_of(layers=5, batch=3, micro=2, **tp(4, zero_stage=3)), 6)
    lines = str(caught.value).splitlines()
    assert any("model.num_attention_heads=14" in line for line in lines)
    assert any("does not divide the 6 processes" in line for line in lines)
