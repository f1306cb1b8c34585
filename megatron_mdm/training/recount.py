"""The recount of a run: predictions counted as they are made, for the run's ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_mdm.core.files import write_json_whole
from megatron_mdm.core.remarks import warn_on_write_error
from megatron_mdm.data.ledger import SourceLedger, count_predictions
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.training.data_plan import compute_ledger
from megatron_mdm.training.hooks import Hook, TrainingRun

if TYPE_CHECKING:
    from megatron_mdm.training.plan import RunPlan

LEDGER_FILE_NAME = "ledger.json"


class Predictions(Hook):
    """Counts the predicted tokens of every source, and writes them into the run's ledger.

    Args:
        plan: The run.
        mesh: This rank's place. Of the peers that share a replica's batches one counts.
    """

    name = "predictions"

    def __init__(self, plan: RunPlan, mesh: Mesh) -> None:
        self._plan = plan
        self._before = np.zeros(len(plan.config.data.train), dtype=np.int64)
        self._here = np.zeros_like(self._before)
        self._totals: list[int] = self._before.tolist()
        self._counts = mesh.tp.rank == 0 and mesh.pp.is_first
        self._device = mesh.device

    def after_step(self, run: TrainingRun) -> None:
        """Counts the micro batches of the step."""
        if self._counts:
            self._here += count_predictions(run.batches, len(self._here))

    def before_save(self, run: TrainingRun) -> None:
        """Sums over all ranks."""
        sums = torch.from_numpy(self._here.copy()).to(self._device)
        dist.all_reduce(sums)
        self._totals = (self._before + sums.cpu().numpy()).tolist()

    def after_save(self, step: int, path: Path) -> None:
        """Writes the ledger of what is saved."""
        with warn_on_write_error(self._plan.run_dir / LEDGER_FILE_NAME):
            write_ledger(self._plan, step, self._totals)

    def state_dict(self) -> dict[str, Any]:
        """Predicted tokens of each source since the run's first step."""
        return {"per_source": self._totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self._before = np.array(state["per_source"], dtype=np.int64)
        self._totals = self._before.tolist()


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
        "noise": "repeated" if build_objective(plan.config).repeats_noise else "fresh",
        "seen": _list_records(compute_ledger(plan.config, plan.data, step, predictions)),
        "planned": _list_records(compute_ledger(plan.config, plan.data, plan.num_steps)),
    }
    write_json_whole(plan.run_dir / LEDGER_FILE_NAME, record)


def _list_records(ledgers: Sequence[SourceLedger]) -> list[dict[str, Any]]:
    return [ledger.as_record() for ledger in ledgers]
