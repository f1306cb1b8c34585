"""Curves of held-out loss: of one run against epochs, of several against what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megatron_mdm.reporting.baselines import Baselines
from megatron_mdm.reporting.figures import (
    AS_TRAINED,
    REFERENCE_COLOR,
    STYLE,
    TRAINING_WINDOWS,
    color_objectives,
    draw_baselines,
    list_further_losses,
    render_svg,
)
from megatron_mdm.reporting.metrics import (
    GAP,
    NLL,
    TRAIN_NLL,
    find_best_validation,
)

Records = Sequence[Mapping[str, Any]]
Axis = Literal["epoch", "consumed_tokens", "consumed_flops_6nd"]

EPOCH_LOSS = "train/epoch_loss_nats_per_token"

_AXIS_LABELS: dict[Axis, str] = {
    "epoch": "epochs",
    "consumed_tokens": "training tokens",
    "consumed_flops_6nd": "training FLOPs, 6 N D, N without embeddings",
}
_MAX_MARKERS = 40
_MARKERS = "os^Dv"
_LINEAR_REACH = 30
# Letters in a row of the legend, and its inches.
_LEGEND_LETTERS, _LEGEND_ROW = 100, 0.2
# Inches: room above for the first row, heights of the panels, room between and below them.
_WIDTH, _TOP, _LOSS, _BETWEEN, _GAP, _BOTTOM = 8.2, 0.42, 3.2, 0.22, 1.15, 0.5


@dataclass(frozen=True)
class RunCurve:
    """The curve of a run among others.

    Attributes:
        label: Name in the legend.
        records: Records of the run, in order.
        objective: What it learns, which says its colour.
    """

    label: str
    records: Records
    objective: str


def extract_column(records: Records, name: str) -> np.ndarray:
    """One metric of some records.

    Args:
        records: Records of a run.
        name: Metric name.

    Returns:
        float64 [num_records], NaN where a record is without it.
    """
    return np.array([float(record.get(name, np.nan)) for record in records])


def has_epoch_curve(records: Records) -> bool:
    """Tells whether a run has a curve to draw against epochs.

    Args:
        records: Records of the run.

    Returns:
        Whether it went beyond its first epoch and was validated at least twice.
    """
    epochs = extract_column([record for record in records if NLL in record], "epoch")
    return len(epochs) > 1 and bool(np.nanmax(epochs, initial=0.0) > 1)


def plot_epochs(records: Records, objective: str, baselines: Baselines | None = None) -> str:
    """Plots what validations measured against epochs: held-out, training windows, their gap.

    Args:
        records: Records of a run.
        objective: What it learns.
        baselines: What counting tokens gives, for lines where they lie near the curves.

    Returns:
        The SVG element; bands are one standard error to each side.
    """
    judged = [record for record in records if NLL in record]
    epochs = extract_column(judged, "epoch")
    has_gap = bool(np.isfinite(extract_column(judged, GAP)).any())
    (color,) = color_objectives([objective])
    with mpl.rc_context(STYLE):
        figure, loss_axes, gap_axes = _make_panels(has_gap)
        best = _ring_best(loss_axes, judged, "epoch", color)
        _draw_band(loss_axes, judged, epochs, NLL, color, label=f"held-out windows{best}")
        for name, label, shade in list_further_losses(judged):
            _draw_band(loss_axes, judged, epochs, name, shade, label=label)
        label, ls = "training windows", TRAINING_WINDOWS
        _draw_band(loss_axes, judged, epochs, TRAIN_NLL, color, label=label, ls=ls)
        label, ls = "mean of an epoch, as trained", AS_TRAINED
        _draw_band(loss_axes, judged, epochs, EPOCH_LOSS, color, label=label, ls=ls)
        draw_baselines(loss_axes, baselines, "nll", loss_axes.dataLim.intervaly)
        loss_axes.set_ylabel("nats per token")
        if gap_axes is not None:
            gap_axes.axhline(0, color=REFERENCE_COLOR, lw=1)
            _draw_band(gap_axes, judged, epochs, GAP, color)
            gap_axes.set_ylabel("gap")
        (gap_axes or loss_axes).set_xlabel(_AXIS_LABELS["epoch"])
        _add_legend(figure)
        return render_svg(figure, "epochs")


def plot_comparison(
    curves: Sequence[RunCurve],
    axis: Axis,
    name: str = "comparison",
    baselines: Baselines | None = None,
) -> str:
    """Plots the losses of several runs on one pair of axes.

    Args:
        curves: The runs; a validation without the axis's metric is left out.
        axis: What the losses are drawn against.
        name: Of the plot among those of a page.
        baselines: What counting tokens gives, for lines where they lie near the curves.

    Returns:
        The SVG element. Solid: held-out windows, with a band of one standard error to each side.
        Dashed: training windows. Rings: the lowest held-out loss. Runs of one objective have shades
        of its colour and markers of their own.
    """
    with mpl.rc_context(STYLE):
        figure, axes, _ = _make_panels(has_gap=False)
        kinds = [curve.objective for curve in curves]
        for index, (curve, color) in enumerate(zip(curves, color_objectives(kinds), strict=True)):
            marker = _MARKERS[kinds[:index].count(curve.objective) % len(_MARKERS)]
            judged = [record for record in curve.records if NLL in record and axis in record]
            places = extract_column(judged, axis)
            best = _ring_best(axes, judged, axis, color)
            _draw_band(
                axes, judged, places, NLL, color, label=f"{curve.label}{best}", marker=marker
            )
            _draw_band(axes, judged, places, TRAIN_NLL, color, ls=TRAINING_WINDOWS, marker=marker)
        draw_baselines(axes, baselines, "nll_given_first", axes.dataLim.intervaly)
        reach = axes.dataLim.xmax / max(axes.dataLim.xmin, 1e-9)
        # Some runs may end after a few epochs where others go on for hundreds.
        if axis == "consumed_flops_6nd" or (axis == "epoch" and reach > _LINEAR_REACH):
            axes.set_xscale("log")
        elif axis == "consumed_tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(_AXIS_LABELS[axis])
        axes.set_ylabel("nats per token")
        _add_legend(figure)
        return render_svg(figure, f"{name}-{axis}")


def _make_panels(has_gap: bool) -> tuple[Figure, Axes, Axes | None]:
    height = _TOP + _LOSS + (_BETWEEN + _GAP if has_gap else 0) + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    left, width = 0.085, 0.99 - 0.085
    top = 1 - (_TOP + _LOSS) / height
    loss_axes = figure.add_axes((left, top, width, _LOSS / height))
    loss_axes.margins(x=0.02)
    if not has_gap:
        return figure, loss_axes, None
    place = (left, _BOTTOM / height, width, _GAP / height)
    gap_axes = figure.add_axes(place, sharex=loss_axes)
    loss_axes.tick_params(labelbottom=False)
    return figure, loss_axes, gap_axes


def _draw_band(
    axes: Axes,
    records: Records,
    places: np.ndarray,
    name: str,
    color: str,
    *,
    label: str | None = None,
    ls: str = "-",
    marker: str = "o",
) -> None:
    values = extract_column(records, name)
    finite = np.isfinite(values) & np.isfinite(places)
    if not finite.any():
        return
    places, values = places[finite], values[finite]
    errors = extract_column(records, name.replace("_nats_per_token", "_standard_error"))[finite]
    errors = np.where(np.isfinite(errors), errors, 0.0)
    axes.fill_between(places, values - errors, values + errors, color=color, alpha=0.16, lw=0)
    look: Any = {"marker": marker, "markevery": -(-len(values) // _MAX_MARKERS), "ms": 3}
    axes.plot(places, values, color=color, lw=1.6, ls=ls, label=label, **look)


def _ring_best(axes: Axes, records: Records, axis: Axis, color: str) -> str:
    """Draws a ring around the lowest held-out loss, and says it in words for the legend."""
    best = find_best_validation(records)
    if best is None or axis not in best:
        return ""
    axes.plot([float(best[axis])], [float(best[NLL])], "o", ms=9, mfc="none", mec=color, mew=1.4)
    return f", lowest {best[NLL]:.3f}"


def _add_legend(figure: Figure) -> None:
    """Puts the legend above the panels, and makes room for its rows."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if not handles:
        return
    num_columns = max(1, min(3, _LEGEND_LETTERS // max(map(len, labels))))
    width, height = figure.get_size_inches()
    taller = height + _LEGEND_ROW * ((len(labels) - 1) // num_columns)
    figure.set_size_inches(width, taller)
    for axes in figure.axes:
        left, bottom, across, up = axes.get_position().bounds
        axes.set_position((left, bottom * height / taller, across, up * height / taller))
    look: Any = {"ncols": num_columns, "fontsize": 9, "columnspacing": 1.6}
    figure.legend(handles, labels, loc="upper right", **look)
