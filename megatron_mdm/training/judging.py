"""Metrics of judged windows; the held-out loss of averages of the weights beside the raw one."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_mdm.core.statistics import ClusteredEstimate
from megatron_mdm.diffusion.samples import LossKind
from megatron_mdm.reporting.judged_windows import JudgedWindows, mean_difference
from megatron_mdm.reporting.metrics import name_average_group

if TYPE_CHECKING:
    from megatron_mdm.training.hooks import TrainingRun


class PartEnded(Exception):
    """A validation that all ranks leave at the same place."""

    def __init__(self, stopped_by: signal.Signals | None, reason: str | None) -> None:
        super().__init__(reason)
        self.stopped_by = stopped_by
        self.reason = reason


def list_loss_metrics(group: str, judged: JudgedWindows, prefix: str = "") -> dict[str, float]:
    """Losses with their errors; one window or one document alone has none.

    Args:
        group: Stands before every name, such as `valid`.
        judged: The windows.
        prefix: Stands before the name of each loss.
    """
    found: dict[str, float] = {}
    kinds: tuple[LossKind, ...] = ("nll", "nll_given_first")
    for kind in kinds:
        found |= _list_estimate(f"{group}/{prefix}{kind}", judged.mean(kind))
    return found


def judge_averages(
    run: TrainingRun, judge: Callable[[], JudgedWindows], raw: JudgedWindows
) -> dict[str, float]:
    """Judges every average of the weights on the windows and noise of the raw ones.

    The raw weights are afterwards what they were, bit for bit. Every rank calls it.

    Args:
        run: The run; its `judged_averages` are replaced.
        judge: Judges the weights that the engine has at the moment.
        raw: What that gave for the raw ones.

    Returns:
        Metrics by name: of each average its losses, and how much the loss differs from the raw one,
        window by window.

    Raises:
        PartEnded: All ranks leave the validation here.
    """
    found: dict[str, float] = {}
    run.judged_averages = {}
    for name, state in run.list_weight_states().items():
        if not (state.is_average and state.is_judged):
            continue
        ended: PartEnded | None = None
        with run.engine.states.run_with(state.pieces):
            # No exception may leave the context: only then are the weights put back together.
            try:
                run.judged_averages[name] = judge()
            except PartEnded as error:
                ended = error
        if ended is not None:
            raise ended
        judged, group = run.judged_averages[name], name_average_group(name)
        found |= list_loss_metrics(group, judged)
        found |= _list_estimate(f"{group}/less_raw", mean_difference([(raw, judged)], "nll"))
    return found


def _list_estimate(name: str, estimate: ClusteredEstimate) -> dict[str, float]:
    errors = {
        f"{name}_standard_error": estimate.standard_error,
        f"{name}_clustered_error": estimate.clustered_error,
    }
    known = {one: error for one, error in errors.items() if math.isfinite(error)}
    return {f"{name}_nats_per_token": estimate.mean, **known}
