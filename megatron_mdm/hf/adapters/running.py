"""A run of adapters: checked first, then trained, then written."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mdm.config import ParallelConfig, check_layout, load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.processes import (
    leave_process_group,
    read_world_size,
    start_process_group,
    wait_for_ranks,
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
from megatron_mdm.training.data_plan import plan_data
from megatron_mdm.training.plan import RunPlan, choose_device, choose_dtype

_LOG = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "peft")


def plan_run(folder: Path, config_path: Path, overrides: Sequence[str]) -> RunPlan:
    """Checks all that can be checked before a process group exists.

    Args:
        folder: The export.
        config_path: YAML of the run.
        overrides: `section.key=value` strings.

    Returns:
        The run, with the section `parallel` at its defaults.

    Raises:
        MdmError: Something does not fit.
    """
    exported = read_export(folder)
    if exported.is_shifted:
        turned = ", or set is_causal to true in its config.json, to adapt its next-token prediction"
        raise ConfigError(
            f"--model={folder} predicts a token from the hidden state before it, and fine-tuning "
            "of masked diffusion from the one at it: adapt another export"
            f"{turned if 'ar' in exported.ways else ''}."
        )
    if exported.noise is not None:
        raise ConfigError(
            f"--model={folder} was trained on hybrid or uniform noise, and adapters learn to fill "
            "in masks: adapt another export, or fine-tune its checkpoint with mdm train and "
            "run.initial_weights."
        )
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
    layout = check_layout(config, read_world_size())
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    return RunPlan(config, layout, device, dtype, plan_data(config, export=folder))


def train(
    plan: RunPlan, folder: Path, settings: AdapterSettings, out: Path, merged: Path | None
) -> None:
    """Learns adapters and writes them.

    Args:
        plan: The run.
        folder: The export.
        settings: Its adapters.
        out: New folder of the adapters.
        merged: New folder of an export with them in it; None: there is none.

    Raises:
        MdmError: The adapters cannot be learned or written.
    """
    start_process_group(plan.device)
    try:
        _train(plan, folder, settings, out, merged)
        wait_for_ranks(plan.device)
    finally:
        leave_process_group()


def _train(
    plan: RunPlan, folder: Path, settings: AdapterSettings, out: Path, merged: Path | None
) -> None:
    seed, is_first = plan.config.run.seed, dist.get_rank() == 0
    model = AdaptedModel(folder, settings, seed=seed, device=plan.device, dtype=plan.dtype)
    num_learned = sum(one.numel() for one in model.list_adapters())
    num_all = sum(one.numel() for one in model.peft.parameters())
    _say(is_first, f"{format_count(num_learned)} of {format_count(num_all)} parameters are learned")
    records: list[Record] = []

    def log(record: Record) -> None:
        records.append(record)
        if "train/lr" in record:
            line = format_training_line(record, total_steps=plan.num_steps, eta_seconds=None)
        else:
            line = format_validation_line(record)
        _say(is_first, line)

    learn_adapters(plan, model, log)
    if not is_first:
        return
    metadata: dict[str, Any] = {
        "base_model": str(folder),
        "adapter": asdict(settings) | {"alpha": settings.scale_alpha},
        "num_learned_parameters": num_learned,
        "num_ranks": dist.get_world_size(),
        "data_fingerprint": plan.data.fingerprint,
        "config": plan.config.model_dump(mode="json"),
        "records": records,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    save_adapter(model.peft, out, metadata)
    _say(is_first, f"saved {out}")
    if merged is not None:
        template = next(iter(plan.data.chat_templates), None)
        merge_adapter(model.peft, folder, merged, metadata, template)
        _say(is_first, f"saved {merged}")


def _say(is_first: bool, line: str) -> None:
    if is_first:
        print(line, flush=True)  # noqa: T201 - what a user watches
