"""Branches: runs that begin at a checkpoint of another, with its optimizer, position and passes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.manifest import MANIFEST, CheckpointManifest, SavedOrder
from megatron_mdm.checkpoint.publishing import publish_checkpoint, write_aside
from megatron_mdm.checkpoint.retention import list_saved_steps
from megatron_mdm.checkpoint.storage import name_checkpoint, resolve_checkpoint
from megatron_mdm.config import Config, dump_config, dump_recipe, parse_config
from megatron_mdm.config.loading import apply_override, parse_yaml
from megatron_mdm.core.command_line import format_next_steps
from megatron_mdm.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    explain_write_errors,
)
from megatron_mdm.core.files import write_json_whole, write_text_whole
from megatron_mdm.data.mixture import OrderStart, count_stated_samples
from megatron_mdm.model.accounting import count_steps
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME, VALIDATIONS_FILE_NAME
from megatron_mdm.reporting.record_log import RecordLog
from megatron_mdm.training.continuing import find_order_start, keep_warmup, mark_order
from megatron_mdm.training.data_plan import DataPlan, order_samples, plan_data
from megatron_mdm.training.initial_weights import find_model_differences
from megatron_mdm.training.run_files import CONFIG_FILE_NAME, RUN_INFO_FILE_NAME

# What positions, passes and optimizer states refer to.
_FIXED = (
    *("run.seed", "objective.kind", "optimizer.kind", "data.seq_length", "data.order"),
    *("batch.global_batch_size", "finetuning.enabled"),
)


@dataclass(frozen=True, kw_only=True)
class BranchSettings:
    """Where a branch begins, and where it will live.

    Attributes:
        source: Folder of the run to branch from.
        step: Step of its checkpoint; without it, the latest.
        out: Folder of the new run.
    """

    source: Path
    out: Path
    step: int | None = None


@dataclass(frozen=True)
class Branch:
    """A branch that was written.

    Attributes:
        config: Its configuration, to start it with.
        checkpoint: What it begins with.
        step: Steps taken there.
        num_steps: Steps that it will have.
        copied_bytes: What could not be linked.
    """

    config: Path
    checkpoint: Path
    step: int
    num_steps: int
    copied_bytes: int


def branch_run(settings: BranchSettings, overrides: Sequence[str] = ()) -> Branch:
    """Writes the folder of a run that goes on from a checkpoint of another.

    The tensor files are hard links to those of the checkpoint, which stay when the other run
    deletes its own; they are copied where the file system has no links between the two.

    Args:
        settings: Which checkpoint, and where to.
        overrides: `section.key=value`, what the branch does otherwise.

    Returns:
        What was written. Starting a run with its configuration goes on there.

    Raises:
        CheckpointError: There is no whole checkpoint of that step, or it cannot be written.
        ConfigError: The folder is in use, or what is asked for cannot go on from the checkpoint.
        DataError: The shards of the branch, or of a run with another mixture, cannot be read.
    """
    path = _find_checkpoint(settings)
    saved = verify_checkpoint(path)
    _check_free(settings.out)
    before = parse_config(saved.config)
    config = _build_config(before, settings.out, overrides)
    _check_branches(config, before, saved, path)
    data = plan_data(config)
    old = _open_old_data(data, before, saved)
    num_before = _count_steps(before, old)
    if not any(one.startswith("schedule.warmup_") for one in overrides):
        config = keep_warmup(config, before, num_before)
    if data.num_steps <= saved.step:
        raise ConfigError(
            f"The schedule ends the branch at step {data.num_steps}, and {path} has taken "
            f"{saved.step}: give it a length beyond that, such as "
            f"schedule.steps={2 * saved.step}."
        )
    continuing = _find_continuing(data, old)
    start = find_order_start(saved)
    if _is_mixed_anew(config, before) or not all(continuing) or data.num_steps != num_before:
        start = _start_order(before, old, num_before, saved, continuing)
    # Before anything is written: what this mixture refuses.
    order_samples(config, data.order.windows, data.num_steps, start)
    manifest = saved.model_copy(
        update={
            "config": config.model_dump(mode="json"),
            "data_fingerprint": data.fingerprint,
            "tokenizer": data.tokenizer,
            "order_start": None if start is None else SavedOrder(**start._asdict()),
            "state": _adapt_states(saved, continuing),
        }
    )
    copied = _write_checkpoint(path, settings.out / "checkpoints" / path.name, manifest)
    with explain_write_errors(settings.out, CheckpointError):
        _write_files(path, settings, saved, overrides, config)
    return Branch(
        config=settings.out / CONFIG_FILE_NAME,
        checkpoint=settings.out / "checkpoints" / path.name,
        step=saved.step,
        num_steps=data.num_steps,
        copied_bytes=copied,
    )


def describe_branch(branch: Branch) -> str:
    """What was written, and how to start it; two lines."""
    copied = f", {branch.copied_bytes:,} bytes copied" if branch.copied_bytes else ""
    steps = format_next_steps([("train", ["train", "--config", branch.config])])
    first = (
        f"wrote {branch.config}: goes on from step {branch.step:,} to {branch.num_steps:,}{copied}"
    )
    return "\n".join([first, *steps])


def _find_checkpoint(settings: BranchSettings) -> Path:
    run_dir = settings.source
    if settings.step is None:
        path = resolve_checkpoint(run_dir)
    else:
        steps = list_saved_steps(run_dir / "checkpoints")
        if settings.step not in steps:
            found = ", ".join(str(step) for step in sorted(steps)) or "none"
            raise CheckpointError(
                f"{run_dir} holds no checkpoint of step {settings.step}: choose one of {found}."
            )
        path = steps[settings.step]
    return path


def _check_free(out: Path) -> None:
    if any((out / name).exists() for name in ("checkpoints", CONFIG_FILE_NAME, METRICS_FILE_NAME)):
        raise ConfigError(f"--out={out} holds a run already: choose another folder.")


def _build_config(before: Config, out: Path, overrides: Sequence[str]) -> Config:
    # Without defaults: those of one kind of schedule would not go with another.
    tree = parse_yaml(dump_recipe(before), "the configuration")
    for override in overrides:
        apply_override(tree, override)
    tree["run"]["dir"] = str(out)
    # The branch's folder has a checkpoint before its first start.
    tree.setdefault("checkpoint", {})["resume"] = "auto"
    return parse_config(tree)


def _check_branches(config: Config, before: Config, saved: CheckpointManifest, path: Path) -> None:
    """Refuses what a checkpoint cannot go on as."""
    if saved.kind == "weights":
        raise ConfigError(
            f"{path} holds weights without the optimizer's state, so that nothing can go on from "
            f"it: begin a new run with run.initial_weights={path}."
        )
    differences = {
        name: (_get(config, name), _get(before, name))
        for name in _FIXED
        if _get(config, name) != _get(before, name)
    }
    differences |= find_model_differences(config.model, before.model)
    for name, (value, was) in differences.items():
        is_other_model = name.startswith("model.")
        remedy = "" if is_other_model else f", or begin a new run with run.initial_weights={path}"
        raise ConfigError(
            f"{name}={value} differs from the {was} of {path}, and a branch goes on with its "
            f"weights, optimizer state and place in the data: leave it out{remedy}."
        )


def _get(config: Config, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def _open_old_data(data: DataPlan, before: Config, saved: CheckpointManifest) -> DataPlan:
    """What the run that saved the checkpoint was trained on; the branch's own if it is the same."""
    if data.fingerprint == saved.data_fingerprint:
        return data
    old = plan_data(before)
    if old.fingerprint != saved.data_fingerprint:
        raise DataError(
            f"The tokens of data.train of {before.run.dir} are not those that it was trained on, "
            "and a branch with other data goes on with their passes: restore the shards."
        )
    return old


