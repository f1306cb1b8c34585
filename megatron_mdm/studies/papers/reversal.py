"""The reversal curse as a recipe: facts, runs of both objectives, questions, a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.statistics import wilson_interval
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.studies.papers.reversal_facts import Fact, invent_facts, write_facts
from megatron_mdm.studies.papers.reversal_questions import (
    DIRECTIONS,
    Direction,
    ask,
    questions_on,
)
from megatron_mdm.studies.steps import run_step
from megatron_mdm.studies.sweeps.grid import SweepRun, load_sweep
from megatron_mdm.studies.sweeps.run_sizes import size_runs
from megatron_mdm.studies.sweeps.run_states import reached_end

FACTS_SEED = 0
NUM_ONE_WAY, NUM_BOTH_WAYS = 40, 120
# As many tokens as these facts give a byte-level BPE: every word is one.
VOCABULARY = 1344


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
        "tools/train_tokenizer.py",
        *("--input", told, "--vocab-size", VOCABULARY, "--output", tokenizer),
    )
    run_step(
        "tools/prepare_finetuning.py",
        *("--input", told, "--tokenizer", tokenizer, "--output-prefix", folder / "facts"),
    )
    return facts


def question_runs(sweep: Path, facts: Sequence[Fact]) -> list[Answers]:
    """Exports every run of a finished sweep and asks it all questions.

    Args:
        sweep: Its file.
        facts: The facts.

    Returns:
        For every run the answers in each direction.

    Raises:
        MdmError: A run has not come to its end, and none has been asked.
    """
    runs = size_runs(load_sweep(sweep).runs, from_ledgers=True)
    left = [run for run in runs if not reached_end(run)]
    if left:
        raise DataError(
            f"{len(left)} of {len(runs)} runs have not come to their end, the first of them in "
            f"{left[0].folder}: `make reversal` goes on where they stopped."
        )
    found = []
    for run in runs:
        export = run.folder / "hf"
        run_step(
            "tools/convert_checkpoint.py",
            *("to-hf", "--run", run.folder, "--output", export, "--overwrite"),
        )
        found += _question(run, export, facts)
    return found


def _question(run: SweepRun, export: Path, facts: Sequence[Fact]) -> list[Answers]:
    model = ExportedModel(export)
    questions = [
        one
        for one in questions_on(facts)
        if one.direction != "in_place" or not model.facts.is_causal
    ]
    given = ask(model, questions, run.config.data.seq_length)
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
                examples=tuple((one.shown, answer, one.answer) for one, answer in asked[:3]),
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
    interval: tuple[float, float]
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
    findings = []
    for objective in sorted({one.objective for one in answers}):
        for direction in DIRECTIONS:
            chosen = [
                one for one in answers if (one.objective, one.direction) == (objective, direction)
            ]
            if not chosen:
                continue
            right = sum(one.num_right for one in chosen)
            asked = sum(one.num_questions for one in chosen)
            findings.append(
                Finding(
                    objective,
                    direction,
                    right / asked,
                    wilson_interval(right, asked),
                    {one.seed: one.accuracy for one in chosen},
                )
            )
    return findings
