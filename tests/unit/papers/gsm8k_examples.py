"""Problems in the form of GSM8K: sums of small numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_NAMES = ["Ann", "Bob", "Cy", "Dee"]
_THINGS = ["pens", "cups", "figs", "hats"]


def sums(num_problems: int, largest: int, seed: int) -> list[dict[str, str]]:
    """Questions and annotated answers."""
    generator = np.random.default_rng(seed)
    problems = []
    for _ in range(num_problems):
        left, right = generator.integers(1, largest + 1, 2).tolist()
        name, thing = generator.choice(_NAMES), generator.choice(_THINGS)
        total = left + right
        problems.append(
            {
                "question": f"{name} has {left} {thing} and gets {right}. How many now?",
                "answer": f"{left} + {right} = <<{left}+{right}={total}>>{total}\n#### {total}",
            }
        )
    return problems


def write_lines(path: Path, problems: list[dict[str, str]]) -> Path:
    """As the set is published."""
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path
