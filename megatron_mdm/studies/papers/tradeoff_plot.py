"""The picture of a trade-off: perplexity against speed for each batch size, and against entropy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from megatron_mdm.inference.text_quality import nats_per_token
from megatron_mdm.reporting.figures import PALETTE, REFERENCE_COLOR, open_figure
from megatron_mdm.studies.papers.tradeoff import Measured, Quality, TradeoffOptions
from megatron_mdm.studies.papers.tradeoff_findings import perplexity_interval

# Black is for AR.
_COLORS = PALETTE[:-1]
_MARKERS = ("o", "^", "v", "D", "P", "X")

Place = Callable[[Measured], float]


def draw_tradeoff(options: TradeoffOptions, real: Quality, measured: Sequence[Measured]) -> Figure:
    """Draws the picture.

    Args:
        options: What was tried.
        real: The held-out texts.
        measured: Each way.

    Returns:
        The figure.
    """
    sizes = options.batch_sizes
    columns = len(sizes) + 1
    with open_figure(3.5 * columns, 4.9, columns, share_y=True) as (figure, panels):
        for axes, size in zip(panels, sizes, strict=False):
            _draw(axes, measured, real, _speed_at(size, options), with_steps=True)
            axes.set(xscale="log", xlabel="tokens per second")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{size} text{'s' * (size > 1)} at once")
        last = panels[-1]
        _draw(last, measured, real, _mean_entropy, with_steps=False)
        entropy = float(np.mean(real.entropies_N))
        last.plot(entropy, _perplexity(real)[0], "*", color=REFERENCE_COLOR, ms=12, zorder=4)
        last.set(xlabel="entropy of a text's tokens, nats")
        last.set_title("Likely, or only repetitive?")
        panels[0].set(yscale="log", ylabel="generative perplexity under the judge")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
        handles, labels = last.get_legend_handles_labels()
        num_columns = min(len(labels), 2 * columns)
        figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, fontsize=8)
    return figure


def _draw(
    axes: Axes, measured: Sequence[Measured], real: Quality, place: Place, *, with_steps: bool
) -> None:
    level, low, high = _perplexity(real)
    axes.axhspan(low, high, color=REFERENCE_COLOR, alpha=0.15, lw=0)
    axes.axhline(level, color=REFERENCE_COLOR, lw=1.1, ls=(0, (5, 3)), label="real texts")
    lines: dict[str, list[Measured]] = {}
    others = []
    for one in measured:
        if one.way.objective == "ar":
            others.append(one)
        else:
            lines.setdefault(one.way.line, []).append(one)
    for index, (name, points) in enumerate(lines.items()):
        color, marker = (
            _COLORS[index % len(_COLORS)],
            _MARKERS[index // len(_COLORS) % len(_MARKERS)],
        )
        _points(axes, points, place, color=color, marker=marker, lw=1.4, ms=4, label=name)
        if index == 0 and with_steps:
            for one in points:
                _label(axes, place(one), _perplexity(one.quality)[0], f"{one.way.num_steps}", color)
    if others:
        label = "AR with key-value cache"
        _points(axes, others, place, color="black", marker="s", lw=0.8, ms=5, label=label)
        for one in {others[0].way: others[0], others[-1].way: others[-1]}.values():
            text = one.way.line.removeprefix("AR ")
            _label(axes, place(one), _perplexity(one.quality)[0], text, "black")


def _points(axes: Axes, points: Sequence[Measured], place: Place, **look: Any) -> None:
    found = np.array([_perplexity(one.quality) for one in points])
    reach = np.nan_to_num(np.abs(found[:, 1:] - found[:, :1])).T
    axes.errorbar([place(one) for one in points], found[:, 0], reach, elinewidth=0.9, **look)


def _label(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    axes.annotate(
        text, (x, y), (4, 4), textcoords="offset points", fontsize=7.5, color=color, zorder=5
    )


def _perplexity(quality: Quality) -> tuple[float, float, float]:
    """Perplexity with the ends of its 95% interval."""
    return math.exp(nats_per_token(quality.losses).mean), *perplexity_interval(quality.losses)


def _speed_at(batch_size: int, options: TradeoffOptions) -> Place:
    tokens = batch_size * options.new_tokens
    return lambda one: tokens / statistics.median(one.seconds[batch_size])


def _mean_entropy(one: Measured) -> float:
    return float(np.mean(one.quality.entropies_N))
