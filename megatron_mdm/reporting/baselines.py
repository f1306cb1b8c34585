"""What counting tokens gives on a run's held-out windows: a file of the run, lines in its plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_mdm.core.files import write_json_whole
from megatron_mdm.data.ngrams import CrossEntropy

BASELINES_FILE_NAME = "baselines.json"
EXPLANATION = (
    "Dashed, grey: what counts of single tokens (unigram) and of pairs (bigram) in the training "
    "data give on the held-out windows."
)


class Baselines(BaseModel):
    """Cross-entropies by counting, nats per token.

    Attributes:
        identity: Of what was counted and judged.
        counted_tokens: Tokens of the training data that were counted.
        nll: Over the tokens that the run's own held-out loss predicts.
        nll_given_first: Over those that AR predicts too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: str
    counted_tokens: int
    nll: CrossEntropy
    nll_given_first: CrossEntropy

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """Reads a run's file; None where there is none that can be read."""
        try:
            tree = json.loads((run_dir / BASELINES_FILE_NAME).read_text(encoding="utf-8"))
            return cls.model_validate(tree)
        except (OSError, ValueError, ValidationError):
            return None

    def write(self, run_dir: Path) -> None:
        """Writes the file, whole or not at all."""
        tree = self.model_dump()
        for kind in ("nll", "nll_given_first"):
            tree[kind] = getattr(self, kind)._asdict()
        write_json_whole(run_dir / BASELINES_FILE_NAME, tree)


def find_common(baselines: Sequence[Baselines | None]) -> Baselines | None:
    """The baselines of several runs, where all have the same; else None."""
    first = baselines[0] if baselines else None
    if first is None or any(one is None or one.identity != first.identity for one in baselines):
        return None
    return first
