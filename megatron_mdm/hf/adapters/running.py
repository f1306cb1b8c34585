"""A run of adapters: checked first, then trained, then written."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mdm.config import Config, ParallelConfig, check_layout, load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.processes import (
    launched_world_size,
    resolve_device,
    start_process_group,
)
from megatron_mdm.hf.adapters.model import AdaptedModel, check_fit, read_export
from megatron_mdm.hf.adapters.saving import merge_adapter, save_adapter
from megatron_mdm.hf.adapters.settings import AdapterSettings
from megatron_mdm.hf.adapters.training import Record, learn_adapters
from megatron_mdm.reporting.console import (
    format_count,
    format_training_line,
    format_validation_line,
)
from megatron_mdm.training.data_plan import DataPlan, plan_data

_LOG = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class AdapterRun:
    """A run that can start.

    Attributes:
        config: The run, with the section `parallel` at its defaults.
        folder: The export.
        settings: Its adapters.
        data: Its data.
        device: Of this process.
        dtype: Of the export's weights and of the passes.
    """

    config: Config
    folder: Path
    settings: AdapterSettings
    data: DataPlan
    device: torch.device
    dtype: torch.dtype


def plan_run(
    folder: Path, config_path: Path, settings: AdapterSettings, overrides: Sequence[str]
) -> AdapterRun:
    """Checks all that can be checked before a process group exists.

    Args:
        folder: The export.
        config_path: YAML of the run.
        settings: The adapters.
        overrides: `section.key=value` strings.

    Returns:
        The run.

    Raises:
        MdmError: Something does not fit.
    """
    exported = read_export(folder)
    enforced = ["finetuning.enabled=true", f"objective.kind={exported.kind}"]
    config = load_config(config_path, [*overrides, *enforced])
    check_fit(config, exported, folder)
    if config.parallel != ParallelConfig() and os.environ.get("RANK", "0") == "0":
        _LOG.warning("the section parallel does not count: every rank holds the whole model")
    config = config.model_copy(update={"parallel": ParallelConfig()})
    if config.data.tokenizer is None and (folder / "tokenizer.json").is_file():
        # So that shards of another tokenizer are refused.
        data = config.data.model_copy(update={"tokenizer": str(folder)})
        config = config.model_copy(update={"data": data})
    check_layout(config, launched_world_size())
    device = resolve_device(config.run.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device=cuda needs a GPU, but PyTorch sees none: use run.device=cpu, or install a "
            "CUDA build of PyTorch."
        )
    name = config.run.dtype
    is_half = name == "bf16" or (name == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if is_half else torch.float32
    return AdapterRun(config, folder, settings, plan_data(config, export=folder), device, dtype)


def train(run_: AdapterRun, out: Path, merged: Path | None) -> None:
    """Learns adapters and writes them.

    Args:
        run_: What to do.
        out: New folder of the adapters.
        merged: New folder of an export with them in it; None: there is none.

    Raises:
        MdmError: The adapters cannot be learned or written.
    """
    start_process_group(run_.device)
    try:
        _train(run_, out, merged)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _train(run_: AdapterRun, out: Path, merged: Path | None) -> None:
    config, leads = run_.config, dist.get_rank() == 0
    model = AdaptedModel(
        run_.folder, run_.settings, seed=config.run.seed, device=run_.device, dtype=run_.dtype
    )
    num_learned = sum(one.numel() for one in model.adapters())
    num_all = sum(one.numel() for one in model.peft.parameters())
    _say(leads, f"{format_count(num_learned)} of {format_count(num_all)} parameters are learned")
    records: list[Record] = []

    def log(record: Record) -> None:
        records.append(record)
        if "train/lr" in record:
            line = format_training_line(record, total_steps=run_.data.num_steps, eta_seconds=None)
        else:
            line = format_validation_line(record)
        _say(leads, line)

    learn_adapters(config, run_.data, model, log)
    if not leads:
        return
    metadata: dict[str, Any] = {
        "base_model": str(run_.folder),
        "adapter": asdict(run_.settings) | {"alpha": run_.settings.scale_alpha},
        "num_learned_parameters": num_learned,
        "num_ranks": dist.get_world_size(),
        "data_fingerprint": run_.data.fingerprint,
        "config": config.model_dump(mode="json"),
        "records": records,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    save_adapter(model.peft, out, metadata)
    _say(leads, f"saved {out}")
    if merged is not None:
        merge_adapter(model.peft, run_.folder, merged, metadata)
        _say(leads, f"saved {merged}")


def _say(leads: bool, line: str) -> None:
    if leads:
        print(line, flush=True)  # noqa: T201 - what a user watches
