"""The files that a run keeps of itself in its folder, besides checkpoints."""

from __future__ import annotations

import json
import platform
import resource
import sys
import uuid

from megatron_mdm.config import dump_config
from megatron_mdm.core.files import remove_leftovers, write_json_whole, write_text_whole
from megatron_mdm.core.remarks import warn_on_write_error
from megatron_mdm.reporting.baselines import BASELINES_FILE_NAME
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME, VALIDATIONS_FILE_NAME, MetricsLogger
from megatron_mdm.reporting.sinks import build_sinks
from megatron_mdm.training.description import count_run
from megatron_mdm.training.environment import list_versions
from megatron_mdm.training.plan import RunPlan
from megatron_mdm.training.recount import LEDGER_FILE_NAME
from megatron_mdm.training.restarts import STOPPED_FILE_NAME

CONFIG_FILE_NAME, RUN_INFO_FILE_NAME, _WANDB_RUN_ID = "config.yaml", "run_info.json", "wandb_run_id"
# Files that a killed run may have been about to replace.
_WRITTEN_WHOLE = (
    *(
        CONFIG_FILE_NAME,
        RUN_INFO_FILE_NAME,
        _WANDB_RUN_ID,
        METRICS_FILE_NAME,
        VALIDATIONS_FILE_NAME,
    ),
    *(LEDGER_FILE_NAME, STOPPED_FILE_NAME, BASELINES_FILE_NAME),
)


def clean_run_dir(plan: RunPlan) -> None:
    """Removes what an earlier run has left; for the first rank alone, with the lock."""
    (plan.run_dir / STOPPED_FILE_NAME).unlink(missing_ok=True)
    for name in _WRITTEN_WHOLE:
        remove_leftovers(plan.run_dir / name)


def open_logger(plan: RunPlan) -> MetricsLogger:
    """Opens the run's metrics, of which those up to its first step stay, and writes its config."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    write_text_whole(plan.run_dir / CONFIG_FILE_NAME, dump_config(plan.config))
    resume_step = plan.first_step or None
    reporting = plan.config.reporting
    sinks = build_sinks(
        plan.run_dir,
        wandb_mode=reporting.wandb,
        wandb_project=reporting.wandb_project,
        wandb_run_name=plan.run_dir.name,
        wandb_run_id=_find_wandb_run_id(plan) if reporting.wandb != "off" else None,
        tensorboard=reporting.tensorboard,
        config=plan.config.model_dump(mode="json"),
        resume_step=resume_step,
    )
    return MetricsLogger(plan.run_dir, resume_step=resume_step, sinks=sinks)


def write_run_info(plan: RunPlan, wall_seconds: float) -> None:
    """Writes what a run was and took; a full disk is warned of.

    Args:
        plan: The run.
        wall_seconds: Since its start.
    """
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    path = plan.run_dir / RUN_INFO_FILE_NAME
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if plan.resume_from is None:
        earlier = {}
    before = earlier.get("wall_seconds", 0.0)
    info = {
        **{name: earlier[name] for name in ("branched_from",) if name in earlier},
        **count_run(plan),
        "wall_seconds": round(before + wall_seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "platform": platform.platform(),
        **(plan.environment.model_dump() if plan.environment is not None else {}),
        "versions": list_versions(),
    }
    with warn_on_write_error(path):
        write_json_whole(path, info)


def _find_wandb_run_id(plan: RunPlan) -> str:
    # A resumed run continues its W&B curve; a new run gets one of its own.
    path = plan.run_dir / _WANDB_RUN_ID
    if plan.resume_from is None or not path.exists():
        write_text_whole(path, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="utf-8").strip()
