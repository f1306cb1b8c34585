"""The report on the reversal curse: a Markdown table, JSON and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_mdm.core.files import whole_file, write_json_whole, write_text_whole
from megatron_mdm.inference.output import markdown_table
from megatron_mdm.reporting.plots import REFERENCE_COLOR, STYLE, TRAIN_COLOR, VALID_COLOR
from megatron_mdm.studies.papers.reversal import Answers, Finding
from megatron_mdm.studies.papers.reversal_questions import DIRECTIONS

NAME = "reversal"
_COLORS = {"ar": TRAIN_COLOR, "mdm": VALID_COLOR}
_LABELS = {"ar": "autoregressive", "mdm": "masked diffusion"}
_TICKS = {
    "forward": "A is __",
    "reverse": "B is __",
    "in_place": "__ is B",
}
_WIDTH = 0.36


def write_reversal(
    folder: Path, findings: Sequence[Finding], answers: Sequence[Answers]
) -> list[Path]:
    """Writes the report.

    Args:
        folder: Where; made when absent.
        findings: Accuracies over runs.
        answers: Of each run.

    Returns:
        Paths of the table, the picture and the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, picture, tree = (folder / f"{NAME}.{ending}" for ending in ("md", "png", "json"))
    write_text_whole(table, reversal_table(findings) + "\n" + _examples(answers))
    record = {
        "findings": [one.as_record() for one in findings],
        "answers": [asdict(one) for one in answers],
    }
    write_json_whole(tree, record)
    with mpl.rc_context(STYLE), whole_file(picture) as file:
        _draw(findings).savefig(file, format="png", dpi=150)
    return [table, picture, tree]


def reversal_table(findings: Sequence[Finding]) -> str:
    """The accuracies as a table.

    Args:
        findings: Over runs.

    Returns:
        Lines of Markdown.
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
    return markdown_table(["Model", "Asked", "Right", "95% interval", "Each seed"], rows)


def _examples(answers: Sequence[Answers]) -> str:
    first = {(one.objective, one.direction): one for one in reversed(answers)}
    rows = [
        [objective.upper(), direction, prompt, given or "(nothing)", right]
        for (objective, direction), one in sorted(first.items())
        for prompt, given, right in one.examples[:2]
    ]
    return markdown_table(["Model", "Asked", "Question", "Answer", "Right answer"], rows)


def _draw(findings: Sequence[Finding]) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
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
                axes.bar(x, one.accuracy, 0.9 * _WIDTH, color=_COLORS[objective], label=label)
                reach = np.abs(np.array(one.interval) - one.accuracy)[:, None]
                axes.errorbar(x, one.accuracy, reach, color="#3c4149", lw=1, capsize=3)
                # Beside each other, so that equal ones can be counted.
                spread = x + 0.06 * (np.arange(len(one.of_runs)) - (len(one.of_runs) - 1) / 2)
                shares = list(one.of_runs.values())
                axes.plot(
                    spread, shares, "o", color="white", mec="#3c4149", ms=4, zorder=3, clip_on=False
                )
        axes.set_xticks(range(len(DIRECTIONS)), [_TICKS[one] for one in DIRECTIONS])
        axes.set(ylim=(0, 1.04), ylabel="answers that are right, word for word")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.grid(axis="x", visible=False)
        axes.set_title('Facts told as "A is B" alone', loc="left", fontsize=11)
        figure.legend(loc="outside lower center", ncols=2)
    return figure
