"""Plots of a run as SVG text that stands inside an HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_mdm.reporting.baselines import Baselines
from megatron_mdm.reporting.figures import (
    AS_TRAINED,
    REFERENCE_COLOR,
    REFERENCE_DASHES,
    STYLE,
    TRAINING_WINDOWS,
    color_objectives,
    draw_baselines,
    list_further_losses,
    render_svg,
)
from megatron_mdm.reporting.metrics import NLL, TRAIN_NLL

_MAX_POINTS = 2000
# Raw losses of a diffusion model have a heavy tail; the axis shows the curve, not the tail.
_RAW_QUANTILE = 0.99
_LEGEND_COLUMNS = 3
_JUDGED = {
    TRAIN_NLL: {"marker": "s", "ls": TRAINING_WINDOWS, "label": "training windows"},
    NLL: {"marker": "o", "label": "held-out windows \u00b1 1 standard error"},
}


@dataclass(frozen=True)
class Series:
    """One metric against optimizer steps.

    Args:
        steps: Steps, int64 [num_points], in file order.
        values: Finite values, float64 [num_points].
        num_non_finite: How many NaN or infinite values were left out.
    """

    steps: np.ndarray
    values: np.ndarray
    num_non_finite: int = 0

    def __len__(self) -> int:
        return len(self.steps)


def extract_series(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Picks one metric out of the records of a run.

    Args:
        records: Records as `read_metrics` returns them.
        name: Metric name, such as `train/lr`.

    Returns:
        The finite values with their steps.
    """
    found = [(record["step"], float(record[name])) for record in records if name in record]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return Series(
        steps=np.array([step for step, _ in finite], dtype=np.int64),
        values=np.array([value for _, value in finite], dtype=np.float64),
        num_non_finite=len(found) - len(finite),
    )


