"""The page of a sweep: how far each run is, all curves on common axes, and what is best so far."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mdm.core.errors import MdmError
from megatron_mdm.reporting.comparison import build_plots
from megatron_mdm.reporting.console import format_count, format_duration
from megatron_mdm.reporting.pages import Heading, Paragraph, Part, Table, write_page
from megatron_mdm.reporting.run_folder import RunFolder, format_scientific
from megatron_mdm.studies.sweeps.grid import Sweep
from megatron_mdm.studies.sweeps.run_sizes import SizedRun, size_runs
from megatron_mdm.studies.sweeps.run_states import RunState, read_states
from megatron_mdm.studies.sweeps.run_table import RunRow, build_rows
from megatron_mdm.studies.sweeps.sweep_display import Display, format_counts

PAGE_NAME = "sweep.html"
REFRESH_SECONDS = 30
# Of the time of a sweep, writing its page takes one part in so many at most.
_MOST_SHARE = 20
# More curves on one pair of axes could not be told apart.
_MOST_CURVES = 12

_STATUS = ("Run", "State", "Step", "Done", "Remaining", "Last loss", "")
_RESULTS = (
    *("Run", "Objective", "N", "D", "U", "Epochs", "FLOPs", "Best loss", "at epoch"),
    *("Less the best", "by document", "Training loss", "Time"),
)
_NOTE = (
    "Losses in nats per token on held-out windows, ± one standard error, over the tokens that AR "
    "and MDM both predict. Less the best: the difference from the least loss of all, window by "
    "window, where both runs judged the same ones; by document: its error if windows of one "
    "document resemble each other. N and FLOPs, 6 N D, are without embeddings; D: tokens so far; "
    "U: distinct tokens. The best of many noisy losses is a little too low."
)


def write_sweep_page(sweep: Sweep, path: Path, *, is_live: bool = False) -> dict[str, RunState]:
    """Writes the page of a sweep from the folders of its runs.

    Args:
        sweep: The sweep.
        path: Page to write; its folder is made when absent.
        is_live: The page is going to be written again, so it refreshes itself; it does so too
            while a run goes on.

    Returns:
        How far the runs are, by name.

    Raises:
        MdmError: A folder holds another run, or a file of one is damaged.
    """
    runs = size_runs(sweep.runs, from_ledgers=True)
    states = read_states(runs)
    rows = build_rows(runs, states)
    is_live = is_live or any(state.status == "running" for state in states.values())
    ranked = sorted(filter(_is_judged, rows), key=lambda row: row["best_loss"])
    written = time.strftime("%H:%M:%S, %d %B %Y")
    every = f"; it comes anew every {REFRESH_SECONDS} s" if is_live else ""
    parts: list[Part] = [
        Paragraph(f"{format_counts(states)}. Written at {written}{every}."),
        *(Paragraph(_describe_best(row)) for row in ranked[:1]),
        Heading("Runs"),
        Table(_STATUS, [_status_cells(run, states) for run in runs]),
    ]
    if ranked:
        parts += [Heading("Curves"), *_draw(runs, ranked)]
        others = [row for row in rows if not _is_judged(row)]
        cells = [_result_cells(row) for row in (*ranked, *others)]
        parts += [Heading("Results, the best first"), Table(_RESULTS, cells, _NOTE)]
    write_page(
        "page.html.j2",
        path,
        title=f"Sweep {sweep.path.stem}",
        subtitle=f"{len(runs)} runs of {sweep.path}",
        parts=parts,
        refresh_seconds=REFRESH_SECONDS if is_live else None,
    )
    return states


class LivePage:
    """Writes the page of a sweep again and again while its runs go on, and never ends the sweep.

    Args:
        sweep: The sweep.
        display: Is told of a page that cannot be written, once.
    """

    def __init__(self, sweep: Sweep, display: Display) -> None:
        self._sweep, self._display = sweep, display
        self._path = sweep.dir / PAGE_NAME
        self._seconds = 0.0
        self._has_failed = False

    def update(self, *, is_last: bool = False) -> None:
        """Writes the page, unless this or another process of the sweep has done so of late.

        Args:
            is_last: Write in any case; nothing more is going to be run here.
        """
        pause = max(REFRESH_SECONDS, _MOST_SHARE * self._seconds)
        if self._has_failed or not (is_last or self._age() > pause):
            return
        started = time.monotonic()
        try:
            write_sweep_page(self._sweep, self._path, is_live=not is_last)
        except (MdmError, OSError) as error:
            self._has_failed = True
            self._display.event(f"{self._path} is not written any more: {error}")
        self._seconds = time.monotonic() - started

    def _age(self) -> float:
        try:
            return time.time() - self._path.stat().st_mtime
        except OSError:
            return math.inf


def _is_judged(row: RunRow) -> bool:
    return row["best_loss"] is not None


def _draw(runs: Sequence[SizedRun], ranked: Sequence[RunRow]) -> list[Part]:
    drawn = {row["run"] for row in ranked[:_MOST_CURVES]}
    shown = [run for run in runs if run.name in drawn]
    plots: list[Part] = [
        *build_plots([run.name for run in shown], [RunFolder(run.folder) for run in shown])
    ]
    if len(ranked) > len(drawn):
        told = f"The {len(drawn)} runs with the least loss, of {len(ranked)} that were judged."
        plots.insert(0, Paragraph(told))
    return plots


def _describe_best(row: RunRow) -> str:
    loss = _with_error(row["best_loss"], row["best_loss_standard_error"])
    state = "" if row["status"] == "done" else f", which is {row['status']}"
    step = f"{row['best_step']:,}"
    return f"Best so far: {row['run']}{state}, with {loss} nats per token at step {step}."


def _status_cells(run: SizedRun, states: Mapping[str, RunState]) -> list[str]:
    state = states[run.name]
    return [
        run.name,
        state.status,
        f"{state.step:,} of {state.num_steps:,}",
        f"{state.step / state.num_steps:.0%}",
        "" if state.eta_seconds is None else format_duration(state.eta_seconds),
        _with_error(state.loss, state.loss_standard_error),
        state.note,
    ]


def _result_cells(row: RunRow) -> list[str]:
    clustered, seconds = row["difference_clustered_error"], row["seconds"]
    at_epoch = ""
    if row["best_step"] is not None:
        at_epoch = f"{row['best_tokens'] / row['num_tokens'] * row['epochs']:.4g}"
    return [
        row["run"],
        row["objective"].upper() if row["objective"] in ("ar", "mdm") else row["objective"],
        format_count(row["num_parameters"]),
        format_count(row["num_tokens"]),
        format_count(row["unique_tokens"]),
        f"{row['epochs']:.4g}",
        format_scientific(row["flops"]) if row["flops"] else "0",
        _with_error(row["best_loss"], row["best_loss_standard_error"]),
        at_epoch,
        _with_error(row["difference"], row["difference_standard_error"], "+.4f"),
        "" if clustered is None else f"± {clustered:.4f}",
        _with_error(row["train_loss"], None),
        "" if seconds is None else format_duration(seconds),
    ]


def _with_error(value: float | None, error: float | None, form: str = ".4f") -> str:
    if value is None:
        return ""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:.4f}")
