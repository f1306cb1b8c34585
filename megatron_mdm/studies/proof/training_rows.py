"""Training benchmarks of a proof as rows of tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.reporting.figures import PALETTE, REFERENCE_COLOR, open_figure, save_figure
from megatron_mdm.studies.proof.running import Command, StageRecord

# Reads what is known of a stage.
Read = Callable[[str], StageRecord]
GIGABYTE = 1e9
# How far an estimate of memory may be off.
MEMORY_TOLERANCE = 0.1
NOT_MEASURED = "not measured"


class TrainedRow(NamedTuple):
    """A training benchmark, as tables and plots show it.

    Attributes:
        what: The model and what trains it.
        micro_batch_size: Sequences of a step.
        overrides: What differs from the defaults.
        tokens_per_second: Median.
        utilisation: Share of the data sheet's peak, of a measured matmul without one.
        peak_bytes: Measured on a GPU.
        estimated_bytes: For our cases.
    """

    what: str
    micro_batch_size: int
    overrides: str
    tokens_per_second: float
    utilisation: float
    peak_bytes: int | None
    estimated_bytes: int | None

    @property
    def name(self) -> str:
        """All that tells it from the others."""
        parts = (self.what, f"micro batch {self.micro_batch_size}", self.overrides)
        return ", ".join(filter(None, parts))


def list_done(record: StageRecord, benchmark: str) -> list[Command]:
    """Commands that have a report.

    Args:
        record: Of a stage.
        benchmark: The first word of the command.
    """
    return [one for one in record.commands if one.status == "done" and one.words[0] == benchmark]


def list_trained(read: Read) -> list[TrainedRow]:
    """All training benchmarks that have a report, in order, none twice.

    Args:
        read: Reads a stage.
    """
    rows = []
    for stage in ("train", "memory"):
        for command in list_done(read(stage), "train"):
            assert command.report is not None  # it is done
            rows += list(_read_trained(command.report))
    return list(dict.fromkeys(rows))


def draw_speed(folder: Path, trained: Sequence[TrainedRow]) -> Path:
    """Draws tokens per second of every training benchmark.

    Args:
        folder: Gets `gpu_speed.png`.
        trained: At least one.

    Returns:
        The picture.
    """
    names = [row.name for row in trained]
    with open_figure(9.5, 1.0 + 0.34 * len(trained)) as (figure, (axes,)):
        colors = [PALETTE[0] if " ours" in f" {row.what}" else REFERENCE_COLOR for row in trained]
        values = [row.tokens_per_second for row in trained]
        bars = axes.barh(range(len(names)), values, color=colors)
        axes.bar_label(bars, [f" {row.utilisation:.0%}" for row in trained])
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.12 * max(values))
        axes.set_xlabel("tokens per second; beside the bar: MFU", loc="right")
    path = folder / "gpu_speed.png"
    save_figure(path, figure)
    return path


def draw_memory(folder: Path, trained: Sequence[TrainedRow]) -> Path:
    """Draws peak memory against the estimate, and how far that may be off.

    Args:
        folder: Gets `gpu_memory.png`.
        trained: Training benchmarks; those with both numbers are drawn.

    Returns:
        The picture.
    """
    points = [
        (row.estimated_bytes / GIGABYTE, row.peak_bytes / GIGABYTE)
        for row in trained
        if row.peak_bytes and row.estimated_bytes
    ]
    with open_figure(5.2, 4.6) as (figure, (axes,)):
        largest = 1.15 * max([1.0, *(max(point) for point in points)])
        line = [0.0, largest]
        axes.plot(line, line, color=REFERENCE_COLOR, lw=1)
        low, high = (
            [factor * end for end in line]
            for factor in (1 - MEMORY_TOLERANCE, 1 + MEMORY_TOLERANCE)
        )
        axes.fill_between(line, low, high, color=REFERENCE_COLOR, alpha=0.2, lw=0)
        if points:
            axes.scatter(*zip(*points, strict=True), color=PALETTE[0], zorder=3)
        else:
            axes.text(largest / 2, largest / 2, NOT_MEASURED, ha="center")
        axes.set(xlim=line, ylim=line, xlabel="estimated, GB", ylabel="measured peak, GB")
        axes.set_title(f"Memory of a GPU; grey: within {MEMORY_TOLERANCE:.0%}")
    path = folder / "gpu_memory.png"
    save_figure(path, figure)
    return path


def _read_trained(report: dict[str, Any]) -> Iterator[TrainedRow]:
    settings, results = report["settings"], report["results"]
    preset = settings["preset"]
    for case in settings["cases"]:
        found = results[case]
        share = found.get("share_of_peak", found["share_of_matmul"])
        yield TrainedRow(
            f"{preset} {case.replace('_', ' ')}, S {settings['seq_length']:,}",
            settings["micro_batch_size"],
            ", ".join(settings["overrides"]),
            found["tokens_per_second"]["median"],
            share["median"],
            found.get("peak_bytes"),
            found.get("estimated_bytes"),
        )
