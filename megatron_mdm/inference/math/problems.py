"""Arithmetic problems, what became of them, and the figures of a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.statistics import wilson_interval
from megatron_mdm.inference.math.answers import Answer, find_answer, is_same

_FORM = "make the file with mdm prepare-gsm8k"


class MathProblem(NamedTuple):
    """A problem.

    Attributes:
        prompt: What the model is given.
        reference: The answer asked for, as `find_answer` gives it.
    """

    prompt: str
    reference: str


@dataclass(frozen=True)
class Outcome:
    """What became of a problem.

    Attributes:
        problem: The problem.
        text: What the model wrote.
        answer: What it says the answer is.
        is_right: Is it?
    """

    problem: MathProblem
    text: str
    answer: Answer
    is_right: bool


def read_problems(path: Path, limit: int | None = None) -> list[MathProblem]:
    """Reads problems.

    Args:
        path: Lines of JSON with `prompt` and `response`, in which the answer is looked for as it is
            in a generated text; `answer` goes before `response` where a line has it.
        limit: Read only so many.

    Returns:
        At least one problem.

    Raises:
        DataError: The file cannot be read, or a line has another form or no answer.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit={limit} is less than 1: leave it out for all problems.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data={path} cannot be read ({error}): {_FORM}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"--data={path} holds no problem: {_FORM}.")
    return [_parse_problem(line, f"{path} line {number}") for number, line in numbered[:limit]]


def _parse_problem(line: str, name: str) -> MathProblem:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{name} is not valid JSON ({error}): {_FORM}.") from None
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    told = fields.get("answer", fields.get("response")) if isinstance(fields, dict) else None
    if not isinstance(prompt, str) or not isinstance(told, str):
        raise DataError(f"{name} has no texts 'prompt' and 'response': {_FORM}.")
    reference = find_answer(told).value
    if reference is None:
        raise DataError(f"{name} has no number for an answer in {told[-60:]!r}: {_FORM}.")
    return MathProblem(prompt, reference)


def judge(problems: Sequence[MathProblem], texts: Sequence[str]) -> list[Outcome]:
    """Checks texts.

    Args:
        problems: The problems.
        texts: What was generated for each.

    Returns:
        What became of each.
    """
    found = [find_answer(text) for text in texts]
    return [
        Outcome(problem, text, answer, is_same(answer.value, problem.reference))
        for problem, text, answer in zip(problems, texts, found, strict=True)
    ]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of a run.

    Args:
        outcomes: At least one.

    Returns:
        `accuracy` counts answers wherever they stood, `accuracy_marked` those after `####` alone.
    """
    total = len(outcomes)
    right = sum(one.is_right for one in outcomes)
    marked = sum(one.is_right and one.answer.how == "hashes" for one in outcomes)
    share = right / total
    return {
        "num_problems": total,
        "num_right": right,
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / total),
        "interval_95": wilson_interval(right, total),
        "accuracy_marked": marked / total,
        "found": dict(sorted(Counter(one.answer.how for one in outcomes).items())),
    }
