"""The report on the reversal curse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megatron_mdm.reporting.figures import (
    OBJECTIVE_COLORS,
    REFERENCE_COLOR,
    TEXT_COLOR,
    open_figure,
)
from megatron_mdm.reporting.pages import Heading, Picture, Report, Table
from megatron_mdm.studies.papers.reversal import Answers, Finding
from megatron_mdm.studies.papers.reversal_questions import DIRECTIONS

_LABELS = {"ar": "autoregressive", "mdm": "masked diffusion"}
_TICKS = {"forward": "A is __", "reverse": "B is __", "in_place": "__ is B"}
_CAPTION = (
    "Share of right answers, with the 95% interval over all questions of all runs; rings: each run."
)
_WIDTH = 0.36


def write_reversal(
    folder: Path, findings: Sequence[Finding], answers: Sequence[Answers]
) -> dict[str, Path]:
    """Writes the report.

    Args:
        folder: Where; made when absent.
        findings: Accuracies over runs.
        answers: Of each run.

    Returns:
        Paths of the page, the picture, the tables and all counts, by ending.
    """
    tree = {
        "findings": [asdict(one) for one in findings],
        "answers": [asdict(one) for one in answers],
    }
    return Report(
        name="reversal",
        title="The reversal curse",
        subtitle="Facts told in one direction, asked in the other",
        parts=[
            accuracies(findings),
            Picture(_draw(findings), _CAPTION),
            Heading("Some answers"),
            _examples(answers),
        ],
        tree=tree,
    ).write(folder)


def accuracies(findings: Sequence[Finding]) -> Table:
    """The accuracies as a table.

    Args:
        findings: Over runs.

    Returns:
        A row for each objective and direction.
    """
    rows = [
        [
            one.objective.upper(),
            one.direction,
            f"{one.accuracy:.1%}",
            f"{one.interval[0]:.1%} to {one.interval[1]:.1%}",
            ", ".join(f"{share:.1%}" for share in one.of_runs.values()),
        ]
        for one in findings
    ]
    return Table(["Model", "Asked", "Right", "95% interval", "Each seed"], rows)


def _examples(answers: Sequence[Answers]) -> Table:
    first = {(one.objective, one.direction): one for one in reversed(answers)}
    rows = [
        [objective.upper(), direction, prompt, given or "(nothing)", right]
        for (objective, direction), one in sorted(first.items())
        for prompt, given, right in one.examples[:2]
    ]
    return Table(["Model", "Asked", "Question", "Answer", "Right answer"], rows)


def _draw(findings: Sequence[Finding]) -> Figure:
    with open_figure(6.4, 3.8) as (figure, (axes,)):
        objectives = sorted({one.objective for one in findings})
        for place, objective in enumerate(objectives):
            chosen = {one.direction: one for one in findings if one.objective == objective}
            for index, direction in enumerate(DIRECTIONS):
                x = index + _WIDTH * (place - (len(objectives) - 1) / 2)
                if direction not in chosen:
                    told = axes.text(x, 0.02, "cannot\nbe asked", ha="center", fontsize=8)
                    told.set_color(REFERENCE_COLOR)
                    continue
                one = chosen[direction]
                label = _LABELS[objective] if index == 0 else None
                axes.bar(
                    x, one.accuracy, 0.9 * _WIDTH, color=OBJECTIVE_COLORS[objective], label=label
                )
                reach = np.abs(np.array(one.interval) - one.accuracy)[:, None]
                axes.errorbar(x, one.accuracy, reach, color=TEXT_COLOR, lw=1, capsize=3)
                # Beside each other, so that equal ones can be counted.
                spread = x + 0.06 * (np.arange(len(one.of_runs)) - (len(one.of_runs) - 1) / 2)
                shares = list(one.of_runs.values())
                axes.plot(
                    spread,
                    shares,
                    "o",
                    color="white",
                    mec=TEXT_COLOR,
                    ms=4,
                    zorder=3,
                    clip_on=False,
                )
        axes.set_xticks(range(len(DIRECTIONS)), [_TICKS[one] for one in DIRECTIONS])
        axes.set(xlim=(-0.5, len(DIRECTIONS) - 0.5), ylim=(0, 1.04))
        axes.set(ylabel="answers that are right, word for word")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.grid(axis="x", visible=False)
        axes.set_title('Facts told as "A is B" alone')
        figure.legend(loc="outside lower center", ncols=2)
    return figure
