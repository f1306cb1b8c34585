"""The reversal curse as a recipe: facts, runs of both objectives, questions, a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import Interval, wilson_interval
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.reporting.figures import (
    OBJECTIVE_COLORS,
    REFERENCE_COLOR,
    TEXT_COLOR,
    error_bar,
    open_figure,
)
from megatron_mdm.reporting.pages import Heading, Picture, Report, Table
from megatron_mdm.studies.papers.reversal_facts import (
    DIRECTIONS,
    Direction,
    Fact,
    ask_questions,
    invent_facts,
    make_questions,
    write_facts,
)
from megatron_mdm.studies.steps import run_step
from megatron_mdm.studies.sweeps.grid import SweepRun, load_sweep
from megatron_mdm.studies.sweeps.run_sizes import SizedRun, size_runs
from megatron_mdm.studies.sweeps.run_states import has_reached_end

FACTS_SEED = 0
NUM_ONE_WAY, NUM_BOTH_WAYS = 40, 120
# As many tokens as these facts give a byte-level BPE: every word is one.
VOCABULARY = 1344
_LABELS = {"ar": "autoregressive", "mdm": "masked diffusion"}
_TICKS = {"forward": "A is __", "reverse": "B is __", "in_place": "__ is B"}
_CAPTION = "Share of right answers, with the 95% interval over all questions."
_RINGS = " Over all runs; rings: each run."
# Of a bar.
_WIDTH = 0.36
# Answers of a run in a direction that are kept.
_EXAMPLES = 4


@dataclass(frozen=True)
class Answers:
    """What a run knew.

    Attributes:
        objective: `ar` or `mdm`.
        seed: Of its weights, order and noise.
        direction: In which it was asked.
        num_right: Answers that are right, word for word.
        num_questions: Questions.
        examples: Some of question, answer and right answer.
    """

    objective: str
    seed: int
    direction: Direction
    num_right: int
    num_questions: int
    examples: tuple[tuple[str, str, str], ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num_questions


def prepare_facts(folder: Path) -> list[Fact]:
    """Makes facts, tokenizer and shards; each step reuses what it finds done.

    Args:
        folder: Where all goes; `configs/reversal` names its shards.

    Returns:
        The facts.

    Raises:
        MdmError: A step failed; it has said why.
    """
    facts = invent_facts(FACTS_SEED, NUM_ONE_WAY, NUM_BOTH_WAYS)
    folder.mkdir(parents=True, exist_ok=True)
    told, tokenizer = folder / "facts.jsonl", folder / "tokenizer"
    write_facts(told, facts)
    run_step(
        "tokenizer",
        "train",
        *("--input", told, "--vocab-size", VOCABULARY, "--output", tokenizer),
    )
    run_step(
        "prepare-finetuning",
        *("--input", told, "--tokenizer", tokenizer, "--output-prefix", folder / "facts"),
    )
    return facts


def require_finished_runs(sweep: Path) -> list[SizedRun]:
    """Finds the runs of a sweep that has come to its end.

    Args:
        sweep: Its file.

    Returns:
        The runs.

    Raises:
        DataError: A run has not come to its end.
    """
    planned = load_sweep(sweep).runs
    # Sizes need the shards, which are made before the first run.
    has_begun = any(run.folder.exists() for run in planned)
    runs = size_runs(planned, from_ledgers=True) if has_begun else []
    left = [run for run in runs if not has_reached_end(run)]
    if left or not has_begun:
        folder = left[0].folder if left else planned[0].folder
        raise DataError(
            f"{len(left or planned)} of {len(planned)} runs have not come to their end, the first "
            f"of them in {folder}: leave out --report-only, or run `make reversal`, which goes on "
            "where they stopped."
        )
    return runs


def ask_runs(sweep: Path, facts: Sequence[Fact]) -> list[Answers]:
    """Exports every run of a finished sweep and asks it all questions.

    Args:
        sweep: Its file.
        facts: The facts.

    Returns:
        For every run the answers in each direction.

    Raises:
        MdmError: A run has not come to its end, and none has been asked.
    """
    found = []
    for run in require_finished_runs(sweep):
        export = run.folder / "hf"
        run_step(
            "convert",
            *("to-hf", "--run", run.folder, "--output", export, "--overwrite"),
        )
        found += _question(run, export, facts)
    return found


def _question(run: SweepRun, export: Path, facts: Sequence[Fact]) -> list[Answers]:
    model = ExportedModel(export)
    questions = [
        one
        for one in make_questions(facts)
        if one.direction != "in_place" or not model.facts.is_causal
    ]
    given = ask_questions(model, questions, run.config.data.seq_length)
    found = []
    for direction in dict.fromkeys(one.direction for one in questions):
        asked = [
            (one, answer)
            for one, answer in zip(questions, given, strict=True)
            if one.direction == direction
        ]
        found.append(
            Answers(
                objective=run.config.objective.kind,
                seed=run.config.run.seed,
                direction=direction,
                num_right=sum(one.answer == answer for one, answer in asked),
                num_questions=len(asked),
                examples=tuple(
                    (one.shown, answer, one.answer) for one, answer in asked[:_EXAMPLES]
                ),
            )
        )
    return found


@dataclass(frozen=True)
class Finding:
    """The accuracy of an objective in a direction, over its runs.

    Attributes:
        objective: `ar` or `mdm`.
        direction: In which it was asked.
        accuracy: Share of right answers, over all runs.
        interval: Wilson's, 95%, as if all questions of all runs were independent.
        of_runs: The share of each run, by its seed.
    """

    objective: str
    direction: Direction
    accuracy: float
    interval: Interval
    of_runs: dict[int, float]


def summarize_answers(answers: Sequence[Answers]) -> list[Finding]:
    """Accuracies over runs.

    Args:
        answers: Of all runs.

    Returns:
        A finding for each objective and direction, AR first, forward first.

    Raises:
        DataError: There are no answers.
    """
    if not answers:
        raise DataError("There are no answers: let the sweep finish a run.")
    groups: dict[tuple[str, Direction], list[Answers]] = {}
    for one in sorted(answers, key=lambda one: (one.objective, DIRECTIONS.index(one.direction))):
        groups.setdefault((one.objective, one.direction), []).append(one)
    findings = []
    for (objective, direction), group in groups.items():
        right, asked = sum(one.num_right for one in group), sum(one.num_questions for one in group)
        seeds = {one.seed: one.accuracy for one in group}
        interval = wilson_interval(right, asked)
        findings.append(Finding(objective, direction, right / asked, interval, seeds))
    return findings


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
            tabulate_accuracies(findings),
            draw_accuracies(findings),
            Heading("Some answers"),
            _examples(answers),
        ],
        tree=tree,
    ).write(folder)


def tabulate_accuracies(findings: Sequence[Finding]) -> Table:
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
            one.interval.format(".1%"),
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


def draw_accuracies(findings: Sequence[Finding]) -> Picture:
    """The accuracies as bars.

    Args:
        findings: Over runs.

    Returns:
        A bar for each objective and direction.
    """
    several = any(len(one.of_runs) > 1 for one in findings)
    return Picture(_draw(findings), _CAPTION + (_RINGS if several else ""))


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
                bar = error_bar(one.accuracy, one.interval)
                axes.errorbar(x, one.accuracy, bar, color=TEXT_COLOR, lw=1, capsize=3)
                if len(one.of_runs) < 2:
                    continue
                # Beside each other, so that equal ones can be counted.
                spread = x + 0.06 * (np.arange(len(one.of_runs)) - (len(one.of_runs) - 1) / 2)
                shares = list(one.of_runs.values())
                ring: Any = {"color": "white", "mec": TEXT_COLOR, "ms": 4, "clip_on": False}
                axes.plot(spread, shares, "o", zorder=3, **ring)
        axes.set_xticks(range(len(DIRECTIONS)), [_TICKS[one] for one in DIRECTIONS])
        axes.set(
            xlim=(-0.5, len(DIRECTIONS) - 0.5),
            ylim=(0, 1.04),
            ylabel="answers that are right, word for word",
            title='Facts told as "A is B" alone',
        )
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
    return figure
