"""The recount of a run: predictions counted as they are made, for the ledger that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_mdm.core.files import write_json_whole
from megatron_mdm.data.ledger import SourceLedger, count_predictions
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.objectives import objective_of
from megatron_mdm.distributed.topology import Topology
from megatron_mdm.training.data_plan import ledger_at
from megatron_mdm.training.plan import RunPlan

LEDGER_FILE_NAME = "ledger.json"


class PredictionCounter:
    """Counts the predicted tokens of every source over all replicas.

    Args:
        topology: This rank's place. Of the peers that share a replica's batches one counts.
        before: Counts that the run had when it was saved.
    """

    def __init__(self, topology: Topology, before: Sequence[int]) -> None:
        self._before = np.array(before, dtype=np.int64)
        self._here = np.zeros(len(before), dtype=np.int64)
        self._counts = topology.tensor_rank == 0 and topology.is_first_stage
        self._device = topology.device

    def add(self, batches: Sequence[Batch]) -> None:
        """Counts the micro batches of a step.

        Args:
            batches: This replica's.
        """
        if self._counts:
            self._here += count_predictions(batches, len(self._here))

    def totals(self) -> list[int]:
        """Sums over all ranks; each has to call it.

        Returns:
            Predicted tokens of each source since the run's first step.
        """
        sums = torch.from_numpy(self._here.copy()).to(self._device)
        dist.all_reduce(sums)
        return (self._before + sums.cpu().numpy()).tolist()


def write_ledger(plan: RunPlan, step: int, predictions: Sequence[int]) -> None:
    """Writes `ledger.json` into the run's folder: what was seen so far, and what is planned.

    Args:
        plan: The run.
        step: Optimizer steps taken.
        predictions: Predicted tokens of each source.
    """
    record: dict[str, Any] = {
        "step": step,
        "num_steps": plan.num_steps,
        "order": plan.config.data.order,
        "noise": "repeated" if objective_of(plan.config).repeats_noise else "fresh",
        "seen": _records(ledger_at(plan.config, plan.data, step, predictions)),
        "planned": _records(ledger_at(plan.config, plan.data, plan.num_steps)),
    }
    write_json_whole(plan.run_dir / LEDGER_FILE_NAME, record)


def _records(ledgers: Sequence[SourceLedger]) -> list[dict[str, Any]]:
    return [ledger.as_record() for ledger in ledgers]
