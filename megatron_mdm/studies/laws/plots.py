"""Plots of fits: what was predicted, what is known, and where the optimum lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter
from numpy.typing import NDArray

from megatron_mdm.config.parameters import ParameterConvention, in_words
from megatron_mdm.core.files import whole_file
from megatron_mdm.core.statistics import CONFIDENCE, Interval, percentile_band
from megatron_mdm.studies.laws.allocation import best_sizes
from megatron_mdm.studies.laws.forms import Law
from megatron_mdm.studies.laws.isoflop import IsoFlopAnalysis
from megatron_mdm.studies.laws.power_law import PowerLaw
from megatron_mdm.studies.laws.profile import Profile
from megatron_mdm.studies.laws.runs import Runs

SYMBOLS = {
    "parameter_scale": "A",
    "token_scale": "B",
    "irreducible_loss": "E",
    "parameter_exponent": "alpha",
    "token_exponent": "beta",
    "token_reuse": "R_D",
    "parameter_reuse": "R_N",
    "token_decay": "delta_D",
    "parameter_decay": "delta_N",
}
_LINE, _ACCENT, _FAINT, _TEXT = "#2f5d8a", "#c2571a", "#8a8f98", "#3c4149"
_DOTS_AN_INCH = 150
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9bec6",
    "axes.labelcolor": _TEXT,
    "axes.titlecolor": _TEXT,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "xtick.color": "#b9bec6",
    "ytick.color": "#b9bec6",
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "legend.frameon": False,
    "legend.labelcolor": _TEXT,
    "legend.fontsize": 9,
}


def plot_predictions(path: Path, law: Law, runs: Runs) -> None:
    """Plots predicted against observed losses.

    Args:
        path: PNG file to write.
        law: The fitted law.
        runs: What it was fitted to.
    """
    observed = runs.losses.numpy()
    predicted = law.loss(
        num_parameters=runs.num_parameters,
        num_tokens=runs.num_tokens,
        unique_tokens=runs.unique_tokens,
    ).numpy()
    with _one_plot(path, (6.4, 5.2)) as axes:
        points = _scatter_by_epochs(axes, observed, predicted, runs)
        ends = np.array(
            [min(observed.min(), predicted.min()), max(observed.max(), predicted.max())]
        )
        axes.plot(ends, ends, color=_FAINT, lw=1.2, ls=(0, (5, 3)), label="as observed", zorder=1)
        axes.set_xlabel("observed loss, nats per token")
        axes.set_ylabel("predicted loss, nats per token")
        _epochs_bar(axes, points)
        axes.legend(loc="upper left")


def plot_compute(
    path: Path,
    law: Law,
    runs: Runs,
    bootstrap: Sequence[Law] = (),
    *,
    parameters: ParameterConvention | None = None,
) -> None:
    """Plots losses against compute, with the best that the law expects of it.

    Args:
        path: PNG file to write.
        law: The fitted law.
        runs: What it was fitted to.
        bootstrap: Resamples, for a band.
        parameters: Which N the runs have; None: not known.
    """
    flops = torch.logspace(
        float(runs.flops.min().log10()), float(runs.flops.max().log10()), 60, dtype=torch.float64
    )
    with _one_plot(path, (7.2, 4.6)) as axes:
        points = _scatter_by_epochs(axes, runs.flops.numpy(), runs.losses.numpy(), runs)
        lines: list[tuple[str, float, str, Any]] = [("fresh tokens", 1e30, _LINE, "-")]
        if law.reuse_names:
            fewest = float(runs.unique_tokens.min())
            lines.append(
                (f"{EngFormatter(sep='')(fewest)} unique tokens", fewest, _ACCENT, (0, (5, 2)))
            )
        for label, unique, color, dashes in lines:
            _, best = best_sizes(type(law), torch.tensor(law.values()).double(), flops, unique)
            axes.plot(flops, best, color=color, lw=1.8, ls=dashes, label=f"best size, {label}")
            if bootstrap:
                constants = torch.tensor([one.values() for one in bootstrap], dtype=torch.float64)
                _, spread = best_sizes(type(law), constants, flops, unique)
                axes.fill_between(flops, *_band(spread.numpy()), color=color, alpha=0.18, lw=0)
        axes.set_xscale("log")
        axes.set_xlabel(f"compute 6 N D, FLOPs{_counted(parameters)}")
        axes.set_ylabel("held-out loss, nats per token")
        _epochs_bar(axes, points)
        axes.legend(loc="upper right")


def plot_profile(path: Path, profile: Profile) -> None:
    """Plots the lowest objective against the value of one constant.

    Args:
        path: PNG file to write.
        profile: What was found.
    """
    name = f"{profile.name} ({SYMBOLS[profile.name]})"
    with _one_plot(path, (7.2, 4.0)) as axes:
        axes.plot(profile.values, profile.objectives, color=_LINE, marker="o", ms=3, lw=1.5)
        axes.axhline(
            profile.threshold,
            color=_FAINT,
            lw=1.2,
            ls=(0, (5, 3)),
            label=f"{CONFIDENCE:.0%} threshold",
        )
        low, high = profile.interval
        shown = max(low, profile.values[0]), min(high, profile.values[-1])
        axes.axvspan(
            *shown,
            color=_LINE,
            alpha=0.08,
            lw=0,
            label=f"{CONFIDENCE:.0%} interval: {profile.interval.text()}",
        )
        if profile.values[0] <= profile.estimate <= profile.values[-1]:
            axes.axvline(
                profile.estimate, color=_ACCENT, lw=1.4, label=f"fit: {profile.estimate:.4g}"
            )
        axes.set_xscale("log")
        if profile.values[-1] < 100 * profile.values[0]:
            for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
                axis(LogFormatter(minor_thresholds=(2, 0.8)))
        # What lies far above the threshold is rejected, however far: show the rest.
        height = profile.threshold - profile.lowest
        axes.set_ylim(profile.lowest - 0.3 * height, profile.lowest + 2.5 * height)
        axes.set_xlim(profile.values[0], profile.values[-1])
        weakly = ": weakly identified" if profile.is_weakly_identified else ""
        axes.set_title(f"Profile of {name}{weakly}")
        axes.set_xlabel(name)
        axes.set_ylabel("lowest objective, sum of Huber losses")
        axes.legend(loc="upper right")


def plot_effective_data(path: Path, law: Law, runs: Runs, bootstrap: Sequence[Law] = ()) -> None:
    """Plots what epochs over the same tokens are worth.

    Args:
        path: PNG file to write.
        law: A law with a reuse of tokens.
        runs: What it was fitted to.
        bootstrap: Resamples, for a band.
    """
    longest = max(float(runs.epochs.max()), 2.0)
    epochs = torch.logspace(0, math.log10(longest), 120, dtype=torch.float64)
    with _one_plot(path, (6.4, 4.4)) as axes:
        axes.plot(epochs, epochs, color=_FAINT, lw=1.2, ls=(0, (5, 3)), label="fresh data")
        if bootstrap:
            spread = np.stack([one.effective_epochs(epochs).numpy() for one in bootstrap])
            axes.fill_between(
                epochs,
                *_band(spread),
                color=_LINE,
                alpha=0.18,
                lw=0,
                label=f"{CONFIDENCE:.0%} of {len(bootstrap)} resamples",
            )
        axes.plot(epochs, law.effective_epochs(epochs), color=_LINE, lw=1.8, label="the law")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("epochs over the same tokens, D / U")
        axes.set_ylabel("worth epochs over new tokens, D' / U")
        axes.legend(loc="upper left")


def plot_isoflops(
    path: Path, analysis: IsoFlopAnalysis, parameters: ParameterConvention | None
) -> None:
    """Plots the parabola of each budget, and the best size against compute.

    Args:
        path: PNG file to write.
        analysis: What was found.
        parameters: Which N the runs have; None: not known.
    """
    with _plots(path, (10.4, 4.6), 2) as (left, right):
        colors = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(analysis.groups)))
        for group, color in zip(analysis.groups, colors, strict=True):
            ends = np.log([*group.num_parameters, group.best_parameters])
            log_n = np.linspace(ends.min(), ends.max(), 80)
            curve = (
                group.best_loss + group.curvature * (log_n - math.log(group.best_parameters)) ** 2
            )
            left.plot(np.exp(log_n), curve, color=color, lw=1.4)
            left.scatter(group.num_parameters, group.losses, color=[color], s=18, zorder=3)
            star: Any = {"color": color, "marker": "*", "ms": 11, "mec": "white", "ls": "none"}
            bars = _bars(group.best_parameters, group.parameters_interval)
            label = f"{group.flops:.2g} FLOPs"
            left.plot(group.best_parameters, group.best_loss, label=label, zorder=4, **star)
            right.errorbar(
                group.flops, group.best_parameters, yerr=bars, capsize=3, zorder=4, **star
            )
        left.set_xlabel(f"parameters N{_counted(parameters)}")
        left.set_ylabel("held-out loss, nats per token")
        left.legend(title="budget and best size")
        _draw_size_law(right, analysis)
        for axes in (left, right):
            axes.set_xscale("log")
        right.set_yscale("log")
        right.set_xlabel(f"compute 6 N D, FLOPs{_counted(parameters)}")
        right.set_ylabel(f"best size N{_counted(parameters)}")


def _counted(parameters: ParameterConvention | None) -> str:
    return "" if parameters is None else f", {in_words(parameters)}"


@contextmanager
def _plots(path: Path, size: tuple[float, float], columns: int) -> Iterator[list[Axes]]:
    """Axes side by side, of a figure that is written as PNG when the block ends."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=_DOTS_AN_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(1, columns, squeeze=False)[0])
        with whole_file(path) as stream:
            figure.savefig(stream, format="png", metadata={"Software": None})


