"""`mdm average`: which checkpoints of a run are averaged."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.checkpoint.averaging import average_checkpoints
from megatron_mdm.checkpoint.manifest import RAW, read_manifest
from megatron_mdm.checkpoint.retention import list_saved_steps
from megatron_mdm.checkpoint.storage import resolve_checkpoint
from megatron_mdm.config import parse_config
from megatron_mdm.core.command_line import format_next_steps
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import Count
from megatron_mdm.reporting.run_folder import RunFolder


def average(
    *,
    run: Path | None = None,
    last: Count | None = None,
    steps: tuple[Count, ...] = (),
    every_epoch: bool = False,
    checkpoint: tuple[Path, ...] = (),
    weights: str = RAW,
    output: Path,
    overwrite: bool = False,
) -> None:
    """Writes the mean of the weights of several checkpoints, and says what to do with it.

    Args:
        run: Folder of a run, of whose checkpoints --last, --steps or --every-epoch choose; with
            --every-epoch --last chooses among those that end an epoch.
        last: The newest so many.
        steps: Those after these optimizer steps.
        every_epoch: Those that were saved at the end of an epoch.
        checkpoint: Folder of a checkpoint, in the place of --run; several.
        weights: What to average of each: raw, or the name of an average that they hold.
        output: The checkpoints folder to write.
        overwrite: Replace what an earlier call wrote there.
    """
    chosen = _choose(run, last, steps, every_epoch, checkpoint)
    path = average_checkpoints(chosen, output, weights=weights, overwrite=overwrite)
    averaged = read_manifest(path).average_of
    assert averaged is not None
    print(f"wrote {path}: {averaged.describe()}")
    hf = output / "hf"
    export = ["convert", "to-hf", "--run", path, "--output", hf]
    generate = ["generate", "--checkpoint", path, "--prompt", "TEXT"]
    print("\n".join(format_next_steps([("export", export), ("generate", generate)])))


def _choose(
    run: Path | None,
    last: int | None,
    steps: tuple[int, ...],
    every_epoch: bool,
    checkpoints: tuple[Path, ...],
) -> list[Path]:
    """The folders of the checkpoints."""
    if (run is None) == (not checkpoints):
        raise ConfigError("There must be checkpoints: give --run, or --checkpoint for each.")
    rules = {"--last": last is not None, "--steps": bool(steps), "--every-epoch": every_epoch}
    given = [name for name, is_given in rules.items() if is_given]
    if run is None:
        if given:
            raise ConfigError(
                f"{given[0]} chooses among the checkpoints of --run, and --checkpoint names them: "
                "leave it out."
            )
        return [resolve_checkpoint(path) for path in checkpoints]
    if not given or (steps and len(given) > 1):
        raise ConfigError(
            "It is open which checkpoints to average: give --last, --steps or --every-epoch, or "
            "--every-epoch and --last together."
        )
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    saved = dict(reversed(list_saved_steps(folder).items()))
    if not saved:
        raise ConfigError(f"--run={run} holds no checkpoints: give the folder of a run.")
    found = _find_epoch_ends(run, saved) if every_epoch else list(saved)
    if steps:
        found = list(steps)
    if last is not None:
        if last > len(found):
            raise ConfigError(
                f"--last={last} is more than the {len(found)} checkpoints of {run} that there are "
                "to choose from: take fewer, or let runs keep more by checkpoint.keep_last."
            )
        found = found[-last:]
    for step in found:
        if step not in saved:
            raise ConfigError(
                f"--steps={step} names no checkpoint of {run}: there are those of steps "
                f"{', '.join(map(str, saved))}."
            )
    return [saved[step] for step in found]


def _find_epoch_ends(run: Path, saved: dict[int, Path]) -> list[int]:
    """Steps of the checkpoints that were saved at the end of an epoch."""
    # The rooms of training take seconds to import.
    from megatron_mdm.training.epochs import Epochs

    config = parse_config(read_manifest(next(iter(saved.values()))).config)
    tokens = RunFolder(run).run_info.get("unique_tokens")
    if tokens is None:
        raise ConfigError(
            f"--every-epoch needs the length of an epoch, and {run} has no run_info.json, which a "
            "finished run leaves: name the steps with --steps."
        )
    epochs = Epochs(tokens // config.data.seq_length, config.batch.global_batch_size)
    found = [step for step in saved if epochs.ends_with(step)]
    if not found:
        stride = max(epochs.num_windows // epochs.global_batch_size, 1)
        raise ConfigError(
            f"--every-epoch finds no checkpoint of {run} at the end of an epoch, which takes about "
            f"{stride:,} steps: save with checkpoint.every_steps={stride}, or average while "
            "training with a hook of kind swa."
        )
    return found
