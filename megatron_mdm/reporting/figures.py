"""How figures look, and how they are drawn and kept: as a picture, or inside an HTML page."""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from megatron_mdm.core.files import open_whole_file
from megatron_mdm.core.statistics import Interval, percentile_band
from megatron_mdm.diffusion.samples import LossKind
from megatron_mdm.reporting.baselines import Baselines
from megatron_mdm.reporting.metrics import (
    NLL,
    list_averages,
    list_judges,
    name_average_group,
    name_judge,
)

# Everywhere: solid is what held-out windows cost, dashed what training windows do, dotted the loss
# as it was trained on, and grey what a curve is compared with.
TRAINING_WINDOWS, AS_TRAINED, REFERENCE_DASHES = "--", ":", (0, (5, 3))
REFERENCE_COLOR = "#8a8f98"
TEXT_COLOR = "#3c4149"
# Okabe and Ito's colours, told apart by colour-blind readers too. What is neither AR nor MDM has
# those that look like no shade of the two.
OBJECTIVE_COLORS = {"ar": "#d55e00", "mdm": "#0072b2"}
PALETTE = ("#009e73", "#cc79a7", "#000000", "#b5a000")
# Of runs of one objective on one plot: how much black or white its colour gets at most.
_MOST_MIXED = 0.5
_DOTS_PER_INCH = 150
_DASHES_OF_COUNTS = {"unigram": (0, (7, 2, 1.5, 2)), "bigram": (0, (2, 2))}

STYLE: Any = {
    "svg.fonttype": "none",
    "text.color": TEXT_COLOR,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9bec6",
    "axes.labelcolor": TEXT_COLOR,
    "axes.titlecolor": TEXT_COLOR,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "xtick.color": "#b9bec6",
    "ytick.color": "#b9bec6",
    "xtick.labelcolor": TEXT_COLOR,
    "ytick.labelcolor": TEXT_COLOR,
    "legend.frameon": False,
    "legend.labelcolor": TEXT_COLOR,
    "legend.fontsize": 9,
}


@contextmanager
def open_figure(
    width: float, height: float, columns: int = 1, *, share_y: bool = False
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of panels side by side, in the style of this project within the block.

    Args:
        width: Inches.
        height: Inches.
        columns: Panels.
        share_y: One y axis for all.

    Yields:
        The figure and its panels from left to right.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, columns, squeeze=False, sharey=share_y)
        yield figure, list(panels[0])


def list_further_losses(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Losses that validations of a run measured besides: of averages, by other objectives.

    Args:
        records: Records of the run.

    Returns:
        The metric of each, what to call it, and a colour.
    """
    averages = dict.fromkeys(name for record in records for name in list_averages(record))
    found = [
        (NLL.replace("valid", name_average_group(name)), f"average {name}") for name in averages
    ]
    judges = list_judges(records)
    shades = [PALETTE[number % len(PALETTE)] for number in range(len(found))]
    shades += color_objectives(judges)
    found += [(name_judge(judge), f"held out, as {judge.upper()}") for judge in judges]
    return [(*one, shade) for one, shade in zip(found, shades, strict=True)]


def color_objectives(kinds: Sequence[str | None]) -> list[str]:
    """A colour for each curve of a plot: its objective's, in as many shades as it has curves.

    Args:
        kinds: `ar`, `mdm`, or what another objective is called, in the order of the legend; None:
            not known.

    Returns:
        Colours as `#rrggbb`.
    """
    others = list(dict.fromkeys(kind for kind in kinds if kind not in OBJECTIVE_COLORS))
    found = []
    for index, kind in enumerate(kinds):
        base = OBJECTIVE_COLORS.get(kind or "")
        base = base or PALETTE[others.index(kind) % len(PALETTE)]
        total, place = kinds.count(kind), kinds[:index].count(kind)
        darkest = -_MOST_MIXED if total > 2 else 0.0
        share = float(np.linspace(darkest, _MOST_MIXED, total)[place]) if total > 1 else 0.0
        mixed = (1 - abs(share)) * np.array(colors.to_rgb(base)) + max(share, 0.0)
        found.append(colors.to_hex(tuple(mixed)))
    return found


def fill_band(axes: Axes, x: ArrayLike, spread: ArrayLike, color: str, **options: Any) -> None:
    """Fills between the ends of many curves, [resamples, points]."""
    axes.fill_between(x, *percentile_band(spread), color=color, alpha=0.16, lw=0, **options)


def draw_baselines(
    axes: Axes, baselines: Baselines | None, kind: LossKind, reach: tuple[float, float]
) -> list[float]:
    """Draws the lines that lie near the curves.

    Args:
        axes: Of a loss, in nats per token.
        baselines: What counting gives; None: no lines.
        kind: Over which tokens.
        reach: Lowest and highest loss that is drawn.

    Returns:
        Heights of the lines that were drawn.
    """
    if baselines is None:
        return []
    low, high = reach
    margin = 0.5 * (high - low) + 0.1
    heights = []
    for name, height in getattr(baselines, kind)._asdict().items():
        if low - margin <= height <= high + margin:
            label = f"{name} {height:.2f}"
            axes.axhline(
                height, color=REFERENCE_COLOR, lw=1.1, ls=_DASHES_OF_COUNTS[name], label=label
            )
            heights.append(height)
    return heights


def error_bar(value: float, interval: Interval | None) -> NDArray[np.float64] | None:
    """The error bar of a value as matplotlib takes it, from its interval; None without one."""
    return None if interval is None else np.abs(np.array(interval) - value)[:, None]


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure, whole or not at all.

    Args:
        path: A PNG or SVG file, as its ending says; its folder is made when absent.
        figure: What `open_figure` made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE), open_whole_file(path) as stream:
        figure.savefig(stream, format=path.suffix.lstrip(".") or "png", dpi=_DOTS_PER_INCH)


def render_svg(figure: Figure, name: str) -> str:
    """Renders to an SVG element whose ids are its own among all plots of a page."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)  # HTML knows the namespaces of SVG
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    return _follow_theme(svg)


_COLOR = re.compile(r"(?<=: )#([0-9a-f]{6})\b")


def _follow_theme(svg: str) -> str:
    """Makes each colour a variable, which a dark page gives another value."""
    on_dark = "".join(f"--c{one}: {_find_dark(one)}; " for one in sorted(set(_COLOR.findall(svg))))
    rule = f"@media (prefers-color-scheme: dark) {{ :root {{ {on_dark}}} }}"
    svg = _COLOR.sub(r"var(--c\1, #\1)", svg)
    return svg.replace(">", f"><style>{rule}</style>", 1)


def _find_dark(color: str) -> str:
    """What a colour becomes on a dark page: greys turn round, from #181c22 on, others lighten."""
    rgb = colors.to_rgb(f"#{color}")
    hue, light, saturation = colorsys.rgb_to_hls(*rgb)
    is_grey = max(rgb) - min(rgb) < 0.1
    light = 0.11 + 0.84 * (1 - light) ** 0.8 if is_grey else 0.42 + 0.45 * light
    return colors.to_hex(colorsys.hls_to_rgb(hue, light, saturation))
