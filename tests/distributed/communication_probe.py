"""Counts the real collectives of a training step."""

from __future__ import annotations

from collections import Counter

from cases import Overrides, batches_of, engine_of, stage_of

from megatron_mdm.studies.simulation.calls import CallLog


def count(overrides: Overrides, dtype: str = "fp32") -> tuple[dict[str, int], int]:
    """Trains two steps.

    Args:
        overrides: As for `config_of`.
        dtype: `fp32` or `bf16`.

    Returns:
        Bytes of the second step by operation, and the positions that its losses ask for.
    """
    with stage_of(overrides, dtype) as stage, engine_of(stage, dtype) as engine:
        batches = batches_of(stage.config, stage.mesh.dp.rank, stage.mesh.dp.size)
        engine.train_step(0, batches.read_step(0), 1e-3)
        with CallLog() as log:
            engine.train_step(1, batches.read_step(1), 1e-3)
        positions = sum(int((batch.weights_BS != 0).sum()) for batch in batches.read_step(1))
        sent = Counter[str]()
        for call in log.calls:
            # Without scalars, which are norms and checks for overflow.
            if call.elements > 1 and call.operation != "receive":
                sent[call.operation] += call.total_bytes
        return dict(sent), positions
