"""Traces: the changes of each sample, step by step, as a sampler reports them.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mdm.diffusion.samplers import SamplingStep


class Change(NamedTuple):
    """A position that got another token.

    Attributes:
        position: Within the sample's own sequence, from 0.
        token_id: The new token; the mask token where one was masked again.
        probability: With which it was chosen; None for a mask, and for what follows the end of a
            text.
    """

    position: int
    token_id: int
    probability: float | None


@dataclass(frozen=True)
class Trace:
    """How a sample came about.

    Attributes:
        initial: Token ids before the first step, with mask tokens where new ones go.
        steps: The changes of each step; none is empty.
    """

    initial: list[int]
    steps: list[list[Change]]

    def replay(self, num_steps: int) -> list[int]:
        """Replays a number of steps; returns the token ids after them."""
        tokens = list(self.initial)
        for step in self.steps[:num_steps]:
            for change in step:
                tokens[change.position] = change.token_id
        return tokens


class Tracer:
    """A sampler's callback that keeps the changes of every sequence of a batch.

    Args:
        initial_BS: int64 [B, S] on the CPU, with mask tokens where new ones go.
        first_columns: Column of each sequence's first token; before it is padding.
    """

    def __init__(self, initial_BS: Tensor, first_columns: Sequence[int]) -> None:
        self._initial_BS = initial_BS
        self._first_columns = first_columns
        self._tokens_BS = initial_BS.clone()
        self._probability_BS = torch.full(initial_BS.shape, torch.nan)
        self._steps: list[list[list[Change]]] = [[] for _ in first_columns]

    def __call__(self, state: SamplingStep) -> None:
        """Records a step. An autoregressive sampler reports only the columns so far."""
        seen = slice(0, state.x_BS.shape[1])
        tokens_BS, probability_BS = state.x_BS.cpu(), state.probability_BS.float().cpu()
        before_BS, known_BS = self._tokens_BS[:, seen], self._probability_BS[:, seen]
        # A token masked again and chosen once more within one step may be the same.
        chosen_BS = (probability_BS != known_BS) & ~probability_BS.isnan()
        changed_BS = (tokens_BS != before_BS) | chosen_BS
        steps: dict[int, list[Change]] = {}
        for row, column in changed_BS.nonzero().tolist():
            probability = float(probability_BS[row, column])
            change = Change(
                column - self._first_columns[row],
                int(tokens_BS[row, column]),
                None if probability != probability else probability,
            )
            steps.setdefault(row, []).append(change)
        for row, changes in steps.items():
            # A step that changed other sequences alone is no step of this one.
            self._steps[row].append(changes)
        self._tokens_BS[:, seen] = tokens_BS
        self._probability_BS[:, seen] = probability_BS

    def trace(self, row: int, num_tokens: int) -> Trace:
        """Traces a sequence.

        Args:
            row: Its place in the batch.
            num_tokens: Its length; changes beyond are left out.

        Returns:
            The trace.
        """
        first = self._first_columns[row]
        kept = [
            [change for change in step if 0 <= change.position < num_tokens]
            for step in self._steps[row]
        ]
        initial = self._initial_BS[row, first : first + num_tokens].tolist()
        return Trace(initial, [step for step in kept if step])
