"""The report of a trade-off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from megatron_mdm.core.statistics import CONFIDENCE
from megatron_mdm.reporting.figures import (
    OBJECTIVE_COLORS,
    REFERENCE_COLOR,
    REFERENCE_DASHES,
    color_objectives,
    open_figure,
)
from megatron_mdm.reporting.pages import Facts, Heading, Paragraph, Picture, Report, Sample, Table
from megatron_mdm.reporting.run_folder import flatten
from megatron_mdm.studies.machine import describe_machine
from megatron_mdm.studies.papers.tradeoff import (
    DISTINCT,
    Measured,
    Quality,
    group_by_line,
    select_autoregressive,
)
from megatron_mdm.studies.papers.tradeoff_findings import (
    Findings,
    format_estimate,
    format_interval,
    format_perplexity,
    summarize_findings,
)

_CAPTION = (
    "Bars: 95% intervals over texts. Numbers: steps of masked diffusion, of one line. Right: lower "
    "and further to the right is better; what is likely with little entropy repeats itself. Star: "
    "real texts."
)
_MARKERS = ("o", "^", "v", "D", "P", "X")

_Position = Callable[[Measured], float]

_NOTE = (
    "Perplexity under the judge, of what follows the prompts, with its 95% interval over texts; "
    "entropy of a text's tokens in nats; distinct-n over all texts; tokens per second of all texts "
    "of a batch together, median over rounds."
)
_MATCH_NOTE = (
    "Where a line of masked diffusion has the perplexity of the autoregressive texts, between two "
    "measured numbers of steps; better: it has it even at the fewest that were measured. Interval "
    f"of {CONFIDENCE:.0%} over texts; reached in: share of resamples of the texts in which the "
    "perplexity is reached at all."
)


def write_tradeoff(folder: Path, findings: Findings) -> dict[str, Path]:
    """Writes the report.

    Args:
        folder: Where; made when absent.
        findings: What was measured.

    Returns:
        Paths of the page, the picture, the tables and all figures, by ending.
    """
    # Of each line the way with the most steps.
    shown = {one.way.line: one for one in findings.measured}.values()
    return Report(
        name="tradeoff",
        title="Quality against speed",
        subtitle="Held-out prompts continued by masked diffusion and by autoregression with a "
        "key-value cache",
        parts=[
            *map(Paragraph, summarize_findings(findings)),
            Picture(_draw(findings), _CAPTION),
            Heading("Ways to write"),
            tabulate_ways(findings),
            Heading("Speed at matched perplexity"),
            tabulate_matches(findings),
            Heading("What was written"),
            *(Sample(one.way.name, *one.example) for one in shown),
            Heading("How it was measured"),
            Facts(_facts(findings)),
        ],
        tree=findings_to_tree(findings),
    ).write(folder)


def tabulate_ways(findings: Findings) -> Table:
    """Every way with its figures.

    Args:
        findings: What was measured.

    Returns:
        A row for each.
    """
    sizes = findings.options.batch_sizes
    heads = ["way", "perplexity", "nats per token", "entropy"]
    heads += [f"distinct-{n}" for n in DISTINCT]
    for size in sizes:
        heads += [f"tokens/s, {size} at once", f"times {findings.reference.way.name}"]
    rows = [["real texts", *_quality_cells(findings.real), *[""] * (2 * len(sizes))]]
    for one in findings.measured:
        row = [one.way.name, *_quality_cells(one.quality)]
        for size in sizes:
            row.append(f"{one.tokens_per_second(size, findings.options.new_tokens):,.0f}")
            row.append(f"{one.speed_over(findings.reference, size):.2f}")
        rows.append(row)
    return Table(heads, rows, _NOTE)


def tabulate_matches(findings: Findings) -> Table:
    """Every match with its figures.

    Args:
        findings: What was measured.

    Returns:
        A row for each.
    """
    heads = ["at once", "AR", "MDM", "verdict", "steps", "times AR's speed", "interval"]
    heads += ["reached in", "entropy", "less AR's"]
    rows = []
    for one in findings.matches:
        is_reached = one.verdict != "not_reached"
        speed = f"{'≥ ' * (one.verdict == 'better')}{one.relative_speed:.2f}"
        rows.append(
            [
                f"{one.batch_size}",
                one.ar,
                one.line,
                one.verdict.replace("_", " "),
                "-".join(f"{steps}" for steps in sorted(set(one.steps))) if is_reached else "",
                speed if is_reached else "",
                format_interval(one) if one.verdict == "matched" else "",
                f"{one.share_reached:.0%}",
                f"{one.entropy:.3f}" if is_reached else "",
                format_estimate(one.entropy_difference, "+") if is_reached else "",
            ]
        )
    return Table(heads, rows, _MATCH_NOTE)


def findings_to_tree(findings: Findings) -> dict[str, Any]:
    """Everything as JSON values.

    Args:
        findings: What was measured.

    Returns:
        The tree.
    """
    return {
        "options": asdict(findings.options),
        **findings.folders,
        "judge_retokenizes": findings.judge_retokenizes,
        "dtype": findings.dtype,
        "machine": _machine(),
        "real": _quality_tree(findings.real),
        "ways": [
            asdict(one.way)
            | {"name": one.way.name}
            | _quality_tree(one.quality)
            | {
                "seconds": one.seconds,
                "tokens_per_second": {
                    size: one.tokens_per_second(size, findings.options.new_tokens)
                    for size in one.seconds
                },
                "example": one.example,
            }
            for one in findings.measured
        ],
        "matches": [one._asdict() for one in findings.matches],
    }


def _quality_tree(quality: Quality) -> dict[str, Any]:
    return {
        "nats_per_token": quality.loss.mean,
        "standard_error": quality.loss.standard_error,
        "perplexity": quality.perplexity,
        "perplexity_interval": quality.perplexity_interval,
        "entropy": quality.entropy.mean,
        "entropy_standard_error": quality.entropy.standard_error,
        **{f"distinct_{n}": share for n, share in zip(DISTINCT, quality.distinct, strict=True)},
        "nats_of_texts": quality.losses.nats_N.tolist(),
        "tokens_of_texts": quality.losses.tokens_N.tolist(),
        "entropy_of_texts": quality.entropies_N.tolist(),
    }


def _quality_cells(quality: Quality) -> list[str]:
    estimates = [format_estimate(one) for one in (quality.loss, quality.entropy)]
    return [format_perplexity(quality), *estimates, *(f"{share:.3f}" for share in quality.distinct)]


def _facts(findings: Findings) -> list[tuple[str, str]]:
    options, folders = findings.options, findings.folders
    judge = folders["judge"] + (", texts encoded anew" if findings.judge_retokenizes else "")
    return [
        ("masked diffusion", folders["mdm"]),
        ("autoregressive, key-value cache", folders["ar"]),
        ("judge", judge),
        ("prompts", f"{options.num_prompts} windows of {folders['data']}"),
        ("tokens", f"{options.prompt_tokens} given, {options.new_tokens} written"),
        ("blocks of masked diffusion", f"{options.block_length or 'none'}"),
        ("its keys and values", "kept within a block" if options.cache else "computed each step"),
        ("dtype", findings.dtype),
        ("rounds of timings", f"{options.repeats}"),
        ("seed", f"{options.seed}"),
        *((name.replace("_", " "), f"{value}") for name, value in flatten(_machine())),
    ]


def _machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "threads": torch.get_num_threads()} | describe_machine()


def _draw(findings: Findings) -> Figure:
    """Perplexity against speed for each batch size, and against entropy."""
    sizes, real = findings.options.batch_sizes, findings.real
    columns = len(sizes) + 1
    with open_figure(3.5 * columns, 4.9, columns, share_y=True) as (figure, panels):
        for axes, size in zip(panels, sizes, strict=False):
            _draw_panel(axes, findings, _speed_at(size, findings), with_steps=True)
            axes.set(xscale="log", xlabel="tokens per second")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{size} text{'s' * (size > 1)} at once")
        last = panels[-1]
        _draw_panel(last, findings, lambda one: one.quality.entropy.mean, with_steps=False)
        last.plot(real.entropy.mean, real.perplexity, "*", color=REFERENCE_COLOR, ms=12, zorder=4)
        last.set(xlabel="entropy of a text's tokens, nats")
        last.set_title("Likely, or only repetitive?")
        panels[0].set(yscale="log", ylabel="generative perplexity under the judge")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
        handles, labels = last.get_legend_handles_labels()
        # Inches of an entry: its letters, and its line.
        num_columns = int(3.5 * columns / (0.07 * max(map(len, labels)) + 0.5))
        figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, fontsize=8)
    return figure


def _draw_panel(axes: Axes, findings: Findings, place: _Position, *, with_steps: bool) -> None:
    real = findings.real
    axes.axhspan(*real.perplexity_interval, color=REFERENCE_COLOR, alpha=0.15, lw=0)
    axes.axhline(
        real.perplexity, color=REFERENCE_COLOR, lw=1.1, ls=REFERENCE_DASHES, label="real texts"
    )
    lines = group_by_line(findings.measured)
    for index, (name, points) in enumerate(lines.items()):
        color = color_objectives(["mdm"] * len(lines))[index]
        marker = _MARKERS[index % len(_MARKERS)]
        _draw_points(axes, points, place, color=color, marker=marker, lw=1.4, ms=4, label=name)
        if index == 0 and with_steps:
            for one in points:
                _label(axes, one, place, f"{one.way.num_steps}", color)
    others = select_autoregressive(findings.measured)
    label, color = "AR with key-value cache", OBJECTIVE_COLORS["ar"]
    _draw_points(axes, others, place, color=color, marker="s", lw=0.8, ms=5, label=label)
    for one in {others[0].way: others[0], others[-1].way: others[-1]}.values():
        _label(axes, one, place, one.way.line.removeprefix("AR "), color)


def _draw_points(axes: Axes, points: Sequence[Measured], place: _Position, **look: Any) -> None:
    heights = np.array([one.quality.perplexity for one in points])
    ends = np.array([one.quality.perplexity_interval for one in points]).T
    reach = np.nan_to_num(np.abs(ends - heights))
    axes.errorbar([place(one) for one in points], heights, reach, elinewidth=0.9, **look)


def _label(axes: Axes, one: Measured, place: _Position, text: str, color: str) -> None:
    at = (place(one), one.quality.perplexity)
    axes.annotate(text, at, (4, 4), textcoords="offset points", fontsize=7.5, color=color, zorder=5)


def _speed_at(batch_size: int, findings: Findings) -> _Position:
    return lambda one: one.tokens_per_second(batch_size, findings.options.new_tokens)
