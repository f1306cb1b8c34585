"""Further places that a run's metrics go to: Weights & Biases and TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.remarks import warn
from megatron_mdm.reporting.metrics import MetricsSink, MetricValue

WandbMode = Literal["offline", "online", "required"]
# How long W&B may look for its server before a run goes on without it.
_START_SECONDS = 30.0


class WandbSink:
    """Sends records to Weights & Biases, or to its offline files.

    Args:
        project: W&B project.
        run_name: Display name of the run.
        mode: "required": ends with an error where W&B cannot be reached; "online": goes on offline
            then; "offline" writes files for `wandb sync`. The variable WANDB_MODE takes the place
            of the first two.
        dir: Directory under which W&B makes its own `wandb` directory; made when absent.
        config: Resolved settings of the run, shown with it.
        run_id: Identity of the run; a resumed run with the same one continues its W&B curve.
            W&B ignores steps that it already holds. None starts a new W&B run.

    Raises:
        ConfigError: wandb is not installed, or cannot start as required.
    """

    def __init__(
        self,
        project: str,
        run_name: str,
        mode: WandbMode,
        dir: Path,
        config: Mapping[str, Any],
        *,
        run_id: str | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"reporting.wandb={mode} needs the wandb package, which is not installed: "
                "install it or set reporting.wandb=off."
            ) from error
        dir.mkdir(parents=True, exist_ok=True)
        told = os.environ.get("WANDB_MODE", "")
        wanted = told if told in ("online", "offline", "disabled", "shared") else mode

        def start(mode: str) -> Any:
            return wandb.init(
                project=project,
                name=run_name,
                mode=cast(Any, "online" if mode == "required" else mode),
                dir=str(dir),
                config=dict(config),
                id=run_id,
                resume=None if run_id is None else "allow",
                settings=wandb.Settings(init_timeout=_START_SECONDS),
            )

        try:
            self._run = start(wanted)
        except (wandb.Error, OSError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error) else "no reason"
            if mode == "required" or wanted == "offline":
                raise ConfigError(
                    f"reporting.wandb={mode} could not start a W&B run ({reason}): run "
                    "`wandb login`, check the network, or set reporting.wandb=offline."
                ) from error
            warn(
                f"W&B could not be reached ({reason}): its run goes on offline in {dir}; send it "
                "later with `wandb sync`, or set reporting.wandb=required to end instead."
            )
            self._run = start("offline")

    def log(self, record: Mapping[str, MetricValue], step: int) -> None:
        """Sends one record.

        Args:
            record: Metric name to value.
            step: Optimizer step; records of one step are merged by W&B.
        """
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=step)

    def close(self) -> None:
        """Ends the W&B run and waits until its data is written."""
        import wandb

        self._run.finish()
        # The service writes its files after finish() has returned; teardown waits for its end.
        wandb.teardown()


class TensorBoardSink:
    """Writes the numbers of each record as TensorBoard scalars; text values are left out.

    Args:
        dir: Log directory; made when absent.
        resume_step: Step that the run continues from, or None for a fresh start. TensorBoard
            hides earlier events of later steps.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, dir: Path, *, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "reporting.tensorboard=true needs the tensorboard package, which is not "
                "installed: install it or set reporting.tensorboard=false."
            ) from error
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(log_dir=str(dir), purge_step=purge_step, flush_secs=30)

    def log(self, record: Mapping[str, MetricValue], step: int) -> None:
        """Writes the scalars of one record.

        Args:
            record: Metric name to value.
            step: Optimizer step, the x axis in TensorBoard.
        """
        for name, value in record.items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Writes out what is buffered and closes the event file."""
        self._writer.close()


def build_sinks(
    run_dir: Path,
    *,
    wandb_mode: str = "off",
    wandb_project: str = "megatron_mdm",
    wandb_run_name: str | None = None,
    wandb_run_id: str | None = None,
    tensorboard: bool = False,
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
) -> list[MetricsSink]:
    """Builds the sinks that the reporting settings ask for.

    Args:
        run_dir: Directory of the run; W&B files go to `<run_dir>/wandb`, TensorBoard events to
            `<run_dir>/tensorboard`.
        wandb_mode: "off", "offline", "online" or "required".
        wandb_project: W&B project.
        wandb_run_name: W&B display name; None takes the name of `run_dir`.
        wandb_run_id: W&B identity that a resumed run continues; None starts a new W&B run.
        tensorboard: Whether to write TensorBoard events.
        config: Resolved settings of the run, shown in W&B.
        resume_step: Step that the run continues from, or None for a fresh start.

    Returns:
        The sinks, for `MetricsLogger`.

    Raises:
        ConfigError: `wandb_mode` is unknown, or a package or login is missing.
    """
    sinks: list[MetricsSink] = []
    if wandb_mode in ("offline", "online", "required"):
        mode = cast(WandbMode, wandb_mode)
        run_name = wandb_run_name or run_dir.resolve().name
        sinks.append(
            WandbSink(wandb_project, run_name, mode, run_dir, config or {}, run_id=wandb_run_id)
        )
    elif wandb_mode != "off":
        raise ConfigError(
            f"reporting.wandb={wandb_mode} is not a mode: use off, offline, online or required."
        )
    if tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", resume_step=resume_step))
    return sinks