def _find_continuing(data: DataPlan, old: DataPlan) -> list[bool]:
    """Which sources keep place and content, and so go on with their passes."""
    told = [source.fingerprint() for source in old.train.sources]
    return [
        told[place : place + 1] == [source.fingerprint()]
        for place, source in enumerate(data.train.sources)
    ]


def _is_mixed_anew(config: Config, before: Config) -> bool:
    shares = [[(one.weight, one.epochs) for one in each.data.train] for each in (before, config)]
    return len(shares[1]) > 1 and shares[0] != shares[1]


def _start_order(
    before: Config,
    old: DataPlan,
    num_before: int,
    saved: CheckpointManifest,
    continuing: Sequence[bool],
) -> OrderStart | None:
    """Where the branch's sample order begins; a single source goes on as if it had not stopped."""
    if list(continuing) == [True] and len(old.order.windows) == 1:
        return find_order_start(saved)
    marked = mark_order(before, old.order.windows, num_before, saved)
    visits = [marked.visits[place] if goes else 0 for place, goes in enumerate(continuing)]
    return OrderStart(saved.consumed_samples, tuple(visits))


def _count_steps(config: Config, data: DataPlan) -> int:
    windows = data.order.windows
    return count_steps(config, sum(windows), count_stated_samples(config.data.train, windows))


def _adapt_states(saved: CheckpointManifest, continuing: Sequence[bool]) -> dict[str, Any]:
    """States of the hooks; of sources that begin there, nothing was predicted before."""
    states = deepcopy(saved.state)
    if "predictions" in states:
        counts = states["predictions"]["per_source"]
        states["predictions"]["per_source"] = [
            counts[place] if goes else 0 for place, goes in enumerate(continuing)
        ]
    if not all(continuing) or len(continuing) != len(saved.config["data"]["train"]):
        # An epoch of another mixture has another length.
        states.pop("epoch_loss", None)
    return states


def _write_checkpoint(path: Path, final: Path, manifest: CheckpointManifest) -> int:
    """Publishes the files of a checkpoint under another manifest; returns the bytes copied."""
    copied = 0
    with write_aside(final) as aside:
        for name, record in manifest.files.items():
            try:
                os.link(path / name, aside / name)
            # Another file system, or one without links.
            except OSError:
                shutil.copyfile(path / name, aside / name)
                copied += record.num_bytes
        publish_checkpoint(aside, final, manifest)
    return copied


def _write_files(
    path: Path,
    settings: BranchSettings,
    saved: CheckpointManifest,
    overrides: Sequence[str],
    config: Config,
) -> None:
    """The curve up to there, where it comes from, and last the configuration."""
    out, source = settings.out, path.parent.parent
    for name in (METRICS_FILE_NAME, VALIDATIONS_FILE_NAME):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
            RecordLog(out / name, resume_step=saved.step).close()
    identity = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["manifest_sha256"]
    lineage = {
        "run": str(source.resolve()),
        "step": saved.step,
        "checkpoint": name_checkpoint(saved.step),
        "manifest_sha256": identity,
        "overrides": list(overrides),
    }
    write_json_whole(out / RUN_INFO_FILE_NAME, {"branched_from": lineage})
    write_text_whole(out / CONFIG_FILE_NAME, dump_config(config))
