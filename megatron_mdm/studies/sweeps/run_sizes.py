"""How large the runs of a sweep are: parameters, windows, steps, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mdm.config import Config, SourceConfig, check_layout
from megatron_mdm.core.errors import ConfigError, DataError, MdmError
from megatron_mdm.data.mixture import check_caps, count_stated_samples, share_visits
from megatron_mdm.data.opening import open_source, open_windows
from megatron_mdm.data.source import TokenSource
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.model.accounting import (
    count_parameters,
    count_steps,
    model_size,
    run_flops_per_token,
    six_nd_flops,
)
from megatron_mdm.reporting.run_folder import RunFolder
from megatron_mdm.studies.sweeps.grid import SweepRun

_LEDGER_REMEDY = "remove it, or let the run save a checkpoint again."


@dataclass(frozen=True)
class SizedRun(SweepRun):
    """A run with the counts that follow from its configuration and its data.

    Attributes:
        num_windows: Training windows of a pass over all sources.
        num_steps: Optimizer steps of the whole run.
    """

    num_windows: int
    num_steps: int

    @property
    def _mean_length(self) -> float:
        return build_objective(self.config).mean_length(self.config.data.seq_length)

    @property
    def num_parameters(self) -> int:
        """N: parameters without embeddings."""
        return count_parameters(self.config.model).non_embedding

    @property
    def num_parameters_with_embeddings(self) -> int:
        """N as the data-constrained family counts it, see `model_size`."""
        return int(model_size(self.config.model).with_embeddings)

    @property
    def total_parameters(self) -> int:
        """All that is trained, without padding."""
        return count_parameters(self.config.model).total

    @property
    def unique_tokens(self) -> int:
        """U: distinct tokens of the training windows."""
        return self.num_windows * self.config.data.seq_length

    def num_samples(self, step: int) -> int:
        """Windows shown, with repetition, in so many optimizer steps."""
        return step * self.config.batch.global_batch_size

    def num_tokens(self, step: int) -> int:
        """D: tokens trained on in so many steps; expected ones where samples are cut short."""
        return round(self.num_samples(step) * self._mean_length)

    def epochs(self, step: int) -> float:
        """Passes over the training windows in so many steps."""
        return self.num_samples(step) / self.num_windows

    def flops(self, step: int) -> float:
        """C = 6 N D of so many steps, N without embeddings."""
        return six_nd_flops(self.config.model, self.num_samples(step) * self._mean_length)

    def flops_with_embeddings(self, step: int) -> float:
        """C = 6 N D of so many steps, N with embeddings."""
        return self.flops(step) * self.num_parameters_with_embeddings / self.num_parameters

    def exact_flops(self, step: int) -> float:
        """FLOPs of all matrix products in so many steps; windows are computed whole."""
        samples, seq_length = self.num_samples(step), self.config.data.seq_length
        return run_flops_per_token(self.config) * samples * seq_length


def size_runs(runs: Iterable[SweepRun], *, from_ledgers: bool = False) -> list[SizedRun]:
    """Sizes runs up, and checks what can be checked of them and their data before one starts.

    Args:
        runs: Runs of a sweep, each in one process.
        from_ledgers: Take the counts of a run that has written a checkpoint from its folder, so
            that results can be read where the shards are not.

    Returns:
        The runs with their sizes.

    Raises:
        MdmError: A run could not start: shards are missing, the mixture or the layout is
            impossible, or the source holds fewer tokens than the run is to use.
    """
    opened: dict[str, TokenSource] = {}
    sized = []
    for run in runs:
        try:
            check_layout(run.config, world_size=1)
            ledger = RunFolder(run.folder).ledger if from_ledgers else {}
            counts = _told(run, ledger) if ledger else _counted(run.config, opened)
        except MdmError as error:
            raise type(error)(f"run {run.name}: {error}") from None
        sized.append(SizedRun(run.name, run.config, *counts))
    return sized


def _told(run: SweepRun, ledger: Mapping[str, Any]) -> tuple[int, int]:
    try:
        windows = sum(source["num_windows"] for source in ledger["planned"])
        return windows, ledger["num_steps"]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{run.folder / 'ledger.json'} is not the ledger of a run ({error!r}): {_LEDGER_REMEDY}"
        ) from None


def _counted(config: Config, opened: dict[str, TokenSource]) -> tuple[int, int]:
    """Windows and steps."""
    data = config.data
    windows = []
    for index, source in enumerate(data.train):
        tokens = _open(source, f"data.train.{index}", opened)
        limit = source.max_unique_tokens
        if limit is not None and limit > tokens.num_tokens:
            # Training would use them all, and two amounts of data would be the same one.
            raise ConfigError(
                f"data.train.{index}.max_unique_tokens={limit} is more than the "
                f"{tokens.num_tokens} tokens of {source.path}: lower it, or use a larger corpus."
            )
        windows.append(open_windows(config, source, tokens).num_windows)
    for index, held_out in enumerate(data.valid):
        open_windows(config, held_out, _open(held_out, f"data.valid.{index}", opened))
    num_steps = count_steps(config, sum(windows), count_stated_samples(data.train, windows))
    batch_size = config.batch.global_batch_size
    total = num_steps * batch_size
    share_visits(data.train, windows, total)
    check_caps(data.train, windows, total, seq_length=data.seq_length, global_batch_size=batch_size)
    return sum(windows), num_steps


def _open(source: SourceConfig, field: str, opened: dict[str, TokenSource]) -> TokenSource:
    if source.path not in opened:
        opened[source.path] = open_source(source, field)
    return opened[source.path]
