"""Writes down the real calls of real ranks."""

from __future__ import annotations

import torch
from cases import Overrides, Stage, config_of, engine_of

from megatron_mdm.config import check_layout
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.distributed.processes import start_process_group
from megatron_mdm.model.transformer import build_model
from megatron_mdm.studies.simulation.calls import NUM_STEPS, Call, CallLog
from megatron_mdm.studies.simulation.fake_rank import make_batches


def record(overrides: Overrides, world_size: int, dtype: str) -> list[Call]:
    """Builds a model and an engine, and takes the steps that a simulated rank takes.

    Args:
        overrides: As for `config_of`.
        world_size: Ranks.
        dtype: `fp32` or `bf16`.

    Returns:
        This rank's calls.
    """
    config, log, device = config_of(overrides), CallLog(), torch.device("cpu")
    layout = check_layout(config, world_size)
    start_process_group(device)
    with open_mesh(config.parallel, device) as mesh, log:
        model = build_model(config, mesh, torch.bfloat16 if dtype == "bf16" else torch.float32)
        with engine_of(Stage(config, mesh, model), dtype) as engine:
            for step in range(NUM_STEPS):
                batches = make_batches(config, layout.num_micro_batches, step)
                with log.during(f"step {step}"):
                    engine.train_step(step, batches, config.optimizer.lr)
    return log.calls
