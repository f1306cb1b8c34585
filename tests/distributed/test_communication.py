"""The predicted volume of communication is that of the collectives which a step really makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import communication_probe
import pytest
from cases import config_of
from layouts import layout
from worlds import World

from megatron_mdm.config import check_layout
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.model.memory import Dtype
from megatron_mdm.studies.costs.communication import step_transfers

# Matrices above and below the size from which on ZeRO-3 gathers weights anew.
WIDE: dict[str, Any] = {
    "model.hidden_size": 256,
    "model.ffn_hidden_size": 512,
    "model.vocab_size": 511,
    "model.num_layers": 2,
    "batch.micro_batch_size": 1,
    "batch.global_batch_size": 4,
}
HEAD_NORMS = {"model.qk_norm": True, "model.num_query_groups": 2}
GIDD = {
    "model.qk_norm": "width",
    "model.attention_sink": True,
    "model.mlp": "relu2",
    "model.mlp_bias": True,
    "model.time_embedding": True,
    "objective.process": {"kind": "hybrid"},
}

CASES: dict[str, tuple[dict[str, Any], Dtype]] = {
    "tp2": (layout(tp=2, zero=0) | HEAD_NORMS, "fp32"),
    "tp2-sp": (layout(tp=2, sp=True, zero=0) | HEAD_NORMS, "fp32"),
    "tp2-full": (layout(tp=2, zero=0) | {"parallel.recompute": "full"}, "fp32"),
    "tp2-sp-full": (layout(tp=2, sp=True, zero=0) | {"parallel.recompute": "full"}, "fp32"),
    "tp2-sp-full-gidd": (
        layout(tp=2, sp=True, zero=0) | {"parallel.recompute": "full"} | GIDD,
        "fp32",
    ),
    "pp2": (layout(pp=2, zero=0), "fp32"),
    "pp2-tied": (layout(pp=2, zero=1) | {"model.tie_embeddings": True}, "fp32"),
    "pp2x2": (layout(pp=2, zero=0, chunks=2), "fp32"),
    "pp2-bf16": (layout(pp=2, zero=1), "bf16"),
    "dp2-zero0": (layout(zero=0), "fp32"),
    "dp2-zero1": (layout(zero=1), "fp32"),
    "dp2-zero2": (layout(zero=2), "fp32"),
    "dp2-zero3": (layout(zero=3), "fp32"),
    "dp2-zero3-wide": (layout(zero=3) | WIDE, "fp32"),
    "dp2-zero1-bf16": (layout(zero=1), "bf16"),
    "dp2-zero2-bf16": (layout(zero=2), "bf16"),
}


@pytest.mark.parametrize("name", CASES)
def test_predicted_bytes_are_those_of_the_collectives(
    world_of: Callable[[int], World], name: str
) -> None:
    overrides, dtype = CASES[name]
    config = config_of(overrides)
    stages = config.parallel.pipeline_model_parallel_size
    replica_samples = config.batch.global_batch_size // check_layout(config, 2).data_parallel_size
    mean_positions = (
        build_objective(config).predicted_share(config.data.seq_length)
        * replica_samples
        * config.data.seq_length
    )
    measured = world_of(2).run(communication_probe.count, overrides=overrides, dtype=dtype)
    for rank, (counted, positions) in enumerate(measured):
        expected = Counter[str]()
        for one in step_transfers(config, min(rank, stages - 1), world_size=2, dtype=dtype):
            # The prediction speaks of the mean over noise; the step drew its own.
            is_by_position = one.kind == "output layer" and one.operation == "all_reduce"
            share = positions / mean_positions if is_by_position else 1.0
            expected[one.operation] += one.total_bytes * share
        # To the last byte; the factors are floats.
        assert counted == pytest.approx(dict(expected), rel=1e-12), f"rank {rank}"
