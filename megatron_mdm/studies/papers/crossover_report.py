"""The report of a crossover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_mdm.config import CONVENTIONS
from megatron_mdm.core.statistics import CONFIDENCE, Interval
from megatron_mdm.reporting.curves import Axis, RunCurve, plot_comparison
from megatron_mdm.reporting.figures import (
    OBJECTIVE_COLORS,
    PALETTE,
    REFERENCE_COLOR,
    color_objectives,
    error_bar,
    open_figure,
)
from megatron_mdm.reporting.pages import Heading, Paragraph, Picture, Plot, Report, Table
from megatron_mdm.reporting.run_folder import format_scientific
from megatron_mdm.studies.laws.published import critical_band, critical_flops
from megatron_mdm.studies.papers.crossover import BestSetting, Comparison, MeasuredRun
from megatron_mdm.studies.papers.gap_trend import GapTrend

_AXES = {"unique_tokens": "unique tokens", "num_parameters": "parameters without embeddings"}
_CAPTION = (
    "Left: held-out loss of every seed of the best settings; dotted: the best of each with its "
    "interval. Right: the gap under every condition."
)
_NOTE = (
    "Losses in nats per token on the same held-out windows, over the tokens that both objectives "
    "predict (all but the first of a window): a negative log-likelihood for AR, an upper bound on "
    "one for MDM. Each is the mean over seeds of the lowest loss of a run, for the setting with "
    "the lowest mean; the lowest of many noisy losses is a little too low for both. Intervals of "
    f"{CONFIDENCE:.0%} over seeds, whose spread is pooled over all settings of an objective; they "
    "do not cover the choice of held-out windows, which all runs share; what that adds to a gap "
    "is said above. U: unique tokens. N: parameters with and without embeddings. Cross at: FLOPs "
    "by the rule 6 N D, for either N, from which MDM's best so far is no worse than AR's. "
    "Published: critical compute of arXiv 2507.15857 for such a U, which counts embeddings; known "
    "to a factor of 1.8 on 25 to 100 million tokens, and nowhere else. Elsewhere on this page N "
    "and FLOPs are without embeddings."
)
_CONDITIONS = (
    *("Corpus", "U", "N with", "N without", "AR", "interval", "AR setting", "MDM", "interval"),
    *("MDM setting", "Gap", "interval", "Cross at, with", "without", "published, with"),
)
_RUNS = (*("Run", "Epochs", "FLOPs with", "FLOPs without", "Best loss", "at epoch", "Last loss"),)


def write_crossover(
    folder: Path,
    comparisons: Sequence[Comparison],
    trends: Sequence[GapTrend],
    missing: Sequence[str],
) -> tuple[Path, Path]:
    """Writes the report: a page, a picture, and the tables in Markdown.

    Args:
        folder: Where; made when absent.
        comparisons: At least one.
        trends: Lines through their gaps.
        missing: Runs that have not been judged yet.

    Returns:
        Paths of the page and of the picture.
    """
    left_out = f"Not judged yet, and left out: {', '.join(missing)}."
    runs = [run for one in comparisons for run in (*one.ar.runs, *one.mdm.runs)]
    paths = Report(
        name="crossover",
        title="Autoregression against masked diffusion",
        subtitle="Many epochs over few tokens: the best of each, and where they meet",
        parts=[
            *(Paragraph(describe_comparison(one)) for one in comparisons),
            *(Paragraph(describe_trend(trend)) for trend in trends),
            *([Paragraph(left_out, is_warning=True)] if missing else []),
            Picture(_summary(comparisons, trends), _CAPTION),
            Heading("Conditions"),
            Table(_CONDITIONS, [_row(one) for one in comparisons], _NOTE),
            *(plot for n, one in enumerate(comparisons) for plot in _plots(one, f"condition-{n}")),
            Heading("Runs of the best settings"),
            Table(_RUNS, [_run_row(run) for run in runs]),
        ],
    ).write(folder)
    return paths["html"], paths["png"]


def describe_comparison(one: Comparison) -> str:
    """Says in words what a comparison found.

    Args:
        one: The comparison.

    Returns:
        Sentences.
    """
    condition = one.condition
    text = (
        f"{condition.unique_tokens:,} unique tokens of {condition.corpus}, "
        f"{condition.size}: AR reaches {_loss(one.ar)}, MDM {_loss(one.mdm)}. "
    )
    interval = f" ({one.interval.format('+.3f')})" if one.interval else ""
    ahead = "MDM is ahead" if one.gap < 0 else "AR is ahead"
    is_open = one.interval is not None and one.interval[0] < 0 < one.interval[1]
    text += f"{ahead} by {abs(one.gap):.3f} nats per token, gap {one.gap:+.3f}{interval}"
    text += ", which the seeds leave open. " if is_open else ". "
    text += _window_sentence(one)
    critical = one.critical
    seeds = len(one.mdm.runs)
    if critical.verdict == "crosses" and critical.flops is not None:
        share = critical.share_crossing if critical.share_crossing is not None else 1.0
        text += (
            f"The curves of best losses cross at {format_scientific(critical.flops)} FLOPs (N "
            "without embeddings), for "
            f"{round(share * seeds)} of {seeds} seeds"
        )
        finite = critical.interval is not None and all(map(math.isfinite, critical.interval))
        if finite and critical.interval is not None:
            low, high = map(format_scientific, critical.interval)
            text += f" ({low} to {high})"
        text += ". "
    elif critical.verdict == "never":
        text += "The curves of best losses do not cross. "
    else:
        text += "MDM is ahead wherever both were judged. "
    return text + _limit_sentence(one)


def describe_trend(trend: GapTrend) -> str:
    """Says in words how the gap moves.

    Args:
        trend: The line.

    Returns:
        Sentences.
    """
    name = _AXES[trend.variable]
    interval = trend.line.slope_interval
    # Per doubling: the natural step of both axes.
    slope = trend.line.slope * math.log(2)
    text = f"{trend.fixed}: with each doubling of {name} the gap moves by {slope:+.3f} nats"
    if interval is None:
        return text + " per token (two points: no interval)."
    doubling = Interval(*(end * math.log(2) for end in interval))
    text += f" per token ({doubling.format('+.3f')}, {len(trend.points)} points). "
    meeting, ends = trend.meeting, trend.meeting_interval
    if ends is None or meeting is None:
        return text + "Where it would close the runs do not say: the slope may as well be zero."
    inside = trend.points[0][0] <= meeting <= trend.points[-1][0]
    stretch = "" if inside else ", an extrapolation"
    return text + f"It would close at {meeting:.3g} {name} ({ends.format('.3g')}){stretch}."


def _window_sentence(one: Comparison) -> str:
    gap = one.window_gap
    if gap is None or not math.isfinite(gap.standard_error):
        return ""
    text = f"Over held-out windows, paired, the gap's standard error is {gap.standard_error:.4f}"
    if math.isfinite(gap.clustered_error):
        text += f" ({gap.clustered_error:.4f} by document)"
    return text + ". "


def _limit_sentence(one: Comparison) -> str:
    if not one.limits:
        return "No limit can be fitted to the MDM curves."
    limits = ", ".join(f"{limit.loss:.3f} ± {limit.error:.3f}" for limit in one.limits)
    text = f"Fits of E + K C^-gamma to the MDM curves tend to E = {limits}: "
    if not all(limit.excludes(one.ar.loss) for limit in one.limits):
        return text + "whether more of the same compute would close the gap they leave open."
    places = [limit.crossing_flops for limit in one.limits if limit.crossing_flops is not None]
    if not places:
        return text + "above AR's best, so more of the same compute would not close the gap."
    numbers = " and ".join(format_scientific(place) for place in places)
    return text + f"{len(places)} of {len(one.limits)} would reach AR's best, at {numbers} FLOPs."


def _loss(best: BestSetting) -> str:
    epochs = " and ".join(f"{run.epochs[run.best]:.3g}" for run in best.runs)
    interval = f" ({best.interval.format('.3f')})" if best.interval else ""
    return f"{best.loss:.3f}{interval} after {epochs} epochs"


def _range(interval: Interval | None, form: str) -> str:
    return "" if interval is None else interval.format(form)


def _row(one: Comparison) -> list[str]:
    condition = one.condition
    size = one.mdm.runs[0].size
    low, high = critical_band(critical_flops(unique_tokens=condition.unique_tokens))
    return [
        condition.corpus,
        f"{condition.unique_tokens:,}",
        *(
            "best" if condition.num_parameters is None else f"{n:,.0f}"
            for n in (size.with_embeddings, size.without_embeddings)
        ),
        *(
            cell
            for best in (one.ar, one.mdm)
            for cell in (f"{best.loss:.3f}", _range(best.interval, ".3f"), best.setting)
        ),
        f"{one.gap:+.3f}",
        _range(one.interval, "+.3f"),
        *(
            found.verdict if found.flops is None else format_scientific(found.flops)
            for found in (one.critical_with_embeddings, one.critical)
        ),
        f"{format_scientific(low)} to {format_scientific(high)}",
    ]


def _run_row(run: MeasuredRun) -> list[str]:
    best = run.best
    return [
        run.name,
        f"{run.epochs[-1]:.4g}",
        *(
            format_scientific(
                run.size.convert_flops(float(run.flops[-1]), "without_embeddings", counted)
            )
            for counted in CONVENTIONS
        ),
        f"{run.losses[best]:.4f} ± {run.errors[best]:.4f}",
        f"{run.epochs[best]:.4g}",
        f"{run.losses[-1]:.4f}",
    ]


def _plots(one: Comparison, name: str) -> list[Plot]:
    condition = one.condition
    curves = [
        RunCurve(f"{run.objective.upper()}, seed {run.seed}", run.records, run.objective)
        for best in (one.ar, one.mdm)
        for run in best.runs
    ]
    caption = (
        f"{condition.corpus}. Solid: held-out windows, with one standard error to each side; ring: "
        "the lowest. Dashed: windows of the training data, judged in the same way."
    )
    axes: dict[str, Axis] = {"epochs": "epoch", "compute": "consumed_flops_6nd"}
    return [
        Plot(
            title=f"{condition.amounts}: against {what}",
            svg=Markup(plot_comparison(curves, axis, name)),
            caption=caption,
        )
        for what, axis in axes.items()
    ]


def _summary(comparisons: Sequence[Comparison], trends: Sequence[GapTrend]) -> Figure:
    with open_figure(10.5, 4.3, columns=2) as (figure, (left, right)):
        # The condition that went furthest says most.
        _draw_curves(left, max(comparisons, key=lambda one: float(one.mdm.runs[0].flops[-1])))
        _draw_gaps(right, comparisons, trends)
    return figure


def _draw_curves(axes: Axes, one: Comparison) -> None:
    for kind, best in (("ar", one.ar), ("mdm", one.mdm)):
        shades = color_objectives([kind] * len(best.runs))
        for run, shade in zip(best.runs, shades, strict=True):
            label = f"{kind.upper()}, seed {run.seed}"
            axes.plot(run.flops, run.losses, color=shade, lw=1.5, label=label)
        color = OBJECTIVE_COLORS[kind]
        axes.axhline(best.loss, color=color, lw=0.8, ls=":")
        if best.interval is not None:
            axes.axhspan(*best.interval, color=color, alpha=0.12, lw=0)
    axes.set(
        xscale="log",
        xlabel="training FLOPs, 6 N D, N without embeddings",
        ylabel="held-out nats per token",
        title=one.condition.amounts,
    )
    axes.legend()


def _draw_gaps(axes: Axes, comparisons: Sequence[Comparison], trends: Sequence[GapTrend]) -> None:
    axes.axhline(0, color=REFERENCE_COLOR, lw=1)
    kinds = dict.fromkeys((one.condition.corpus, one.condition.size) for one in comparisons)
    for index, (corpus, size) in enumerate(kinds):
        color = PALETTE[index % len(PALETTE)]
        for one in comparisons:
            if (one.condition.corpus, one.condition.size) != (corpus, size):
                continue
            # Beside each other, where there are several.
            place = one.condition.unique_tokens * 1.05 ** (index - (len(kinds) - 1) / 2)
            axes.errorbar(
                place, one.gap, error_bar(one.gap, one.interval), fmt="o", color=color, ms=5
            )
        axes.plot([], [], "o", color=color, label=f"{Path(corpus).parent.name}, {size}")
        for trend in trends:
            if trend.variable == "unique_tokens" and trend.fixed == f"{corpus}, {size}":
                ends = np.array([trend.points[0][0], trend.points[-1][0] * 4])
                axes.plot(ends, [trend.at(float(x)) for x in ends], color=color, lw=1, ls="--")
    axes.set(
        xscale="log",
        xlabel="unique tokens",
        ylabel="best MDM less best AR, nats per token",
        title="Above zero AR is ahead",
    )
    amounts = sorted({one.condition.unique_tokens for one in comparisons})
    axes.set_xticks(amounts, [f"{amount:,}" for amount in amounts])
    axes.minorticks_off()
    axes.legend(fontsize=8)
