"""Everything about a run that is known before a process group exists, checked and resolved."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mdm.checkpoint.discovery import find_checkpoint
from megatron_mdm.checkpoint.manifest import CheckpointManifest, SavedEnvironment, read_manifest
from megatron_mdm.config import Config, Layout, check_layout
from megatron_mdm.core.errors import CheckpointError, ConfigError, DataError
from megatron_mdm.distributed.processes import leads_machine, read_world_size, resolve_device
from megatron_mdm.model.accounting import count_parameters, count_state_elements
from megatron_mdm.model.loss_heads import build_loss_head
from megatron_mdm.training.continuing import check_same_run, continue_run
from megatron_mdm.training.data_plan import DataPlan, plan_data
from megatron_mdm.training.epochs import check_validation_interval
from megatron_mdm.training.hook_list import build_own_hooks
from megatron_mdm.training.hooks import Hook
from megatron_mdm.training.initial_weights import find_initial_weights


@dataclass(frozen=True)
class RunPlan:
    """A run that can start.

    Attributes:
        config: The run.
        layout: Division of ranks.
        device: This process's device.
        dtype: Dtype of forward and backward.
        data: Windows, sample order and length.
        hooks: The user's hooks, in the order of the configuration.
        resume_from: Checkpoint to go on from; None: none, as in what follows.
        saved: Its manifest.
        initial_weights: Checkpoint whose weights a new run begins with.
        environment: What its ranks compute with; None until they have met.
    """

    config: Config
    layout: Layout
    device: torch.device
    dtype: torch.dtype
    data: DataPlan
    hooks: tuple[Hook, ...] = ()
    resume_from: Path | None = None
    saved: CheckpointManifest | None = None
    initial_weights: Path | None = None
    environment: SavedEnvironment | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.data.num_steps

    @property
    def first_step(self) -> int:
        """Steps that the run has taken before."""
        return 0 if self.saved is None else self.saved.step

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir)

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.run_dir / "checkpoints"


def make_plan(config: Config) -> RunPlan:
    """Checks everything that can be checked before any worker talks to another.

    Raises:
        ConfigError: Sizes, device or run folder do not fit.
        DataError: Shards are missing, damaged or of another tokenizer.
        CheckpointError: There is nothing whole to resume from where that is required, or no whole
            checkpoint to begin with.
    """
    layout = check_layout(config, read_world_size())
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    if config.run.compile == "on":
        check_compiler("run.compile=on", device)
    hooks = build_own_hooks(config)
    # Refuses what cannot be saved.
    config.optimizer.list_all_state_names()
    data = plan_data(config)
    # Built once and thrown away, so that its errors come before anything starts.
    build_loss_head(config)
    check_validation_interval(config, data.train.num_windows)
    if leads_machine():
        # Unreadable data shall be found now; the machine's other ranks are told the content.
        data.read_content()
    config.objective.check_num_steps(data.num_steps)
    for section in config.hooks:
        section.check_length(config, data.num_steps, data.train.num_windows)
    plan = resume_plan(
        RunPlan(config, layout, device, dtype, data, hooks), _find_checkpoint(config)
    )
    for hook in hooks:
        hook.check_plan(plan)
    return plan


def resume_plan(plan: RunPlan, path: Path | None) -> RunPlan:
    """Makes a plan go on from a checkpoint.

    Args:
        plan: The run, which may have gone on from another one.
        path: A whole checkpoint of the run's folder; None: start anew.

    Raises:
        ConfigError: The checkpoint belongs to another run, or to one of another shape.
        DataError: It was trained on other data.
    """
    if path is None:
        initial_weights = plan.initial_weights or find_initial_weights(plan.config)
        return replace(plan, resume_from=None, saved=None, initial_weights=initial_weights)
    saved = read_manifest(path)
    check_same_run(plan.config, saved, path)
    _check_same_data(plan.data, saved, path)
    config, data = continue_run(plan.config, plan.data, saved, path)
    return replace(
        plan, config=config, data=data, resume_from=path, saved=saved, initial_weights=None
    )


def choose_device(config: Config) -> torch.device:
    """The device of this process; a ConfigError where there is none such."""
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device=cuda needs a GPU, but PyTorch sees none: use run.device=cpu, or install a "
            "CUDA build of PyTorch and check nvidia-smi."
        )
    device = resolve_device(config.run.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={device.index} has no GPU of its own, this node has "
            f"{torch.cuda.device_count()}: launch at most that many processes per node."
        )
    return device


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward; a ConfigError where nothing would keep float32 weights."""
    name = config.run.dtype
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name == "bf16" and config.parallel.zero_stage == 0:
        raise ConfigError(
            "parallel.zero_stage=0 with bf16 would keep no float32 master weights: use "
            "parallel.zero_stage=1, which costs no more memory, or run.dtype=fp32."
        )
    return torch.bfloat16 if name == "bf16" else torch.float32


def _find_checkpoint(config: Config) -> Path | None:
    folder = Path(config.run.dir) / "checkpoints"
    latest = find_checkpoint(folder, config.checkpoint.on_damage)
    if config.checkpoint.resume == "never":
        if latest is not None:
            raise ConfigError(
                f"checkpoint.resume=never, but {folder} holds {latest.name}: choose another "
                "run.dir, or resume it with checkpoint.resume=auto."
            )
        return None
    if latest is None and config.checkpoint.resume == "required":
        raise CheckpointError(
            f"checkpoint.resume=required, but {folder} holds no checkpoint: correct run.dir, or "
            "start with checkpoint.resume=auto."
        )
    return latest


def _check_same_data(data: DataPlan, saved: CheckpointManifest, path: Path) -> None:
    # Until the ranks have met, only one rank of each machine has read the tokens.
    if data.read_elsewhere is None and not leads_machine():
        return
    if saved.data_fingerprint != data.fingerprint:
        raise DataError(
            f"The tokens of data.train are not those that {path} was trained on: restore the "
            "shards, or choose another run.dir for the new data."
        )


def check_compiler(option: str, device: torch.device) -> None:
    """Refuses, with a ConfigError, what needs a C++ compiler on a CPU that has none."""
    if device.type != "cpu":
        return
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"{option} needs a C++ compiler on a CPU, but {' and '.join(names)} cannot be found: "
            f"install one, set CXX to it, or leave {option.partition('=')[0]} out."
        )


def find_missing_space(plan: RunPlan) -> str | None:
    """Looks for room for a checkpoint in the run's folder, here on this machine.

    Returns:
        What is missing, in a sentence; None if nothing is.
    """
    # A checkpoint is float32; while it is written the last one stays.
    parameters = count_parameters(plan.config.model).padded_total
    kept = sum(len(section.list_weight_states()) for section in plan.config.hooks)
    needed = 4 * ((1 + kept) * parameters + count_state_elements(plan.config))
    parent = plan.run_dir.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return f"run.dir={plan.config.run.dir} cannot be written: choose another folder."
    free = shutil.disk_usage(parent).free
    if free < needed:
        return (
            f"run.dir={plan.config.run.dir} has {free:,} bytes free, less than one checkpoint of "
            f"{needed:,} bytes: free some space or choose another disk."
        )
    return None
