"""The report of a contest: who is best, by how much, and what the data allow to say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter, StrMethodFormatter

from megatron_mdm.core.statistics import CONFIDENCE
from megatron_mdm.reporting.figures import (
    PALETTE,
    REFERENCE_COLOR,
    color_objectives,
    error_bar,
    open_figure,
)
from megatron_mdm.reporting.pages import Heading, Paragraph, Picture, Report, Table
from megatron_mdm.reporting.run_folder import RunFolder, format_scientific
from megatron_mdm.studies.papers.contest import Result
from megatron_mdm.studies.papers.contest_findings import (
    JudgedRun,
    Measured,
    SeedSpread,
    measure_difference,
    measure_loss,
    pool_seeds,
)

_FLOPS, _EPOCH = "consumed_flops_6nd", "epoch"
_NOTE = (
    "Losses in nats per token over all tokens but the first of a window, which is given to AR and "
    "to diffusion alike: a negative log-likelihood for AR, an upper bound on one for diffusion. "
    "The held-out documents are divided: one half chose each contestant's trial, and of each run "
    "the validation and the weights; the losses are those of the other half. Each is the mean "
    f"over seeds that no trial had. Intervals of {CONFIDENCE:.0%} hold seeds, whose spread is "
    "pooled, and held-out documents; those of differences pair the windows."
)
_CAPTION = (
    "Left: held-out loss of the best setting of each, mean over seeds, on the documents that chose "
    "nothing. Middle: the same against compute. Right: differences with their intervals."
)


class Finding(NamedTuple):
    """What a result comes to beside the others.

    Attributes:
        result: The contestant or rung.
        loss: Over seeds and documents.
        difference: From what it is compared with; None: that itself.
    """

    result: Result
    loss: Measured
    difference: Measured | None


def compare_results(results: Sequence[Result], reference: str, spread: SeedSpread) -> list[Finding]:
    """Compares all with one, window by window.

    Args:
        results: Contestants.
        reference: Name of the one.
        spread: Of seeds.

    Returns:
        A finding for each, the least loss first.
    """
    base = next(one for one in results if one.name == reference)
    found = [
        Finding(
            one,
            measure_loss(one.runs, spread),
            None if one is base else measure_difference(base.runs, one.runs, spread),
        )
        for one in results
    ]
    return sorted(found, key=lambda one: one.loss.mean)


def climb_rungs(rungs: Sequence[Result], spread: SeedSpread) -> list[Finding]:
    """Compares each rung with the one below, from the lowest up."""
    pairs = zip([None, *rungs], rungs, strict=False)
    return [
        Finding(
            one,
            measure_loss(one.runs, spread),
            None if below is None else measure_difference(below.runs, one.runs, spread),
        )
        for below, one in pairs
    ]


def write_contest(
    folder: Path, results: Sequence[Result], rungs: Sequence[Result], reference: str
) -> tuple[Path, Path, str]:
    """Writes the report: a page, a picture, and the tables in Markdown.

    Args:
        folder: Where.
        results: The contestants, two or more.
        rungs: Of the ladder, from the lowest up; may be empty.
        reference: The contestant that the others are compared with.

    Returns:
        Paths of the page and of the picture, and what they say in words.
    """
    spread = pool_seeds(one.runs for one in (*results, *rungs))
    found, climbed = compare_results(results, reference, spread), climb_rungs(rungs, spread)
    verdict = describe_verdict(found, reference, rungs, spread)
    parts: list[Any] = [
        Paragraph(verdict),
        Picture(_draw(found, results, climbed, reference), _CAPTION),
        Heading("Contestants"),
        Table(_list_heads(reference), [_row(one) for one in found], _NOTE),
        Heading("Each against each"),
        Table(("Contestant", "Against", "Less it", "interval"), _list_pairs(found, spread)),
    ]
    if climbed:
        parts += [
            Heading("What each ingredient gives"),
            Paragraph(describe_ladder(climbed)),
            Table(_list_heads("the rung below"), [_row(one) for one in climbed]),
        ]
    parts += [Heading("Trials"), Table(("Trial", "Loss", "Setting"), _list_trials(results))]
    paths = Report(
        name="contest",
        title="Autoregression against diffusion, each at its best",
        subtitle="Tuned by as many trials, trained over the same seeds, judged on the same tokens",
        parts=parts,
    ).write(folder)
    return paths["html"], paths["png"], verdict


def describe_verdict(
    found: Sequence[Finding], reference: str, rungs: Sequence[Result], spread: SeedSpread
) -> str:
    """Says in words what the data allow.

    Args:
        found: Of `compare_results`.
        reference: Name of the one that all are compared with.
        rungs: Of the ladder. One may show that the trials of the reference missed its best.
        spread: Of seeds.

    Returns:
        Sentences.
    """
    base = next(one for one in found if one.result.name == reference)
    others = [one for one in found if one is not base]
    text = f"{reference} reaches {_format(base.loss, '.3f')} nats per token. "
    for one in others:
        assert one.difference is not None
        text += f"{_describe_difference(one.result.name, one.difference)} "
    settled = [one for one in others if one.difference and not one.difference.is_open]
    ahead = [one for one in settled if one.difference and one.difference.mean < 0]
    rung = _find_stronger_rung(base.result, rungs)
    if rung is not None:
        loss = _format(measure_loss(rung.runs, spread), ".3f")
        text += (
            f"The ladder's {rung.name} reaches {loss}, so {reference}'s trials missed its best. "
        )
    if ahead and rung is not None:
        difference = measure_difference(rung.runs, ahead[0].result.runs, spread)
        text += f"{_describe_difference(ahead[0].result.name, difference, 'that')} "
        ahead = ahead if difference.mean < 0 and not difference.is_open else []
    if ahead:
        return text + f"So on these tokens {ahead[0].result.name} beats {reference}."
    if all(one.difference and one.difference.mean > 0 for one in settled) and settled == others:
        return text + f"So on these tokens {reference} beats all of them."
    return text + f"So on these tokens nothing is shown to beat {reference}."


def _describe_difference(name: str, difference: Measured, other: str = "it") -> str:
    side = "below" if difference.mean < 0 else "above"
    open_ = ", which the data leave open" if difference.is_open else ""
    told = _range(difference, "+.3f")
    return f"{name} lies {abs(difference.mean):.3f} {side} {other} ({told}){open_}."


def _find_stronger_rung(base: Result, rungs: Sequence[Result]) -> Result | None:
    """The best rung of the same objective, if it is better than the reference where both choose."""
    kind = "objective.kind"
    same = [one for one in rungs if one.fields.get(kind) == base.fields.get(kind)]
    best = min(same, key=_find_choosing_loss, default=None)
    if best is None or _find_choosing_loss(best) >= _find_choosing_loss(base):
        return None
    return best


def _find_choosing_loss(result: Result) -> float:
    return float(np.mean([run.chosen_loss for run in result.runs]))


def describe_ladder(climbed: Sequence[Finding]) -> str:
    """Says in words what the rungs gave."""
    total = climbed[-1].loss.mean - climbed[0].loss.mean
    told = [
        f"{one.result.name} {one.difference.mean:+.3f} ({_range(one.difference, '+.3f')})"
        for one in climbed
        if one.difference is not None
    ]
    return f"From the lowest rung to the highest {total:+.3f} nats per token: {', '.join(told)}."


def _list_heads(reference: str) -> tuple[str, ...]:
    places = ("Best at", "FLOPs there", "Judged", "Setting")
    return ("Contestant", "Loss", "interval", f"Less {reference}", "interval", *places)


def _row(one: Finding) -> list[str]:
    result, runs = one.result, one.result.runs
    places = [_find_place(run) for run in runs]
    epochs = " and ".join(f"{epoch:.3g}" for epoch, _ in places)
    flops = float(np.mean([spent for _, spent in places]))
    difference = "" if one.difference is None else f"{one.difference.mean:+.3f}"
    return [
        result.name,
        f"{one.loss.mean:.4f}",
        _range(one.loss, ".3f"),
        difference,
        "" if one.difference is None else _range(one.difference, "+.3f"),
        f"{epochs} epochs",
        format_scientific(flops) if flops else "",
        ", ".join(dict.fromkeys(str(run.way) for run in runs)),
        _format_fields(result.fields),
    ]


def _list_pairs(found: Sequence[Finding], spread: SeedSpread) -> list[list[str]]:
    rows = []
    for better, worse in combinations((one.result for one in found), 2):
        difference = measure_difference(worse.runs, better.runs, spread)
        told = f"{difference.mean:+.3f}", _range(difference, "+.3f")
        rows.append([better.name, worse.name, *told])
    return rows


def _list_trials(results: Sequence[Result]) -> list[list[str]]:
    return [
        [trial.name, f"{trial.loss:.4f}", _format_fields(trial.fields)]
        for result in results
        for trial in result.trials
    ]


def _format_fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={json.dumps(value)}" for field, value in fields.items())


def _format(one: Measured, form: str) -> str:
    return f"{one.mean:{form}} ({_range(one, form)})"


def _range(one: Measured, form: str) -> str:
    return "no interval" if one.interval is None else one.interval.format(form)


def _find_place(run: JudgedRun) -> tuple[float, float]:
    """Epochs and FLOPs of the validation that was taken."""
    return _list_places(run).get(run.step, (math.nan, 0.0))


def _list_places(run: JudgedRun) -> dict[int, tuple[float, float]]:
    records = RunFolder(run.folder).records
    return {
        int(record["step"]): (float(record[_EPOCH]), float(record[_FLOPS]))
        for record in records
        if _EPOCH in record and _FLOPS in record
    }


def _draw(
    found: Sequence[Finding], results: Sequence[Result], climbed: Sequence[Finding], reference: str
) -> Figure:
    colors = dict(zip((one.name for one in results), _choose_colors(results), strict=True))
    columns = 4 if climbed else 3
    with open_figure(4.5 * columns, 4.3, columns=columns) as (figure, (left, middle, *rest)):
        for axes, place, label in ((left, 0, "epochs"), (middle, 1, "training FLOPs, 6 N D")):
            for one in results:
                x, y = _average_curve(one.runs, place)
                axes.plot(x, y, color=colors[one.name], lw=1.6, label=one.name)
            axes.set(xscale="log", xlabel=label, ylabel="held-out nats per token")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        middle.xaxis.set_major_formatter(
            LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf))
        )
        left.legend()
        _draw_differences(rest[0], found, colors)
        rest[0].set(xlabel=f"less {reference}, nats per token", title="Left of zero: better")
        if climbed:
            _draw_differences(rest[1], climbed, {})
            below = "less the rung below, nats per token"
            rest[1].set(xlabel=below, title="What each ingredient gives")
    return figure


def _draw_differences(axes: Axes, found: Sequence[Finding], colors: Mapping[str, str]) -> None:
    axes.axvline(0, color=REFERENCE_COLOR, lw=1)
    for place, one in enumerate(found):
        color = colors.get(one.result.name, PALETTE[2])
        if one.difference is None:
            axes.plot(0, place, "o", color=color)
            continue
        mean, interval = one.difference
        axes.errorbar(mean, place, xerr=error_bar(mean, interval), fmt="o", color=color)
    axes.set_yticks(range(len(found)), [one.result.name for one in found])
    axes.invert_yaxis()


def _choose_colors(results: Sequence[Result]) -> list[str]:
    kinds = []
    for one in results:
        is_plain = "objective.process" not in one.fields and not any(
            field.startswith("objective.process.") for field in one.fields
        )
        kind = one.fields.get("objective.kind", "mdm")
        kinds.append(kind if kind == "ar" or (kind == "mdm" and is_plain) else one.name)
    return color_objectives(kinds)


def _average_curve(runs: Sequence[JudgedRun], place: int) -> tuple[list[float], list[float]]:
    """Mean loss over seeds against epochs (0) or FLOPs (1), where all were judged."""
    places = _list_places(runs[0])
    steps = sorted(set(places).intersection(*(run.curve for run in runs)))
    losses = [float(np.mean([run.curve[step] for run in runs])) for step in steps]
    return [places[step][place] for step in steps], losses
