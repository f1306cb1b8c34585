"""What counting tokens gives on the held-out windows, beside which a validation is judged."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.remarks import warn, warn_on_write_error
from megatron_mdm.data.ngrams import (
    MOST_COUNTED_TOKENS,
    CrossEntropy,
    count_tokens,
    judge_windows,
)
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import find_places_after_first
from megatron_mdm.reporting.baselines import BASELINES_FILE_NAME, Baselines
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.reporting.metrics import NLL
from megatron_mdm.training.hooks import Hook, TrainingRun

if TYPE_CHECKING:
    from megatron_mdm.training.plan import RunPlan
    from megatron_mdm.training.validation import Validation

_VERSION = 1


class CompareWithCounting(Hook):
    """Counts at the first validation, and says where a run has not learned more than counts tell.

    It works on the first rank alone, for seconds at most. Where responses alone are learned there
    is nothing to count: the tokens of prompts are not predicted.

    Args:
        plan: The run.
        validation: Knows the held-out windows.
    """

    name = "baselines"

    def __init__(self, plan: RunPlan, validation: Validation) -> None:
        self._plan = plan
        self._validation = validation
        self._baselines: Baselines | None = None
        self._is_left_out = plan.config.finetuning.enabled
        self._was_above: bool | None = None

    def after_validation(
        self, run: TrainingRun, record: dict[str, Any], judged: JudgedWindows | None
    ) -> None:
        """Remarks on the first validation, the last, and where the loss falls below the line."""
        if run.mesh.rank > 0 or judged is None or self._is_left_out:
            return
        if self._baselines is None:
            self._baselines = self._find(judged)
            self._is_left_out = self._baselines is None
        if self._baselines is None or not math.isfinite(record[NLL]):
            return
        remark = self._compare(record[NLL], self._baselines.nll, is_last=run.is_last_step)
        if remark:
            run.say(remark)

    def _compare(self, loss: float, counting: CrossEntropy, *, is_last: bool) -> str:
        before, is_above = self._was_above, loss >= counting.unigram
        self._was_above = is_above
        if is_above and (before is not True or is_last):
            return (
                f"the validation loss {loss:.3f} is not below {counting.unigram:.3f}, what "
                f"counting single tokens gives (pairs of tokens: {counting.bigram:.3f})"
            )
        if before and not is_above:
            return (
                f"the validation loss {loss:.3f} is now below {counting.unigram:.3f}, what "
                "counting single tokens gives"
            )
        return ""

    def _find(self, judged: JudgedWindows) -> Baselines | None:
        """Reads the run's file, or counts and writes it; None where that cannot be done."""
        config, data, folder = self._plan.config, self._plan.data, self._plan.run_dir
        told = [_VERSION, MOST_COUNTED_TOKENS, judged.windows, data.fingerprint]
        told += [config.model.vocab_size, config.data.attention, config.objective.kind]
        identity = hashlib.sha256(repr(told).encode()).hexdigest()
        found = Baselines.read(folder)
        if found is not None and found.identity == identity:
            return found
        try:
            size, length = config.model.vocab_size, config.data.seq_length
            counts = count_tokens(data.train.sources, size, length)
            of_all, of_rest = judge_windows(counts, self._validation.read_held_out())
            own = self._choose_own(of_all, of_rest)
        except DataError as error:
            # A shard that is damaged ends the run where training reads it, and not for a line.
            warn(f"what counting tokens gives is not known: {error}")
            return None
        if own is None:
            return None
        found = Baselines(
            identity=identity, counted_tokens=counts.num_tokens, nll=own, nll_given_first=of_rest
        )
        with warn_on_write_error(folder / BASELINES_FILE_NAME):
            found.write(folder)
        return found

    def _choose_own(self, of_all: CrossEntropy, of_rest: CrossEntropy) -> CrossEntropy | None:
        """Over the tokens that the objective's own loss predicts; None if it is neither kind."""
        objective = build_objective(self._plan.config)
        window = next(self._validation.read_held_out())
        predicted = objective.count_predictions(window)
        if predicted == len(window.tokens_S):
            return of_all
        return of_rest if predicted == len(find_places_after_first(window)) else None
