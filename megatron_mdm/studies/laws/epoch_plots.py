"""Plots of losses that have a minimum in epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogFormatter, NullFormatter, NullLocator
from numpy.typing import NDArray

from megatron_mdm.core.statistics import CONFIDENCE, Interval
from megatron_mdm.reporting.figures import (
    TEXT_COLOR,
    color_objectives,
    open_figure,
    save_figure,
)
from megatron_mdm.studies.laws.best_epochs import BestEpochs, EpochsAnalysis, is_same_place
from megatron_mdm.studies.laws.epoch_curves import CurveMinimum
from megatron_mdm.studies.laws.epochs_law import EpochsLaw
from megatron_mdm.studies.laws.forms import Law
from megatron_mdm.studies.laws.runs import Runs, num_distinct

_MOST_PANELS, _MOST_CURVES = 3, 4
_FEWEST_POINTS = 3
_MOST_TICKS = 6
# Losses this far above the lowest of a panel, as a share of it, are left out of the picture.
_MOST_RISE = 0.35
# A legend through which curves do not show.
_OVER_CURVES: Any = {"frameon": True, "framealpha": 0.9, "edgecolor": "none"}
_LETTERS = EngFormatter(sep="")


def plot_epochs(
    path: Path, law: Law, runs: Runs, found: EpochsAnalysis, *, objective: str | None = None
) -> bool:
    """Plots runs against epochs, what the law expects, and its minimum with the interval.

    Args:
        path: PNG file to write.
        law: The fitted law.
        runs: What it was fitted to.
        found: Its best numbers of epochs.
        objective: Of the runs; None: not known.

    Returns:
        Whether there is anything to draw: a size with runs of several numbers of epochs.
    """
    panels = _choose(found.points, runs)
    if not panels:
        return False
    width = 1.2 + 3.6 * len(panels)
    with open_figure(max(width, 6.4), 4.4, len(panels)) as (figure, axes_of):
        for axes, points in zip(axes_of, panels, strict=True):
            colors = color_objectives([objective] * len(points))
            for point, color in zip(points, colors, strict=True):
                _draw_place(axes, law, runs, point, color, is_reached=found.num_beyond > 0)
            axes.set(xscale="log", xlabel="epochs over the same tokens, D / U")
            axes.set_title(f"{_count(points[0].unique_tokens)} unique tokens")
            _label_epochs(axes)
            axes.set_ylim(*_reach(points, runs))
            axes.legend(title="parameters N", loc="upper right", ncols=2, **_OVER_CURVES)
        axes_of[0].set_ylabel("held-out loss, nats per token")
        save_figure(path, figure)
    return True


def plot_curves(
    path: Path,
    minima: Sequence[CurveMinimum],
    law: EpochsLaw | None,
    *,
    objective: str | None = None,
) -> None:
    """Plots curves with their minima, and the minima against U or N with the power law.

    Args:
        path: PNG file to write.
        minima: Of the curves, at least one.
        law: The power law through them; None: no second panel.
        objective: Of the runs; None: not known.
    """
    ordered = sorted(minima, key=lambda one: (one.curve.unique_tokens, one.curve.num_parameters))
    told = [one for one in ordered if one.epochs is not None]
    faint, *_ = color_objectives([objective])
    shades = iter(color_objectives([objective] * len(told)))
    colors = [faint if one.epochs is None else next(shades) for one in ordered]
    columns = 1 if law is None else 2
    with open_figure(5.4 * columns, 4.4, columns) as (figure, axes_of):
        for one, color in zip(ordered, colors, strict=True):
            curve = one.curve
            label = f"{_count(curve.num_parameters)}, {_count(curve.unique_tokens)}"
            if one.epochs is None:
                # What says nothing of a minimum is there, and no more.
                axes_of[0].plot(curve.epochs, curve.losses, color=color, lw=1, alpha=0.35)
                continue
            look: Any = {"color": color, "lw": 1.4, "marker": "o", "ms": 3, "label": label}
            axes_of[0].plot(curve.epochs, curve.losses, **look)
            _mark_minimum(axes_of[0], one.epochs, one.loss, one.interval, color)
        axes_of[0].set(
            xscale="log",
            xlabel="epochs over the same tokens, D / U",
            ylabel="held-out loss, nats per token",
        )
        lowest, highest = min(one.loss for one in ordered), max(one.loss for one in told or ordered)
        axes_of[0].set_ylim(lowest - 0.04 * lowest, (1 + _MOST_RISE) * highest)
        _label_epochs(axes_of[0])
        if axes_of[0].get_legend_handles_labels()[0]:
            look = {"ncols": 2, "loc": "upper right", "fontsize": 8}
            axes_of[0].legend(title="N, U", **look, **_OVER_CURVES)
        if law is not None:
            _draw_law(axes_of[1], ordered, colors, law)
        save_figure(path, figure)


def _choose(points: Sequence[BestEpochs], runs: Runs) -> list[list[BestEpochs]]:
    """For each panel, one number of unique tokens, the sizes of most runs."""
    told: list[tuple[int, BestEpochs]] = []
    for point in points:
        count = num_distinct(runs.epochs[_rows(runs, point)]) if len(_rows(runs, point)) else 0
        is_new = not any(is_same_place(_place(point), _place(one)) for _, one in told)
        if count >= _FEWEST_POINTS and is_new:
            told.append((count, point))
    panels: list[list[tuple[int, BestEpochs]]] = []
    for count, point in told:
        for panel in panels:
            if abs(math.log(panel[0][1].unique_tokens / point.unique_tokens)) < 0.01:
                panel.append((count, point))
                break
        else:
            panels.append([(count, point)])
    panels = sorted(panels, key=lambda one: -sum(count for count, _ in one))[:_MOST_PANELS]
    by_size = [
        sorted((point for _, point in one), key=lambda point: point.num_parameters)
        for one in panels
    ]
    return sorted(map(_thin, by_size), key=lambda one: one[0].unique_tokens)


def _thin(points: list[BestEpochs]) -> list[BestEpochs]:
    """Evenly spaced, the smallest and the largest among them."""
    count = min(len(points), _MOST_CURVES)
    return [points[place] for place in np.linspace(0, len(points) - 1, count).round().astype(int)]


def _count(number: float) -> str:
    """Such as 1.1G, with three digits."""
    return _LETTERS(float(f"{number:.3g}"))


def _place(point: BestEpochs) -> tuple[float, float]:
    return point.num_parameters, point.unique_tokens


def _rows(runs: Runs, point: BestEpochs) -> NDArray[np.int64]:
    pairs = zip(runs.num_parameters.tolist(), runs.unique_tokens.tolist(), strict=True)
    return np.flatnonzero([is_same_place(one, _place(point)) for one in pairs])


def _draw_place(
    axes: Axes, law: Law, runs: Runs, point: BestEpochs, color: str, *, is_reached: bool
) -> None:
    rows = _rows(runs, point)
    epochs, losses = runs.epochs[rows], runs.losses[rows]
    axes.scatter(epochs, losses, color=color, s=20, lw=0, zorder=3)
    grid = np.geomspace(float(epochs.min()), float(epochs.max()) * 1.3, 200)
    expected = law.loss(
        num_parameters=point.num_parameters,
        num_tokens=grid * point.unique_tokens,
        unique_tokens=point.unique_tokens,
    )
    axes.plot(grid, expected, color=color, lw=1.6, label=_count(point.num_parameters))
    if is_reached and point.epochs <= grid[-1]:
        _mark_minimum(axes, point.epochs, point.loss, point.interval, color)


def _mark_minimum(
    axes: Axes, epochs: float, loss: float, interval: Interval | None, color: str
) -> None:
    """A star at a minimum, with its interval as a bar; an arrow where that has no end."""
    if interval is not None:
        low = max(interval.low, 1e-9)
        if math.isfinite(interval.high):
            bar: Any = {"color": color, "lw": 2, "marker": "|", "ms": 9, "mew": 2}
            axes.plot([low, interval.high], [loss, loss], **bar, zorder=4)
        else:
            to: Any = {"arrowstyle": "->", "color": color, "lw": 1.6}
            axes.annotate("", (epochs * 2.2, loss), (low, loss), arrowprops=to, zorder=4)
    axes.plot(epochs, loss, "*", color=color, ms=13, mec="white", mew=0.8, zorder=5)


def _reach(points: Sequence[BestEpochs], runs: Runs) -> tuple[float, float]:
    losses = runs.losses[np.concatenate([_rows(runs, point) for point in points])]
    expected = [point.loss for point in points]
    lowest, highest = min(float(losses.min()), *expected), max(float(losses.max()), *expected)
    top = min(highest, (1 + _MOST_RISE) * float(np.median(losses)))
    # Room for the legend above.
    return lowest - 0.08 * (top - lowest), top + 0.3 * (top - lowest)


def _label_epochs(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_law(
    axes: Axes, minima: Sequence[CurveMinimum], colors: Sequence[str], law: EpochsLaw
) -> None:
    """Minima against U, a line a size; or against N where U does not vary."""
    along = "unique_tokens" if law.unique_exponent is not None else "num_parameters"
    for one, color in zip(minima, colors, strict=True):
        if one.epochs is None or not one.is_found:
            continue
        x = getattr(one.curve, along)
        axes.plot(x, one.epochs, "*", color=color, ms=12, mec="white", mew=0.8, zorder=4)
        if one.interval is not None:
            axes.plot([x, x], list(one.interval), color=color, lw=2, alpha=0.6, zorder=3)
    found = [one.curve for one in minima if one.is_found]
    values = np.array([getattr(curve, along) for curve in found])
    grid = np.geomspace(values.min() / 1.2, values.max() * 1.2, 40)
    sizes = sorted({curve.num_parameters for curve in found})
    fixed = sizes if along == "unique_tokens" else [math.nan]
    for size in fixed:
        line = [
            law.at(num_parameters=size, unique_tokens=one)
            if along == "unique_tokens"
            else law.at(num_parameters=one, unique_tokens=1.0)
            for one in grid
        ]
        axes.plot(grid, line, color=TEXT_COLOR, lw=1, alpha=0.7, zorder=1)
        if len(fixed) > 1:
            near: Any = {"textcoords": "offset points", "fontsize": 8, "color": TEXT_COLOR}
            axes.annotate(f"N = {_count(size)}", (grid[-1], line[-1]), (3, -3), **near)
    name = "unique tokens U" if along == "unique_tokens" else "parameters N"
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel=f"best epochs, {CONFIDENCE:.0%}")
    places = np.unique(values)
    if len(places) <= _MOST_TICKS:
        axes.set_xticks(places, [_count(one) for one in places])
        axes.xaxis.set_minor_locator(NullLocator())
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(LogFormatter(minor_thresholds=(2, 0.8)))
    axes.margins(x=0.14)