@contextmanager
def _one_plot(path: Path, size: tuple[float, float]) -> Iterator[Axes]:
    with _plots(path, size, 1) as (axes,):
        yield axes


def _scatter_by_epochs(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], runs: Runs
) -> PathCollection:
    """Draws runs as points whose color says how often they repeat their data."""
    epochs = runs.epochs.numpy()
    scale = LogNorm(1, max(float(epochs.max()), 2.0))
    # The few of many epochs lie on top.
    order = epochs.argsort()
    return axes.scatter(
        x[order], y[order], c=epochs[order], norm=scale, cmap="viridis_r", s=16, lw=0, zorder=2
    )


def _epochs_bar(axes: Axes, points: PathCollection) -> None:
    figure = axes.get_figure()
    if figure is not None:
        bar = figure.colorbar(points, ax=axes, format=LogFormatter(), aspect=30)
        bar.set_label("epochs D / U", color=_TEXT)
        bar.outline.set_visible(False)


def _draw_size_law(axes: Axes, analysis: IsoFlopAnalysis) -> None:
    """Draws the power law through the best sizes, with its interval."""
    law = analysis.size_law
    if law is None:
        return
    budgets = [group.flops for group in analysis.groups]
    flops = np.geomspace(budgets[0], budgets[-1], 60)
    axes.plot(flops, [law.at(one) for one in flops], color=_LINE, lw=1.6, label=_law_text(law))
    intervals = [law.interval_at(one) for one in flops]
    ends = [one for one in intervals if one is not None]
    if ends:
        low, high = zip(*ends, strict=True)
        axes.fill_between(flops, low, high, color=_LINE, alpha=0.15, lw=0)
    axes.legend(loc="upper left")


def _law_text(law: PowerLaw) -> str:
    """The exponent, with its interval where there is one."""
    interval = law.exponent_interval
    spread = f" ({interval.low:.3f} to {interval.high:.3f})" if interval is not None else ""
    return f"N ∝ C^{law.exponent:.3f}{spread}"


def _bars(value: float, interval: Interval | None) -> NDArray[np.float64] | None:
    if interval is None:
        return None
    return np.array([[value - interval.low], [interval.high - value]])


def _band(spread: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower and upper ends over resamples: [resamples, points] to [2, points]."""
    return percentile_band(spread)
