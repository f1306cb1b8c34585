"""Plots of fits: what was predicted, what is known, and where the optimum lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import EngFormatter, LogFormatter

from megatron_mdm.config.parameters import ParameterConvention, describe_convention
from megatron_mdm.core.statistics import CONFIDENCE
from megatron_mdm.reporting.figures import (
    REFERENCE_COLOR,
    REFERENCE_DASHES,
    TEXT_COLOR,
    color_objectives,
    error_bar,
    fill_band,
    open_figure,
    save_figure,
)
from megatron_mdm.studies.laws.allocation import best_sizes
from megatron_mdm.studies.laws.forms import Array, Law
from megatron_mdm.studies.laws.isoflop import IsoFlop, IsoFlopAnalysis
from megatron_mdm.studies.laws.runs import Runs
from megatron_mdm.studies.laws.uncertainty import Profile

_DASHED: Any = {"color": REFERENCE_COLOR, "lw": 1.2, "ls": REFERENCE_DASHES}


def plot_predictions(path: Path, law: Law, runs: Runs) -> None:
    """Plots predicted against observed losses.

    Args:
        path: PNG file to write.
        law: The fitted law.
        runs: What it was fitted to.
    """
    predicted = runs.losses_of(law)
    with open_figure(6.4, 5.2) as (figure, (axes,)):
        _scatter_by_epochs(axes, runs.losses, predicted, runs)
        both = np.concatenate([runs.losses, predicted])
        ends = both.min(), both.max()
        axes.plot(ends, ends, label="as observed", zorder=1, **_DASHED)
        axes.set(xlabel="observed loss, nats per token", ylabel="predicted loss, nats per token")
        axes.legend(loc="upper left")
    save_figure(path, figure)


def plot_compute(
    path: Path,
    law: Law,
    runs: Runs,
    bootstrap: Sequence[Law] = (),
    *,
    objective: str | None = None,
    parameters: ParameterConvention | None = None,
) -> None:
    """Plots losses against compute, with the best that the law expects of it.

    Args:
        path: PNG file to write.
        law: The fitted law.
        runs: What it was fitted to.
        bootstrap: Resamples, for a band.
        objective: Of the runs; None: not known.
        parameters: Which N the runs have; None: not known.
    """
    flops_C = np.geomspace(runs.flops.min(), runs.flops.max(), 60)
    lines = [("fresh tokens", 1e30)]
    if law.minds_repetition():
        fewest = float(runs.unique_tokens.min())
        lines.append((f"{EngFormatter(sep='')(fewest)} unique tokens", fewest))
    shades = color_objectives([objective] * len(lines))
    with open_figure(7.2, 4.6) as (figure, (axes,)):
        _scatter_by_epochs(axes, runs.flops, runs.losses, runs)
        for (label, unique), color in zip(lines, shades, strict=True):
            best_C = best_sizes([law], flops_C, unique)[1][0]
            axes.plot(flops_C, best_C, color=color, lw=1.8, label=f"best size, {label}")
            if bootstrap:
                fill_band(axes, flops_C, best_sizes(bootstrap, flops_C, unique)[1], color)
        axes.set(
            xscale="log",
            xlabel=f"compute 6 N D, FLOPs{_counted(parameters)}",
            ylabel="held-out loss, nats per token",
        )
        axes.legend(loc="upper right")
    save_figure(path, figure)


def plot_profile(
    path: Path, profile: Profile, symbol: str, *, objective: str | None = None
) -> None:
    """Plots the lowest objective against the value of one constant.

    Args:
        path: PNG file to write.
        profile: What was found.
        symbol: Of the constant.
        objective: Of the runs; None: not known.
    """
    (color,) = color_objectives([objective])
    first, last = profile.values[0], profile.values[-1]
    height = profile.threshold - profile.lowest
    weakly = ": weakly identified" if profile.is_weakly_identified else ""
    with open_figure(7.2, 4.0) as (figure, (axes,)):
        axes.plot(profile.values, profile.objectives, color=color, marker="o", ms=3, lw=1.5)
        axes.axhline(profile.threshold, label=f"{CONFIDENCE:.0%} threshold", **_DASHED)
        shown = np.clip(profile.interval, first, last)
        label = f"{CONFIDENCE:.0%} interval: {profile.interval.describe()}"
        axes.axvspan(*shown, color=color, alpha=0.08, lw=0, label=label)
        if first <= profile.estimate <= last:
            label = f"fit: {profile.estimate:.4g}"
            axes.axvline(profile.estimate, color=TEXT_COLOR, lw=1.4, label=label)
        axes.set(
            xscale="log",
            title=f"Profile of {profile.name} ({symbol}){weakly}",
            xlabel=f"{profile.name} ({symbol})",
            ylabel="lowest objective, sum of Huber losses",
            xlim=(first, last),
            # What lies far above the threshold is rejected, however far: show the rest.
            ylim=(profile.lowest - 0.3 * height, profile.lowest + 2.5 * height),
        )
        if last < 100 * first:
            for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                set_formatter(LogFormatter(minor_thresholds=(2, 0.8)))
        axes.legend(loc="upper right")
    save_figure(path, figure)


def plot_effective_data(
    path: Path,
    law: Law,
    runs: Runs,
    bootstrap: Sequence[Law] = (),
    *,
    objective: str | None = None,
) -> None:
    """Plots what epochs over the same tokens are worth.

    Args:
        path: PNG file to write.
        law: A law with a reuse of tokens.
        runs: What it was fitted to.
        bootstrap: Resamples, for a band.
        objective: Of the runs; None: not known.
    """
    (color,) = color_objectives([objective])
    epochs = np.geomspace(1, max(float(runs.epochs.max()), 2.0), 120)
    with open_figure(6.4, 4.4) as (figure, (axes,)):
        axes.plot(epochs, epochs, label="fresh data", **_DASHED)
        if bootstrap:
            spread = np.stack([one.effective_epochs(epochs) for one in bootstrap])
            label = f"{CONFIDENCE:.0%} of {len(bootstrap)} resamples"
            fill_band(axes, epochs, spread, color, label=label)
        axes.plot(epochs, law.effective_epochs(epochs), color=color, lw=1.8, label="the law")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="epochs over the same tokens, D / U",
            ylabel="worth epochs over new tokens, D' / U",
        )
        axes.legend(loc="upper left")
    save_figure(path, figure)


def plot_isoflops(
    path: Path,
    analysis: IsoFlopAnalysis,
    parameters: ParameterConvention | None,
    *,
    objective: str | None = None,
) -> None:
    """Plots the parabola of each budget, and the best size against compute.

    Args:
        path: PNG file to write.
        analysis: What was found.
        parameters: Which N the runs have; None: not known.
        objective: Of the runs; None: not known.
    """
    (line_color,) = color_objectives([objective])
    with open_figure(10.4, 4.6, columns=2) as (figure, (left, right)):
        colors = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(analysis.groups)))
        for group, color in zip(analysis.groups, colors, strict=True):
            _draw_group(left, right, group, color)
        _draw_size_law(right, analysis, line_color)
        counted = _counted(parameters)
        left.set(
            xscale="log",
            xlabel=f"parameters N{counted}",
            ylabel="held-out loss, nats per token",
        )
        right.set(
            xscale="log",
            yscale="log",
            xlabel=f"compute 6 N D, FLOPs{counted}",
            ylabel=f"best size N{counted}",
        )
        left.legend(title="budget and best size")
    save_figure(path, figure)


def _counted(parameters: ParameterConvention | None) -> str:
    return "" if parameters is None else f", {describe_convention(parameters)}"


def _scatter_by_epochs(axes: Axes, x: Array, y: Array, runs: Runs) -> None:
    """Draws runs as points whose color says how often they repeat their data."""
    # The few of many epochs lie on top.
    order = runs.epochs.argsort()
    points = axes.scatter(
        x[order],
        y[order],
        c=runs.epochs[order],
        norm=LogNorm(1, max(float(runs.epochs.max()), 2.0)),
        cmap="viridis_r",
        s=16,
        lw=0,
        zorder=2,
    )
    figure = axes.get_figure()
    if figure is not None:
        bar = figure.colorbar(points, ax=axes, format=LogFormatter(), aspect=30)
        bar.set_label("epochs D / U", color=TEXT_COLOR)
        bar.outline.set_visible(False)


def _draw_group(left: Axes, right: Axes, group: IsoFlop, color: Any) -> None:
    ends = np.log([*group.num_parameters, group.best_parameters])
    log_n = np.linspace(ends.min(), ends.max(), 80)
    curve = group.best_loss + group.curvature * (log_n - math.log(group.best_parameters)) ** 2
    left.plot(np.exp(log_n), curve, color=color, lw=1.4)
    left.scatter(group.num_parameters, group.losses, color=[color], s=18, zorder=3)
    star: Any = {"color": color, "marker": "*", "ms": 11, "mec": "white", "ls": "none", "zorder": 4}
    label = f"{group.flops:.2g} FLOPs"
    left.plot(group.best_parameters, group.best_loss, label=label, **star)
    bars = error_bar(group.best_parameters, group.parameters_interval)
    right.errorbar(group.flops, group.best_parameters, yerr=bars, capsize=3, **star)


def _draw_size_law(axes: Axes, analysis: IsoFlopAnalysis, color: str) -> None:
    """Draws the power law through the best sizes, with its interval."""
    law = analysis.size_law
    if law is None:
        return
    flops = np.geomspace(analysis.groups[0].flops, analysis.groups[-1].flops, 60)
    label = f"N ∝ C^{law.exponent_text}"
    axes.plot(flops, [law.at(one) for one in flops], color=color, lw=1.6, label=label)
    ends = [end for end in map(law.interval_at, flops) if end is not None]
    if ends:
        low, high = np.array(ends).T
        axes.fill_between(flops, low, high, color=color, alpha=0.15, lw=0)
    axes.legend(loc="upper left")