def choose_smoothing_window(num_points: int) -> int:
    """Gives the number of points that `smooth` averages over for a curve.

    Args:
        num_points: Logged points of the curve, 0 or greater.

    Returns:
        About a fortieth of the curve, at least 5, of the form 4 k + 1.
    """
    return 4 * max(1, num_points // 160) + 1


def smooth(values: np.ndarray) -> np.ndarray:
    """Takes a centred mean with triangular weights; a trailing one would lag behind the loss.

    Two passes of a plain mean give the triangle, in which a spike makes no box.

    Args:
        values: float64 [num_points].

    Returns:
        float64 [num_points]; at the steep start the window shrinks on both sides alike, at the
        flat end on the right only.
    """
    num_points = len(values)
    index = np.arange(num_points)
    left = np.minimum(choose_smoothing_window(num_points) // 4, index)
    right = np.minimum(left, num_points - 1 - index)
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[index + right + 1] - sums[index - left]) / (left + right + 1)
    return values


def thin_out(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thins a long curve out to its lowest and highest points, so that spikes stay visible.

    Args:
        steps: int64 [num_points].
        values: float64 [num_points].

    Returns:
        Steps and values of about 2000 points, or all of them when there are no more.
    """
    if len(values) <= _MAX_POINTS:
        return steps, values
    kept: set[int] = {0, len(values) - 1}
    for bucket in np.array_split(np.arange(len(values)), _MAX_POINTS // 2):
        kept.add(int(bucket[np.argmin(values[bucket])]))
        kept.add(int(bucket[np.argmax(values[bucket])]))
    index = np.array(sorted(kept))
    return steps[index], values[index]


def plot_loss(
    records: Sequence[Mapping[str, Any]],
    objective: str,
    *,
    vocab_size: int | None = None,
    baselines: Baselines | None = None,
) -> str:
    """Plots training loss, and what validations measure of held-out and of training windows.

    Args:
        records: Records as `read_metrics` returns them.
        objective: What the run learns.
        vocab_size: Number of tokens that a uniform guess chooses from, at least 2, for a line
            at its natural logarithm; None draws no line.
        baselines: What counting tokens gives, for two lines; None draws none.

    Returns:
        The SVG element.
    """
    train = extract_series(records, "train/loss_nats_per_token")
    (color,) = color_objectives([objective])
    with mpl.rc_context(STYLE):
        figure, axes = _make_figure(height=3.9)
        heights: list[tuple[float, float]] = []
        if len(train):
            heights.append(_draw_training(axes, train, color))
        for name in (TRAIN_NLL, NLL):
            judged = extract_series(records, name)
            if len(judged):
                errors = _list_standard_errors(records, name)
                heights.append(_draw_judged(axes, judged, errors, color, _JUDGED[name]))
        for name, label, shade in list_further_losses(records):
            look = {"marker": "o", "label": label}
            errors = _list_standard_errors(records, name)
            judged = extract_series(records, name)
            heights.append(_draw_judged(axes, judged, errors, shade, look))
        if vocab_size is not None:
            uniform = math.log(vocab_size)
            label = f"uniform guess, ln {vocab_size:,} = {uniform:.2f}"
            axes.axhline(uniform, color=REFERENCE_COLOR, lw=1.1, ls=REFERENCE_DASHES, label=label)
            heights.append((uniform, uniform))
        if heights:
            bottom, top = min(low for low, _ in heights), max(high for _, high in heights)
            drawn = draw_baselines(axes, baselines, "nll", (bottom, top))
            bottom, top = min([bottom, *drawn]), max([top, *drawn])
            margin = 0.06 * (top - bottom) or 0.5
            axes.set_ylim(bottom - margin, top + margin)
            _add_legend(figure, axes)
        axes.set_ylabel("nats per token")
        return render_svg(figure, "loss")


def plot_metric(
    records: Sequence[Mapping[str, Any]],
    name: str,
    objective: str,
    *,
    label: str,
    smoothed: bool = False,
    engineering: bool = False,
) -> str:
    """Plots one metric against steps.

    Args:
        records: Records as `read_metrics` returns them.
        name: Metric name, such as `train/grad_norm`.
        objective: What the run learns.
        label: Text of the y axis, with the unit.
        smoothed: Whether to draw the running mean over the faint raw values.
        engineering: Whether ticks read 10k instead of 10000.

    Returns:
        The SVG element.
    """
    series = extract_series(records, name)
    (color,) = color_objectives([objective])
    with mpl.rc_context(STYLE):
        figure, axes = _make_figure(height=2.3)
        if smoothed and len(series):
            values = smooth(series.values)
            axes.plot(*thin_out(series.steps, series.values), color=color, alpha=0.25, lw=0.8)
            axes.plot(*thin_out(series.steps, values), color=color, lw=1.6)
            top = max(float(values.max()), float(np.quantile(series.values, 0.995)))
            axes.set_ylim(0, 1.1 * top or 1.0)
        else:
            axes.plot(*thin_out(series.steps, series.values), color=color, lw=1.6)
            axes.set_ylim(bottom=0)
        if engineering:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes.ticklabel_format(axis="y", scilimits=(-2, 5), useMathText=True)
        axes.set_ylabel(label)
        return render_svg(figure, name.replace("/", "-"))


def _make_figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.2, height))
    FigureCanvasAgg(figure)
    # Fixed margins in inches keep the axes of all plots of a page in line.
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.5 / height, top=1 - 0.26 / height)
    axes = figure.add_subplot()
    axes.set_xlabel("optimizer step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _draw_training(axes: Axes, train: Series, color: str) -> tuple[float, float]:
    """Draws raw and smoothed loss and gives the range of heights that they need."""
    smoothed = smooth(train.values)
    axes.plot(*thin_out(train.steps, train.values), color=color, alpha=0.22, lw=0.8)
    look: Any = {"ls": AS_TRAINED, "lw": 1.6, "label": "training loss, by batch"}
    axes.plot(*thin_out(train.steps, smoothed), color=color, **look)
    low, high = np.quantile(train.values, [1 - _RAW_QUANTILE, _RAW_QUANTILE])
    return min(float(smoothed.min()), float(low)), max(float(smoothed.max()), float(high))


def _draw_judged(
    axes: Axes, judged: Series, errors: np.ndarray, color: str, look: Mapping[str, Any]
) -> tuple[float, float]:
    """Draws points with their bars and gives the range of heights that they need."""
    axes.errorbar(
        judged.steps,
        judged.values,
        yerr=errors,
        color=color,
        ms=4,
        lw=1.4,
        elinewidth=1.2,
        capsize=2.5,
        zorder=3,
        **look,
    )
    return float((judged.values - errors).min()), float((judged.values + errors).max())


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Puts the legend above the axes, where no curve can run through it."""
    handles, labels = axes.get_legend_handles_labels()
    lines = ("uniform", "unigram", "bigram")
    order = sorted(range(len(labels)), key=lambda index: labels[index].startswith(lines))
    rows = -(-len(labels) // _LEGEND_COLUMNS)
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(top=1 - (0.26 + 0.2 * (rows - 1)) / height)
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="upper right",
        ncols=_LEGEND_COLUMNS,
        fontsize=9,
        columnspacing=1.6,
    )


def _list_standard_errors(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Gives one error per finite loss of that name; an unknown one has no bar."""
    of_error = name.replace("_nats_per_token", "_standard_error")
    errors = [
        float(record.get(of_error, 0.0))
        for record in records
        if math.isfinite(float(record.get(name, math.nan)))
    ]
    return np.array([error if math.isfinite(error) else 0.0 for error in errors])
